"""What was watched: adds up the scores topic for a stream and a period (DESIGN 3.4).

Time counts as watched only where a sampled frame proves it. What was said about it comes from the verdict
records in force at the time.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stream.verdicts import Verdict
from stream.windows import MICRO

MAX_GAP_S = 2.0
"""A sampled frame stands for at most this much time after it: four samples at the slowest default rate. What
is longer unseen was not watched, whatever the frames on both sides say."""

NO_RECORD = "no_record"
"""Reason of unwatched time of which the records say nothing at all: no feed, or nobody running."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Seconds of media time, adding up to the period.

    `decided_s` by verdict (authentic, manipulated), `inconclusive_s` by first reason, `unwatched_s` by
    reason. `frames` were scored, `faces` read in them, `incidents` seen open.
    """

    stream: str
    from_us: int
    to_us: int
    decided_s: Mapping[str, float]
    inconclusive_s: Mapping[str, float]
    unwatched_s: Mapping[str, float]
    frames: int
    faces: int
    incidents: tuple[str, ...]

    @property
    def watched_s(self) -> float:
        """Decided or not, it was looked at."""
        return sum(self.decided_s.values()) + sum(self.inconclusive_s.values())

    @property
    def total_s(self) -> float:
        return (self.to_us - self.from_us) / MICRO

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON, seconds rounded to milliseconds."""
        return {
            "stream": self.stream,
            "from_us": self.from_us,
            "to_us": self.to_us,
            "total_s": round(self.total_s, 3),
            "watched_s": round(self.watched_s, 3),
            "decided_s": _rounded(self.decided_s),
            "inconclusive_s": _rounded(self.inconclusive_s),
            "unwatched_s": _rounded(self.unwatched_s),
            "frames": self.frames,
            "faces": self.faces,
            "incidents": list(self.incidents),
        }


@dataclass(slots=True)
class _Seen:
    frames: list[tuple[int, int]] = field(default_factory=list)
    verdicts: list[tuple[int, str, str]] = field(default_factory=list)
    dropped: list[tuple[int, int, str]] = field(default_factory=list)
    incidents: dict[str, None] = field(default_factory=dict)


def cover(stream: str, records: Iterable[Mapping[str, Any]], from_us: int, to_us: int) -> Coverage:
    """Add up the values of `scores` records of `stream` over media time [from_us, to_us).

    `records` may hold other streams and times, which are passed over; order does not matter. Records from
    `MAX_GAP_S` and the verdict before `from_us` on sharpen the beginning. Raises `ValueError` if the period
    is empty.
    """
    if to_us <= from_us:
        raise ValueError(f"the period ends at {to_us} us; it must end after it begins, at {from_us} us")
    seen = _collect(stream, records, from_us, to_us)
    looked = _looked(seen.frames, from_us, to_us)
    said: Counter[tuple[str, str]] = Counter()
    for first, last in looked:
        said.update(_said(seen.verdicts, first, last))
    unwatched = _unwatched(looked, seen.dropped, from_us, to_us)
    inside = [faces for media_us, faces in seen.frames if from_us <= media_us < to_us]
    return Coverage(
        stream=stream,
        from_us=from_us,
        to_us=to_us,
        decided_s={
            verdict: us / MICRO
            for (verdict, _), us in sorted(said.items())
            if verdict != Verdict.INCONCLUSIVE.value
        },
        inconclusive_s={
            reason: us / MICRO
            for (verdict, reason), us in sorted(said.items())
            if verdict == Verdict.INCONCLUSIVE.value
        },
        unwatched_s={reason: us / MICRO for reason, us in sorted(unwatched.items())},
        frames=len(inside),
        faces=sum(inside),
        incidents=tuple(seen.incidents),
    )


def _collect(stream: str, records: Iterable[Mapping[str, Any]], from_us: int, to_us: int) -> _Seen:
    seen = _Seen()
    for record in records:
        if record.get("stream") != stream:
            continue
        kind = record.get("type")
        if kind == "frame" and from_us - MAX_GAP_S * MICRO < record["media_us"] < to_us:
            seen.frames.append((record["media_us"], len(record["faces"])))
        elif kind == "verdict" and record["media_us"] < to_us:
            decided = record["verdict"] != Verdict.INCONCLUSIVE.value
            reason = "" if decided else next(iter(record["reasons"]), "")
            seen.verdicts.append((record["media_us"], record["verdict"], reason))
            if record["incident"] and record["media_us"] >= from_us:
                seen.incidents[record["incident"]] = None
        elif kind == "dropped" and record["first_us"] < to_us and record["last_us"] > from_us:
            seen.dropped.append((record["first_us"], record["last_us"], record["reason"]))
    seen.frames.sort()
    seen.verdicts.sort(key=lambda verdict: verdict[0])
    return seen


def _looked(frames: list[tuple[int, int]], from_us: int, to_us: int) -> list[tuple[int, int]]:
    """The stretches that sampled frames stand for, clipped to the period, joined where they meet."""
    reach = round(MAX_GAP_S * MICRO)
    stretches: list[tuple[int, int]] = []
    for media_us, _ in frames:
        first, last = max(media_us, from_us), min(media_us + reach, to_us)
        if stretches and first <= stretches[-1][1]:
            stretches[-1] = (stretches[-1][0], max(last, stretches[-1][1]))
        elif first < last:
            stretches.append((first, last))
    return stretches


def _said(verdicts: list[tuple[int, str, str]], first: int, last: int) -> Counter[tuple[str, str]]:
    """Microseconds of [first, last) by the verdict in force."""
    said: Counter[tuple[str, str]] = Counter()
    start = bisect_right(verdicts, first, key=lambda verdict: verdict[0])
    in_force = verdicts[start - 1][1:] if start else (Verdict.INCONCLUSIVE.value, NO_RECORD)
    at = first
    for media_us, verdict, reason in verdicts[start:]:
        if media_us >= last:
            break
        said[in_force] += media_us - at
        at, in_force = media_us, (verdict, reason)
    said[in_force] += last - at
    return said


def _unwatched(
    looked: list[tuple[int, int]], dropped: list[tuple[int, int, str]], from_us: int, to_us: int
) -> Counter[str]:
    """Microseconds outside of what was looked at, by the reason of the dropped range they lie in."""
    unwatched: Counter[str] = Counter()
    at = from_us
    ranges = sorted(dropped)
    for first, last in [*looked, (to_us, to_us)]:
        if first > at:
            unwatched.update(_reasons(ranges, at, first))
        at = max(at, last)
    return unwatched


def _reasons(dropped: list[tuple[int, int, str]], first: int, last: int) -> Counter[str]:
    reasons: Counter[str] = Counter()
    at = first
    for start, stop, reason in dropped:
        begin, end = max(start, at), min(stop, last)
        if begin >= end:
            continue
        if begin > at:
            reasons[NO_RECORD] += begin - at
        reasons[reason] += end - begin
        at = end
    if last > at:
        reasons[NO_RECORD] += last - at
    return reasons


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}
