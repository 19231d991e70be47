"""Does the map point at what was changed? The pointing game and IoU against known masks.

Pointing game: Zhang et al., "Top-down Neural Attention by Excitation Backprop": a hit when the map's highest
point lies in the mask. IoU: the map thresholded at its own mean, and at the level at which as much of the
picture is marked as the mask covers (so that a map's spread neither helps nor harms). Two maps that know
nothing of the picture stand beside: a centre prior, and one without any preference.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detectors.crops import CropPolicy, fit, to_tensor
from detectors.members import BATCH, Member
from detectors.readings import Image
from detectors.training.probes import Pair
from detectors.training.robustness import Rate, mean, told

BASELINES = ("centre prior", "no preference")
"""Maps that know nothing of the picture."""

Mask = NDArray[np.bool_]
"""bool [h, w] of a crop: True where it was changed."""
Map = NDArray[np.float32]
"""float32 [h, w], higher where the network looked more; of any size."""

SMOOTH = 4 / 224
"""Sigma, as a share of the side, under which a difference is smoothed: single pixels are the encoder's."""
CLOSE = 15 / 224
"""Side, as a share of the crop's, of the square that closes holes: a swap leaves cheeks nearly the same."""
EDGE = 20 / 224
"""Width, as a share of the side, of the rim in which aligned pairs agree."""
MOST_EDGE = 6.0
"""Median grey levels by which the rims of an aligned pair may differ: H.264 of two renderings of one frame.
Other pairs show another moment or another box, and their difference is no mask."""
LEAST_CONTRAST = 3.0
"""The change must exceed the rim's difference so many times, or it is not told from the encoder's."""
AREAS = (0.03, 0.7)
"""Shares of the picture that a mask may cover: less is noise, more leaves nothing to point beside."""
SHARPEST = 0.25
"""Standard deviation of the centre prior as a share of the side: that of a face about its crop's centre."""


@dataclass(frozen=True, slots=True)
class Known:
    """A manipulated crop uint8 [h, w, 3] whose `mask` is known, and the person filmed."""

    image: Image
    mask: Mask
    identity: int


@dataclass(frozen=True, slots=True)
class Explained:
    """How well one way to point does: shares 0..1 with intervals over people. `area` is what a map without
    preference hits."""

    name: str
    crops: int
    pointing: Rate
    iou_at_mean: Rate
    iou_at_area: Rate

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def known_pairs(pairs: Iterable[Pair]) -> list[Known]:
    """The pairs whose mask can be told from their difference; the others are left out."""
    masks = ((pair, difference_mask(pair.authentic, pair.manipulated)) for pair in pairs)
    return [Known(pair.manipulated, mask, pair.identity) for pair, mask in masks if mask is not None]


def difference_mask(authentic: Image, manipulated: Image) -> Mask | None:
    """Where a manipulated crop differs from its original, bool [h, w]; None for a pair that is not aligned
    or whose difference is no region.

    Both uint8 [h, w, 3] of the same shape. The difference is smoothed, cut at Otsu's threshold and closed.
    """
    side = authentic.shape[0]
    change = np.abs(authentic.astype(np.float32) - manipulated).mean(axis=2)
    smooth = cv2.GaussianBlur(change, (0, 0), SMOOTH * side)
    edge = max(1, round(EDGE * side))
    rim = np.ones(change.shape, bool)
    rim[edge:-edge, edge:-edge] = False
    at_rim = float(np.median(change[rim]))
    if at_rim > MOST_EDGE or np.quantile(smooth, 0.95) < LEAST_CONTRAST * max(at_rim, 1.0):
        return None
    levels = np.clip(smooth * (255 / smooth.max()), 0, 255).astype(np.uint8)
    _, cut = cv2.threshold(levels, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    width = max(1, round(CLOSE * side))
    closed = cv2.morphologyEx(cut, cv2.MORPH_CLOSE, np.ones((width, width), np.uint8))
    mask: Mask = closed.astype(bool)
    return mask if AREAS[0] <= mask.mean() <= AREAS[1] else None


def attention(member: Member, images: Sequence[Image]) -> list[Map]:
    """The member's map of every crop, each as the network gives it (20x20 for instance)."""
    maps: list[Map] = []
    for start in range(0, len(images), BATCH):
        faces = inputs(images[start : start + BATCH], member.policy)
        with torch.inference_mode():
            _, found = member.module(faces)
        maps += list(found.float().numpy())
    return maps


def inputs(images: Sequence[Image], policy: CropPolicy) -> Tensor:
    """Crops as the network takes them, float32 [N, 3, S, S]."""
    return to_tensor(np.stack([fit(image, policy.size, policy.resampling) for image in images]), policy)


def explained(name: str, maps: Sequence[Map], known: Sequence[Known]) -> Explained:
    """The figures of one set of maps."""
    identity = np.array([one.identity for one in known])
    scores = np.array(
        [
            (pointing(grown, one.mask), iou(grown >= grown.mean(), one.mask), iou_at_area(grown, one.mask))
            for grown, one in (
                (enlarged(found, one.mask), one) for found, one in zip(maps, known, strict=True)
            )
        ]
    )

    return Explained(name, len(known), *(mean(column, identity) for column in scores.T))


def baselines(known: Sequence[Known]) -> list[Explained]:
    """The two ways to point that look at nothing.

    The uniform map has no highest point and no order: its figures are what a random point and a random region
    of the mask's size expect, and at its mean it marks the whole crop.
    """
    prior = explained(BASELINES[0], [centre_prior(one.mask.shape) for one in known], known)
    area = np.array([one.mask.mean() for one in known])
    identity = np.array([one.identity for one in known])
    whole, random = mean(area, identity), mean(area / (2 - area), identity)
    return [prior, Explained(BASELINES[1], len(known), whole, whole, random)]


def centre_prior(shape: tuple[int, ...]) -> Map:
    """A Gaussian about the crop's centre."""
    y, x = (((np.arange(side) + 0.5) / side - 0.5) / SHARPEST for side in shape)
    return np.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / 2).astype(np.float32)


def enlarged(found: Map, mask: Mask) -> Map:
    """The map at the mask's size."""
    height, width = mask.shape
    out: Map = cv2.resize(found.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return out


def pointing(grown: Map, mask: Mask) -> float:
    """1 when the highest point lies in the mask, else 0; of several equally high ones the share in it."""
    return float(mask[grown == grown.max()].mean())


def iou(marked: Mask, mask: Mask) -> float:
    """Intersection over union, 0..1; 0 when both are empty."""
    union = int((marked | mask).sum())
    return int((marked & mask).sum()) / union if union else 0.0


def iou_at_area(grown: Map, mask: Mask) -> float:
    """IoU of the mask and as many of the map's highest pixels as it has."""
    count = int(mask.sum())
    order = np.argsort(grown, axis=None, kind="stable")[::-1][:count]
    marked = np.zeros(mask.size, bool)
    marked[order] = True
    return iou(marked.reshape(mask.shape), mask)


def table(found: Mapping[str, Sequence[Explained]]) -> list[str]:
    """Rows by where the masks come from, as lines of Markdown."""
    lines = [
        "| masks | map | crops | pointing game | IoU, map at its mean | IoU, map at the mask's area |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {source} | {one.name} | {one.crops} | {told(one.pointing)} | {told(one.iou_at_mean)} "
        f"| {told(one.iou_at_area)} |"
        for source, rows in found.items()
        for one in rows
    ]
    return lines
