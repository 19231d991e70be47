"""Where ingest keeps what the cluster cannot take now: an embedded log per shard (DESIGN 3.1, 3.9).

`<data_dir>/ingest/<number>/` belongs to one ingest process at a time, the first free number is taken; in it a
spool per shard, by slot, and beside it the names of the streams in it. What a process leaves behind when it
is killed is delivered by the next one that takes the number.
"""

import fcntl
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from stream.clock import Clock
from stream.config import LogSettings
from stream.database import translated
from stream.errors import Code, UnmaskError
from stream.log import Cleanup, PositionError, TopicPartition, TopicSpec
from stream.records import SCHEMA, OutRecord, Record
from stream.sqlite_log import SqliteLog
from stream.sqlite_producer import SqliteProducer

logger = logging.getLogger(__name__)

RECORDS = TopicPartition("spool", 0)
PLACE = TopicPartition("delivered", 0)
PLACE_KEY = "next"
TOPIC_HEADER = "spool-topic"
"""Where a record goes when the cluster is back."""

WRITE_S = 10.0
"""Longest wait for the disk; what it has not taken by then counts as dropped."""

PLACE_S = 0.5
"""How often is written what was delivered: after a kill so much comes again, and detect drops it."""

STEPS = 64
"""Bounds are looked at each time this share of them was written."""


class Home:
    """The folder of one process, kept to itself by a lock while it lives, and the name by which it is a
    member of its group."""

    def __init__(self, root: Path) -> None:
        """Take the first free folder under `root`. Raises `UnmaskError` (LOG_UNUSABLE, LOG_FULL)."""
        with translated(root):
            number = 0
            while (lock := _lock(root / str(number) / "lock")) is None:
                number += 1
            self._lock = lock
            self.folder = root / str(number)
            self.member = self._name()

    def slot(self, name: str) -> Path:
        """Return the folder of a shard's spool; it need not exist."""
        return self.folder / f"{name}.spool"

    def left_over(self) -> dict[str, list[str]]:
        """Return the slots whose spool was not delivered whole, with the streams in them."""
        return {path.stem: names_in(path) for path in sorted(self.folder.glob("*.spool"))}

    def close(self) -> None:
        os.close(self._lock)

    def _name(self) -> str:
        path = self.folder / "member"
        if not path.exists():
            path.with_suffix(".new").write_text(secrets.token_hex(4))
            path.with_suffix(".new").rename(path)
        return path.read_text()


def names_in(folder: Path) -> list[str]:
    """Return the streams that the shard of this spool had."""
    try:
        return list(map(str, json.loads(_names(folder).read_bytes())))
    except (OSError, ValueError):
        return []


def write_names(folder: Path, names: Sequence[str]) -> None:
    """Note the streams of the shard of this spool; a disk without space for that is told and borne."""
    new = _names(folder).with_suffix(".new")
    try:
        new.write_text(json.dumps(list(names)))
        new.rename(_names(folder))
    except OSError as error:
        logger.warning("names beside %s cannot be written: %s", folder, error)


class Spool:
    """Records in order, on disk, bounded: the oldest go first. For one thread.

    Raises `UnmaskError`: LOG_LEASE if another process has the folder, LOG_FULL and LOG_UNUSABLE of the disk.
    """

    def __init__(self, folder: Path, limit_bytes: int, clock: Clock) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._clock = clock
        self.lost = 0
        """Records that were removed for the bound before they were delivered."""
        self._log: SqliteLog | None = None
        self._cursor = self._delivered = self._noted = self._end = 0
        self._noted_at = clock.monotonic()
        self._since_look = 0
        self._failing = False
        with translated(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder.with_suffix(".lock"))
        if lock is None:
            raise UnmaskError(Code.LOG_LEASE, f"spool {folder} is another process's")
        self._lock = lock
        shutil.rmtree(_gone(folder), ignore_errors=True)
        if folder.exists():
            try:
                self._open()
            except UnmaskError:
                os.close(lock)
                raise

    @property
    def unread(self) -> int:
        """How many records are here and not delivered; more by what was removed for the bound."""
        return self._end - self._delivered

    @property
    def exists(self) -> bool:
        return self._log is not None

    def append(self, records: Sequence[OutRecord]) -> tuple[int, int]:
        """Write records behind those that are here; return the offset of the first and how many it took.

        What the disk does not take is told in the log. Never raises.
        """
        try:
            if self._log is None:
                self._open()
            for record in records:
                headers = {**record.headers, TOPIC_HEADER: record.topic.encode()}
                self._producer.send(replace(record, topic=RECORDS.topic, headers=headers, partition=0))
                self._since_look += len(record.value or b"")
            self._producer.flush(WRITE_S)
            self._failing = False
        except UnmaskError as error:
            # A full disk stays full for many batches.
            logger.log(logging.DEBUG if self._failing else logging.ERROR, "%s", error)
            self._failing = True
        if self._log is None:
            return self._end, 0
        first, self._end = self._end, self._log.end_offset(RECORDS)
        self._keep_bound()
        return first, self._end - first

    def _keep_bound(self) -> None:
        if self._log is None or self._since_look <= self._limit // STEPS:
            return
        self._since_look = 0
        try:
            self._log.maintain()
        except UnmaskError as error:
            logger.error("spool %s: %s", self._folder.name, error)

    def following(self) -> tuple[int, OutRecord] | None:
        """Return the next record and its offset, None if there is none now; each is returned once."""
        if self._log is None:
            return None
        for _ in range(2):
            if self._cursor >= self._end:
                return None
            record = self._next()
            if record is not None:
                self.lost += record.offset - self._cursor
                self._cursor = record.offset + 1
                return record.offset, _restored(record)
        return None

    def skip(self, upto: int) -> None:
        """Return nothing before `upto`: the producer has those already."""
        self._cursor = max(self._cursor, upto)

    def delivered(self, upto: int | None = None) -> None:
        """Everything before `upto`, None: all that was returned, need not be kept."""
        self._delivered = max(self._delivered, self._cursor if upto is None else upto)
        now = self._clock.monotonic()
        if self._delivered > self._noted and now - self._noted_at >= PLACE_S:
            self._noted_at = now
            self._note()

    def clear(self) -> None:
        """Remove everything: all was delivered."""
        if self._log is None:
            return
        self._close_log()
        with translated(self._folder):
            # Away in one step: half a log could not be opened.
            self._folder.rename(_gone(self._folder))
        shutil.rmtree(_gone(self._folder), ignore_errors=True)
        _names(self._folder).unlink(missing_ok=True)

    def close(self) -> None:
        if self._log is not None:
            self._note()
            self._close_log()
        os.close(self._lock)

    def _open(self) -> None:
        log = SqliteLog(self._folder, LogSettings(), self._clock)
        try:
            log.create_topics(
                [
                    TopicSpec(RECORDS.topic, 1, Cleanup.DELETE, None, self._limit),
                    TopicSpec(PLACE.topic, 1, Cleanup.COMPACT),
                ]
            )
            self._producer: SqliteProducer = log.producer("spool")
            notes = [int(record.value or b"0") for record in log.read(PLACE, log.begin_offset(PLACE))]
            self._end = log.end_offset(RECORDS)
        except BaseException:
            log.close()
            raise
        self._cursor = self._delivered = self._noted = notes[-1] if notes else 0
        self._pages: Iterator[Record] | None = None
        self._log = log

    def _next(self) -> Record | None:
        """Return the record at the cursor or the first behind it; None: look again."""
        assert self._log is not None
        try:
            if self._pages is None:
                self._pages = self._log.read(RECORDS, max(self._cursor, self._log.begin_offset(RECORDS)))
            record = next(self._pages, None)
        except PositionError as error:
            self._pages = None
            self.lost += max(0, error.resume_at - self._cursor)
            self._cursor = max(self._cursor, error.resume_at)
            return None
        if record is None:
            self._pages = None
        return record

    def _note(self) -> None:
        headers = {"schema": str(SCHEMA).encode()}
        value = str(self._delivered).encode()
        try:
            self._producer.send(OutRecord(PLACE.topic, PLACE_KEY, value, headers, self._clock.now_us(), 0))
        except UnmaskError as error:
            logger.warning("spool %s: %s", self._folder.name, error)
            return
        self._noted = self._delivered

    def _close_log(self) -> None:
        assert self._log is not None
        log, self._log, self._pages = self._log, None, None
        try:
            log.close()
        except UnmaskError as error:
            logger.warning("spool %s: %s", self._folder.name, error)


def _restored(record: Record) -> OutRecord:
    headers = dict(record.headers)
    topic = headers.pop(TOPIC_HEADER).decode()
    return OutRecord(topic, record.key, record.value, headers, record.timestamp_us)


def _lock(path: Path) -> int | None:
    """Return a descriptor that holds the lock, None if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _names(folder: Path) -> Path:
    return folder.with_suffix(".streams")


def _gone(folder: Path) -> Path:
    return folder.with_suffix(".gone")
