"""What a user may attach: addresses, files, cameras, stdin, parsed and checked (DESIGN 1, 3.9).

A source is written `[ID=]ADDRESS`. `env:NAME` as address takes the real one from the environment, so that
no credential stands on a command line. The entry of a source in the topic `sources` holds no secret
either: `secret_ref` names the environment variable from which the process that attaches takes the address.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from stream.errors import Code, UnmaskError
from stream.records import STREAM_ID, Kind, check_stream_id
from stream.redact import MASK, redact

E = TypeVar("E", bound=StrEnum)


class Scheme(StrEnum):
    """How a source is reached."""

    RTMP = "rtmp"
    RTSP = "rtsp"
    HTTP = "http"
    SRT = "srt"
    UDP = "udp"
    TCP = "tcp"
    FILE = "file"
    PIPE = "pipe"
    CAMERA = "camera"
    STDIN = "stdin"
    PUSH = "push"
    """Another producer writes this stream into `media` itself: nothing is to be attached."""


SCHEMES = {
    "rtmp": Scheme.RTMP,
    "rtmps": Scheme.RTMP,
    "rtsp": Scheme.RTSP,
    "rtsps": Scheme.RTSP,
    "http": Scheme.HTTP,
    "https": Scheme.HTTP,
    "srt": Scheme.SRT,
    "udp": Scheme.UDP,
    "tcp": Scheme.TCP,
}
NEEDS_PORT = frozenset({Scheme.SRT, Scheme.UDP, Scheme.TCP})
"""These have no standard port."""
CAN_LISTEN = frozenset({Scheme.RTMP, Scheme.TCP})
"""Here `?listen` means: be the server. SRT says it by `?mode=listener`."""
FILE_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mxf"})
"""Over HTTP these name something with an end; anything else may go on for ever."""
GENERIC = frozenset({"index", "live", "playlist", "master", "stream", "main", "chunklist", "video", "hls"})
"""File and path names that say nothing about which feed it is."""
RIGHT = (
    "rtmp(s)://, rtsp(s)://, http(s)://, srt://, udp://, tcp://, a file, /dev/videoN, env:NAME or - for stdin"
)
PUSHED = "push:"
"""Stands where an address would: the stream comes from another producer (docs/producers.md)."""
ENV = "env:"
SECRET_REF = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
HIGHEST_FPS = 60
"""As `sampling.idle_fps` allows."""
SHORTEST_SECRET = 3
"""Shorter query values (`a=1`) are not searched for literally: they would blot out ordinary words."""


@dataclass(frozen=True, slots=True)
class Source:
    """One feed to attach to.

    `address` is complete, credentials included: it is handed to the attachment and never printed. `shown`
    is the same without secrets. `kind` is what the address promises; an attachment may find out better
    (HLS of a recording is a file). `listen`: wait for a publisher instead of calling one.
    """

    id: str
    scheme: Scheme
    kind: Kind
    address: str = field(repr=False)
    shown: str
    listen: bool = False
    secret_ref: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    fps: float | None = None
    """Sampling rate of this feed while it is calm (Hz); None: `sampling.idle_fps`."""
    attached_us: int | None = None
    """When `unmask attach` was called (UTC microseconds)."""

    def identity(self) -> str:
        """Return what, if it changes, means another feed to attach; a file attached again is read again."""
        facts = [self.scheme, self.address, self.shown, self.listen, self.secret_ref]
        if self.kind is Kind.FILE:
            facts.append(self.attached_us)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def redacted(self, text: str) -> str:
        """Return `text` without secrets, those of this source also where they stand alone."""
        for secret in _secrets(self.address) if self.secret_ref else ():
            text = text.replace(secret, MASK)
        return redact(text)

    def entry(self) -> dict[str, Any]:
        """Return the value of this source's record in the topic `sources`: no credential in it."""
        where = {"url": self.shown, "listen": self.listen, "secret_ref": self.secret_ref}
        return {
            "id": self.id,
            "scheme": self.scheme.value,
            "kind": self.kind.value,
            **({} if self.scheme is Scheme.PUSH else where),
            "labels": dict(self.labels),
            **({} if self.fps is None else {"fps": self.fps}),
            **({} if self.attached_us is None else {"attached_us": self.attached_us}),
        }

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Put the address where `from_entry` of a child process finds it; nothing to do without secrets."""
        if self.secret_ref:
            environ[self.secret_ref.removeprefix(ENV)] = self.address


def from_entry(entry: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Source:
    """Return the source of an entry of the topic `sources`, its secret resolved from `environ`.

    The address is empty if the variable is not set here: one such source must not stop the others, so it is
    refused when attached. `scheme` and `kind` follow from the address where they are not given. Raises
    `UnmaskError` (SOURCE_SYNTAX) naming the field that is wrong.
    """
    if entry.get("scheme") == Scheme.PUSH:  # there is nothing to attach to
        entry = {"url": PUSHED, **entry}
    name = check_stream_id(_text(entry, "id", "")[:80])
    reference, labels = entry.get("secret_ref"), entry.get("labels") or {}
    if reference is not None and not (isinstance(reference, str) and SECRET_REF.fullmatch(reference)):
        raise _syntax(f"secret_ref of {name} is not env:NAME; credentials belong into the environment")
    if not isinstance(labels, dict) or not all(isinstance(text, str) for text in labels.values()):
        raise _syntax(f"labels of {name} must be an object of names and texts")
    url = _text(entry, "url", reference)
    address = url if reference is None else environ.get(reference.removeprefix(ENV), "")
    derived = _read(address) if address and "scheme" not in entry else None
    scheme = derived.scheme if derived else _one_of(Scheme, entry, "scheme", "tcp")
    kind = derived.kind if derived else _one_of(Kind, entry, "kind", "live")
    listen = derived.listen if derived else entry.get("listen") is True
    shown = derived.shown if derived else url
    return Source(
        name,
        scheme,
        kind,
        address,
        shown,
        listen,
        reference,
        labels,
        check_fps(entry.get("fps")),
        entry["attached_us"] if isinstance(entry.get("attached_us"), int) else None,
    )


def check_fps(fps: Any) -> float | None:
    """Return a feed's own sampling rate if it is one or None. Raises `UnmaskError` (SOURCE_SYNTAX)."""
    if fps is None:
        return None
    if isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps <= HIGHEST_FPS:
        return float(fps)
    raise _syntax(f"fps is {fps!r}; it must be a number above 0 and at most {HIGHEST_FPS}")


def _text(entry: Mapping[str, Any], name: str, default: str | None) -> str:
    found = entry.get(name, default)
    if isinstance(found, str):
        return found
    raise _syntax(f"entry of sources has {name} {found!r}; it must be text")


def _one_of(kind: type[E], entry: Mapping[str, Any], name: str, default: str) -> E:
    found = entry.get(name, default)
    try:
        return kind(found)
    except ValueError:
        raise _syntax(f"entry of sources has {name} {found!r}; it must be one of {', '.join(kind)}") from None


def parse_sources(texts: Iterable[str], environ: Mapping[str, str] = os.environ) -> list[Source]:
    """Return the sources that the user's `texts` (`[ID=]ADDRESS`) name, each with an id of its own.

    Raises `UnmaskError`: SOURCE_SYNTAX, SOURCE_NOT_FOUND, each saying what would be right.
    """
    parsed = [parse_source(text, environ) for text in texts]
    given = [source.id for source, named in parsed if named]
    doubled = {name for name in given if given.count(name) > 1}
    if doubled:
        raise _syntax(f"stream id {min(doubled)!r} is given twice; each source needs an id of its own")
    taken = set(given)
    sources = []
    for source, named in parsed:
        unique = source.id if named else _unique(source.id, taken)
        taken.add(unique)
        sources.append(source if unique == source.id else _renamed(source, unique))
    return sources


def parse_source(text: str, environ: Mapping[str, str] = os.environ) -> tuple[Source, bool]:
    """Return the source that `text` names and whether the user gave its id (else it is derived)."""
    name, equals, address = text.partition("=")
    if (
        not equals or not STREAM_ID.fullmatch(name) or os.path.exists(text)
    ):  # a long address is no path, and no error
        return _parse(None, text, environ), False
    return _parse(name, address, environ), True


def _parse(name: str | None, address: str, environ: Mapping[str, str]) -> Source:
    reference = None
    if address.startswith(ENV):
        reference, address = address, _from_environment(address, environ)
    source = _read(address)
    if reference:
        source = replace(source, secret_ref=reference)
    return _renamed(source, check_stream_id(name) if name is not None else source.id)


def _renamed(source: Source, name: str) -> Source:
    given_by_user = source.secret_ref not in (None, _own_reference(source.id))
    if given_by_user:
        return replace(source, id=name)
    return replace(
        source, id=name, secret_ref=None if source.shown == source.address else _own_reference(name)
    )


def _own_reference(name: str) -> str:
    letters = re.sub("[^A-Z0-9]", lambda match: f"_{ord(match.group()):02X}", name.upper())
    return f"{ENV}UNMASK_SOURCE_{letters}"


def _from_environment(reference: str, environ: Mapping[str, str]) -> str:
    name = reference.removeprefix(ENV)
    address = environ.get(name, "")
    if address and not address.startswith(ENV):
        return address
    found = "empty or not set" if not address else "another env:"
    raise _syntax(f"source {reference}: variable {name} is {found}; set it to the address of the feed")


def _read(address: str) -> Source:
    """Return the source of an address, its id derived."""
    if address == PUSHED:
        return Source("push", Scheme.PUSH, Kind.LIVE, PUSHED, PUSHED)
    if address == "-":
        return Source("stdin", Scheme.STDIN, Kind.LIVE, "-", "-")
    if not address.strip():
        raise _syntax(f"source is empty; give {RIGHT}")
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", address)
    if found is None:
        return _read_path(address)
    name = found.group(1).lower()
    if name == "file":
        return _read_path(unquote(urlsplit(address).path))
    scheme = SCHEMES.get(name)
    if scheme is None:
        raise _syntax(f"source {redact(address)}: scheme {name!r} is not supported; give {RIGHT}")
    return _read_url(scheme, address)


def _read_path(path: str) -> Source:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        sentence = f"source {redact(path)} cannot be read: {reason}; give {RIGHT}"
        raise UnmaskError(Code.SOURCE_NOT_FOUND, sentence) from None
    name = _clean(Path(path).stem) or "file"
    if stat.S_ISDIR(mode):
        raise _syntax(f"source {path} is a directory; name the files in it")
    if stat.S_ISCHR(mode):
        return Source(_clean(Path(path).name) or "camera", Scheme.CAMERA, Kind.LIVE, path, path)
    if stat.S_ISFIFO(mode):
        return Source(name, Scheme.PIPE, Kind.LIVE, path, path)
    return Source(name, Scheme.FILE, Kind.FILE, path, path)


def _read_url(scheme: Scheme, address: str) -> Source:
    shown = redact(address)
    if re.search(r"\s", address):
        raise _syntax(f"source {shown} has a space in it; write it as %20")
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        reason = "its port or host is malformed" if shown != address else str(error)
        raise _syntax(f"source {shown}: {reason}; write {scheme}://HOST:PORT/PATH") from None
    if not parts.hostname and scheme not in NEEDS_PORT:
        raise _syntax(f"source {shown} names no host; write {scheme}://HOST/PATH")
    if port is None and scheme in NEEDS_PORT:
        raise _syntax(f"source {shown} names no port; write {scheme}://HOST:PORT")
    listen = _wants_listen(parts)
    if listen and scheme not in CAN_LISTEN:
        raise _syntax(f"source {shown}: ?listen is for rtmp and tcp; for srt write ?mode=listener")
    _check_plain_query(scheme, parts, shown)
    suffix = PurePosixPath(parts.path).suffix.lower()
    kind = Kind.FILE if scheme is Scheme.HTTP and suffix in FILE_SUFFIXES else Kind.LIVE
    name = _name_of_url(scheme, shown)
    return Source(name, scheme, kind, address, shown, listen or "mode=listener" in parts.query)


def _check_plain_query(scheme: Scheme, parts: SplitResult, shown: str) -> None:
    """Refuse FFmpeg's tuning options on udp and tcp: read by our own sockets, they would do nothing."""
    if scheme in (Scheme.UDP, Scheme.TCP) and parts.query not in ("", "listen", "listen=1"):
        allowed = "?listen" if scheme is Scheme.TCP else "none"
        raise _syntax(f"source {shown} has options; {scheme} takes {allowed}, remove the others")


def _wants_listen(parts: SplitResult) -> bool:
    return any(field in ("listen", "listen=1") for field in parts.query.split("&"))


def _name_of_url(scheme: Scheme, shown: str) -> str:
    """Return a stream id out of the redacted address, so that no key becomes an id."""
    # Not `urlsplit`: what is left of a masked address need not be one that it accepts.
    rest = re.split("[?#]", shown.replace(MASK, "").partition("://")[2], maxsplit=1)[0]
    place, _, path = rest.partition("/")
    for part in reversed(path.split("/")):
        name = _clean(PurePosixPath(part).stem)
        if name and name not in GENERIC:
            return name
    host = _clean(place.rpartition("@")[2])
    return host if host and not host.isdigit() else f"{scheme}-{host}".rstrip("-")


def _clean(text: str) -> str:
    """Return `text` as far as a stream id may hold it, with room for a number to make it unique."""
    return re.sub("[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:56]


def _unique(name: str, taken: set[str]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _secrets(address: str) -> list[str]:
    """Return the texts in `address` that must not be printed, longest first, plain and percent-decoded."""
    rest = address.partition("://")[2]
    userinfo = rest.rpartition("@")[0]
    query = rest.rpartition("@")[2].partition("?")[2]
    fields = [part for part in re.split("[&;#]", query) if part not in ("listen", "listen=1")]
    values = [part.rpartition("=")[2] for part in fields]
    if "listen" in query:
        values.append(rest.partition("?")[0].rpartition("/")[2])
    found = {userinfo, userinfo.partition(":")[2], *values}
    found |= {unquote(secret) for secret in found}
    return sorted((secret for secret in found if len(secret) >= SHORTEST_SECRET), key=len, reverse=True)


def _syntax(sentence: str) -> UnmaskError:
    return UnmaskError(Code.SOURCE_SYNTAX, sentence)
