"""What happens to a face between a camera and a stream, drawn at random and cheap.

One `Degradation` is drawn for a PAIR and applied to both of its crops, the authentic and the manipulated one:
no property of the degradation can tell the classes apart (SCIENCE C: a class-dependent one is a shortcut the
network takes).
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.readings import Image

SEVERE_SHARE = 0.25
"""Severe degradation erases the cue: at most 30 % of the samples (SCIENCE C)."""


@dataclass(frozen=True, slots=True)
class Degradation:
    """One draw. Lengths are fractions of the crop's side, `sigma` is in pixels, `noise` in grey levels."""

    flip: bool
    matrix: NDArray[np.float64]
    lut: NDArray[np.uint8]
    saturation: float
    shrink: float
    interpolation: int
    sigma: float
    motion: int
    noise: float
    noise_seed: int
    jpeg: int
    patch: tuple[float, float, float, float, int] | None


def draw(rng: np.random.Generator, source: int, size: int) -> Degradation:
    """Draws one degradation for crops of `source` px that leave with `size` px."""
    severe = rng.random() < SEVERE_SHARE
    which = rng.integers(6) if severe else -1
    return Degradation(
        flip=bool(rng.random() < 0.5),
        matrix=_affine(rng, source, size),
        lut=_tone(rng, low_light=which == 0),
        saturation=float(rng.uniform(0.6, 1.3)) if rng.random() < 0.4 else 1.0,
        shrink=_shrink(rng, severe=which in (1, 5)),
        interpolation=int(rng.choice([cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA])),
        sigma=_sigma(rng, severe=which in (2, 5)),
        motion=int(rng.integers(3, 8)) if which == 4 else 0,
        noise=_noise(rng, severe=which in (0, 3)),
        noise_seed=int(rng.integers(2**31)),
        jpeg=_jpeg(rng, severe=severe),
        patch=_patch(rng),
    )


def apply(image: Image, degradation: Degradation, size: int) -> Image:
    """uint8 [S, S, 3] RGB in, uint8 [size, size, 3] RGB out; the same draw gives the same result."""
    d = degradation
    if d.flip:
        image = image[:, ::-1]
    out: Image = cv2.warpAffine(
        np.ascontiguousarray(image),
        d.matrix,
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    out = cv2.LUT(out, d.lut)
    if d.saturation != 1.0:
        grey = cv2.cvtColor(cv2.cvtColor(out, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        out = cv2.addWeighted(out, d.saturation, grey, 1 - d.saturation, 0)
    if d.patch is not None:
        x, y, w, h, grey_level = d.patch
        out[int(y * size) : int((y + h) * size), int(x * size) : int((x + w) * size)] = grey_level
    if d.motion:
        kernel = np.zeros((d.motion, d.motion), np.float32)
        kernel[d.motion // 2] = 1 / d.motion
        out = cv2.filter2D(out, -1, kernel)
    if d.sigma:
        out = cv2.GaussianBlur(out, (0, 0), d.sigma)
    if d.shrink < 1:
        small = max(16, round(size * d.shrink))
        out = cv2.resize(out, (small, small), interpolation=cv2.INTER_AREA)
    if d.noise:
        noise = np.random.default_rng(d.noise_seed).standard_normal(out.shape, dtype=np.float32) * d.noise
        out = np.clip(out + noise, 0, 255).astype(np.uint8)
    if d.jpeg:
        out = _jpeg_round_trip(out, d.jpeg)
    if d.shrink < 1:
        out = cv2.resize(out, (size, size), interpolation=d.interpolation)
    return out


def _jpeg_round_trip(image: Image, quality: int) -> Image:
    _, coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    if decoded is None:
        raise ValueError(f"JPEG of quality {quality} cannot be read back")
    out: Image = decoded
    return out


def _affine(rng: np.random.Generator, source: int, size: int) -> NDArray[np.float64]:
    """About what two face detectors disagree by: 12 % of scale, 5 % of place, 4 % of aspect, 8 degrees."""
    scale = size / source * rng.uniform(0.89, 1.13)
    aspect = rng.uniform(0.98, 1.02)
    angle = np.deg2rad(rng.uniform(-8, 8)) if rng.random() < 0.5 else 0.0
    cos, sin = np.cos(angle), np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag([scale * aspect, scale / aspect])
    centre = np.array([size / 2, size / 2]) * (1 + rng.uniform(-0.1, 0.1, 2))
    offset = centre - linear @ np.array([source / 2, source / 2])
    return np.concatenate([linear, offset[:, None]], axis=1)


def _tone(rng: np.random.Generator, *, low_light: bool) -> NDArray[np.uint8]:
    """Exposure, contrast, gamma and white balance in one table, uint8 [256, 3]."""
    x = np.linspace(0, 1, 256)[:, None].repeat(3, axis=1)
    if rng.random() < 0.6:
        contrast, brightness = rng.uniform(0.85, 1.2), rng.uniform(-0.06, 0.06)
        x = (x - 0.5) * contrast + 0.5 + brightness
        x = np.clip(x, 0, 1) ** rng.uniform(0.8, 1.25)
        x = x * (1 + rng.uniform(-0.05, 0.05, 3))
    if low_light:
        x = np.clip(x, 0, 1) * rng.uniform(0.35, 0.7)
    table: NDArray[np.uint8] = np.clip(x * 255 + 0.5, 0, 255).astype(np.uint8)
    return table.reshape(1, 256, 3)


def _shrink(rng: np.random.Generator, *, severe: bool) -> float:
    if severe:
        return float(rng.uniform(0.33, 0.6))
    return float(rng.uniform(0.6, 0.95)) if rng.random() < 0.25 else 1.0


def _sigma(rng: np.random.Generator, *, severe: bool) -> float:
    if severe:
        return float(rng.uniform(0.8, 2.0))
    return float(rng.uniform(0.3, 0.8)) if rng.random() < 0.15 else 0.0


def _noise(rng: np.random.Generator, *, severe: bool) -> float:
    if severe:
        return float(rng.uniform(4, 12))
    return float(rng.uniform(1, 4)) if rng.random() < 0.2 else 0.0


def _jpeg(rng: np.random.Generator, *, severe: bool) -> int:
    if severe:
        return int(rng.integers(25, 70))
    return int(rng.integers(50, 99)) if rng.random() < 0.7 else 0


def _patch(rng: np.random.Generator) -> tuple[float, float, float, float, int] | None:
    """A hand, a microphone, a caption: a flat rectangle at one sample in eight."""
    if rng.random() >= 0.125:
        return None
    w, h = rng.uniform(0.1, 0.4, 2)
    x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
    return float(x), float(y), float(w), float(h), int(rng.integers(256))
