"""`unmask ingest`: a member of the group over `sources`, attaches the feeds of its partitions (DESIGN 3.9).

The group only shares partitions out: each is read whole when it comes, and followed. The committed position
says up to where bad entries were told of. On revoke feeds are let go without an `end` before the next owner
gets them; a member that was lost lets go at once, and shards whose parent stands still do so by themselves
after as long as the group waits.
"""

import json
import logging
import os
import random
import threading
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from stream.assemble import data_folder, log_folder
from stream.claims import Standing, read_standings
from stream.clock import Clock, Deadline, SystemClock
from stream.config import Config
from stream.deadletter import dead_letters
from stream.errors import Code, UnmaskError
from stream.health import serve
from stream.ingest import IngestSupervisor
from stream.log import Consumer, Log, PositionError, TopicPartition
from stream.metrics import IngestMetrics
from stream.records import OutRecord, Record, Topic, check_schema
from stream.redact import redact
from stream.service import opened, stop_signals
from stream.sources import Scheme, Source, from_entry
from stream.spool import Home
from stream.sqlite_log import SqliteLog
from stream.topics import media_partition, topic_name

logger = logging.getLogger(__name__)

SESSION_S = 6.0
"""The group waits so long for a silent member; brokers refuse less."""
LEASE_S = 4.0
"""Shards wait so long for a silent parent: its last heartbeat was at most a quarter of SESSION_S earlier, so
they let its feeds go before another member gets them."""
POLL_S = 0.1
"""Between looks at shards when no entry comes."""
POLL_RECORDS = 500
KEEP_S = 1.0
HANDOVER_S = 5.0
"""What feeds get to be let go in order; what has not gone then is killed. Below SESSION_S."""
LOST_S = 1.0
"""The same when another member has them already."""
STALL_S = 60.0
"""A loop that does not turn for this long hangs: to join a group while the cluster goes away takes 40 s."""
RETRY_S = 1.0
"""Between attempts while the log is away."""
MAX_ENTRY_BYTES = 64 * 1024
"""An entry is an address and some labels."""


def ingest(config: Config) -> int:
    """Attach feeds until told to stop (SIGTERM, SIGINT); return 0.

    Raises `UnmaskError` if it cannot go on: whoever supervises starts it again.
    """
    config = config.model_copy(update={"kafka": config.kafka.model_copy(update={"session_s": SESSION_S})})
    with ExitStack() as stack:
        home = None
        if config.kafka.bootstrap_servers:
            home = Home(data_folder(config) / "ingest")
            stack.callback(home.close)
        stopping = threading.Event()
        stack.enter_context(stop_signals(stopping))
        log = opened(config, SystemClock(), stopping)
        if log is None:
            return 0
        stack.callback(log.close)
        service = IngestService(config, log, SystemClock(), random.Random(), home, stopping)
        if config.worker.metrics_port:
            registry = service.metrics.registry
            serve(registry, config.worker.metrics_port, config.worker.metrics_host, service.healthy)
        service.run()
    return 0


class IngestService:
    """One member. `run` is the loop; it is also the listener of its consumer, on the same thread."""

    def __init__(
        self,
        config: Config,
        log: Log,
        clock: Clock,
        rng: random.Random,
        home: Home | None,
        stopping: threading.Event,
    ) -> None:
        self._config = config
        self._log = log
        self._clock = clock
        self._stopping = stopping
        self._topic = topic_name(config, Topic.SOURCES)
        self._member = home.member if home is not None else "ingest"
        factory = partial(SqliteLog, log_folder(config), config.log, SystemClock())
        self._ingest = IngestSupervisor(config, factory, clock, rng, home, LEASE_S)
        self._sources: dict[str, Source] = {}
        """What is listed in our partitions and can be attached."""
        self._refused: dict[str, TopicPartition] = {}
        """Streams whose newest entry cannot be read, with where it stands."""
        self._waiting: dict[str, Source] = {}
        """To be attached as soon as the log has told where they stand."""
        self._letters: dict[TopicPartition, list[OutRecord]] = {}
        self._told: dict[TopicPartition, int] = {}
        """Up to where bad entries were told of, or will be with the next commit."""
        self._count = 0
        """Partitions of sources, known from the first assignment on."""
        self._away = False
        self._turn_at = clock.monotonic()
        self._done = threading.Event()
        self.metrics = IngestMetrics(self._figures)

    def run(self) -> None:
        """Work until `stopping` is set. Raises `UnmaskError` if it cannot go on; feeds are let go too."""
        keeper = threading.Thread(target=self._keep, name="ingest keeper", daemon=True)
        keeper.start()
        try:
            self._work()
        finally:
            deadline = Deadline(self._config.worker.shutdown_s, self._clock)
            self._ingest.stop(Deadline(deadline.left() / 2, self._clock), end=False)
            self._done.set()
            self._leave(deadline)

    def _work(self) -> None:
        self._consumer: Consumer | None = None
        while not self._stopping.is_set():
            self._turn_at = self._clock.monotonic()
            try:
                self._follow()
                self._attach()
                self._tell()
                self._away = False
            except UnmaskError as error:
                self._bear(error)
            self._ingest.poll()

    def _bear(self, error: UnmaskError) -> None:
        """Go on if waiting may help."""
        if error.code is not Code.LOG_AWAY:
            raise error
        if not self._away:
            logger.warning("%s; feeds go on, trying again", error)
        self._away = True
        self._stopping.wait(RETRY_S)

    def _follow(self) -> None:
        """Take in what the group and the topic say."""
        if self._consumer is None:
            group = f"{self._config.prefix}-ingest"
            self._consumer = self._log.consumer(group, [self._topic], self, self._member)
        try:
            records = self._consumer.poll(POLL_RECORDS, POLL_S)
        except PositionError as error:
            # Retention of a compacted topic: what is gone was superseded, and the rest is read anew.
            self._consumer.seek(error.partition, self._read(error.partition))
            return
        for record in records:
            self._take(record)

    def assigned(self, partitions: Collection[TopicPartition]) -> None:
        """Read partitions whole and attach what they list."""
        assert self._consumer is not None
        self._count = self._log.partitions(self._topic)
        for partition in sorted(partitions):
            committed = self._consumer.committed(partition)
            self._told[partition] = self._log.begin_offset(partition) if committed is None else committed
            self._consumer.seek(partition, self._read(partition))
        logger.info("ingest %s has %d partitions of sources more", self._member, len(partitions))

    def revoked(self, partitions: Collection[TopicPartition]) -> None:
        """Let the feeds of partitions go, in order, before another member attaches them."""
        self._hand_over(partitions, HANDOVER_S)

    def lost(self, partitions: Collection[TopicPartition]) -> None:
        """Let the feeds of partitions go at once: another member has them."""
        self._hand_over(partitions, LOST_S)

    def _hand_over(self, partitions: Collection[TopicPartition], seconds: float) -> None:
        numbers = {partition.partition for partition in partitions}
        streams = {stream for stream in self._sources if media_partition(stream, self._count) in numbers}
        for stream in streams:
            del self._sources[stream]
            self._waiting.pop(stream, None)
        for partition in partitions:
            self._letters.pop(partition, None)
            self._told.pop(partition, None)
        self._refused = {name: where for name, where in self._refused.items() if where not in partitions}
        if streams:
            logger.info("ingest %s lets %d feeds go", self._member, len(streams))
        self._ingest.hand_over(streams, Deadline(seconds, self._clock))

    def _read(self, partition: TopicPartition) -> int:
        """Take in the newest entry of each stream of a partition; return where to follow it from."""
        start = following = self._log.begin_offset(partition)
        newest: dict[str, Record] = {}
        for record in self._log.read(partition, start):
            newest[record.key] = record
            following = record.offset + 1
        for record in newest.values():
            self._take(record)
        return following

    def _take(self, record: Record) -> None:
        """Do what an entry says; one that cannot be read goes to the dead letters."""
        stream = record.key
        if record.value is None:
            self._detach(stream)
            return
        try:
            source = source_of(record, self._count)
        except UnmaskError as error:
            self._refuse(record, error)
            return
        if source.scheme is Scheme.PUSH:  # its producer writes it
            self._detach(stream)
            return
        self._refused.pop(stream, None)
        before = self._sources.get(stream)
        self._sources[stream] = source
        if before is None or before.identity() != source.identity():
            self._waiting[stream] = source

    def _detach(self, stream: str) -> None:
        self._refused.pop(stream, None)
        self._waiting.pop(stream, None)
        if self._sources.pop(stream, None) is not None:
            logger.info("stream %s: detached", stream)
            self._ingest.remove([stream], end=True)

    def _refuse(self, record: Record, error: UnmaskError) -> None:
        """Leave an entry alone, and what was attached by an earlier one; the group tells of it once."""
        partition = TopicPartition(record.topic, record.partition)
        self._refused[record.key] = partition
        if record.offset < self._told.get(partition, 0):
            return
        logger.error("entry %s of sources is refused: %s", redact(repr(record.key[:80])), error)
        self._told[partition] = record.offset + 1
        letters = refusals(self._config, record, error, self._clock.now_us())
        self._letters.setdefault(partition, []).extend(letters)

    def _attach(self) -> None:
        """Attach what waits, behind what the log knows of each. Raises `UnmaskError` if it does not say."""
        if not self._waiting:
            return
        waiting = dict(self._waiting)
        standings = read_standings(self._log, self._config, waiting.keys())
        self._waiting.clear()
        wanted = [source for stream, source in waiting.items() if not _over(source, standings[stream])]
        self._ingest.add(wanted, {stream: standing.last for stream, standing in standings.items()})

    def _tell(self) -> None:
        """Write the dead letters of bad entries, with the position that says they were told of."""
        if not self._letters or self._consumer is None:
            return
        letters = [letter for found in self._letters.values() for letter in found]
        positions = {partition: self._told[partition] for partition in self._letters}
        try:
            self._consumer.commit(letters, positions)
        except UnmaskError as error:
            if error.code is not Code.LOG_FENCED:
                raise
            # Another member has the partitions and tells; the next poll says so.
            logger.warning("%s", error)
        self._letters.clear()

    def _leave(self, deadline: Deadline) -> None:
        if self._consumer is not None:
            try:
                self._consumer.close(deadline.left())
            except UnmaskError as error:
                logger.warning("leaving the group: %s", error)

    def healthy(self) -> bool:
        """Whether the loop turns."""
        return self._clock.monotonic() - self._turn_at <= STALL_S

    def _keep(self) -> None:
        """Tell shards that we live; end the process if its loop does not turn any more."""
        while not self._done.wait(KEEP_S):
            if not self.healthy() and not self._stopping.is_set():
                logger.error("ingest has done nothing for %g s, giving up", STALL_S)
                os._exit(1)
            self._ingest.keep()

    def _figures(self) -> Mapping[str, float]:
        return {
            "feeds": len(self._sources),
            "refused": len(self._refused),
            "spooled": self._ingest.spooled,
            "dropped": self._ingest.dropped,
            "restarts": self._ingest.restarts,
        }


def _over(source: Source, standing: Standing) -> bool:
    """Whether a file was read to its end already, by whichever member."""
    return standing.claim.over == source.identity()


def refusals(config: Config, record: Record, error: UnmaskError, now_us: int) -> list[OutRecord]:
    """Return the dead letter of an entry that cannot be attached, without what is secret in it."""
    text = redact((record.value or b"").decode("utf-8", "replace"))[:MAX_ENTRY_BYTES]
    topic = topic_name(config, Topic.DEADLETTER)
    shown = replace(record, value=text.encode())
    return dead_letters(topic, [shown], error.code, redact(str(error)), now_us)


def source_of(record: Record, partitions: int) -> Source:
    """Return what an entry of `sources` lists. Raises `UnmaskError` saying what is wrong with it."""
    if "schema" in record.headers:
        check_schema(record.headers)
    value = record.value or b""
    if len(value) > MAX_ENTRY_BYTES:
        raise _bad(f"it has {len(value)} bytes; at most {MAX_ENTRY_BYTES} are right")
    try:
        entry: Any = json.loads(value)
    except ValueError:
        raise _bad('it is no JSON; {"id": ID, "url": ADDRESS} would be right') from None
    if not isinstance(entry, dict):
        raise _bad('it is no JSON object; {"id": ID, "url": ADDRESS} would be right')
    source = from_entry({"id": record.key, **entry})
    if source.id != record.key:
        raise _bad(f"its id is {source.id} and its key {record.key[:80]!r}; both must be the stream's id")
    right = media_partition(source.id, partitions)
    if record.partition != right:
        raise _bad(
            f"{source.id} is in partition {record.partition} and belongs into {right}, CRC-32 of the key "
            f"modulo {partitions} (librdkafka: partitioner=consistent)"
        )
    check_public(source)
    return source


def check_public(source: Source) -> None:
    """Raise `UnmaskError` (SOURCE_SYNTAX) for what another process cannot attach, or must not read here."""
    if source.scheme is Scheme.STDIN:
        raise _bad("standard input belongs to one process; name an address, a file or a camera")
    if source.secret_ref is None and redact(source.address) != source.address:
        raise _bad(
            f"{source.shown} holds a credential, and everybody can read the topic; put the address into an "
            "environment variable of the ingest processes and attach env:NAME"
        )


def _bad(sentence: str) -> UnmaskError:
    return UnmaskError(Code.SOURCE_SYNTAX, f"entry refused: {sentence}")
