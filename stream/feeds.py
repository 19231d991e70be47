"""Whether a feed is watched: up, down, unwatched, from what ticks say and records lack (DESIGN 3.2, 3.9)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from stream.drift import Shift, Turn
from stream.incidents import Moment


class Feed(StrEnum):
    """NEW until anything is known; ENDED after an `end` record, until the feed is attached anew."""

    NEW = "new"
    UP = "up"
    DOWN = "down"
    UNWATCHED = "unwatched"
    ENDED = "ended"


TRANSITIONS: Mapping[Feed, frozenset[Feed]] = {
    Feed.NEW: frozenset({Feed.UP, Feed.DOWN, Feed.UNWATCHED, Feed.ENDED}),
    Feed.UP: frozenset({Feed.DOWN, Feed.UNWATCHED, Feed.ENDED}),
    Feed.DOWN: frozenset({Feed.UP, Feed.UNWATCHED, Feed.ENDED}),
    Feed.UNWATCHED: frozenset({Feed.UP, Feed.DOWN, Feed.ENDED}),
    Feed.ENDED: frozenset({Feed.UP, Feed.DOWN}),
}

TOLD = {Feed.UP: "up", Feed.DOWN: "down", Feed.UNWATCHED: "unwatched", Feed.ENDED: "unwatched"}
"""The event of each state: a feed that ended is watched no more, and that must never pass unsaid."""


DRIFT = "drift"
"""Kind of event of a feed whose faces no longer look like those of the calibration, or do again."""


@dataclass(frozen=True, slots=True)
class FeedEvent:
    """A feed went `up`, `down` or `unwatched`, or its faces changed (`drift`).

    `code` and `sentence` say why (redacted by ingest); `shifts` are the parts that moved, of a drift.
    """

    stream: str
    kind: str
    number: int
    moment: Moment
    code: str | None
    sentence: str | None
    shifts: tuple[Shift, ...] = ()


class FeedState:
    """The state of one live feed; files have none."""

    def __init__(self, stream: str) -> None:
        self._stream = stream
        self.feed = Feed.NEW
        self._number = 0

    def to(
        self, feed: Feed, moment: Moment, code: str | None = None, sentence: str | None = None
    ) -> list[FeedEvent]:
        """Go to `feed` and return the event that tells of it; staying where it is tells nothing."""
        if feed is self.feed or feed not in TRANSITIONS[self.feed]:
            return []
        self.feed = feed
        self._number += 1
        return [FeedEvent(self._stream, TOLD[feed], self._number, moment, code, sentence)]

    def turned(self, moment: Moment, turn: Turn) -> FeedEvent:
        """Return the event that tells of a drift; the feed stays as it is."""
        self._number += 1
        return FeedEvent(
            self._stream, DRIFT, self._number, moment, turn.standing.value, turn.sentence, turn.shifts
        )

    def state(self) -> list[Any]:
        return [self.feed.value, self._number]

    def restore(self, fields: Sequence[Any]) -> None:
        self.feed, self._number = Feed(fields[0]), fields[1]
