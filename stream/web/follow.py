"""Reads the topics that the pages need, again and again, in no group (DESIGN 3.1).

Two threads: one keeps the view current, the other adds up coverage, which at the start reads all scores
that the log holds. A log that is away is borne for ever, and said.
"""

import json
import logging
import math
import threading
import uuid
from collections.abc import Callable, Iterator

from stream.clock import Clock
from stream.config import Config
from stream.controls import Retract
from stream.decisions import WRITE_S, Sample, write
from stream.errors import Code, UnmaskError
from stream.log import Log, PositionError, TopicPartition, partitions_of
from stream.records import OutRecord, Record, Topic, is_canary, is_replay
from stream.retract import command, withdrawal
from stream.topics import topic_name
from stream.web.incidents import Incident
from stream.web.view import View

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between looks at the topics: pages are told as often."""

AWAY_S = 2.0
"""Between looks at a log that is away."""

SCORES_TAIL = 4_000
"""Scores per partition read at the start for the wall: a minute of 25 feeds at two pictures a second. All
else of them is only added up."""

PICTURES_TAIL = 200
"""Pictures per partition read at the start: the newest of each feed is among them."""

ASK_AGAIN_S = 30.0
"""Between requests to withdraw the same incident: longer than detect needs, a rebalance included."""

MAX_ASKED = 10_000

AT_ONCE, BREATH_S = 500, 0.02
"""Scores that coverage takes at once, and for how long it then stands back: within `watch` it shares an
interpreter with detect, which must not wait while a month of scores is added up."""


class Cursor:
    """Where a topic was read up to."""

    def __init__(self, log: Log, topic: str, tail: int | None = None) -> None:
        """Begins `tail` records before the end, or at the beginning of the topic."""
        self._log = log
        self._tail = tail
        self.topic = topic
        self._next: dict[TopicPartition, int] = {}
        self.skipped = 0
        """Times that what was to be read next was gone or damaged."""

    def new(self, at_most: int | None = None) -> Iterator[Record]:
        """Yield what was not read yet. Raises `UnmaskError` as the log does; what was yielded counts."""
        left = at_most
        for partition in partitions_of(self._log, self.topic):
            start = self._next.get(partition)
            if start is None:
                start = self._first(partition)
                self._next[partition] = start
            if start >= self._log.end_offset(partition):
                continue
            for record in self._read(partition, start):
                self._next[partition] = record.offset + 1
                yield record
                left = None if left is None else left - 1
                if left == 0:
                    return

    def share(self) -> float:
        """Return how much of what the topic holds was read, 0..1."""
        held = read = 0
        for partition in partitions_of(self._log, self.topic):
            begin, end = self._log.begin_offset(partition), self._log.end_offset(partition)
            held += end - begin
            read += max(0, min(self._next.get(partition, begin), end) - begin)
        return read / held if held else 1.0

    def _first(self, partition: TopicPartition) -> int:
        begin = self._log.begin_offset(partition)
        return begin if self._tail is None else max(begin, self._log.end_offset(partition) - self._tail)

    def _read(self, partition: TopicPartition, start: int) -> Iterator[Record]:
        try:
            yield from self._log.read(partition, start)
        except PositionError as error:
            self.skipped += 1
            logger.warning("%s; going on at %d", error, error.resume_at)
            self._next[partition] = error.resume_at


class Follower:
    """Keeps a view current until `stop`."""

    def __init__(self, config: Config, log: Log, clock: Clock, view: View) -> None:
        self._config = config
        self._log = log
        self._clock = clock
        self._asked: dict[str, float] = {}
        """When the withdrawal of an incident was last asked for, on the monotonic clock."""
        self._view = view
        self._stopping = threading.Event()
        self._sources = self._cursor(Topic.SOURCES)
        self._decisions = self._cursor(Topic.DECISIONS)
        self._alerts = self._cursor(Topic.ALERTS)
        self._scores = self._cursor(Topic.SCORES, SCORES_TAIL)
        self._pictures = self._cursor(Topic.PICTURES, PICTURES_TAIL)
        self._all_scores = self._cursor(Topic.SCORES)
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"unmask-web-{name}", daemon=True)
            for name, work in (("view", self.look), ("coverage", self.add_up))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float) -> bool:
        """End both threads; return whether they ended in time."""
        self._stopping.set()
        started = [thread for thread in self._threads if thread.ident is not None]
        for thread in started:
            thread.join(timeout / len(started))
        return not any(thread.is_alive() for thread in started)

    def look(self) -> None:
        """Take in what is new in every topic but what only coverage needs. Raises as the log does."""
        view = self._view
        count = self._log.partitions(self._sources.topic)
        for record in self._sources.new():
            view.on_source(record, count)
        # Decisions first: an incident is shown with what was decided of it, and no face is drawn twice.
        for record in self._decisions.new():
            view.on_decision(record)
        for record in self._alerts.new():
            view.on_alert(record)
        for record in self._scores.new():
            view.on_score(record)
            if self._stopping.is_set():
                return
        drawn: list[Sample] = []
        for record in self._pictures.new():
            drawn += view.on_picture(record)
        if drawn:
            write(self._config, self._log, *drawn)
        self._withdraw()
        view.tick()
        view.away, view.ready = None, True

    def _withdraw(self) -> None:
        """Let what was dismissed be withdrawn: open, by detect; closed, here. Again and again until it is, by
        whoever is there: a page that asked may be gone, and so may have been this process."""
        now = self._clock.monotonic()
        for incident, reason in self._view.dismissed():
            if now - self._asked.get(incident.id, -math.inf) < ASK_AGAIN_S:
                continue
            self._asked[incident.id] = now
            if len(self._asked) > MAX_ASKED:
                self._asked.clear()
            record = self._withdrawal(incident, reason)
            if record is not None:
                with self._log.producer(f"web-{uuid.uuid4().hex[:12]}") as producer:
                    producer.send(record)
                    producer.flush(WRITE_S)

    def _withdrawal(self, incident: Incident, reason: str) -> OutRecord | None:
        now_us = self._clock.now_us()
        if incident.status == "open":
            return command(self._config, incident.stream, Retract(incident.id, reason), now_us)
        partition, offset = incident.places[-1]
        try:
            record = next(self._log.read(partition, offset, offset + 1), None)
            return withdrawal(record, reason, now_us) if record is not None else None
        except PositionError:
            logger.warning("incident %s cannot be withdrawn: its events are gone", incident.id)
            return None

    def add_up(self) -> None:
        """Add what is new to coverage. Raises as the log does."""
        more = True
        while more and not self._stopping.wait(BREATH_S):
            count = 0
            for record in self._all_scores.new(AT_ONCE):
                count += 1
                self._add(record)
            more = count == AT_ONCE
            if more or self._view.ledger_share < 1.0:
                self._view.ledger_share = self._all_scores.share()

    def _add(self, record: Record) -> None:
        if is_canary(record.key) or is_replay(record.key):
            return
        try:
            with self._view.ledger_lock:
                self._view.ledger.add(_value(record))
        except (KeyError, TypeError, ValueError):
            self._view.unreadable += 1

    def _cursor(self, topic: Topic, tail: int | None = None) -> Cursor:
        return Cursor(self._log, topic_name(self._config, topic), tail)

    def _run(self, work: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            pause = LOOK_S
            try:
                work()
            except UnmaskError as error:
                pause = self._bear(error)
            except Exception:
                logger.exception("the web interface cannot follow the log, trying again")
                pause = AWAY_S
            self._stopping.wait(pause)

    def _bear(self, error: UnmaskError) -> float:
        if self._view.away is None and not self._stopping.is_set():
            level = logging.WARNING if error.code is Code.LOG_AWAY else logging.ERROR
            logger.log(level, "the web interface cannot read the log, trying again: %s", error)
        self._view.away = str(error)
        self._view.tick()
        return AWAY_S


def _value(record: Record) -> dict[str, object]:
    found = json.loads(record.value or b"null")
    if not isinstance(found, dict):
        raise ValueError("a scores record is no JSON object")
    return found
