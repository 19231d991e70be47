"""Copies of evidence in a store of fsspec's: S3 and what speaks like it, or whatever there is a driver for.

The local directory stays where evidence is durable first, so that a store that is slow or away holds up no
picture; a thread copies from there. In the store lie `files/<sha256><suffix>`, `holds/<incident>.json` and
`purged/<sha256>`: holds and purges are made there for all machines, each of which follows them.
"""

import json
import logging
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stream.assemble import data_folder
from stream.clock import Clock
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.evidence import REFERENCE, SCHEME, EvidenceStore
from stream.metrics import Metrics
from stream.redact import redact

logger = logging.getLogger(__name__)

TURN_S = 5.0
"""Between looks for new files, and after a failure."""

FOLLOW_S = 60.0
"""Between looks for purges of other machines."""

STOP_S = 5.0
"""What the last copies get when the process ends: those of a file that was watched are seconds old."""

SWEEP_S = 6 * 3600.0
"""Between looks for what is too old: a listing, and a question for each file that is not here any more."""


class Store:
    """The store that `evidence.store` names. Raises `UnmaskError` (CONFIG) if it cannot be made.

    Every call may take as long as the store takes, and raises `UnmaskError` (LOG_AWAY) if it fails.
    """

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs

        self._shown = redact(address)
        try:
            self._fs, root = url_to_fs(address)
        except (ValueError, ImportError) as error:
            raise UnmaskError(
                Code.CONFIG,
                f"evidence.store is {self._shown}; it must be an address that fsspec has a driver for "
                f'(s3://: pip install "unmask[s3]"): {redact(str(error))}',
            ) from None
        self._root = root.rstrip("/")

    def names(self, folder: str) -> set[str]:
        """Return the names in a folder of the store, as of now."""
        with self._told():
            self._fs.invalidate_cache()
            place = f"{self._root}/{folder}"
            found = self._fs.find(place) if self._fs.exists(place) else []
        return {str(path).rpartition("/")[2] for path in found}

    def find(self, digest: str) -> list[str]:
        """Return the names of the files of a hash: one, or none."""
        with self._told():
            self._fs.invalidate_cache()
            found = self._fs.glob(f"{self._root}/files/{digest}.*")
        return [str(path).rpartition("/")[2] for path in found]

    def write(self, folder: str, name: str, content: bytes) -> None:
        with self._told():
            self._fs.makedirs(f"{self._root}/{folder}", exist_ok=True)
            self._fs.pipe_file(f"{self._root}/{folder}/{name}", content)

    def read(self, folder: str, name: str) -> bytes:
        with self._told():
            return bytes(self._fs.cat_file(f"{self._root}/{folder}/{name}"))

    def delete(self, folder: str, name: str) -> None:
        """Delete what may have gone already."""
        with self._told():
            if self._fs.exists(path := f"{self._root}/{folder}/{name}"):
                self._fs.rm_file(path)

    def age_s(self, folder: str, name: str, now_us: int) -> float:
        """Return for how long a file has not been written, in seconds."""
        with self._told():
            modified: datetime = self._fs.modified(f"{self._root}/{folder}/{name}")
        at = modified if modified.tzinfo else modified.replace(tzinfo=UTC)
        return now_us / 1e6 - at.timestamp()

    def held(self) -> frozenset[str]:
        """Return every reference under a hold."""
        return frozenset(
            str(ref)
            for name in self.names("holds")
            for ref in json.loads(self.read("holds", name))["references"]
        )

    @contextmanager
    def _told(self) -> Iterator[None]:
        # Drivers raise what they like: errors of sockets, of HTTP clients, of cloud libraries.
        try:
            yield
        except Exception as error:
            words = redact(" ".join(str(error).split()))[:300] or type(error).__name__
            raise UnmaskError(Code.LOG_AWAY, f"evidence.store {self._shown}: {words}") from error


def store_of(config: Config) -> Store | None:
    """Return the store of the settings, None where evidence stays in the data folder alone."""
    return Store(config.evidence.store) if config.evidence.store else None


def read_evidence(reference: str, local: EvidenceStore, store: Store | None) -> tuple[bytes, str]:
    """Return the bytes of a reference and their suffix (".png"), from here or from the store.

    Raises `ValueError` for text that is no reference, `FileNotFoundError` if it is nowhere (any more),
    `UnmaskError` if the store does not answer.
    """
    try:
        path = local.path(reference)
        return path.read_bytes(), path.suffix
    except FileNotFoundError:
        if store is None:
            raise
    digest = reference.removeprefix(SCHEME)
    for name in store.find(digest):
        return store.read("files", name), Path(name).suffix
    raise FileNotFoundError(f"{reference} is not in the evidence store; it may have expired")


class Copier:
    """Copies what is put into `local`, follows purges, and deletes from the store what is too old.

    One thread; `start`, then `stop`. What is not copied when the process ends is copied after the next start.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        local: EvidenceStore,
        store: Store,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._keep_s = config.evidence.retention_s
        self._directory = directory
        self._local = local
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._copied: set[str] | None = None
        """Names that are in the store, from here or from elsewhere."""
        self._purged: set[str] = set()
        self._followed = self._swept = -SWEEP_S
        self._failing = False
        self._stopping, self._leaving = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="unmask-evidence", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Copy what is not copied, for a while, then leave it for the next start."""
        self._stopping.set()
        self._thread.join(STOP_S)
        self._leaving.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._try()
            self._stopping.wait(TURN_S)
        self._try()

    def _try(self) -> None:
        try:
            self.turn()
            self._failing = False
        except (UnmaskError, OSError) as error:
            if not self._failing:
                logger.warning("evidence is not copied now: %s; trying again", error)
            self._failing = True
            self._metrics.evidence_copy_failures.inc()

    def turn(self) -> None:
        """Do everything that is due. Raises `UnmaskError`, `OSError`; again, it goes on where it was."""
        if self._copied is None:
            self._copied = self._store.names("files")
        now = self._clock.monotonic()
        if now - self._followed >= FOLLOW_S:
            self._follow()
            self._followed = now
        self._copy(self._copied)
        if now - self._swept >= SWEEP_S:
            self._sweep(self._copied)
            self._swept = now

    def _follow(self) -> None:
        self._purged = self._store.names("purged")
        for path in self._files():
            if path.name.partition(".")[0] in self._purged:
                self._local.purge([SCHEME + path.name.partition(".")[0]])

    def _copy(self, copied: set[str]) -> None:
        waiting = [path for path in self._files() if path.name not in copied]
        for done, path in enumerate(waiting):
            self._metrics.evidence_uncopied.set(len(waiting) - done)
            if self._leaving.is_set():
                return
            if path.name.partition(".")[0] in self._purged:
                continue
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # expired or purged just now
                continue
            self._store.write("files", path.name, content)
            copied.add(path.name)
        self._metrics.evidence_uncopied.set(0)

    def _sweep(self, copied: set[str]) -> None:
        """Delete what is older than retention, is not here any more, and is not held."""
        held, here = self._store.held(), {path.name for path in self._files()}
        now_us = self._clock.now_us()
        for name in self._store.names("files") - here:
            if (
                SCHEME + name.partition(".")[0] in held
                or self._store.age_s("files", name, now_us) <= self._keep_s
            ):
                continue
            self._store.delete("files", name)
            copied.discard(name)

    def _files(self) -> list[Path]:
        return [path for path in sorted(self._directory.glob("??/*")) if path.suffix != ".partial"]


def copying(config: Config, local: EvidenceStore, clock: Clock, metrics: Metrics) -> Copier | None:
    """Return what copies `local`, the evidence of the data folder, already begun; None without a store."""
    store = store_of(config)
    if store is None:
        return None
    copier = Copier(config, data_folder(config) / "evidence", local, store, clock, metrics)
    copier.start()
    return copier


def purge_everywhere(store: Store, wanted: Collection[str]) -> int:
    """Delete references from the store and tell all machines to; return how many files of it there were.

    The marks come first: a machine that copies meanwhile deletes instead.
    """
    digests = {reference.removeprefix(SCHEME) for reference in wanted if REFERENCE.fullmatch(reference)}
    for digest in sorted(digests):
        store.write("purged", digest, b"")
    gone = [name for digest in sorted(digests) for name in store.find(digest)]
    for name in gone:
        store.delete("files", name)
    return len(gone)


def share_hold(store: Store, incident: str, facts: Mapping[str, Any]) -> None:
    """Let a hold count on every machine and in the store."""
    store.write("holds", f"{incident}.json", json.dumps(facts).encode())


def unshare_hold(store: Store, incident: str) -> None:
    store.delete("holds", f"{incident}.json")
