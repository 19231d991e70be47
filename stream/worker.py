"""Detect: follows partitions of `media`, decodes, reads faces, aggregates, commits (DESIGN 3.3, 3.9).

One thread (`Worker.run`) polls the log, feeds the decoders, aggregates and commits; one owns the device
(`stream.device`); decoders are child processes. They meet in bounded queues only, and polling never waits
for decoding or inference: a full queue pauses the partition. A thread more cuts clips (`stream.clipping`).

A log that is away (LOG_AWAY) is borne for ever: nothing more is taken in, what waits is kept and tried again,
and no absence is taken for silence meanwhile.
"""

import json
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from stream.aggregate import Output, StreamAggregate
from stream.alerts import Publisher
from stream.bursts import FULL_FPS, BurstBudget
from stream.canary import canary_aggregate, canary_id, canary_record
from stream.cascade import Cascade, Heavy
from stream.clipping import Clipper, Cut, readable
from stream.clips import SUFFIXES, Clip
from stream.clock import Clock, Deadline
from stream.config import Config
from stream.controls import Retract, from_body
from stream.deadletter import dead_letters, newest
from stream.decode import NO_BURST, Burst
from stream.decoders import DecoderPool
from stream.device import Device, Reader, Result, Skipped
from stream.errors import Code, UnmaskError
from stream.evidence import EvidenceStore, references
from stream.feeds import TOLD, Feed, FeedEvent
from stream.foreign import Segment, is_foreign, read_headers
from stream.frames import (
    Applied,
    DecoderEvent,
    Dropped,
    Failed,
    FollowedFrame,
    HeardSound,
    SampledFrame,
    ScoredFrame,
    Use,
)
from stream.glimpses import Glimpses, glimpse_record
from stream.held import Held, Letter, Status, Takeover, status
from stream.incidents import ClipRequest, EventKind, IncidentEvent, Moment
from stream.listed import Listed
from stream.log import Log, PositionError, TopicPartition, everything
from stream.metrics import Metrics
from stream.outbox import Outbox
from stream.positions import Positions
from stream.pulse import Pulse, WatchedLog
from stream.records import (
    SCHEMA,
    ChunkMeta,
    Control,
    Kind,
    OutRecord,
    Record,
    Topic,
    is_canary,
    is_replay,
    new_attachment,
    split_stream_id,
)
from stream.scores import ScoreRecord
from stream.states import POSITION_KEY, read_agreeing
from stream.topics import media_partition, topic_name
from stream.vigil import Vigil

if TYPE_CHECKING:
    from detectors.cues.follow import Follower

logger = logging.getLogger(__name__)

POLL_RECORDS = 64
"""Records a turn: 32 s of one feed's chunks, far above what a turn of 20 ms receives."""

BACKLOG_PAUSE, BACKLOG_RESUME = 16, 4
"""Records of one stream that wait for its decoder before its partition is paused, and resumed."""

FRAMES_AT_ONCE = 4
"""Pictures the device takes at once; with `faces.max_faces` in each that is two batches of crops."""

IDLE_WAIT_S = 0.02
"""How long a turn waits for the log when nothing else is to be done: adds at most this to the latency."""

AWAY_LOOK_S = 1.0
"""Between looks whether a log that is away is back, if nothing else asks it."""

AWAY_WAIT_S = 0.2
"""How long a turn waits after the log said that it is away: its own tries take long enough."""

DRAIN_STEP_S = 0.005
"""Pause between looks while partitions are handed over."""

FLUSH_S = 1.0
"""Longest wait, on handing partitions over, for what is in hand: whoever takes them decodes the rest again,
and their streams stand still meanwhile."""

CLIP_SHARE = 0.8
"""Of what is left when `watch` stops, for the clips of open incidents; the rest is for the last commit."""

SESSION_SHARE = 0.5
"""Of `kafka.session_s`, what handing over takes at most: a member that takes longer is taken for dead."""

MAINTAIN_S = 5.0
"""Between passes of retention: the log may outgrow its bounds by what arrives in so much time."""

SOURCES_S = 5.0
"""Between looks at which streams are listed: short against `incidents.orphan_s`, which it adds to. Also how
soon an idle worker learns that the log is away."""

SWEEP_S = 600.0
"""Between sweeps of the evidence store; reading all alerts for references costs a second at most."""

STATUS_S = 0.2
"""Between snapshots for tables: as often as an eye can follow."""


RETRACT = Control.RETRACT.value.encode()
"""Control of records that belong to no attachment, and to no decoder."""

LOG_CODES = frozenset({Code.LOG_AWAY, Code.LOG_FULL, Code.LOG_POSITION, Code.LOG_UNUSABLE})
"""What is wrong with the log, and not with the record that it was asked about."""


class State(StrEnum):
    """Life of a worker. Legal: NEW -> RUNNING -> DRAINING -> STOPPED, and RUNNING or DRAINING -> FAILED."""

    NEW = "new"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


AggregateFactory = Callable[[str], StreamAggregate]
"""Makes the aggregate of a stream that has no state yet."""


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
        alone: bool = True,
        heavy: Heavy | None = None,
        follower: "Follower | None" = None,
    ) -> None:
        """`alone`: no other worker's events name the evidence in this store, so what none names can go.
        `heavy` reads faces of suspect streams more deeply; `follower` looks at bursts for the cues."""
        self._config = config
        self._pulse = Pulse(clock)
        self._media = self._topic(Topic.MEDIA)
        self._joined = log
        self._log = WatchedLog(log, self._pulse)
        self._alone = alone
        self._make_aggregate = make_aggregate
        self._publisher = publisher
        self._evidence = evidence
        self._clock = clock
        self._metrics = metrics
        self._member = member
        self._cascade = Cascade(heavy, config.members.heavy_budget, clock) if heavy is not None else None
        at_once = 1 if config.deterministic else FRAMES_AT_ONCE
        glimpses = Glimpses(config.web.picture_every_s, clock)
        self._device: Device[Held] = Device(reader, at_once, clock, self._cascade, follower, glimpses)
        self._burst = Burst(FULL_FPS, follower.hears) if follower is not None else NO_BURST
        self._pool = DecoderPool(config.decode, clock)
        self._clipper: Clipper[Held] = Clipper(log, config.decode, clock)
        self._bursts = BurstBudget(config.sampling.burst_budget, clock)
        self._positions = Positions()
        self._feeds: dict[str, Held] = {}
        self._outbox = Outbox()
        self._letters: deque[Letter] = deque()
        self._sources = Listed(self._log, self._topic(Topic.SOURCES), clock)
        self._unheard: dict[str, float] = {}
        """Since when each listed stream of our partitions is known of which no record ever came."""
        self._heeded: tuple[int, frozenset[TopicPartition]] | None = None
        """The version of the list, and the partitions, that `_unheard` and sampling rates follow."""
        self._events: deque[DecoderEvent] = deque()
        """What a poll of the decoders brought and the device had no room for; a new poll waits for it."""
        self._vigil = Vigil(self._log, self._positions, config.incidents.orphan_s, clock, metrics)
        self._refused_since: float | None = None
        """Since when the log has taken no commit."""
        self._polled_at = self._last_commit = self._maintained = self._swept = self._shown = 0.0
        self._drain = threading.Event()
        self._deadline: Deadline | None = None
        self._clips_until: Deadline | None = None
        self._close_incidents = False
        self.statuses: tuple[Status, ...] = ()
        self.assigned_once = threading.Event()
        """Set when the group first gave us partitions."""
        self.state = State.NEW
        self.error: BaseException | None = None

    def run(self) -> None:
        """Work until drained or failed; leaves the group at the end either way."""
        self.state = State.RUNNING
        try:
            with self._pulse.log():
                self._consumer = self._joined.consumer(
                    f"{self._config.prefix}-detect", [self._topic(Topic.MEDIA)], self, self._member
                )
            self._device.start()
            try:
                self._work()
            finally:
                self._close()
        except BaseException as error:
            self.fail(error)
            raise
        self.state = State.STOPPED

    def _work(self) -> None:
        try:
            while not self._finished():
                self._turn()
        except BaseException as error:
            # Before the group is left: a worker that failed commits nothing on its way out.
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Note that the worker is not to be trusted any more: it commits nothing and leaves the group."""
        if self.error is None:
            logger.error("detect worker failed: %s", error)
        self.error, self.state = self.error or error, State.FAILED

    def drain(self, deadline: Deadline, close_incidents: bool = False) -> None:
        """Commit what is done and end `run`, within `deadline`: other workers go on with the rest.

        `close_incidents`, the stop of `watch`: there are no others, so everything is read to the end first.
        """
        self._deadline, self._close_incidents = deadline, close_incidents
        self._clips_until = Deadline(deadline.left() / 2, self._clock)
        self._drain.set()

    def healthy(self) -> bool:
        """Return whether every stage that has work also gives output (DESIGN 3.9)."""
        limit = self._config.worker.stall_s
        if self.error is not None or self._pulse.still(limit) or self._clipper.stuck():
            return False
        return self._device.stalled_for() <= limit

    def ready(self) -> bool:
        """Return whether it does its part: in the group, and the log answers."""
        return self.state is State.RUNNING and not self._vigil.away and self.healthy()

    def _finished(self) -> bool:
        if not self._drain.is_set():
            return False
        if not self._close_incidents:
            self.state = State.DRAINING
            # Streams go on meanwhile: a clip that is nearly done need not be cut again by the next owner.
            return not self._clips_awaited()
        # One turn more at least: the last records may have been written since the last poll.
        polled, self.state = self.state is State.DRAINING, State.DRAINING
        assert self._deadline is not None
        waits = self._in_hand() or self._device.pending() or self._clips_awaited()
        return self._deadline.passed() or (polled and not waits)

    def _clips_awaited(self) -> bool:
        return self._clipper.busy() and self._clips_until is not None and not self._clips_until.passed()

    def _in_hand(self) -> bool:
        return any(feed.in_hand or feed.backlog for feed in self._feeds.values())

    def _turn(self) -> None:
        self._pulse.beat()
        self._check_device()
        busy = self._decoded() | self._scored() | self._clipped()
        self._poll_if_due(busy)
        self._submit()
        self._ask_clips()
        self._check_heard()
        self._commit_if_due()
        self._keep_house()
        self._show()

    def _poll_if_due(self, busy: bool) -> None:
        """Poll, but no more often than an idle worker: it costs as much as applying a frame."""
        now = self._clock.monotonic()
        if busy and self.state is State.RUNNING and now - self._polled_at < IDLE_WAIT_S:
            return
        self._polled_at = now
        self._poll(0.0 if busy else IDLE_WAIT_S)

    def _check_device(self) -> None:
        if self.error is not None:
            raise self.error
        if self._device.error is not None:
            raise UnmaskError(Code.STAGE_WEDGED, f"the device thread died: {self._device.error}")
        if self._device.stalled_for() > self._config.worker.stall_s:
            raise UnmaskError(
                Code.STAGE_WEDGED, "the device has work and gives no output; restart the worker"
            )

    def _keep_house(self) -> None:
        """Follow the list of streams; apply retention to the log, the states and the evidence store."""
        now = self._clock.monotonic()
        try:
            if now - self._sources.read_at >= (AWAY_LOOK_S if self._vigil.away else SOURCES_S):
                self._sources.read()
                self._heed_sources()
                self._vigil.note_back()
            if now - self._maintained >= MAINTAIN_S:
                self._maintained = now
                self._maintain()
                self._forget_ended()
            # Only who holds the partitions knows which pictures are about to be named.
            if now - self._swept >= SWEEP_S and self._consumer.assignment():
                self._swept = now
                self._sweep()
        except (UnmaskError, OSError) as error:
            if isinstance(error, UnmaskError) and error.code is Code.LOG_AWAY:
                self._vigil.note_away(error)
            else:
                logger.warning("housekeeping failed, trying again: %s", error)

    def _maintain(self) -> None:
        unread = sum(self._log.maintain().unread.values())
        if unread:
            logger.error("retention deleted %d records that were not read yet", unread)
            self._metrics.unread_removed.inc(unread)

    def _forget_ended(self) -> None:
        begins: dict[TopicPartition, int] = {}
        for stream in [name for name, feed in self._feeds.items() if self._forgettable(name, feed, begins)]:
            feed = self._feeds.pop(stream)
            self._outbox.add(feed.partition, self._state(feed.partition.partition, stream, None))

    def _forgettable(self, stream: str, feed: Held, begins: dict[TopicPartition, int]) -> bool:
        """Whether a feed ended so long ago that none of its records, and no media time, can come again.

        A replay need not wait for that: the next one begins a story of its own.
        """
        if stream in self._sources or not feed.over or feed.in_hand or feed.backlog or feed.dirty:
            return False
        if feed.clip is not None:
            return False
        aggregate = feed.aggregate
        if is_replay(stream):
            return self._positions.settled(feed.partition, aggregate.applied)
        if aggregate.open_incident is not None or aggregate.media_us > self._clock.now_us():
            return False
        if feed.partition not in begins:
            begins[feed.partition] = self._log.begin_offset(feed.partition)
        return aggregate.applied < begins[feed.partition]

    def _sweep(self) -> None:
        pinned = {ref for feed in self._feeds.values() for ref in feed.aggregate.references()}
        named = pinned | self._named() if self._alone else None
        swept = self._evidence.sweep(self._config.evidence, pinned, named)
        self._metrics.evidence_bytes.set(swept.kept_bytes)

    def _named(self) -> set[str]:
        """Return the evidence that events still held by the log name."""
        named = set[str]()
        for record in everything(self._log, self._topic(Topic.ALERTS)):
            named |= references(json.loads(record.value or b"null"))
        return named

    def _show(self) -> None:
        now = self._clock.monotonic()
        if now - self._shown < STATUS_S:
            return
        self._shown = now
        self._metrics.decoders = self._pool.stats()
        self._metrics.drift = {stream: feed.aggregate.drift for stream, feed in self._feeds.items()}
        if self._cascade is not None:
            self._metrics.heavy = {what.value: count for what, count in self._cascade.pictures.items()}
        self._metrics.partitions.set(len(self._consumer.assignment()))
        self._metrics.clips_waiting.set(sum(feed.clip is not None for feed in self._feeds.values()))
        self.statuses = tuple(status(stream, feed) for stream, feed in self._feeds.items() if not feed.canary)

    # From the log to the decoders

    def _poll(self, timeout: float) -> None:
        if self._refused_since is not None:  # nothing more comes in until what waits for the log is written
            self._consumer.pause(self._positions.partitions())
        try:
            with self._pulse.log():
                records = self._consumer.poll(POLL_RECORDS, timeout)
        except PositionError as error:
            logger.error("position lost: %s", error)
            self._metrics.position_errors.inc()
            self._positions.skip(error.partition, error.resume_at)
            self._consumer.seek(error.partition, error.resume_at)
        except UnmaskError as error:
            self._wait_for_log(error)
        else:
            self._take_all(records)

    def _take_all(self, records: Sequence[Record]) -> None:
        for index, record in enumerate(records):
            try:
                self._take(record)
            except UnmaskError as error:
                for again in reversed(records[index:]):
                    self._consumer.seek(TopicPartition(again.topic, again.partition), again.offset)
                self._wait_for_log(error)
                return

    def _wait_for_log(self, error: UnmaskError) -> None:
        """Bear that the log is away; raise any other `error`."""
        if error.code is not Code.LOG_AWAY:
            raise error
        self._vigil.note_away(error)
        self._clock.sleep(AWAY_WAIT_S)

    def _take(self, record: Record) -> None:
        """Queue a record for its stream's decoder, unless it was applied before or is not ours to read.

        Raises `UnmaskError`, and has done nothing, if the log cannot say which.
        """
        partition = TopicPartition(record.topic, record.partition)
        settled = self._positions.settled(partition, record.offset)
        if record.headers.get("control") == RETRACT:
            self._positions.taken(partition, record.offset)
            if not settled:
                self._retract(record, partition)
            self._positions.applied(partition, record.offset)
            return
        if settled and record.key not in self._feeds:  # of a stream whose state was forgotten since
            return
        try:
            feed = self._feed_of(record, partition)
        except UnmaskError as error:
            if error.code in LOG_CODES:
                raise
            self._positions.taken(partition, record.offset)
            if not settled:
                self._metrics.dead_letters.labels(error.code.value).inc()
                self._put_letters(partition, [record], 0, error.code, str(error))
            self._positions.applied(partition, record.offset)
            return
        self._positions.taken(partition, record.offset)
        below = feed.aggregate.applied + 1 if feed.over else feed.aggregate.decode_from
        if feed.canary and settled:
            below = record.offset + 1
        if record.offset < below:
            self._positions.applied(partition, record.offset)
            return
        feed.heard = self._clock.monotonic()
        feed.backlog.append(record)
        if len(feed.backlog) >= BACKLOG_PAUSE:
            self._consumer.pause([partition])

    def _retract(self, record: Record, partition: TopicPartition) -> None:
        """Withdraw an incident; one that its stream does not remember is no longer ours to withdraw."""
        feed = self._feeds.get(record.key)
        try:
            asked = from_body(Retract, record.value or b"")
            if feed is None or feed.partition != partition:
                raise UnmaskError(Code.CHUNK_INVALID, f"no stream {record.key[:80]!r} is watched here")
            told = feed.aggregate.retract(asked.incident, asked.reason)
        except (UnmaskError, ValueError) as error:
            logger.warning("a retraction cannot be applied: %s", error)
            self._metrics.retractions.labels("refused").inc()
            self._put_letters(partition, [record], 0, Code.CHUNK_INVALID, str(error))
            return
        self._metrics.retractions.labels("applied" if told else "unknown").inc()
        logger.info("%s: retraction of incident %s: %d events", record.key, asked.incident, len(told))
        self._tell(feed, told)
        feed.dirty = not feed.canary

    def _feed_of(self, record: Record, partition: TopicPartition) -> Held:
        """Return the feed of a record. Raises `UnmaskError` if the record is not ours to read."""
        stream = record.key
        feed = self._feeds.get(stream)
        if feed is None:
            self._check_listed(stream, partition)
        read = read_headers(stream, record.headers)
        place = media_partition(stream, self._config.media.partitions)
        if isinstance(read, Segment) and place != record.partition:
            # Else two workers could each hold a part of the stream.
            raise UnmaskError(
                Code.CHUNK_INVALID,
                f"record of stream {stream} is in partition {record.partition}; its place is {place}, "
                f"the CRC-32 of the key modulo {self._config.media.partitions}",
            )
        if feed is None:
            feed = self._feeds[stream] = self._new_feed(stream, partition)
        if feed.partition != partition:
            raise UnmaskError(
                Code.CHUNK_INVALID,
                f"stream {stream} is in partition {feed.partition.partition}; a record of it in partition "
                f"{partition.partition} has no place in its order",
            )
        return feed

    def _new_feed(self, stream: str, partition: TopicPartition) -> Held:
        heard = self._clock.monotonic()
        if is_canary(stream):
            return Held(partition, canary_aggregate(stream), heard, canary=True)
        feed = Held(partition, self._make_aggregate(stream), heard)
        feed.aggregate.set_idle_fps(self._idle_fps(stream))
        return feed

    def _idle_fps(self, stream: str) -> float:
        return self._sources.fps(split_stream_id(stream)[0]) or self._config.sampling.idle_fps

    def _submit(self) -> None:
        """Hand what waits to the decoders, and let partitions go on whose streams have caught up."""
        full: set[TopicPartition] = set()
        for stream, feed in self._feeds.items():
            self._submit_feed(stream, feed)
            if len(feed.backlog) > BACKLOG_RESUME:
                full.add(feed.partition)
        ready = self._positions.partitions() - full
        if ready and self._refused_since is None:
            self._consumer.resume(ready)

    def _submit_feed(self, stream: str, feed: Held) -> None:
        while feed.backlog and not self._holds(feed):
            if is_foreign(feed.backlog[0].headers):
                feed.aggregate.expect_foreign()
            if not feed.open:
                feed.fps = self._fps(feed)
                self._pool.open(stream, feed.aggregate.resume, feed.fps, feed.aggregate.place)
                feed.open, feed.over = True, False
            if not self._pool.submit(feed.backlog[0]):
                return
            feed.backlog.popleft()
            feed.in_hand += 1

    def _check_listed(self, stream: str, partition: TopicPartition) -> None:
        """Raise `UnmaskError` (CHUNK_INVALID) if nobody asked for the stream to be watched."""
        if is_canary(stream):
            if stream != canary_id(partition.partition):
                raise UnmaskError(
                    Code.CHUNK_INVALID,
                    f"{stream} is in partition {partition.partition}; its place is the one in its name",
                )
            return
        base, _ = split_stream_id(stream)
        if not self._config.media.accept_unlisted and not self._sources.look_for(base):
            raise UnmaskError(Code.CHUNK_INVALID, f"stream {stream[:80]!r} is not in sources")

    def _heed_sources(self) -> None:
        """Follow a list, or partitions, that changed: who should be heard, and how often is looked."""
        now = self._clock.monotonic()
        heeded = self._sources.version, self._positions.partitions()
        if heeded == self._heeded:
            return
        self._heeded = heeded
        mine = {name for name in self._sources if self._partition_of(name) in heeded[1]}
        self._unheard = {name: self._unheard.get(name, now) for name in mine - self._feeds.keys()}
        for stream, feed in self._feeds.items():
            if not feed.canary:
                feed.aggregate.set_idle_fps(self._idle_fps(stream))

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
        feed = self._feeds.get(event.meta.stream) if event.meta is not None else None
        if feed is None:  # events of feeds that went were forgotten with them
            return
        if not isinstance(event, SampledFrame):
            self._device.offer(event, False, feed)
            return
        late = self._is_late(event)
        if event.use is Use.FOLLOWED:
            self._offer_followed(event, late, feed)
        elif late and self._config.freshness.on_late == "skip":
            event.release()
            self._device.offer(Skipped(event, _stale(event)), True, feed)
        else:
            self._device.offer(event, late, feed, not feed.canary and feed.aggregate.suspect)

    def _offer_followed(self, frame: SampledFrame, late: bool, feed: Held) -> None:
        """Hand on a picture that only cues see, unless the stream is behind: they are not worth a delay."""
        if late:
            frame.release()
            self._metrics.frames.labels("burst dropped").inc()
            return
        self._metrics.frames.labels("burst").inc()
        self._device.offer(frame, False, feed)

    def _is_late(self, frame: SampledFrame) -> bool:
        if frame.meta.kind is Kind.FILE:
            return False
        age_s = (self._clock.now_us() - frame.meta.capture_us) / 1e6
        return age_s > self._config.freshness.max_staleness_s

    def _scored(self) -> bool:
        results = self._device.take()
        for feed, result in results:
            stream = _stream_of(result)
            if self._feeds.get(stream) is not feed:
                continue  # it is another worker's by now, or was and is ours anew
            if isinstance(result, ScoredFrame) and self._in_burst(feed):
                self._bursts.spend(self._device.seconds_per_frame)
            if isinstance(result, FollowedFrame | HeardSound) and feed.aggregate.live:
                self._bursts.spend(result.seconds)
            if self._holds(feed):
                feed.held.append(result)
            else:
                self._apply(stream, feed, result)
        return bool(results)

    def _in_burst(self, feed: Held) -> bool:
        return feed.aggregate.live and feed.fps > feed.aggregate.idle_fps

    def _apply(self, stream: str, feed: Held, result: Result) -> None:
        if isinstance(result, ScoredFrame):
            self._apply_frame(feed, result)
        elif isinstance(result, Skipped):
            self._metrics.drops.labels(result.dropped.reason).inc()
            self._tell(feed, feed.aggregate.on_skipped(result.frame, result.dropped))
        elif isinstance(result, FollowedFrame):
            passed_over = feed.aggregate.looks_passed_over
            feed.aggregate.on_followed(result)
            self._metrics.looks_passed_over.inc(feed.aggregate.looks_passed_over - passed_over)
        elif isinstance(result, HeardSound):
            feed.aggregate.on_heard(result)
        else:
            self._apply_record(stream, feed, result)
        feed.dirty = not feed.canary
        fps = self._fps(feed)
        if feed.open and fps != feed.fps:
            feed.fps = fps
            self._pool.set_fps(stream, fps)
        self._steer_burst(stream, feed)

    def _steer_burst(self, stream: str, feed: Held) -> None:
        """Begin or end a burst at full rate as its stream wants and the budget allows."""
        if self._burst is NO_BURST or feed.canary:
            return
        wanted = feed.aggregate.step_burst(not feed.aggregate.live or self._bursts.allows())
        if feed.open:
            self._pool.set_burst(stream, self._burst if wanted else NO_BURST)

    def _fps(self, feed: Held) -> float:
        """Return the sampling rate a stream gets: a burst only while bursts keep within their budget."""
        wanted, idle = feed.aggregate.wanted_fps(), feed.aggregate.idle_fps
        if wanted <= idle or not feed.aggregate.live or self._bursts.allows():
            return wanted
        self._metrics.bursts_refused.inc()
        return idle

    def _apply_frame(self, feed: Held, frame: ScoredFrame) -> None:
        feed.frames += 1
        feed.faces = len(frame.faces)
        feed.start_us = frame.media_us if feed.start_us is None else feed.start_us
        if feed.canary:
            self._tell(feed, feed.aggregate.on_frame(frame))
            return
        self._metrics.frames.labels("scored").inc()
        self._metrics.faces.inc(len(frame.faces))
        self._metrics.newest_media.labels("score").set(frame.media_us / 1e6)
        if feed.aggregate.live and not frame.late:
            self._metrics.latency.observe(max(0.0, (self._clock.now_us() - frame.capture_us) / 1e6))
        failed = feed.aggregate.pictures_failed
        self._tell(feed, feed.aggregate.on_frame(frame))
        self._metrics.pictures_failed.inc(feed.aggregate.pictures_failed - failed)

    def _apply_record(self, stream: str, feed: Held, result: Applied | Failed) -> None:
        feed.in_hand -= 1
        warming_up = result.offset <= feed.aggregate.applied
        if isinstance(result, Failed):
            if not warming_up and not feed.canary:
                self._metrics.dead_letters.labels(result.code.value).inc()
                self._letters.append(Letter(feed.partition, stream, result))
            self._tell(feed, feed.aggregate.on_failed(result))
        else:
            if not feed.canary:
                self._count(result)
            self._tell(feed, feed.aggregate.on_applied(result))
            feed.over = feed.aggregate.over
            self._note_up(stream, feed)
        if feed.clip is not None and (feed.over or self._holds(feed)):
            # Who waits for this position wants everything said that lies before it.
            feed.unsettled.append(result.offset)
        else:
            self._positions.applied(feed.partition, result.offset)
        if feed.taken_at is not None and not warming_up:
            self._note_taken_over(stream, feed, feed.taken_at, result.meta)
        if feed.over and feed.in_hand == 0 and not feed.backlog:
            self._pool.close(stream)
            feed.open = False
            if feed.canary:
                del self._feeds[stream]

    def _note_taken_over(self, stream: str, feed: Held, taken_at: float, meta: ChunkMeta | None) -> None:
        """Note how long a stream stood still; a feed that had nothing to say then did not."""
        pause_s, feed.taken_at = self._clock.monotonic() - taken_at, None
        if meta is not None:
            pause_s = min(pause_s, max(0.0, (self._clock.now_us() - meta.capture_us) / 1e6))
        self._metrics.rebalance_pause.labels("taking over").observe(pause_s)
        logger.info("%s: goes on here, %.2f s after its partition was assigned", stream, pause_s)

    def _note_up(self, stream: str, feed: Held) -> None:
        if feed.aggregate.live:
            self._metrics.stream_up.labels(stream).set(feed.aggregate.feed is Feed.UP)

    def _count(self, applied: Applied) -> None:
        self._metrics.records.labels("applied").inc()
        self._metrics.frames.labels("decoded").inc(applied.decoded)
        self._metrics.frames.labels("warmup").inc(applied.warmup)
        for dropped in applied.dropped:
            self._metrics.drops.labels(dropped.reason).inc(dropped.frames or 1)

    def _tell(self, feed: Held, outputs: Iterable[Output]) -> None:
        """Queue what an aggregate says for the next transaction; an event makes that one urgent."""
        for output in outputs:
            if feed.canary:
                self._tell_canary(feed, output)
            elif isinstance(output, ClipRequest):
                self._tell_clip(feed, output)
            elif isinstance(output, IncidentEvent | FeedEvent):
                record = self._publisher.record(output)
                self._outbox.add(feed.partition, record, True, output.moment.capture_us)
                self._metrics.events.labels(type(output).__name__).inc()
            else:
                self._outbox.add(feed.partition, self._publisher.record(output))
                self._show_picture(feed, output)

    def _show_picture(self, feed: Held, output: Output) -> None:
        if isinstance(output, ScoreRecord) and output.frame.picture is not None:
            topic, now_us = self._topic(Topic.PICTURES), self._clock.now_us()
            self._outbox.add(feed.partition, glimpse_record(topic, output, output.frame.picture, now_us))

    def _tell_canary(self, feed: Held, output: Output) -> None:
        """Answer whoever sent the canary; of all else that is said of it nobody hears."""
        if isinstance(output, ClipRequest):
            self._tell(feed, feed.aggregate.on_clip(output.incident, None))
        if isinstance(output, IncidentEvent) and output.kind is EventKind.OPENED:
            record = canary_record(self._topic(Topic.CANARY), output, self._clock.now_us())
            self._outbox.add(feed.partition, record, urgent=True)

    # Clips

    def _tell_clip(self, feed: Held, request: ClipRequest) -> None:
        if request.from_offset is None:  # the media is not there
            self._tell(feed, feed.aggregate.on_clip(request.incident, None))
            return
        feed.clip, feed.cutting = request, False
        self._ask_clip(feed, request)

    def _ask_clips(self) -> None:
        """Ask for the clips for which there was no room, or that could not be cut while the log was away."""
        for feed in self._feeds.values():
            if feed.clip is not None and not feed.cutting and not self._vigil.away:
                self._ask_clip(feed, feed.clip)

    def _ask_clip(self, feed: Held, request: ClipRequest) -> None:
        feed.cutting = self._clipper.ask(feed, feed.partition, request)

    def _holds(self, feed: Held) -> bool:
        """Whether a stream waits for its clip: where media time runs faster than clips are cut, a story would
        be another one each time, and an incident that waits to be closed hides the next."""
        return feed.clip is not None and (self._config.deterministic or not feed.aggregate.live)

    def _clipped(self) -> bool:
        cuts = self._clipper.take()
        for cut in cuts:
            self._answer(cut.owner, cut)
        return bool(cuts)

    def _answer(self, feed: Held, cut: Cut[Held]) -> None:
        request, found = cut.request, cut.found
        if self._feeds.get(request.stream) is not feed or feed.clip != request:
            return  # who has the stream now finds in its state that the clip is due
        feed.cutting = False
        if isinstance(found, UnmaskError) and found.code is Code.LOG_AWAY:
            self._vigil.note_away(found)
            return
        begins_us = found.first_us if isinstance(found, Clip) else None
        self._end_clip(feed, request, self._kept(request, found), begins_us)

    def _kept(self, request: ClipRequest, found: Clip | Exception) -> str | None:
        """Store a clip, before anything names it; None if there is none."""
        try:
            if isinstance(found, Exception):
                raise found
            return self._evidence.put(found.value, SUFFIXES[found.content_type])
        except Exception as error:
            logger.warning("%s: no clip of incident %s: %s", request.stream, request.incident, error)
            self._metrics.clips_failed.inc()
            return None

    def _end_clip(
        self, feed: Held, request: ClipRequest, reference: str | None, begins_us: int | None = None
    ) -> None:
        """Let the aggregate have the answer, and then what the stream has brought meanwhile."""
        feed.clip, feed.dirty = None, True
        self._tell(feed, feed.aggregate.on_clip(request.incident, reference, begins_us))
        while feed.unsettled:
            self._positions.applied(feed.partition, feed.unsettled.pop())
        while feed.held and not self._holds(feed):
            self._apply(request.stream, feed, feed.held.popleft())

    def _records_of(self, partition: TopicPartition, stream: str, start: int, stop: int) -> Iterator[Record]:
        return (record for record in readable(self._log, partition, start, stop) if record.key == stream)

    def _write_letters(self) -> None:
        """Queue the dead letters that are due; nothing is committed without them.

        Raises `UnmaskError` (LOG_AWAY) if what belongs into them cannot be read now.
        """
        while self._letters:
            letter = self._letters[0]
            stream, failed = letter.stream, letter.failed
            try:
                found = self._records_of(letter.partition, stream, failed.decode_from, failed.offset + 1)
                self._put_letters(letter.partition, *newest(found), failed.code, failed.sentence)
                logger.warning("%s: record %s dead-lettered: %s", stream, failed.offset, failed.sentence)
            except UnmaskError as error:
                if error.code is Code.LOG_AWAY:
                    raise
                logger.warning("%s: records before %d are lost: %s", stream, failed.offset, error)
            self._letters.popleft()

    def _put_letters(
        self,
        partition: TopicPartition,
        records: Iterable[Record],
        left_out: int,
        code: Code,
        sentence: str,
    ) -> None:
        topic, limit = self._topic(Topic.DEADLETTER), self._config.media.max_message_bytes
        letters = dead_letters(topic, records, code, sentence, self._clock.now_us(), left_out, limit)
        for letter in letters:
            self._outbox.add(partition, letter)

    def _check_heard(self) -> None:
        """Say so when nobody writes a feed's records any more; a closed decoder or a file needs no writer."""
        for stream, feed in self._feeds.items():
            aggregate = feed.aggregate
            if feed.over or feed.in_hand or not aggregate.live or aggregate.feed is Feed.UNWATCHED:
                continue
            if not self._vigil.silent(feed.partition, feed.heard):
                continue
            outputs = feed.aggregate.on_orphan()
            feed.dirty |= bool(outputs)
            self._tell(feed, outputs)
            self._note_up(stream, feed)
        for stream, since in self._unheard.items():
            partition = self._partition_of(stream)
            if stream not in self._feeds and self._vigil.silent(partition, since):
                self._unheard[stream] = math.inf
                self._tell_unheard(stream, partition)

    def _partition_of(self, stream: str) -> TopicPartition:
        return TopicPartition(self._media, media_partition(stream, self._config.media.partitions))

    def _tell_unheard(self, stream: str, partition: TopicPartition) -> None:
        """Tell of a listed stream that nobody ever wrote a record of: there is no feed to do it."""
        now_us = self._clock.now_us()
        # There is no attachment yet; a name of its own keeps the event's id from ever coming twice.
        moment = Moment(now_us, new_attachment(now_us), epoch=0, capture_us=None)
        sentence = f"listed, and no record for {self._config.incidents.orphan_s:g} s: nobody is watching it"
        event = FeedEvent(stream, TOLD[Feed.UNWATCHED], 1, moment, "orphan", sentence)
        self._outbox.add(partition, self._publisher.record(event), urgent=True)
        self._metrics.events.labels(type(event).__name__).inc()
        self._metrics.stream_up.labels(stream).set(0)

    # Commit

    def _commit_if_due(self) -> None:
        due = self._clock.monotonic() - self._last_commit >= self._config.log.commit_ms / 1000
        if not due and (not self._outbox.urgent or self._refused_since is not None):
            return
        try:
            self._commit()
        except UnmaskError as error:
            self._bear(error)
        else:
            self._refused_since = None

    def _bear(self, error: UnmaskError) -> None:
        """Keep what the log would not take, to try again; raise `error` after `stall_s` of that.

        A log that is away is borne for ever.
        """
        now = self._clock.monotonic()
        self._metrics.commits_refused.inc()
        if error.code is Code.LOG_AWAY:
            self._refused_since = now
            self._vigil.note_away(error)
            return
        self._refused_since = now if self._refused_since is None else self._refused_since
        lasts = now - self._refused_since > self._config.worker.stall_s
        if lasts or error.code not in (Code.LOG_FULL, Code.LOG_UNUSABLE):
            raise error
        logger.warning("nothing committed, trying again: %s", error)

    def _commit(self) -> None:
        """Write outputs, states and positions in one transaction.

        Of each partition that anything is written of, the position is too: what was written at which position
        is all that tells a successor where to go on (DESIGN 3.1).
        """
        if self.error is not None:
            raise self.error
        self._last_commit = self._clock.monotonic()
        self._write_letters()
        dirty = [(stream, feed) for stream, feed in self._feeds.items() if feed.dirty]
        touched = self._outbox.partitions() | {feed.partition for _, feed in dirty}
        positions = {partition: self._positions.at(partition) for partition in touched}
        positions |= self._positions.movable()
        if not positions:
            return
        outputs = self._outbox.records()
        outputs += [self._state_record(stream, feed) for stream, feed in dirty]
        outputs += [self._position_record(partition, offset) for partition, offset in positions.items()]
        try:
            with self._pulse.log():
                self._consumer.commit(outputs, positions)
        except UnmaskError as error:
            if error.code is not Code.LOG_FENCED:
                raise
            # Of this nothing counts unless the next owner finds it in the states: the next poll tells what is
            # lost, and nothing of that is said again by us.
            logger.error("fenced: %s", error)
            return
        self._vigil.note_back()
        self._positions.committed(positions)
        now_us = self._clock.now_us()
        for capture_us in self._outbox.captures():
            self._metrics.alert_latency.observe(max(0.0, (now_us - capture_us) / 1e6))
        self._outbox.clear()
        for _, feed in dirty:
            feed.dirty = False
        self._metrics.commits.inc()

    def _state_record(self, stream: str, feed: Held) -> OutRecord:
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
        """Take partitions over: states first, then read from the smallest live `decode_from`.

        Nothing is changed before everything is known: if the log is away, this is called again.
        """
        with self._pulse.work():
            begun = self._clock.monotonic()
            self._sources.read()
            for takeover in [self._look_at(partition) for partition in partitions]:
                self._take_over(takeover, begun)
            self._heed_sources()
            self._say("partitions %s are ours, after %.2f s", partitions, begun)
        self.assigned_once.set()

    def _look_at(self, partition: TopicPartition) -> Takeover:
        def committed() -> int | None:
            with self._pulse.log():
                return self._consumer.committed(partition)

        states = TopicPartition(self._topic(Topic.STATE), partition.partition)
        try:
            position, found = read_agreeing(self._log, states, committed, self._clock)
        except UnmaskError as error:
            if error.code is Code.LOG_POSITION:
                self._metrics.position_errors.inc()
            raise
        return Takeover(partition, self._log.begin_offset(partition), position, found.streams)

    def _take_over(self, found: Takeover, begun: float) -> None:
        partition, begin, committed = found.partition, found.begin, found.committed
        if committed is not None and committed < begin:
            logger.error("%s: records %d to %d went before they were read", partition, committed, begin - 1)
            self._metrics.position_errors.inc()
        start = found.position
        self._positions.assign(partition, found.position)
        for stream, state in found.states.items():
            feed = self._feeds[stream] = self._new_feed(stream, partition)
            feed.aggregate.restore(state)
            feed.over = feed.aggregate.over
            if not feed.over:
                feed.taken_at = begun
                self._note_up(stream, feed)
                # Of a feed that broke off so long ago there is nothing left to go on from.
                if feed.aggregate.decode_from >= begin:
                    start = min(start, feed.aggregate.decode_from)
            request = feed.aggregate.due_clip()
            if request is not None:
                self._tell(feed, [request])
        self._consumer.seek(partition, max(begin, start))

    def revoked(self, partitions: Collection[TopicPartition]) -> None:
        """Finish what is in hand, commit, and let go; a worker that failed commits nothing."""
        with self._pulse.work():
            begun = self._clock.monotonic()
            try:
                if self.error is None:
                    self._hand_over(partitions)
            finally:
                self._shown = 0.0
                self._show()
                self.lost(partitions)
            self._metrics.rebalance_pause.labels("handing over").observe(self._clock.monotonic() - begun)
            self._say("partitions %s are let go, after %.2f s", partitions, begun)

    def _say(self, words: str, partitions: Collection[TopicPartition], begun: float) -> None:
        numbers = " ".join(str(partition.partition) for partition in sorted(partitions))
        # Where there are no others it is nobody's news.
        level = logging.DEBUG if self._alone else logging.INFO
        logger.log(level, words, numbers, self._clock.monotonic() - begun)

    def _hand_over(self, partitions: Collection[TopicPartition]) -> None:
        """Finish and commit, within one deadline shared with what follows (DESIGN 3.9)."""
        bound = min(self._config.worker.shutdown_s, SESSION_SHARE * self._config.kafka.session_s)
        whole = self._deadline or Deadline(bound, self._clock)
        longest = math.inf if self._close_incidents else FLUSH_S
        flush = Deadline(min(longest, whole.left() / 2), self._clock)
        while self._busy(partitions) and not flush.passed() and self._device.error is None:
            self._pulse.beat()
            self._decoded()
            self._scored()
            self._clipped()
            self._clock.sleep(DRAIN_STEP_S)
        if self._close_incidents:
            self._stop_incidents()
            self._end_clips(Deadline(CLIP_SHARE * whole.left(), self._clock))
        try:
            self._commit()
        except UnmaskError as error:
            if self._close_incidents:
                raise  # nobody comes after us who would say it
            logger.warning("handed over without a last commit, its work is done again: %s", error)
            self._metrics.commits_refused.inc()

    def _stop_incidents(self) -> None:
        for feed in self._feeds.values():
            feed.held.clear()
            outputs = feed.aggregate.stop()
            feed.dirty |= bool(outputs) and not feed.canary
            self._tell(feed, outputs)

    def _end_clips(self, deadline: Deadline) -> None:
        """Wait for the clips that are due; what is not cut by then is told without: nobody comes after us."""
        while any(feed.cutting for feed in self._feeds.values()) and not deadline.passed():
            self._pulse.beat()
            self._clipped()
            self._ask_clips()
            self._clock.sleep(DRAIN_STEP_S)
        for feed in self._feeds.values():
            if feed.clip is not None:
                late = UnmaskError(Code.STAGE_WEDGED, "it was not cut before the end")
                self._end_clip(feed, feed.clip, self._kept(feed.clip, late))

    def _busy(self, partitions: Collection[TopicPartition]) -> bool:
        mine = [feed for feed in self._feeds.values() if feed.partition in partitions]
        # The next owner cuts a clip beside its work; to wait for it here would stop every stream.
        return any(feed.in_hand and (self._close_incidents or not self._holds(feed)) for feed in mine)

    def lost(self, partitions: Collection[TopicPartition]) -> None:
        """Forget partitions without writing anything."""
        with self._pulse.work():
            for stream in [name for name, feed in self._feeds.items() if feed.partition in partitions]:
                self._pulse.beat()
                self._metrics.forget(stream)
                if self._feeds.pop(stream).open:
                    self._pool.close(stream)
            self._forget_events()
            self._clipper.forget(partitions)
            self._outbox.lose(partitions)
            self._letters = deque(letter for letter in self._letters if letter.partition not in partitions)
            self._forget_unheard(partitions)
            for partition in partitions:
                self._positions.forget(partition)
                self._vigil.forget(partition)

    def _forget_unheard(self, partitions: Collection[TopicPartition]) -> None:
        for stream in [name for name in self._unheard if self._partition_of(name) in partitions]:
            del self._unheard[stream]
            self._metrics.forget(stream)

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
            with self._pulse.log():
                self._consumer.close(deadline.left())
        finally:
            # Of a worker that failed the device may be what hangs.
            self._device.stop(deadline.left() if self.error is None else 0.0)
            self._pool.shutdown(deadline)
            self._clipper.stop(deadline.left() if self.error is None else 0.0)

    def _topic(self, topic: Topic) -> str:
        return topic_name(self._config, topic)


def _stream_of(result: Result) -> str:
    if isinstance(result, ScoredFrame | FollowedFrame | HeardSound):
        return result.stream
    meta = result.frame.meta if isinstance(result, Skipped) else result.meta
    assert meta is not None, "checked before the device was asked"
    return meta.stream


def _stale(frame: SampledFrame) -> Dropped:
    return Dropped(frame.media_us, frame.media_us, "STALE", 1)
