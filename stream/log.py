"""The log: append to topics, read partitions in order, commit outputs with the position (DESIGN 3.1).

Nothing here asks for what Kafka could not honour. `commit` is a transaction with the offsets in it,
`Listener` gets the rebalance callbacks from `poll`; offsets of others are admin calls.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

from stream.errors import Code, UnmaskError
from stream.records import OutRecord, Record


class Cleanup(StrEnum):
    """How a topic is kept bounded."""

    DELETE = "delete"
    COMPACT = "compact"


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as it must be. Retention None means unbounded (compacted topics).

    `retention_bytes` is for the whole topic; Kafka, which counts per partition, gets an equal share each.
    """

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


class PositionError(UnmaskError):
    """A position cannot be read: LOG_POSITION if it is outside of what the log holds, LOG_UNUSABLE if the
    record there is damaged. Nothing is skipped unasked: seek `partition` to `resume_at` to go on.
    """

    def __init__(self, code: Code, sentence: str, partition: TopicPartition, resume_at: int) -> None:
        super().__init__(code, sentence)
        self.partition = partition
        self.resume_at = resume_at


def check_position(partition: TopicPartition, position: int, first: int, following: int) -> None:
    """Raise `PositionError` (LOG_POSITION) unless the log holds `position` or it is the next to come."""
    if first <= position <= following:
        return
    raise PositionError(
        Code.LOG_POSITION,
        f"position {position} of {partition.topic}/{partition.partition} is outside of what the log holds: "
        f"{first} to {following} (retention removes the oldest)",
        partition,
        min(max(position, first), following),
    )


class Listener(Protocol):
    """Told of changes of assignment, from within `Consumer.poll` and `Consumer.close`."""

    def assigned(self, partitions: Collection[TopicPartition]) -> None:
        """Partitions are ours from now on; nothing of them is polled before this returns."""

    def revoked(self, partitions: Collection[TopicPartition]) -> None:
        """Partitions go to another member when this returns: the last chance to commit for them."""

    def lost(self, partitions: Collection[TopicPartition]) -> None:
        """Partitions are already another member's: forget them, commit nothing."""


class Producer(Protocol):
    """Appends records outside any group transaction (ingest, control commands)."""

    def send(self, record: OutRecord) -> None:
        """Queue one record. Blocks while the bound of bytes in flight is reached.

        Raises `UnmaskError` if a write before it failed (LOG_FULL, LOG_AWAY, LOG_UNUSABLE) or a later
        producer of the same name has taken over (LOG_FENCED, for good): `record` is not taken then.
        """

    def flush(self, timeout: float) -> None:
        """Return when all that was sent is durable; raise `UnmaskError` (LOG_AWAY, of the embedded log
        LOG_UNUSABLE) if `timeout` seconds pass first.

        Each failed write is raised once, by the next `send` or `flush`; its records are lost and counted in
        `dropped`. The producer stays usable.
        """

    @property
    def dropped(self) -> int:
        """How many records that `send` took were lost to failed writes."""

    def close(self, timeout: float) -> None:
        """Flush and stop; raises what `flush` raises, after it has stopped."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Consumer(Protocol):
    """One member of a group. Used by one thread."""

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        """Return at most `max_records` records in order per partition, empty after `timeout` seconds.

        A partition starts at its committed position or, if it has none, at the beginning. Paused partitions
        give nothing but stay ours. A member that lost its partitions is told by `Listener.lost` and waits
        to get some again. Raises `UnmaskError` (LOG_FENCED) when membership is lost for good and
        `PositionError` when a position lies outside of what the log still holds or its record is damaged;
        it is raised again until the caller seeks or pauses the partition. (LOG_AWAY): the cluster does not
        answer now, which is no silence of what would be read; membership and positions stay, go on polling.
        (LOG_FULL, LOG_UNUSABLE): the log itself cannot be used.
        """

    def assignment(self) -> frozenset[TopicPartition]: ...

    def pause(self, partitions: Collection[TopicPartition]) -> None:
        """Poll nothing of `partitions`. Raises ValueError, as `resume` and `seek`, if one is not assigned."""

    def resume(self, partitions: Collection[TopicPartition]) -> None: ...

    def committed(self, partition: TopicPartition) -> int | None:
        """Return the group's committed position (next offset to apply), None if there is none. Raises
        `UnmaskError` (LOG_AWAY)."""

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Let the next poll of `partition` start at `offset`; the committed position does not move."""

    def commit(self, outputs: Sequence[OutRecord], positions: Mapping[TopicPartition, int]) -> None:
        """Write outputs and move positions in ONE transaction.

        Raises `UnmaskError` (LOG_FENCED) if another member has taken over, and the next poll calls
        `Listener.lost`: nothing was written then, or, of a cluster that went away in that very moment, it is
        not known; state and position, read anew, are right in either case. (LOG_FULL, LOG_AWAY,
        LOG_UNUSABLE): nothing was written, try again. A cluster is waited for, at most a minute.
        """

    def close(self, timeout: float) -> None:
        """Leave the group: `revoked` is called first, so that a last commit can be made (`lost` if another
        member has taken over)."""


class Maintained(Protocol):
    """What a pass of retention did."""

    @property
    def unread(self) -> Mapping[str, int]:
        """Records deleted that some group had not read yet, by topic: a loss, to be told."""


class Readable(Protocol):
    """A log as whoever asks reads it, in no group."""

    def partitions(self, topic: str) -> int: ...

    def read(self, partition: TopicPartition, start: int, stop: int | None = None) -> Iterator[Record]:
        """Iterate committed records from offset `start` (inclusive) up to `stop` (exclusive) or to the end
        as of now, outside any group. Compacted topics skip superseded records. Raises `PositionError` if
        `start` lies before what the log still holds or a record is damaged."""

    def begin_offset(self, partition: TopicPartition) -> int:
        """Return the first offset not removed by retention (compaction does not move it)."""

    def end_offset(self, partition: TopicPartition) -> int:
        """Return the offset that the next record will get."""


class Log(Readable, Protocol):
    """A log, embedded or Kafka.

    Whatever asks a cluster raises `UnmaskError` (LOG_AWAY) if it does not answer in some 20 s, which waiting
    may cure, and (LOG_UNUSABLE) for what it will not. The embedded log is never away.
    """

    def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Create what is missing and bring retention to the spec. Raises `UnmaskError` naming what differs in
        a topic that exists and cannot be changed: partitions, cleanup."""

    def producer(self, name: str) -> Producer:
        """Return a producer; `name` is stable per writer, so a restart replaces its predecessor."""

    def consumer(self, group: str, topics: Sequence[str], listener: Listener, member: str) -> Consumer:
        """Join `group`; assignment arrives through `listener` during `poll`."""

    def group_position(self, group: str, partition: TopicPartition) -> int | None:
        """Return a group's committed position without being a member."""

    def maintain(self) -> Maintained:
        """Apply retention, every few seconds, where the log does not do so by itself (Kafka does)."""

    def close(self) -> None: ...


LogFactory = Callable[[], Log]
"""Opens the log anew, in a child process say: a `Log` itself never crosses a process boundary."""


def partitions_of(log: Readable, topic: str) -> list[TopicPartition]:
    """Return every partition of a topic."""
    return [TopicPartition(topic, number) for number in range(log.partitions(topic))]


def ends(log: Readable, topic: str) -> dict[TopicPartition, int]:
    """Return the offset that the next record of each partition will get."""
    return {partition: log.end_offset(partition) for partition in partitions_of(log, topic)}


def everything(log: Readable, topic: str) -> Iterator[Record]:
    """Yield all records of a topic, partition by partition."""
    for partition in partitions_of(log, topic):
        yield from log.read(partition, log.begin_offset(partition))
