"""Advice on what a face is: drawn, retouched, or on a screen within the picture. It never accuses.

Measured on authentic faces alone, because there is no labelled material here for any of the three: their
false alarms are known, how many they find is known only of invented ones. Nets trained on invented faults
learn those faults (SCIENCE E), so each cue is one plain figure, and one that authentic faces do not leave
room for stays off:

- SCREEN_IN_PICTURE (`moire`), on: the pixels of a screen and those of a camera beat against each other, and
  the face's spectrum has a peak where natural ones have none.
- NOT_A_PERSON (`flat_colour`), off: drawings are filled with few colours, so the histogram of greys is rough.
  So is that of an authentic face whose contrast was stretched, and an encoder smooths a drawing's. MTCNN's
  confidence does not tell either: nine in ten cartoonised faces reach .98.
- EDITED (`skin_detail`), off: beauty filters take the fine detail of skin and leave that of eyes and mouth.
  So do soft light, make-up, and most of all encoders.

`docs/science.md` has the figures.
"""

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.uint8]

WINDOWS = (128, 64)
"""Sides in pixels of the square whose spectrum is looked at; the largest that fits into the face."""
LOWEST_FREQUENCY = 0.06
"""Cycles per pixel; below lie the face's own shapes."""
AXIS_BINS = 2
"""Frequencies this near to an axis are left out: block grids, interlacing and enlarged pixels lie there."""
DETREND_PX = 4.0
FLOOR_BINS = 9
"""Side of the neighbourhood, in bins of the spectrum, that a peak must stand out of."""

DETAIL_FLOOR = 0.25
EDGE_FLOOR = 1.0
"""Grey levels added, so that 8-bit steps on flat skin make no ratio by themselves."""
EDGE_PERCENTILE = 98
SMOOTHING = np.ones(3) / 3
"""Neighbouring greys are pooled before the histogram's roughness: one missing level is no drawing."""


def parts(native: Grey, scaled: Grey) -> dict[str, float]:
    """Return the figures of one face; `moire` is missing for faces under 64 px.

    `native` is the inner face (h, w) as the picture shows it, `scaled` the same with the face 128 px high.
    """
    found = {"flat_colour": flat_colour(scaled), "skin_detail": skin_detail(scaled)}
    peak = moire(native)
    return found if peak is None else {**found, "moire": peak}


def moire(native: Grey) -> float | None:
    """Return by how much the strongest line of the spectrum exceeds its surroundings, in natural logarithms.

    Looks at the middle 128 or 64 px; None for a face smaller than that.
    """
    side = next((side for side in WINDOWS if min(native.shape) >= side), None)
    if side is None:
        return None
    top, left = (native.shape[0] - side) // 2, (native.shape[1] - side) // 2
    patch = native[top : top + side, left : left + side].astype(np.float32)
    patch -= cv2.GaussianBlur(patch, (0, 0), DETREND_PX)
    window, counted = _spectrum(side)
    level = np.log1p(np.abs(np.fft.rfft2(patch * window))).astype(np.float32)
    floor = cv2.blur(cv2.medianBlur(level, 5), (FLOOR_BINS, FLOOR_BINS))
    return float((level - floor)[counted].max())


def flat_colour(scaled: Grey) -> float:
    """Return the sum of steps between neighbours in the histogram of greys: near 0 smooth, above 1 a comb."""
    shares = np.bincount(scaled.ravel(), minlength=256) / scaled.size
    return float(np.abs(np.diff(np.convolve(shares, SMOOTHING, "same"))).sum())


def skin_detail(scaled: Grey) -> float:
    """Return the Laplacian's median (skin covers most of a face) to its high percentile (eyes and mouth)."""
    detail = np.abs(cv2.Laplacian(scaled, cv2.CV_32F))
    edges = float(np.percentile(detail, EDGE_PERCENTILE))
    return (float(np.median(detail)) + DETAIL_FLOOR) / (edges + EDGE_FLOOR)


@lru_cache(maxsize=len(WINDOWS))
def _spectrum(side: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the window (side, side) and which bins (side, side // 2 + 1) of its spectrum are looked at."""
    window = np.outer(np.hanning(side), np.hanning(side)).astype(np.float32)
    down, across = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    nearest = AXIS_BINS / side
    counted = np.hypot(down, across) > LOWEST_FREQUENCY
    return window, counted & (np.abs(down) >= nearest) & (np.abs(across) >= nearest)
