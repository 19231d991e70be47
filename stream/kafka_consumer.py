"""A member of a Kafka consumer group: polls, and moves positions only in transactions (DESIGN 3.1).

kafka-python calls back about rebalances on its own thread, where a listener could neither ask the broker
for anything nor take its time. Here the listener is called by `poll`, on the caller's thread: kafka-python is
polled without waiting, what it tells is noted, and nothing more is asked of it, so that it cannot hand
partitions over, before the listener has returned. New partitions stay paused until then.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from enum import StrEnum
from functools import partial
from typing import Any

import kafka
from kafka import ConsumerRebalanceListener, KafkaConsumer, errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import MemberState

from stream.clock import Clock, Deadline
from stream.errors import Code, UnmaskError
from stream.kafka_client import REQUEST_S, Errand, KafkaClients, told, translated, within
from stream.kafka_offsets import KafkaOffsets
from stream.kafka_topics import KafkaTopics
from stream.kafka_transactions import ANSWER_S, FencedError, RejectedError, Transactions, UnknownError
from stream.log import Listener, PositionError, TopicPartition, check_position
from stream.records import OutRecord, Record

logger = logging.getLogger(__name__)

NAP_S = 0.02
"""An idle poll looks again after this, also while a rebalance goes on: 50 looks a second are three percent of
a core."""

POLL_BYTES = 32 * 1024 * 1024
"""One fetch brings no more than this, whatever the number of partitions."""

QUIET_S = 0.04
"""After a look that brought nothing kafka-python is left alone for so long: each look costs half a
millisecond and wakes its own thread, and a worker asks as often as it has a turn."""

FETCH_WAIT_MS = 250
"""How long the broker holds an empty fetch: a partition resumed in the meantime waits for it."""

HEARTBEATS = 4
"""Heartbeats in a session: three may be lost."""

MAX_POLL_INTERVAL_S = 60.0
"""A member whose heart beats but which does not poll for this long is dead: twice worker.stall_s, by which a
wedged worker has long left by itself."""

LEAVE_S = 1.0
"""Longest wait for the group's answer to a member that leaves because it was fenced."""

GENERATION_S = 5.0
"""Longest wait of a commit, begun in the middle of a rebalance, for the answer that makes it acceptable."""


AWAY_SHARE = 0.5
"""Of a session: this long without an answer, though two heartbeats were due, and the cluster is away."""

STOPPED_S = 1.0
"""Between two looks: longer and it was we who were stopped or busy, which says nothing of the cluster."""


class Standing(StrEnum):
    """A member's place: MEMBER -> FENCED -> REJOINING -> MEMBER (anew); MEMBER -> OUSTED, for good; from each
    to LEFT."""

    MEMBER = "member"
    FENCED = "fenced"
    REJOINING = "rejoining"
    OUSTED = "ousted"
    LEFT = "left"


class Change(StrEnum):
    ASSIGNED = "assigned"
    REVOKED = "revoked"
    LOST = "lost"


class _Ear:
    """Notes rebalances on kafka-python's thread; keeps new partitions still until they are dealt with."""

    def __init__(self) -> None:
        self.changes: deque[tuple[Change, frozenset[TopicPartition]]] = deque()
        self.consumer: Any = None

    def on_partitions_assigned(self, assigned: Collection[Any]) -> None:
        for partition in assigned:
            # A position, any, so that kafka-python does not look for one itself.
            self.consumer.seek(partition, 0)
            self.consumer.pause(partition)
        self._note(Change.ASSIGNED, assigned)

    def on_partitions_revoked(self, revoked: Collection[Any]) -> None:
        self._note(Change.REVOKED, revoked)

    def on_partitions_lost(self, lost: Collection[Any]) -> None:
        self._note(Change.LOST, lost)

    def _note(self, change: Change, partitions: Collection[Any]) -> None:
        if partitions:
            self.changes.append((change, frozenset(map(_ours, partitions))))


ConsumerRebalanceListener.register(_Ear)


class _Join:
    """An attempt to join, begun by one poll and to be taken up by the next, whether it has ended or not.

    kafka-python 3.0.12 begins another instead when the first has ended between two polls, and its answer is
    lost: a member that polls briefly would make the group rebalance without end.
    """

    is_done = False

    def __init__(self, task: Any) -> None:
        self.add_callback = task.add_callback
        self.add_errback = task.add_errback


class LogConsumer:
    """A member of `group`; `slot` is unique among its members and stable over restarts.

    `poll` never waits for the cluster longer than its timeout and `NAP_S`: what takes asking (positions of
    new partitions, joining anew) goes on in the background, heartbeats too. While the cluster does not
    answer, each `poll` that has nothing raises LOG_AWAY, once `AWAY_SHARE` of a session has passed.
    """

    def __init__(
        self,
        group: str,
        topics: Sequence[str],
        listener: Listener,
        slot: str,
        clients: KafkaClients,
        catalog: KafkaTopics,
        offsets: KafkaOffsets,
        clock: Clock,
        closed: Callable[["LogConsumer"], None],
    ) -> None:
        self._group = group
        self._topics = list(topics)
        self._listener = listener
        self._slot = slot
        self._clients = clients
        self._catalog = catalog
        self._offsets = offsets
        self._clock = clock
        self._closed = closed
        for topic in topics:
            catalog.count(topic)
        self._transactions = Transactions(clients, f"{group}.{slot}", catalog.max_message_bytes, clock)
        self._committed: dict[TopicPartition, int] = {}
        """The partitions that are ours, with the position that the group holds or would start at."""
        self._paused: set[TopicPartition] = set()
        self._ready: deque[Record] = deque()
        """Taken from kafka-python and not given out, because a listener's exception came between."""
        self._standing = Standing.MEMBER
        self._errand: Errand[Any] | None = None
        """What the next polls wait for; nobody else uses consumer and transactions in the meantime."""
        self._answered = self._looked = clock.monotonic()
        self._quiet_until = 0.0
        self._ear, self._consumer = self._connect()

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        self._check_open()
        deadline = Deadline(timeout, self._clock)
        while True:
            self._note_answer()
            self._turn(max_records)
            if self._ready:
                return [self._ready.popleft() for _ in range(min(max_records, len(self._ready)))]
            if deadline.passed():
                self._check_answered()
                return []
            self._clock.sleep(min(NAP_S, deadline.left()))

    def assignment(self) -> frozenset[TopicPartition]:
        return frozenset(self._committed)

    def pause(self, partitions: Collection[TopicPartition]) -> None:
        self._check_assigned(partitions)
        self._paused.update(partitions)
        self._consumer.pause(*self._held(partitions))

    def resume(self, partitions: Collection[TopicPartition]) -> None:
        self._check_assigned(partitions)
        self._paused.difference_update(partitions)
        self._consumer.resume(*self._held(partitions))

    def committed(self, partition: TopicPartition) -> int | None:
        self._check_open()
        self._catalog.check(partition)
        return self._position(partition)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._check_assigned([partition])
        if offset < 0:
            raise ValueError(f"cannot seek {partition} to {offset}: offsets begin at 0")
        for place in self._held([partition]):
            self._consumer.seek(place, offset)
        self._forget_ready({partition})

    def commit(self, outputs: Sequence[OutRecord], positions: Mapping[TopicPartition, int]) -> None:
        """As the log's contract says, within `COMMIT_BOUND_S` of `stream.kafka_transactions` and, if
        partitions are being taken over, `ANSWER_S` more. LOG_AWAY: surely nothing was written, try again with
        the same outputs or others. LOG_FENCED also if Kafka did not say whether it has committed: the state
        that is read after `Listener.lost` knows.
        """
        self._check_open()
        if self._errand is not None and not self._errand.ended(ANSWER_S):
            raise UnmaskError(
                Code.LOG_AWAY, f"group {self._group}: no answer in {ANSWER_S:g} s; nothing was written"
            )
        if self._standing is not Standing.MEMBER or not self._committed:
            raise self._fenced("it is no member now")
        self._check_assigned(positions)
        placed = [self._catalog.place(record) for record in outputs]
        # Only positions are checked against the group's generation: one is always sent.
        moved = dict(positions) or dict([next(iter(self._committed.items()))])
        offsets = {
            _theirs(partition): kafka.OffsetAndMetadata(offset, "", -1) for partition, offset in moved.items()
        }
        try:
            self._write(placed, offsets)
        except (FencedError, RejectedError, UnknownError) as error:
            self._standing = Standing.OUSTED if _for_good(error) else Standing.FENCED
            raise self._fenced(str(error)) from error
        self._committed.update(moved)

    def close(self, timeout: float) -> None:
        if self._standing is Standing.LEFT:
            return
        deadline = Deadline(timeout, self._clock)
        if self._errand is not None:
            self._errand.ended(deadline.left())
        try:
            if self._committed:
                self._tell_last()
        finally:
            self._standing = Standing.LEFT
            self._forget(self.assignment())
            with ExitStack() as steps:
                steps.callback(self._closed, self)
                steps.callback(lambda: self._transactions.close(deadline.left()))
                steps.callback(lambda: self._part(deadline.left()))

    def _tell_last(self) -> None:
        if self._standing is Standing.MEMBER and self._consumer.group_metadata().generation_id > 0:
            self._listener.revoked(self.assignment())
        else:
            self._listener.lost(self.assignment())

    def _connect(self) -> tuple[_Ear, Any]:
        """Return a consumer that knows the topics; what it hears of the group comes to the ear."""
        settings = self._clients.settings
        ear = _Ear()
        with translated(f"group {self._group} cannot be joined"):
            ear.consumer = self._clients.make(
                KafkaConsumer,
                group_id=self._group,
                client_id=self._slot,
                group_instance_id=self._slot if settings.member_id else None,
                partition_assignment_strategy=[CooperativeStickyAssignor],
                session_timeout_ms=round(settings.session_s * 1000),
                heartbeat_interval_ms=round(settings.session_s * 1000 / HEARTBEATS),
                max_poll_interval_ms=round(MAX_POLL_INTERVAL_S * 1000),
                isolation_level="read_committed",
                auto_offset_reset="none",
                enable_auto_commit=False,
                allow_auto_create_topics=False,
                fetch_max_wait_ms=FETCH_WAIT_MS,
                fetch_max_bytes=POLL_BYTES,
                max_partition_fetch_bytes=min(POLL_BYTES, self._catalog.max_message_bytes),
                metrics_enabled=False,
                bootstrap_timeout_ms=round(REQUEST_S * 1000),
            )
            try:
                ear.consumer.subscribe(self._topics, listener=ear)
                # kafka-python 3.0.12 forgets to ask for topics named while it asks for others, and then
                # assigns nothing for five minutes; this asks for those it does not know, and waits.
                within(REQUEST_S, lambda: list(map(ear.consumer.partitions_for_topic, self._topics)))
            except BaseException:
                ear.consumer.close(autocommit=False, timeout_ms=0)
                raise
        if self._standing is Standing.LEFT:
            ear.consumer.close(autocommit=False, timeout_ms=0)
        return ear, ear.consumer

    def _part(self, seconds: float) -> None:
        """Leave the group, unless the membership is static; what is said about that is no longer for us."""
        self._ear.changes.clear()
        try:
            self._consumer.close(autocommit=False, timeout_ms=round(seconds * 1000))
        except errors.KafkaError as error:
            logger.debug("leaving group %s: %s", self._group, error)
        self._ear.changes.clear()

    def _turn(self, max_records: int) -> None:
        """Let kafka-python do what it can without waiting, then tell the listener."""
        if self._standing is Standing.FENCED:
            self._drop_out()
            self._standing = Standing.REJOINING
        if self._standing is Standing.REJOINING and not self._rejoined():
            return
        if self._standing is Standing.OUSTED:
            self._drop_out()
            raise self._fenced(f"another process is member {self._slot}, this one must stop")
        if not self._ear.changes and not self._ready and self._clock.monotonic() >= self._quiet_until:
            self._fetch(max_records)
        self._tell()

    def _rejoined(self) -> bool:
        if not self._have(self._connect):
            return False
        self._ear, self._consumer = self._result()
        self._answered = self._clock.monotonic()
        self._standing = Standing.MEMBER
        return True

    def _have(self, call: Callable[[], object]) -> bool:
        """Return whether the errand, begun with `call` if there is none, has ended; waits for a moment."""
        if self._errand is None:
            self._errand = Errand(call)
        return self._errand.ended(NAP_S)

    def _result(self) -> Any:
        """Return or raise what the errand did; the next one may begin."""
        errand, self._errand = self._errand, None
        assert errand is not None
        return errand.result()

    def _check_answered(self) -> None:
        """Raise `UnmaskError` (LOG_AWAY) while the coordinator of the group has not answered for too long."""
        silent = self._looked - self._answered
        if silent > AWAY_SHARE * self._clients.settings.session_s:
            raise UnmaskError(Code.LOG_AWAY, f"group {self._group}: no answer for {silent:.0f} s")

    def _note_answer(self) -> None:
        now = self._clock.monotonic()
        stopped = now - self._looked > STOPPED_S
        self._looked = now
        self._answered = now if stopped else max(self._answered, self._last_answer(now))

    def _last_answer(self, now: float) -> float:
        if self._standing is not Standing.MEMBER:
            return 0.0
        coordinator = self._consumer._coordinator
        if coordinator.coordinator_id is None:
            return 0.0
        if not coordinator.stable():
            return now  # it answers a member that joins when the others have come
        return float(max(coordinator.heartbeat.last_receive, coordinator.heartbeat.last_reset))

    def _fetch(self, max_records: int) -> None:
        self._free_slot()
        try:
            found = self._consumer.poll(timeout_ms=0, max_records=max_records)
        except errors.FencedInstanceIdError:
            self._standing = Standing.OUSTED
        except errors.OffsetOutOfRangeError as error:
            self._raise_position(next(iter(error.args[0].items())))
        except errors.LogTruncationError as error:
            partition, place = next(iter(error.divergent_offsets.items()))
            raise self._truncated(_ours(partition), place) from error
        except errors.RetriableError as error:
            logger.debug("group %s: %s", self._group, error)
        except errors.KafkaError as error:
            raise told(f"group {self._group}", error) from error
        else:
            for records in found.values():
                self._ready.extend(map(record_of, records))
            self._quiet_until = 0.0 if found else self._clock.monotonic() + QUIET_S
        finally:
            self._keep_join()

    def _free_slot(self) -> None:
        """Let go of a fetch that was read to its end.

        kafka-python 3.0.12 keeps it, and then never takes up again what it had of a partition that was paused
        in the meantime: such a partition stands still for good.
        """
        fetcher = self._consumer._fetcher
        if not fetcher._next_partition_records:
            fetcher._next_partition_records = None

    def _keep_join(self) -> None:
        coordinator = self._consumer._coordinator
        if coordinator._join_task is not None and not isinstance(coordinator._join_task, _Join):
            coordinator._join_task = _Join(coordinator._join_task)

    def _raise_position(self, where: tuple[Any, int]) -> None:
        """Raise `PositionError`; nothing if what was read of in the meantime holds the position."""
        partition, position = _ours(where[0]), where[1]
        check_position(partition, position, self._offsets.begin(partition), self._offsets.end(partition))

    def _truncated(self, partition: TopicPartition, place: Any) -> PositionError:
        return PositionError(
            Code.LOG_POSITION,
            f"Kafka has lost records of {partition.topic}/{partition.partition} that were read already (an "
            "unclean election of a leader)",
            partition,
            self._offsets.end(partition) if place is None else place.offset,
        )

    def _tell(self) -> None:
        """Deal with what was noted, in order; what fails is tried again by the next poll."""
        while self._ear.changes:
            change, partitions = self._ear.changes[0]
            if change is Change.ASSIGNED:
                if not self._have(partial(self._positions, partitions)):
                    return
                self._take_over(self._result())
                self._listener.assigned(partitions)
                self._consumer.resume(*map(_theirs, partitions - self._paused))
                self._ear.changes.popleft()
                continue
            self._ear.changes.popleft()
            if change is Change.REVOKED:
                self._give_up(partitions & self.assignment())
            else:
                self._lose(partitions & self.assignment())

    def _give_up(self, partitions: frozenset[TopicPartition]) -> None:
        try:
            if partitions:
                self._listener.revoked(partitions)
        finally:
            self._forget(partitions)

    def _take_over(self, positions: Mapping[TopicPartition, int]) -> None:
        for partition, position in positions.items():
            self._consumer.seek(_theirs(partition), position)
            self._committed[partition] = position

    def _positions(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        """Return where each partition starts."""
        # First, so that a transaction which our predecessor left open does not hold the positions back.
        self._transactions.open()
        found: dict[TopicPartition, int] = {}
        for partition in sorted(partitions):
            position = self._position(partition)
            found[partition] = self._offsets.begin(partition) if position is None else position
        return found

    def _position(self, partition: TopicPartition) -> int | None:
        """Return the group's position once no transaction is about to move it."""
        with translated(f"position of group {self._group} in {partition.topic} cannot be read"):
            found: int | None = self._consumer.committed(
                _theirs(partition), timeout_ms=round(REQUEST_S * 1000)
            )
        return found

    def _lose(self, partitions: frozenset[TopicPartition]) -> None:
        logger.warning("group %s: our partitions went to other members", self._group)
        self._forget(partitions)
        if partitions:
            self._listener.lost(partitions)

    def _drop_out(self) -> None:
        """Forget everything; whatever of ours Kafka may still know ends here."""
        self._errand = None
        self._part(LEAVE_S)
        self._transactions.close(0.0)
        self._lose(self.assignment())

    def _write(self, placed: Sequence[Any], offsets: Mapping[Any, Any]) -> None:
        """Write, again when a rebalance has given us a new generation while we sent the old one.

        We are still the owner then: partitions leave us by `revoked` alone.
        """
        deadline = Deadline(GENERATION_S, self._clock)
        while True:
            group = self._consumer.group_metadata()
            if group.generation_id <= 0:
                raise FencedError("the group has forgotten this member", successor=False)
            try:
                return self._transactions.write(placed, offsets, group)
            except RejectedError as error:
                if error.ousted or not self._follows(group, deadline):
                    raise

    def _follows(self, group: Any, deadline: Deadline) -> bool:
        """Wait for a generation after that of `group`; False if there will be none for this member."""
        while not deadline.passed():
            now = self._consumer.group_metadata()
            if now.member_id != group.member_id:
                return False
            if now.generation_id > group.generation_id:
                return True
            if now.state != MemberState.REBALANCING:
                return False
            self._clock.sleep(NAP_S)
        return False

    def _held(self, partitions: Collection[TopicPartition]) -> list[Any]:
        """Return the partitions that kafka-python still has: it hands over before `revoked` is told."""
        held = self._consumer.assignment()
        return [place for place in map(_theirs, partitions) if place in held]

    def _forget(self, partitions: Collection[TopicPartition]) -> None:
        for partition in partitions:
            self._committed.pop(partition, None)
        self._paused.difference_update(partitions)
        self._forget_ready(partitions)

    def _forget_ready(self, partitions: Collection[TopicPartition]) -> None:
        kept = [r for r in self._ready if TopicPartition(r.topic, r.partition) not in partitions]
        self._ready = deque(kept)

    def _check_open(self) -> None:
        if self._standing is Standing.LEFT:
            raise ValueError(f"this member of group {self._group} is closed")

    def _check_assigned(self, partitions: Collection[TopicPartition]) -> None:
        foreign = [partition for partition in partitions if partition not in self._committed]
        if foreign:
            raise ValueError(f"group {self._group}: {foreign} not assigned to this member")

    def _fenced(self, reason: str) -> UnmaskError:
        return UnmaskError(Code.LOG_FENCED, f"another member of group {self._group} has taken over: {reason}")


def _for_good(error: Exception) -> bool:
    """Return whether another process has our place; coming back would only take it away again."""
    match error:
        case FencedError():
            return error.successor
        case RejectedError():
            return error.ousted
        case _:
            return False


def record_of(found: Any) -> Record:
    """Return what kafka-python read as ours; of foreign writers a missing key is empty."""
    return Record(
        topic=found.topic,
        partition=found.partition,
        offset=found.offset,
        key=(found.key or b"").decode("utf-8", "replace"),
        value=found.value,
        headers={name: value or b"" for name, value in found.headers},
        timestamp_us=found.timestamp * 1000,
    )


def _ours(partition: Any) -> TopicPartition:
    return TopicPartition(partition.topic, partition.partition)


def _theirs(partition: TopicPartition) -> Any:
    return kafka.TopicPartition(partition.topic, partition.partition)
