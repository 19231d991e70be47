"""Keeps the embedded log bounded: rows go in short transactions, then whole segment files (DESIGN 3.1).

Safe at any time from any process. Dying half-way leaves files without rows, which the next sweep removes.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from sqlite3 import Connection

from stream.clock import Clock
from stream.database import PARTITION_SHIFT, Database, translated
from stream.lease import Instance
from stream.log import Cleanup
from stream.segments import segment_instance

STEP_ROWS = 500
"""Rows per transaction: writers wait a few milliseconds for it."""

STEPS_PER_LIMIT = 64
"""A step for bytes removes at most this share of a topic's bound, so little more goes than must."""

TOMBSTONE_S = 3600.0
"""A deleted key's tombstone is kept this long, for readers that still know the key."""

KEEP_PAGES = 4096
"""Free pages (16 MiB) the database keeps for what comes next; more goes back to the file system."""

VACUUM_PAGES = 1000
VACUUM_STEPS = 16
"""One maintenance gives back 64 MiB at most, in steps of a few milliseconds."""


@dataclass(slots=True)
class Maintenance:
    """What one run removed: records by topic, of them those some group had not read, files."""

    removed: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    segments: int = 0
    orphans: int = 0


@dataclass(frozen=True, slots=True)
class _Topic:
    id: int
    name: str
    cleanup: Cleanup
    retention_s: float | None
    retention_bytes: int | None


class Retention:
    """One run over all topics. Owns `database` for as long as it runs."""

    def __init__(self, database: Database, segments: Path, instance: Instance, clock: Clock) -> None:
        self._database = database
        self._segments = segments
        self._instance = instance
        self._clock = clock
        self._done = Maintenance()

    def run(self) -> Maintenance:
        """Apply retention and compaction, remove what nothing names, give space back."""
        self._database.checkpoint()
        for row in self._database.rows("SELECT id, name, cleanup, retention_s, retention_bytes FROM topics"):
            topic = _Topic(row[0], row[1], Cleanup(row[2]), row[3], row[4])
            if topic.cleanup is Cleanup.COMPACT:
                self._tombstones(topic)
                continue
            self._by_age(topic)
            self._by_bytes(topic)
        self._reap()
        self.sweep()
        self._instance.sweep()
        for _ in range(VACUUM_STEPS):
            if not self._database.vacuum(KEEP_PAGES, VACUUM_PAGES):
                break
        self._database.checkpoint()
        return self._done

    def sweep(self) -> None:
        """Remove segment files that a dead writer left without a row."""
        with translated(self._segments):
            names = [path.name for path in self._segments.glob("*.seg")]
            # In this order: the dead add no rows, so what is not named now never will be.
            dead = {owner for owner in map(segment_instance, names) if not self._instance.alive(owner)}
            named = {row[0] for row in self._database.rows("SELECT name FROM segments")}
            for name in names:
                if segment_instance(name) in dead and name not in named:
                    (self._segments / name).unlink(missing_ok=True)
                    self._done.orphans += 1

    def _by_age(self, topic: _Topic) -> None:
        if topic.retention_s is None:
            return
        cutoff = self._clock.now_us() - round(topic.retention_s * 1e6)
        for partition, first, following in self._bounds(topic):
            base = partition << PARTITION_SHIFT
            young = self._database.rows(
                "SELECT id FROM records WHERE id >= ? AND id < ? AND appended_us >= ? ORDER BY id LIMIT 1",
                (base + first, base + following, cutoff),
            )
            stop = young[0][0] - base if young else following
            for step in range(first, stop, STEP_ROWS):
                self._remove(topic, partition, min(stop, step + STEP_ROWS))

    def _by_bytes(self, topic: _Topic) -> None:
        limit = topic.retention_bytes
        if limit is None:
            return
        # Files that writers hold open cannot go; deleting all their rows would not help.
        while self._on_disk(topic) > limit and self._live(topic) > limit // 2:
            oldest = self._database.rows(
                "SELECT p.id, p.first FROM partitions p JOIN records r ON r.id = (p.id << ?) + p.first "
                # One batch is appended at one time; within it, one file should be emptied after the other.
                "WHERE p.topic = ? ORDER BY r.appended_us, r.segment, r.start LIMIT 1",
                (PARTITION_SHIFT, topic.id),
            )
            if not oldest:
                return
            partition, first = oldest[0]
            self._remove(topic, partition, self._step(partition, first, limit // STEPS_PER_LIMIT))
            self._reap()

    def _step(self, partition: int, first: int, size: int) -> int:
        """Return the offset up to which rows of about `size` bytes, at least one, can go."""
        base = partition << PARTITION_SHIFT
        rows = self._database.rows(
            "SELECT size + ifnull(length, 0) FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
            (base + first, base + (1 << PARTITION_SHIFT), STEP_ROWS),
        )
        total, stop = 0, first
        for row in rows:
            total += row[0]
            stop += 1
            if total >= size:
                break
        return stop

    def _remove(self, topic: _Topic, partition: int, stop: int) -> None:
        """Delete a partition's records before offset `stop`."""
        base = partition << PARTITION_SHIFT
        with self._database.write() as connection:
            first = _value(connection, "SELECT first FROM partitions WHERE id = ?", partition)
            if stop <= first:
                return
            inline, stored = connection.execute(
                "SELECT total(size), total(length) FROM records WHERE id >= ? AND id < ?",
                (base + first, base + stop),
            ).fetchone()
            connection.execute("DELETE FROM records WHERE id >= ? AND id < ?", (base + first, base + stop))
            connection.execute(
                "UPDATE partitions SET first = ?, bytes = bytes - ?, stored = stored - ? WHERE id = ?",
                (stop, int(inline), int(stored), partition),
            )
            read = _value(connection, "SELECT min(next) FROM positions WHERE partition = ?", partition, stop)
        self._done.removed[topic.name] += stop - first
        self._done.unread[topic.name] += max(0, stop - max(first, read))

    def _tombstones(self, topic: _Topic) -> None:
        cutoff = self._clock.now_us() - round(TOMBSTONE_S * 1e6)
        with self._database.write() as connection:
            for partition, _, following in self._bounds(topic):
                base = partition << PARTITION_SHIFT
                old = connection.execute(
                    "SELECT id, key, size FROM records "
                    "WHERE id >= ? AND id < ? AND value IS NULL AND appended_us < ?",
                    (base, base + following, cutoff),
                ).fetchall()
                connection.executemany("DELETE FROM records WHERE id = ?", [(row[0],) for row in old])
                connection.executemany(
                    "DELETE FROM latest WHERE partition = ? AND key = ?", [(partition, row[1]) for row in old]
                )
                connection.execute(
                    "UPDATE partitions SET bytes = bytes - ? WHERE id = ?",
                    (sum(row[2] for row in old), partition),
                )
                self._done.removed[topic.name] += len(old)

    def _reap(self) -> None:
        """Delete segments that hold no record any more and get no more bytes."""
        empty = self._database.rows(
            "SELECT id, name, instance, sealed FROM segments "
            "WHERE NOT EXISTS (SELECT 1 FROM records WHERE records.segment = segments.id)"
        )
        finished = [row for row in empty if row[3] or not self._instance.alive(row[2])]
        if not finished:
            return
        with self._database.write() as connection:
            connection.executemany("DELETE FROM segments WHERE id = ?", [(row[0],) for row in finished])
        with translated(self._segments):
            for row in finished:
                (self._segments / row[1]).unlink(missing_ok=True)
                self._done.segments += 1

    def _bounds(self, topic: _Topic) -> list[tuple[int, int, int]]:
        rows = self._database.rows("SELECT id, first, next FROM partitions WHERE topic = ?", (topic.id,))
        return [(row[0], row[1], row[2]) for row in rows]

    def _live(self, topic: _Topic) -> int:
        sql = "SELECT total(bytes + stored) FROM partitions WHERE topic = ?"
        return int(self._database.rows(sql, (topic.id,))[0][0])

    def _on_disk(self, topic: _Topic) -> int:
        inline = self._database.rows("SELECT total(bytes) FROM partitions WHERE topic = ?", (topic.id,))
        names = self._database.rows("SELECT name FROM segments WHERE topic = ?", (topic.id,))
        return int(inline[0][0]) + sum(_file_size(self._segments / row[0]) for row in names)


def _value(connection: Connection, sql: str, argument: int, default: int = 0) -> int:
    found = connection.execute(sql, (argument,)).fetchone()[0]
    return default if found is None else int(found)


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
