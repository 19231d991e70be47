"""What the log still holds of one incident: its events, and the scores about it (DESIGN 3.4)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stream.errors import Code, UnmaskError
from stream.log import Log, TopicPartition
from stream.records import Record
from stream.topics import media_partition
from stream.web.incidents import Incident
from stream.windows import MICRO

LEAD_US = 15 * MICRO
"""Scores shown before an incident's first and after its last picture: a window of a verdict, and room."""

BACK_RECORDS = 500
"""Scores read at once on the way back to where an incident began."""

MAX_BACK = 40_000
"""Scores read on that way: ten minutes of 25 feeds at two pictures a second."""

MAX_FORWARD = 120_000
"""Scores read from there on; what an incident has beyond is not shown, and that is said."""

MAX_POINTS = 1_500
"""Pictures and verdicts in a timeline: a page is not wider. Beyond, every second one is left out."""

MAX_SCORES = 20_000
"""Scores of the incident's own stream: 40 minutes of a burst."""

PROBE = 64
"""Offsets looked through for a record: a log leaves gaps where transactions end."""


def events(log: Log, incident: Incident) -> list[dict[str, Any]]:
    """Return the events of an incident that the log still holds, in order."""
    found = []
    for partition, offset in list(incident.places):
        try:
            record = next(log.read(partition, offset, offset + 1), None)
        except UnmaskError as error:
            if error.code is not Code.LOG_POSITION:
                raise
            continue  # retention was there first
        if record is None or record.value is None:
            continue
        attributes = {
            name.removeprefix("ce_"): value.decode("utf-8", "replace")
            for name, value in record.headers.items()
            if name.startswith("ce_")
        }
        found.append({**attributes, "data": json.loads(record.value)})
    return found


def scores(log: Log, topic: str, incident: Incident) -> tuple[list[dict[str, Any]], bool]:
    """Return the scores of an incident's stream from LEAD_US before it to LEAD_US after it, in order, and
    whether all of them are there."""
    partition = TopicPartition(topic, media_partition(incident.stream, log.partitions(topic)))
    first_us, last_us = incident.first_us - LEAD_US, incident.last_us + LEAD_US
    start, whole = _start(log, partition, incident, first_us)
    found: list[dict[str, Any]] = []
    for count, record in enumerate(log.read(partition, start)):
        if count >= MAX_FORWARD or len(found) >= MAX_SCORES:
            return found, False
        if record.key != incident.stream:
            continue
        score = _value(record)
        at_us = _at(score)
        if at_us is None or at_us < first_us:
            continue
        if at_us > last_us:
            return found, whole
        found.append(score)
    return found, whole


def _start(log: Log, partition: TopicPartition, incident: Incident, first_us: int) -> tuple[int, bool]:
    """Return an offset from which on all scores of the incident come, and whether it was reached.

    Media time of a file runs ahead of the times at which records are written; so the place of the event that
    opened the incident is looked for by the latter, and from there the way goes back.
    """
    begin = log.begin_offset(partition)
    at = offset_at(log, partition, incident.from_us)
    for _ in range(MAX_BACK // BACK_RECORDS):
        if at <= begin:
            return begin, True
        earlier = max(begin, at - BACK_RECORDS)
        for record in log.read(partition, earlier, at):
            if record.key == incident.stream:
                at_us = _at(_value(record))
                if at_us is not None and at_us < first_us:
                    return earlier, True
                break
        at = earlier
    return at, False


def offset_at(log: Log, partition: TopicPartition, time_us: int) -> int:
    """Return the offset of the first record written at or after `time_us`, by halving."""
    low, high = log.begin_offset(partition), log.end_offset(partition)
    while low < high:
        middle = (low + high) // 2
        record = next(log.read(partition, middle, min(middle + PROBE, high)), None)
        if record is not None and record.timestamp_us < time_us:
            low = record.offset + 1
        else:
            high = middle
    return low


def timeline(found: Sequence[Mapping[str, Any]], whole: bool) -> dict[str, Any]:
    """Return scores as the page draws them: times in microseconds of media time.

    `frames`: faces with track, fused logit, logit per member, cues, quality. `verdicts`: probability with
    interval. `dropped`: ranges that were not looked at. `whole`: nothing is missing or left out.
    """
    frames = [_frame(score) for score in found if score["type"] == "frame"]
    verdicts = [_verdict(score) for score in found if score["type"] == "verdict"]
    dropped = [
        {name: score[name] for name in ("first_us", "last_us", "reason", "frames")}
        for score in found
        if score["type"] == "dropped"
    ]
    return {
        "frames": _thinned(frames),
        "verdicts": _thinned(verdicts),
        "dropped": dropped[:MAX_POINTS],
        "whole": whole and max(len(frames), len(verdicts), len(dropped)) <= MAX_POINTS,
    }


def _frame(score: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "us": score["media_us"],
        "faces": [
            {
                "track": f"{score['attachment']}/{score['epoch']}/{face['track']}",
                "fused": face["fused"],
                "logits": face["logits"],
                "quality": face["quality"],
                "reasons": face["reasons"],
                "cues": dict(face.get("cues", {})),
            }
            for face in score["faces"]
        ],
    }


def _verdict(score: Mapping[str, Any]) -> dict[str, Any]:
    names = ("verdict", "reasons", "probability", "interval", "incident", "sampled", "dropped", "effective")
    return {"us": score["media_us"], **{name: score[name] for name in names}}


def _thinned(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    while len(points) > MAX_POINTS:
        points = points[::2]
    return points


def _value(record: Record) -> dict[str, Any]:
    found = json.loads(record.value or b"{}")
    return found if isinstance(found, dict) else {}


def _at(score: Mapping[str, Any]) -> int | None:
    at = score.get("first_us" if score.get("type") == "dropped" else "media_us")
    return at if isinstance(at, int) else None


def newest(log: Log, topic: str, count: int) -> Iterator[Record]:
    """Yield about the `count` newest records of each partition of a topic."""
    for number in range(log.partitions(topic)):
        partition = TopicPartition(topic, number)
        end = log.end_offset(partition)
        yield from log.read(partition, max(log.begin_offset(partition), end - count), end)
