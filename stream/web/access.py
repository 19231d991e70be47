"""Who may do what: tokens, roles, sessions, and how often (DESIGN 3.10).

A token is 32 random bytes. Only its SHA-256 is kept, which is enough: what cannot be guessed needs no slow
hash.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import ip_address
from pathlib import Path
from threading import Lock
from typing import ClassVar

from stream.assemble import data_folder
from stream.clock import Clock
from stream.config import Config
from stream.errors import Code, UnmaskError

logger = logging.getLogger(__name__)

TOKEN_BYTES = 32

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")

SESSION_S = 12 * 3600.0
"""A login lasts a shift."""

MAX_SESSIONS = 1024
"""Beyond, the oldest logs in again."""

MAX_TOKENS_BYTES = 1024 * 1024

LOOK_S = 1.0
"""The tokens file is read again no more often than this: a token that is taken away ends within it."""

MAX_BUCKETS = 4096
"""Callers whose rate is followed; beyond, all begin anew."""


class Role(IntEnum):
    """Each may do what those before it may: look; decide and mute; attach and detach."""

    VIEWER = 1
    MODERATOR = 2
    OPERATOR = 3

    @property
    def word(self) -> str:
        return self.name.lower()

    @classmethod
    def of(cls, word: str) -> "Role":
        """Return the role of a name. Raises `UnmaskError` (CONFIG)."""
        if word.upper() in cls.__members__:
            return cls[word.upper()]
        raise UnmaskError(Code.CONFIG, f"role is {word[:40]!r}; it must be viewer, moderator or operator")


@dataclass(frozen=True, slots=True)
class Person:
    """Whoever asks. `csrf` must come back in a header of every request that changes something, "" where a
    token in a header already proves that no foreign page sent it."""

    name: str
    role: Role
    csrf: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the tokens file."""

    name: str
    role: Role
    digest: str


def digest_of(token: str) -> str:
    """Return what is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """The tokens file: a line per token, `NAME ROLE SHA256`; `#` begins a comment. Any thread may use it."""

    def __init__(self, path: Path, clock: Clock) -> None:
        """Raises `UnmaskError` (CONFIG) for a file that cannot be read; a missing one holds no token."""
        self._path = path
        self._clock = clock
        self._lock = Lock()
        self._stamp: tuple[int, int] | None = None
        self._looked = clock.monotonic()
        self._entries: dict[str, Entry] = {}
        self._load()

    def __bool__(self) -> bool:
        return bool(self._current())

    def find(self, token: str) -> Entry | None:
        """Return whose token it is."""
        return self.holds(digest_of(token))

    def holds(self, digest: str) -> Entry | None:
        """Return the entry with a hash, as long as it stands in the file."""
        # The hash of what was sent is looked up, not the token: timing tells nothing of those that exist.
        return self._current().get(digest)

    def _current(self) -> Mapping[str, Entry]:
        with self._lock:
            now = self._clock.monotonic()
            if now - self._looked >= LOOK_S:
                self._looked = now
                self._renew()
            return self._entries

    def _renew(self) -> None:
        """Look at the file again; while it cannot be read, nobody gets in."""
        try:
            self._load()
        except UnmaskError as error:
            logger.error("%s; no token is valid until that is put right", error)
            self._stamp, self._entries = None, {}

    def _load(self) -> None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._stamp, self._entries = None, {}
            return
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp == self._stamp:
            return
        entries = {entry.digest: entry for entry in read_tokens(self._path)}
        self._stamp, self._entries = stamp, entries


def tokens_path(config: Config) -> Path:
    """Return where tokens are kept."""
    if config.web.tokens_file:
        return Path(config.web.tokens_file).expanduser()
    return data_folder(config) / "web" / "tokens"


def read_tokens(path: Path) -> list[Entry]:
    """Return the entries of a tokens file, none if there is no file. Raises `UnmaskError` (CONFIG)."""
    try:
        if path.stat().st_size > MAX_TOKENS_BYTES:
            raise UnmaskError(Code.CONFIG, f"tokens file {path} has more than {MAX_TOKENS_BYTES} bytes")
        text = path.read_text()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UnmaskError(Code.CONFIG, f"tokens file {path} cannot be read: {error}") from error
    lines = [(number, line.partition("#")[0].split()) for number, line in enumerate(text.splitlines(), 1)]
    return [_entry(path, number, words) for number, words in lines if words]


def _entry(path: Path, number: int, words: list[str]) -> Entry:
    if len(words) != 3 or not NAME.fullmatch(words[0]) or not re.fullmatch("[0-9a-f]{64}", words[2]):
        raise UnmaskError(
            Code.CONFIG,
            f"line {number} of tokens file {path} is no NAME ROLE SHA256 as unmask tokens add writes",
        )
    return Entry(words[0], Role.of(words[1]), words[2])


def add_token(path: Path, name: str, role: Role) -> str:
    """Make a token, write its hash and return it: this is the only time that anybody sees it.

    Raises `UnmaskError` (CONFIG) for a name that is none or taken.
    """
    if not NAME.fullmatch(name):
        raise UnmaskError(
            Code.CONFIG, f"name is {name[:80]!r}; 1 to 64 of letters, digits, . _ @ - are right"
        )
    entries = read_tokens(path)
    if any(entry.name == name for entry in entries):
        raise UnmaskError(Code.CONFIG, f"{name} has a token already; remove it first, or choose another name")
    token = secrets.token_urlsafe(TOKEN_BYTES)
    write_tokens(path, [*entries, Entry(name, role, digest_of(token))])
    return token


def remove_token(path: Path, name: str) -> None:
    """Take a token away. Raises `UnmaskError` (CONFIG) if nobody has that name."""
    entries = read_tokens(path)
    left = [entry for entry in entries if entry.name != name]
    if len(left) == len(entries):
        known = ", ".join(entry.name for entry in entries) or "none"
        raise UnmaskError(Code.CONFIG, f"no token of {name[:80]!r}; there are: {known}")
    write_tokens(path, left)


def write_tokens(path: Path, entries: list[Entry]) -> None:
    """Write the file, whole or not at all, readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    lines = [f"{entry.name} {entry.role.word} {entry.digest}\n" for entry in entries]
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@dataclass(slots=True)
class _Session:
    digest: str
    csrf: str
    ends: float


class Sessions:
    """Logins of browsers, in memory: a restart asks for the token again. Any thread may use it."""

    COOKIE: ClassVar[str] = "unmask_session"

    def __init__(self, tokens: Tokens, clock: Clock) -> None:
        self._tokens = tokens
        self._clock = clock
        self._lock = Lock()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    def begin(self, entry: Entry) -> str:
        """Return the cookie of a new session."""
        cookie = secrets.token_urlsafe(TOKEN_BYTES)
        ends = self._clock.monotonic() + SESSION_S
        with self._lock:
            self._sessions[digest_of(cookie)] = _Session(
                entry.digest, secrets.token_urlsafe(TOKEN_BYTES), ends
            )
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return cookie

    def person(self, cookie: str) -> Person | None:
        """Return whose session it is, None if it is over or its token was taken away."""
        key = digest_of(cookie)
        with self._lock:
            session = self._sessions.get(key)
        if session is None:
            return None
        entry = self._tokens.holds(session.digest)
        if entry is None or self._clock.monotonic() > session.ends:
            self.end(cookie)
            return None
        return Person(entry.name, entry.role, session.csrf)

    def end(self, cookie: str) -> None:
        with self._lock:
            self._sessions.pop(digest_of(cookie), None)


class Rates:
    """Token buckets: each caller may do `burst` at once and `per_s` a second from then on. Any thread."""

    def __init__(self, per_s: float, burst: float, clock: Clock) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._lock = Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait_s(self, caller: str) -> float:
        """Take one; return 0 if there was one, else for how many seconds the caller is to wait."""
        now = self._clock.monotonic()
        with self._lock:
            if len(self._buckets) >= MAX_BUCKETS and caller not in self._buckets:
                self._buckets.clear()
            left, at = self._buckets.get(caller, (self._burst, now))
            left = min(self._burst, left + (now - at) * self._per_s)
            taken = left >= 1.0
            self._buckets[caller] = (left - taken, now)
        return 0.0 if taken else (1.0 - left) / self._per_s


def same(first: str, second: str) -> bool:
    """Whether two secrets are equal, in a time that tells nothing."""
    return hmac.compare_digest(first.encode(), second.encode())


def is_loopback(host: str) -> bool:
    """Whether an address of ours can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
