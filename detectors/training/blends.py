"""Manipulated crops made of authentic ones, by family, from nothing but authentic faces.

self: a face blended with a changed copy of itself (Shiohara and Yamasaki, "Detecting Deepfakes with
Self-Blended Images", from its description, SCIENCE C). cross: another person's face warped onto it and
blended, as in Face X-ray. swap: a simulated face swap; what is pasted lost its detail and noise in a
generator, the target keeps its own. lip: the same for the mouth alone. In every family what lies outside of
the mask stays as it was, and the caller degrades and compresses the pair alike AFTER blending.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.readings import Image
from detectors.training.eigenfaces import Eigenfaces
from detectors.training.faces import Points, Shape, affine, filled, outline, similarity

RATIOS = (0.5, 0.75, 1.0, 1.0, 1.0)
"""Weights of the blend as in the paper, without its .25: invisible at stream quality."""

GENERATOR_PX = (64.0, 192.0)
"""Sides of the squares that face generators work on, from early autoencoders to today's live swappers."""
LEAST_CHANGE = 1.5
"""Grey levels by which a manipulated crop must differ under its mask, on average; real DFDC ones do by 8."""
LEAST_AREA = 0.01
"""Share of the crop that the mask must cover; a mouth covers .04."""
DRAWS = 4
"""After so many the pair is taken as it is."""
GENERATOR_SIDE = 3.2
"""That square's side in distances between the pupils, by the alignment live swappers share."""


class Family(StrEnum):
    """How a manipulated crop is made."""

    SELF = "self"
    CROSS = "cross"
    SWAP = "swap"
    LIP = "lip"


@dataclass(frozen=True, slots=True)
class Face:
    """A crop, uint8 [P, P, 3] RGB, and its landmarks, float32 [5, 2] in its pixels."""

    image: Image
    points: Points

    @property
    def eyes(self) -> float:
        """Distance between the pupils in pixels."""
        return float(np.linalg.norm(self.points[1] - self.points[0]))


@dataclass(frozen=True, slots=True)
class Blend:
    """A pair: `real` and `fake`, uint8 [P, P, 3], equal where `mask`, float32 [P, P] in 0..1, is 0."""

    real: Image
    fake: Image
    mask: NDArray[np.float32]


def blend(
    family: Family, target: Face, donor: Face, eigenfaces: Eigenfaces, rng: np.random.Generator
) -> Blend:
    """One pair of a family. `donor` is another person's face; self-blends leave it alone.

    A draw that changes nothing to see (a generator finer than the face, say) is drawn again: what equals its
    authentic partner must not be learned as manipulated.
    """
    made = MAKERS[family](target, donor, eigenfaces, rng)
    for _ in range(DRAWS - 1):
        if visible(made):
            break
        made = MAKERS[family](target, donor, eigenfaces, rng)
    return made


def visible(made: Blend) -> bool:
    """Whether the pair differs by enough, over enough of the crop."""
    covered = made.mask > 0.1
    if covered.mean() < LEAST_AREA:
        return False
    change = cv2.absdiff(made.real, made.fake).mean(axis=2)[covered].mean()
    return bool(change >= LEAST_CHANGE)


def mixed(real: Image, source: Image, mask: NDArray[np.float32]) -> Blend:
    """`source` over `real` with the weights of the mask."""
    fake: Image = cv2.blendLinear(source, np.ascontiguousarray(real), mask, 1 - mask)
    fake = np.where(mask[..., None] > 0, fake, real)
    return Blend(real, fake, mask)


def soft_mask(face: Face, shape: Shape, rng: np.random.Generator, *, feather: float) -> NDArray[np.float32]:
    """A face part's outline, drawn unevenly, bent, and soft inwards by up to `feather` pupil distances."""
    side = face.image.shape[0]
    corners = outline(face.points, shape) + rng.normal(0, 0.04 * face.eyes, (1, 2))
    middle = corners.mean(0)
    corners = middle + (corners - middle) * rng.uniform(0.85, 1.05, (1, 2))
    corners = corners + rng.normal(0, 0.025 * face.eyes, corners.shape)
    mask = _bent(filled(corners.astype(np.float32), side), face.eyes, rng)
    width = 2 * max(1, round(rng.uniform(0.03, feather) * face.eyes)) + 1
    plateau = (cv2.blur(mask, (width, width)) > 0.999).astype(np.float32)
    soft: NDArray[np.float32] = cv2.blur(plateau, (width, width))
    return soft


def _bent(mask: NDArray[np.float32], eyes: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Elastic deformation: a smooth random field of some twentieth of the pupils' distance."""
    side = mask.shape[0]
    field = rng.normal(0, 0.05 * eyes, (2, 5, 5)).astype(np.float32)
    dx, dy = (cv2.resize(part, (side, side), interpolation=cv2.INTER_CUBIC) for part in field)
    grid = np.arange(side, dtype=np.float32)
    bent: NDArray[np.float32] = cv2.remap(mask, grid[None, :] + dx, grid[:, None] + dy, cv2.INTER_LINEAR)
    return bent


def _self(target: Face, donor: Face, eigenfaces: Eigenfaces, rng: np.random.Generator) -> Blend:
    shape = rng.choice(np.array([Shape.FACE, Shape.LOW, Shape.FEATURES, Shape.BOX, Shape.EYES]),
                       p=[0.3, 0.3, 0.2, 0.1, 0.1])  # fmt: skip
    mask = soft_mask(target, Shape(shape), rng, feather=0.35) * np.float32(rng.choice(RATIOS))
    changed = _detail(_tone(target.image, rng), rng)
    real, source = (target.image, changed) if rng.random() < 0.5 else (changed, target.image)
    return mixed(real, _moved(source, rng), mask)


def _cross(target: Face, donor: Face, eigenfaces: Eigenfaces, rng: np.random.Generator) -> Blend:
    shape = rng.choice(np.array([Shape.FACE, Shape.LOW, Shape.FEATURES]), p=[0.35, 0.4, 0.25])
    mask = soft_mask(target, Shape(shape), rng, feather=0.35)
    source = _laid(donor, target, rng)
    if rng.random() < 0.8:
        source = matched(source, target.image, mask)
    if rng.random() < 0.4:
        source = _detail(source, rng)
    return mixed(target.image, source, mask)


def _swap(target: Face, donor: Face, eigenfaces: Eigenfaces, rng: np.random.Generator) -> Blend:
    shape = rng.choice(np.array([Shape.FACE, Shape.LOW, Shape.BOX, Shape.FEATURES]), p=[0.3, 0.3, 0.25, 0.15])
    mask = soft_mask(target, Shape(shape), rng, feather=0.5)
    onto = target if rng.random() < 0.5 else Face(_laid(donor, target, rng), target.points)
    source = eigenfaces.rebuilt(onto, rng) if rng.random() < 0.35 else generated(onto, rng)
    if rng.random() < 0.3:
        source = _sharpened(source, float(rng.uniform(0.5, 1.5)))
    source = matched(source, target.image, mask) if rng.random() < 0.7 else _tone(source, rng)
    if rng.random() < 0.3:
        source = _moved(source, rng)
    return mixed(target.image, source, mask)


def _lip(target: Face, donor: Face, eigenfaces: Eigenfaces, rng: np.random.Generator) -> Blend:
    mask = soft_mask(target, Shape.MOUTH, rng, feather=0.25)
    onto = (
        Face(_stretched(target, rng), target.points)
        if rng.random() < 0.6
        else Face(_laid(donor, target, rng), target.points)
    )
    source = generated(onto, rng)
    source = matched(source, target.image, mask) if rng.random() < 0.7 else _tone(source, rng)
    return mixed(target.image, source, mask)


def generated(face: Face, rng: np.random.Generator) -> Image:
    """The face as a generator of limited resolution gives it back: detail and noise are lost."""
    side = face.image.shape[0]
    resolution = np.exp(rng.uniform(*np.log(GENERATOR_PX)))
    reduction = min(1.0, resolution / (GENERATOR_SIDE * face.eyes))
    small = max(16, round(side * reduction))
    out = cv2.resize(face.image, (small, small), interpolation=cv2.INTER_AREA)
    out = _denoised(out, rng)
    way = int(rng.choice([cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4]))
    enlarged: Image = cv2.resize(out, (side, side), interpolation=way)
    return enlarged


def matched(source: Image, target: Image, mask: NDArray[np.float32]) -> Image:
    """`source` with the mean and spread of the target's Lab colours under the mask."""
    lab_s = cv2.cvtColor(source, cv2.COLOR_RGB2LAB)
    lab_t = cv2.cvtColor(np.ascontiguousarray(target), cv2.COLOR_RGB2LAB)
    under = (mask > 0.5).astype(np.uint8)
    mean_s, std_s = (moment[:, 0] for moment in cv2.meanStdDev(lab_s, mask=under))
    mean_t, std_t = (moment[:, 0] for moment in cv2.meanStdDev(lab_t, mask=under))
    gain = np.clip(std_t / np.maximum(std_s, 1), 0.5, 2.0)
    levels = np.arange(256)[:, None]
    table = np.clip((levels - mean_s) * gain + mean_t + 0.5, 0, 255).astype(np.uint8)
    coloured: Image = cv2.cvtColor(cv2.LUT(lab_s, table.reshape(1, 256, 3)), cv2.COLOR_LAB2RGB)
    return coloured


def _laid(donor: Face, target: Face, rng: np.random.Generator) -> Image:
    """The donor's picture moved so that its landmarks come to lie on the target's."""
    fit = affine if rng.random() < 0.6 else similarity
    return laid(donor, target, fit(donor.points, target.points))


def laid(donor: Face, target: Face, matrix: NDArray[np.float64]) -> Image:
    """The donor's picture moved by a map [2, 3] into one of the target's size."""
    side = target.image.shape[0]
    moved: Image = cv2.warpAffine(
        np.ascontiguousarray(donor.image), matrix, (side, side), flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )  # fmt: skip
    return moved


def _tone(image: Image, rng: np.random.Generator) -> Image:
    """A small shift of colour, contrast and saturation."""
    gain, shift = 1 + rng.uniform(-0.1, 0.1), rng.uniform(-15, 15, 3)
    levels = np.arange(256)[:, None]
    table = np.clip((levels - 128) * gain + 128 + shift + rng.uniform(-15, 15), 0, 255).astype(np.uint8)
    out: Image = cv2.LUT(np.ascontiguousarray(image), table.reshape(1, 256, 3))
    if rng.random() < 0.5:
        grey = cv2.cvtColor(cv2.cvtColor(out, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        share = float(rng.uniform(0.75, 1.25))
        out = cv2.addWeighted(out, share, grey, 1 - share, 0)
    return out


def _detail(image: Image, rng: np.random.Generator) -> Image:
    """Detail lost by scaling or a filter, or gained by sharpening, or left."""
    side = image.shape[0]
    kind = rng.integers(4)
    if kind == 0:
        small = round(side / rng.uniform(1.5, 4))
        out: Image = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
        return np.asarray(cv2.resize(out, (side, side), interpolation=cv2.INTER_LINEAR), np.uint8)
    if kind == 1:
        return _denoised(image, rng)
    if kind == 2:
        return _sharpened(image, float(rng.uniform(0.4, 1.2)))
    return image


def _denoised(image: Image, rng: np.random.Generator) -> Image:
    kind = rng.integers(4)
    if kind == 0:
        return np.asarray(cv2.bilateralFilter(image, 5, float(rng.uniform(15, 50)), 3.0), np.uint8)
    if kind == 1:
        return np.asarray(cv2.medianBlur(image, 3), np.uint8)
    if kind == 2:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.5, 1.3))), np.uint8)
    return image


def _sharpened(image: Image, amount: float) -> Image:
    smooth = cv2.GaussianBlur(image, (0, 0), 1.5)
    return np.asarray(cv2.addWeighted(image, 1 + amount, smooth, -amount, 0), np.uint8)


def _moved(image: Image, rng: np.random.Generator) -> Image:
    """Shifted by up to 3 % across and 1.5 % down, scaled by up to 5 %."""
    side = image.shape[0]
    scale = rng.uniform(0.95, 1 / 0.95)
    shift = rng.uniform(-1, 1, 2) * (0.03, 0.015) * side
    away = side / 2 * (1 - scale) + shift
    matrix = np.array([[scale, 0, away[0]], [0, scale, away[1]]])
    moved: Image = cv2.warpAffine(
        np.ascontiguousarray(image), matrix, (side, side), flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )  # fmt: skip
    return moved


def _stretched(face: Face, rng: np.random.Generator) -> Image:
    """The picture with the mouth opened or closed: stretched along the face about the mouth's middle."""
    middle = face.points[3:].mean(0)
    down = middle - face.points[:2].mean(0)
    down = down / max(float(np.linalg.norm(down)), 1e-6)
    stretch = float(rng.choice([rng.uniform(0.75, 0.92), rng.uniform(1.08, 1.3)]))
    linear = np.eye(2) + (stretch - 1) * np.outer(down, down)
    matrix = np.concatenate([linear, (middle - linear @ middle)[:, None]], axis=1)
    side = face.image.shape[0]
    stretched: Image = cv2.warpAffine(
        np.ascontiguousarray(face.image), matrix, (side, side), flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )  # fmt: skip
    return stretched


MAKERS: Mapping[Family, Callable[[Face, Face, Eigenfaces, np.random.Generator], Blend]] = {
    Family.SELF: _self,
    Family.CROSS: _cross,
    Family.SWAP: _swap,
    Family.LIP: _lip,
}
