"""How long to wait before the next attempt."""

import random


class Backoff:
    """Doubling waits up to a bound, each shortened at random so that many do not knock at once."""

    def __init__(self, first_s: float, max_s: float, jitter: float, rng: random.Random) -> None:
        """`jitter`: largest share (0..1) by which a wait is shortened. No wait is longer than `max_s`."""
        self._first_s = min(first_s, max_s)
        self._max_s = max_s
        self._jitter = jitter
        self._rng = rng
        self._next_s = self._first_s

    def wait_s(self) -> float:
        """Return the seconds to wait now; the next wait is twice as long."""
        wait = self._next_s
        self._next_s = min(2 * wait, self._max_s)
        return wait * (1 - self._jitter * self._rng.random())

    def reset(self) -> None:
        """Begin again with the first wait: the last attempt was a success."""
        self._next_s = self._first_s
