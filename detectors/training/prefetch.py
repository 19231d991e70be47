"""Batches prepared ahead of the training by a few threads, in order."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import TypeVar

T = TypeVar("T")

AHEAD = 4
"""Batches a worker thread prepares beyond the one being trained on."""


def prefetched(make: Callable[[int], T], first: int, workers: int) -> Iterator[T]:
    """Yields make(first), make(first + 1), ... without end; an error of `make` is raised in its turn.

    At most AHEAD * `workers` batches wait. `make` runs in threads: OpenCV and numpy let go of the
    interpreter while they work.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="loader") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for step in count(first):
                waiting.append(pool.submit(make, step))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
