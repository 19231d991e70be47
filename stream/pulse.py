"""Whether a loop is alive: what it waits for the log is the log's, up to a bound (DESIGN 3.9)."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from stream.clock import Clock
from stream.log import Log, Maintained, TopicPartition
from stream.records import Record

LOG_CALL_S = 120.0
"""A call of the log that lasts longer never returns: every call has a bound of its own, the longest chain of
them (open, fill, end and commit a transaction that nobody answers) is less than half of this."""


class Pulse:
    """Written by the loop's thread, read by any."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._at = clock.monotonic()
        self._in_log = False

    def beat(self) -> None:
        """Note that the loop goes on."""
        self._set(self._in_log)

    def log(self) -> AbstractContextManager[None]:
        """Within: the loop waits for the log."""
        return self._within(True)

    def work(self) -> AbstractContextManager[None]:
        """Within: the log has called back, and the time is the loop's own again."""
        return self._within(False)

    def still(self, stall_s: float) -> bool:
        """Return whether the loop hangs: in its own work for `stall_s`, or in the log for LOG_CALL_S."""
        with self._lock:
            silent = self._clock.monotonic() - self._at
            return silent > (LOG_CALL_S if self._in_log else stall_s)

    @contextmanager
    def _within(self, in_log: bool) -> Iterator[None]:
        before = self._in_log
        self._set(in_log)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, in_log: bool) -> None:
        with self._lock:
            self._at = self._clock.monotonic()
            self._in_log = in_log


class WatchedLog:
    """What a worker reads of a log outside its group; the pulse is told of every wait."""

    def __init__(self, log: Log, pulse: Pulse) -> None:
        self._log = log
        self._pulse = pulse

    def partitions(self, topic: str) -> int:
        with self._pulse.log():
            return self._log.partitions(topic)

    def read(self, partition: TopicPartition, start: int, stop: int | None = None) -> Iterator[Record]:
        with self._pulse.log():
            records = iter(self._log.read(partition, start, stop))
        while True:
            with self._pulse.log():
                record = next(records, None)
            if record is None:
                return
            yield record

    def begin_offset(self, partition: TopicPartition) -> int:
        with self._pulse.log():
            return self._log.begin_offset(partition)

    def end_offset(self, partition: TopicPartition) -> int:
        with self._pulse.log():
            return self._log.end_offset(partition)

    def maintain(self) -> Maintained:
        with self._pulse.log():
            return self._log.maintain()
