"""The log: append to topics, read partitions in order, commit outputs with the position (DESIGN 3.1).

Nothing here asks for what Kafka could not honour. `commit` is a transaction with the offsets in it,
`Listener` gets the rebalance callbacks from `poll`; offsets of others are admin calls.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

from stream.records import OutRecord, Record


class Cleanup(StrEnum):
    """How a topic is kept bounded."""

    DELETE = "delete"
    COMPACT = "compact"


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as it must be. Retention None means unbounded (compacted topics)."""

    name: str
    partitions: int
    cleanup: Cleanup = Cleanup.DELETE
    retention_s: float | None = None
    retention_bytes: int | None = None


@dataclass(frozen=True, slots=True, order=True)
class TopicPartition:
    """One partition of one topic."""

    topic: str
    partition: int


class Listener(Protocol):
    """Told of changes of assignment, from within `Consumer.poll`."""

    def assigned(self, partitions: Collection[TopicPartition]) -> None:
        """Partitions are ours from now on; nothing of them is polled before this returns."""

    def revoked(self, partitions: Collection[TopicPartition]) -> None:
        """Partitions go to another member when this returns: the last chance to commit for them."""

    def lost(self, partitions: Collection[TopicPartition]) -> None:
        """Partitions are already another member's: forget them, commit nothing."""


class Producer(Protocol):
    """Appends records outside any group transaction (ingest, control commands)."""

    def send(self, record: OutRecord) -> None:
        """Queue one record. Blocks while the bound of bytes in flight is reached."""

    def flush(self, timeout: float) -> None:
        """Return when all that was sent is durable; raise `UnmaskError` if `timeout` seconds pass first."""

    def close(self, timeout: float) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Consumer(Protocol):
    """One member of a group. Used by one thread."""

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        """Return at most `max_records` records in order per partition, empty after `timeout` seconds.

        Paused partitions give nothing but stay ours. Raises `UnmaskError` (LOG_FENCED) when membership is
        lost for good and (LOG_POSITION) when a position lies outside of what the log still holds.
        """

    def assignment(self) -> frozenset[TopicPartition]: ...

    def pause(self, partitions: Collection[TopicPartition]) -> None: ...

    def resume(self, partitions: Collection[TopicPartition]) -> None: ...

    def committed(self, partition: TopicPartition) -> int | None:
        """Return the group's committed position (next offset to apply), None if there is none."""

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Let the next poll of `partition` start at `offset`; the committed position does not move."""

    def commit(self, outputs: Sequence[OutRecord], positions: Mapping[TopicPartition, int]) -> None:
        """Write outputs and move positions in ONE transaction.

        Raises `UnmaskError` (LOG_FENCED) if another member has taken over: nothing was written then.
        """

    def close(self, timeout: float) -> None:
        """Leave the group: `revoked` is called first, so that a last commit can be made."""


class Log(Protocol):
    """A log, embedded or Kafka."""

    def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Create what is missing. Raises `UnmaskError` naming what differs in a topic that exists."""

    def partitions(self, topic: str) -> int: ...

    def producer(self, name: str) -> Producer:
        """Return a producer; `name` is stable per writer, so a restart replaces its predecessor."""

    def consumer(self, group: str, topics: Sequence[str], listener: Listener, member: str) -> Consumer:
        """Join `group`; assignment arrives through `listener` during `poll`."""

    def read(self, partition: TopicPartition, start: int, stop: int | None = None) -> Iterator[Record]:
        """Iterate committed records from offset `start` (inclusive) up to `stop` (exclusive) or to the end
        as of now, outside any group. Compacted topics skip superseded records."""

    def begin_offset(self, partition: TopicPartition) -> int: ...

    def end_offset(self, partition: TopicPartition) -> int:
        """Return the offset that the next record will get."""

    def group_position(self, group: str, partition: TopicPartition) -> int | None:
        """Return a group's committed position without being a member."""

    def close(self) -> None: ...


LogFactory = Callable[[], Log]
"""Opens the log anew, in a child process say: a `Log` itself never crosses a process boundary."""
