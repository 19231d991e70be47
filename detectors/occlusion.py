"""Which half of a face is hidden: by a mask, a hand, a headset, a microphone, a banner, hair.

Gradient histograms and colours of a 6x6 grid on a small crop (after Dalal and Triggs, "Histograms of Oriented
Gradients for Human Detection"), one hidden layer, two answers. Trained on drawn occluders by
`detectors.training.occlusion`; `occlusion.json` holds the numbers and what they were measured on. About half
a millisecond a face. It speaks for no class: it says which member may read a face, or that none may.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.crops import CropKind, CropPolicy
from detectors.readings import Image, Visible

SCHEMA = 1
FILE = Path(__file__).parent / "occlusion.json"

POLICY = CropPolicy(CropKind.TIGHT, size=48, side=0.81, shift=0.06)
"""Framing of the DFDC crops that it was trained on. At 48 px an eye is still 12 px wide."""
CELLS = 6
"""A side: a cell is as large as an eye."""
DIRECTIONS = 8
"""Of gradients, dark to light and light to dark apart: lips and lashes have a dark side."""
FEATURES = CELLS * CELLS * (DIRECTIONS + 4)
GRADIENT_FLOOR = 8.0
"""Grey levels a pixel, added to a cell's energy: flat skin must not make strong edges of its noise."""


class OcclusionError(ValueError):
    """The estimate's file cannot be used; names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """How surely the upper and the lower half of a face are hidden, 0..1.

    .5 is where it counts: above it 1 % of uncovered validation faces lie, or fewer. No probability: that
    depends on how often faces are covered where it is used.
    """

    upper: float
    lower: float

    def visible(self, limit: float) -> Visible:
        """What can be seen when a half more surely hidden than `limit` is taken for hidden."""
        upper, lower = self.upper > limit, self.lower > limit
        if upper and lower:
            return Visible.NEITHER
        if upper:
            return Visible.LOWER
        return Visible.UPPER if lower else Visible.BOTH


@dataclass(frozen=True, slots=True)
class Estimate:
    """The trained numbers: float64 `mean` and `scale` [FEATURES], `hidden` [FEATURES, H] with `hidden_bias`
    [H], `out` [H, 2] with `out_bias` [2] for upper and lower half. `record` is all of the file."""

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    hidden: NDArray[np.float64]
    hidden_bias: NDArray[np.float64]
    out: NDArray[np.float64]
    out_bias: NDArray[np.float64]
    record: Mapping[str, Any]

    def margins(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Of features [N, FEATURES]: [N, 2], above 0 where the upper, the lower half is hidden."""
        inner = np.maximum((features - self.mean) * self.scale @ self.hidden + self.hidden_bias, 0)
        margins: NDArray[np.float64] = inner @ self.out + self.out_bias
        return margins

    def __call__(self, face: Image) -> Hidden:
        """Of a crop of POLICY, uint8 [48, 48, 3] RGB. Raises OcclusionError for another shape."""
        upper, lower = 1 / (1 + np.exp(-np.clip(self.margins(features_of(face)[None])[0], -30, 30)))
        return Hidden(float(upper), float(lower))


ARRAYS = ("mean", "scale", "hidden", "hidden_bias", "out", "out_bias")


@lru_cache(maxsize=1)
def shipped_estimate() -> Estimate:
    """The estimate that is shipped. Raises OcclusionError."""
    return load_estimate(FILE)


def load_estimate(path: Path) -> Estimate:
    """Reads what `detectors.training.occlusion` wrote; OcclusionError for a missing or broken file."""
    try:
        record = json.loads(path.read_text())
        if record["schema"] != SCHEMA:
            raise OcclusionError(f"{path}: schema {record['schema']}, expected {SCHEMA}")
        arrays = {name: np.array(record["numbers"][name], np.float64) for name in ARRAYS}
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, OcclusionError):
            raise
        raise OcclusionError(f"{path}: {type(error).__name__}: {error}") from error
    units = len(arrays["hidden_bias"])
    expected = dict(
        zip(ARRAYS, [(FEATURES,), (FEATURES,), (FEATURES, units), (units,), (units, 2), (2,)], strict=True)
    )
    for name, array in arrays.items():
        if array.shape != expected[name] or not np.isfinite(array).all():
            raise OcclusionError(f"{path}: {name} {array.shape}, expected finite numbers {expected[name]}")
    return Estimate(**arrays, record=record)


def features_of(face: Image) -> NDArray[np.float32]:
    """float32 [FEATURES] of uint8 [48, 48, 3] RGB: for each cell gradients by direction against those around
    it, lightness, two colours and roughness against the whole face's."""
    if face.shape != (POLICY.size, POLICY.size, 3) or face.dtype != np.uint8:
        raise OcclusionError(
            f"face {face.dtype} {face.shape}, expected uint8 ({POLICY.size}, {POLICY.size}, 3)"
        )
    grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY).astype(np.float32)
    cells = [_gradients(grey), _colours(face, grey)]
    return np.concatenate([cell.reshape(CELLS * CELLS, -1) for cell in cells], axis=1).ravel()


def _gradients(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """[CELLS, CELLS, DIRECTIONS]: mean gradient by direction, over the root of the energy nearby."""
    dx, dy = cv2.Sobel(grey, cv2.CV_32F, 1, 0, scale=0.25), cv2.Sobel(grey, cv2.CV_32F, 0, 1, scale=0.25)
    size, angle = cv2.cartToPolar(dx, dy)
    place = angle * np.float32(DIRECTIONS / (2 * np.pi))
    low = place.astype(np.int32)
    high_share = place - low
    planes = np.zeros((DIRECTIONS, grey.size), np.float32)
    at = np.arange(grey.size)
    low_flat = low.ravel() % DIRECTIONS
    planes[low_flat, at] = (size * (1 - high_share)).ravel()
    planes[(low_flat + 1) % DIRECTIONS, at] = (size * high_share).ravel()
    cells = _cell_means(planes.reshape(DIRECTIONS, *grey.shape).transpose(1, 2, 0))
    energy = cv2.blur((cells**2).sum(axis=2), (3, 3), borderType=cv2.BORDER_REPLICATE)
    normed: NDArray[np.float32] = cells / np.sqrt(energy + np.float32(GRADIENT_FLOOR))[:, :, None]
    return normed


def _colours(face: Image, grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """[CELLS, CELLS, 4]: lightness and both colours of Lab against the face's median, and roughness."""
    lab = cv2.cvtColor(face, cv2.COLOR_RGB2LAB).astype(np.float32)
    cells = _cell_means(lab)
    against = (cells - np.median(cells.reshape(-1, 3), axis=0)) / np.float32(32)
    mean = _cell_means(grey[:, :, None])
    spread = np.sqrt(np.maximum(_cell_means((grey * grey)[:, :, None]) - mean * mean, 0))
    rough = np.log1p(spread) - np.log1p(np.median(spread))
    joined: NDArray[np.float32] = np.concatenate([against, rough], axis=2)
    return joined


def _cell_means(planes: NDArray[np.float32]) -> NDArray[np.float32]:
    """[48, 48, K] to [CELLS, CELLS, K]."""
    side = POLICY.size // CELLS
    means: NDArray[np.float32] = planes.reshape(CELLS, side, CELLS, side, -1).mean(axis=(1, 3))
    return means
