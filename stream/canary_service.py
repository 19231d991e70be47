"""`unmask canary`: sends a canary to every partition and says when one is not noticed (DESIGN 3.10).

A process of its own: what is tested must not be what tests.
"""

import json
import logging
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import av
from prometheus_client import CollectorRegistry, Counter, Gauge

from stream.canary import canary_id
from stream.chunks import Chunk, Chunker
from stream.clock import Clock, Deadline, SystemClock
from stream.config import Config
from stream.controls import End, EndReason, Start, to_body
from stream.errors import Code, UnmaskError
from stream.health import serve
from stream.log import Log, TopicPartition
from stream.marker import write_clip
from stream.records import CANARY, Control, Kind, OutRecord, Topic, encode_headers, new_attachment
from stream.service import opened, stop_signals
from stream.topics import topic_name

logger = logging.getLogger(__name__)

CLIP_S = 3.0
"""Six pictures at the canary's rate: twice as many as it takes."""
CHUNK_MS = 5000
"""The whole clip in one record."""

LOOK_S = 0.25
"""Between looks for answers."""
FLUSH_S = 15.0
"""Longest wait for the log to take a round; a log that is away takes none, and that is told."""

ALL_WELL, MISSED = 0, 1


class CanaryMetrics:
    """What the canary process exports."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ok = Gauge(
            "unmask_canary_ok",
            "1 while the canary of the partition is answered in time",
            ["partition"],
            registry=self.registry,
        )
        self.seconds = Gauge(
            "unmask_canary_answer_seconds",
            "From sending the newest canary to its answer",
            ["partition"],
            registry=self.registry,
        )
        self.missed = Counter(
            "unmask_canaries_missed_total", "Canaries not answered in time", registry=self.registry
        )


def canary(config: Config, once: bool, out: TextIO) -> int:
    """Send canaries until told to stop (SIGTERM, SIGINT), or one round; write a line per change to `out`.

    Return 1 if in the last round one was missed, else 0. Raises `UnmaskError` for settings or topics that
    cannot be used.
    """
    if not config.canary.every_s and not once:
        raise UnmaskError(Code.CONFIG, "canary.every_s is 0, which sends none; it must be above 0")
    clock, stopping = SystemClock(), threading.Event()
    with stop_signals(stopping), tempfile.TemporaryDirectory(prefix="unmask-canary-") as folder:
        log = opened(config, clock, stopping)
        if log is None:
            return ALL_WELL
        try:
            clip = write_clip(Path(folder) / "canary.mp4", CLIP_S, [(0.0, CLIP_S)], bframes=0)
            metrics = CanaryMetrics()
            if config.worker.metrics_port and not once:
                serve(metrics.registry, config.worker.metrics_port, config.worker.metrics_host)
            rounds = Canaries(config, log, clip, clock, metrics, lambda line: _say(out, line))
            rounds.run(stopping, once)
            return ALL_WELL if rounds.well() else MISSED
        finally:
            log.close()


@dataclass(slots=True)
class _Sent:
    """The newest canary of a partition."""

    attachment: str = ""
    at: float = 0.0
    well: bool | None = None


class Canaries:
    """Sends rounds of canaries and reads the answers. One thread."""

    def __init__(
        self,
        config: Config,
        log: Log,
        clip: Path,
        clock: Clock,
        metrics: CanaryMetrics,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._log = log
        self._clip = clip
        self._clock = clock
        self._metrics = metrics
        self._say = say
        self._answers = TopicPartition(topic_name(config, Topic.CANARY), 0)
        self._next = log.end_offset(self._answers)
        self._sent = {number: _Sent() for number in range(log.partitions(self._media))}

    @property
    def _media(self) -> str:
        return topic_name(self._config, Topic.MEDIA)

    def well(self) -> bool:
        """Return whether every canary of the last round was answered in time."""
        return all(sent.well for sent in self._sent.values())

    def run(self, stopping: threading.Event, once: bool = False) -> None:
        """Send rounds, `canary.every_s` apart, until `stopping` or only one."""
        while not stopping.is_set():
            begun = self._clock.monotonic()
            self.round(stopping)
            if once:
                return
            stopping.wait(max(0.0, begun + self._config.canary.every_s - self._clock.monotonic()))

    def round(self, stopping: threading.Event) -> None:
        """Send one canary to each partition and wait for the answers, at most `canary.within_s`."""
        deadline = Deadline(self._config.canary.within_s, self._clock)
        reason = f"no answer in {self._config.canary.within_s:g} s: nobody watches this partition"
        waiting = set(self._sent)
        try:
            self._send()
            while waiting and not deadline.passed() and not stopping.is_set():
                waiting -= set(self._answered(waiting))
                if waiting:
                    stopping.wait(LOOK_S)
        except UnmaskError as error:
            reason = str(error)
        if stopping.is_set():
            return
        for partition in sorted(waiting):
            self._metrics.missed.inc()
            self._note(partition, False, reason)

    def _send(self) -> None:
        with self._log.producer(f"{self._config.prefix}-{CANARY}") as producer:
            for partition, sent in self._sent.items():
                sent.attachment = new_attachment(self._clock.now_us(), sent.attachment)
                sent.at = self._clock.monotonic()
                for meta, value in self._chunks(canary_id(partition), sent.attachment):
                    headers = encode_headers(meta)
                    producer.send(
                        OutRecord(self._media, meta.stream, value, headers, meta.capture_us, partition)
                    )
            producer.flush(FLUSH_S)

    def _chunks(self, stream: str, attachment: str) -> Iterable[Chunk]:
        chunker = Chunker(stream, attachment, Kind.FILE, CHUNK_MS, self._clock)
        yield chunker.control(Control.START, to_body(Start(CANARY, "file", "file")))
        with av.open(str(self._clip)) as container:
            for packet in container.demux():
                yield from chunker.push(packet)
        yield from chunker.flush()
        yield chunker.control(Control.END, to_body(End(EndReason.FINISHED.value)))

    def _answered(self, waiting: Iterable[int]) -> list[int]:
        """Return which of `waiting` are answered, as far as the answers go now."""
        wanted = {self._sent[partition].attachment: partition for partition in waiting}
        found = []
        for record in self._log.read(self._answers, self._next):
            self._next = record.offset + 1
            partition = wanted.get(json.loads(record.value or b"{}").get("attachment"))
            if partition is None:
                continue
            seconds = self._clock.monotonic() - self._sent[partition].at
            self._metrics.seconds.labels(str(partition)).set(seconds)
            self._note(partition, True, f"answered in {seconds:.1f} s")
            found.append(partition)
        return found

    def _note(self, partition: int, well: bool, words: str) -> None:
        sent = self._sent[partition]
        self._metrics.ok.labels(str(partition)).set(well)
        if sent.well is not well:
            sent.well = well
            self._say(f"partition {partition}: {'ok' if well else 'MISSED'}, {words}")


def _say(out: TextIO, line: str) -> None:
    out.write(line + "\n")
    out.flush()
