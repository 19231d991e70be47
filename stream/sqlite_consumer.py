"""A member of a group over the embedded log: polls while it holds the lease, which each commit checks."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from enum import StrEnum

from stream.clock import Deadline
from stream.errors import Code, UnmaskError
from stream.lease import Heartbeat, Lease
from stream.log import Listener, PositionError, TopicPartition, check_position
from stream.records import OutRecord, Record
from stream.sqlite_rows import Store, committed_position

logger = logging.getLogger(__name__)

POLL_BYTES = 32 * 1024 * 1024
"""One poll returns no more than this beyond its first record, whatever the number of records."""

NAP_S = 0.01
"""An idle poll looks again after this: 100 looks a second take less than one percent of a core."""


class Standing(StrEnum):
    """A member's place in its group: WAITING <-> HOLDING, and from both to LEFT."""

    WAITING = "waiting"
    HOLDING = "holding"
    LEFT = "left"


class SqliteConsumer:
    """A member that has all partitions of its topics while it holds the group's lease, none otherwise."""

    def __init__(
        self,
        group: str,
        topics: Sequence[str],
        listener: Listener,
        member: str,
        store: Store,
        closed: Callable[["SqliteConsumer"], None],
    ) -> None:
        self._group = group
        self._listener = listener
        self._store = store
        self._closed = closed
        self._catalog = store.catalog
        self._clock = store.clock
        self._places = self._catalog.places(topics)
        self._lease = Lease(group, member, store.instance, store.settings.lease_s, store.clock)
        self._database = store.open_database()
        self._reader = store.reader(self._database)
        self._appender = store.appender()
        self._standing = Standing.WAITING
        self._heartbeat: Heartbeat | None = None
        self._positions: dict[TopicPartition, int] = {}
        self._paused: set[TopicPartition] = set()
        self._turn = 0
        self._idle_at: int | None = None
        """The database's data version at which there was nothing to poll."""

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        self._check_open()
        deadline = Deadline(timeout, self._clock)
        while True:
            records = self._fetch(max_records) if self._has_news() and self._holds() else []
            if records or deadline.passed():
                return records
            self._clock.sleep(min(NAP_S, deadline.left()))

    def assignment(self) -> frozenset[TopicPartition]:
        return frozenset(self._positions)

    def pause(self, partitions: Collection[TopicPartition]) -> None:
        self._check_assigned(partitions)
        self._paused.update(partitions)

    def resume(self, partitions: Collection[TopicPartition]) -> None:
        self._check_assigned(partitions)
        self._paused.difference_update(partitions)
        self._idle_at = None

    def committed(self, partition: TopicPartition) -> int | None:
        self._check_open()
        return committed_position(self._database, self._group, self._catalog.partition(partition))

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._check_assigned([partition])
        if offset < 0:
            raise ValueError(f"cannot seek {partition} to {offset}: offsets begin at 0")
        self._positions[partition] = offset
        self._idle_at = None

    def commit(self, outputs: Sequence[OutRecord], positions: Mapping[TopicPartition, int]) -> None:
        self._check_open()
        if self._standing is not Standing.HOLDING:
            raise self._fenced()
        self._check_assigned(positions)
        staged = self._appender.stage([self._catalog.place(record) for record in outputs])
        with self._database.write() as connection:
            if not self._lease.renew(connection):
                raise self._fenced()
            if staged:
                self._appender.insert(connection, staged)
            connection.executemany(
                "INSERT OR REPLACE INTO positions (consumers, partition, next) VALUES (?, ?, ?)",
                [(self._group, self._places[partition], offset) for partition, offset in positions.items()],
            )
        self._appender.settled()
        self._idle_at = None

    def close(self, timeout: float) -> None:
        if self._standing is Standing.LEFT:
            return
        try:
            self._leave()
        finally:
            self._standing = Standing.LEFT
            self._forget()
            with ExitStack() as steps:
                steps.callback(self._closed, self)
                steps.callback(self._database.close)
                steps.callback(self._lease.release, self._database)
                steps.callback(self._appender.close, self._database)

    def _leave(self) -> None:
        if self._standing is not Standing.HOLDING:
            return
        if self._lease.held(self._database):
            self._listener.revoked(self.assignment())
        else:
            self._listener.lost(self.assignment())

    def _has_news(self) -> bool:
        """Return whether anything was written by others since there was nothing to poll: a cheap look."""
        version = int(self._database.rows("PRAGMA data_version")[0][0])
        if self._standing is Standing.HOLDING and version == self._idle_at:
            return False
        self._idle_at = version
        return True

    def _holds(self) -> bool:
        if self._standing is Standing.HOLDING:
            if self._lease.held(self._database):
                return True
            self._lose()
        if not self._lease.acquire(self._database):
            return False
        self._enter()
        return True

    def _enter(self) -> None:
        self._standing = Standing.HOLDING
        self._heartbeat = Heartbeat(self._store.open_database(), self._lease, self._store.settings.lease_s)
        for partition, place in self._places.items():
            committed = committed_position(self._database, self._group, place)
            self._positions[partition] = self._reader.bounds(place)[0] if committed is None else committed
        logger.debug("group %s: %d partitions are ours", self._group, len(self._places))
        self._listener.assigned(self.assignment())

    def _lose(self) -> None:
        logger.warning("group %s: another member has taken over, waiting for it to end", self._group)
        partitions = self.assignment()
        self._standing = Standing.WAITING
        self._forget()
        self._listener.lost(partitions)

    def _forget(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        self._positions.clear()
        self._paused.clear()

    def _fetch(self, max_records: int) -> list[Record]:
        """Return what there is, another partition first each time, so that none starves the others."""
        ready = self._ready()
        self._turn += 1
        found: list[Record] = []
        size = POLL_BYTES
        for index in range(len(ready)):
            partition, stop = ready[(index + self._turn) % len(ready)]
            count = max_records - len(found)
            if count <= 0 or size <= 0:
                break
            start, place = self._positions[partition], self._places[partition]
            try:
                records = self._reader.fetch(partition, place, start, stop, count, size)
            except PositionError:
                self._idle_at = None
                if found:
                    break
                raise
            # Compaction may have left nothing between here and the end.
            self._positions[partition] = records[-1].offset + 1 if records else stop
            size -= sum(len(record.value or b"") for record in records)
            found += records
        if found:
            self._idle_at = None
        return found

    def _ready(self) -> list[tuple[TopicPartition, int]]:
        """Return the partitions that have records for us, with their end."""
        bounds = self._reader.all_bounds()
        ready = []
        for partition, position in self._positions.items():
            if partition in self._paused:
                continue
            first, following = bounds[self._places[partition]]
            try:
                check_position(partition, position, first, following)
            except PositionError:
                self._idle_at = None
                raise
            if position < following:
                ready.append((partition, following))
        return ready

    def _check_open(self) -> None:
        if self._standing is Standing.LEFT:
            raise ValueError(f"this member of group {self._group} is closed")

    def _check_assigned(self, partitions: Collection[TopicPartition]) -> None:
        foreign = [partition for partition in partitions if partition not in self._positions]
        if foreign:
            raise ValueError(f"group {self._group}: {foreign} not assigned to this member")

    def _fenced(self) -> UnmaskError:
        return UnmaskError(
            Code.LOG_FENCED,
            f"another member of group {self._group} has taken over: nothing was committed",
        )
