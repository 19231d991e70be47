"""Services as a user starts them: processes of their own, over a real Kafka, with the member `marker`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stream.chunks import Chunk
from stream.clock import SystemClock
from stream.config import Config, Kafka, Media, Members
from stream.kafka_log import KafkaLog
from stream.log import TopicPartition, everything
from stream.records import OutRecord, Record, Topic, encode_headers
from stream.topics import media_partition, topic_name, topic_specs
from stream.watch import structured

PARTITIONS = 4
PATIENCE_S = 60.0
"""Two processes start and a session of 6 s ends, on a busy machine."""


class Cluster:
    """The topics of one test, under a prefix of their own."""

    def __init__(self, servers: str, prefix: str) -> None:
        self.config = Config(
            prefix=prefix,
            media=Media(partitions=PARTITIONS),
            kafka=Kafka(bootstrap_servers=servers, replication=1, session_s=6.0),
            members=Members(names=("marker",)),
        )
        self.log = KafkaLog(self.config.kafka, self.config.media.max_message_bytes, SystemClock())
        self.log.create_topics(topic_specs(self.config))

    def settings(self) -> dict[str, str]:
        """Return what a service must be told to work here."""
        return {
            "prefix": self.config.prefix,
            "media.partitions": str(PARTITIONS),
            "kafka.bootstrap_servers": self.config.kafka.bootstrap_servers,
            "kafka.replication": "1",
            "kafka.session_s": "6",
            "members.names": '["marker"]',
        }

    def list_sources(self, *streams: str) -> None:
        topic = self.topic(Topic.SOURCES)
        self.send([OutRecord(topic, stream, b"{}", {"schema": b"1"}, 0) for stream in streams])

    def write(self, chunks: Sequence[Chunk]) -> None:
        self.send(
            [
                OutRecord(
                    topic=self.topic(Topic.MEDIA),
                    key=meta.stream,
                    value=value,
                    headers=encode_headers(meta),
                    timestamp_us=meta.capture_us,
                    partition=media_partition(meta.stream, PARTITIONS),
                )
                for meta, value in chunks
            ]
        )

    def send(self, records: Sequence[OutRecord]) -> None:
        with self.log.producer("test") as producer:
            for record in records:
                producer.send(record)
            producer.flush(10)

    def records(self, topic: Topic) -> list[Record]:
        return list(everything(self.log, self.topic(topic)))

    def values(self, topic: Topic) -> list[dict[str, Any]]:
        return [json.loads(record.value or b"null") for record in self.records(topic)]

    def alerts(self, stream: str) -> list[dict[str, Any]]:
        return [structured(record) for record in self.records(Topic.ALERTS) if record.key == stream]

    def kinds(self, stream: str) -> list[str]:
        """Return the short types of a stream's events, in order."""
        return [event["type"].removeprefix("unmask.").removesuffix(".v1") for event in self.alerts(stream)]

    def topic(self, topic: Topic) -> str:
        return topic_name(self.config, topic)

    def partitions(self, topic: Topic) -> list[TopicPartition]:
        name = self.topic(topic)
        return [TopicPartition(name, number) for number in range(self.log.partitions(name))]


@contextlib.contextmanager
def cluster(servers: str, prefix: str) -> Iterator[Cluster]:
    made = Cluster(servers, prefix)
    try:
        yield made
    finally:
        made.log.close()


class Service:
    """A running command; its log is kept in `folder`."""

    def __init__(
        self, folder: Path, settings: dict[str, str], *command: str, hooks: bool = False, **more: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "log"
        given = {**settings, "data_dir": str(folder / "data"), **more}
        program = [sys.executable, "-m", "tests.stream.hooked"] if hooks else [str(UNMASK)]
        arguments = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*program, *command, *arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                # Without the trap that a shell's background jobs inherit, Ctrl-C would be ignored.
                preexec_fn=_heed_ctrl_c,
            )

    def said(self) -> str:
        return self._log.read_text()

    def wait(self, seconds: float = PATIENCE_S) -> int:
        return self.process.wait(seconds)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(10)


UNMASK = Path(sys.executable).with_name("unmask")


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def service(folder: Path, settings: dict[str, str], *command: str, **more: Any) -> Iterator[Service]:
    """Run a command for the length of the block."""
    made = Service(folder, settings, *command, **more)
    try:
        yield made
    finally:
        made.end()


def until(reached: Callable[[], bool], *services: Service, seconds: float = PATIENCE_S) -> None:
    """Wait; fail, with what the services said, after `seconds`."""
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            raise AssertionError("\n".join(each.said()[-3000:] for each in services))
        time.sleep(0.2)


def reap(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
