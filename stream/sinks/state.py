"""What a sink must know to go on where it, or another process, ended (docs/sinks.md).

It stands in the compacted topic `deliveries`, whose partitions are those of `alerts`, and is written in the
transaction that moves the sink's position. So it follows its partition to whichever process gets it, over
Kafka as over the embedded log, and there is no second database to lose.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from stream.alerts import CloudEvent, event_of, iso
from stream.incidents import EventKind
from stream.log import Readable, TopicPartition
from stream.records import SCHEMA, OutRecord, Record, check_schema, split_stream_id
from stream.sinks.settings import SEVERITIES

SEEN = 2000
"""Ids remembered per partition: doubles come soon after each other, if at all."""

NAMED = 40
"""Incidents that one message about what was held back names; the rest is counted."""

POSITION, DISABLED, HELD = "#position", "#disabled", "#held"
"""Behind the sink's name. Before an incident that it was told of stands `!`, before an alert that waits `/`:
no sink's name holds one of them."""


class Held(StrEnum):
    """Why an alert was held back."""

    QUIET = "quiet"
    FLOOD = "flood"


@dataclass(frozen=True, slots=True)
class Alert:
    """An event as read from `alerts`, with its place there and when it was written (UTC microseconds)."""

    event: CloudEvent
    partition: int
    offset: int
    written_us: int

    @property
    def id(self) -> str:
        return self.event.attributes["id"]

    @property
    def severity(self) -> str:
        return self.event.attributes["severity"]

    @property
    def incident(self) -> str | None:
        """The incident it is about, None of a feed."""
        return self.event.data.get("incident")

    @property
    def stream(self) -> str:
        return str(self.event.data["stream"])

    @property
    def retracted(self) -> bool:
        return self.incident is not None and self.event.data.get("event") == EventKind.RETRACTED.value


def alert_of(record: Record) -> Alert:
    """Return the alert that a record holds. Raises `UnmaskError` or ValueError if there is none."""
    check_schema(record.headers)
    event = event_of(record)
    attributes, data = event.attributes, event.data
    if not isinstance(data, dict) or not isinstance(data.get("stream"), str):
        raise ValueError("its body names no stream")
    if not isinstance(data.get("incident", ""), str):
        raise ValueError("its incident is no text")
    split_stream_id(data["stream"])
    missing = [name for name in ("id", "source", "type", "severity") if not attributes.get(name)]
    if missing or attributes["severity"] not in SEVERITIES:
        raise ValueError(f"it lacks {', '.join(missing) or 'a severity'}")
    return Alert(event, record.partition, record.offset, record.timestamp_us)


@dataclass(slots=True)
class Waiting:
    """An alert that could not be delivered yet: where it stands, or, of one made here, what it says."""

    id: str
    offset: int
    incident: str | None
    first_us: int
    """When it was tried first."""
    next_us: int
    attempts: int = 0
    away: bool = False
    """The last attempt met no receiver: it is due as soon as there is one."""
    event: dict[str, Any] | None = None


@dataclass(slots=True)
class HeldBack:
    """What was held back since it was last told."""

    since_us: int
    last_us: int
    reasons: dict[str, int] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    severities: dict[str, int] = field(default_factory=dict)
    incidents: dict[str, dict[str, str]] = field(default_factory=dict)
    """The gravest, NAMED at most, in order of their first alert."""
    unnamed: int = 0
    """Alerts of incidents that are not among them."""

    def add(self, alert: Alert, why: Held, now_us: int) -> None:
        self.last_us = now_us
        _add(self.reasons, {why.value: 1})
        _add(self.types, {alert.event.attributes["type"]: 1})
        _add(self.severities, {alert.severity: 1})
        if alert.incident is not None:
            self._name(alert.incident, alert)

    def merge(self, other: "HeldBack") -> None:
        """Take in what another partition held back."""
        self.since_us, self.last_us = min(self.since_us, other.since_us), max(self.last_us, other.last_us)
        _add(self.reasons, other.reasons)
        _add(self.types, other.types)
        _add(self.severities, other.severities)
        self.unnamed += other.unnamed
        for name, facts in other.incidents.items():
            self._put(name, facts)

    def _name(self, name: str, alert: Alert) -> None:
        told = str(alert.event.data.get("event"))
        self._put(name, {"stream": alert.stream, "severity": alert.severity, "event": told})

    def _put(self, name: str, facts: dict[str, str]) -> None:
        self.incidents[name] = facts
        if len(self.incidents) > NAMED:
            weakest = min(self.incidents, key=lambda each: SEVERITIES.index(self.incidents[each]["severity"]))
            del self.incidents[weakest]
            self.unnamed += 1

    def said(self, sink: str, name: str, source: str) -> CloudEvent:
        """Return the event that tells of it, under the id `name`."""
        count = sum(self.reasons.values())
        why = " and ".join(WORDS[Held(reason)] for reason in sorted(self.reasons))
        severity = max(self.severities, key=SEVERITIES.index)
        data = {
            "schema": SCHEMA,
            "sink": sink,
            "event": "held_back",
            "count": count,
            "reasons": self.reasons,
            "types": self.types,
            "severities": self.severities,
            "first_time": iso(self.since_us),
            "last_time": iso(self.last_us),
            "incidents": [{"incident": incident, **facts} for incident, facts in self.incidents.items()],
            "unnamed": self.unnamed,
            "sentence": f"{count} alerts were held back: {why}",
        }
        return sink_event(sink, "held_back", name, source, severity, self.last_us, data)


def _add(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


WORDS = {Held.QUIET: "quiet hours", Held.FLOOD: "more than the sink's flood.most"}


def sink_event(
    sink: str, kind: str, name: str, source: str, severity: str, now_us: int, data: Mapping[str, Any]
) -> CloudEvent:
    """Return an event of a sink's own, which never stands on the `alerts` topic."""
    return CloudEvent(
        {
            "specversion": "1.0",
            "source": source,
            "subject": sink,
            "time": iso(now_us),
            "dataschema": f"urn:unmask:schema:alert:{SCHEMA}",
            "partitionkey": sink,
            "id": name,
            "type": f"unmask.sink.{kind}.v1",
            "severity": severity,
            "sequence": f"{1:010d}",
        },
        data,
    )


@dataclass(slots=True)
class Part:
    """A sink's state in one partition of `alerts`."""

    position: int | None = None
    """The next alert to look at, as the state says it; None: the sink never was here."""
    told: dict[str, int] = field(default_factory=dict)
    """Incidents that the receiver was told of, perhaps, with when (UTC microseconds)."""
    waiting: dict[str, Waiting] = field(default_factory=dict)
    """By id, in the order of the alerts."""
    held: HeldBack | None = None
    disabled: str | None = None
    """Identity of the receiver that wants nothing any more."""
    seen: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def see(self, name: str) -> bool:
        """Note an id; return whether it was known already."""
        known = name in self.seen
        self.seen[name] = None
        self.seen.move_to_end(name)
        if len(self.seen) > SEEN:
            self.seen.popitem(last=False)
        return known


def read_part(log: Readable, where: TopicPartition, sink: str) -> Part:
    """Return a sink's state as it stands in a partition of `deliveries`. Raises as the log does."""
    newest: dict[str, bytes] = {}
    for record in log.read(where, log.begin_offset(where)):
        if not _is_of(record.key, sink):
            continue
        if record.value is None:
            newest.pop(record.key, None)
        else:
            newest[record.key] = record.value
    part = Part()
    for key, value in newest.items():
        _take(part, key[len(sink) :], json.loads(value))
    waiting = sorted(part.waiting.values(), key=lambda each: each.offset)
    part.waiting = {each.id: each for each in waiting}
    return part


def _is_of(key: str, sink: str) -> bool:
    return key.startswith(sink) and key[len(sink) : len(sink) + 1] in ("#", "!", "/")


def _take(part: Part, kind: str, value: Any) -> None:
    if kind == POSITION:
        part.position = value
    elif kind == DISABLED:
        part.disabled = value
    elif kind == HELD:
        part.held = HeldBack(**value)
    elif kind.startswith("!"):
        part.told[kind[1:]] = value
    else:
        part.waiting[kind[1:]] = Waiting(**value)


def remembered(log: Readable, where: TopicPartition, position: int) -> Iterator[str]:
    """Yield the ids of the alerts just before `position`: what was looked at there is not sent twice."""
    first = max(log.begin_offset(where), position - SEEN)
    if first < position:
        for record in log.read(where, first, position):
            yield record.headers.get("ce_id", b"").decode("utf-8", "replace")


class Writes:
    """Changes of state not yet written: the newest value of each key."""

    def __init__(self, topic: str, sink: str) -> None:
        self._topic = topic
        self._sink = sink
        self._changes: dict[tuple[int, str], Any] = {}

    def __bool__(self) -> bool:
        return bool(self._changes)

    def waiting(self, partition: int, name: str, item: Waiting | None) -> None:
        self._put(partition, f"/{name}", None if item is None else asdict(item))

    def told(self, partition: int, incident: str, now_us: int | None) -> None:
        self._put(partition, f"!{incident}", now_us)

    def held(self, partition: int, held: HeldBack | None) -> None:
        self._put(partition, HELD, None if held is None else asdict(held))

    def position(self, partition: int, position: int) -> None:
        self._put(partition, POSITION, position)

    def disabled(self, partition: int, identity: str | None) -> None:
        self._put(partition, DISABLED, identity)

    def records(self, now_us: int) -> list[OutRecord]:
        return [
            OutRecord(
                self._topic,
                f"{self._sink}{kind}",
                None if value is None else json.dumps(value, separators=(",", ":")).encode(),
                {"schema": str(SCHEMA).encode()},
                now_us,
                partition,
            )
            for (partition, kind), value in self._changes.items()
        ]

    def clear(self) -> None:
        self._changes.clear()

    def forget(self, partition: int) -> None:
        """Write nothing for a partition that is not ours any more."""
        self._changes = {key: value for key, value in self._changes.items() if key[0] != partition}

    def _put(self, partition: int, kind: str, value: Any) -> None:
        self._changes[partition, kind] = value
