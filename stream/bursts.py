"""How much of the device closer looks may take: suspect feeds must not starve calm ones (DESIGN 3.8)."""

from collections import deque

from stream.clock import Clock

SPAN_S = 10.0
"""Over which the share is measured: as long as bursts commonly last, so none is cut off at its begin."""


class BurstBudget:
    """Counts device time spent on bursts. Used by one thread."""

    def __init__(self, share: float, clock: Clock) -> None:
        self._allowed_s = share * SPAN_S
        self._clock = clock
        self._spent: deque[tuple[float, float]] = deque()
        self._total_s = 0.0

    def spend(self, seconds: float) -> None:
        """Note device time that a burst took."""
        self._spent.append((self._clock.monotonic(), seconds))
        self._total_s += seconds

    def allows(self) -> bool:
        """Return whether bursts took no more than their share of the last `SPAN_S`."""
        begin = self._clock.monotonic() - SPAN_S
        while self._spent and self._spent[0][0] < begin:
            self._total_s -= self._spent.popleft()[1]
        return self._total_s <= self._allowed_s
