"""One sink: reads alerts as a group of its own, decides, delivers, tries again (docs/sinks.md).

A thread and a group for each sink: one that hangs or is away delays no other, and how far each has come is
what the log says of its group. All of it is at least once: position and state move in one transaction after
the attempt, so a process that dies in between tries again, under the same id.
"""

import logging
import random
import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from enum import StrEnum

from stream.alerts import CloudEvent
from stream.backoff import Backoff
from stream.clock import Clock
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.log import Consumer, Log, PositionError, TopicPartition
from stream.records import Record, Topic, split_stream_id
from stream.sinks.choice import Labels, Rate, reaches, wants
from stream.sinks.delivery import Outcome, Result, Target
from stream.sinks.metrics import SinkMetrics
from stream.sinks.settings import Sink
from stream.sinks.state import (
    Alert,
    Held,
    HeldBack,
    Part,
    Waiting,
    Writes,
    alert_of,
    read_part,
    remembered,
)
from stream.topics import topic_name
from stream.windows import MICRO

logger = logging.getLogger(__name__)

NAP_S = 0.1
"""Between looks at the log when there is nothing to do."""

RETRY_S = 2.0
"""Between tries while the log is away."""

COMMIT_S = 1.0
"""What was looked at and not sent is committed this often; what was sent at once."""

AWAY_FIRST_S, AWAY_MAX_S = 1.0, 300.0
"""A receiver that is away is tried again after the first wait, which doubles up to the last: it costs one
attempt in five minutes, and all is delivered within that of its return."""

RETRY_AFTER_MAX_S = 3600.0
"""A receiver may ask for no more patience than this."""

JITTER = 0.3
"""Share of each wait that is left to chance, so that many senders do not come back at one moment."""

REFUSED_S = (5.0, 60.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0)
"""Waits of one alert that a working receiver did not take; the last is repeated until `give_up_s`."""

MAX_WAITING = 1000
"""Alerts that wait; beyond, the others stay in the log, where they are safe and seen as lag."""

DISABLED_LOOK_S = 5.0
"""How often a sink that was told to stop looks whether it was enabled again."""

MISMATCH_TRIES = 10
"""A position that is not the one of the state is looked at again so often: the transaction that moves both
may just be ending. Then somebody has moved it on purpose."""


class Dropped(StrEnum):
    """Why an alert is not delivered."""

    FILTERED = "filtered"
    MUTED = "muted"
    """Of a feed that somebody muted (`stream.decisions`)."""
    DUPLICATE = "duplicate"
    NOT_TOLD = "not_told"
    """Withdrawn, of an incident that the receiver never heard of."""
    SUPERSEDED = "superseded"
    """Of an incident that was withdrawn while this waited."""
    EXPIRED = "expired"
    UNREADABLE = "unreadable"
    RETENTION = "retention"
    """Deleted from the log before it was looked at, or while it waited."""


class SinkLoop:
    """One sink. `run` is the thread's; it is also the listener of its consumer, on that thread."""

    def __init__(
        self,
        name: str,
        settings: Sink,
        target: Target,
        log: Log,
        config: Config,
        labels: Labels,
        muted: Callable[[str], bool],
        clock: Clock,
        rng: random.Random,
        metrics: SinkMetrics,
        member: str,
    ) -> None:
        self.name = name
        self.group = group_of(config, name)
        self._settings = settings
        self._target = target
        self._log = log
        self._labels = labels
        self._muted = muted
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._member = member
        self._alerts = topic_name(config, Topic.ALERTS)
        self._states = topic_name(config, Topic.DELIVERIES)
        self._source = f"/unmask/{config.prefix}"
        self._keep_us = round(config.log.records_retention_s * MICRO)
        self._quiet = settings.quiet.hours() if settings.quiet else None
        self._rate = Rate(settings.flood)
        self._backoff = Backoff(AWAY_FIRST_S, AWAY_MAX_S, JITTER, rng)
        self._away_until_us = 0
        self._consumer: Consumer | None = None
        self._fresh: set[int] = set()
        """Partitions that are ours and whose state is not read yet."""
        self._tries = 0
        self._parts: dict[int, Part] = {}
        self._writes = Writes(self._states, name)
        self._positions: dict[TopicPartition, int] = {}
        self._sent = False
        """Something was sent since the last commit."""
        self._committed_at = clock.monotonic()
        self._looked_at = clock.monotonic()
        self._taking: bool | None = None
        self.turned_at = clock.monotonic()
        self.works = False
        """The last turn of the loop had no trouble with the log."""
        metrics.up.labels(name).set(1)
        metrics.disabled.labels(name).set(0)
        metrics.delivered.labels(name)

    # The loop

    def run(self, stopping: threading.Event, leave_s: Callable[[], float]) -> None:
        """Work until `stopping` is set, then leave the group within `leave_s()` seconds; never raises."""
        while not stopping.is_set():
            pause_s = self._turn()
            if pause_s:
                stopping.wait(pause_s)
        self._leave(leave_s())
        with suppress(Exception):
            self._target.close()

    def _turn(self) -> float:
        """Do one step; return how long to wait before the next."""
        try:
            busy = self.step()
            self.works = True
            return 0.0 if busy else NAP_S
        except UnmaskError as error:
            self.works = False
            logger.warning("sink %s: %s; trying again", self.name, error)
            if error.code not in (Code.LOG_AWAY, Code.LOG_FENCED):
                self._leave(0.0)
        except Exception:
            # The sink's own fault must not end it for good, nor anything else.
            self.works = False
            logger.exception("sink %s failed, beginning anew", self.name)
            self._leave(0.0)
        return RETRY_S

    def step(self) -> bool:
        """Take at most one new alert and make at most one further attempt; return whether there was one.

        Raises `UnmaskError` as the log does.
        """
        self.turned_at = self._clock.monotonic()
        self._metrics.turn.labels(self.name).set(self._clock.now_us() / MICRO)
        consumer = self._joined()
        if self._sent:
            self._commit()
        self._load(consumer)
        self._look_if_enabled()
        self._open_or_shut(consumer)
        records = self._poll(consumer)
        for record in records:
            self._take(consumer, record)
        tried = self._try_waiting()
        self._tell_held()
        self._give_up()
        if (self._writes or self._positions) and self._clock.monotonic() - self._committed_at >= COMMIT_S:
            self._commit()
        return bool(records) or tried

    def _poll(self, consumer: Consumer) -> Iterable[Record]:
        try:
            return consumer.poll(1, 0.0)
        except PositionError as error:
            lost = max(1, error.resume_at - self._next(error.partition))
            self._drop(Dropped.RETENTION, lost)
            logger.error("sink %s: %s; going on behind it", self.name, error)
            consumer.seek(error.partition, error.resume_at)
            self._move(error.partition.partition, error.resume_at)
            return []

    def _next(self, where: TopicPartition) -> int:
        return self._positions.get(where, self._parts[where.partition].position or 0)

    def _open_or_shut(self, consumer: Consumer) -> None:
        """Take nothing new while it could not be sent, or before what has waited; the log keeps it."""
        takes = not self._stands_still() and self._waiting_count() < MAX_WAITING and self._due() is None
        if takes == self._taking or self._fresh:
            return
        mine = consumer.assignment()
        (consumer.resume if takes else consumer.pause)(mine)
        self._taking = takes

    def _stands_still(self) -> bool:
        # A clock that was set back must not make an hour of a second.
        wait_us = self._away_until_us - self._clock.now_us()
        return self._disabled() or 0 < wait_us <= RETRY_AFTER_MAX_S * MICRO

    def _disabled(self) -> bool:
        return any(part.disabled is not None for part in self._parts.values())

    def _waiting_count(self) -> int:
        count = sum(len(part.waiting) for part in self._parts.values())
        self._metrics.waiting.labels(self.name).set(count)
        return count

    # What is new

    def _take(self, consumer: Consumer, record: Record) -> None:
        """Decide what becomes of a record, and send it if that is it."""
        part = self._parts[record.partition]
        try:
            alert = alert_of(record)
        except (UnmaskError, ValueError) as error:
            self._move(record.partition, record.offset + 1)
            self._unreadable(record, error)
            return
        try:
            unwanted = self._unwanted(part, alert)
        except UnmaskError:
            # Labels and mutes cannot be asked for now: the record is taken again.
            consumer.seek(TopicPartition(record.topic, record.partition), record.offset)
            raise
        self._move(record.partition, record.offset + 1)
        try:
            self._decide(part, alert, unwanted)
        except UnmaskError:
            raise
        except Exception as error:
            # Our own fault, which would come again with the record.
            logger.exception("sink %s failed", self.name)
            self._unreadable(record, error)

    def _unwanted(self, part: Part, alert: Alert) -> Dropped | None:
        """Who was told of an incident is told the rest of it."""
        if alert.incident in part.told:
            return None
        if not wants(self._settings.only, alert, self._labels):
            return Dropped.FILTERED
        # What is decoded again is muted with its feed.
        return Dropped.MUTED if self._muted(split_stream_id(alert.stream)[0]) else None

    def _unreadable(self, record: Record, error: Exception) -> None:
        self._drop(Dropped.UNREADABLE)
        where = f"{record.topic}/{record.partition}/{record.offset}"
        logger.error("sink %s: %s cannot be read: %s", self.name, where, error)

    def _decide(self, part: Part, alert: Alert, unwanted: Dropped | None) -> None:
        if part.see(alert.id):
            self._drop(Dropped.DUPLICATE)
        elif alert.retracted:
            self._take_retraction(part, alert)
        elif unwanted is not None:
            self._drop(unwanted)
        elif self._clock.now_us() - alert.written_us > self._settings.give_up_s * MICRO:
            self._drop(Dropped.EXPIRED)
        elif (why := self._too_much(alert)) is not None:
            self._hold(part, alert, why)
        else:
            self._rate.note(self._clock.monotonic())
            self._send(part, alert)

    def _take_retraction(self, part: Part, alert: Alert) -> None:
        """Tell it to whoever was told of the incident, whatever the hour and however much there is."""
        incident = str(alert.incident)
        for item in [item for item in part.waiting.values() if item.incident == incident]:
            self._forget(alert.partition, part, item)
            self._drop(Dropped.SUPERSEDED)
        if incident in part.told:
            self._send(part, alert)
        elif part.held is not None and incident in part.held.incidents:
            self._hold(part, alert, Held.QUIET if Held.QUIET.value in part.held.reasons else Held.FLOOD)
        else:
            self._drop(Dropped.NOT_TOLD)

    def _too_much(self, alert: Alert) -> Held | None:
        quiet = self._settings.quiet
        if quiet is not None and not reaches(alert.severity, quiet.below) and self._is_quiet():
            return Held.QUIET
        return Held.FLOOD if self._rate.full(self._clock.monotonic()) else None

    def _is_quiet(self) -> bool:
        return self._quiet is not None and self._quiet.until_us(self._clock.now_us()) is not None

    def _hold(self, part: Part, alert: Alert, why: Held) -> None:
        now = self._clock.now_us()
        part.held = part.held or HeldBack(now, now)
        part.held.add(alert, why, now)
        self._writes.held(alert.partition, part.held)
        self._metrics.held_back.labels(self.name, why.value).inc()

    def _send(self, part: Part, alert: Alert) -> None:
        now = self._clock.now_us()
        item = Waiting(alert.id, alert.offset, alert.incident, now, now)
        if self._behind_another(part, item) or self._stands_still():
            part.waiting[item.id] = item
            self._writes.waiting(alert.partition, item.id, item)
            return
        self._attempt(alert.partition, part, item, alert.event, alert.written_us)

    @staticmethod
    def _behind_another(part: Part, item: Waiting) -> bool:
        """Whether an earlier event of the same incident waits: they are told in order."""
        return item.incident is not None and any(
            other.incident == item.incident for other in part.waiting.values()
        )

    # Attempts

    def _try_waiting(self) -> bool:
        """Make one attempt at what is due; return whether there was any."""
        due = self._due()
        if due is None:
            return False
        number, part, item = due
        found = self._event_of(number, item)
        if found is None:
            self._forget(number, part, item)
            self._drop(Dropped.RETENTION)
        else:
            self._attempt(number, part, item, *found)
        return True

    def _due(self) -> tuple[int, Part, Waiting] | None:
        """Return what has waited long enough, with its partition."""
        if self._stands_still():
            return None
        now = self._clock.now_us()
        for number, part in self._parts.items():
            behind: set[str] = set()
            for item in part.waiting.values():
                if item.next_us <= now and item.incident not in behind:
                    return number, part, item
                if item.incident is not None:
                    behind.add(item.incident)
        return None

    def _event_of(self, number: int, item: Waiting) -> tuple[CloudEvent, int] | None:
        """Return what waits, with when it was written; None if the log has lost it."""
        if item.event is not None:
            return CloudEvent(item.event["attributes"], item.event["data"]), item.first_us
        with suppress(PositionError):
            for record in self._log.read(TopicPartition(self._alerts, number), item.offset, item.offset + 1):
                return alert_of(record).event, record.timestamp_us
        return None

    def _attempt(self, number: int, part: Part, item: Waiting, event: CloudEvent, written_us: int) -> None:
        result = self._deliver(event)
        now = self._clock.now_us()
        item.attempts += 1
        self._sent = True
        if item.incident is not None:
            self._note_told(number, part, item.incident, now)
        if result.outcome is Outcome.DELIVERED:
            self._delivered(number, part, item, event, max(0.0, (now - written_us) / MICRO))
        else:
            self._failed(number, part, item, result, now)
        self._commit()

    def _note_told(self, number: int, part: Part, incident: str, now: int) -> None:
        """Whatever became of the attempt: a receiver may have taken what it says it did not."""
        part.told[incident] = now
        self._writes.told(number, incident, now)

    def _deliver(self, event: CloudEvent) -> Result:
        try:
            return self._target.deliver(event)
        except Exception as error:
            logger.exception("sink %s: an attempt failed", self.name)
            return Result(Outcome.AWAY, "error", type(error).__name__)

    def _delivered(self, number: int, part: Part, item: Waiting, event: CloudEvent, delay_s: float) -> None:
        self._metrics.delivered.labels(self.name).inc()
        self._metrics.delay.labels(self.name).observe(delay_s)
        self._forget(number, part, item)
        if event.data.get("event") == "retracted" and item.incident is not None:
            # Over: nothing more will be said of it.
            part.told.pop(item.incident, None)
            self._writes.told(number, item.incident, None)
        self._answered()

    def _failed(self, number: int, part: Part, item: Waiting, result: Result, now: int) -> None:
        self._metrics.failed.labels(self.name, result.reason).inc()
        logger.warning(
            "sink %s: %s not delivered, attempt %d: %s", self.name, item.id, item.attempts, result.detail
        )
        item.away = result.outcome is Outcome.AWAY
        item.next_us = now + round(self._wait_s(item, result) * MICRO)
        if item.away:
            self._away_until_us = item.next_us
            self._metrics.up.labels(self.name).set(0)
        elif result.outcome is Outcome.GONE:
            item.next_us = now
            self._disable()
        else:
            self._answered()
        part.waiting[item.id] = item
        self._writes.waiting(number, item.id, item)

    def _wait_s(self, item: Waiting, result: Result) -> float:
        asked = min(result.retry_after_s or 0.0, RETRY_AFTER_MAX_S)
        if result.outcome is Outcome.AWAY:
            return max(asked, self._backoff.wait_s())
        planned = REFUSED_S[min(item.attempts, len(REFUSED_S)) - 1]
        return max(asked, planned * (1 + JITTER * (self._rng.random() - 0.5)))

    def _answered(self) -> None:
        """The receiver is there: whatever waits for it to come back is due."""
        self._metrics.up.labels(self.name).set(1)
        self._backoff.reset()
        self._away_until_us = 0
        now = self._clock.now_us()
        for part in self._parts.values():
            for item in part.waiting.values():
                if item.away:
                    item.away, item.next_us = False, now

    def _disable(self) -> None:
        identity = self._target.identity()
        for number, part in self._parts.items():
            part.disabled = identity
            self._writes.disabled(number, identity)
        self._metrics.disabled.labels(self.name).set(1)
        logger.error(
            "sink %s: the receiver is gone (410) and gets nothing more; unmask sinks enable %s, or another "
            "address, makes it get what has waited",
            self.name,
            self.name,
        )

    def _look_if_enabled(self) -> None:
        now = self._clock.monotonic()
        if not self._disabled() or now - self._looked_at < DISABLED_LOOK_S:
            return
        self._looked_at = now
        for number, part in self._parts.items():
            part.disabled = read_part(self._log, TopicPartition(self._states, number), self.name).disabled
        if not self._disabled():
            self._metrics.disabled.labels(self.name).set(0)
            logger.info("sink %s: enabled again", self.name)

    def _give_up(self) -> None:
        now, limit = self._clock.now_us(), round(self._settings.give_up_s * MICRO)
        for number, part in self._parts.items():
            for item in [item for item in part.waiting.values() if now - item.first_us > limit]:
                self._forget(number, part, item)
                self._drop(Dropped.EXPIRED)
                logger.error(
                    "sink %s: %s given up after %d attempts in %g s",
                    self.name,
                    item.id,
                    item.attempts,
                    self._settings.give_up_s,
                )

    def _forget(self, number: int, part: Part, item: Waiting) -> None:
        if part.waiting.pop(item.id, None) is not None:
            self._writes.waiting(number, item.id, None)

    # What was held back

    def _tell_held(self) -> None:
        """Make one message of what was held back, once the hours are over and the flood is."""
        holding = {number: part.held for number, part in self._parts.items() if part.held is not None}
        if not holding or self._stands_still() or self._is_quiet():
            return
        now = self._clock.now_us()
        flooded = any(Held.FLOOD.value in held.reasons for held in holding.values())
        since = min(held.since_us for held in holding.values())
        if flooded and now - since < self._settings.flood.within_s * MICRO:
            return
        first = min(holding)
        told = HeldBack(since, since)
        for number, held in holding.items():
            told.merge(held)
            self._parts[number].held = None
            self._writes.held(number, None)
        for number, held in holding.items():
            for incident in held.incidents.keys() & told.incidents.keys():
                self._note_told(number, self._parts[number], incident, now)
        where = TopicPartition(self._alerts, first)
        event = told.said(self.name, f"{self.name}.{first}.{self._next(where)}.held_back", self._source)
        made = {"attributes": dict(event.attributes), "data": dict(event.data)}
        item = Waiting(event.attributes["id"], self._next(where), None, now, now, event=made)
        self._parts[first].waiting[item.id] = item
        self._writes.waiting(first, item.id, item)
        self._commit()

    # The log

    def _joined(self) -> Consumer:
        if self._consumer is None:
            self._consumer = self._log.consumer(self.group, [self._alerts], self, self._member)
        return self._consumer

    def assigned(self, partitions: Collection[TopicPartition]) -> None:
        """Take nothing of new partitions before their state is read."""
        assert self._consumer is not None
        self._consumer.pause(partitions)
        self._taking = None
        self._tries = 0
        self._fresh |= {partition.partition for partition in partitions}

    def revoked(self, partitions: Collection[TopicPartition]) -> None:
        """Write what is not written and let the partitions go."""
        try:
            self._commit()
        except UnmaskError as error:
            logger.warning("sink %s: %s; the last alerts may be sent twice", self.name, error)
        self.lost(partitions)

    def lost(self, partitions: Collection[TopicPartition]) -> None:
        """Forget partitions that are another's."""
        for partition in partitions:
            self._fresh.discard(partition.partition)
            self._parts.pop(partition.partition, None)
            self._positions.pop(partition, None)
            self._writes.forget(partition.partition)

    def _load(self, consumer: Consumer) -> None:
        """Read the state of new partitions. Raises `UnmaskError` as the log does: tried again then."""
        for number in sorted(self._fresh):
            where = TopicPartition(self._alerts, number)
            part = read_part(self._log, TopicPartition(self._states, number), self.name)
            committed = consumer.committed(where)
            if None not in (committed, part.position) and committed != part.position:
                self._tries += 1
                if self._tries < MISMATCH_TRIES:
                    raise UnmaskError(Code.LOG_AWAY, f"{where} is at {committed}, its state {part.position}")
                logger.warning("sink %s: somebody moved it to %s in %s", self.name, committed, where)
            self._begin(consumer, where, part, committed)
            self._fresh.discard(number)
            self._taking = None

    def _begin(self, consumer: Consumer, where: TopicPartition, part: Part, committed: int | None) -> None:
        """Go on where the state says; a sink that is new begins with what is written from now on."""
        known = part.position if committed is None else committed
        position = self._log.end_offset(where) if known is None else known
        begin = self._log.begin_offset(where)
        part.position = position
        for name in remembered(self._log, where, position):
            part.see(name)
        self._parts[where.partition] = part
        self._forget_old(where.partition, part)
        if part.disabled is not None and part.disabled != self._target.identity():
            part.disabled = None
            self._writes.disabled(where.partition, None)
        self._metrics.disabled.labels(self.name).set(int(self._disabled()))
        away = [item.next_us for item in part.waiting.values() if item.away]
        if away:
            limit = self._clock.now_us() + round(RETRY_AFTER_MAX_S * MICRO)
            self._away_until_us = max(self._away_until_us, min(*away, limit))
        if known is None or position < begin:
            if known is not None:
                self._drop(Dropped.RETENTION, begin - position)
            position = max(position, begin)
            self._move(where.partition, position)
            self._commit()
        consumer.seek(where, position)

    def _forget_old(self, number: int, part: Part) -> None:
        """An incident that the log has forgotten is never withdrawn any more."""
        cutoff = self._clock.now_us() - self._keep_us
        for incident in [incident for incident, told_us in part.told.items() if told_us < cutoff]:
            del part.told[incident]
            self._writes.told(number, incident, None)

    def _move(self, number: int, position: int) -> None:
        self._positions[TopicPartition(self._alerts, number)] = position
        self._writes.position(number, position)

    def _commit(self) -> None:
        """Write state and positions in one transaction. Raises `UnmaskError`; what was not written, stays."""
        if self._consumer is None or not (self._writes or self._positions):
            return
        positions = dict(self._positions)
        try:
            self._consumer.commit(self._writes.records(self._clock.now_us()), positions)
        except UnmaskError as error:
            if error.code is Code.LOG_FENCED:
                self._forget_all()
            raise
        for where, position in positions.items():
            self._parts[where.partition].position = position
        self._positions.clear()
        self._writes.clear()
        self._sent = False
        self._committed_at = self._clock.monotonic()

    def _forget_all(self) -> None:
        """Others may know better: everything is read anew, once partitions are assigned again."""
        self._parts.clear()
        self._positions.clear()
        self._writes.clear()
        self._fresh.clear()
        self._sent = False
        self._taking = None

    def _leave(self, seconds: float) -> None:
        if self._consumer is None:
            return
        try:
            self._consumer.close(seconds)
        except Exception as error:
            logger.warning("sink %s, leaving the group: %s", self.name, error)
        self._consumer = None
        self._forget_all()

    def _drop(self, why: Dropped, count: int = 1) -> None:
        self._metrics.dropped.labels(self.name, why.value).inc(count)


def group_of(config: Config, sink: str) -> str:
    """Return the group by which a sink reads the alerts."""
    return f"{config.prefix}-sink-{sink}"
