"""What the log takes of all CPU that watching takes: the instruments, and a run of the pipeline between them.

Used by benchmarks/kafka.py. In one process: demultiplexing and the chunker of ingest, in a thread per feed, a
producer for all of them as the feeds of a shard have, and a detect worker with the shipped members.
"""

import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import av
import psutil

from stream import bench
from stream.aggregate import StreamAggregate
from stream.alerts import Publisher
from stream.assemble import Assembly, open_log
from stream.chunks import Chunker
from stream.clock import Deadline, SystemClock
from stream.config import Config
from stream.evidence import EvidenceStore
from stream.metrics import Metrics
from stream.records import Kind, OutRecord, Topic, encode_headers, new_attachment
from stream.topics import media_partition, topic_name, topic_specs
from stream.worker import Worker

CLIP_S = 8
FEEDS = 5
"""At real time about half of what two cores can do: where a machine is planned to run, or somewhat below."""
READY_S, DONE_S, STOP_S = 60.0, 300.0, 20.0


class Spent:
    """CPU seconds that threads spend in calls of the log, outermost calls only, callbacks not counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here = threading.local()
        self.seconds = 0.0
        self.calls: dict[str, float] = {}

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        with self._switched(True, name):
            yield

    @contextmanager
    def outside(self) -> Iterator[None]:
        with self._switched(False, ""):
            yield

    @contextmanager
    def _switched(self, inside: bool, name: str) -> Iterator[None]:
        before, called = getattr(self._here, "inside", False), getattr(self._here, "name", "")
        self._charge(before, called)
        self._here.inside, self._here.name = inside, called if before and inside else name
        try:
            yield
        finally:
            self._charge(self._here.inside, self._here.name)
            self._here.inside, self._here.name = before, called

    def _charge(self, inside: bool, name: str) -> None:
        now = time.thread_time()
        since = getattr(self._here, "since", now)
        self._here.since = now
        if inside:
            with self._lock:
                self.seconds += now - since
                self.calls[name] = self.calls.get(name, 0.0) + now - since


class Timed:
    """A log, producer or consumer, every call of which is counted."""

    def __init__(self, inner: Any, spent: Spent) -> None:
        self._inner = inner
        self._spent = spent

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        @wraps(found)
        def call(*arguments: Any, **named: Any) -> Any:
            with self._spent.inside(name):
                return found(*arguments, **named)

        return call

    def read(self, *arguments: Any) -> Iterator[Any]:
        with self._spent.inside("read"):
            records = iter(self._inner.read(*arguments))
        while True:
            with self._spent.inside("read"):
                record = next(records, None)
            if record is None:
                return
            yield record

    def producer(self, *arguments: Any, **named: Any) -> "Timed":
        with self._spent.inside("producer"):
            return Timed(self._inner.producer(*arguments, **named), self._spent)

    def consumer(self, group: str, topics: Any, listener: Any, member: str) -> "Timed":
        with self._spent.inside("consumer"):
            inner = self._inner.consumer(group, topics, _Outside(listener, self._spent), member)
        return Timed(inner, self._spent)


class _Outside:
    """A listener whose work is its own, though the log calls it."""

    def __init__(self, listener: Any, spent: Spent) -> None:
        self._listener = listener
        self._spent = spent

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._listener, name)

        def call(*arguments: Any) -> Any:
            with self._spent.outside():
                return found(*arguments)

        return call


class Threads:
    """CPU seconds of Python threads by name, those that have ended included."""

    def __init__(self) -> None:
        self.ended: dict[str, float] = {}
        self._lock = threading.Lock()
        original = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

        def bootstrap(thread: threading.Thread) -> None:
            try:
                original(thread)
            finally:
                with self._lock:
                    name = _kind(thread)
                    self.ended[name] = self.ended.get(name, 0.0) + time.thread_time()

        threading.Thread._bootstrap_inner = bootstrap  # type: ignore[attr-defined]

    def seconds(self) -> dict[str, float]:
        """Return seconds so far by kind of thread; what is native code's own is in none of them."""
        alive = {thread.id: thread.user_time + thread.system_time for thread in psutil.Process().threads()}
        with self._lock:
            found = dict(self.ended)
        for thread in threading.enumerate():
            name = _kind(thread)
            found[name] = found.get(name, 0.0) + alive.get(thread.native_id or 0, 0.0)
        return found


def _kind(thread: threading.Thread) -> str:
    """Return `log` for threads that work for a log alone, else the thread's own name."""
    module = type(thread).__module__
    own = thread.name.startswith(("log ", "kafka", "lease")) or module.startswith("kafka")
    target = getattr(getattr(thread, "_target", None), "__module__", None) or ""
    return f"log: {thread.name}" if own or target.startswith("kafka") else thread.name


@dataclass(frozen=True, slots=True)
class Share:
    """CPU seconds of one run. `log`: calls and the log's own threads; `total`: process and decoders."""

    media_s: float
    wall_s: float
    total_cpu_s: float
    log_cpu_s: float
    broker_cpu_s: float
    share: float
    calls: dict[str, float]
    threads: dict[str, float]


def measure(
    config: Config,
    assembly: Assembly,
    clip: Path,
    times: int,
    paced: bool,
    broker_cpu: Callable[[], float],
    threads: Threads,
) -> Share:
    clock, spent = SystemClock(), Spent()
    plain = open_log(config, clock)
    plain.create_topics(topic_specs(config))
    log: Any = Timed(plain, spent)
    evidence = EvidenceStore(Path(config.data_dir) / "evidence", clock)
    worker = Worker(
        config,
        log,
        assembly.reader,
        lambda stream: StreamAggregate(stream, config, assembly.calibration, assembly.provenance, evidence),
        Publisher(config, assembly.provenance, clock),
        evidence,
        clock,
        Metrics(),
        "bench",
    )
    runner = threading.Thread(target=worker.run, name="unmask-detect", daemon=True)
    runner.start()
    if not worker.assigned_once.wait(READY_S):
        sys.exit(f"kafka.py: no partitions in {READY_S:g} s: {worker.error}")
    before, began = _all_cpu(), time.monotonic()
    broker, own, log_calls = broker_cpu(), threads.seconds(), spent.seconds
    streams = [f"feed-{number}" for number in range(FEEDS)]
    producer = log.producer("bench")  # one for all, as the feeds of a shard have
    feeders = [
        threading.Thread(
            target=_feed, args=(config, producer, clip, stream, times, paced), name=f"ingest {stream}"
        )
        for stream in streams
    ]
    for feeder in feeders:
        feeder.start()
    for feeder in feeders:
        feeder.join()
    producer.flush(DONE_S)
    producer.close(STOP_S)
    deadline = time.monotonic() + DONE_S
    while not _done(worker, streams):
        if worker.error is not None or time.monotonic() > deadline:
            sys.exit(f"kafka.py: not all was applied: {worker.error}")
        time.sleep(0.05)
    wall, total = time.monotonic() - began, _all_cpu() - before
    by_thread = {
        name: seconds - own.get(name, 0.0)
        for name, seconds in threads.seconds().items()
        if seconds - own.get(name, 0.0) > 0.001
    }
    of_threads = sum(seconds for name, seconds in by_thread.items() if name.startswith("log: "))
    log_cpu, of_broker = spent.seconds - log_calls + of_threads, broker_cpu() - broker
    worker.drain(Deadline(STOP_S, clock))
    runner.join(STOP_S)
    plain.close()
    media_s = times * CLIP_S * FEEDS
    return Share(media_s, wall, total, log_cpu, of_broker, log_cpu / total, dict(spent.calls), by_thread)


def _feed(config: Config, producer: Any, clip: Path, stream: str, times: int, paced: bool) -> None:
    """Do what ingest does with a feed: demultiplex, cut chunks, append; a new attachment each time."""
    clock, attachment, topic = SystemClock(), "", topic_name(config, Topic.MEDIA)
    partition = media_partition(stream, config.media.partitions)
    end_us = 0
    for number in range(times):
        attachment = new_attachment(clock.now_us(), attachment)
        chunker = Chunker(stream, attachment, Kind.FILE, config.media.chunk_ms, clock, end_us)
        started = time.monotonic()
        with av.open(str(clip)) as container:
            for packet in container.demux():
                if paced and packet.dts is not None:
                    due = started + float(packet.dts * packet.time_base)
                    time.sleep(max(0.0, due - time.monotonic()))
                _send(producer, topic, partition, chunker.push(packet))
        last = bench.ending(chunker) if number == times - 1 else chunker.flush()
        _send(producer, topic, partition, last)
        end_us = chunker.media_end_us


def _send(producer: Any, topic: str, partition: int, chunks: Any) -> None:
    for meta, value in chunks:
        producer.send(OutRecord(topic, meta.stream, value, encode_headers(meta), meta.capture_us, partition))


def _done(worker: Worker, streams: Sequence[str]) -> bool:
    ended = {status.stream for status in worker.statuses if status.ended and not status.in_hand}
    return ended >= set(streams)


def _all_cpu() -> float:
    """Return CPU seconds of this process and all its children, those that have ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        if "java" not in child.name():
            # Decoders are children of the process that forks them, and end before they are asked.
            total += times.user + times.system + times.children_user + times.children_system
    return total
