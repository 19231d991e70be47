"""A detect worker over the embedded log, with a reader that knows the truth."""

import contextlib
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import av

from detectors.cues.follow import Follower
from stream.aggregate import StreamAggregate
from stream.alerts import Publisher
from stream.cascade import Heavy
from stream.chunks import Chunk, Chunker
from stream.clock import Deadline, FakeClock, SystemClock
from stream.config import Config
from stream.controls import End, EndReason, Start, to_body
from stream.errors import Code, UnmaskError
from stream.evidence import EvidenceStore
from stream.log import Consumer, TopicPartition, everything
from stream.marker import MarkerReader
from stream.metrics import Metrics
from stream.records import Control, Kind, OutRecord, Record, Topic, encode_headers, new_attachment
from stream.sqlite_log import SqliteLog
from stream.topics import topic_name, topic_specs
from stream.watch import structured
from stream.worker import Worker
from tests.stream.story import CALIBRATION, PROVENANCE


class KilledError(Exception):
    """The worker dies here, as if by SIGKILL: nothing after it is written."""


def chunked(clip: Path, stream: str, start_us: int, chunk_ms: int = 500) -> list[Chunk]:
    """Return a file as ingest writes it: `start`, chunks, `end`."""
    clock = FakeClock(start_us)
    chunker = Chunker(stream, new_attachment(start_us), Kind.FILE, chunk_ms, clock)
    chunks = [chunker.control(Control.START, to_body(Start("clip", "file", "file")))]
    with av.open(str(clip)) as container:
        for packet in container.demux():
            chunks += chunker.push(packet)
    chunks += chunker.flush()
    return [*chunks, chunker.control(Control.END, to_body(End(EndReason.FINISHED.value)))]


class Detect:
    """A data folder and the workers that run on it, one after the other."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.config = Config(data_dir=str(folder), deterministic=True, **settings)
        self.clock = SystemClock()
        self.log = SqliteLog(folder / "log", self.config.log, self.clock)
        self.log.create_topics(topic_specs(self.config))
        self.evidence = EvidenceStore(folder / "evidence", self.clock)
        self.metrics = Metrics()
        self.heavy: Heavy | None = None
        self.follower: Follower | None = None
        self._runs = 0

    def list_source(self, stream: str, **entry: Any) -> None:
        value = json.dumps(entry).encode()
        self._send([OutRecord(self.topic(Topic.SOURCES), stream, value, {"schema": b"1"}, 0)])

    def unlist_source(self, stream: str) -> None:
        self._send([OutRecord(self.topic(Topic.SOURCES), stream, None, {"schema": b"1"}, 0)])

    def write(self, chunks: Sequence[Chunk], partition: int = 0) -> None:
        self._send(
            [
                OutRecord(
                    self.topic(Topic.MEDIA),
                    meta.stream,
                    value,
                    encode_headers(meta),
                    meta.capture_us,
                    partition,
                )
                for meta, value in chunks
            ]
        )

    def _send(self, records: Sequence[OutRecord]) -> None:
        with self.log.producer("test") as producer:
            for record in records:
                producer.send(record)
            producer.flush(10)

    def worker(self, log: Any = None) -> Worker:
        self._runs += 1
        return Worker(
            self.config,
            log or self.log,
            MarkerReader(),
            lambda stream: StreamAggregate(stream, self.config, CALIBRATION, PROVENANCE, self.evidence),
            Publisher(self.config, PROVENANCE, self.clock),
            self.evidence,
            self.clock,
            self.metrics,
            member=f"detect-{self._runs}",
            heavy=self.heavy,
            follower=self.follower,
        )

    def run(
        self, until: Callable[["Detect"], bool] | None = None, seconds: float = 60.0, log: Any = None
    ) -> None:
        """Let a worker work until all media is applied (or `until`), then stop it in order."""
        worker = self.worker(log)
        thread = threading.Thread(target=worker.run, daemon=True)
        thread.start()
        deadline = Deadline(seconds, self.clock)
        done = until or Detect.all_applied
        while not done(self) and not deadline.passed() and worker.error is None:
            self.clock.sleep(0.02)
        worker.drain(Deadline(10, self.clock))
        thread.join(15)
        assert worker.error is None, worker.error
        assert not deadline.passed(), "media was not applied in time"
        assert not thread.is_alive()

    def run_killed(self, after_commits: int) -> bool:
        """Let a worker work until its n-th commit, which fails as if the process died; return if it came."""
        worker = self.worker(dying(self.log, after_commits))
        thread = threading.Thread(target=_quiet(worker.run), daemon=True)
        thread.start()
        deadline = Deadline(60, self.clock)
        while worker.error is None and not self.all_applied() and not deadline.passed():
            self.clock.sleep(0.005)
        worker.drain(Deadline(10, self.clock))
        thread.join(15)
        assert not thread.is_alive()
        return isinstance(worker.error, KilledError)

    def all_applied(self) -> bool:
        for number in range(self.config.media.partitions):
            partition = TopicPartition(self.topic(Topic.MEDIA), number)
            end = self.log.end_offset(partition)
            if end and (self.log.group_position("unmask-detect", partition) or 0) < end:
                return False
        return True

    def records(self, topic: Topic) -> list[Record]:
        return list(everything(self.log, self.topic(topic)))

    def values(self, topic: Topic) -> list[dict[str, Any]]:
        return [json.loads(record.value or b"null") for record in self.records(topic)]

    def frames(self, stream: str) -> list[dict[str, Any]]:
        """Return the scores of sampled frames."""
        found = [value for value in self.values(Topic.SCORES) if value["stream"] == stream]
        return [value for value in found if value["type"] == "frame"]

    def alerts(self) -> list[dict[str, Any]]:
        return [structured(record) for record in everything(self.log, self.topic(Topic.ALERTS))]

    def dead(self) -> list[Record]:
        return list(everything(self.log, self.topic(Topic.DEADLETTER)))

    def topic(self, topic: Topic) -> str:
        return topic_name(self.config, topic)


class Faulty:
    """A log whose consumer's n-th commits (from 0) fail, before anything of them is written."""

    def __init__(self, log: SqliteLog, fail: Callable[[int, Consumer], None]) -> None:
        self._log = log
        self._fail = fail

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def consumer(self, *args: Any) -> Any:
        return _FaultyConsumer(self._log.consumer(*args), self._fail)


class _FaultyConsumer:
    def __init__(self, consumer: Consumer, fail: Callable[[int, Consumer], None]) -> None:
        self._consumer = consumer
        self._fail = fail
        self._commits = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    def commit(self, outputs: Sequence[OutRecord], positions: Mapping[TopicPartition, int]) -> None:
        self._commits += 1
        self._fail(self._commits - 1, self._consumer)
        self._consumer.commit(outputs, positions)


def dying(log: SqliteLog, after: int) -> Faulty:
    """Return a log on which the worker dies at a commit."""

    def fail(commit: int, consumer: Consumer) -> None:
        if commit >= after:
            raise KilledError

    return Faulty(log, fail)


def fencing(log: SqliteLog, at: Collection[int]) -> Faulty:
    """Return a log on which another member comes and goes at each commit of `at`."""

    def fail(commit: int, consumer: Consumer) -> None:
        if commit in at:
            lease = consumer._lease  # type: ignore[attr-defined]
            lease.release(consumer._database)  # type: ignore[attr-defined]

    return Faulty(log, fail)


class Away:
    """A log over a cluster that does not answer while `away`; nothing that is asked then has any effect."""

    def __init__(self, log: SqliteLog) -> None:
        self._log = log
        self.away = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._log, name)
        return self._guarded(found) if name in ("read", "end_offset", "begin_offset") else found

    def consumer(self, *args: Any) -> Any:
        consumer = self._log.consumer(*args)
        for name in ("poll", "commit", "committed"):
            setattr(consumer, name, self._guarded(getattr(consumer, name)))
        return consumer

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any) -> Any:
            if self.away:
                raise UnmaskError(Code.LOG_AWAY, "no answer in 20 s")
            return call(*args)

        return guarded


def unknown(log: SqliteLog, at: Collection[int]) -> Any:
    """Return a log that does not say, of each commit of `at`, that it has written it."""

    class Unknown(Faulty):
        def consumer(self, *args: Any) -> Any:
            return Mute(self._log.consumer(*args), self._fail)

    class Mute(_FaultyConsumer):
        def commit(self, outputs: Sequence[OutRecord], positions: Mapping[TopicPartition, int]) -> None:
            super().commit(outputs, positions)
            if self._commits - 1 in at:
                self._consumer._lease.release(self._consumer._database)  # type: ignore[attr-defined]
                raise UnmaskError(Code.LOG_FENCED, "whether this was written is not known")

    return Unknown(log, lambda commit, consumer: None)


def _quiet(run: Callable[[], None]) -> Callable[[], None]:
    def quietly() -> None:
        with contextlib.suppress(KilledError):
            run()

    return quietly


def kinds(alerts: Collection[Mapping[str, Any]]) -> list[str]:
    """Return the short types of events, in order."""
    return [str(alert["type"]).removeprefix("unmask.").removesuffix(".v1") for alert in alerts]
