"""`unmask sinks list`, `test`, `enable`: looked at, tried, switched on again."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from stream.alerts import CloudEvent
from stream.clock import Clock, SystemClock
from stream.config import Config
from stream.console import clean
from stream.deadletters import recorded
from stream.errors import Code, UnmaskError
from stream.log import Log, TopicPartition, partitions_of
from stream.records import SCHEMA, Topic
from stream.sinks.delivery import Outcome
from stream.sinks.loop import group_of
from stream.sinks.service import lag, target_of
from stream.sinks.settings import Sink, load_sinks, shown
from stream.sinks.state import Part, Writes, read_part, sink_event
from stream.topics import topic_name

logger = logging.getLogger(__name__)

OK, FAILED = 0, 1

WRITER = "sinks"
"""Name of the producer."""

WRITE_S = 10.0
"""Longest wait until what is written is durable."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a sink stands in the log, over all partitions."""

    lag: int
    waiting: int
    held_back: int
    disabled: bool


def list_sinks(config: Config, as_json: bool, out: TextIO) -> int:
    """Write a line per sink: what it is, and, where there is a log, how it stands; return the exit code."""
    sinks = load_sinks(config)
    standings = _standings(config, sinks)
    for name, settings in sinks.items():
        standing = standings.get(name)
        if as_json:
            out.write(json.dumps(_row(name, settings, standing)) + "\n")
        else:
            out.write(clean(_line(name, settings, standing)) + "\n")
    if not sinks and not as_json:
        out.write("no sink; sinks.file names none\n")
    return OK


def try_sink(config: Config, name: str, out: TextIO) -> int:
    """Deliver a sample by a sink of the configuration, once; say what became of it, return the exit code.

    It is of the type `unmask.sink.test.v1`, filters do not apply, and the log is not touched.
    """
    clock = SystemClock()
    settings = _named(load_sinks(config), name)
    target = target_of(name, settings, config, clock, "test")
    try:
        result = target.deliver(sample(config, name, clock))
    finally:
        target.close()
    if result.outcome is Outcome.DELIVERED:
        out.write(clean(f"{name}: delivered to {shown(settings)}") + "\n")
        return OK
    out.write(clean(f"{name}: not delivered to {shown(settings)}: {result.detail}") + "\n")
    return FAILED


def enable(config: Config, name: str, out: TextIO) -> int:
    """Let a sink whose receiver was gone send again; return the exit code."""
    clock = SystemClock()
    _named(load_sinks(config), name)
    with recorded(config) as log:
        topic = topic_name(config, Topic.DELIVERIES)
        writes = Writes(topic, name)
        for where in partitions_of(log, topic):
            if read_part(log, where, name).disabled is not None:
                writes.disabled(where.partition, None)
        if not writes:
            out.write(f"{name} is not disabled\n")
            return OK
        with log.producer(WRITER) as producer:
            for record in writes.records(clock.now_us()):
                producer.send(record)
            producer.flush(WRITE_S)
    out.write(f"{name} is enabled; a running serve notices within seconds\n")
    return OK


def sample(config: Config, sink: str, clock: Clock) -> CloudEvent:
    """Return an event that tests a sink and cannot be taken for an alert."""
    now = clock.now_us()
    sentence = "a sample: unmask sinks test"
    data = {"schema": SCHEMA, "sink": sink, "event": "test", "sentence": sentence}
    return sink_event(sink, "test", f"{sink}.test.{now}", f"/unmask/{config.prefix}", "low", now, data)


def _named(sinks: Mapping[str, Sink], name: str) -> Sink:
    if name in sinks:
        return sinks[name]
    there = f"there are: {', '.join(sinks)}" if sinks else "sinks.file names none"
    raise UnmaskError(Code.CONFIG, f"no sink {name[:80]!r}; {there}")


def _standings(config: Config, sinks: Mapping[str, Sink]) -> dict[str, Standing]:
    try:
        with recorded(config) as log:
            return {name: _standing(config, log, name) for name in sinks}
    except UnmaskError as error:
        if error.code is not Code.SOURCE_NOT_FOUND:
            logger.warning("how they stand is not known: %s", error)
        return {}


def _standing(config: Config, log: Log, name: str) -> Standing:
    parts = [read_part(log, where, name) for where in _partitions(config, log)]
    return Standing(
        lag=lag(config, log, group_of(config, name)),
        waiting=sum(len(part.waiting) for part in parts),
        held_back=sum(map(_held, parts)),
        disabled=any(part.disabled is not None for part in parts),
    )


def _partitions(config: Config, log: Log) -> list[TopicPartition]:
    return list(partitions_of(log, topic_name(config, Topic.DELIVERIES)))


def _held(part: Part) -> int:
    return sum(part.held.reasons.values()) if part.held is not None else 0


def _row(name: str, settings: Sink, standing: Standing | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "type": settings.type, "to": shown(settings)}
    if standing is None:
        return row
    return row | {
        "lag": standing.lag,
        "waiting": standing.waiting,
        "held_back": standing.held_back,
        "disabled": standing.disabled,
    }


def _line(name: str, settings: Sink, standing: Standing | None) -> str:
    words = f"{name:<20} {settings.type:<8} {shown(settings)}"
    if standing is None:
        return words
    how = [f"{count} {what}" for count, what in _counts(standing) if count]
    return f"{words}  {'DISABLED, ' if standing.disabled else ''}{', '.join(how) or 'nothing waits'}"


def _counts(standing: Standing) -> list[tuple[int, str]]:
    return [(standing.lag, "not looked at"), (standing.waiting, "waiting"), (standing.held_back, "held back")]
