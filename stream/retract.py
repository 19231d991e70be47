"""`unmask retract`: withdraws an incident, with a reason, towards everybody who was told of it (DESIGN 3.5).

An incident that is not over belongs to detect: a control record in `media`, in order with what detect reads,
asks it to withdraw it, and the transaction that applies the record tells so. Of a closed one nothing more
would be said: its last event is followed by the withdrawal here. Twice is told with the same id, so that
whoever counts by id counts once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TextIO

from stream.clock import Clock, Deadline, SystemClock
from stream.config import Config
from stream.controls import Retract, to_body
from stream.deadletters import recorded
from stream.errors import Code, UnmaskError
from stream.incidents import MAX_REASON, EventKind
from stream.log import Log, everything
from stream.records import SCHEMA, Control, OutRecord, Record, Topic
from stream.topics import media_partition, topic_name

WAIT_S = 20.0
"""Longest wait for detect to have said it: it commits twice a second, a rebalance takes ten."""

LOOK_S = 0.5
"""Between looks at the alerts."""

WRITE_S = 10.0
"""Longest wait until what is written is durable."""

WRITER = "retract"
"""Name of the producer."""

DROPPED = ("changes", "totals")
"""What only other kinds of event say."""

OK, WAITING = 0, 1
"""Exit codes: withdrawn, and asked for while nobody is there to do it."""


class Outcome(StrEnum):
    """`ASKED`: detect is not running, or did not come to it yet; it will when it does."""

    RETRACTED = "retracted"
    ASKED = "asked"


@dataclass(frozen=True, slots=True)
class _Told:
    """The newest event of an incident: its record and its body."""

    record: Record
    data: Mapping[str, Any]

    @property
    def kind(self) -> EventKind:
        return EventKind(self.data["event"])


def run(config: Config, incident: str, reason: str, as_json: bool, out: TextIO) -> int:
    """Withdraw an incident, wait until it is told, and say so; return the exit code."""
    clock = SystemClock()
    with recorded(config) as log:
        outcome = retract(config, log, clock, incident, reason)
    if as_json:
        out.write(json.dumps({"incident": incident, "outcome": outcome.value}) + "\n")
    elif outcome is Outcome.RETRACTED:
        out.write(f"{incident} is retracted\n")
    else:
        out.write(
            f"{incident}: asked for, but detect has not come to it; it will be retracted when detect does\n"
        )
    return OK if outcome is Outcome.RETRACTED else WAITING


def retract(
    config: Config, log: Log, clock: Clock, incident: str, reason: str, wait_s: float = WAIT_S
) -> Outcome:
    """Withdraw an incident and wait, at most `wait_s` seconds, until its event is written.

    `reason` is told to everybody, its first MAX_REASON characters. Raises `UnmaskError` SOURCE_SYNTAX with no
    reason, SOURCE_NOT_FOUND for an incident that the alerts do not know, SOURCE_ENDED for one that is
    retracted already; and what the log raises.
    """
    reason = " ".join(reason.split())[:MAX_REASON]
    if not reason:
        raise UnmaskError(
            Code.SOURCE_SYNTAX, "the reason is empty; say in a sentence why the incident is withdrawn"
        )
    told = _newest(config, log, incident)
    if told is None:
        raise UnmaskError(
            Code.SOURCE_NOT_FOUND,
            f"no incident {incident[:80]!r} in {topic_name(config, Topic.ALERTS)}; its id is that of an "
            "event without the number behind the dot",
        )
    if told.kind is EventKind.RETRACTED:
        raise UnmaskError(Code.SOURCE_ENDED, f"incident {incident} is retracted already")
    if told.kind is EventKind.CLOSED:
        _write(log, _withdrawal(told, reason, clock.now_us()))
        return Outcome.RETRACTED
    _write(log, command(config, told.record.key, Retract(incident, reason), clock.now_us()))
    return _awaited(config, log, clock, incident, reason, Deadline(wait_s, clock))


def command(config: Config, stream: str, body: Retract, now_us: int) -> OutRecord:
    """Return the control record that asks detect to withdraw an incident of `stream`."""
    return OutRecord(
        topic=topic_name(config, Topic.MEDIA),
        key=stream,
        value=json.dumps(to_body(body), separators=(",", ":")).encode(),
        headers={
            "schema": str(SCHEMA).encode(),
            "control": Control.RETRACT.value.encode(),
            "capture_time": str(now_us).encode(),
        },
        timestamp_us=now_us,
        partition=media_partition(stream, config.media.partitions),
    )


def withdrawal(newest: Record, reason: str, now_us: int) -> OutRecord:
    """Return the event that withdraws a closed incident, `newest` being its newest one. Raises
    `ValueError` if that does not close it: an open incident is detect's, see `command`."""
    told = _Told(newest, json.loads(newest.value or b"null"))
    if told.kind is not EventKind.CLOSED:
        raise ValueError(f"the newest event is {told.kind}; only what is closed can be withdrawn by others")
    return _withdrawal(told, reason, now_us)


def _awaited(
    config: Config, log: Log, clock: Clock, incident: str, reason: str, deadline: Deadline
) -> Outcome:
    told = None
    while not deadline.passed():
        clock.sleep(LOOK_S)
        told = _newest(config, log, incident)
        if told is not None and told.kind is EventKind.RETRACTED:
            return Outcome.RETRACTED
    if told is None or told.kind is not EventKind.CLOSED:
        return Outcome.ASKED
    # It closed meanwhile, and another one has opened since: detect knows it no more.
    _write(log, _withdrawal(told, reason, clock.now_us()))
    return Outcome.RETRACTED


def _newest(config: Config, log: Log, incident: str) -> _Told | None:
    """Return the event of the incident with the highest number."""
    newest: _Told | None = None
    for record in everything(log, topic_name(config, Topic.ALERTS)):
        if not record.headers.get("ce_id", b"").startswith(f"{incident}.".encode()):
            continue
        data = json.loads(record.value or b"null")
        if data.get("incident") == incident and (newest is None or data["number"] > newest.data["number"]):
            newest = _Told(record, data)
    return newest


def _withdrawal(told: _Told, reason: str, now_us: int) -> OutRecord:
    """Return the event that follows `told`: the same incident, withdrawn."""
    number = told.data["number"] + 1
    data = {name: value for name, value in told.data.items() if name not in DROPPED}
    data |= {
        "number": number,
        "event": EventKind.RETRACTED.value,
        "verdict": "inconclusive",
        "suggested_action": "none",
        "latency_s": None,
        "reason": reason,
    }
    headers = {
        **told.record.headers,
        "ce_id": f"{told.data['incident']}.{number}".encode(),
        "ce_type": f"unmask.incident.{EventKind.RETRACTED.value}.v1".encode(),
        "ce_sequence": f"{number:010d}".encode(),
    }
    value = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
    return OutRecord(told.record.topic, told.record.key, value, headers, now_us)


def _write(log: Log, record: OutRecord) -> None:
    with log.producer(WRITER) as producer:
        producer.send(record)
        producer.flush(WRITE_S)
