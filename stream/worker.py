"""Detect: follows partitions of `media`, decodes, reads faces, aggregates, commits (DESIGN 3.3, 3.9).

One thread (`Worker.run`) polls the log, feeds the decoders, aggregates and commits; one owns the device
(`stream.device`); decoders are child processes. They meet in bounded queues only, and polling never waits
for decoding or inference: a full queue pauses the partition.
"""

import json
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from stream.aggregate import Output, StreamAggregate
from stream.alerts import Publisher
from stream.bursts import BurstBudget
from stream.chunks import Chunk
from stream.clips import cut_clip
from stream.clock import Clock, Deadline
from stream.config import Config
from stream.deadletter import dead_letters
from stream.decoders import DecoderPool
from stream.device import Device, Reader, Result, Skipped
from stream.errors import Code, UnmaskError
from stream.evidence import EvidenceStore, references
from stream.feeds import TOLD, Feed, FeedEvent
from stream.frames import Applied, DecoderEvent, Dropped, Failed, SampledFrame, ScoredFrame
from stream.incidents import ClipRequest, IncidentEvent, Moment
from stream.ingest import media_partition
from stream.log import Log, PositionError, TopicPartition
from stream.metrics import Metrics
from stream.positions import Positions
from stream.records import SCHEMA, Kind, OutRecord, Record, Topic, decode_headers, new_attachment
from stream.states import POSITION_KEY, read_states
from stream.topics import topic_name

logger = logging.getLogger(__name__)

POLL_RECORDS = 64
"""Records a turn: 32 s of one feed's chunks, far above what a turn of 20 ms receives."""

BACKLOG_PAUSE, BACKLOG_RESUME = 16, 4
"""Records of one stream that wait for its decoder before its partition is paused, and resumed."""

FRAMES_AT_ONCE = 4
"""Pictures the device takes at once; with `faces.max_faces` in each that is two batches of crops."""

IDLE_WAIT_S = 0.02
"""How long a turn waits for the log when nothing else is to be done: adds at most this to the latency."""


DRAIN_STEP_S = 0.005
"""Pause between looks while partitions are handed over."""

MAINTAIN_S = 5.0
"""Between passes of retention: the log may outgrow its bounds by what arrives in so much time."""

SOURCES_S = 5.0
"""Between looks at which streams are listed: short against `incidents.orphan_s`, which it adds to."""

SWEEP_S = 600.0
"""Between sweeps of the evidence store; reading all alerts for references costs a second at most."""

STATUS_S = 0.2
"""Between snapshots for tables: as often as an eye can follow."""

CLIP_SUFFIXES = {"video/mp4": ".mp4", "video/webm": ".webm", "video/x-matroska": ".mkv"}


class State(StrEnum):
    """Life of a worker. Legal: NEW -> RUNNING -> DRAINING -> STOPPED, and RUNNING or DRAINING -> FAILED."""

    NEW = "new"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


AggregateFactory = Callable[[str], StreamAggregate]
"""Makes the aggregate of a stream that has no state yet."""


@dataclass(slots=True)
class _Feed:
    """What the worker keeps of one stream beside its aggregate."""

    partition: TopicPartition
    aggregate: StreamAggregate
    heard: float
    """When the newest record came, on the monotonic clock."""
    backlog: deque[Record] = field(default_factory=deque)
    in_hand: int = 0
    """Records taken from the log and not yet applied."""
    open: bool = False
    """A decoder is open for it."""
    over: bool = False
    """Its newest record was an `end`."""
    dirty: bool = False
    """State changed since the last commit."""
    fps: float = 0.0
    frames: int = 0
    faces: int = 0
    start_us: int | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """One stream as it stands, for tables and dashboards.

    Times in UTC microseconds; `frames` counts sampled frames scored since this worker took the stream,
    `faces` are those in the newest; `in_hand` records wait to be applied.
    """

    stream: str
    media_us: int
    start_us: int | None
    frames: int
    faces: int
    verdict: str
    reasons: tuple[str, ...]
    incident: str | None
    ended: str | None
    in_hand: int


class Worker:
    """One member of the detect group.

    `run` is the loop and must be called in one thread only; `drain`, `state`, `healthy` may be called from
    others. A worker that fails says why in `error` and leaves the group without committing.
    """

    def __init__(
        self,
        config: Config,
        log: Log,
        reader: Reader,
        make_aggregate: AggregateFactory,
        publisher: Publisher,
        evidence: EvidenceStore,
        clock: Clock,
        metrics: Metrics,
        member: str = "detect",
    ) -> None:
        self._config = config
        self._log = log
        self._make_aggregate = make_aggregate
        self._publisher = publisher
        self._evidence = evidence
        self._clock = clock
        self._metrics = metrics
        self._member = member
        self._device = Device(reader, 1 if config.deterministic else FRAMES_AT_ONCE, clock)
        self._pool = DecoderPool(config.decode, clock)
        self._bursts = BurstBudget(config.sampling.burst_budget, clock)
        self._positions = Positions()
        self._feeds: dict[str, _Feed] = {}
        self._outputs: list[tuple[TopicPartition, OutRecord]] = []
        """What waits for the next transaction, with the partition it came of: lost with it, never without."""
        self._urgent = False
        self._waiting_since: list[int] = []
        """Receipt times behind the events that wait for the next transaction."""
        self._sources: set[str] = set()
        self._unheard: dict[str, float] = {}
        """Since when each listed stream is known of which no record ever came."""
        self._events: deque[DecoderEvent] = deque()
        """What a poll of the decoders brought and the device had no room for; a new poll waits for it."""
        self._full: set[TopicPartition] = set()
        """Partitions that are not read on for now: one of their streams has enough waiting."""
        self._behind: dict[TopicPartition, float] = {}
        """When such a partition last moved on."""
        self._more = False
        """Whether the last poll left records for the next."""
        self._refused_since: float | None = None
        """Since when the log has taken no commit."""
        self._last_commit = self._maintained = self._swept = self._shown = self._sources_read = 0.0
        self._drain = threading.Event()
        self._deadline: Deadline | None = None
        self._close_incidents = False
        self.statuses: tuple[Status, ...] = ()
        self.assigned_once = threading.Event()
        """Set when the group first gave us partitions."""
        self.state = State.NEW
        self.error: BaseException | None = None
        self.turn_at = clock.monotonic()

    def run(self) -> None:
        """Work until drained or failed; leaves the group at the end either way."""
        self.state = State.RUNNING
        try:
            self._consumer = self._log.consumer(
                f"{self._config.prefix}-detect", [self._topic(Topic.MEDIA)], self, self._member
            )
            self._device.start()
            try:
                self._work()
            finally:
                self._close()
        except BaseException as error:
            self._fail(error)
            raise
        self.state = State.STOPPED

    def _work(self) -> None:
        try:
            while not self._finished():
                self._turn()
        except BaseException as error:
            # Before the group is left: a worker that failed commits nothing on its way out.
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            logger.error("detect worker failed: %s", error)
        self.error, self.state = self.error or error, State.FAILED

    def drain(self, deadline: Deadline, close_incidents: bool = False) -> None:
        """Finish what is in hand, commit, and end `run`, within `deadline`.

        Incidents stay open, for another worker to go on with, unless `close_incidents`: the stop of `watch`.
        """
        self._deadline, self._close_incidents = deadline, close_incidents
        self._drain.set()

    def healthy(self) -> bool:
        """Return whether every stage that has work also gives output (DESIGN 3.9)."""
        limit = self._config.worker.stall_s
        stalled = self._clock.monotonic() - self.turn_at > limit
        return self.error is None and not stalled and self._device.stalled_for() <= limit

    def _finished(self) -> bool:
        if not self._drain.is_set():
            return False
        # One turn more at least: the last records may have been written since the last poll.
        polled, self.state = self.state is State.DRAINING, State.DRAINING
        assert self._deadline is not None
        return self._deadline.passed() or (polled and not (self._in_hand() or self._device.pending()))

    def _in_hand(self) -> bool:
        return any(feed.in_hand or feed.backlog for feed in self._feeds.values())

    def _turn(self) -> None:
        self.turn_at = self._clock.monotonic()
        self._check_device()
        busy = self._decoded() | self._scored()
        if self._refused_since is None:
            self._poll(0.0 if busy else IDLE_WAIT_S)
        else:  # nothing more comes in until what waits for the log is written
            self._clock.sleep(IDLE_WAIT_S)
        self._submit()
        self._check_heard()
        self._commit_if_due()
        self._keep_house()
        self._show()

    def _check_device(self) -> None:
        if self._device.error is not None:
            raise UnmaskError(Code.STAGE_WEDGED, f"the device thread died: {self._device.error}")
        if self._device.stalled_for() > self._config.worker.stall_s:
            raise UnmaskError(
                Code.STAGE_WEDGED, "the device has work and gives no output; restart the worker"
            )

    def _keep_house(self) -> None:
        """Apply retention to the log and the evidence store."""
        now = self._clock.monotonic()
        try:
            if now - self._sources_read >= SOURCES_S:
                self._read_sources()
            if now - self._maintained >= MAINTAIN_S:
                self._maintained = now
                self._maintain()
            # Only who holds the partitions knows which pictures are about to be named.
            if now - self._swept >= SWEEP_S and self._consumer.assignment():
                self._swept = now
                self._sweep()
        except (UnmaskError, OSError) as error:
            logger.warning("housekeeping failed, trying again: %s", error)

    def _maintain(self) -> None:
        unread = sum(self._log.maintain().unread.values())
        if unread:
            logger.error("retention deleted %d records that were not read yet", unread)
            self._metrics.unread_removed.inc(unread)
        for stream in [name for name, feed in self._feeds.items() if self._forgettable(name, feed)]:
            feed = self._feeds.pop(stream)
            self._outputs.append((feed.partition, self._state(feed.partition.partition, stream, None)))

    def _forgettable(self, stream: str, feed: _Feed) -> bool:
        """Whether a feed ended so long ago that none of its records, and no media time, can come again."""
        if stream in self._sources or not feed.over or feed.in_hand or feed.backlog or feed.dirty:
            return False
        aggregate = feed.aggregate
        if aggregate.open_incident is not None or aggregate.media_us > self._clock.now_us():
            return False
        return aggregate.applied < self._log.begin_offset(feed.partition)

    def _sweep(self) -> None:
        pinned = {ref for feed in self._feeds.values() for ref in feed.aggregate.references()}
        swept = self._evidence.sweep(self._config.evidence, pinned, pinned | self._named())
        self._metrics.evidence_bytes.set(swept.kept_bytes)

    def _named(self) -> set[str]:
        """Return the evidence that events still held by the log name."""
        topic, named = self._topic(Topic.ALERTS), set[str]()
        for number in range(self._log.partitions(topic)):
            partition = TopicPartition(topic, number)
            for record in self._log.read(partition, self._log.begin_offset(partition)):
                named |= references(json.loads(record.value or b"null"))
        return named

    def _show(self) -> None:
        now = self._clock.monotonic()
        if now - self._shown < STATUS_S:
            return
        self._shown = now
        self._metrics.decoders = self._pool.stats()
        self.statuses = tuple(_status(stream, feed) for stream, feed in self._feeds.items())

    # From the log to the decoders

    def _poll(self, timeout: float) -> None:
        try:
            records = self._consumer.poll(POLL_RECORDS, timeout)
        except PositionError as error:
            logger.error("position lost: %s", error)
            self._metrics.position_errors.inc()
            self._positions.skip(error.partition, error.resume_at)
            self._consumer.seek(error.partition, error.resume_at)
            return
        self._more = len(records) >= POLL_RECORDS
        for record in records:
            self._take(record)

    def _take(self, record: Record) -> None:
        """Queue a record for its stream's decoder, unless it was applied before or is not ours to read."""
        partition = TopicPartition(record.topic, record.partition)
        self._positions.taken(partition, record.offset)
        try:
            feed = self._feed_of(record, partition)
        except UnmaskError as error:
            if not self._positions.settled(partition, record.offset):
                self._metrics.dead_letters.labels(error.code.value).inc()
                self._put_letters(partition, [record], error.code, str(error))
            self._positions.applied(partition, record.offset)
            return
        below = feed.aggregate.applied + 1 if feed.over else feed.aggregate.decode_from
        if record.offset < below:
            self._positions.applied(partition, record.offset)
            return
        feed.heard = self._clock.monotonic()
        feed.backlog.append(record)
        if len(feed.backlog) >= BACKLOG_PAUSE:
            self._consumer.pause([partition])

    def _feed_of(self, record: Record, partition: TopicPartition) -> _Feed:
        """Return the feed of a record. Raises `UnmaskError` if the record is not ours to read."""
        stream = record.key
        feed = self._feeds.get(stream)
        if feed is None and not self._listed(stream):
            raise UnmaskError(Code.CHUNK_INVALID, f"stream {stream[:80]!r} is not in sources")
        decode_headers(stream, record.headers)
        if feed is None:
            feed = self._feeds[stream] = self._new_feed(stream, partition)
        if feed.partition != partition:
            raise UnmaskError(
                Code.CHUNK_INVALID,
                f"stream {stream} is in partition {feed.partition.partition}; a record of it in partition "
                f"{partition.partition} has no place in its order",
            )
        return feed

    def _new_feed(self, stream: str, partition: TopicPartition) -> _Feed:
        return _Feed(partition, self._make_aggregate(stream), self._clock.monotonic())

    def _submit(self) -> None:
        """Hand what waits to the decoders, and let partitions go on whose streams have caught up."""
        full: set[TopicPartition] = set()
        for stream, feed in self._feeds.items():
            self._submit_feed(stream, feed)
            if len(feed.backlog) > BACKLOG_RESUME:
                full.add(feed.partition)
        ready = self._consumer.assignment() - full
        if ready:
            self._consumer.resume(ready)
        self._full = full

    def _submit_feed(self, stream: str, feed: _Feed) -> None:
        while feed.backlog:
            if not feed.open:
                feed.fps = self._fps(feed)
                self._pool.open(stream, feed.aggregate.resume, feed.fps)
                feed.open, feed.over = True, False
            if not self._pool.submit(feed.backlog[0]):
                return
            feed.backlog.popleft()
            feed.in_hand += 1

    def _listed(self, stream: str) -> bool:
        if self._config.media.accept_unlisted or stream in self._sources:
            return True
        self._read_sources()
        return stream in self._sources

    def _read_sources(self) -> None:
        """Read the topic `sources` whole: its positions mean nothing (DESIGN 3.9)."""
        self._sources_read = self._clock.monotonic()
        topic = self._topic(Topic.SOURCES)
        for number in range(self._log.partitions(topic)):
            partition = TopicPartition(topic, number)
            for record in self._log.read(partition, self._log.begin_offset(partition)):
                if record.value is None:
                    self._sources.discard(record.key)
                else:
                    self._sources.add(record.key)
        unheard = self._sources - self._feeds.keys()
        self._unheard = {stream: self._unheard.get(stream, self._sources_read) for stream in unheard}

    # From the decoders through the device to the aggregates

    def _decoded(self) -> bool:
        if not self._events:
            self._events.extend(self._pool.poll(0.0))
        busy = False
        while self._events and self._device.room():
            self._offer(self._events.popleft())
            busy = True
        return busy

    def _offer(self, event: DecoderEvent) -> None:
        if not isinstance(event, SampledFrame):
            self._device.offer(event, late=False)
            return
        late = self._is_late(event)
        if late and self._config.freshness.on_late == "skip":
            event.release()
            self._device.offer(Skipped(event, _stale(event)), late=True)
        else:
            self._device.offer(event, late)

    def _is_late(self, frame: SampledFrame) -> bool:
        if frame.meta.kind is Kind.FILE:
            return False
        age_s = (self._clock.now_us() - frame.meta.capture_us) / 1e6
        return age_s > self._config.freshness.max_staleness_s

    def _scored(self) -> bool:
        results = self._device.take()
        for result in results:
            if isinstance(result, ScoredFrame) and self._in_burst(result.stream):
                self._bursts.spend(self._device.seconds_per_frame)
            self._apply(result)
        return bool(results)

    def _in_burst(self, stream: str) -> bool:
        feed = self._feeds.get(stream)
        return feed is not None and feed.aggregate.live and feed.fps > self._config.sampling.idle_fps

    def _apply(self, result: Result) -> None:
        stream = _stream_of(result)
        feed = self._feeds.get(stream) if stream is not None else None
        if feed is None:
            return
        if isinstance(result, ScoredFrame):
            self._apply_frame(feed, result)
        elif isinstance(result, Skipped):
            self._metrics.drops.labels(result.dropped.reason).inc()
            self._tell(feed, feed.aggregate.on_skipped(result.frame, result.dropped))
        else:
            self._apply_record(stream or "", feed, result)
        feed.dirty = True
        fps = self._fps(feed)
        if feed.open and fps != feed.fps:
            feed.fps = fps
            self._pool.set_fps(stream or "", fps)

    def _fps(self, feed: _Feed) -> float:
        """Return the sampling rate a stream gets: a burst only while bursts keep within their budget."""
        wanted, idle = feed.aggregate.wanted_fps(), self._config.sampling.idle_fps
        if wanted <= idle or not feed.aggregate.live or self._bursts.allows():
            return wanted
        self._metrics.bursts_refused.inc()
        return idle

    def _apply_frame(self, feed: _Feed, frame: ScoredFrame) -> None:
        feed.frames += 1
        feed.faces = len(frame.faces)
        feed.start_us = frame.media_us if feed.start_us is None else feed.start_us
        self._metrics.frames.labels("scored").inc()
        self._metrics.faces.inc(len(frame.faces))
        self._metrics.newest_media.labels("score").set(frame.media_us / 1e6)
        if feed.aggregate.live and not frame.late:
            self._metrics.latency.observe(max(0.0, (self._clock.now_us() - frame.capture_us) / 1e6))
        failed = feed.aggregate.pictures_failed
        self._tell(feed, feed.aggregate.on_frame(frame))
        self._metrics.pictures_failed.inc(feed.aggregate.pictures_failed - failed)

    def _apply_record(self, stream: str, feed: _Feed, result: Applied | Failed) -> None:
        feed.in_hand -= 1
        warming_up = result.offset <= feed.aggregate.applied
        if isinstance(result, Failed):
            if not warming_up:
                self._dead_letter(feed.partition, stream, result)
            self._tell(feed, feed.aggregate.on_failed(result))
        else:
            self._count(result)
            self._tell(feed, feed.aggregate.on_applied(result))
            feed.over = feed.aggregate.over
            self._note_up(stream, feed)
        self._positions.applied(feed.partition, result.offset)
        if feed.partition in self._full:
            self._behind[feed.partition] = self._clock.monotonic()
        if feed.over and feed.in_hand == 0 and not feed.backlog:
            self._pool.close(stream)
            feed.open = False

    def _note_up(self, stream: str, feed: _Feed) -> None:
        if feed.aggregate.live:
            self._metrics.stream_up.labels(stream).set(feed.aggregate.feed is Feed.UP)

    def _count(self, applied: Applied) -> None:
        self._metrics.records.labels("applied").inc()
        self._metrics.frames.labels("decoded").inc(applied.decoded)
        self._metrics.frames.labels("warmup").inc(applied.warmup)
        for dropped in applied.dropped:
            self._metrics.drops.labels(dropped.reason).inc(dropped.frames or 1)

    def _tell(self, feed: _Feed, outputs: Iterable[Output]) -> None:
        """Queue what an aggregate says for the next transaction; an event makes that one urgent."""
        for output in outputs:
            if isinstance(output, ClipRequest):
                self._tell(feed, feed.aggregate.on_clip(output.incident, self._cut(feed, output)))
                continue
            self._outputs.append((feed.partition, self._publisher.record(output)))
            if isinstance(output, IncidentEvent | FeedEvent):
                self._urgent = True
                self._waiting_since += [capture for capture in [output.moment.capture_us] if capture]
                self._metrics.events.labels(type(output).__name__).inc()

    def _cut(self, feed: _Feed, request: ClipRequest) -> str | None:
        """Cut the clip of an incident out of the log and store it; None if the media is not there."""
        if request.from_offset is None:
            return None
        try:
            clip = cut_clip(
                self._chunks(feed.partition, request.stream, request.from_offset, request.to_offset),
                request.first_us,
                request.last_us,
                request.peak_us,
            )
            return self._evidence.put(clip.value, CLIP_SUFFIXES[clip.content_type])
        except Exception as error:  # chunks are strangers' bytes: the clip may fail, the watching must not
            logger.warning("%s: no clip of incident %s: %s", request.stream, request.incident, error)
            self._metrics.clips_failed.inc()
            return None

    def _chunks(self, partition: TopicPartition, stream: str, start: int, stop: int) -> Iterator[Chunk]:
        for record in self._records_of(partition, stream, start, stop):
            yield decode_headers(stream, record.headers), record.value or b""

    def _records_of(self, partition: TopicPartition, stream: str, start: int, stop: int) -> Iterator[Record]:
        begin = max(start, self._log.begin_offset(partition))
        return (record for record in self._log.read(partition, begin, stop) if record.key == stream)

    def _dead_letter(self, partition: TopicPartition, stream: str, failed: Failed) -> None:
        logger.warning("%s: record %s dead-lettered: %s", stream, failed.offset, failed.sentence)
        self._metrics.dead_letters.labels(failed.code.value).inc()
        try:
            records = list(self._records_of(partition, stream, failed.decode_from, failed.offset + 1))
        except UnmaskError as error:
            logger.warning("%s: records before %d are lost: %s", stream, failed.offset, error)
            return
        self._put_letters(partition, records, failed.code, failed.sentence)

    def _put_letters(
        self, partition: TopicPartition, records: Iterable[Record], code: Code, sentence: str
    ) -> None:
        topic = self._topic(Topic.DEADLETTER)
        letters = dead_letters(topic, records, code, sentence, self._clock.now_us())
        self._outputs += [(partition, letter) for letter in letters]

    def _check_heard(self) -> None:
        """Say so when nobody writes a feed's records any more; a closed decoder or a file needs no writer."""
        if self._more:
            return  # behind, after a suspension say: absent is what the end of the log does not show
        now, orphan_s = self._clock.monotonic(), self._config.incidents.orphan_s
        for stream, feed in self._feeds.items():
            # What was not read yet is not absent, as long as reading goes on.
            heard = max(feed.heard, self._behind.get(feed.partition, feed.heard))
            if feed.over or now - heard < orphan_s:
                continue
            outputs = feed.aggregate.on_orphan()
            feed.dirty |= bool(outputs)
            self._tell(feed, outputs)
            self._note_up(stream, feed)
        for stream, since in self._unheard.items():
            if now - since >= orphan_s and stream not in self._feeds:
                self._unheard[stream] = math.inf
                self._tell_unheard(stream)

    def _tell_unheard(self, stream: str) -> None:
        """Tell of a listed stream that nobody ever wrote a record of: there is no feed to do it."""
        partition = TopicPartition(
            self._topic(Topic.MEDIA), media_partition(stream, self._config.media.partitions)
        )
        if partition not in self._consumer.assignment():
            return
        now_us = self._clock.now_us()
        # There is no attachment yet; a name of its own keeps the event's id from ever coming twice.
        moment = Moment(now_us, new_attachment(now_us), epoch=0, capture_us=None)
        sentence = f"listed, and no record for {self._config.incidents.orphan_s:g} s: nobody is watching it"
        event = FeedEvent(stream, TOLD[Feed.UNWATCHED], 1, moment, "orphan", sentence)
        self._outputs.append((partition, self._publisher.record(event)))
        self._urgent = True
        self._metrics.events.labels(type(event).__name__).inc()
        self._metrics.stream_up.labels(stream).set(0)

    # Commit

    def _commit_if_due(self) -> None:
        due = self._clock.monotonic() - self._last_commit >= self._config.log.commit_ms / 1000
        if not due and (not self._urgent or self._refused_since is not None):
            return
        try:
            self._commit()
        except UnmaskError as error:
            self._bear(error)
        else:
            self._refused_since = None

    def _bear(self, error: UnmaskError) -> None:
        """Keep what the log would not take, to try again; raise `error` after `stall_s` of that."""
        now = self._clock.monotonic()
        self._refused_since = now if self._refused_since is None else self._refused_since
        lasts = now - self._refused_since > self._config.worker.stall_s
        if lasts or error.code not in (Code.LOG_FULL, Code.LOG_UNUSABLE):
            raise error
        logger.warning("nothing committed, trying again: %s", error)
        self._metrics.commits_refused.inc()

    def _commit(self) -> None:
        """Write outputs, states and positions in one transaction."""
        self._last_commit = self._clock.monotonic()
        positions = self._positions.movable()
        dirty = [(stream, feed) for stream, feed in self._feeds.items() if feed.dirty]
        if not (self._outputs or positions or dirty):
            return
        outputs = [record for _, record in self._outputs]
        outputs += [self._state_record(stream, feed) for stream, feed in dirty]
        outputs += [self._position_record(partition, offset) for partition, offset in positions.items()]
        try:
            self._consumer.commit(outputs, positions)
        except UnmaskError as error:
            if error.code is not Code.LOG_FENCED:
                raise
            # Nothing was written; the next poll tells what is lost, and another member goes on with it.
            logger.error("fenced: %s", error)
            return
        self._positions.committed(positions)
        now_us = self._clock.now_us()
        for capture_us in self._waiting_since:
            self._metrics.alert_latency.observe(max(0.0, (now_us - capture_us) / 1e6))
        self._waiting_since = []
        self._outputs, self._urgent = [], False
        for _, feed in dirty:
            feed.dirty = False
        self._metrics.commits.inc()

    def _state_record(self, stream: str, feed: _Feed) -> OutRecord:
        value = json.dumps(feed.aggregate.state(), separators=(",", ":")).encode()
        return self._state(feed.partition.partition, stream, value)

    def _position_record(self, partition: TopicPartition, offset: int) -> OutRecord:
        return self._state(partition.partition, POSITION_KEY, str(offset).encode())

    def _state(self, partition: int, key: str, value: bytes | None) -> OutRecord:
        return OutRecord(
            topic=self._topic(Topic.STATE),
            key=key,
            value=value,
            headers={"schema": str(SCHEMA).encode()},
            timestamp_us=self._clock.now_us(),
            partition=partition,
        )

    # Assignment

    def assigned(self, partitions: Collection[TopicPartition]) -> None:
        """Take partitions over: states first, then read from the smallest live `decode_from`."""
        self._read_sources()
        for partition in partitions:
            begin = self._log.begin_offset(partition)
            start = position = self._position(partition, begin)
            states = TopicPartition(self._topic(Topic.STATE), partition.partition)
            for stream, state in read_states(self._log, states).items():
                feed = self._feeds[stream] = self._new_feed(stream, partition)
                feed.aggregate.restore(state)
                feed.over = feed.aggregate.over
                # Of a feed that broke off so long ago there is nothing left to go on from.
                if not feed.over and feed.aggregate.decode_from >= begin:
                    start = min(start, feed.aggregate.decode_from)
                request = feed.aggregate.due_clip()
                if request is not None:
                    self._tell(feed, [request])
            self._positions.assign(partition, position)
            self._consumer.seek(partition, max(begin, start))
        self.assigned_once.set()

    def _position(self, partition: TopicPartition, begin: int) -> int:
        """Return the next record to apply; what retention took before it was read is told, not jumped."""
        committed = self._consumer.committed(partition)
        if committed is None or committed >= begin:
            return begin if committed is None else committed
        logger.error("%s: records %d to %d went before they were read", partition, committed, begin - 1)
        self._metrics.position_errors.inc()
        return begin

    def revoked(self, partitions: Collection[TopicPartition]) -> None:
        """Finish what is in hand, commit, and let go; a worker that failed commits nothing."""
        if self.error is None:
            deadline = self._deadline or Deadline(self._config.worker.shutdown_s, self._clock)
            while self._busy(partitions) and not deadline.passed():
                self._decoded()
                self._scored()
                self._clock.sleep(DRAIN_STEP_S)
            if self._close_incidents:
                self._stop_incidents()
            self._commit()
        self._shown = 0.0
        self._show()
        self.lost(partitions)

    def _stop_incidents(self) -> None:
        for feed in self._feeds.values():
            outputs = feed.aggregate.stop()
            feed.dirty |= bool(outputs)
            self._tell(feed, outputs)

    def _busy(self, partitions: Collection[TopicPartition]) -> bool:
        return any(feed.in_hand for feed in self._feeds.values() if feed.partition in partitions)

    def lost(self, partitions: Collection[TopicPartition]) -> None:
        """Forget partitions without writing anything."""
        for stream in [name for name, feed in self._feeds.items() if feed.partition in partitions]:
            if self._feeds.pop(stream).open:
                self._pool.close(stream)
        self._forget_events()
        self._empty_device()
        self._outputs = [item for item in self._outputs if item[0] not in partitions]
        self._unheard.clear()
        for partition in partitions:
            self._positions.forget(partition)

    def _empty_device(self) -> None:
        """Let the device finish what it holds: it must not meet the state of a later assignment.

        What belongs to feeds that are gone is passed over, as `_apply` does; the rest is applied.
        """
        deadline = Deadline(self._config.worker.stall_s, self._clock)
        while self._device.pending() and self._device.error is None and not deadline.passed():
            self._scored()
            self._clock.sleep(DRAIN_STEP_S)

    def _forget_events(self) -> None:
        """Drop what decoders brought of feeds that are gone."""
        kept: deque[DecoderEvent] = deque()
        for event in self._events:
            if event.meta is not None and event.meta.stream in self._feeds:
                kept.append(event)
            elif isinstance(event, SampledFrame):
                event.release()
        self._events = kept

    def _close(self) -> None:
        deadline = self._deadline or Deadline(self._config.worker.shutdown_s, self._clock)
        try:
            self._consumer.close(deadline.left())
        finally:
            self._device.stop(deadline.left())
            self._pool.shutdown(deadline)

    def _topic(self, topic: Topic) -> str:
        return topic_name(self._config, topic)


def _stream_of(result: Result) -> str | None:
    """Return the stream that a result belongs to; a record whose headers could not be read has none."""
    if isinstance(result, ScoredFrame):
        return result.stream
    if isinstance(result, Skipped):
        return result.frame.meta.stream
    return result.meta.stream if result.meta is not None else None


def _stale(frame: SampledFrame) -> Dropped:
    return Dropped(frame.media_us, frame.media_us, "STALE", 1)


def _status(stream: str, feed: _Feed) -> Status:
    judgement = feed.aggregate.judgement
    return Status(
        stream=stream,
        media_us=feed.aggregate.media_us,
        start_us=feed.start_us,
        frames=feed.frames,
        faces=feed.faces,
        verdict=judgement.verdict.value,
        reasons=tuple(reason.value for reason in judgement.reasons),
        incident=feed.aggregate.open_incident,
        ended=feed.aggregate.resume.attachment if feed.over else None,
        in_hand=feed.in_hand + len(feed.backlog),
    )
