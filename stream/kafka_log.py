"""The log over a Kafka cluster, version 2.5 or later: one per process, as the embedded log (DESIGN 3.1).

A producer's batch and a member's commit are transactions; everything is read committed. Partitions of records
that name none are chosen here, by CRC-32 of the key, so that every writer agrees.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from kafka import KafkaConsumer, errors

from stream.clock import Clock, Deadline
from stream.config import Kafka
from stream.errors import Code, UnmaskError
from stream.kafka_client import CONNECT_S, REQUEST_S, KafkaClients, translated
from stream.kafka_consumer import POLL_BYTES, LogConsumer, record_of
from stream.kafka_offsets import KafkaOffsets
from stream.kafka_producer import CLOSE_S, LogProducer
from stream.kafka_topics import Difference, KafkaTopics
from stream.kafka_transactions import Transactions
from stream.log import Listener, TopicPartition, TopicSpec, check_position
from stream.records import Record

PAGE_RECORDS = 500
READ_WAIT_MS = 10
"""Between looks at how far reading has come: a partition ends with a transaction's marker, not a record."""

READERS = 4
"""Readers kept for the next `read`: making one takes longer than most reads."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What `maintain` did: Kafka keeps its own house."""

    unread: Mapping[str, int] = field(default_factory=dict)


class KafkaLog:
    """The cluster of `settings`, implementing `stream.log.Log`. Any thread may use it.

    `max_message_bytes` bounds a record's value. Raises `UnmaskError` (CONFIG) for settings that cannot be
    used, (LOG_UNUSABLE) if the cluster refuses us, (LOG_AWAY) if it does not answer in `patience_s`: of a try
    that fails nothing stays behind, so that it can be repeated as long as the cluster is away.
    """

    def __init__(
        self, settings: Kafka, max_message_bytes: int, clock: Clock, patience_s: float = CONNECT_S
    ) -> None:
        self._clients = KafkaClients(settings)
        self._clock = clock
        self._admin = self._clients.admin(patience_s)
        self._topics = KafkaTopics(self._admin, settings, max_message_bytes)
        self._offsets = KafkaOffsets(self._admin, self._topics, clock)
        self._lock = threading.Lock()
        self._readers: list[Any] = []
        self._askers: dict[str, Any] = {}
        self._users: set[LogProducer | LogConsumer] = set()

    def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        self._topics.create(specs)

    def differences(self, spec: TopicSpec) -> list[Difference]:
        """Return in what a topic differs from `spec`; nothing if it is as it must be."""
        return self._topics.differences(spec)

    def partitions(self, topic: str) -> int:
        return self._topics.count(topic)

    def producer(self, name: str, *, insistent: bool = False) -> LogProducer:
        """As the log's contract says. `insistent`: no outage makes it give up, at the price of records that
        come twice after one; see `LogProducer`."""
        transactions = Transactions(
            self._clients, f"producer.{name}", self._topics.max_message_bytes, self._clock
        )
        producer = LogProducer(name, self._topics, transactions, self._clock, self._users.discard, insistent)
        self._users.add(producer)
        return producer

    def consumer(self, group: str, topics: Sequence[str], listener: Listener, member: str) -> LogConsumer:
        slot = ".".join(filter(None, [self._clients.settings.member_id, member]))
        consumer = LogConsumer(
            group,
            topics,
            listener,
            slot,
            self._clients,
            self._topics,
            self._offsets,
            self._clock,
            self._users.discard,
        )
        self._users.add(consumer)
        return consumer

    def read(self, partition: TopicPartition, start: int, stop: int | None = None) -> Iterator[Record]:
        following = self._offsets.end(partition)
        check_position(partition, start, self._offsets.begin(partition), following)
        return self._pages(partition, start, following if stop is None else min(stop, following))

    def begin_offset(self, partition: TopicPartition) -> int:
        return self._offsets.begin(partition)

    def end_offset(self, partition: TopicPartition) -> int:
        return self._offsets.end(partition)

    def group_position(self, group: str, partition: TopicPartition) -> int | None:
        place = self._topics.check(partition)
        with self._lock, translated(f"position of group {group} cannot be read"):
            if group not in self._askers:
                self._askers[group] = self._reader(group_id=group)
            found: int | None = self._askers[group].committed(place, timeout_ms=round(REQUEST_S * 1000))
        return found

    def maintain(self) -> Kept:
        return Kept()

    def close(self) -> None:
        """Close, after whatever is still open of it: producers flush, members leave."""
        with ExitStack() as steps:
            steps.callback(self._admin.close)
            for reader in [*self._readers, *self._askers.values()]:
                steps.callback(reader.close, autocommit=False)
            for user in list(self._users):
                steps.callback(user.close, CLOSE_S)

    def _reader(self, **arguments: Any) -> Any:
        with translated("reading"):
            return self._clients.make(
                KafkaConsumer,
                **arguments,
                isolation_level="read_committed",
                auto_offset_reset="none",
                enable_auto_commit=False,
                allow_auto_create_topics=False,
                fetch_max_wait_ms=READ_WAIT_MS,
                fetch_max_bytes=POLL_BYTES,
                max_partition_fetch_bytes=min(POLL_BYTES, self._topics.max_message_bytes),
                metrics_enabled=False,
            )

    def _pages(self, partition: TopicPartition, start: int, stop: int) -> Iterator[Record]:
        if start >= stop:
            return
        with self._lock:
            reader = self._readers.pop() if self._readers else None
        reader = reader or self._reader()
        place = self._topics.check(partition)
        try:
            reader.assign([place])
            reader.seek(place, start)
            yield from self._records(reader, place, stop)
        finally:
            with self._lock:
                kept = len(self._readers) < READERS
                if kept:
                    self._readers.append(reader)
            if not kept:
                reader.close(autocommit=False)

    def _records(self, reader: Any, place: Any, stop: int) -> Iterator[Record]:
        position, deadline = self._position(reader, place), Deadline(REQUEST_S, self._clock)
        while position < stop:
            for found in self._page(reader, place):
                if found.offset >= stop:
                    return
                yield record_of(found)
            before, position = position, self._position(reader, place)
            if position > before:
                deadline = Deadline(REQUEST_S, self._clock)
            elif deadline.passed():
                raise UnmaskError(
                    Code.LOG_AWAY,
                    f"{place.topic}/{place.partition} cannot be read from {position} on: no answer in "
                    f"{REQUEST_S:g} s",
                )

    @staticmethod
    def _position(reader: Any, place: Any) -> int:
        with translated(f"{place.topic}/{place.partition} cannot be read"):
            position: int = reader.position(place, timeout_ms=round(REQUEST_S * 1000))
        return position

    def _page(self, reader: Any, place: Any) -> list[Any]:
        partition = TopicPartition(place.topic, place.partition)
        try:
            with translated(f"{place.topic}/{place.partition} cannot be read"):
                found: dict[Any, list[Any]] = reader.poll(timeout_ms=READ_WAIT_MS, max_records=PAGE_RECORDS)
        except UnmaskError as error:
            if isinstance(error.__cause__, errors.OffsetOutOfRangeError):
                check_position(
                    partition,
                    self._position(reader, place),
                    self._offsets.begin(partition),
                    self._offsets.end(partition),
                )
            raise
        return found.get(place, [])
