"""How eyes move: five numbers of a burst, for a support vector machine (Li et al., SCIENCE E; which five is
ours, the abstract names none).

Saccades are over in 50 ms: at 25 frames a second they show as one step, and faster ones than the pictures
come are not told apart. The machine is trained and asked at the rate the stream has.
"""

import numpy as np
from numpy.typing import NDArray

from detectors.cues.blink import CLOSED, USUAL, Blinks

NAMES = ("gaze_variance", "vergence", "saccades", "blink_rate", "blink_length")
"""Variance of the gaze's velocity (logarithm), correlation of both eyes' movement, saccades a second, blinks
a second, their mean length in seconds (0 without any)."""

SACCADE = 1.2
"""Eye widths a second from which on a movement is a saccade: some thirty degrees a second."""

LEAST_LOOKS = 24
"""Pictures with both eyes open that the features need: about a second."""


def features(
    times: NDArray[np.float64], numbers: NDArray[np.float64], found: Blinks
) -> NDArray[np.float64] | None:
    """Return the features, float64 [5] in the order of NAMES; None if too few pictures show open eyes.

    `times` in seconds [N], `numbers` [N, 7] as in `series.FaceLook`.
    """
    openness = numbers[:, :2]
    usual = np.maximum(np.quantile(openness, USUAL, axis=0), 1e-6)
    both_open = (openness / usual).min(axis=1) >= CLOSED
    steps = both_open[1:] & both_open[:-1]
    if steps.sum() < LEAST_LOOKS:
        return None
    dt = np.maximum(np.diff(times), 1e-3)[steps, None]
    left, right = np.diff(numbers[:, 2:4], axis=0)[steps] / dt, np.diff(numbers[:, 4:6], axis=0)[steps] / dt
    mean = (left + right) / 2
    speed = np.hypot(mean[:, 0], mean[:, 1])
    fast = speed > SACCADE
    begun = int(fast[0]) + int((fast[1:] & ~fast[:-1]).sum())
    watched = float(dt.sum())
    return np.array(
        [
            np.log(mean.var(axis=0).sum() + 1e-6),
            correlation(left[:, 0], right[:, 0]),
            begun / watched,
            len(found.lengths) / max(found.seconds, 1e-3),
            float(np.mean(found.lengths)) if found.lengths else 0.0,
        ]
    )


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return Pearson's correlation, 0 where one of them does not move."""
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 1e-12 else 0.0
