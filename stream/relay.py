"""Between a shard and the cluster: hands records on in order, over the spool while it is away (DESIGN 3.9).

DIRECT records go to the cluster's producer as they come. When the cluster does not answer, what it has not
confirmed and all that follows goes to the spool (SPOOLING), and stays its only way until the spool is
delivered whole: so the order never changes. A record whose fate is unknown is sent again; detect drops what
is not newer.

A cluster that is away for us alone may meanwhile have given a feed to another member, whose attachments are
then newer to the log than ours. So before the spool is delivered the claims are read (`stream.claims`), and
of feeds that others have taken nothing more is sent.
"""

import json
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from stream.chunks import JSON, content_hash
from stream.claims import claimed, read_standings
from stream.clock import Clock, Deadline
from stream.config import Config
from stream.controls import Gap, to_body
from stream.errors import Code, UnmaskError
from stream.log import Log, TopicPartition
from stream.records import Control, OutRecord, Topic, decode_headers, encode_headers
from stream.spool import Spool, names_in, write_names
from stream.topics import media_partition, topic_name

logger = logging.getLogger(__name__)

QUEUE_BYTES = 32 * 1024 * 1024
"""What waits for this thread before `send` waits: a shard of 8 feeds at 8 Mbit/s for four seconds."""
ROOM_S = 5.0
"""`send` waits no longer for room; beyond, records are dropped and counted, for readers must go on."""
LINGER_S = 0.03
"""How long records are collected: each transaction costs the broker markers, and a chunk is half a second."""
PATIENCE_S = 3.0
"""A record not confirmed for this long goes to disk: far above what a cluster at work takes."""
HASTE_S = 1.0
"""The same while somebody waits in `flush`, in order to stop."""
WINDOW_RECORDS, WINDOW_BYTES = 500, 8 * 1024 * 1024
"""Sent of the spool and not confirmed yet: one transaction of the producer."""
CONTACT_S = 0.25
"""Between looks of the second thread at the cluster."""
RETRY_S = 1.0
"""Between attempts to reach the cluster; each waits by itself."""


class State(StrEnum):
    """OPENING -> DIRECT or SPOOLING (something is left over, or nobody answers); DIRECT <-> SPOOLING."""

    OPENING = "opening"
    DIRECT = "direct"
    SPOOLING = "spooling"


class Far(Protocol):
    """The producer of the cluster, insistent: in order, each record until it is written (`LogProducer`)."""

    @property
    def away(self) -> bool: ...
    @property
    def dropped(self) -> int: ...
    def offer(self, record: OutRecord) -> bool: ...
    def unfinished(self) -> int: ...
    def close(self, timeout: float) -> None: ...


Reach = Callable[[], tuple[Log, Far]]
"""Connects to the cluster; raises `UnmaskError` if it does not answer."""


@dataclass(slots=True)
class _Sent:
    """A record that the producer has taken and not confirmed. `offset`: its place in the spool, if there."""

    record: OutRecord
    at: float
    offset: int | None = None


class Relay:
    """A `Producer` that never blocks for long and loses nothing that the spool can hold.

    `send`, `flush`, `adopt` belong to the shard's loop. One thread of its own moves records; another talks to
    the cluster, where each question may wait for seconds.
    """

    def __init__(
        self, config: Config, folder: Path, member: str, reach: Reach, clock: Clock, limit_bytes: int
    ) -> None:
        self._config = config
        self._folder = folder
        self._member = member
        self._reach = reach
        self._clock = clock
        self._limit = limit_bytes
        self._media = topic_name(config, Topic.MEDIA)
        self.state = State.OPENING
        self.offsets = Offsets()
        self._lock = threading.Condition()
        self._queue: deque[OutRecord] = deque()
        self._queued_bytes = 0
        self._choked = False
        self._taken = self._secure = 0
        self._flushing = 0
        self._stopping = threading.Event()
        self._error: UnmaskError | None = None
        self._spool: Spool | None = None
        self._refused = False
        """Whether opening the spool failed once: told once."""
        self._log: Log | None = None
        self._far: Far | None = None
        self._far_dropped = 0
        self._counts = (0, 0)
        self._cleared = False
        """Whether claims were read since the cluster was last away."""
        self._sent: deque[_Sent] = deque()
        self._next: tuple[int, OutRecord] | None = None
        self._names: set[str] = set(names_in(folder))
        self._known: dict[str, str] = {}
        self._foreign: set[str] = set()
        self._reached: dict[str, tuple[str, int]] = {}
        self._left_out: Counter[str] = Counter()
        self._opened_at = clock.monotonic()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._contact = threading.Thread(target=self._stay_in_contact, name="relay contact", daemon=True)
        self._contact.start()
        self._thread.start()

    # For the shard's loop.

    def adopt(self, stream: str, attachment: str) -> None:
        """A feed is ours; `attachment`: the newest that the log knew when it became so."""
        with self._lock:
            self._known[stream] = attachment
            self._foreign.discard(stream)
            self._names.add(stream)
            write_names(self._folder, sorted(self._names))

    def send(self, record: OutRecord) -> None:
        """Take a record. Raises `UnmaskError` (LOG_FENCED) if another has taken our place for good."""
        size = len(record.value or b"")
        with self._lock:
            if not self._choked:
                self._lock.wait_for(lambda: self._queued_bytes < QUEUE_BYTES or self._error, ROOM_S)
            if self._error is not None:
                raise self._error
            self._choked = self._queued_bytes >= QUEUE_BYTES
            if self._choked:
                self._drop("no room in memory")
                self._note_begun([record])
                return
            self._queue.append(record)
            self._queued_bytes += size
            self._taken += 1

    def flush(self, timeout: float) -> None:
        """Return when all that was sent is in the cluster or on disk; raises `UnmaskError` (LOG_AWAY)."""
        with self._lock:
            target = self._taken
            self._flushing += 1
            try:
                done = self._lock.wait_for(lambda: self._secure >= target or self._error, timeout)
            finally:
                self._flushing -= 1
            if self._error is not None:
                raise self._error
            if not done:
                left = target - self._secure
                raise UnmaskError(Code.LOG_AWAY, f"{left} records neither in the cluster nor on disk")

    @property
    def dropped(self) -> int:
        """Records lost: for want of space, or because others had taken their feed."""
        return sum(self._left_out.values()) + self._spool_lost

    @property
    def _spool_lost(self) -> int:
        return self._spool.lost if self._spool is not None else 0

    @property
    def spooled(self) -> int:
        """Records on disk that are not delivered yet."""
        return self._spool.unread if self._spool is not None else 0

    @property
    def drained(self) -> bool:
        """Whether everything that was ever sent, and was left over, is in the cluster."""
        return self.state is State.DIRECT and self._secure == self._taken

    def close(self, timeout: float) -> None:
        """Stop; what is not confirmed in time stays in the spool."""
        deadline = Deadline(timeout, self._clock)
        with suppress(UnmaskError):
            self.flush(deadline.left())
        self._stopping.set()
        self._thread.join(max(1.0, deadline.left()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(2.0)

    # The thread that moves records.

    def _run(self) -> None:
        try:
            while not self._stopping.is_set() and self._error is None:
                self._turn()
        except UnmaskError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("relay failed")
            self._fail(UnmaskError(Code.STAGE_WEDGED, f"relay failed: {type(error).__name__}"))
        finally:
            self._finish()

    def _fail(self, error: UnmaskError) -> None:
        with self._lock:
            self._error = error
            self._lock.notify_all()

    def _turn(self) -> None:
        if self.state is State.OPENING:
            self._open()
            return
        batch = self._take()
        self._settle()
        if self.state is State.DIRECT:
            self._pass_on(batch)
        else:
            self._spool_up(batch)
            self._deliver()
        with self._lock:
            if all(sent.offset is not None for sent in self._sent):
                self._secure = self._taken - len(self._queue)
            self._lock.notify_all()

    def _take(self) -> list[OutRecord]:
        # A nap, not a wait: whoever sends one record is about to send more.
        self._stopping.wait(LINGER_S)
        with self._lock:
            batch = list(self._queue)
            self._queue.clear()
            self._queued_bytes = 0
            return batch

    def _open(self) -> None:
        """Get hold of the spool and, unless nobody answers, of the cluster."""
        self._stopping.wait(LINGER_S)
        if self._spool is None:
            try:
                self._spool = Spool(self._folder, self._limit, self._clock)
            except UnmaskError as error:
                if not self._refused:
                    logger.warning("spool %s: %s", self._folder.name, error)
                self._refused = True
                self._stopping.wait(RETRY_S if error.code is not Code.LOG_LEASE else LINGER_S)
                return
        waited = self._clock.monotonic() - self._opened_at
        if self._far is None and waited < PATIENCE_S:
            return
        if self._far is None or self._spool.exists:
            self.state = State.SPOOLING
            logger.info("spool %s: %d records to deliver", self._folder.name, self._spool.unread)
            return
        self.state, self._cleared = State.DIRECT, True

    def _settle(self) -> None:
        """Forget what the producer has confirmed."""
        if self._far is None:
            return
        self._left_out["refused"] += self._far.dropped - self._far_dropped
        self._far_dropped = self._far.dropped
        assert self._spool is not None
        for _ in range(len(self._sent) - self._far.unfinished()):
            sent = self._sent.popleft()
            if sent.offset is not None:
                self._spool.delivered(sent.offset + 1)

    def _pass_on(self, batch: list[OutRecord]) -> None:
        for index, record in enumerate(batch):
            if not self._offer(record, None):
                self._turn_to_disk(batch[index:])
                return
        patience = HASTE_S if self._flushing else PATIENCE_S
        oldest = self._sent[0].at if self._sent else None
        if oldest is not None and self._clock.monotonic() - oldest > patience:
            self._turn_to_disk([])

    def _turn_to_disk(self, batch: list[OutRecord]) -> None:
        assert self._spool is not None
        logger.warning("the cluster does not answer: spooling to %s", self._folder)
        self.state, self._cleared = State.SPOOLING, False
        with self._lock:
            write_names(self._folder, sorted(self._names))
        first, stored = self._spool.append([sent.record for sent in self._sent])
        if stored == len(self._sent):
            for number, sent in enumerate(self._sent):
                sent.offset = first + number
            self._spool.skip(first + stored)
        self._spool_up(batch)

    def _spool_up(self, batch: list[OutRecord]) -> None:
        if not batch:
            return
        assert self._spool is not None
        _, stored = self._spool.append(batch)
        if stored < len(batch):
            self._drop("no room on disk", len(batch) - stored)
            self._note_begun(batch)

    def _deliver(self) -> None:
        """Send of the spool what fits; when all of it is confirmed, it has done its work."""
        assert self._spool is not None
        if self._far is None or self._far.away:
            self._cleared = False
            return
        if not self._cleared:
            return
        size = sum(len(sent.record.value or b"") for sent in self._sent)
        for _ in range(WINDOW_RECORDS - len(self._sent)):
            if size >= WINDOW_BYTES:
                return
            self._next = self._next or self._spool.following()
            if self._next is None:
                break
            offset, record = self._next
            if not self._offer(record, offset):
                return
            size += len(record.value or b"")
            self._next = None
        if self._sent or self._next is not None:
            return
        self._spool.delivered()
        if self._spool.unread <= 0:
            self._spool.clear()
            self.state = State.DIRECT
            logger.info("spool %s is delivered", self._folder.name)

    def _offer(self, record: OutRecord, offset: int | None) -> bool:
        """Hand a record to the producer; return False if it has to wait."""
        far = self._far
        assert far is not None
        stream = claimed(record.key) or record.key
        if stream in self._foreign:
            self._drop("taken by another member")
            return True
        gap = self._gap(record)
        for item in filter(None, [gap, record]):
            try:
                if not far.offer(self._placed(item, stream)):
                    return False
            except UnmaskError as error:
                if error.code is Code.LOG_FENCED:
                    raise
                # Told of records before this one; `dropped` has them.
                logger.error("%s", error)
                return False
            self._sent.append(_Sent(item, self._clock.monotonic(), offset if item is record else -1))
            self._note_reached(item)
        return True

    def _placed(self, record: OutRecord, stream: str) -> OutRecord:
        return replace(record, partition=media_partition(stream, self._counts[record.topic != self._media]))

    def _gap(self, record: OutRecord) -> OutRecord | None:
        """Return the control record that tells of records missing before this one, None if none are."""
        if record.topic != self._media:
            return None
        attachment, sequence = _order(record)
        before = self._reached.get(record.key)
        if sequence == 0 or (before is None and not self._spool_lost):
            return None
        # How many a predecessor had sent of what the spool let go of is not known.
        expected = sequence if before is None else before[1] + 1 if before[0] == attachment else 0
        if sequence <= expected and before is not None:
            return None
        missing = sequence - expected
        sentence = (
            f"{missing or 'some'} records were dropped: the cluster was away for longer than the spool could "
            "hold"
        )
        value = json.dumps(to_body(Gap(Code.LOG_AWAY, sentence, missing, None)), sort_keys=True).encode()
        meta = replace(
            decode_headers(record.key, record.headers),
            control=Control.GAP,
            sequence=sequence - 1,
            pts=None,
            starts_on_keyframe=False,
            codec=None,
            content_type=JSON,
            content_hash=content_hash(value),
            part=0,
            parts=1,
        )
        logger.error("stream %s: %s", record.key, sentence)
        return OutRecord(self._media, record.key, value, encode_headers(meta), self._clock.now_us())

    def _note_begun(self, dropped: Sequence[OutRecord]) -> None:
        """Note where streams begin of which nothing was sent before: what is dropped is missing there."""
        for record in dropped:
            if record.topic == self._media:
                attachment, sequence = _order(record)
                self._reached.setdefault(record.key, (attachment, sequence - 1))

    def _note_reached(self, record: OutRecord) -> None:
        if record.topic == self._media:
            self._reached[record.key] = _order(record)

    def _drop(self, why: str, count: int = 1) -> None:
        if not self._left_out[why]:
            logger.error("records are dropped: %s", why)
        self._left_out[why] += count

    def _finish(self) -> None:
        """Leave on disk what is not confirmed."""
        if self._far is not None:
            with suppress(UnmaskError):
                self._far.close(0.0 if self._far.away else HASTE_S)
        if self._spool is not None:
            self._spool.close()

    # The thread that talks to the cluster.

    def _stay_in_contact(self) -> None:
        told: str | None = None
        while not self._stopping.is_set():
            pause = CONTACT_S
            try:
                self._talk()
                told = None
            except UnmaskError as error:
                if told != error.code:
                    logger.warning("%s", error)
                told, pause = error.code, RETRY_S
            except Exception:
                logger.exception("relay contact failed")
                pause = RETRY_S
            self._stopping.wait(pause)
        self._thread.join()
        if self._log is not None:
            with suppress(UnmaskError):
                self._log.close()

    def _talk(self) -> None:
        if self._log is None:
            log, far = self._reach()
            self._counts = (
                log.partitions(self._media),
                log.partitions(topic_name(self._config, Topic.STATE)),
            )
            self._log, self._far = log, far
        if self._far is None or self._far.away:
            return
        if not self._cleared and self.state is State.SPOOLING:
            self._read_claims(self._log)
        self.offsets.refresh(self._log)

    def _read_claims(self, log: Log) -> None:
        with self._lock:
            names, known = set(self._names), dict(self._known)
        for stream, standing in read_standings(log, self._config, names).items():
            claim = standing.claim
            if claim.member not in ("", self._member) and claim.attachment > known.get(stream, ""):
                logger.warning("stream %s: another member reads it now", stream)
                with self._lock:
                    if self._known.get(stream) == known.get(stream):
                        self._foreign.add(stream)
        self._cleared = True


class Offsets:
    """What a shard asks the log about, as last heard of it: asking would wait while the cluster is away."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, TopicPartition], tuple[int, int, int | None]] = {}
        self._asked: set[tuple[str, TopicPartition]] = set()

    def ask(self, group: str, partition: TopicPartition) -> bool:
        """Return whether anything is known yet; from now on it is kept up to date."""
        self._asked.add((group, partition))
        return (group, partition) in self._known

    def refresh(self, log: Log) -> None:
        for group, partition in list(self._asked):
            position = log.group_position(group, partition)
            # The end after the position: what comes between counts as unread.
            self._known[group, partition] = (
                log.begin_offset(partition),
                log.end_offset(partition),
                position,
            )

    def begin_offset(self, partition: TopicPartition) -> int:
        return self._of(partition)[0]

    def end_offset(self, partition: TopicPartition) -> int:
        return self._of(partition)[1]

    def group_position(self, group: str, partition: TopicPartition) -> int | None:
        return self._known[group, partition][2]

    def _of(self, partition: TopicPartition) -> tuple[int, int, int | None]:
        return next(known for (_, asked), known in self._known.items() if asked == partition)


def _order(record: OutRecord) -> tuple[str, int]:
    return record.headers["attachment"].decode(), int(record.headers["sequence"])
