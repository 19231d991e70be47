"""Appending to the cluster outside any group: batches, each a transaction, written by a thread of its own."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from stream.clock import Clock, Deadline
from stream.errors import Code, UnmaskError
from stream.kafka_topics import KafkaTopics, Placed
from stream.kafka_transactions import TRANSACTION_TIMEOUT_S, FencedError, Transactions, UnknownError
from stream.records import OutRecord

logger = logging.getLogger(__name__)

IN_FLIGHT_BYTES = 32 * 1024 * 1024
"""What a producer queues before `send` blocks: a shard of 8 feeds at 8 Mbit/s for four seconds. kafka-python
has no such bound."""

BATCH_RECORDS = 500
BATCH_BYTES = 8 * 1024 * 1024
"""One transaction of a producer: on its way in well under TRANSACTION_TIMEOUT_S."""

LINGER_S = 0.1
"""How long a producer collects records for one transaction: each costs some 3 ms of CPU here and as much in
the broker, with a marker in every partition it touched; a chunk is half a second long."""

OUTAGE_S = 60.0
"""A batch that surely was not written is tried again for this long, unless the producer is insistent: a
broker restarts, a leader changes."""

RETRY_S = 0.5
"""Between tries; each waits for the broker itself."""

CLOSE_S = 5.0
"""For what is still open at the end of a `with`, or when the log itself is closed."""


class LogProducer:
    """Appends from a thread of its own, which owns the queue's end and the transactions.

    `send`, `offer` and `flush` may be called by any thread. A producer of the same name opened later ends
    this one (LOG_FENCED, for good). What is in flight is bounded by `IN_FLIGHT_BYTES`; `unfinished` counts
    the records that were taken and are not yet known to be durable, `away` tells that nobody answers.

    Not insistent: a batch that surely was not written is tried again for `OUTAGE_S`, one of unknown outcome
    never; then it is lost, counted in `dropped` and told by the next `send` or `flush`. Each record is
    written at most once.

    Insistent: a batch is tried again for as long as the producer lives, also when Kafka did not say whether
    it was written: each record is written at least once, always in the order of `send`, and a batch that
    comes twice comes whole. So whoever reads must drop what is not newer (detect does, by attachment, epoch
    and sequence). An outage is never raised by `send` and loses nothing while the process lives; `flush`
    raises LOG_AWAY when its time is over. `close` ends it: what is left then is counted in `dropped`.
    """

    def __init__(
        self,
        name: str,
        topics: KafkaTopics,
        transactions: Transactions,
        clock: Clock,
        closed: Callable[["LogProducer"], None],
        insistent: bool,
    ) -> None:
        self._name = name
        self._insistent = insistent
        self._topics = topics
        self._transactions = transactions
        self._clock = clock
        self._closed = closed
        transactions.open()
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        self._progress = threading.Condition(lock)
        self._queue: deque[Placed] = deque()
        self._bytes_queued = 0
        self._bytes_in_flight = 0
        self._taken = 0
        self._done = 0
        self._flushing = 0
        self._dropped = 0
        self._away = False
        self._stopping = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"log {name}", daemon=True)
        self._thread.start()

    def send(self, record: OutRecord) -> None:
        placed = self._placed(record)
        with self._work:
            self._progress.wait_for(lambda: self._may_take(placed) or self._error is not None)
            self._take_in(placed)

    def offer(self, record: OutRecord) -> bool:
        """Queue one record if it fits without waiting; return whether it did. Raises what `send` raises."""
        placed = self._placed(record)
        with self._work:
            if self._error is None and not self._may_take(placed):
                return False
            self._take_in(placed)
            return True

    def unfinished(self) -> int:
        """Return how many records were taken and are neither durable nor dropped."""
        with self._progress:
            return self._taken - self._done

    @property
    def away(self) -> bool:
        """Whether the last try to write met no answer; the first one of an outage takes up to half a minute
        to tell, so that one batch which stays `unfinished` is the earlier sign."""
        return self._away

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
                    Code.LOG_AWAY, f"producer {self._name}: {left} records not durable in {timeout:g} s"
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

    def _placed(self, record: OutRecord) -> Placed:
        placed = self._topics.place(record)
        self._transactions.check([placed])
        return placed

    def _may_take(self, placed: Placed) -> bool:
        # A record larger than the bound goes alone.
        fits = self._bytes_in_flight == 0 or self._bytes_in_flight + placed.size <= IN_FLIGHT_BYTES
        return fits or self._stopping

    def _take_in(self, placed: Placed) -> None:
        self._raise_error()
        if self._stopping:
            raise ValueError(f"producer {self._name} is closed")
        self._queue.append(placed)
        self._bytes_queued += placed.size
        self._bytes_in_flight += placed.size
        self._taken += 1
        if len(self._queue) == 1 or self._batch_is_full():
            self._work.notify()

    def _batch_is_full(self) -> bool:
        return len(self._queue) >= BATCH_RECORDS or self._bytes_queued >= BATCH_BYTES

    def _raise_error(self) -> None:
        error = self._error
        if error is None:
            return
        if not _is_for_good(error):
            self._error = None
        raise error

    def _run(self) -> None:
        try:
            while batch := self._take():
                self._write(batch)
        finally:
            self._transactions.close(CLOSE_S)

    def _take(self) -> list[Placed]:
        """Wait for records and return one batch of them; empty when closed."""
        with self._work:
            self._work.wait_for(lambda: self._queue or self._stopping)
            self._work.wait_for(lambda: self._flushing or self._stopping or self._batch_is_full(), LINGER_S)
            batch: list[Placed] = []
            size = 0
            while self._queue and len(batch) < BATCH_RECORDS and size < BATCH_BYTES:
                batch.append(self._queue.popleft())
                size += batch[-1].size
            self._bytes_queued -= size
            return batch

    def _write(self, batch: list[Placed]) -> None:
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
            self._bytes_in_flight -= sum(placed.size for placed in batch)
            self._progress.notify_all()

    def _commit(self, batch: list[Placed]) -> None:
        if self._error is not None and _is_for_good(self._error):
            raise self._error
        outage = Deadline(OUTAGE_S, self._clock)
        while True:
            try:
                self._try(batch)
                self._away = False
                return
            except UnmaskError as error:
                self._away = error.code is Code.LOG_AWAY
                if not self._away or not (self._insistent or self._surely_not_written(error)):
                    raise
                if self._stopping or (outage.passed() and not self._insistent):
                    raise
                logger.warning("producer %s tries again: %s", self._name, error)
                self._clock.sleep(RETRY_S)

    @staticmethod
    def _surely_not_written(error: UnmaskError) -> bool:
        return not isinstance(error.__cause__, FencedError | UnknownError)

    def _try(self, batch: list[Placed]) -> None:
        try:
            self._transactions.write(batch)
        except FencedError as error:
            if not error.successor:
                raise UnmaskError(
                    Code.LOG_AWAY,
                    f"producer {self._name}: Kafka ended a transaction of {TRANSACTION_TIMEOUT_S:g} s",
                ) from error
            raise UnmaskError(
                Code.LOG_FENCED, f"another producer named {self._name} has taken over: this one must stop"
            ) from error
        except UnknownError as error:
            raise UnmaskError(
                Code.LOG_AWAY, f"producer {self._name}: perhaps not written, Kafka did not say: {error}"
            ) from error


def _is_for_good(error: Exception) -> bool:
    return isinstance(error, UnmaskError) and error.code is Code.LOG_FENCED
