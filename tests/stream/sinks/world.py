"""Sinks over a real log, with a clock that moves when told and a receiver that does what it is told."""

import random
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from stream.alerts import CloudEvent, iso
from stream.assemble import open_log
from stream.clock import FakeClock, SystemClock
from stream.config import Config, Media
from stream.log import Log, everything
from stream.records import SCHEMA, OutRecord, Record, Topic
from stream.sinks.delivery import DELIVERED, Outcome, Result
from stream.sinks.loop import SinkLoop
from stream.sinks.metrics import SinkMetrics
from stream.sinks.service import Muted
from stream.sinks.settings import Stdout
from stream.sinks.state import Alert
from stream.topics import topic_name, topic_specs

AWAY = Result(Outcome.AWAY, "timeout", "timed out")
REFUSED = Result(Outcome.REFUSED, "client_error", "answered 400")
GONE = Result(Outcome.GONE, "gone", "answered 410")


def incident(
    name: str = "i1", number: int = 1, event: str = "opened", severity: str = "medium", stream: str = "studio"
) -> CloudEvent:
    """An incident's event, with what sinks look at."""
    data = {
        "schema": SCHEMA,
        "stream": stream,
        "incident": name,
        "number": number,
        "event": event,
        "verdict": "inconclusive" if event == "retracted" else "manipulated",
        "severity": severity,
    }
    return _event(f"{name}.{number}", f"unmask.incident.{event}.v1", severity, stream, data)


def feed(number: int = 1, kind: str = "down", stream: str = "studio") -> CloudEvent:
    data = {"schema": SCHEMA, "stream": stream, "event": kind, "code": "source_silent", "sentence": None}
    severity = "low" if kind == "up" else "medium"
    return _event(
        f"{stream}.0000000000000001.{number}.{kind}", f"unmask.feed.{kind}.v1", severity, stream, data
    )


def _event(name: str, kind: str, severity: str, stream: str, data: Mapping[str, Any]) -> CloudEvent:
    attributes = {
        "specversion": "1.0",
        "source": "/unmask/unmask",
        "subject": stream,
        "time": iso(1_700_000_000_000_000),
        "dataschema": "urn:unmask:schema:alert:1",
        "partitionkey": stream,
        "id": name,
        "type": kind,
        "severity": severity,
        "sequence": "0000000001",
    }
    return CloudEvent(attributes, data)


def alert(event: CloudEvent, offset: int = 0) -> Alert:
    return Alert(event, 0, offset, 1_700_000_000_000_000)


class FakeTarget:
    """Answers what stands next in `answers`, then that all is well."""

    def __init__(self, name: str = "there") -> None:
        self.answers: deque[Result | Exception] = deque()
        self.always: Result | None = None
        self.tried: list[str] = []
        self.events: list[CloudEvent] = []
        self.name = name

    def deliver(self, event: CloudEvent) -> Result:
        self.tried.append(event.attributes["id"])
        answer = self.answers.popleft() if self.answers else (self.always or DELIVERED)
        if isinstance(answer, Exception):
            raise answer
        if answer.outcome is Outcome.DELIVERED:
            self.events.append(event)
        return answer

    @property
    def got(self) -> list[str]:
        """Ids of what was taken, in order."""
        return [event.attributes["id"] for event in self.events]

    def identity(self) -> str:
        return self.name

    def close(self) -> None:
        pass


class World:
    """A log and what is in it. `start` begins a sink, or begins it again, as after a restart."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.config = Config(data_dir=str(folder), media=Media(partitions=2), **settings)
        self.clock = FakeClock()
        self.log: Log = open_log(self.config, SystemClock())
        self.log.create_topics(topic_specs(self.config))
        self.labels: dict[str, dict[str, str]] = {}
        self.metrics = SinkMetrics()

    def write(self, *events: CloudEvent) -> None:
        topic = topic_name(self.config, Topic.ALERTS)
        now = self.clock.now_us()
        self.send(
            [
                OutRecord(topic, event.attributes["partitionkey"], event.body(), event.headers(), now)
                for event in events
            ]
        )

    def send(self, records: list[OutRecord]) -> None:
        with self.log.producer("test") as producer:
            for record in records:
                producer.send(record)
            producer.flush(10)

    def loop(
        self, target: FakeTarget, log: Any = None, name: str = "s", member: str = "serve", **settings: Any
    ) -> SinkLoop:
        return SinkLoop(
            name,
            Stdout(type="stdout", **settings),
            target,
            log or self.log,
            self.config,
            lambda stream: self.labels.get(stream, {}),
            Muted(self.config, self.log, self.clock),
            self.clock,
            random.Random(7),
            self.metrics,
            member,
        )

    def start(self, target: FakeTarget, **settings: Any) -> SinkLoop:
        """Return a loop that has joined: what is written from now on is its own."""
        loop = self.loop(target, **settings)
        settle(loop)
        return loop

    def states(self) -> dict[str, Record]:
        """The newest record of each key of all partitions."""
        newest = {}
        for record in everything(self.log, topic_name(self.config, Topic.DELIVERIES)):
            newest[record.key] = record
        return {key: record for key, record in newest.items() if record.value is not None}

    def counted(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(generate_latest(self.metrics.registry).decode())
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def dropped(self, reason: str) -> float:
        return self.counted("unmask_sink_dropped_total", reason=reason)


def settle(loop: SinkLoop) -> None:
    """Step until there is nothing to do for now."""
    idle = 0
    for _ in range(5000):
        idle = 0 if loop.step() else idle + 1
        if idle == 4:
            return
    raise AssertionError("never idle")


def end(loop: SinkLoop) -> None:
    """Stop in order: commit and leave."""
    loop._leave(5.0)


def die(loop: SinkLoop) -> None:
    """Be gone without a commit, as if by SIGKILL."""
    loop._forget_all()
    end(loop)
