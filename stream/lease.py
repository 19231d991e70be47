"""Who may act for a group: a lease with a fencing number, and which open logs are alive (DESIGN 3.1).

The number grows with each change of holder and is checked in every commit, so a holder that was stopped
and comes back writes nothing. Expiry is in seconds of the machine's monotonic clock, which all processes
share and no clock step touches; after a reboot every lease is free.
"""

import fcntl
import logging
import os
import secrets
import sqlite3
import threading
from pathlib import Path

from stream.clock import Clock
from stream.database import Database, translated
from stream.errors import UnmaskError

logger = logging.getLogger(__name__)

BEATS_PER_LEASE = 3
"""Renewals within one lease: two may fail or come late before anybody else takes over."""

STOP_S = 1.0
"""A heartbeat that has not ended by then waits for a lock; it is a daemon and ends by itself."""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Instance:
    """One open log. Its lock file is held while the process lives, so that others see at once if it died."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.name = secrets.token_hex(8)
        with translated(directory):
            while True:
                self._descriptor = os.open(
                    self._path(self.name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
                )
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
                if os.fstat(self._descriptor).st_nlink:
                    break
                os.close(self._descriptor)  # a sweep came between the two calls

    def alive(self, name: str) -> bool:
        """Return whether the process that opened instance `name` still has it open."""
        with translated(self._directory):
            descriptor = self._lock_dead(name)
            if descriptor is None:
                return self._path(name).exists()
            os.close(descriptor)
            return False

    def sweep(self) -> None:
        """Remove the lock files of the dead."""
        with translated(self._directory):
            for path in self._directory.glob("*.lock"):
                descriptor = self._lock_dead(path.stem)
                if descriptor is not None:
                    path.unlink(missing_ok=True)
                    os.close(descriptor)

    def close(self) -> None:
        if self._descriptor < 0:
            return
        self._path(self.name).unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.lock"

    def _lock_dead(self, name: str) -> int | None:
        """Return a descriptor with the lock of a dead instance's file, None if it is alive or has none."""
        try:
            descriptor = os.open(self._path(name), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor


class Lease:
    """One member's claim to one group. `renew` may be called by any thread, the rest by one."""

    def __init__(self, group: str, member: str, instance: Instance, seconds: float, clock: Clock) -> None:
        self._group = group
        self._member = member
        self._instance = instance
        self._seconds = seconds
        self._clock = clock
        self._boot = BOOT_ID.read_text().strip()
        self._fencing = 0
        """Our number while we hold the lease or think so; 0 matches no row."""

    def acquire(self, database: Database) -> bool:
        """Take the lease if it is free, expired, or its holder's process is dead."""
        if self.holder(database) is not None:
            return False
        with database.write() as connection:
            if self.holder(database) is not None:
                return False
            row = connection.execute("SELECT fencing FROM leases WHERE name = ?", (self._group,)).fetchone()
            fencing = 1 if row is None else row[0] + 1
            connection.execute(
                "INSERT OR REPLACE INTO leases (name, fencing, instance, member, boot, expires) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (self._group, fencing, self._instance.name, self._member, self._boot, self._expiry()),
            )
        self._fencing = fencing
        return True

    def held(self, database: Database) -> bool:
        """Return whether nobody has taken over."""
        found = database.rows(
            "SELECT 1 FROM leases WHERE name = ? AND fencing = ? AND instance IS NOT NULL",
            (self._group, self._fencing),
        )
        return bool(found)

    def renew(self, connection: sqlite3.Connection) -> bool:
        """Within a write transaction: False if another member has taken over, else hold on."""
        cursor = connection.execute(
            "UPDATE leases SET expires = ? WHERE name = ? AND fencing = ? AND instance IS NOT NULL",
            (self._expiry(), self._group, self._fencing),
        )
        return cursor.rowcount == 1

    def release(self, database: Database) -> None:
        """Let the next member in at once."""
        with database.write() as connection:
            connection.execute(
                "UPDATE leases SET instance = NULL WHERE name = ? AND fencing = ?",
                (self._group, self._fencing),
            )
        self._fencing = 0

    def holder(self, database: Database) -> str | None:
        """Return the name of the member that has it, None if it is free, expired or its holder is dead."""
        rows = database.rows(
            "SELECT member, instance, boot, expires FROM leases WHERE name = ?", (self._group,)
        )
        if not rows:
            return None
        member, instance, boot, expires = rows[0]
        if instance is None or boot != self._boot or expires <= self._clock.monotonic():
            return None
        return str(member) if self._instance.alive(instance) else None

    def _expiry(self) -> float:
        return self._clock.monotonic() + self._seconds


class Heartbeat:
    """Renews a lease from a thread of its own, so that no pause between polls costs a healthy member it.

    A process that is stopped or dead does not renew; a wedged stage is the worker's own watch to find.
    """

    def __init__(self, database: Database, lease: Lease, seconds: float) -> None:
        self._database = database
        self._lease = lease
        self._interval = seconds / BEATS_PER_LEASE
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(STOP_S)

    def _run(self) -> None:
        try:
            # Real time, whatever clock the log was given: a thread cannot wait on a clock that tests move.
            while not self._stopping.wait(self._interval):
                if not self._beat():
                    return
        finally:
            self._database.close()

    def _beat(self) -> bool:
        try:
            with self._database.write() as connection:
                return self._lease.renew(connection)
        except UnmaskError as error:
            logger.warning("lease not renewed, trying again: %s", error)
            return True
