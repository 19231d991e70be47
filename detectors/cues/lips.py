"""Lips against voice: whether the mouth moves with what is heard (SCIENCE E, lip activity).

The gap between the lips follows the loudness of the voice, syllable by syllable, within a few pictures. A
voice-over, a dubbed film or a translator does not follow either: a weak cue, that of a mouth that does not
speak what is heard, whatever the reason.
"""

import numpy as np
from numpy.typing import NDArray

from detectors.cues.eyes import correlation

STEP_S = 0.04
"""Grid on which both are compared: a picture at 25 a second, a little more than a window of sound."""

LARGEST_LAG = 5
"""Steps by which sound may be early or late: streams are seldom within 40 ms and hardly ever beyond 200."""

VOICE = 0.5
"""Probability from which on somebody speaks (the network's own threshold)."""

LEAST_VOICE_S = 1.0
LEAST_OVERLAP_S = 1.5
QUIET_DB = 40.0
"""Below the loudest by more than this, sound does not count: a gate that opens with breath is not speech."""

LEAST_GAP = 0.005
"""Standard deviation of the lips' gap below which they rest, in distances between the eyes."""


def agreement(
    times: NDArray[np.float64],
    gap: NDArray[np.float64],
    heard: NDArray[np.float64],
    voice: NDArray[np.float64],
    level: NDArray[np.float64],
) -> float | str:
    """Return the correlation of lips and voice at the best lag, -1..1, or why there is none.

    `times` [N] of the pictures and `heard` [M] of the windows of sound, seconds on one clock; `gap` [N]
    between the lips; `voice` [M] probability, `level` [M] decibels. Lips that rest while somebody speaks give
    0.
    """
    if not len(heard):
        return "no audio in the burst"
    begin, end = max(times[0], heard[0]), min(times[-1], heard[-1])
    if end - begin < LEAST_OVERLAP_S:
        return (
            f"pictures and sound overlap by {max(0.0, end - begin):.1f} s; {LEAST_OVERLAP_S:g} s are needed"
        )
    grid = np.arange(begin, end, STEP_S)
    speaking = np.interp(grid, heard, voice)
    if (speaking >= VOICE).sum() * STEP_S < LEAST_VOICE_S:
        return f"no voice: less than {LEAST_VOICE_S:g} s of speech in the burst"
    loud = np.maximum(np.interp(grid, heard, level - level.max()), -QUIET_DB) + QUIET_DB
    sound = _smooth(loud * speaking)
    lips = np.interp(grid, times, gap)
    if lips.std() < LEAST_GAP:
        return 0.0
    lips = _smooth(lips)
    lags = range(-LARGEST_LAG, LARGEST_LAG + 1)
    return max(correlation(*_shifted(lips, sound, lag)) for lag in lags)


def _shifted(
    a: NDArray[np.float64], b: NDArray[np.float64], lag: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if lag == 0:
        return a, b
    return (a[lag:], b[:-lag]) if lag > 0 else (a[:lag], b[-lag:])


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of three neighbours: single slips of the landmarks are no syllables."""
    padded = np.concatenate([values[:1], values, values[-1:]])
    smoothed: NDArray[np.float64] = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    return smoothed
