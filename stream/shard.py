"""A shard: the process of a handful of feeds, as it runs (DESIGN 3.9); `stream.ingest` is its parent.

They talk over a socket pair: down go a job, `Add`, `Remove`, `Keep` and `Stop`; up come `Report`, `Gone` and
`Failure`. Over a cluster a shard writes by way of a spool (`stream.relay`), and lets its feeds go when its
parent has been silent for as long as the group would wait. Shards import no torch.
"""

import contextlib
import logging
import os
import random
import select
import signal
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from stream.attach import Attachment
from stream.chunks import Chunk, split_parts
from stream.claims import CLAIM_S, RESERVE_US, Claim
from stream.clock import Clock, Deadline, SystemClock
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.intake import FeedStatus, Intake, Last
from stream.log import Log, LogFactory, Producer, TopicPartition
from stream.records import Kind, OutRecord, Topic, encode_headers
from stream.redact import install_logging, redact
from stream.relay import Far, Relay
from stream.sources import Source, from_entry
from stream.topics import media_partition, topic_name

log = logging.getLogger(__name__)

LOOP_S = 0.05
"""A shard looks at its feeds this often when nothing wakes it: cheap, and far below every timeout."""
MAX_HUNG = 8
"""Readers blocked for good in one shard; beyond, only a new process gets their threads and sockets back."""
LEAVE_S = 1.0
"""What readers get to close their sources before a shard exits; blocked ones die with it."""
DRAIN_S = 5.0
"""What a shard gets to write its last records when its parent has gone."""
AHEAD_RECORDS = 64
"""Chunks of a file ahead of their reader: half a minute of video, so that a live feed in the same partition
waits for no more. Commits come twice a second, so files can still be read at 60 times their speed."""
HEADER_ROOM = 64 * 1024
"""Of `max_message_bytes`, what headers may take: codec parameters with their extradata are the largest."""


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
    cluster: "Cluster | None" = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a shard of a group needs beside. `spool`: folder of its own; `member`: the process in the group.

    `lease_s`: a parent that is silent for so long has lost its feeds to another member.
    """

    spool: Path
    member: str
    lease_s: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Parent to shard: stop within `seconds`; `end`: nobody goes on with your feeds, say so."""

    seconds: float
    end: bool = True


@dataclass(frozen=True, slots=True)
class Add:
    """Parent to shard: take this feed, in place of one of the same id if you have it."""

    entry: Mapping[str, Any]
    last: Last


@dataclass(frozen=True, slots=True)
class Remove:
    """Parent to shard: let feeds go; `end`: for good."""

    streams: tuple[str, ...]
    end: bool


@dataclass(frozen=True, slots=True)
class Keep:
    """Parent to shard, each second: your feeds are still ours."""


@dataclass(frozen=True, slots=True)
class Gone:
    """Shard to parent: a feed is let go, and what it left is in the log or on disk."""

    stream: str
    last: Last


@dataclass(frozen=True, slots=True)
class Report:
    """Shard to parent, each tick. `spooled`: records that wait for the cluster; `dropped`: those lost."""

    feeds: tuple[FeedStatus, ...]
    spooled: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """Shard to parent, before it exits by itself. `culprit`: the stream that made it, if known."""

    code: Code
    sentence: str
    culprit: str | None = None


class Offsets(Protocol):
    """What `ReadAhead` asks the log."""

    def begin_offset(self, partition: TopicPartition) -> int: ...
    def end_offset(self, partition: TopicPartition) -> int: ...
    def group_position(self, group: str, partition: TopicPartition) -> int | None: ...


class ReadAhead:
    """Keeps a file from flooding the log: counts what of it lies ahead of the reading group."""

    def __init__(self, log_: Offsets, group: str, partition: TopicPartition, limit: int) -> None:
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
        out: "Log | Relay",
        clock: Clock,
        channel: Connection,
        wake: threading.Event,
        stopping: threading.Event,
    ) -> None:
        self._job = job
        self._out = out
        self._clock = clock
        self._channel = channel
        self._wake = wake
        self._stopping = stopping
        self._topic = topic_name(job.config, Topic.MEDIA)
        # A relay looks for the place itself: the cluster may be away.
        self._partitions = None if isinstance(out, Relay) else out.partitions(self._topic)
        self._rng = random.Random(job.seed)
        self._ahead: dict[str, ReadAhead] = {}
        self._claims: dict[str, tuple[Claim, float]] = {}
        self._feeds: list[Intake] = []
        for entry in job.entries:
            self._take_feed(from_entry(entry), job.last.get(entry["id"], Last()))
        self._next_report = self._heard_at = clock.monotonic()

    def run(self, producer: Producer) -> None:
        """Run until all feeds are over or somebody says stop. Raises `UnmaskError` if the log fails."""
        for feed in self._feeds:
            feed.start()
        while not self._over():
            if self._orphaned():
                log.warning("shard %s: parent has gone, leaving", self._job.name)
                self._leave(producer)
                return
            stop = self._command(producer)
            if stop is not None:
                self._stop(producer, stop)
                return
            if self._lease_over():
                self._leave(producer)
                sentence = "its parent stood still, feeds were let go"
                self._tell(Failure(Code.LOG_LEASE, sentence))
                return
            self._look(producer)
            self._wake.wait(LOOP_S)
            self._wake.clear()
        self._report(force=True)

    def _over(self) -> bool:
        drained = not isinstance(self._out, Relay) or self._out.drained
        return drained and all(feed.over for feed in self._feeds)

    def _take_feed(self, source: Source, last: Last) -> Intake:
        if isinstance(self._out, Relay):
            self._out.adopt(source.id, last.attachment)
        feed = self._intake(source, last)
        self._feeds.append(feed)
        return feed

    def _intake(self, source: Source, last: Last) -> Intake:
        settings, stdin = self._job.config.ingest, self._job.stdin_fd
        return Intake(
            source,
            self._job.config,
            self._clock,
            self._rng,
            last,
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
        limit = None
        if feed.kind is Kind.FILE and not everything:
            limit = self._room(feed.source.id)
            if limit <= 0:
                return
        for chunk in feed.take(limit):
            for record in self._records(chunk):
                producer.send(record)
                ahead = self._ahead.get(feed.source.id)
                if feed.kind is Kind.FILE and ahead is not None:
                    ahead.sent(len(record.value or b""))
        self._claim(feed, producer)

    def _room(self, stream: str) -> int:
        """Return how many bytes of a file may be written now: none until the log has told how far it is."""
        ahead = self._ahead.get(stream)
        if ahead is None:
            config, group = self._job.config, f"{self._job.config.prefix}-detect"
            count = self._partitions or config.media.partitions
            partition = TopicPartition(self._topic, media_partition(stream, count))
            offsets: Offsets
            if isinstance(self._out, Relay):
                offsets = self._out.offsets
                if not self._out.offsets.ask(group, partition):
                    return 0
            else:
                offsets = self._out
            ahead = ReadAhead(offsets, group, partition, config.ingest.file_ahead_bytes)
            self._ahead[stream] = ahead
        return ahead.room()

    def _records(self, chunk: Chunk) -> list[OutRecord]:
        limit = self._job.config.media.max_message_bytes - HEADER_ROOM
        partition = self._place(chunk[0].stream)
        return [
            OutRecord(self._topic, meta.stream, value, encode_headers(meta), self._clock.now_us(), partition)
            for meta, value in split_parts(*chunk, max(1, limit))
        ]

    def _place(self, stream: str) -> int | None:
        return None if self._partitions is None else media_partition(stream, self._partitions)

    def _claim(self, feed: Intake, producer: Producer, leaving: bool = False) -> None:
        """Write where the feed stands, when that is due: for whoever takes it up next."""
        stream, reached, now = feed.source.id, feed.reached(), self._clock.monotonic()
        written, at = self._claims.get(stream, (None, 0.0))
        over = feed.source.identity() if feed.finished else ""
        due = (
            written is None
            or leaving
            or written.attachment != reached.attachment
            or written.over != over
            or reached.media_end_us + RESERVE_US[feed.kind] // 10 > written.media_end_us
            or (feed.kind is Kind.LIVE and now - at >= CLAIM_S)
        )
        if not due:
            return
        ahead_us = 0 if leaving or over else RESERVE_US[feed.kind]
        begun_us = reached.media_end_us or self._clock.now_us()
        member = "" if self._job.cluster is None else self._job.cluster.member
        claim = Claim(reached.attachment, begun_us + ahead_us, member, over)
        self._claims[stream] = claim, now
        producer.send(claim.record(self._job.config, stream, self._place(stream), self._clock.now_us()))

    def _report(self, force: bool = False) -> None:
        now = self._clock.monotonic()
        if now < self._next_report and not force:
            return
        self._next_report = now + self._job.config.ingest.tick_s
        feeds = tuple(feed.status() for feed in self._feeds)
        if isinstance(self._out, Relay):
            self._tell(Report(feeds, self._out.spooled, self._out.dropped))
        else:
            self._tell(Report(feeds))

    def _tell(self, message: Report | Failure | Gone) -> None:
        """Send unless the parent is too busy to read: a report missed costs nothing, a blocked loop all."""
        with contextlib.suppress(OSError):
            if select.select([], [self._channel], [], 0)[1]:
                self._channel.send(message)

    def _command(self, producer: Producer) -> Stop | None:
        """Do what the parent says; return how to stop if that is it."""
        if self._stopping.is_set():
            # Whoever sends the signal to each process: a service's feeds are for another member.
            return Stop(self._job.config.worker.shutdown_s, end=self._job.cluster is None)
        while self._channel.poll():
            message = self._channel.recv()
            self._heard_at = self._clock.monotonic()
            match message:
                case Stop():
                    return message
                case Add():
                    self._add(message, producer)
                case Remove():
                    self._remove(message, producer)
        return None

    def _add(self, order: Add, producer: Producer) -> None:
        source, last = from_entry(order.entry), order.last
        for left in self._let_go([source.id], producer, end=False).values():
            last = Last(max(last.attachment, left.attachment), max(last.media_end_us, left.media_end_us))
        self._take_feed(source, last).start()

    def _remove(self, order: Remove, producer: Producer) -> None:
        left = self._let_go(order.streams, producer, order.end)
        self._flush(producer, DRAIN_S)
        for stream in order.streams:
            self._tell(Gone(stream, left.get(stream, Last())))

    def _let_go(self, streams: Collection[str], producer: Producer, end: bool) -> dict[str, Last]:
        """Let those of `streams` go that are here; return where each of them stands."""
        going = [feed for feed in self._feeds if feed.source.id in streams]
        for feed in going:
            if end:
                feed.stop()
            else:
                feed.leave()
            self._send(feed, producer, everything=True)
            self._claim(feed, producer, leaving=True)
            self._feeds.remove(feed)
            self._ahead.pop(feed.source.id, None)
            self._claims.pop(feed.source.id, None)
        self._wait_for(going, Deadline(LEAVE_S, self._clock))
        return {feed.source.id: feed.reached() for feed in going}

    def _flush(self, producer: Producer, seconds: float) -> None:
        try:
            producer.flush(seconds)
        except UnmaskError as error:
            if error.code is not Code.LOG_AWAY:
                raise
            # Neither cluster nor disk: the other feeds are not to suffer for it.
            log.error("shard %s: %s", self._job.name, error)

    def _lease_over(self) -> bool:
        cluster = self._job.cluster
        return cluster is not None and self._clock.monotonic() - self._heard_at > cluster.lease_s

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

    def _stop(self, producer: Producer, stop: Stop) -> None:
        deadline = Deadline(stop.seconds, self._clock)
        if not stop.end:
            self._leave(producer)
            return
        for feed in self._feeds:
            feed.stop()
            self._send(feed, producer, everything=True)
            self._claim(feed, producer, leaving=True)
        self._flush(producer, deadline.left())
        self._report(force=True)
        self._join(deadline)

    def _leave(self, producer: Producer) -> None:
        for feed in self._feeds:
            feed.leave()
            self._send(feed, producer, everything=True)
            self._claim(feed, producer, leaving=True)
        self._flush(producer, DRAIN_S)
        self._report(force=True)
        self._join(Deadline(LEAVE_S, self._clock))

    def _join(self, deadline: Deadline) -> None:
        self._wait_for(self._feeds, Deadline(min(LEAVE_S, deadline.left()), self._clock))

    def _wait_for(self, feeds: Sequence[Intake], deadline: Deadline) -> None:
        for feed in feeds:
            feed.join(deadline.left())


def run_shard(job: ShardJob, channel: Connection, stopping: threading.Event, wake: threading.Event) -> int:
    """Run a shard to its end and return its exit code: 0 when its feeds are over or it was told to stop."""
    clock = SystemClock()
    try:
        if job.cluster is not None:
            _run_with_spool(job, job.cluster, clock, channel, wake, stopping)
        else:
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


def _run_with_spool(
    job: ShardJob,
    cluster: Cluster,
    clock: Clock,
    channel: Connection,
    wake: threading.Event,
    stopping: threading.Event,
) -> None:
    from stream.cluster import open_cluster

    def reach() -> tuple[Log, Far]:
        log_ = open_cluster(job.config)
        try:
            return log_, log_.producer(f"ingest-{cluster.member}-{job.name}", insistent=True)
        except BaseException:
            log_.close()
            raise

    limit = job.config.ingest.spool_max_bytes
    with Relay(job.config, cluster.spool, cluster.member, reach, clock, limit) as relay:
        Shard(job, relay, clock, channel, wake, stopping).run(relay)


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
