"""What travels through the log: records, media chunk headers, control records (DESIGN 3.1, 3.2)."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any, TypeVar

from stream.errors import Code, UnmaskError

E = TypeVar("E", bound=StrEnum)

SCHEMA = 1
"""Version written into every record; a reader accepts its own and the one before (DESIGN 3.1)."""

TIME_BASE = re.compile(r"[0-9]{1,12}/[0-9]{1,12}")

FARTHEST_US = 62_000_000_000_000_000
"""Times lie within this of 1970, about the years 5 to 3934: what lies beyond has no date to be told by."""

STREAM_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

RESERVED_ID = re.compile(rf"({STREAM_ID.pattern})~(replay)|(canary)~([0-9]{{1,9}})")
"""Streams of our own making: what is decoded again (`<stream>~replay`) and the canary (`canary~<partition>`).
No user's id holds a `~`."""

REPLAY, CANARY = "replay", "canary"


class Topic(StrEnum):
    """Topic names below the configured prefix (DESIGN 1)."""

    MEDIA = "media"
    SOURCES = "sources"
    STATE = "state"
    SCORES = "scores"
    ALERTS = "alerts"
    DEADLETTER = "deadletter"
    CANARY = "canary"
    DELIVERIES = "deliveries"
    PICTURES = "pictures"
    """A small picture of each live feed now and then, for people who watch (`stream.glimpses`)."""
    DECISIONS = "decisions"
    """What people decided of incidents, and which feeds they muted (`stream.decisions`)."""
    AUDIT = "audit"
    """Who did what in the web interface."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record as read from a topic.

    `timestamp_us` is UTC microseconds, given by the writer, or of arrival in a topic of Kafka's that is kept
    for a time; `value` None is a tombstone.
    """

    topic: str
    partition: int
    offset: int
    key: str
    value: bytes | None
    headers: Mapping[str, bytes]
    timestamp_us: int


@dataclass(frozen=True, slots=True)
class OutRecord:
    """One record to be written. `partition` None lets the log choose by key."""

    topic: str
    key: str
    value: bytes | None
    headers: Mapping[str, bytes]
    timestamp_us: int
    partition: int | None = None


class Control(StrEnum):
    """Control records in `media`, in order with the chunks (DESIGN 3.2)."""

    START = "start"
    TICK = "tick"
    GAP = "gap"
    END = "end"
    RETRACT = "retract"
    """Belongs to no attachment: somebody withdraws an incident (`stream.retract`)."""


class Kind(StrEnum):
    """Whether freshness means anything for the source."""

    LIVE = "live"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class CodecParameters:
    """What a decoder needs beside the packets of one epoch."""

    name: str
    width: int
    height: int
    extradata: bytes = b""
    rotation: int = 0
    """Clockwise degrees by which the picture must be turned to stand upright: 0, 90, 180, 270."""


@dataclass(frozen=True, slots=True)
class ChunkMeta:
    """Headers of one media chunk or control record.

    `sequence` counts every record (chunks and controls) of an attachment from 0, never resets at an
    epoch. `pts`, `first_pts` are in `time_base` units of the video stream: the smallest video pts in this
    chunk (None if it holds no video) and the first of the epoch. `capture_us` is UTC microseconds at
    receipt of the chunk's first packet; `epoch_anchor_us` is the media time of `first_pts`.
    """

    stream: str
    attachment: str
    epoch: int
    sequence: int
    kind: Kind
    capture_us: int
    epoch_anchor_us: int
    time_base: Fraction
    first_pts: int
    pts: int | None
    starts_on_keyframe: bool
    codec: CodecParameters | None
    content_type: str
    content_hash: str
    control: Control | None = None
    part: int = 0
    parts: int = 1

    def media_us(self, pts: int) -> int:
        """Return the media time in microseconds of a pts of this epoch (DESIGN 3.3)."""
        return self.epoch_anchor_us + int((pts - self.first_pts) * self.time_base * 1_000_000)

    def order(self) -> tuple[str, int, int, int]:
        """Return what records of one stream are ordered by; not larger than the last seen is stale."""
        return (self.attachment, self.epoch, self.sequence, self.part)


def fields_of(value: bytes | None) -> dict[str, Any]:
    """Return the JSON object that a record holds; none of what is missing, broken or no object."""
    try:
        found = json.loads(value or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def check_stream_id(value: str) -> str:
    """Return `value` if it is a legal stream id, else raise `UnmaskError`."""
    if STREAM_ID.fullmatch(value):
        return value
    raise UnmaskError(
        Code.SOURCE_SYNTAX,
        f"stream id {value!r} is not allowed: use 1 to 64 of a-z 0-9 . _ - and begin with a letter or digit",
    )


def split_stream_id(value: str) -> tuple[str, str]:
    """Return what precedes the `~` of a reserved id and what follows it; a user's own id, and "".

    `("feed", "replay")` of `feed~replay`, `("canary", "3")` of `canary~3`, `("feed", "")` of `feed`. Raises
    `UnmaskError` (SOURCE_SYNTAX) for anything else.
    """
    found = RESERVED_ID.fullmatch(value)
    if found is None:
        return check_stream_id(value), ""
    base, suffix = (group for group in found.groups() if group is not None)
    return base, suffix


def is_replay(stream: str) -> bool:
    """Whether these are dead letters decoded again: nothing of them is live."""
    return stream.endswith(f"~{REPLAY}")


def is_canary(stream: str) -> bool:
    """Whether this is a canary, which moderation never sees."""
    return stream.startswith(f"{CANARY}~")


def new_attachment(now_us: int, previous: str = "") -> str:
    """Return an attachment id (16 hex digits) that sorts by time and after `previous`."""
    last = int(previous, 16) if previous else -1
    return f"{max(now_us, last + 1):016x}"


def encode_headers(meta: ChunkMeta) -> dict[str, bytes]:
    """Return `meta` as record headers, all values UTF-8 text."""
    headers = {
        "schema": str(SCHEMA),
        "attachment": meta.attachment,
        "epoch": str(meta.epoch),
        "sequence": str(meta.sequence),
        "kind": meta.kind.value,
        "capture_time": str(meta.capture_us),
        "epoch_anchor": str(meta.epoch_anchor_us),
        "time_base": f"{meta.time_base.numerator}/{meta.time_base.denominator}",
        "first_pts": str(meta.first_pts),
        "starts_on_keyframe": "1" if meta.starts_on_keyframe else "0",
        "content-type": meta.content_type,
        "content_hash": meta.content_hash,
        "part": str(meta.part),
        "parts": str(meta.parts),
    }
    if meta.pts is not None:
        headers["pts"] = str(meta.pts)
    if meta.control is not None:
        headers["control"] = meta.control.value
    if meta.codec is not None:
        codec = asdict(meta.codec) | {"extradata": meta.codec.extradata.hex()}
        headers["codec"] = json.dumps(codec, separators=(",", ":"), sort_keys=True)
    return {name: text.encode() for name, text in headers.items()}


def decode_headers(stream: str, headers: Mapping[str, bytes]) -> ChunkMeta:
    """Return the chunk headers of a record written by our own ingest.

    Raises `UnmaskError` (SCHEMA) for another schema version, (CHUNK_INVALID) naming the header at fault.
    """
    check_schema(headers)
    split_stream_id(stream)
    text = _Headers(headers)
    control = text.optional("control")
    pts = text.optional("pts")
    meta = ChunkMeta(
        stream=stream,
        attachment=text.required("attachment"),
        epoch=text.integer("epoch"),
        sequence=text.integer("sequence"),
        kind=text.one_of("kind", Kind),
        capture_us=text.integer("capture_time"),
        epoch_anchor_us=text.integer("epoch_anchor"),
        time_base=text.time_base(),
        first_pts=text.integer("first_pts"),
        pts=None if pts is None else text.integer("pts"),
        starts_on_keyframe=text.required("starts_on_keyframe") == "1",
        codec=text.codec(),
        content_type=text.required("content-type"),
        content_hash=text.required("content_hash"),
        control=None if control is None else text.one_of("control", Control),
        part=text.integer("part"),
        parts=text.integer("parts"),
    )
    if not 0 <= meta.part < meta.parts:
        sentence = f"header part is {meta.part} of {meta.parts}; parts are counted from 0 to parts - 1"
        raise UnmaskError(Code.CHUNK_INVALID, sentence)
    check_times(meta, [] if meta.pts is None else [meta.pts])
    return meta


def check_times(meta: ChunkMeta, pts: Iterable[int]) -> None:
    """Raise `UnmaskError` (CHUNK_INVALID) if a time of the chunk, or of a pts in it, is no date."""
    times = [("capture_time", meta.capture_us), ("epoch_anchor", meta.epoch_anchor_us)]
    for name, us in [*times, *(("pts", meta.media_us(value)) for value in pts)]:
        if abs(us) > FARTHEST_US:
            raise UnmaskError(
                Code.CHUNK_INVALID,
                f"{name} means more than {FARTHEST_US} us from 1970; it must be a time near ours",
            )


def check_schema(headers: Mapping[str, bytes]) -> int:
    """Return the record's schema version, or raise `UnmaskError` (SCHEMA) if it cannot be read here."""
    raw = headers.get("schema", b"")
    if raw in (str(SCHEMA).encode(), str(SCHEMA - 1).encode()) and raw != b"0":
        return int(raw)
    raise UnmaskError(
        Code.SCHEMA, f"header schema is {raw!r}; this version of Unmask reads schema {SCHEMA} only"
    )


class _Headers:
    """Reads typed values out of record headers and names the header that is wrong."""

    def __init__(self, headers: Mapping[str, bytes]) -> None:
        self._headers = headers

    def optional(self, name: str) -> str | None:
        raw = self._headers.get(name)
        if raw is None:
            return None
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._bad(name, repr(raw[:40]), "UTF-8 text") from None

    def required(self, name: str) -> str:
        value = self.optional(name)
        if value is None:
            raise self._bad(name, "missing", "present")
        return value

    def integer(self, name: str) -> int:
        value = self.required(name)
        try:
            return int(value)
        except ValueError:
            raise self._bad(name, repr(value[:40]), "a whole number") from None

    def one_of(self, name: str, kind: type[E]) -> E:
        value = self.required(name)
        try:
            return kind(value)
        except ValueError:
            raise self._bad(name, repr(value[:40]), " or ".join(kind)) from None

    def time_base(self) -> Fraction:
        value = self.required("time_base")
        try:
            # Fraction takes exponents too, and a stranger's 1e999999999 would take for ever.
            base = Fraction(value) if TIME_BASE.fullmatch(value) else Fraction(0, 0)
        except ZeroDivisionError:
            raise self._bad("time_base", repr(value[:40]), "seconds as N/D, like 1/90000") from None
        if base <= 0:
            raise self._bad("time_base", repr(value[:40]), "above 0")
        return base

    def codec(self) -> CodecParameters | None:
        value = self.optional("codec")
        if value is None:
            return None
        try:
            fields: dict[str, Any] = json.loads(value)
            fields["extradata"] = bytes.fromhex(fields.get("extradata", ""))
            return CodecParameters(**fields)
        except (ValueError, TypeError, AttributeError):
            raise self._bad("codec", repr(value[:40]), "a JSON object of codec parameters") from None

    @staticmethod
    def _bad(name: str, found: str, right: str) -> UnmaskError:
        return UnmaskError(Code.CHUNK_INVALID, f"header {name} is {found}; it must be {right}")
