"""Alerts as lines of JSON: in a file that is rotated, or on standard output."""

import errno
import fcntl
import os
from pathlib import Path
from typing import BinaryIO

from stream.alerts import CloudEvent
from stream.durable import sync_folder
from stream.errors import Code, UnmaskError
from stream.sinks.delivery import DELIVERED, Outcome, Result
from stream.sinks.settings import File

OWNER_ONLY = 0o600
"""Who was accused of what is nobody else's business."""

TAIL_BYTES = 1024 * 1024
"""A torn last line is looked for no further back: a line is below 20 kB."""


class FileTarget:
    """Appends to one file, which it locks; each line is on disk before it counts.

    Raises `UnmaskError` (CONFIG) if the file cannot be had.
    """

    def __init__(self, settings: File) -> None:
        self._path = Path(settings.path).expanduser()
        self._rotate_bytes = settings.rotate_bytes
        self._keep = settings.keep
        self._file: BinaryIO | None = None
        try:
            self._file = self._open()
        except OSError as error:
            raise UnmaskError(
                Code.CONFIG, f"path is {self._path}; it must be a file that can be written: {_said(error)}"
            ) from None

    def deliver(self, event: CloudEvent) -> Result:
        line = event.line().encode() + b"\n"
        try:
            self._file = self._file or self._open()
            if 0 < self._file.tell() > self._rotate_bytes - len(line):
                self._rotate()
            self._append(self._file, line)
        except OSError as error:
            # Opened anew next time, perhaps on another disk; what was written of the line is cut off then.
            self.close()
            return Result(Outcome.AWAY, "disk", f"{self._path}: {_said(error)}")
        return DELIVERED

    def identity(self) -> str:
        return str(self._path)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    @staticmethod
    def _append(file: BinaryIO, line: bytes) -> None:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())

    def _open(self) -> BinaryIO:
        folder = self._path.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, OWNER_ONLY)
        file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _cut_torn(file)
            sync_folder(folder)
        except BaseException:
            file.close()
            raise
        return file

    def _rotate(self) -> None:
        """Give the file the number 1, those that have numbers the next, and begin a new one."""
        self.close()
        for number in range(self._keep - 1, 0, -1):
            if self._numbered(number).exists():
                self._numbered(number).replace(self._numbered(number + 1))
        self._path.replace(self._numbered(1))
        self._file = self._open()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


class StdoutTarget:
    """Writes to a stream that others may write to as well, a line at a time."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    def deliver(self, event: CloudEvent) -> Result:
        try:
            self._out.write(event.line().encode() + b"\n")
            self._out.flush()
        except OSError as error:
            return Result(Outcome.AWAY, "output", f"standard output: {_said(error)}")
        return DELIVERED

    def identity(self) -> str:
        return ""

    def close(self) -> None:
        """It is not ours."""


def _cut_torn(file: BinaryIO) -> None:
    """Cut a line that has no end: whoever wrote it died before it counted, and it comes again."""
    size = os.fstat(file.fileno()).st_size
    begin = max(0, size - TAIL_BYTES)
    tail = os.pread(file.fileno(), size - begin, begin)
    torn = len(tail) - (tail.rfind(b"\n") + 1)
    if torn and (begin == 0 or b"\n" in tail):
        os.ftruncate(file.fileno(), size - torn)
        os.fsync(file.fileno())
    file.seek(0, os.SEEK_END)


def _said(error: OSError) -> str:
    if isinstance(error, BlockingIOError):
        return "another process has it open"
    return error.strerror or str(error)
