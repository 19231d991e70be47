"""What a burst at full rate saw of one face, and what it heard: kept as whole numbers, so that a series that
was written down and read again is the same series (DESIGN 3.3)."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from detectors.cues.landmarks import Mesh, gaze, mouth, normalised, openness

UNIT = 1 / 4096
"""Of every number kept: a fourth of a pixel in a face of a thousand."""

MOST = 32767
MOST_LOOKS = 300
"""Pictures kept of a face: a burst of four seconds at 60 frames a second, and some."""

MOST_SOUNDS = 250
"""Windows of sound kept: eight seconds."""

NUMBERS = 7
"""Of a look beside its points: openness left, right; gaze left x, y, right x, y; mouth."""

POINTS = 68
LEVEL_UNIT = 0.01
"""Decibels."""


@dataclass(frozen=True, slots=True, eq=False)
class FaceLook:
    """One face in one picture: `numbers` float32 [7] (openness of the left and the right eye, gaze x and y of
    the left and of the right one, gap of the lips), `points` float32 [68, 2] normalised, None unless they are
    wanted; `ratios` inside against outside, where they were measured."""

    numbers: NDArray[np.float32]
    points: NDArray[np.float32] | None
    ratios: tuple[float, ...] | None = None


def look_of(mesh: Mesh, with_points: bool, ratios: tuple[float, ...] | None = None) -> FaceLook:
    """Return the numbers of a face's mesh."""
    open_eyes = [openness(contour) for contour in mesh.contours]
    gazes = [value for eye in zip(mesh.contours, mesh.irises, strict=True) for value in gaze(*eye)]
    numbers = np.array([*open_eyes, *gazes, mouth(mesh.points)], np.float32)
    return FaceLook(numbers, normalised(mesh.points) if with_points else None, ratios)


@dataclass(slots=True)
class FaceSeries:
    """One face through one burst. Times in microseconds, rising."""

    times: list[int] = field(default_factory=list)
    _numbers: list[NDArray[np.int16]] = field(default_factory=list)
    _points: list[NDArray[np.int16]] = field(default_factory=list)
    _ratios: list[tuple[float, ...]] = field(default_factory=list)

    def add(self, media_us: int, look: FaceLook) -> bool:
        """Return False, and take nothing, if it is full or the time does not rise."""
        if len(self.times) >= MOST_LOOKS or (self.times and media_us <= self.times[-1]):
            return False
        self.times.append(media_us)
        self._numbers.append(_whole(look.numbers))
        if look.points is not None:
            self._points.append(_whole(look.points))
        if look.ratios is not None:
            self._ratios.append(tuple(round(value, 4) for value in look.ratios))
        return True

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Seconds since the first picture, float64 [N]."""
        return (np.asarray(self.times, np.float64) - self.times[0]) / 1e6 if self.times else np.empty(0)

    @property
    def length_s(self) -> float:
        return (self.times[-1] - self.times[0]) / 1e6 if self.times else 0.0

    @property
    def numbers(self) -> NDArray[np.float64]:
        """float64 [N, 7], as in `FaceLook`."""
        return _real(self._numbers, (NUMBERS,))

    @property
    def points(self) -> NDArray[np.float64]:
        """float64 [N, 68, 2], or [0, 68, 2] where they were not wanted."""
        return _real(self._points, (POINTS, 2))

    @property
    def ratios(self) -> NDArray[np.float64]:
        """float64 [M, 4], of the pictures in which they were measured."""
        return np.asarray(self._ratios, np.float64).reshape(len(self._ratios), -1)

    def state(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {
            "times": list(self.times),
            "numbers": _packed(self._numbers),
            "points": _packed(self._points),
            "ratios": [list(values) for values in self._ratios],
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Self:
        """What `state` wrote, also through JSON."""
        return cls(
            list(state["times"]),
            _unpacked(state["numbers"], (NUMBERS,)),
            _unpacked(state["points"], (POINTS, 2)),
            [tuple(values) for values in state["ratios"]],
        )


@dataclass(slots=True)
class SoundSeries:
    """What was heard: windows of `WINDOW_US`, each with the probability that somebody speaks and its
    level."""

    times: list[int] = field(default_factory=list)
    _voice: list[int] = field(default_factory=list)
    _level: list[int] = field(default_factory=list)

    def add(self, media_us: int, voice: float, level_db: float) -> bool:
        """Take the window that begins at `media_us`; `voice` in 0..1, `level_db` in decibels below full
        scale.

        Return False, and take nothing, if it is full or the time does not rise.
        """
        if len(self.times) >= MOST_SOUNDS or (self.times and media_us <= self.times[-1]):
            return False
        self.times.append(media_us)
        self._voice.append(round(voice / UNIT))
        self._level.append(round(level_db / LEVEL_UNIT))
        return True

    @property
    def voice(self) -> NDArray[np.float64]:
        """Probability in 0..1, float64 [N]."""
        return np.asarray(self._voice, np.float64) * UNIT

    @property
    def level(self) -> NDArray[np.float64]:
        """Decibels below full scale, float64 [N]."""
        return np.asarray(self._level, np.float64) * LEVEL_UNIT

    def state(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {"times": list(self.times), "voice": list(self._voice), "level": list(self._level)}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Self:
        """What `state` wrote, also through JSON."""
        return cls(list(state["times"]), list(state["voice"]), list(state["level"]))


def _whole(values: NDArray[np.floating]) -> NDArray[np.int16]:
    finite = np.nan_to_num(values / UNIT, nan=0.0, posinf=MOST, neginf=-MOST)
    whole: NDArray[np.int16] = np.clip(np.round(finite), -MOST, MOST).astype(np.int16)
    return whole


def _real(rows: Sequence[NDArray[np.int16]], shape: tuple[int, ...]) -> NDArray[np.float64]:
    if not rows:
        return np.empty((0, *shape))
    return np.stack(rows).astype(np.float64) * UNIT


def _packed(rows: Sequence[NDArray[np.int16]]) -> str:
    return base64.b64encode(b"".join(row.astype("<i2").tobytes() for row in rows)).decode()


def _unpacked(text: str, shape: tuple[int, ...]) -> list[NDArray[np.int16]]:
    return [
        row.copy()
        for row in np.frombuffer(base64.b64decode(text), "<i2").astype(np.int16).reshape(-1, *shape)
    ]
