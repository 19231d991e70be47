"""The truth of the feeds: which picture has which number, and which face is planted in it.

Each picture carries its number and its feed's as rows of black and white cells, and the square of the member
`marker`: red in a planted stretch, green otherwise, none while nobody is on screen. All of it can be read
back from the luma and chroma planes of a decoded picture.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]

WIDTH, HEIGHT, FPS = 320, 180, 25
LEFT, TOP, SIDE = 128, 58, 64
"""Where the member `marker` looks for its square."""
CELL = 20
"""A cell is this wide and high; H.264 at any rate keeps one readable."""
NUMBER_BITS, FEED_BITS = 16, 8


class Face(StrEnum):
    """What is on screen."""

    NONE = "none"
    GREEN = "green"
    RED = "red"


COLOURS = {Face.GREEN: (20, 200, 20), Face.RED: (200, 20, 20)}


@dataclass(frozen=True, slots=True)
class Plan:
    """One round of a feed, repeated for ever: (face, seconds), in order. `loop` frames in all."""

    parts: tuple[tuple[Face, float], ...]

    @property
    def loop(self) -> int:
        return sum(round(seconds * FPS) for _, seconds in self.parts)

    def face(self, number: int) -> Face:
        """Return what picture `number` shows."""
        left = number % self.loop
        for face, seconds in self.parts:
            frames = round(seconds * FPS)
            if left < frames:
                return face
            left -= frames
        raise AssertionError(f"{self} holds no picture {number}")


PLAN = Plan(((Face.GREEN, 6), (Face.NONE, 3), (Face.RED, 9), (Face.NONE, 3), (Face.GREEN, 3)))
"""One incident in 24 s. Nobody is on screen before the red one, so that it is a track of its own."""


def draw(number: int, feed: int, face: Face) -> Image:
    """Return RGB picture `number` of a feed."""
    ramp = (np.arange(WIDTH, dtype=np.int32)[None, :] // 4 + number // 4) % 32 + 90
    picture = np.repeat(np.repeat(ramp, HEIGHT, axis=0)[:, :, None], 3, axis=2).astype(np.uint8)
    _cells(picture[:CELL], number, NUMBER_BITS)
    _cells(picture[CELL : 2 * CELL], feed, FEED_BITS)
    if face in COLOURS:
        picture[TOP : TOP + SIDE, LEFT : LEFT + SIDE] = COLOURS[face]
    return picture


def _cells(rows: Image, value: int, bits: int) -> None:
    for bit in range(bits):
        rows[:, bit * CELL : (bit + 1) * CELL] = 235 if value >> bit & 1 else 16


@dataclass(frozen=True, slots=True)
class Seen:
    """What a decoded picture says of itself."""

    number: int
    feed: int
    face: Face


def read(frame: Any) -> Seen:
    """Return what a decoded yuv420p frame shows."""
    luma, _, red = (_plane(plane) for plane in frame.planes)
    half = slice((TOP + 8) // 2, (TOP + SIDE - 8) // 2), slice((LEFT + 8) // 2, (LEFT + SIDE - 8) // 2)
    warmth = float(red[half].mean()) - 128.0
    face = Face.NONE
    if abs(warmth) > 30:
        face = Face.RED if warmth > 0 else Face.GREEN
    return Seen(_value(luma[:CELL], NUMBER_BITS), _value(luma[CELL : 2 * CELL], FEED_BITS), face)


def _plane(plane: Any) -> Image:
    rows: Image = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return rows[:, : plane.width]


def _value(rows: Image, bits: int) -> int:
    middle = rows[CELL // 4 : 3 * CELL // 4, : bits * CELL].reshape(-1, bits, CELL)
    means = middle[:, :, CELL // 4 : 3 * CELL // 4].mean(axis=(0, 2))
    return sum(int(mean > 125) << bit for bit, mean in enumerate(means))
