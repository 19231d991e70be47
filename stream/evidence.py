"""Evidence: pictures and clips, content-addressed, durable before anything names them (DESIGN 3.6)."""

import hashlib
import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from detectors.readings import Image
from stream import config
from stream.clock import Clock
from stream.durable import sync_folder
from stream.holds import Holds
from stream.windows import MICRO

logger = logging.getLogger(__name__)

SCHEME = "evidence://"

REFERENCE = re.compile(r"evidence://([0-9a-f]{64})")

SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")

ORPHAN_S = 3600.0
"""Age at which a file that no event names is an orphan: far longer than any transaction takes to commit, and
than an incident's face pictures wait for it to open."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep deleted, by reason, and what is left."""

    orphans: int
    expired: int
    evicted: int
    kept: int
    kept_bytes: int
    held: int = 0
    """Of those kept, under legal hold."""


class EvidenceStore:
    """A directory of files named by the SHA-256 of their content.

    Faces are personal data: directories and files are the owner's alone. Whoever puts also sweeps, in one
    thread: a sweep beside a `put` in another process could delete what is just being named.
    """

    def __init__(self, directory: Path, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, data: bytes, suffix: str) -> str:
        """Store `data` and return `evidence://<sha256>`; it is on disk when this returns.

        `suffix` (".png") only helps people who open the directory. The same bytes are stored once. Raises
        `ValueError` for a suffix that is none, `OSError` when the disk refuses.
        """
        if not SUFFIX.fullmatch(suffix):
            raise ValueError(f"suffix is {suffix!r}; it must look like .png")
        digest = hashlib.sha256(data).hexdigest()
        existing = self._find(digest)
        if existing is not None:
            self._stamp(existing)
            return SCHEME + digest
        folder = self._directory / digest[:2]
        if not folder.exists():
            folder.mkdir(mode=0o700)
            sync_folder(self._directory)
        # Other processes may put the same into the same folder.
        partial = folder / f"{digest}.{os.getpid()}.partial"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            self._stamp(partial)
            os.fsync(file.fileno())
        partial.rename(folder / f"{digest}{suffix}")
        sync_folder(folder)
        return SCHEME + digest

    def path(self, reference: str) -> Path:
        """Return the file of a reference.

        Raises `ValueError` for text that is no reference, `FileNotFoundError` when it is not here (any more).
        """
        match = REFERENCE.fullmatch(reference)
        if match is None:
            raise ValueError(f"reference is {reference!r}; it must be evidence:// and 64 hex digits")
        found = self._find(match.group(1))
        if found is None:
            raise FileNotFoundError(f"{reference} is not in the evidence directory; it may have expired")
        return found

    def sweep(
        self,
        settings: config.Evidence,
        pinned: Collection[str],
        referenced: Collection[str] | None = None,
    ) -> Swept:
        """Delete what is too old, too much, or an orphan; nothing in `pinned` (open incidents) or held ever.

        `referenced` are all references that events or states still hold; None leaves orphans alone. While the
        holds cannot be read nothing is deleted, and that is logged.
        """
        held = self._held()
        if held is None:
            return self._untouched()
        pinned = held.union(pinned)
        now_us = self._clock.now_us()
        orphans = expired = evicted = 0
        kept: list[tuple[int, int, Path]] = []
        for path in self._files():
            try:
                status = path.stat()
            except FileNotFoundError:  # purged just now
                continue
            changed_us = status.st_mtime_ns // 1000
            age_s = (now_us - changed_us) / MICRO
            reference = SCHEME + path.name.partition(".")[0]
            if reference in pinned:
                kept.append((changed_us, status.st_size, path))
            elif age_s > ORPHAN_S and _orphaned(path, reference, referenced):
                path.unlink(missing_ok=True)
                orphans += 1
            elif age_s > settings.retention_s:
                path.unlink(missing_ok=True)
                expired += 1
            else:
                kept.append((changed_us, status.st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= settings.max_bytes:
                break
            if SCHEME + path.name.partition(".")[0] in pinned:
                continue
            path.unlink(missing_ok=True)
            evicted += 1
            total -= size
        here = {SCHEME + path.name.partition(".")[0] for _, _, path in kept}
        return Swept(orphans, expired, evicted, len(kept) - evicted, total, len(held & here))

    def purge(self, wanted: Collection[str]) -> int:
        """Delete what references name, whatever its age; return how many files there were.

        The caller sees to holds and writes down who wanted it. Raises `ValueError` for text that is no
        reference, `OSError` when the disk refuses.
        """
        gone = 0
        for reference in wanted:
            try:
                path = self.path(reference)
            except FileNotFoundError:
                continue
            path.unlink(missing_ok=True)
            sync_folder(path.parent)
            gone += 1
        return gone

    def _held(self) -> frozenset[str] | None:
        try:
            return Holds(self._directory).references()
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.error("legal holds cannot be read, so no evidence is deleted: %s", error)
            return None

    def _untouched(self) -> Swept:
        sizes = [path.stat().st_size for path in self._files()]
        return Swept(0, 0, 0, len(sizes), sum(sizes))

    def _find(self, digest: str) -> Path | None:
        for path in (self._directory / digest[:2]).glob(f"{digest}.*"):
            if path.suffix != ".partial":
                return path
        return None

    def _files(self) -> Iterator[Path]:
        return (path for path in sorted(self._directory.glob("??/*")) if path.is_file())

    def _stamp(self, path: Path) -> None:
        now_ns = self._clock.now_us() * 1000
        os.utime(path, ns=(now_ns, now_ns))


def references(value: Any) -> set[str]:
    """Return every evidence reference in a JSON value (an event's body, a state)."""
    if isinstance(value, str):
        return {value} if REFERENCE.fullmatch(value) else set()
    if isinstance(value, dict):
        return {ref for item in value.values() for ref in references(item)}
    if isinstance(value, list | tuple):
        return {ref for item in value for ref in references(item)}
    return set()


def png(image: Image) -> bytes:
    """Return an RGB picture as PNG: exactly the pixels that were judged."""
    done, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise ValueError(f"a picture of shape {image.shape} cannot be written as PNG")
    return bytes(data)


def clip_window(first_us: int, peak_us: int, now_us: int, settings: config.Evidence) -> tuple[int, int]:
    """Return first and last media time of an incident's clip.

    From `pre_roll_s` before the first suspicious picture to `post_roll_s` after the peak, but no later than
    `now_us`; if that is longer than `clip_max_s`, what lies farthest before the peak is left out.
    """
    last = min(now_us, peak_us + round(settings.post_roll_s * MICRO))
    first = first_us - round(settings.pre_roll_s * MICRO)
    return max(first, last - round(settings.clip_max_s * MICRO)), last


class ChunkIndex:
    """Where in the log the last seconds of a stream begin at a keyframe: bounded, serialisable."""

    def __init__(self, settings: config.Evidence) -> None:
        self._keep_us = round((settings.clip_max_s + settings.pre_roll_s + settings.post_roll_s) * MICRO)
        self._entries: list[tuple[int, int, str, int]] = []

    def add(self, offset: int, media_us: int, attachment: str, epoch: int) -> None:
        """Note that the record at `offset` starts on a keyframe at `media_us`, unless that steps back."""
        if self._entries and media_us < self._entries[-1][1]:
            return
        self._entries.append((offset, media_us, attachment, epoch))
        oldest = media_us - self._keep_us
        while len(self._entries) > 1 and self._entries[1][1] <= oldest:
            self._entries.pop(0)

    def before(self, media_us: int, attachment: str, epoch: int) -> int | None:
        """Return the last such record of the epoch at or before `media_us`, else its first, else None."""
        own = [entry for entry in self._entries if entry[2:] == (attachment, epoch)]
        earlier = [entry for entry in own if entry[1] <= media_us]
        if earlier:
            return earlier[-1][0]
        return own[0][0] if own else None

    def media_us(self, offset: int) -> int | None:
        """Return the media time at which the record at `offset` begins; None if it is not in the index."""
        return next((entry[1] for entry in self._entries if entry[0] == offset), None)

    def state(self) -> list[list[Any]]:
        return [list(entry) for entry in self._entries]

    def restore(self, rows: Sequence[Sequence[Any]]) -> None:
        self._entries = [(row[0], row[1], row[2], row[3]) for row in rows]


def _orphaned(path: Path, reference: str, referenced: Collection[str] | None) -> bool:
    if path.suffix == ".partial":
        return True
    return referenced is not None and reference not in referenced
