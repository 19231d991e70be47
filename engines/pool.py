"""Things that only one thread may use at a time, made as many as are ever used at once."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Pool(Generic[T]):
    """What `make` makes, each lent to one thread at a time.

    Not one for each thread that ever calls: the thread that compares an engine at start is not the one that
    uses it, and an execution context holds all memory between a network's layers.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._free: list[T] = []
        self._lock = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[T]:
        """Lend one that nobody uses, made anew if there is none; after an error it is not lent again."""
        with self._lock:
            lent = self._free.pop() if self._free else None
        if lent is None:
            lent = self._make()
        yield lent
        with self._lock:
            self._free.append(lent)
