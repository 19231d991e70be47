"""Writing in transactions under one transactional id: all or nothing, never by two at once (DESIGN 3.1)."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from kafka import KafkaProducer, errors

from stream.clock import Clock, Deadline
from stream.errors import Code, UnmaskError
from stream.kafka_client import OUT_OF_STEP, KafkaClients, said, told, translated
from stream.kafka_topics import Placed

logger = logging.getLogger(__name__)

TRANSACTION_TIMEOUT_S = 10.0
"""The broker ends the transaction of a dead writer after this; until then readers wait before it."""

ANSWER_S = 12.0
"""Longest wait for a transaction to be filled, and for its commit: past TRANSACTION_TIMEOUT_S the broker has
ended it anyway."""

ABORT_S = 2.0
"""Longest wait for a transaction to be ended early; else opening the next one ends it."""

COMMIT_BOUND_S = 4 * ANSWER_S + ABORT_S
"""No write takes longer, whatever the cluster does: reach it, begin anew, fill, commit or abort; the first of
these without an answer ends it."""

BATCH_BYTES = 512 * 1024
"""Records of one partition that travel together: small ones compress better so, a large one goes alone."""


RETRY_MS = 20
"""A transaction begun right after another is refused until that one's markers are written: milliseconds."""


class FencedError(Exception):
    """This writer's time is over. `successor`: because another has taken over the transactional id; else the
    broker has ended the transaction. Kafka does not say which; the time that passed does.
    """

    def __init__(self, sentence: str, successor: bool) -> None:
        super().__init__(sentence)
        self.successor = successor


class RejectedError(Exception):
    """The group does not accept the positions: who sends them is no member of its present generation.

    `ousted`: another process has the same place in the group, by its static name.
    """

    def __init__(self, sentence: str, ousted: bool) -> None:
        super().__init__(sentence)
        self.ousted = ousted


class UnknownError(Exception):
    """Whether the transaction was committed could not be learned."""


class Transactions:
    """Owns the producer of one transactional id, made anew after whatever it does not survive.

    One thread. Opening ends what a predecessor of the same id left open, so that nothing of it can follow.
    """

    def __init__(
        self, clients: KafkaClients, transactional_id: str, max_message_bytes: int, clock: Clock
    ) -> None:
        self._clients = clients
        self._clock = clock
        self._began = 0.0
        self.id = transactional_id
        self._max_message_bytes = max_message_bytes
        self._producer: Any = None

    def open(self) -> Any:
        """Make sure of a producer that may write, within about `ANSWER_S`; raises `UnmaskError` (LOG_AWAY,
        LOG_UNUSABLE)."""
        if self._producer is None:
            with translated(f"writing as {self.id}"):
                producer = self._made()
                try:
                    producer.init_transactions()
                except BaseException:
                    abandon(producer)
                    raise
            self._producer = producer
        return self._producer

    def write(
        self, records: Sequence[Placed], offsets: Mapping[Any, Any] | None = None, group: Any = None
    ) -> None:
        """Write records, and positions of `group`, in one transaction, within `COMMIT_BOUND_S`.

        Raises `FencedError`, `RejectedError` and `UnmaskError` (LOG_AWAY, LOG_UNUSABLE), all having written
        nothing, and `UnknownError`. After any but `FencedError` the next write may be tried.
        """
        self.check(records)
        producer = self.open()
        self._began = self._clock.monotonic()
        try:
            self._fill(producer, records, offsets, group, Deadline(ANSWER_S, self._clock))
        except errors.ProducerFencedError as error:
            raise self._fenced(error) from error
        except (errors.CommitFailedError, errors.FencedInstanceIdError) as error:
            self._abort(producer)
            raise RejectedError(said(error), isinstance(error, errors.FencedInstanceIdError)) from error
        except TimeoutError as error:
            self._drop(producer)
            raise self._unwritten(error) from error
        except errors.KafkaError as error:
            self._abort(producer)
            if isinstance(error, OUT_OF_STEP):
                self._drop(producer)
            if isinstance(_cause(error), errors.ProducerFencedError):
                raise self._fenced(error) from error
            raise self._unwritten(error) from error
        self._commit(producer)

    def check(self, records: Sequence[Placed]) -> None:
        """Raise `UnmaskError` (LOG_UNUSABLE) for a record larger than topics allow."""
        for placed in records:
            size = placed.size + len(placed.record.key)
            if size > self._max_message_bytes:
                raise UnmaskError(
                    Code.LOG_UNUSABLE,
                    f"record of {size} bytes for topic {placed.record.topic} is above what topics allow "
                    f"({self._max_message_bytes}); media.max_message_bytes decides",
                )

    def close(self, timeout: float) -> None:
        """Give the producer up; a transaction left open is ended by whoever opens the id next."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        try:
            producer.close(timeout)
        except errors.KafkaError:
            abandon(producer)

    def _fill(
        self, producer: Any, records: Sequence[Placed], offsets: Any, group: Any, deadline: Deadline
    ) -> None:
        producer.begin_transaction()
        sent = [
            producer.send(
                placed.record.topic,
                value=placed.record.value,
                key=placed.record.key.encode(),
                headers=list(placed.record.headers.items()),
                partition=placed.partition,
                timestamp_ms=placed.record.timestamp_us // 1000,
            )
            for placed in records
        ]
        if offsets:
            begun = producer._transaction_manager.send_offsets_to_transaction(dict(offsets), group)
            _await(producer, begun, deadline.left())
        if sent:
            producer.flush(deadline.left())
        for future in sent:
            future.get(timeout=0)

    def _commit(self, producer: Any) -> None:
        try:
            _await(producer, producer._transaction_manager.begin_commit(), ANSWER_S)
        except errors.ProducerFencedError as error:
            raise self._fenced(error) from error
        except (errors.KafkaError, TimeoutError) as error:
            self._drop(producer)
            raise UnknownError(f"writing as {self.id}: {said(error)}") from error

    def _abort(self, producer: Any) -> None:
        """End the transaction, so that readers do not wait for its timeout; else give the producer up."""
        try:
            _await(producer, producer._transaction_manager.begin_abort(), ABORT_S)
        except (errors.KafkaError, TimeoutError) as error:
            logger.debug("transaction of %s could not be ended: %s", self.id, error)
            self._drop(producer)

    def _fenced(self, error: BaseException) -> FencedError:
        self.close(0.0)
        lasted = self._clock.monotonic() - self._began
        return FencedError(f"writing as {self.id}: {said(error)}", lasted < TRANSACTION_TIMEOUT_S)

    def _unwritten(self, error: BaseException) -> UnmaskError:
        failed = told(f"writing as {self.id}", error)
        return UnmaskError(failed.code, f"{failed}; nothing was written")

    def _drop(self, producer: Any) -> None:
        self._producer = None
        abandon(producer)

    def _made(self) -> Any:
        compression = self._clients.settings.compression
        return self._clients.make(
            KafkaProducer,
            transactional_id=self.id,
            client_id=self.id,
            transaction_timeout_ms=round(TRANSACTION_TIMEOUT_S * 1000),
            delivery_timeout_ms=round(TRANSACTION_TIMEOUT_S * 1000),
            request_timeout_ms=round(TRANSACTION_TIMEOUT_S * 500),
            retry_backoff_ms=RETRY_MS,
            max_block_ms=round(ANSWER_S * 1000),
            bootstrap_timeout_ms=round(ANSWER_S * 1000),
            compression_type=None if compression == "none" else compression,
            max_request_size=self._max_message_bytes,
            # One above what topics allow is refused, and then kafka-python's own splitting breaks the flush.
            batch_size=min(BATCH_BYTES, self._max_message_bytes // 2),
            allow_auto_create_topics=False,
            metrics_enabled=False,
        )


def _await(producer: Any, begun: Any, seconds: float) -> None:
    """Wait for a step of a transaction; kafka-python's own methods would wait for ever."""
    producer._sender.wakeup()
    if not begun.wait(timeout_ms=seconds * 1000):
        raise TimeoutError(f"no answer in {seconds:.3g} s")


def abandon(producer: Any) -> None:
    """Stop a producer whose `close` would wait, or raise, for what it still holds."""
    producer._sender.force_close()
    with contextlib.suppress(errors.KafkaError):
        producer.close(0)


def _cause(error: BaseException) -> BaseException | None:
    """Return the reason that kafka-python put into its error beside the text."""
    return next((item for item in error.args if isinstance(item, BaseException)), None)
