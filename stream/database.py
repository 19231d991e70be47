"""The SQLite file under the embedded log: schema, connections, the one lock for writers, error codes.

Every write and every checkpoint happens under an flock of its own (`write.lock`), not only under SQLite's.
Two reasons: waiting costs a millisecond instead of SQLite's backoff of up to 100, and no checkpoint ever
runs beside a commit, which the "WAL-reset" bug of SQLite 3.7.0 to 3.51.2 (sqlite.org/wal.html, section 11)
needs to corrupt a file; distributions ship those versions.
"""

import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Literal

from stream.clock import Deadline, SystemClock
from stream.errors import Code, UnmaskError

Row = tuple[Any, ...]

SCHEMA_VERSION = 1
"""In `PRAGMA user_version`; a file of another version is refused by name."""

LOCK_WAIT_S = 15.0
"""Transactions take milliseconds; whoever holds the lock this long is stopped or stuck in the kernel."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.0005, 0.005
"""Between tries for the lock: about the length of a short and of a long transaction."""

WAL_KEEP_BYTES = 16 * 1024 * 1024
"""The WAL file is cut back to this after a checkpoint; kept space lets retention write on a full disk."""

PARTITION_SHIFT = 40
"""records.id = partition id << 40 | offset: one clustered tree in reading order; 2**40 offsets last 34,000
years at 1,000 a second."""

REMOTE_FILE_SYSTEMS = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "fuse.ceph",
        "fuse.glusterfs",
        "fuse.rclone",
        "fuse.s3fs",
        "fuse.sshfs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "smb3",
        "smbfs",
    }
)
"""SQLite's WAL needs shared memory maps and locks that these do not keep between machines, or at all."""

SCHEMA = """
CREATE TABLE topics (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, partitions INTEGER NOT NULL, cleanup TEXT NOT NULL,
    retention_s REAL, retention_bytes INTEGER);
CREATE TABLE partitions (
    id INTEGER PRIMARY KEY, topic INTEGER NOT NULL REFERENCES topics(id), number INTEGER NOT NULL,
    first INTEGER NOT NULL DEFAULT 0, next INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0, stored INTEGER NOT NULL DEFAULT 0,
    UNIQUE (topic, number));
CREATE TABLE records (
    id INTEGER PRIMARY KEY, timestamp_us INTEGER NOT NULL, appended_us INTEGER NOT NULL,
    size INTEGER NOT NULL,
    segment INTEGER, start INTEGER, length INTEGER, crc INTEGER,
    key TEXT NOT NULL, headers TEXT NOT NULL, value BLOB);
CREATE INDEX records_by_segment ON records(segment) WHERE segment IS NOT NULL;
CREATE TABLE latest (
    partition INTEGER NOT NULL, key TEXT NOT NULL, record INTEGER NOT NULL,
    PRIMARY KEY (partition, key)) WITHOUT ROWID;
CREATE TABLE segments (
    id INTEGER PRIMARY KEY, topic INTEGER NOT NULL, name TEXT NOT NULL, instance TEXT NOT NULL,
    sealed INTEGER NOT NULL DEFAULT 0);
CREATE TABLE leases (
    name TEXT PRIMARY KEY, fencing INTEGER NOT NULL, instance TEXT, member TEXT NOT NULL, boot TEXT NOT NULL,
    expires REAL NOT NULL);
CREATE TABLE positions (
    consumers TEXT NOT NULL, partition INTEGER NOT NULL, next INTEGER NOT NULL,
    PRIMARY KEY (consumers, partition)) WITHOUT ROWID;
CREATE TABLE producers (name TEXT PRIMARY KEY, fencing INTEGER NOT NULL);
"""


class Database:
    """One connection. Used by one thread at a time; other threads and processes open their own."""

    def __init__(self, directory: Path, synchronous: Literal["NORMAL", "FULL"]) -> None:
        self._path = directory / "log.sqlite"
        with translated(self._path), ExitStack() as undo:
            self._lock = os.open(directory / "write.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, self._lock)
            self._connection = sqlite3.connect(
                self._path, timeout=LOCK_WAIT_S, isolation_level=None, check_same_thread=False
            )
            undo.callback(self._connection.close)
            with self._exclusive():
                self._prepare(synchronous)
            undo.pop_all()

    def _prepare(self, synchronous: str) -> None:
        run = self._connection.execute
        version = int(run("PRAGMA user_version").fetchone()[0])
        if version not in (0, SCHEMA_VERSION):
            raise UnmaskError(
                Code.LOG_UNUSABLE,
                f"{self._path} has schema version {version}; this version of Unmask needs {SCHEMA_VERSION}: "
                "use another data_dir or move the old log away",
            )
        if version == 0:
            run("PRAGMA auto_vacuum = INCREMENTAL")
        mode = run("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise UnmaskError(Code.LOG_UNUSABLE, f"{self._path} lies where SQLite cannot keep a WAL: {mode}")
        run(f"PRAGMA synchronous = {synchronous}")
        run(f"PRAGMA journal_size_limit = {WAL_KEEP_BYTES}")
        if version == 0:
            self._connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Run one transaction: committed when the block ends, rolled back if it raises.

        Raises `UnmaskError` (LOG_FULL, LOG_UNUSABLE).
        """
        with translated(self._path), self._exclusive():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def each(self, sql: str, arguments: Sequence[Any] = ()) -> Iterator[Row]:
        """Iterate the rows of a query; no more are fetched than are taken."""
        with translated(self._path), closing(self._connection.execute(sql, arguments)) as cursor:
            yield from cursor

    def rows(self, sql: str, arguments: Sequence[Any] = ()) -> list[Row]:
        """Return all rows of a query, as of one moment."""
        with translated(self._path):
            return self._connection.execute(sql, arguments).fetchall()

    def checkpoint(self) -> None:
        """Move the WAL into the file, so that it starts again from its beginning. Waits for no reader."""
        with translated(self._path), self._exclusive():
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def vacuum(self, keep_pages: int, step_pages: int) -> bool:
        """Give up to `step_pages` free pages beyond `keep_pages` back to the file system; True if any."""
        with translated(self._path), self._exclusive():
            free = int(self._connection.execute("PRAGMA freelist_count").fetchone()[0])
            if free <= keep_pages:
                return False
            count = min(step_pages, free - keep_pages)
            # execute() stops at the first of this statement's rows, which have no columns.
            self._connection.executescript(f"PRAGMA incremental_vacuum({count});")
            return True

    def close(self) -> None:
        """Close the connection; the last one of all processes checkpoints, so under the lock too."""
        if self._lock < 0:
            return
        try:
            with translated(self._path), self._exclusive():
                self._connection.close()
        finally:
            self._connection.close()
            os.close(self._lock)
            self._lock = -1

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        # Real time, whatever clock the log was given: another process is waited for.
        clock = SystemClock()
        deadline = Deadline(LOCK_WAIT_S, clock)
        wait = FIRST_WAIT_S
        while not _try_lock(self._lock):
            if deadline.passed():
                raise UnmaskError(
                    Code.LOG_UNUSABLE,
                    f"another process has held the write lock of {self._path.parent} for {LOCK_WAIT_S:g} s: "
                    "it is stopped or its disk hangs",
                )
            clock.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the disk into `UnmaskError` (LOG_FULL, LOG_UNUSABLE) naming `path`."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # a bug of ours, not a state of the file
    except sqlite3.Error as error:
        # SQLITE_IOERR_SHMSIZE: the shared index of the WAL could not grow, for want of space.
        # Errors that the module raises by itself carry no code.
        code = getattr(error, "sqlite_errorcode", 0)
        full = code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
        raise _failure(path, str(error), full) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise _failure(path, error.strerror or str(error), full) from error


def _failure(path: Path, reason: str, full: bool) -> UnmaskError:
    if full:
        return UnmaskError(
            Code.LOG_FULL,
            f"no space left for the log at {path} ({reason}): free some, or lower its retention",
        )
    return UnmaskError(Code.LOG_UNUSABLE, f"the log at {path} cannot be used: {reason}")


def check_local(directory: Path, mounts: Iterable[str]) -> None:
    """Raise `UnmaskError` (LOG_UNUSABLE) if `directory` lies on a remote file system.

    `mounts` are the lines of /proc/mounts.
    """
    target = directory.resolve()
    best, kind = -1, "unknown"
    for line in mounts:
        fields = line.split()
        # Blanks in mount points are written as octal escapes.
        point = Path(fields[1].replace("\\040", " "))
        if target.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[2]
    if kind in REMOTE_FILE_SYSTEMS:
        raise UnmaskError(
            Code.LOG_UNUSABLE,
            f"the log's directory {directory} is on {kind}: it needs a local file system, so set data_dir to "
            "one (ext4, xfs, btrfs, overlay, tmpfs, ...)",
        )
