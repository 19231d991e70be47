"""Ingest: feeds in shards, a process for a handful, watched and restarted from outside (DESIGN 3.9).

Each feed (`stream.intake`) writes to `<prefix>.media`: chunks, and control records in order with them
(`stream.controls`). Every attach is a new attachment, whose first record is `start`; a `tick` comes each
`tick_s` whatever happens; losing a feed is told by a `gap` and by ticks with `video` false; a feed that is
over says `end`. A shard that is killed, or whose parent died, says nothing: to those who read the log its
feeds are then unwatched, and incidents stay open.

The parent talks to a shard over a socket pair: down goes a job, later `Stop`; up come `Report` and `Failure`.
Shards import no torch.
"""

import contextlib
import logging
import os
import random
import select
import signal
import subprocess
import sys
import threading
import zlib
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe
from typing import Any

from stream.attach import Attachment
from stream.backoff import Backoff
from stream.chunks import Chunk, split_parts
from stream.clock import Clock, Deadline, SystemClock
from stream.config import Config
from stream.controls import FeedPhase
from stream.errors import Code, UnmaskError
from stream.intake import FeedStatus, Intake, Last
from stream.log import Log, LogFactory, Producer, TopicPartition
from stream.records import Kind, OutRecord, Topic, encode_headers
from stream.redact import install_logging, redact
from stream.sources import Scheme, Source, from_entry
from stream.topics import topic_name

log = logging.getLogger(__name__)

LOOP_S = 0.05
"""A shard looks at its feeds this often when nothing wakes it: cheap, and far below every timeout."""
MAX_HUNG = 8
"""Readers blocked for good in one shard; beyond, only a new process gets their threads and sockets back."""
LEAVE_S = 1.0
"""What readers get to close their sources before a shard exits; blocked ones die with it."""
DRAIN_S = 5.0
"""What a shard gets to write its last records when its parent has gone."""
SHARD_SILENT_S = 30.0
"""A shard that reports nothing for this long is wedged: it reports every tick."""
ISOLATE_AFTER = 2
"""Restarts that a feed may cost its shard before it gets a process of its own."""
BLAME_S = 3600.0
"""Restarts older than this are forgotten."""
GIVE_UP_FILE_AFTER = 3
"""Restarts that a file may cost: each reads it again from its beginning, as a story of its own."""
AHEAD_RECORDS = 64
"""Chunks of a file ahead of their reader: half a minute of video, so that a live feed in the same partition
waits for no more. Commits come twice a second, so files can still be read at 60 times their speed."""
STOP_SHARE = 0.8
"""Of the time to stop, what a shard gets to write its ends; the rest is for its process to go."""
HEADER_ROOM = 64 * 1024
"""Of `max_message_bytes`, what headers may take: codec parameters with their extradata are the largest."""
FEW_ARENAS = {"MALLOC_ARENA_MAX": "2"}
"""Each reattach is a new thread and glibc gives it an arena: 240 of them grew 7 MiB, in two arenas 0.7."""
ENTRY = "from stream.ingest import shard_main; shard_main({fd})"


def media_partition(stream: str, partitions: int) -> int:
    """Return the partition of `media` that holds a stream; records name it, so no log need hash alike."""
    return zlib.crc32(stream.encode()) % partitions


@dataclass(frozen=True, slots=True)
class ShardJob:
    """All that a shard needs; crosses to the child by pickle, holds no credential (`Source.export`)."""

    name: str
    entries: tuple[Mapping[str, Any], ...]
    last: Mapping[str, Last]
    config: Config
    log_factory: LogFactory
    parent: int
    stdin_fd: int
    log_level: int
    seed: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Parent to shard: end your feeds within `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """Shard to parent, each tick."""

    feeds: tuple[FeedStatus, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """Shard to parent, before it exits by itself. `culprit`: the stream that made it, if known."""

    code: Code
    sentence: str
    culprit: str | None = None


class ReadAhead:
    """Keeps a file from flooding the log: counts what of it lies ahead of the reading group."""

    def __init__(self, log_: Log, group: str, partition: TopicPartition, limit: int) -> None:
        self._log = log_
        self._group = group
        self._partition = partition
        self._limit = limit
        self._sizes: deque[int] = deque()
        self._ahead = 0
        self._first = self._read_up_to()
        self._forgotten = 0

    def sent(self, size: int) -> None:
        self._sizes.append(size)
        self._ahead += size

    def room(self) -> int:
        """Return how many bytes may be written now; 0 or less: none."""
        if self._ahead >= self._limit // 2 or len(self._sizes) >= AHEAD_RECORDS // 2:
            self._forget_read()
        return self._limit - self._ahead if len(self._sizes) < AHEAD_RECORDS else 0

    def _forget_read(self) -> None:
        """Forget what must have been read by now.

        At most as many of our records are unread as the partition has unread ones in all; and at most as
        many are read as the group has advanced (what is on its way into the log is not counted in it yet).
        """
        read = self._read_up_to()
        unread = self._log.end_offset(self._partition) - read
        while len(self._sizes) > unread and self._forgotten < read - self._first:
            self._ahead -= self._sizes.popleft()
            self._forgotten += 1

    def _read_up_to(self) -> int:
        position = self._log.group_position(self._group, self._partition)
        return max(self._log.begin_offset(self._partition), position or 0)


class Shard:
    """The feeds of one process and the loop that looks after them."""

    def __init__(
        self,
        job: ShardJob,
        log_: Log,
        clock: Clock,
        channel: Connection,
        wake: threading.Event,
        stopping: threading.Event,
    ) -> None:
        self._job = job
        self._clock = clock
        self._channel = channel
        self._wake = wake
        self._stopping = stopping
        self._topic = topic_name(job.config, Topic.MEDIA)
        self._partitions = log_.partitions(self._topic)
        rng = random.Random(job.seed)
        sources = [from_entry(entry) for entry in job.entries]
        self._feeds = [self._intake(source, rng) for source in sources]
        self._ahead = {
            source.id: ReadAhead(
                log_,
                f"{job.config.prefix}-detect",
                TopicPartition(self._topic, media_partition(source.id, self._partitions)),
                job.config.ingest.file_ahead_bytes,
            )
            for source in sources
        }
        self._next_report = clock.monotonic()

    def run(self, producer: Producer) -> None:
        """Run until all feeds are over or somebody says stop. Raises `UnmaskError` if the log fails."""
        for feed in self._feeds:
            feed.start()
        while not all(feed.over for feed in self._feeds):
            if self._orphaned():
                self._leave(producer)
                return
            stop = self._command()
            if stop is not None:
                self._stop(producer, Deadline(stop.seconds, self._clock))
                return
            self._look(producer)
            self._wake.wait(LOOP_S)
            self._wake.clear()
        self._report(force=True)

    def _intake(self, source: Source, rng: random.Random) -> Intake:
        settings, stdin = self._job.config.ingest, self._job.stdin_fd
        return Intake(
            source,
            self._job.config,
            self._clock,
            rng,
            self._job.last.get(source.id, Last()),
            lambda given_up: Attachment(source, settings, given_up, stdin),
            self._wake.set,
        )

    def _look(self, producer: Producer) -> None:
        for feed in self._feeds:
            feed.step()
            self._send(feed, producer)
        self._report()
        self._check_hung()

    def _send(self, feed: Intake, producer: Producer, everything: bool = False) -> None:
        ahead = self._ahead[feed.source.id]
        limit = None
        if feed.kind is Kind.FILE and not everything:
            limit = ahead.room()
            if limit <= 0:
                return
        for chunk in feed.take(limit):
            for record in self._records(chunk):
                producer.send(record)
                if feed.kind is Kind.FILE:
                    ahead.sent(len(record.value or b""))

    def _records(self, chunk: Chunk) -> list[OutRecord]:
        limit = self._job.config.media.max_message_bytes - HEADER_ROOM
        partition = media_partition(chunk[0].stream, self._partitions)
        return [
            OutRecord(self._topic, meta.stream, value, encode_headers(meta), self._clock.now_us(), partition)
            for meta, value in split_parts(*chunk, max(1, limit))
        ]

    def _report(self, force: bool = False) -> None:
        now = self._clock.monotonic()
        if now < self._next_report and not force:
            return
        self._next_report = now + self._job.config.ingest.tick_s
        self._tell(Report(tuple(feed.status() for feed in self._feeds)))

    def _tell(self, message: Report | Failure) -> None:
        """Send unless the parent is too busy to read: a report missed costs nothing, a blocked loop all."""
        with contextlib.suppress(OSError):
            if select.select([], [self._channel], [], 0)[1]:
                self._channel.send(message)

    def _command(self) -> Stop | None:
        if self._stopping.is_set():
            return Stop(self._job.config.worker.shutdown_s)
        if not self._channel.poll():
            return None
        message = self._channel.recv()
        return message if isinstance(message, Stop) else None

    def _orphaned(self) -> bool:
        return os.getppid() != self._job.parent

    def _check_hung(self) -> None:
        counts = {feed.source.id: feed.hung for feed in self._feeds}
        total = sum(counts.values())
        if total <= MAX_HUNG:
            return
        culprit = max(counts, key=lambda name: counts[name])
        sentence = f"{total} readers hang, most of them of stream {culprit}; its process is replaced"
        self._tell(Failure(Code.STAGE_WEDGED, sentence, culprit))
        raise UnmaskError(Code.STAGE_WEDGED, sentence)

    def _stop(self, producer: Producer, deadline: Deadline) -> None:
        for feed in self._feeds:
            feed.stop()
            self._send(feed, producer, everything=True)
        producer.flush(deadline.left())
        self._report(force=True)
        self._join(deadline)

    def _leave(self, producer: Producer) -> None:
        log.warning("shard %s: parent has gone, leaving", self._job.name)
        for feed in self._feeds:
            feed.leave()
            self._send(feed, producer, everything=True)
        producer.flush(DRAIN_S)
        self._join(Deadline(LEAVE_S, self._clock))

    def _join(self, deadline: Deadline) -> None:
        until = Deadline(min(LEAVE_S, deadline.left()), self._clock)
        for feed in self._feeds:
            feed.join(until.left())


def run_shard(job: ShardJob, channel: Connection, stopping: threading.Event, wake: threading.Event) -> int:
    """Run a shard to its end and return its exit code: 0 when its feeds are over or it was told to stop."""
    clock = SystemClock()
    try:
        log_ = job.log_factory()
        try:
            with log_.producer(f"ingest-{job.name}") as producer:
                Shard(job, log_, clock, channel, wake, stopping).run(producer)
        finally:
            log_.close()
    except UnmaskError as error:
        log.error("shard %s: %s", job.name, error)
        with contextlib.suppress(OSError):
            channel.send(Failure(error.code, redact(str(error))))
        return 1
    except (EOFError, ConnectionError):
        log.warning("shard %s: parent has gone", job.name)
        return 1
    except Exception:
        # Logged here, where it is redacted; the interpreter would print it as it is.
        log.exception("shard %s failed", job.name)
        return 1
    return 0


def shard_main(fd: int) -> None:
    """Entry of the child process. `fd`: its end of the socket pair."""
    channel = Connection(fd)
    job: ShardJob = channel.recv()
    install_logging(job.log_level)
    stopping, wake = threading.Event(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    code = run_shard(job, channel, stopping, wake)
    logging.shutdown()
    # Readers blocked in FFmpeg must not hold up the end of the process.
    os._exit(code)


@dataclass(slots=True)
class _Child:
    """One shard as its parent sees it. `process` None: waiting for `start_at`, or done."""

    name: str
    sources: list[Source]
    backoff: Backoff
    start_at: float
    process: subprocess.Popen[bytes] | None = None
    channel: Connection | None = None
    heard_at: float = 0.0
    done: bool = False
    failure: Failure | None = None
    restarts: deque[float] = field(default_factory=deque)


class IngestSupervisor:
    """Runs feeds in shards and keeps them running. Call `poll` several times a second, from one thread."""

    def __init__(self, config: Config, log_factory: LogFactory, clock: Clock, rng: random.Random) -> None:
        self._config = config
        self._log_factory = log_factory
        self._clock = clock
        self._rng = rng
        self._children: list[_Child] = []
        self._feeds: dict[str, FeedStatus] = {}
        self._last: dict[str, Last] = {}
        self._blame: Counter[str] = Counter()
        self._blamed_at: deque[tuple[float, str]] = deque()
        self._stopped = False
        self.given_up: set[str] = set()
        """Files that killed their process too often; no `end` was written for them."""
        self.restarts = 0
        """Shards started again after they died or hung."""

    def start(self, sources: Sequence[Source], last: Mapping[str, Last] | None = None) -> None:
        """Start the shards of `sources`. `last`: where earlier runs left each stream, as far as known."""
        self._last |= last or {}
        for source in sources:
            source.export(os.environ)
        size = self._config.ingest.shard_size
        for number in range(0, len(sources), size):
            self._add(str(number // size), list(sources[number : number + size]))
        self.poll()

    def poll(self) -> None:
        """Take in reports, replace what died or hangs. Never blocks."""
        for child in list(self._children):
            self._listen(child)
            self._look_after(child)

    def statuses(self) -> dict[str, FeedStatus]:
        """Return the newest status of each feed that has reported, by stream id."""
        return dict(self._feeds)

    def finished(self) -> bool:
        """Whether every feed is over (only files and stdin ever are)."""
        return all(child.done for child in self._children)

    def failures(self) -> list[Failure]:
        """Return why shards last failed, of those that have not run since."""
        return [child.failure for child in self._children if child.failure is not None]

    def pids(self) -> list[int]:
        """Return the process ids of the shards that run."""
        return [child.process.pid for child in self._children if child.process is not None]

    def stop(self, deadline: Deadline) -> None:
        """End all feeds in order; what does not end within the deadline is killed."""
        self._stopped = True
        for child in self._children:
            if child.channel is not None:
                with contextlib.suppress(OSError):
                    child.channel.send(Stop(STOP_SHARE * deadline.left()))
        running = [child for child in self._children if child.process is not None]
        while running and not deadline.passed():
            for child in running:
                self._listen(child)
            running = [child for child in running if child.process and child.process.poll() is None]
            self._clock.sleep(min(LOOP_S, deadline.left()))
        for child in self._children:
            self._listen(child)
            self._bury(child, kill=True)

    def _add(self, name: str, sources: list[Source]) -> None:
        settings = self._config.ingest
        backoff = Backoff(
            settings.backoff_first_s, settings.backoff_max_s, settings.backoff_jitter, self._rng
        )
        self._children.append(_Child(name, sources, backoff, self._clock.monotonic()))

    def _look_after(self, child: _Child) -> None:
        if child.done or self._stopped:
            return
        now = self._clock.monotonic()
        if child.process is None:
            if now >= child.start_at:
                self._spawn(child)
            return
        code = child.process.poll()
        if code is None and now - child.heard_at > SHARD_SILENT_S:
            log.error("shard %s reports nothing for %.0f s, replaced", child.name, now - child.heard_at)
            self._lose(child)
        elif code is not None:
            self._listen(child)
            self._ended(child, code)

    def _ended(self, child: _Child, code: int) -> None:
        """Judge the end of a shard: done if all its feeds are."""
        if code == 0 and all(self._over(source.id) for source in child.sources):
            child.done = True
            self._bury(child)
            return
        log.error("shard %s ended with code %d, started again", child.name, code)
        self._lose(child)

    def _lose(self, child: _Child) -> None:
        """Bury a shard that failed its feeds; plan its successor, without the feeds that cost too much."""
        self._bury(child, kill=True)
        self.restarts += 1
        culprit = child.failure.culprit if child.failure is not None else None
        blamed = [source.id for source in child.sources if culprit in (None, source.id)]
        self._remember(blamed)
        # What is over stays over; a restart would read files again from the beginning.
        child.sources = [source for source in child.sources if not self._over(source.id)]
        sentence = (
            child.failure.sentence if child.failure is not None else "its process ended, a new one starts"
        )
        for source in list(child.sources):
            self._mark_lost(source.id, sentence)
            if source.kind is Kind.FILE and self._blame[source.id] >= GIVE_UP_FILE_AFTER:
                child.sources.remove(source)
                self._give_up(source.id)
        if len(child.sources) > 1:
            self._isolate(child)
        child.done = not child.sources
        child.start_at = self._clock.monotonic() + child.backoff.wait_s()

    def _over(self, stream: str) -> bool:
        """Whether the source came to its end. Stopped by anybody but us is not over: it goes on."""
        status = self._feeds.get(stream)
        return status is not None and status.phase is FeedPhase.ENDED

    def _remember(self, blamed: Sequence[str]) -> None:
        now = self._clock.monotonic()
        self._blamed_at.extend((now, stream) for stream in blamed)
        while now - self._blamed_at[0][0] > BLAME_S:
            self._blamed_at.popleft()
        self._blame = Counter(stream for _, stream in self._blamed_at)

    def _isolate(self, child: _Child) -> None:
        for source in list(child.sources):
            if self._blame[source.id] >= ISOLATE_AFTER and len(child.sources) > 1:
                child.sources.remove(source)
                self._add(source.id, [source])
                log.warning("stream %s gets a process of its own", source.id)

    def _mark_lost(self, stream: str, sentence: str) -> None:
        status = self._feeds.get(stream)
        if status is not None:
            code = Code.STAGE_WEDGED.value
            self._feeds[stream] = replace(
                status, phase=FeedPhase.BACKOFF, code=code, sentence=sentence, fps=0.0
            )

    def _give_up(self, stream: str) -> None:
        log.error("stream %s has ended its process %d times, given up", stream, GIVE_UP_FILE_AFTER)
        self.given_up.add(stream)
        sentence = f"reading it has ended its process {GIVE_UP_FILE_AFTER} times; it is not read any more"
        last = self._last.get(stream, Last())
        status = self._feeds.get(stream) or FeedStatus.unknown(stream, last)
        self._feeds[stream] = replace(
            status, phase=FeedPhase.ENDED, code=Code.SOURCE_INVALID.value, sentence=sentence, fps=0.0
        )

    def _spawn(self, child: _Child) -> None:
        ours, theirs = Pipe()
        stdin = 0 if any(source.scheme is Scheme.STDIN for source in child.sources) else None
        kept = os.dup(stdin) if stdin is not None else None
        try:
            child.process = subprocess.Popen(
                [sys.executable, "-P", "-c", ENTRY.format(fd=theirs.fileno())],
                stdin=subprocess.DEVNULL,
                # Ctrl-C in the terminal is for us alone; we end the shard in order.
                start_new_session=True,
                env=os.environ | FEW_ARENAS,
                pass_fds=[theirs.fileno()] if kept is None else [theirs.fileno(), kept],
            )
            ours.send(self._job(child, kept))
        finally:
            theirs.close()
            if kept is not None:
                os.close(kept)
        child.channel, child.heard_at, child.failure = ours, self._clock.monotonic(), None

    def _job(self, child: _Child, stdin_fd: int | None) -> ShardJob:
        return ShardJob(
            name=child.name,
            entries=tuple(source.entry() for source in child.sources),
            last={source.id: self._last.get(source.id, Last()) for source in child.sources},
            config=self._config,
            log_factory=self._log_factory,
            parent=os.getpid(),
            stdin_fd=-1 if stdin_fd is None else stdin_fd,
            log_level=logging.getLogger().getEffectiveLevel(),
            seed=self._rng.getrandbits(32),
        )

    def _listen(self, child: _Child) -> None:
        """Take in all that a shard has said."""
        with contextlib.suppress(EOFError, OSError):
            while child.channel is not None and child.channel.poll():
                message = child.channel.recv()
                child.heard_at = self._clock.monotonic()
                if isinstance(message, Failure):
                    child.failure = message
                if isinstance(message, Report):
                    self._take(child, message)

    def _take(self, child: _Child, report: Report) -> None:
        for status in report.feeds:
            self._feeds[status.stream] = status
            self._last[status.stream] = status.last

    def _bury(self, child: _Child, kill: bool = False) -> None:
        if child.process is not None:
            if kill and child.process.poll() is None:
                child.process.kill()
            child.process.wait()
        if child.channel is not None:
            child.channel.close()
        child.process = child.channel = None
