"""Segment files: large values, appended before the row that names them (DESIGN 3.1).

A segment belongs to one writer and one topic, so nobody shares a file to write. It is deleted as a whole,
after all its rows are gone.
"""

import os
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from stream.database import translated
from stream.durable import sync_folder

WRITER_BITS, FILE_BITS = 42, 20
"""A segment id: random for the writer, then counting its files, so that one writer's are in order."""

VECTORS = 512
"""Buffers per pwritev; Linux takes 1,024."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a value lies: segment id, byte `start`, `length` in bytes and CRC-32."""

    segment: int
    start: int
    length: int
    crc: int


class SegmentWriter:
    """Appends values of one topic to segment files of its own. Used by one thread.

    A file gets no more values once it has `limit` bytes. Bytes are never written twice at one place:
    a transaction whose outcome is unknown may have named them.
    """

    def __init__(self, directory: Path, instance: str, limit: int, durable: bool) -> None:
        self._directory = directory
        self._instance = instance
        self._limit = limit
        self._durable = durable
        self._descriptor = -1
        self._end = 0
        self._segment = secrets.randbits(WRITER_BITS) << FILE_BITS
        self.full: list[int] = []
        """Ids of files that get no more bytes and whose rows do not say so yet."""

    def append(self, values: Sequence[bytes]) -> list[Span]:
        """Write `values`, to as many files as they fill, and if durable wait for the disk.

        Raises `UnmaskError` (LOG_FULL, LOG_UNUSABLE).
        """
        spans: list[Span] = []
        with translated(self._directory):
            while len(spans) < len(values):
                if self._descriptor >= 0 and self._end >= self._limit:
                    self.seal()
                if self._descriptor < 0:
                    self._open()
                spans += self._append_here(values[len(spans) :])
        return spans

    def seal(self) -> None:
        """Give the present file no more bytes."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        self.full.append(self._segment)

    def _open(self) -> None:
        self._segment += 1
        name = segment_name(self._instance, self._segment)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(self._directory / name, flags, 0o600)
        self._end = 0
        if self._durable:
            sync_folder(self._directory)

    def _append_here(self, values: Sequence[bytes]) -> list[Span]:
        """Write as many of `values`, at least one, as the present file takes."""
        spans = []
        end = self._end
        for value in values:
            spans.append(Span(self._segment, end, len(value), zlib.crc32(value)))
            end += len(value)
            if end >= self._limit:
                break
        self._write(values[: len(spans)])
        if self._durable:
            os.fdatasync(self._descriptor)
        self._end = end
        return spans

    def _write(self, values: Sequence[bytes]) -> None:
        position = self._end
        pending = [memoryview(value) for value in values if value]
        while pending:
            count = os.pwritev(self._descriptor, pending[:VECTORS], position)
            position += count
            done = 0
            while done < len(pending) and count >= len(pending[done]):
                count -= len(pending[done])
                done += 1
            pending = pending[done:]
            if pending and count:
                pending[0] = pending[0][count:]


class SegmentReader:
    """Reads spans. Files stay open for one batch only: an open file would keep its space after retention."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, int] = {}

    def read(self, name: str, span: Span) -> bytes | None:
        """Return the value, or None if the file is gone, cut short or does not match the CRC."""
        with translated(self._directory / name):
            try:
                value = os.pread(self._descriptor(name), span.length, span.start)
            except FileNotFoundError:
                return None
        if len(value) != span.length or zlib.crc32(value) != span.crc:
            return None
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _descriptor(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[name]


def segment_name(instance: str, segment: int) -> str:
    """Return the file name: it tells whose file it is even before a row does."""
    return f"{instance}-{segment:016x}.seg"


def segment_instance(name: str) -> str:
    """Return the instance that writes or wrote the file."""
    return name.partition("-")[0]
