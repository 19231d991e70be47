"""Coverage per feed and day, added up as the scores come (DESIGN 3.4).

`stream.coverage` adds up a period whole; here a period is a slice of a minute, added to its day and
forgotten, so that a month of 200 feeds is some thousand sums and not all their records.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from stream.coverage import MAX_GAP_S, NO_RECORD, Coverage, cover
from stream.windows import MICRO

SLICE_US = 60 * MICRO
"""Records of so much media time are kept per feed before they are added up."""

SETTLE_US = round((MAX_GAP_S + 3.0) * MICRO)
"""A slice is added up this long after its end: records of one commit come in no strict order."""

DAY_US = 86_400 * MICRO

MAX_SLICE = 8192
"""Records of one slice: 60 pictures a second, and as much again of other records. Beyond, it is added up
early."""

MAX_FEEDS = 4096
"""Feeds whose slice is open; beyond, the one that was heard of longest ago is closed."""

MAX_SUMS = 200_000
"""Days of feeds kept: 4096 feeds for a month and a half. Beyond, the oldest go."""


Amounts = defaultdict[str, float]
"""Seconds by name."""


def _amounts() -> Amounts:
    return defaultdict(float)


@dataclass(slots=True)
class Sum:
    """One feed on one day (UTC); seconds by verdict, by reason, by reason."""

    decided_s: Amounts = field(default_factory=_amounts)
    inconclusive_s: Amounts = field(default_factory=_amounts)
    unwatched_s: Amounts = field(default_factory=_amounts)
    frames: int = 0
    faces: int = 0

    def add(self, covered: Coverage) -> None:
        for own, added in (
            (self.decided_s, covered.decided_s),
            (self.inconclusive_s, covered.inconclusive_s),
            (self.unwatched_s, covered.unwatched_s),
        ):
            for name, seconds in added.items():
                own[name] += seconds
        self.frames += covered.frames
        self.faces += covered.faces

    def as_json(self, stream: str, day: int) -> dict[str, Any]:
        parts = {
            "decided_s": _rounded(self.decided_s),
            "inconclusive_s": _rounded(self.inconclusive_s),
            "unwatched_s": _rounded(self.unwatched_s),
        }
        watched = sum(self.decided_s.values()) + sum(self.inconclusive_s.values())
        return {
            "stream": stream,
            "day": day_text(day),
            "watched_s": round(watched, 1),
            "total_s": round(watched + sum(self.unwatched_s.values()), 1),
            **parts,
            "frames": self.frames,
            "faces": self.faces,
        }


@dataclass(slots=True)
class _Open:
    """The slice of a feed that is not added up yet, from `from_us` on; `newest_us` is the newest time in
    it."""

    from_us: int
    newest_us: int
    records: list[dict[str, Any]] = field(default_factory=list)


class Ledger:
    """Takes `scores` records in the order of the log. Used by one thread; `rows` under its owner's lock."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}
        self._sums: dict[tuple[str, int], Sum] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Take the value of one record. Raises KeyError, TypeError or ValueError if it is none."""
        slim, at_us = _slim(record)
        stream = str(record["stream"])
        held = self._open.pop(stream, None)
        if held is None:
            first = int(record["first_us"]) if record["type"] == "dropped" else at_us
            held = _Open(first, at_us)
        self._open[stream] = held  # the one heard of last stands last
        if record["type"] == "dropped" and slim["first_us"] < held.from_us:
            self._explain(stream, slim["first_us"], min(slim["last_us"], held.from_us), slim["reason"])
        held.records.append(slim)
        held.newest_us = max(held.newest_us, at_us)
        full = len(held.records) >= MAX_SLICE
        if held.newest_us - held.from_us >= SLICE_US + SETTLE_US or full:
            self._close(stream, held, held.newest_us if full else held.newest_us - SETTLE_US)
        if len(self._open) > MAX_FEEDS:
            oldest = next(iter(self._open))
            gone = self._open.pop(oldest)
            self._close(oldest, gone, gone.newest_us)

    def rows(self, now_us: int, live: frozenset[str], from_us: int, to_us: int) -> list[dict[str, Any]]:
        """Return a row per feed and day between `from_us` and `to_us`, the newest day first.

        Feeds of `live` should be watched all the time: what no record tells of up to now counts as unwatched.
        """
        sums = {key: value for key, value in self._sums.items() if from_us <= key[1] * DAY_US < to_us}
        for stream, held in self._open.items():
            end_us = max(held.newest_us, now_us) if stream in live else held.newest_us
            for covered in _covered(stream, held.records, held.from_us, end_us):
                key = (stream, covered.from_us // DAY_US)
                if not from_us <= key[1] * DAY_US < to_us:
                    continue
                whole = _copied(sums.get(key, Sum()))
                whole.add(covered)
                sums[key] = whole
        ordered = sorted(sums.items(), key=lambda item: (-item[0][1], item[0][0]))
        return [value.as_json(stream, day) for (stream, day), value in ordered]

    def _close(self, stream: str, held: _Open, end_us: int) -> None:
        """Add up what lies before `end_us`, and keep what still matters for what comes."""
        for covered in _covered(stream, held.records, held.from_us, end_us):
            self._sum(stream, covered.from_us // DAY_US).add(covered)
        verdicts = [one for one in held.records if one["type"] == "verdict" and one["media_us"] <= end_us]
        reach_us = end_us - round(MAX_GAP_S * MICRO)
        later = [
            one
            for one in held.records
            if (one["type"] == "frame" and one["media_us"] > reach_us)
            or (one["type"] == "verdict" and one["media_us"] > end_us)
            or (one["type"] == "dropped" and one["last_us"] > end_us)
        ]
        held.from_us = max(held.from_us, end_us)
        newest = max(verdicts, key=lambda one: one["media_us"], default=None)
        held.records = ([newest] if newest else []) + later

    def _explain(self, stream: str, first_us: int, last_us: int, reason: str) -> None:
        """Time that was added up as untold is told of now: a feed that was away says so when it is back."""
        for begin, end in _days(first_us, last_us):
            found = self._sums.get((stream, begin // DAY_US))
            if found is None:
                continue
            moved = min((end - begin) / MICRO, found.unwatched_s[NO_RECORD])
            if moved > 0:
                found.unwatched_s[NO_RECORD] -= moved
                found.unwatched_s[reason] += moved

    def _sum(self, stream: str, day: int) -> Sum:
        found = self._sums.get((stream, day))
        if found is None:
            found = self._sums[(stream, day)] = Sum()
            if len(self._sums) > MAX_SUMS:
                del self._sums[min(self._sums, key=lambda key: key[1])]
        return found


def day_text(day: int) -> str:
    """Return a day, counted from 1970, as ISO text."""
    return datetime.fromtimestamp(day * 86_400, UTC).strftime("%Y-%m-%d")


def _covered(stream: str, records: list[dict[str, Any]], from_us: int, to_us: int) -> Iterator[Coverage]:
    return (cover(stream, records, begin, end) for begin, end in _days(from_us, to_us))


def _days(from_us: int, to_us: int) -> Iterator[tuple[int, int]]:
    """Yield the period cut at midnight (UTC)."""
    while from_us < to_us:
        midnight = (from_us // DAY_US + 1) * DAY_US
        yield from_us, min(midnight, to_us)
        from_us = midnight


def _slim(record: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return what `cover` needs of a record, and the media time up to which it tells."""
    kind = record["type"]
    slim: dict[str, Any] = {"type": kind, "stream": record["stream"]}
    if kind == "frame":
        slim |= {"media_us": int(record["media_us"]), "faces": range(len(record["faces"]))}
        return slim, slim["media_us"]
    if kind == "verdict":
        slim |= {
            "media_us": int(record["media_us"]),
            "verdict": record["verdict"],
            "reasons": list(record["reasons"])[:1],
            "incident": None,
        }
        return slim, slim["media_us"]
    if kind == "dropped":
        slim |= {"first_us": int(record["first_us"]), "last_us": int(record["last_us"])}
        slim["reason"] = str(record["reason"])
        return slim, slim["last_us"]
    raise ValueError(f"a scores record is of type {kind!r}")


def _copied(part: Sum) -> Sum:
    return Sum(
        part.decided_s.copy(), part.inconclusive_s.copy(), part.unwatched_s.copy(), part.frames, part.faces
    )


def _rounded(amounts: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in sorted(amounts.items()) if value > 0.05}
