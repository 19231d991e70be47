"""What a worker holds of the streams and partitions that are its own."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stream.aggregate import StreamAggregate
from stream.device import Result
from stream.frames import Failed
from stream.incidents import ClipRequest
from stream.log import TopicPartition
from stream.records import Record


@dataclass(slots=True)
class Held:
    """What the worker keeps of one stream beside its aggregate."""

    partition: TopicPartition
    aggregate: StreamAggregate
    heard: float
    """When the newest record came, on the monotonic clock."""
    backlog: deque[Record] = field(default_factory=deque)
    in_hand: int = 0
    """Records taken from the log and not yet applied."""
    open: bool = False
    """A decoder is open for it."""
    over: bool = False
    """Its newest record was an `end`."""
    dirty: bool = False
    """State changed since the last commit."""
    fps: float = 0.0
    frames: int = 0
    faces: int = 0
    start_us: int | None = None
    canary: bool = False
    """Marks that only the canary looks at: no state, no scores, no evidence."""
    taken_at: float | None = None
    """When it was taken over, until its first record since is applied."""
    clip: ClipRequest | None = None
    """The clip that was asked for and not answered; one at most, as incidents follow each other."""
    cutting: bool = False
    """The clipper has it; else it waits for room there, or for the log."""
    unsettled: list[int] = field(default_factory=list)
    """Records that are applied, but for what is said once the clip is there."""
    held: deque[Result] = field(default_factory=deque)
    """What came back from the device while the stream waits for its clip; its decoder gets nothing then."""


@dataclass(frozen=True, slots=True)
class Takeover:
    """What is known of a partition that is about to be ours."""

    partition: TopicPartition
    begin: int
    committed: int | None
    states: Mapping[str, dict[str, Any]]

    @property
    def position(self) -> int:
        """The next record to apply; what retention took before it was read is told, not jumped."""
        return self.begin if self.committed is None else max(self.begin, self.committed)


@dataclass(frozen=True, slots=True)
class Letter:
    """A record to be dead-lettered with those it needs, once they are read."""

    partition: TopicPartition
    stream: str
    failed: Failed


@dataclass(frozen=True, slots=True)
class Status:
    """One stream as it stands, for tables and dashboards.

    Times in UTC microseconds; `frames` counts sampled frames scored since this worker took the stream,
    `faces` are those in the newest; `in_hand` records wait to be applied, or a clip to be cut.
    """

    stream: str
    media_us: int
    start_us: int | None
    frames: int
    faces: int
    verdict: str
    reasons: tuple[str, ...]
    incident: str | None
    ended: str | None
    in_hand: int


def status(stream: str, feed: Held) -> Status:
    """Return how a stream stands."""
    judgement = feed.aggregate.judgement
    return Status(
        stream=stream,
        media_us=feed.aggregate.media_us,
        start_us=feed.start_us,
        frames=feed.frames,
        faces=feed.faces,
        verdict=judgement.verdict.value,
        reasons=tuple(reason.value for reason in judgement.reasons),
        incident=feed.aggregate.open_incident,
        ended=feed.aggregate.resume.attachment if feed.over else None,
        in_hand=feed.in_hand + len(feed.backlog) + (feed.clip is not None),
    )
