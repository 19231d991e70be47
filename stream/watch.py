"""`unmask watch`: log, detect and table in this process, ingest and decoders as its children (DESIGN 1)."""

import json
import logging
import random
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import av

from stream.aggregate import StreamAggregate
from stream.alerts import Publisher, event_of
from stream.assemble import build_reader, data_folder, log_folder, open_embedded
from stream.bursts import follower_of
from stream.clock import Clock, Deadline, SystemClock
from stream.config import Config
from stream.console import Console, FeedView
from stream.controls import FeedPhase
from stream.copies import copying
from stream.errors import Code, UnmaskError
from stream.evidence import EvidenceStore
from stream.health import serve
from stream.held import Status
from stream.ingest import IngestSupervisor
from stream.ingest_service import refusals, source_of
from stream.intake import FeedStatus, Last
from stream.log import Log, PositionError, TopicPartition, ends, everything
from stream.metrics import Metrics
from stream.records import SCHEMA, ChunkMeta, Kind, OutRecord, Record, Topic, decode_headers
from stream.serving import web_beside
from stream.sources import PUSHED, Scheme, Source, parse_sources
from stream.sqlite_log import SqliteLog
from stream.states import read_states
from stream.timeline import report
from stream.topics import topic_name, topic_specs
from stream.worker import Worker

logger = logging.getLogger(__name__)

LOOK_S = 0.1
"""Between looks of the main loop at feeds, events and the worker."""

FILE_RECORD_S = 1.0
"""Between verdict records of files: their timeline is looked at whole, and there are no years of them."""

WEB_STOP_S = 4.0
"""What the web interface gets to end, after everything else has."""

LEASE_PATIENCE = 2.0
"""Times `log.lease_s` that a second `watch` on the same folder waits before it says so and gives up: a lease
of a process that was killed has expired by then."""


def watch(config: Config, texts: Sequence[str], json_mode: bool, console: Console) -> int:
    """Watch the sources until all files are over or the user stops; return the exit code.

    Raises `UnmaskError` for a wrong source, setting or weights, before anything is attached.
    """
    sources = parse_sources(texts)
    if any(source.scheme is Scheme.PUSH for source in sources):
        raise UnmaskError(Code.SOURCE_SYNTAX, f"{PUSHED} is for unmask attach: there is nothing to watch at")
    if all(source.kind is Kind.FILE for source in sources):
        often = config.verdict.model_copy(update={"record_every_s": FILE_RECORD_S})
        config = config.model_copy(update={"verdict": often})
    with ExitStack() as stack:
        session = Session(config, sources, console, SystemClock(), stack)
        return session.run(pictures=not json_mode)


class Session:
    """One run of `watch`."""

    def __init__(
        self, config: Config, sources: Sequence[Source], console: Console, clock: Clock, stack: ExitStack
    ) -> None:
        self._config = config
        self._sources = {source.id: source for source in sources}
        self._detached: dict[str, FeedStatus] = {}
        """Sources that somebody took out of the list meanwhile, as they stood then."""
        self._console = console
        self._clock = clock
        assembly = build_reader(config)
        self._log = open_embedded(config, clock)
        stack.callback(self._log.close)
        self._log.create_topics(topic_specs(config))
        evidence = EvidenceStore(data_folder(config) / "evidence", clock)
        metrics = Metrics(assembly.usage, assembly.refusals)
        copier = copying(config, evidence, clock, metrics)
        if copier is not None:
            stack.callback(copier.stop)
        if config.worker.metrics_port:
            serve(metrics.registry, config.worker.metrics_port, config.worker.metrics_host)

        def make_aggregate(stream: str) -> StreamAggregate:
            return StreamAggregate(stream, config, assembly.calibration, assembly.provenance, evidence)

        self._worker = Worker(
            config,
            self._log,
            assembly.reader,
            make_aggregate,
            Publisher(config, assembly.provenance, clock),
            evidence,
            clock,
            metrics,
            heavy=assembly.heavy,
            follower=follower_of(config),
        )
        self._thread = threading.Thread(target=self._work, name="unmask-detect", daemon=True)
        self._web = web_beside(config, self._log, clock)
        factory = partial(SqliteLog, log_folder(config), config.log, SystemClock())
        self._ingest = IngestSupervisor(config, factory, clock, random.Random())
        self._events = Tail(self._log, topic_name(config, Topic.ALERTS))
        self._alerts_from = ends(self._log, topic_name(config, Topic.ALERTS))
        self._scores_from = ends(self._log, topic_name(config, Topic.SCORES))
        self._lengths = {source.id: length_us(source) for source in sources}
        self._rates: dict[str, Rate] = {}

    def run(self, pictures: bool) -> int:
        """Watch, stop in order, report."""
        self._thread.start()
        try:
            self._await_lease()
            self._announce()
            if self._web is not None:
                self._web.start()
                logger.info("the web interface is at %s", self._web.url)
            self._ingest.start(list(self._sources.values()), self._last(self._sources))
            while not self._over():
                self._follow()
                self._look()
                self._clock.sleep(LOOK_S)
        except KeyboardInterrupt:
            pass
        finally:
            self._stop()
        self._look()
        self._console.summary([self._report(source, pictures) for source in self._sources.values()])
        return self._outcome()

    def _announce(self) -> None:
        """Write the sources to their topic, and take out what no longer is one."""
        topic = topic_name(self._config, Topic.SOURCES)
        wanted = {name: json.dumps(source.entry()).encode() for name, source in self._sources.items()}
        known = {record.key for record in everything(self._log, topic)}
        with self._log.producer("watch") as producer:
            for key in known | wanted.keys():
                headers = {"schema": str(SCHEMA).encode()}
                producer.send(OutRecord(topic, key, wanted.get(key), headers, self._clock.now_us()))
            producer.flush(self._config.worker.shutdown_s)
        self._entries_from = ends(self._log, topic)

    def _follow(self) -> None:
        """Do what `unmask attach` and `detach` have written since the last look."""
        for partition, start in self._entries_from.items():
            for record in self._log.read(partition, start):
                self._entries_from[partition] = record.offset + 1
                if record.value is None:
                    self._detach(record.key)
                else:
                    self._attach(record)

    def _attach(self, record: Record) -> None:
        topic = topic_name(self._config, Topic.SOURCES)
        try:
            source = source_of(record, self._log.partitions(topic))
        except UnmaskError as error:
            logger.error("an entry of sources is refused: %s", error)
            with self._log.producer("watch") as producer:
                for letter in refusals(self._config, record, error, self._clock.now_us()):
                    producer.send(letter)
            return
        if source.scheme is Scheme.PUSH:  # its producer writes it
            self._detach(source.id)
            return
        known = self._sources.get(source.id)
        if known is not None and source.id not in self._detached and known.identity() == source.identity():
            return
        logger.info("stream %s: %s is attached too", source.id, source.shown)
        self._detached.pop(source.id, None)
        self._sources[source.id] = source
        self._lengths[source.id] = length_us(source)
        self._ingest.add([source], self._last([source.id]))

    def _detach(self, stream: str) -> None:
        if stream not in self._sources or stream in self._detached:
            return
        logger.info("stream %s: detached", stream)
        status = self._ingest.statuses().get(stream) or FeedStatus.unknown(stream, Last())
        if status.phase is not FeedPhase.ENDED:
            status = replace(status, phase=FeedPhase.STOPPED, fps=0.0)
        self._detached[stream] = status
        self._ingest.remove([stream], end=True)

    def _last(self, streams: Collection[str]) -> dict[str, Last]:
        """Return where earlier runs left these streams.

        What they wrote may not be applied yet: a file is read ahead of what is looked at. Where that ends
        counts, or the time of what comes now would lie before it.
        """
        names = set(streams)
        unread = list(self._unread())  # first: what is applied meanwhile is in the states
        topic = topic_name(self._config, Topic.STATE)
        found: dict[str, Last] = {}
        for number in range(self._log.partitions(topic)):
            for stream, state in read_states(self._log, TopicPartition(topic, number)).items():
                if stream in names:
                    found[stream] = Last(state["resume"]["attachment"], state["now_us"])
        for meta in unread:
            known = found.get(meta.stream, Last())
            ends_us = 0 if meta.pts is None else meta.media_us(meta.pts) + 1000 * self._config.media.chunk_ms
            found[meta.stream] = Last(
                max(known.attachment, meta.attachment), max(known.media_end_us, ends_us)
            )
        return {stream: last for stream, last in found.items() if stream in names}

    def _unread(self) -> Iterator[ChunkMeta]:
        """Yield what the media records say that detect has not applied yet."""
        topic, group = topic_name(self._config, Topic.MEDIA), f"{self._config.prefix}-detect"
        for number in range(self._log.partitions(topic)):
            partition = TopicPartition(topic, number)
            start = max(self._log.begin_offset(partition), self._log.group_position(group, partition) or 0)
            with suppress(PositionError):  # damaged: the worker tells of it and goes on behind it
                for record in self._log.read(partition, start):
                    with suppress(UnmaskError):
                        yield decode_headers(record.key, record.headers)

    def _work(self) -> None:
        try:
            self._worker.run()
        except BaseException:
            logger.debug("detect ended", exc_info=True)

    def _await_lease(self) -> None:
        """Wait until the log is ours, or say who has it."""
        deadline = Deadline(LEASE_PATIENCE * self._config.log.lease_s, self._clock)
        while not self._worker.assigned_once.wait(LOOK_S):
            if self._worker.error is not None:
                raise self._worker.error
            if deadline.passed():
                raise UnmaskError(
                    Code.LOG_LEASE,
                    f"another unmask is at work in {data_folder(self._config)}; stop it, or give this one a "
                    "folder of its own with --set data_dir=FOLDER",
                )

    def _over(self) -> bool:
        """Whether nothing more can come: the worker failed, or every source ended and all is applied."""
        if self._worker.error is None and not self._worker.healthy():
            # It then commits nothing, should it wake up while we stop.
            sentence = f"detect has done nothing for {self._config.worker.stall_s:g} s"
            self._worker.fail(UnmaskError(Code.STAGE_WEDGED, sentence))
        if self._worker.error is not None:
            return True
        if not self._ingest.finished():
            return False
        written = {stream: feed.last.attachment for stream, feed in self._ingest.statuses().items()}
        applied = {status.stream: status.ended for status in self._worker.statuses if not status.in_hand}
        awaited = self._sources.keys() - self._ingest.given_up - self._detached.keys()
        return all(applied.get(stream) == written.get(stream) for stream in awaited)

    def _look(self) -> None:
        self._ingest.poll()
        for event in self._events.new():
            self._console.event(event)
        feeds = self._ingest.statuses() | self._detached
        streams = {status.stream: status for status in self._worker.statuses}
        self._console.update(
            [self._view(source, feeds.get(name), streams.get(name)) for name, source in self._sources.items()]
        )

    def _view(self, source: Source, feed: FeedStatus | None, stream: Status | None) -> FeedView:
        media_us = stream.media_us if stream and stream.media_us else None
        told = stream is not None and media_us is not None and stream.ended is None
        lag_s = None
        if source.kind is Kind.LIVE and feed is not None and feed.capture_us is not None:
            lag_s = max(0.0, (self._clock.now_us() - feed.capture_us) / 1e6)
        rate = self._rates.setdefault(source.id, Rate(self._clock))
        return FeedView(
            stream=source.id,
            state=feed.phase.value if feed else FeedPhase.CONNECTING.value,
            media_us=media_us,
            lag_s=lag_s,
            fps=rate.per_second(stream.frames if stream else 0),
            faces=stream.faces if stream else 0,
            verdict=stream.verdict if stream and told else None,
            reasons=stream.reasons if stream and told else (),
            open_incident=stream.incident if stream else None,
            error=feed.sentence if feed else None,
            progress=self._progress(source, stream),
            start_us=stream.start_us if stream else None,
        )

    def _progress(self, source: Source, stream: Status | None) -> float | None:
        if source.kind is not Kind.FILE:
            return None
        if stream is None or stream.start_us is None:
            return 0.0
        if stream.ended is not None:
            return 1.0
        length = self._lengths[source.id]
        return min(1.0, (stream.media_us - stream.start_us) / length) if length else 0.0

    def _stop(self) -> None:
        """End feeds, then detect, within one deadline; a second Ctrl-C does not break the order."""
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        terminated = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            deadline = Deadline(self._config.worker.shutdown_s, self._clock)
            self._ingest.stop(Deadline(deadline.left() / 2, self._clock))
            self._worker.drain(deadline, close_incidents=True)
            self._thread.join(deadline.left() + 1.0)
            if self._web is not None and not self._web.stop(WEB_STOP_S):
                logger.warning("the web interface did not end in time")
        finally:
            signal.signal(signal.SIGINT, previous)
            signal.signal(signal.SIGTERM, terminated)

    def _report(self, source: Source, pictures: bool) -> Any:
        picture = None
        if pictures and source.kind is Kind.FILE:
            folder = data_folder(self._config) / "timelines"
            folder.mkdir(parents=True, exist_ok=True)
            picture = folder / f"{source.id}.png"
        scores = partial(self._scores, source.id)
        events = map(structured, self._since(self._alerts_from, source.id))
        return report(source.id, scores, events, self._config.verdict, picture)

    def _scores(self, stream: str) -> Iterator[dict[str, Any]]:
        return (json.loads(record.value or b"null") for record in self._since(self._scores_from, stream))

    def _since(self, offsets: Mapping[TopicPartition, int], stream: str) -> Iterator[Record]:
        """Yield the stream's records of this run that the log still holds."""
        for partition, start in offsets.items():
            for record in self._log.read(partition, max(start, self._log.begin_offset(partition))):
                if record.key == stream:
                    yield record

    def _outcome(self) -> int:
        if self._worker.error is not None:
            raise UnmaskError(Code.STAGE_WEDGED, f"watching stopped: {self._worker.error}")
        for feed in self._ingest.statuses().values():
            if feed.phase is FeedPhase.ENDED and feed.code is not None:
                raise UnmaskError(Code(feed.code), f"{feed.stream}: {feed.sentence}")
        return 0


class Rate:
    """Counts per second, over the last few seconds."""

    SPAN_S = 3.0

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._points: list[tuple[float, int]] = []

    def per_second(self, count: int) -> float:
        """Note the count as of now and return its rate."""
        now = self._clock.monotonic()
        self._points = [point for point in self._points if now - point[0] <= self.SPAN_S]
        self._points.append((now, count))
        passed = now - self._points[0][0]
        return (count - self._points[0][1]) / passed if passed > 0 else 0.0


class Tail:
    """What is new in the alerts topic since it was opened, as structured CloudEvents."""

    def __init__(self, log: Log, topic: str) -> None:
        self._log = log
        self._next = ends(log, topic)

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the events committed since the last call."""
        for partition, start in self._next.items():
            for record in self._log.read(partition, start):
                self._next[partition] = record.offset + 1
                yield structured(record)


def structured(record: Record) -> dict[str, Any]:
    """Return an alert record (binary mode) as one JSON object."""
    return event_of(record).structured()


def length_us(source: Source) -> int | None:
    """Return the length of a file in microseconds, None if it does not tell."""
    if source.scheme is not Scheme.FILE:
        return None
    try:
        with av.open(source.address) as container:
            return container.duration
    except (av.error.FFmpegError, OSError):
        return None
