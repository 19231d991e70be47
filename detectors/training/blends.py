"""Manipulated crops made of authentic ones: a face blended with a changed copy of itself.

After Shiohara and Yamasaki, "Detecting Deepfakes with Self-Blended Images", from its description, much
reduced: an ellipse with a drawn outline stands in for the hull of landmarks. Used for authentic pictures of
which no manipulated partner exists, so that where a picture comes from tells nothing about its class.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.readings import Image

RATIOS = (0.5, 0.75, 1.0, 1.0, 1.0)
"""Weights of the blend as in the paper, without its .25: invisible at stream quality."""


def self_blend(image: Image, rng: np.random.Generator) -> Image:
    """uint8 [S, S, 3] RGB, a tight face crop, in; the same with its face blended in, out.

    Equal to the input wherever the mask is 0.
    """
    mask = blend_mask(image.shape[0], rng)[..., None] * rng.choice(RATIOS)
    source = _changed_copy(image, rng).astype(np.float32)
    mixed = mask * source + (1 - mask) * image
    blended: Image = np.clip(mixed + 0.5, 0, 255).astype(np.uint8)
    return blended


def blend_mask(size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Soft face-shaped mask, float32 [size, size] in 0..1, exactly 0 outside."""
    centre_x, centre_y = 0.5 + rng.uniform(-0.05, 0.05), 0.56 + rng.uniform(-0.06, 0.06)
    radius_x, radius_y = rng.uniform(0.28, 0.46), rng.uniform(0.28, 0.5)
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    distance = np.sqrt(
        ((grid[None, :] - centre_x) / radius_x) ** 2 + ((grid[:, None] - centre_y) / radius_y) ** 2
    )
    wobble = cv2.resize(
        rng.normal(0, 0.12, (5, 5)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC
    )
    hard = (distance + wobble < 1).astype(np.float32)
    width = 2 * int(rng.integers(2, 13)) + 1
    inner = (cv2.blur(hard, (width, width)) > 0.999).astype(np.float32)
    soft: NDArray[np.float32] = cv2.blur(inner, (width, width))
    return soft


def _changed_copy(image: Image, rng: np.random.Generator) -> Image:
    """Lost detail and a small change of colour and place: what an autoencoder's face differs by."""
    size = image.shape[0]
    out = image
    if rng.random() < 0.6:
        gain, shift = 1 + rng.uniform(-0.08, 0.08, 3), rng.uniform(-12, 12, 3)
        out = np.clip(out * gain + shift, 0, 255).astype(np.uint8)
    kind = rng.integers(4)
    if kind == 0:
        small = round(size / rng.uniform(1.6, 3.5))
        out = cv2.resize(cv2.resize(out, (small, small), interpolation=cv2.INTER_AREA), (size, size))
    elif kind == 1:
        out = cv2.GaussianBlur(out, (0, 0), float(rng.uniform(0.8, 2.2)))
    elif kind == 2:
        out = cv2.medianBlur(out, 5)
    else:
        out = cv2.addWeighted(out, 1.8, cv2.GaussianBlur(out, (0, 0), 1.5), -0.8, 0)
    scale = rng.uniform(0.96, 1.04)
    shift = rng.uniform(-0.03, 0.03, 2) * size
    centre = size / 2
    matrix = np.array(
        [[scale, 0, centre * (1 - scale) + shift[0]], [0, scale, centre * (1 - scale) + shift[1]]],
        dtype=np.float64,
    )
    moved: Image = cv2.warpAffine(
        np.ascontiguousarray(out),
        matrix,
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return moved
