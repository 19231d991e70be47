"""One file of known hash, fetched over HTTP or copied from a mirror: resumed, checked, in place when whole.

What has come so far lies beside the target as `.part`, locked while somebody writes it. Addresses in messages
are redacted.
"""

import base64
import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request, build_opener, url2pathname

from detectors.registry import file_sha256, part_of
from stream.errors import Code, UnmaskError
from stream.redact import redact

MAX_BYTES = 128 * 1024 * 1024
"""The largest published network has 83 MB of parameters; a file half as large again is not it."""

TIMEOUT_S = 30.0
"""Without a byte for so long a connection is dead."""

SLOW_S, SLOW_BYTES = 60.0, 64 * 1024
"""A server that sends less than this in that time would take a day: given up, to be gone on with later."""

ATTEMPTS = 3
"""A connection that breaks is made again; one that breaks three times in a row will do so again."""

PIECE = 256 * 1024

OK, PARTIAL, UNSATISFIABLE = 200, 206, 416

Told = Callable[[int, int | None], None]
"""Is told how many bytes are there, and of how many, None if the server does not say."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to fetch: its name at the source, its hash, and where it is to lie."""

    file_name: str
    sha256: str
    target: Path


class _Source(Protocol):
    """Opens the file from byte `begin` on."""

    def __call__(self, begin: int) -> "_Bytes": ...


@dataclass(frozen=True, slots=True)
class _Bytes:
    """What a source sends: pieces from byte `begin` on, of a file of `total` bytes."""

    begin: int
    total: int | None
    pieces: Iterator[bytes]


class _BrokenError(Exception):
    """The connection broke; another may go on where it did."""


def fetch(
    wanted: Wanted,
    base: str,
    check: Callable[[Path], None],
    told: Told,
    on_wait: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Bring `wanted` into place from `base`: the http(s):// or file:// address, or the folder, it is in.

    `check` is given the whole file with the right hash before it is put in place, and raises what speaks
    against it; such a file is deleted, as is one whose hash differs. `on_wait` is called when another process
    fetches the same file, which is then waited for. Raises `UnmaskError` (CONFIG, WEIGHTS) in one sentence.
    """
    source = _source(base, wanted.file_name, clock)
    part = part_of(wanted.target)
    with _files_told(wanted.target.parent):
        wanted.target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part, on_wait) as file:
            if wanted.target.exists() and file_sha256(wanted.target) == wanted.sha256:
                part.unlink()
                return
            if file_sha256(part) != wanted.sha256:
                _bring(file, source, told, clock, wait)
                _refuse_other(part, wanted, base)
            try:
                check(part)
            except Exception:
                part.unlink()
                raise
            os.fsync(file.fileno())
            part.replace(wanted.target)


@contextmanager
def _files_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; free some space and run it again, it goes on where it stopped"
        raise UnmaskError(
            Code.CONFIG, f"cache folder {folder} (engines.cache_dir) cannot be written: {reason}"
        ) from None


@contextmanager
def _locked(part: Path, on_wait: Callable[[], None]) -> Iterator[BinaryIO]:
    """Open `part` as the only one who writes it."""
    while True:
        with part.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, part):  # else whoever had it put it in place or deleted it
                try:
                    yield file
                finally:
                    file.flush()
                    _drop_if_empty(part)
                return


def _drop_if_empty(part: Path) -> None:
    """Nothing came: then there is nothing to go on with either."""
    if part.exists() and part.stat().st_size == 0:
        part.unlink()


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _refuse_other(part: Path, wanted: Wanted, base: str) -> None:
    found = file_sha256(part)
    if found == wanted.sha256:
        return
    part.unlink()
    raise UnmaskError(
        Code.WEIGHTS,
        f"{wanted.file_name} from {redact(base)} has SHA-256 {found}, expected {wanted.sha256}: "
        "not the published weights; deleted",
    )


def _bring(
    file: BinaryIO, source: _Source, told: Told, clock: Callable[[], float], wait: Callable[[float], None]
) -> None:
    """Append what is missing, over as many connections as are worth trying."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _append(file, source, told)
            return
        except _BrokenError as error:
            if attempt == ATTEMPTS:
                raise UnmaskError(
                    Code.WEIGHTS, f"{error}; run it again, it goes on where it stopped"
                ) from None
            wait(float(attempt))


def _append(file: BinaryIO, source: _Source, told: Told) -> None:
    sent = source(file.seek(0, os.SEEK_END))
    done = sent.begin
    file.truncate(done)
    told(done, sent.total)
    for piece in sent.pieces:
        done += len(piece)
        if done > MAX_BYTES:
            file.truncate(0)
            raise UnmaskError(Code.WEIGHTS, _too_large(f"more than {MAX_BYTES}"))
        file.write(piece)
        told(done, sent.total)
    file.flush()
    if sent.total is not None and done < sent.total:
        raise _BrokenError(f"the connection ended after {done} of {sent.total} bytes")


def _too_large(size: str) -> str:
    return f"the file offered has {size} bytes; a published network has at most {MAX_BYTES}"


def _source(base: str, file_name: str, clock: Callable[[], float]) -> _Source:
    parts = urlsplit(base)
    if parts.scheme in ("http", "https") and parts.netloc:
        path = f"{parts.path.rstrip('/')}/{quote(file_name)}"
        address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, parts.query, ""))
        return _Server(address, _authorization(parts.username, parts.password), file_name, clock)
    if parts.scheme == "file":
        return _Folder(Path(url2pathname(parts.path)), file_name)
    if "://" in base:
        raise UnmaskError(
            Code.CONFIG, f"--from is {redact(base)}; it must be a folder, file:// or http(s):// address"
        )
    return _Folder(Path(base).expanduser(), file_name)


def _authorization(user: str | None, password: str | None) -> str | None:
    if user is None:
        return None
    pair = f"{unquote(user)}:{unquote(password or '')}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


@dataclass(frozen=True, slots=True)
class _Folder:
    """A mirror on this machine."""

    folder: Path
    file_name: str

    def __call__(self, begin: int) -> _Bytes:
        path = self.folder / self.file_name
        try:
            total = path.stat().st_size
            file = path.open("rb")
        except OSError as error:
            raise UnmaskError(
                Code.WEIGHTS, f"mirror {self.folder}: {self.file_name} cannot be read: {error.strerror}"
            ) from None
        if total > MAX_BYTES:
            file.close()
            raise UnmaskError(Code.WEIGHTS, _too_large(str(total)))
        begin = begin if begin < total else 0
        file.seek(begin)
        return _Bytes(begin, total, self._pieces(file))

    def _pieces(self, file: BinaryIO) -> Iterator[bytes]:
        with file:
            while piece := file.read(PIECE):
                yield piece


@dataclass(frozen=True, slots=True)
class _Server:
    """An HTTP server, through the proxies that the environment names (HTTPS_PROXY, HTTP_PROXY, NO_PROXY)."""

    address: str
    authorization: str | None
    file_name: str
    clock: Callable[[], float]

    @property
    def host(self) -> str:
        return urlsplit(self.address).netloc

    def __call__(self, begin: int) -> _Bytes:
        response = self._ask(begin)
        total = _total(response)
        if response.status == PARTIAL and _first(response) != begin:
            response.close()
            raise UnmaskError(
                Code.WEIGHTS, f"{self.host} sent other bytes of {self.file_name} than were asked for"
            )
        if total is not None and total > MAX_BYTES:
            response.close()
            raise UnmaskError(Code.WEIGHTS, _too_large(str(total)))
        return _Bytes(begin if response.status == PARTIAL else 0, total, self._pieces(response))

    def _ask(self, begin: int) -> HTTPResponse:
        request = Request(self.address, headers={"User-Agent": "unmask"})
        if self.authorization:  # not to be sent on to where a redirect leads
            request.add_unredirected_header("Authorization", self.authorization)
        if begin:
            request.add_header("Range", f"bytes={begin}-")
        try:
            response: HTTPResponse = build_opener().open(request, timeout=TIMEOUT_S)
        except HTTPError as error:
            error.close()
            if error.code == UNSATISFIABLE and begin:
                return self._ask(0)
            if error.code >= 500:
                raise _BrokenError(f"{self.host} answered {error.code} {error.reason}") from None
            raise UnmaskError(
                Code.WEIGHTS,
                f"{self.host} answered {error.code} {error.reason} to {self.file_name}; "
                "--from names another place to pull from",
            ) from None
        except (URLError, OSError, HTTPException, ValueError) as error:
            raise UnmaskError(Code.WEIGHTS, self._unreachable(error)) from None
        if response.status not in (OK, PARTIAL):
            response.close()
            raise UnmaskError(
                Code.WEIGHTS,
                f"{self.host} answered {response.status} to {self.file_name}; expected the file",
            )
        return response

    def _unreachable(self, error: Exception) -> str:
        reason = getattr(error, "reason", error)
        told = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return (
            f"{self.host} cannot be reached: {redact(told)}; without a network pull --from a folder that has "
            "the files, behind a proxy set HTTPS_PROXY"
        )

    def _pieces(self, response: HTTPResponse) -> Iterator[bytes]:
        since, arrived = self.clock(), 0
        with response:
            while piece := self._read(response):
                yield piece
                arrived += len(piece)
                if self.clock() - since < SLOW_S:
                    continue
                if arrived < SLOW_BYTES:
                    raise _BrokenError(f"{self.host} sent {arrived} bytes in {SLOW_S:.0f} s")
                since, arrived = self.clock(), 0

    def _read(self, response: HTTPResponse) -> bytes:
        try:
            return response.read1(PIECE)
        except (OSError, HTTPException) as error:
            raise _BrokenError(
                f"the connection to {self.host} broke: {error or type(error).__name__}"
            ) from None


def _first(response: HTTPResponse) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _total(response: HTTPResponse) -> int | None:
    """Return the size of the whole file, None if the server does not say."""
    if response.status == PARTIAL:
        found = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
        return int(found[1]) if found else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None
