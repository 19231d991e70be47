"""Rows and values of the embedded log: where records are placed, how they are written and read."""

import json
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection

from stream.clock import Clock
from stream.config import LogSettings
from stream.database import PARTITION_SHIFT, Database, Row
from stream.errors import Code, UnmaskError
from stream.lease import Instance
from stream.log import Cleanup, PositionError, TopicPartition, TopicSpec, check_position
from stream.records import OutRecord, Record
from stream.segments import SegmentReader, SegmentWriter, Span, segment_name

ROW_BYTES = 64
"""What a row costs beside its key, headers and value, about."""

INLINE_BYTES = 8 * 1024
"""Smaller values live in the database: a segment entry would cost more than two pages do."""

SEGMENTS_PER_RETENTION = 16
"""Segments are at most this share of a topic's bytes, so that retention moves in small steps."""

LEAST_SEGMENT_BYTES = 64 * 1024

COLUMNS = "r.id, r.timestamp_us, r.key, r.headers, r.value, r.size, r.start, r.length, r.crc, s.id, s.name"
SELECT = f"SELECT {COLUMNS} FROM records r LEFT JOIN segments s ON s.id = r.segment"


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic with the ids that the database knows it by."""

    id: int
    spec: TopicSpec
    partitions: tuple[int, ...]
    """Ids of the partitions, by number."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A record with its place decided and its value, if large, in a segment."""

    record: OutRecord
    topic: Topic
    partition: int
    span: Span | None


class Catalog:
    """Topics by name, as known to this process. A topic once seen never changes its partitions."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.lock = threading.Lock()
        """Guards `database`."""
        self._topics: dict[str, Topic] = {}

    def topic(self, name: str) -> Topic:
        known = self._topics.get(name)
        if known is not None:
            return known
        with self.lock:
            return self._load(name)

    def partition(self, partition: TopicPartition) -> int:
        topic = self.topic(partition.topic)
        if 0 <= partition.partition < len(topic.partitions):
            return topic.partitions[partition.partition]
        raise UnmaskError(
            Code.LOG_UNUSABLE,
            f"topic {partition.topic} has no partition {partition.partition}: it has {len(topic.partitions)}",
        )

    def places(self, topics: Sequence[str]) -> dict[TopicPartition, int]:
        """Return all partitions of `topics` with their ids."""
        return {
            TopicPartition(name, number): place
            for name in topics
            for number, place in enumerate(self.topic(name).partitions)
        }

    def place(self, record: OutRecord) -> Staged:
        """Return the record with its partition chosen: the one it names, else by the key's CRC-32."""
        topic = self.topic(record.topic)
        number = record.partition
        if number is None:
            number = zlib.crc32(record.key.encode()) % len(topic.partitions)
        return Staged(record, topic, self.partition(TopicPartition(record.topic, number)), None)

    def forget(self) -> None:
        """Read topics anew: their retention may have changed."""
        self._topics = {}

    def _load(self, name: str) -> Topic:
        found = self._database.rows(
            "SELECT id, cleanup, retention_s, retention_bytes FROM topics WHERE name = ?", (name,)
        )
        if not found:
            raise UnmaskError(Code.LOG_UNUSABLE, f"the log has no topic {name}: create_topics makes it")
        topic, cleanup, seconds, size = found[0]
        ids = self._database.rows("SELECT id FROM partitions WHERE topic = ? ORDER BY number", (topic,))
        spec = TopicSpec(name, len(ids), Cleanup(cleanup), seconds, size)
        loaded = Topic(topic, spec, tuple(row[0] for row in ids))
        self._topics[name] = loaded
        return loaded


class Appender:
    """Writes batches: large values to segments first, then rows in the caller's transaction.

    Used by one thread.
    """

    def __init__(self, segments: Path, instance: Instance, settings: LogSettings, clock: Clock) -> None:
        self._segments = segments
        self._instance = instance
        self._settings = settings
        self._clock = clock
        self._writers: dict[int, SegmentWriter] = {}

    def stage(self, batch: Sequence[Staged]) -> list[Staged]:
        """Return the batch with every large value written; no row names them yet."""
        large: dict[int, list[int]] = {}
        for index, item in enumerate(batch):
            value = item.record.value
            if value is not None and len(value) >= INLINE_BYTES and item.topic.spec.cleanup is Cleanup.DELETE:
                large.setdefault(item.topic.id, []).append(index)
        staged = list(batch)
        for indexes in large.values():
            writer = self._writer(staged[indexes[0]].topic)
            spans = writer.append([staged[index].record.value or b"" for index in indexes])
            for index, span in zip(indexes, spans, strict=True):
                item = staged[index]
                staged[index] = Staged(item.record, item.topic, item.partition, span)
        return staged

    def insert(self, connection: Connection, batch: Sequence[Staged]) -> None:
        """Add the rows, in order. Only a commit makes them exist."""
        self._name_segments(connection, batch)
        growth: dict[int, _Growth] = {}
        rows = []
        now = self._clock.now_us()
        for item in batch:
            if item.partition not in growth:
                growth[item.partition] = _Growth(_next_offset(connection, item.partition))
            rows.append(_row(item, growth[item.partition].add(item), now))
        connection.executemany(f"INSERT INTO records VALUES ({','.join('?' * len(rows[0]))})", rows)
        connection.executemany(
            "UPDATE partitions SET next = ?, bytes = bytes + ?, stored = stored + ? WHERE id = ?",
            [(grown.next, grown.bytes, grown.stored, partition) for partition, grown in growth.items()],
        )
        for item, row in zip(batch, rows, strict=True):
            if item.topic.spec.cleanup is Cleanup.COMPACT:
                _supersede(connection, item, row[0])

    def settled(self) -> None:
        """The transaction is committed: what it said of full segments need not be said again."""
        for writer in self._writers.values():
            writer.full.clear()

    def close(self, database: Database) -> None:
        """Give the segments up, so that retention can have them."""
        for writer in self._writers.values():
            writer.seal()
        if any(writer.full for writer in self._writers.values()):
            with database.write() as connection:
                self._name_full(connection)
        self._writers.clear()

    def _writer(self, topic: Topic) -> SegmentWriter:
        if topic.id not in self._writers:
            limit = self._settings.segment_bytes
            if topic.spec.retention_bytes is not None:
                limit = min(limit, topic.spec.retention_bytes // SEGMENTS_PER_RETENTION)
            self._writers[topic.id] = SegmentWriter(
                self._segments,
                self._instance.name,
                max(limit, LEAST_SEGMENT_BYTES),
                self._settings.synchronous == "FULL",
            )
        return self._writers[topic.id]

    def _name_segments(self, connection: Connection, batch: Sequence[Staged]) -> None:
        used = {(item.span.segment, item.topic.id) for item in batch if item.span is not None}
        for segment, topic in used:
            name = segment_name(self._instance.name, segment)
            connection.execute(
                "INSERT OR IGNORE INTO segments (id, topic, name, instance) VALUES (?, ?, ?, ?)",
                (segment, topic, name, self._instance.name),
            )
        self._name_full(connection)

    def _name_full(self, connection: Connection) -> None:
        for writer in self._writers.values():
            for segment in writer.full:
                connection.execute("UPDATE segments SET sealed = 1 WHERE id = ?", (segment,))


class _Growth:
    """What one transaction adds to one partition."""

    def __init__(self, following: int) -> None:
        self.next = following
        self.bytes = 0
        self.stored = 0

    def add(self, item: Staged) -> int:
        """Return the offset of `item`."""
        offset = self.next
        self.next += 1
        self.bytes += _inline_size(item)
        self.stored += 0 if item.span is None else item.span.length
        return offset


def _next_offset(connection: Connection, partition: int) -> int:
    return int(connection.execute("SELECT next FROM partitions WHERE id = ?", (partition,)).fetchone()[0])


def _inline_size(item: Staged) -> int:
    record = item.record
    value = 0 if record.value is None or item.span is not None else len(record.value)
    headers = sum(len(name) + len(text) for name, text in record.headers.items())
    return ROW_BYTES + len(record.key) + headers + value


def _row(item: Staged, offset: int, now_us: int) -> tuple[object, ...]:
    record, span = item.record, item.span
    # Latin-1 maps each byte to one character, so JSON carries any header value.
    headers = json.dumps({name: value.decode("latin-1") for name, value in record.headers.items()})
    place = (None, None, None, None) if span is None else (span.segment, span.start, span.length, span.crc)
    return (
        (item.partition << PARTITION_SHIFT) + offset,
        record.timestamp_us,
        now_us,
        _inline_size(item),
        *place,
        record.key,
        headers,
        None if span is not None else record.value,
    )


def _supersede(connection: Connection, item: Staged, record: object) -> None:
    """Remove the record that `item` replaces: a compacted topic is compact at once and stays small."""
    place = (item.partition, item.record.key)
    old = connection.execute("SELECT record FROM latest WHERE partition = ? AND key = ?", place).fetchone()
    if old is not None:
        connection.execute(
            "UPDATE partitions SET bytes = bytes - (SELECT size FROM records WHERE id = ?) WHERE id = ?",
            (old[0], item.partition),
        )
        connection.execute("DELETE FROM records WHERE id = ?", old)
    connection.execute(
        "INSERT OR REPLACE INTO latest (partition, key, record) VALUES (?, ?, ?)", (*place, record)
    )


class Reader:
    """Reads records of one partition at a time. Used by one thread at a time."""

    def __init__(self, database: Database, segments: Path) -> None:
        self._database = database
        self._segments = segments

    def fetch(
        self, partition: TopicPartition, place: int, start: int, stop: int, records: int, size: int
    ) -> list[Record]:
        """Return the next records from offset `start` up to `stop`: at most `records`, about `size` bytes.

        Raises `PositionError` if the first of them cannot be had; those before a damaged one are returned.
        """
        base = place << PARTITION_SHIFT
        rows: list[Row] = []
        for row in self._database.each(
            f"{SELECT} WHERE r.id >= ? AND r.id < ? ORDER BY r.id LIMIT ?",
            (base + start, base + stop, records),
        ):
            size -= row[5] + (row[7] or 0)
            if rows and size < 0:
                break
            rows.append(row)
        found: list[Record] = []
        with SegmentReader(self._segments) as reader:
            for row in rows:
                value = (
                    row[4] if row[9] is None else reader.read(row[10], Span(row[9], row[6], row[7], row[8]))
                )
                if row[9] is not None and value is None:
                    break
                headers = {name: text.encode("latin-1") for name, text in json.loads(row[3]).items()}
                found.append(Record(*_of(partition), row[0] - base, row[2], value, headers, row[1]))
        # After the rows: retention only moves on, so what it had not reached now was all there before.
        self._check_kept(partition, place, start)
        if rows and not found:
            raise _damaged(partition, rows[0][0] - base, rows[0][10])
        return found

    def bounds(self, place: int) -> tuple[int, int]:
        """Return the first offset kept and the next to be written."""
        rows = self._database.rows("SELECT first, next FROM partitions WHERE id = ?", (place,))
        return rows[0][0], rows[0][1]

    def all_bounds(self) -> dict[int, tuple[int, int]]:
        """Return the same for every partition, by id."""
        rows = self._database.rows("SELECT id, first, next FROM partitions")
        return {row[0]: (row[1], row[2]) for row in rows}

    def _check_kept(self, partition: TopicPartition, place: int, position: int) -> None:
        check_position(partition, position, *self.bounds(place))


def _damaged(partition: TopicPartition, offset: int, name: str) -> PositionError:
    return PositionError(
        Code.LOG_UNUSABLE,
        f"record {offset} of {partition.topic}/{partition.partition} is damaged: segment file {name} does "
        "not hold what was written (power was lost with log.synchronous NORMAL, or the disk is failing)",
        partition,
        offset + 1,
    )


def _of(partition: TopicPartition) -> tuple[str, int]:
    return partition.topic, partition.partition


def committed_position(database: Database, group: str, place: int) -> int | None:
    """Return a group's position in the partition with id `place`."""
    rows = database.rows("SELECT next FROM positions WHERE consumers = ? AND partition = ?", (group, place))
    return rows[0][0] if rows else None


def create_topic(connection: Connection, spec: TopicSpec) -> None:
    found = connection.execute(
        "SELECT id, partitions, cleanup FROM topics WHERE name = ?", (spec.name,)
    ).fetchone()
    if found is not None:
        _check_same(spec, found[1], found[2])
        connection.execute(
            "UPDATE topics SET retention_s = ?, retention_bytes = ? WHERE id = ?",
            (spec.retention_s, spec.retention_bytes, found[0]),
        )
        return
    cursor = connection.execute(
        "INSERT INTO topics (name, partitions, cleanup, retention_s, retention_bytes) VALUES (?, ?, ?, ?, ?)",
        (spec.name, spec.partitions, spec.cleanup.value, spec.retention_s, spec.retention_bytes),
    )
    connection.executemany(
        "INSERT INTO partitions (topic, number) VALUES (?, ?)",
        [(cursor.lastrowid, number) for number in range(spec.partitions)],
    )


def _check_same(spec: TopicSpec, partitions: int, cleanup: str) -> None:
    differences = []
    if partitions != spec.partitions:
        differences.append(f"{partitions} partitions, not {spec.partitions}")
    if cleanup != spec.cleanup:
        differences.append(f"cleanup {cleanup}, not {spec.cleanup}")
    if differences:
        raise UnmaskError(
            Code.LOG_UNUSABLE,
            f"topic {spec.name} exists with {' and '.join(differences)}, which is fixed at creation: change "
            "the setting back or use another data_dir",
        )


@dataclass(frozen=True, slots=True)
class Store:
    """One open log directory, as its producers and members need it."""

    directory: Path
    settings: LogSettings
    clock: Clock
    instance: Instance
    catalog: Catalog

    @property
    def segments(self) -> Path:
        return self.directory / "segments"

    def open_database(self) -> Database:
        return Database(self.directory, self.settings.synchronous)

    def appender(self) -> Appender:
        return Appender(self.segments, self.instance, self.settings, self.clock)

    def reader(self, database: Database) -> Reader:
        return Reader(database, self.segments)
