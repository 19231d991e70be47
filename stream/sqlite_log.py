"""The embedded log: one directory, any number of processes, nothing to install (DESIGN 3.1).

SQLite holds index, positions, state and small values; large values lie in segment files written before the
row that names them. A group has one member at a time, by lease; others wait.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from stream.clock import Clock
from stream.config import LogSettings
from stream.database import Database, check_local, translated
from stream.durable import sync_folder
from stream.lease import Instance, Lease
from stream.log import Listener, TopicPartition, TopicSpec, check_position
from stream.records import Record
from stream.reserve import set_aside, with_reserve
from stream.retention import Maintenance, Retention
from stream.sqlite_consumer import POLL_BYTES, SqliteConsumer
from stream.sqlite_producer import CLOSE_S, SqliteProducer
from stream.sqlite_rows import Catalog, Store, committed_position, create_topic

PAGE_RECORDS = 200
"""Rows that `read` fetches at a time: no read transaction lasts, so the WAL can start again."""


class SqliteLog:
    """The log in `directory` (made if missing), implementing `stream.log.Log`. Any thread may use it.

    Several processes may open one directory; each opens its own, and none is carried over a fork. A process
    stopped in the middle of a write holds up all others' until it goes on or dies. `clock` gives time of
    appending (for retention), lease expiry and the waits of `poll`. Raises `UnmaskError` (LOG_UNUSABLE) if
    the directory is on a remote file system or holds something else, (LOG_FULL) if there is no space.
    """

    def __init__(self, directory: Path, settings: LogSettings, clock: Clock) -> None:
        check_local(directory, Path("/proc/mounts").read_text().splitlines())
        with translated(directory), ExitStack() as undo:
            for path in (directory, directory / "segments", directory / "alive"):
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if settings.synchronous == "FULL":
                sync_folder(directory)
            instance = Instance(directory / "alive")
            undo.callback(instance.close)
            self._database = with_reserve(directory, lambda: Database(directory, settings.synchronous))
            undo.callback(self._database.close)
            catalog = Catalog(self._database)
            self._store = Store(directory, settings, clock, instance, catalog)
            self._retention(self._database).sweep()
            undo.pop_all()
        self._catalog = catalog
        self._lock = catalog.lock
        self._reader = self._store.reader(self._database)
        self._users: set[SqliteProducer | SqliteConsumer] = set()

    def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        with self._lock, self._database.write() as connection:
            for spec in specs:
                create_topic(connection, spec)
        self._catalog.forget()

    def partitions(self, topic: str) -> int:
        return len(self._catalog.topic(topic).partitions)

    def producer(self, name: str) -> SqliteProducer:
        producer = SqliteProducer(name, self._store, self._users.discard)
        self._users.add(producer)
        return producer

    def consumer(self, group: str, topics: Sequence[str], listener: Listener, member: str) -> SqliteConsumer:
        consumer = SqliteConsumer(group, topics, listener, member, self._store, self._users.discard)
        self._users.add(consumer)
        return consumer

    def read(self, partition: TopicPartition, start: int, stop: int | None = None) -> Iterator[Record]:
        place = self._catalog.partition(partition)
        with self._lock:
            first, following = self._reader.bounds(place)
        check_position(partition, start, first, following)
        return self._pages(partition, place, start, following if stop is None else min(stop, following))

    def begin_offset(self, partition: TopicPartition) -> int:
        return self._bounds(partition)[0]

    def end_offset(self, partition: TopicPartition) -> int:
        return self._bounds(partition)[1]

    def group_position(self, group: str, partition: TopicPartition) -> int | None:
        place = self._catalog.partition(partition)
        with self._lock:
            return committed_position(self._database, group, place)

    def holder(self, group: str) -> str | None:
        """Return the name of the member that holds `group` now, None if the next to come would get it."""
        lease = Lease(group, "", self._store.instance, self._store.settings.lease_s, self._store.clock)
        with self._lock:
            return lease.holder(self._database)

    def maintain(self) -> Maintenance:
        """Apply retention and compaction and give space back; for its owner to call every few seconds.

        Any process may, at any time. Raises `UnmaskError` (LOG_FULL, LOG_UNUSABLE); calling again goes on.
        """
        with translated(self._store.directory):
            done = with_reserve(self._store.directory, self._maintain)
            set_aside(self._store.directory)
        return done

    def close(self) -> None:
        """Close, after whatever is still open of it: producers flush, members leave."""
        with ExitStack() as steps:
            steps.callback(self._store.instance.close)
            steps.callback(self._close_database)
            for user in list(self._users):
                steps.callback(user.close, CLOSE_S)

    def _bounds(self, partition: TopicPartition) -> tuple[int, int]:
        place = self._catalog.partition(partition)
        with self._lock:
            return self._reader.bounds(place)

    def _pages(self, partition: TopicPartition, place: int, start: int, stop: int) -> Iterator[Record]:
        while start < stop:
            with self._lock:
                page = self._reader.fetch(partition, place, start, stop, PAGE_RECORDS, POLL_BYTES)
            if not page:
                return
            yield from page
            start = page[-1].offset + 1

    def _close_database(self) -> None:
        with self._lock:
            self._database.close()

    def _maintain(self) -> Maintenance:
        database = self._store.open_database()
        try:
            return self._retention(database).run()
        finally:
            database.close()

    def _retention(self, database: Database) -> Retention:
        return Retention(database, self._store.segments, self._store.instance, self._store.clock)
