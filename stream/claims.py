"""Who reads a feed, and how far its attachments have come: `#ingest:<stream>` in `state` (DESIGN 3.2).

Clocks of machines differ, yet attachment ids and media time of a stream must never step back. So whoever
attaches a feed writes where it stands, and whoever takes it over goes on behind that. Since the newest claim
may be some seconds old when its writer dies, it reserves media time ahead of what has been reached.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from stream.config import Config
from stream.intake import Last
from stream.log import Log, TopicPartition
from stream.records import SCHEMA, Kind, OutRecord, Topic, fields_of
from stream.topics import media_partition, topic_name

CLAIM = "#ingest:"
"""Begins the key; `#` cannot begin a stream id."""

CLAIM_S = 5.0
"""Between claims of a live feed: a fifth of a record a second and feed."""

RESERVE_US = {Kind.LIVE: 6_000_000, Kind.FILE: 600_000_000}
"""Media time reserved ahead of what was reached. A live feed's runs on for CLAIM_S until the next claim, and
taking over from the dead takes about as long, so that media time seldom jumps. A file is read at sixty times
its speed, and is to claim no more often."""


@dataclass(frozen=True, slots=True)
class Claim:
    """`attachment`: the newest; `media_end_us`: media time that nothing of it passes without another claim.

    `member`: the ingest process that reads the feed, "" where there is only one. `over`: identity of the
    source (`Source.identity`) if it came to its end by itself, else "".
    """

    attachment: str
    media_end_us: int
    member: str = ""
    over: str = ""

    def record(self, config: Config, stream: str, partition: int | None, now_us: int) -> OutRecord:
        """Return the record of this claim; `partition` is that of `stream`."""
        value = json.dumps({"schema": SCHEMA, **asdict(self)}, separators=(",", ":")).encode()
        headers = {"schema": str(SCHEMA).encode()}
        return OutRecord(topic_name(config, Topic.STATE), CLAIM + stream, value, headers, now_us, partition)


def claimed(key: str) -> str:
    """Return the stream of a claim's key, "" if it is none."""
    return key.removeprefix(CLAIM) if key.startswith(CLAIM) else ""


@dataclass(frozen=True, slots=True)
class Standing:
    """What the log tells of a stream: the newest claim, and behind what a new attachment must lie."""

    claim: Claim
    last: Last


def read_standings(log: Log, config: Config, streams: Collection[str]) -> dict[str, Standing]:
    """Return what `state` tells of `streams`: claims of ingest, and what detect has applied.

    A claim that cannot be read counts as none. Raises `UnmaskError` as `Log.read` does.
    """
    topic = topic_name(config, Topic.STATE)
    count = log.partitions(topic)
    wanted: dict[int, set[str]] = defaultdict(set)
    for stream in streams:
        wanted[media_partition(stream, count)].add(stream)
    found: dict[str, Standing] = {}
    for number, names in wanted.items():
        partition = TopicPartition(topic, number)
        claims: dict[str, bytes | None] = {}
        states: dict[str, bytes | None] = {}
        for record in log.read(partition, log.begin_offset(partition)):
            if record.key in names:
                states[record.key] = record.value
            elif claimed(record.key) in names:
                claims[claimed(record.key)] = record.value
        for stream in names:
            found[stream] = _standing(claims.get(stream), states.get(stream))
    return found


def _standing(claim: bytes | None, state: bytes | None) -> Standing:
    newest = _claim(fields_of(claim))
    fields = fields_of(state)
    resume = fields.get("resume")
    applied = str(resume.get("attachment", "")) if isinstance(resume, dict) else ""
    applied_us = fields.get("now_us")
    return Standing(
        newest,
        Last(
            max(newest.attachment, applied),
            max(newest.media_end_us, applied_us if isinstance(applied_us, int) else 0),
        ),
    )


def _claim(fields: Mapping[str, Any]) -> Claim:
    attachment, end_us = fields.get("attachment"), fields.get("media_end_us")
    if not isinstance(attachment, str) or not isinstance(end_us, int):
        return Claim("", 0)
    return Claim(attachment, end_us, str(fields.get("member", "")), str(fields.get("over", "")))
