"""Inside against outside of a face: what a pasted face lacks beside what surrounds it (SCIENCE C 6).

Four measures of the face's hull over the same of the ring around it, as natural logarithms: 0 where both are
alike. Measured on tight crops such ratios were worth little (docs/quality.md); in a stream the ring is real
surroundings. The cue is the log odds that a logistic regression makes of them, once one was trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.cues.landmarks import OVAL, Points
from detectors.readings import Image

NAMES = ("noise", "sharpness", "chroma", "blockiness")
"""What is compared: residual of a median filter, Laplacian, spread of colour, steps on the 8 px grid."""

FACE_PX = 160
"""Larger faces are reduced to this height: the measures depend on scale, and cost with the area."""

RING = 0.35
"""Width of the ring in heights of the hull, beyond a gap that the blending border may lie in."""

GAP = 0.08
LEAST_PX = 200
"""Pixels that hull and ring must each have for a ratio to mean anything."""

FLOOR = 0.05
"""Added to both sides, in grey levels: a flat ring must not make a ratio without bound."""


def ratios(image: Image, points: Points) -> tuple[float, ...] | None:
    """Return the log ratios in the order of NAMES; None where the face fills the picture or is too small.

    `image` uint8 (H, W, 3) RGB; `points` float32 [468, 2], the face mesh in its pixels.
    """
    hull = points[list(OVAL)]
    low, high = hull.min(0), hull.max(0)
    tall = float((high - low).max())
    if tall < 1:
        return None
    reach = (RING + GAP) * tall
    x0, y0 = np.maximum(0, np.floor(low - reach)).astype(int)
    x1, y1 = np.ceil(high + reach).astype(int)
    part = image[y0:y1, x0:x1]
    if min(part.shape[:2]) < 8:
        return None
    scale = min(1.0, FACE_PX / tall)
    if scale < 1:
        part = np.asarray(cv2.resize(part, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
    inside, ring = _regions((hull - (x0, y0)) * scale, part.shape[:2], tall * scale)
    if inside.sum() < LEAST_PX or ring.sum() < LEAST_PX:
        return None
    return tuple(
        float(np.log((measure[inside].mean() + FLOOR) / (measure[ring].mean() + FLOOR)))
        for measure in _measures(np.ascontiguousarray(part))
    )


def _regions(
    hull: NDArray[np.floating], shape: tuple[int, ...], tall: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the hull without its border, and the ring around it."""
    mask = np.zeros(shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.round(hull).astype(np.int32)], 1)
    gap, wide = (2 * max(1, round(share * tall)) + 1 for share in (GAP, RING + GAP))
    inner = cv2.erode(mask, np.ones((gap, gap), np.uint8))
    ring = cv2.dilate(mask, np.ones((wide, wide), np.uint8)) - cv2.dilate(mask, np.ones((gap, gap), np.uint8))
    return inner.astype(bool), ring.astype(bool)


def _measures(part: Image) -> list[NDArray[np.floating]]:
    """Return a map [h, w] for each of NAMES."""
    grey = cv2.cvtColor(part, cv2.COLOR_RGB2GRAY)
    lab = cv2.cvtColor(part, cv2.COLOR_RGB2LAB).astype(np.float32)
    noise = cv2.absdiff(grey, cv2.medianBlur(grey, 3)).astype(np.float32)
    sharpness = np.abs(cv2.Laplacian(grey, cv2.CV_32F))
    chroma = np.abs(lab[..., 1:] - cv2.blur(lab[..., 1:], (9, 9))).mean(axis=2)
    return [noise, sharpness, chroma, _steps(grey)]


def _steps(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return how much steeper steps are on the grid of 8 px than beside it, for each pixel's surroundings."""
    across = np.zeros(grey.shape, np.float32)
    across[:, 1:] = np.abs(np.diff(grey.astype(np.float32), axis=1))
    column = across.mean(0)
    phase = int(np.argmax([column[start::8].mean() for start in range(min(8, len(column)))]))
    on = np.zeros(grey.shape, np.float32)
    on[:, phase::8] = across[:, phase::8]
    steps: NDArray[np.float32] = np.asarray(
        cv2.blur(on, (17, 17)) / (cv2.blur(across, (17, 17)) + FLOOR), np.float32
    )
    return steps


@dataclass(frozen=True, slots=True)
class Regression:
    """Log odds = bias + sum of weights times standardised ratios. Raises ValueError for another number of
    weights, means or spreads than NAMES has."""

    mean: tuple[float, ...]
    spread: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("spread", self.spread), ("weights", self.weights)):
            if len(values) != len(NAMES):
                raise ValueError(f"ratios: {name} has {len(values)} numbers, expected {len(NAMES)}")

    def log_odds(self, values: Sequence[float]) -> float:
        """Return the log odds of manipulated."""
        scaled = (np.asarray(values) - self.mean) / np.maximum(self.spread, 1e-9)
        return float(scaled @ np.asarray(self.weights) + self.bias)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Regression":
        """What `to_json` wrote. Raises ValueError for anything else."""
        try:
            mean, spread, weights = (
                tuple(map(float, record[name])) for name in ("mean", "spread", "weights")
            )
            return cls(mean, spread, weights, float(record["bias"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"ratios: field {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The regression as a file holds it."""
        return {
            "mean": list(self.mean),
            "spread": list(self.spread),
            "weights": list(self.weights),
            "bias": self.bias,
        }
