"""Appending to the embedded log outside any group: batches, written by a thread of its own."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from stream.errors import Code, UnmaskError
from stream.records import OutRecord
from stream.sqlite_rows import ROW_BYTES, Staged, Store

logger = logging.getLogger(__name__)

IN_FLIGHT_BYTES = 32 * 1024 * 1024
"""What a producer queues before `send` blocks: a shard of 8 feeds at 8 Mbit/s for four seconds."""

BATCH_RECORDS = 500
BATCH_BYTES = 8 * 1024 * 1024
"""One transaction of a producer: a few milliseconds, so that others get the write lock soon."""

LINGER_S = 0.02
"""How long a producer collects records for one transaction: 50 transactions a second at most."""

CLOSE_S = 5.0
"""For what is still open at the end of a `with`, or when the log itself is closed."""


class SqliteProducer:
    """Appends from a thread of its own, which owns the queue, the connection and the segments.

    `send` and `flush` may be called by any thread.
    """

    def __init__(self, name: str, store: Store, closed: Callable[["SqliteProducer"], None]) -> None:
        self._name = name
        self._catalog = store.catalog
        self._database = store.open_database()
        self._appender = store.appender()
        self._closed = closed
        self._fencing = self._replace_predecessor()
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        self._progress = threading.Condition(lock)
        self._queue: deque[Staged] = deque()
        self._bytes_queued = 0
        self._bytes_in_flight = 0
        self._taken = 0
        self._done = 0
        self._flushing = 0
        self._dropped = 0
        self._stopping = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"log {name}", daemon=True)
        self._thread.start()

    def send(self, record: OutRecord) -> None:
        placed = self._catalog.place(record)
        size = _weight(placed)
        with self._work:
            self._progress.wait_for(lambda: self._fits(size) or self._error is not None or self._stopping)
            self._raise_error()
            if self._stopping:
                raise ValueError(f"producer {self._name} is closed")
            self._queue.append(placed)
            self._bytes_queued += size
            self._bytes_in_flight += size
            self._taken += 1
            if len(self._queue) == 1 or self._batch_is_full():
                self._work.notify()

    def flush(self, timeout: float) -> None:
        with self._work:
            target = self._taken
            self._flushing += 1
            self._work.notify()
            try:
                finished = self._progress.wait_for(lambda: self._done >= target, timeout)
            finally:
                self._flushing -= 1
            self._raise_error()
            if not finished:
                left = target - self._done
                raise UnmaskError(
                    Code.LOG_UNUSABLE,
                    f"producer {self._name}: {left} records not durable in {timeout:g} s",
                )

    @property
    def dropped(self) -> int:
        return self._dropped

    def close(self, timeout: float) -> None:
        if self._stopping:
            return
        try:
            self.flush(timeout)
        finally:
            with self._work:
                self._stopping = True
                self._work.notify_all()
                self._progress.notify_all()
            self._thread.join(timeout)
            self._closed(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(CLOSE_S)

    def _fits(self, size: int) -> bool:
        # A record larger than the bound goes alone.
        return self._bytes_in_flight == 0 or self._bytes_in_flight + size <= IN_FLIGHT_BYTES

    def _batch_is_full(self) -> bool:
        return len(self._queue) >= BATCH_RECORDS or self._bytes_queued >= BATCH_BYTES

    def _raise_error(self) -> None:
        error = self._error
        if error is None:
            return
        if not (isinstance(error, UnmaskError) and error.code is Code.LOG_FENCED):
            self._error = None
        raise error

    def _run(self) -> None:
        try:
            while batch := self._take():
                self._write(batch)
        finally:
            self._give_up_segments()
            self._database.close()

    def _take(self) -> list[Staged]:
        """Wait for records and return one batch of them; empty when closed."""
        with self._work:
            self._work.wait_for(lambda: self._queue or self._stopping)
            self._work.wait_for(lambda: self._flushing or self._stopping or self._batch_is_full(), LINGER_S)
            batch: list[Staged] = []
            size = 0
            while self._queue and len(batch) < BATCH_RECORDS and size < BATCH_BYTES:
                batch.append(self._queue.popleft())
                size += _weight(batch[-1])
            self._bytes_queued -= size
            return batch

    def _write(self, batch: list[Staged]) -> None:
        error: Exception | None = None
        try:
            self._commit(batch)
        except Exception as caught:
            # Handed to the caller by the next send or flush: this thread has nobody to tell.
            error = caught
            logger.debug("producer %s lost %d records: %s", self._name, len(batch), caught)
        with self._progress:
            if error is not None:
                self._error = error
                self._dropped += len(batch)
            self._done += len(batch)
            self._bytes_in_flight -= sum(map(_weight, batch))
            self._progress.notify_all()

    def _commit(self, batch: list[Staged]) -> None:
        staged = self._appender.stage(batch)
        with self._database.write() as connection:
            row = connection.execute("SELECT fencing FROM producers WHERE name = ?", (self._name,)).fetchone()
            if row[0] != self._fencing:
                raise UnmaskError(
                    Code.LOG_FENCED, f"another producer named {self._name} has taken over: this one must stop"
                )
            self._appender.insert(connection, staged)
        self._appender.settled()

    def _replace_predecessor(self) -> int:
        with self._database.write() as connection:
            connection.execute(
                "INSERT INTO producers (name, fencing) VALUES (?, 1) "
                "ON CONFLICT (name) DO UPDATE SET fencing = fencing + 1",
                (self._name,),
            )
            row = connection.execute("SELECT fencing FROM producers WHERE name = ?", (self._name,)).fetchone()
            return int(row[0])

    def _give_up_segments(self) -> None:
        try:
            self._appender.close(self._database)
        except UnmaskError as error:
            # Retention gets them all the same, when this process has ended.
            logger.warning("segments of producer %s stay open: %s", self._name, error)


def _weight(item: Staged) -> int:
    return ROW_BYTES + len(item.record.value or b"")
