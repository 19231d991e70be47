"""Blinks: when the eyes close and open again, in pictures at full rate.

People blink some fifteen times a minute for 100 to 400 ms; early face generators hardly did, having seen few
pictures of closed eyes (SCIENCE E).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CLOSED = 0.55
"""Openness, in shares of the eye's usual one, below which it counts as closed: halfway between a gaze that
looks down and a blink (one clip: blinks reach .2, speaking eyes stay above .75)."""

USUAL = 0.7
"""Quantile of the openness that is the eye's usual one: blinks and squints are the lower part."""

SHORTEST_S, LONGEST_S = 0.04, 0.6
"""What is shorter is a slip of the landmarks, what is longer are closed eyes."""

LEAST_OPEN = 0.08
"""Eyes that are never wider open are closed, covered or not seen; nothing can be said of their blinks."""


@dataclass(frozen=True, slots=True)
class Blinks:
    """Of a stretch of `seconds`: how long each blink lasted, in seconds. One that was not over, or had begun
    before, is not among them."""

    seconds: float
    lengths: tuple[float, ...]


def blinks(times: NDArray[np.float64], openness: NDArray[np.float64]) -> Blinks | None:
    """Return the blinks of both eyes together; None if the eyes were never seen open.

    `times` in seconds, rising, [N]; `openness` [N, 2] of the left and the right eye. A blink is one of both
    eyes: the more open one counts, so that a wink or one eye out of sight is none.
    """
    if len(times) < 2:
        return None
    usual = np.quantile(openness, USUAL, axis=0)
    if (usual < LEAST_OPEN).any():
        return None
    shut = (openness / usual).max(axis=1) < CLOSED
    edges = np.flatnonzero(np.diff(shut.astype(np.int8)))
    if len(edges) and shut[0]:
        edges = edges[1:]
    lengths = [
        float(times[end] - times[begin]) for begin, end in zip(edges[::2] + 1, edges[1::2] + 1, strict=False)
    ]
    kept = tuple(length for length in lengths if SHORTEST_S <= length <= LONGEST_S)
    return Blinks(float(times[-1] - times[0]), kept)
