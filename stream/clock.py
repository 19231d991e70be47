"""Time is injected: nothing in Unmask calls `time.time` but this module."""

import time
from typing import Protocol


class Clock(Protocol):
    """Where the parts of the pipeline read time and wait."""

    def now_us(self) -> int:
        """Return UTC wall time in microseconds; may step when the system clock is set."""

    def monotonic(self) -> float:
        """Return seconds on a clock that never steps back."""

    def sleep(self, seconds: float) -> None:
        """Wait for `seconds` (>= 0)."""


class SystemClock:
    """The machine's own clocks."""

    def now_us(self) -> int:
        return time.time_ns() // 1_000

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class FakeClock:
    """A clock that moves only when told: `sleep` advances it, so tests never wait."""

    def __init__(self, start_us: int = 1_700_000_000_000_000) -> None:
        self._us = start_us

    def now_us(self) -> int:
        return self._us

    def monotonic(self) -> float:
        return self._us / 1e6

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        self._us += round(seconds * 1e6)


class Deadline:
    """One bound on time shared by all steps of an ordered shutdown."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        self._clock = clock
        self._end = clock.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that remain, never below 0."""
        return max(0.0, self._end - self._clock.monotonic())

    def passed(self) -> bool:
        return self.left() <= 0.0
