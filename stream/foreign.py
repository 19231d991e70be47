"""Segments of other producers: what detect assigns to them (DESIGN 3.2, last paragraph).

Such a record carries a key, `content-type`, `capture_time` and a segment that starts at a keyframe. All else
that a chunk of our own carries is assigned here, from the segment and from a `Place` alone: the same place
and the same record give the same chunk, so a worker that takes over with the place kept in state goes on as
if nothing had happened.

Decisions:

- Timestamps that go on where the segment before ended keep the epoch: tracks live across segments. A jump, or
  other codec parameters or time base, begins a new one (`stream.epochs` decides, packet by packet). A counter
  that wraps is carried on beyond the wrap.
- Nobody numbers the records, so a lost one shows as a hole in the timestamps: what comes after waits for a
  keyframe, as after any gap.
- A segment equal to the one before it came twice (a producer that tried again) and is passed over.
- An attachment lasts until `control: end`; its id is the first capture time.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any, Self, TypeVar

import av

from stream.chunks import (
    FLAGS,
    FORMATS,
    JSON,
    START_TIME_BASE,
    ChunkPackets,
    content_hash,
    demuxed,
    restored,
    times_of,
)
from stream.controls import End, EndReason, FeedPhase, Tick, to_body
from stream.epochs import Epoch, Epochs
from stream.errors import Code, UnmaskError
from stream.parameters import ParameterWatch
from stream.records import (
    ChunkMeta,
    CodecParameters,
    Control,
    Kind,
    check_schema,
    check_times,
    decode_headers,
    is_replay,
    new_attachment,
    split_stream_id,
)

E = TypeVar("E", Control, Kind)

EARLIEST_US = 946_684_800_000_000
"""2000-01-01: seconds or milliseconds given for microseconds mean a time long before it."""

LATEST_US = 4_102_444_800_000_000
"""2100-01-01: nanoseconds given for microseconds mean a time long after it."""

RFC_3339 = re.compile(r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}:\d{2}(\.\d{1,9})?(Z|[+-]\d{2}:\d{2})", re.IGNORECASE)

HOLE_S = 0.5
"""Timestamps may leave out this much and two pictures more: variable frame rates do. A lost
segment is longer."""

CONTROLS = (Control.TICK, Control.END, Control.RETRACT)


@dataclass(frozen=True, slots=True)
class Segment:
    """What the headers of such a record say."""

    stream: str
    content_type: str
    capture_us: int
    kind: Kind
    control: Control | None

    def bare(self, attachment: str, epoch: int) -> ChunkMeta:
        """Return headers that stand for the record where nothing was assigned: it holds no pictures."""
        return ChunkMeta(
            stream=self.stream,
            attachment=attachment,
            epoch=epoch,
            sequence=0,
            kind=self.kind,
            capture_us=self.capture_us,
            epoch_anchor_us=self.capture_us,
            time_base=START_TIME_BASE,
            first_pts=0,
            pts=None,
            starts_on_keyframe=False,
            codec=None,
            content_type=self.content_type,
            content_hash="",
            control=self.control,
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stream of another producer stands between two records; serialisable whole.

    `sequence` is that of the next record, `codec` are the parameters (extradata in hex) and `value` is the
    hash of the last one, `epochs` is `Epochs.state()`. `ended`: the next segment begins an attachment, newer
    than `attachment`.
    """

    attachment: str
    sequence: int
    kind: Kind
    codec: Mapping[str, Any] | None
    value: str
    epochs: Mapping[str, Any]
    ended: bool = False

    def state(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return asdict(self)

    @classmethod
    def behind(cls, attachment: str) -> Self:
        """Return the place before the first segment of a stream whose newest attachment is `attachment`."""
        return cls(attachment, 0, Kind.LIVE, None, "", Epochs(Kind.LIVE, 0).state(), ended=True)

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Self:
        """Return the place of a `state()` that may have been through JSON."""
        return cls(**{**state, "kind": Kind(state["kind"])})


@dataclass(frozen=True, slots=True)
class Places:
    """Goes with every report of a decoder: the place `at` its `decode_from`, before that record, and the
    place `now`, after the record reported. None: nothing was assigned so far."""

    at: Place | None
    now: Place | None


Piece = tuple[ChunkMeta, ChunkPackets]


def is_foreign(headers: Mapping[str, bytes]) -> bool:
    """Whether a record of `media` is another producer's: ours all say to which attachment they belong."""
    return "attachment" not in headers


def read_headers(stream: str, headers: Mapping[str, bytes]) -> ChunkMeta | Segment:
    """Return what the headers of a record of `media` say, whoever wrote it.

    Raises `UnmaskError` (SOURCE_SYNTAX) for a key that is no stream id, (SCHEMA) for another version,
    (CHUNK_INVALID) naming the header at fault.
    """
    return read_segment(stream, headers) if is_foreign(headers) else decode_headers(stream, headers)


def read_segment(stream: str, headers: Mapping[str, bytes]) -> Segment:
    """Return what the headers of another producer's record say; raises as `read_headers` does."""
    split_stream_id(stream)
    if "schema" in headers:
        check_schema(headers)
    control = _one_of(headers, "control", CONTROLS)
    return Segment(
        stream=stream,
        content_type=JSON if control else _content_type(headers),
        capture_us=_capture_us(headers),
        kind=_one_of(headers, "kind", tuple(Kind)) or Kind.LIVE,
        control=control,
    )


def _text(headers: Mapping[str, bytes], name: str) -> str | None:
    raw = headers.get(name)
    return None if raw is None else raw.decode("utf-8", "replace").strip()


def _one_of(headers: Mapping[str, bytes], name: str, allowed: tuple[E, ...]) -> E | None:
    text = _text(headers, name)
    if text is None:
        return None
    for choice in allowed:
        if choice.value == text:
            return choice
    raise _bad(name, repr(text[:40]), " or ".join(choice.value for choice in allowed) + ", or absent")


def _content_type(headers: Mapping[str, bytes]) -> str:
    text = _text(headers, "content-type")
    if text is None:
        raise _bad("content-type", "missing", "one of " + ", ".join(FORMATS))
    name = text.partition(";")[0].strip().lower()
    if name not in FORMATS:
        raise _bad("content-type", repr(text[:40]), "one of " + ", ".join(FORMATS))
    return name


def _capture_us(headers: Mapping[str, bytes]) -> int:
    right = "microseconds since 1970 in digits, or RFC 3339 like 2026-01-31T12:00:00.5Z"
    text = _text(headers, "capture_time")
    if text is None:
        raise _bad("capture_time", "missing", right)
    us = _microseconds(text)
    if us is None:
        raise _bad("capture_time", repr(text[:40]), right)
    if not EARLIEST_US <= us <= LATEST_US:
        raise _bad("capture_time", f"{text[:40]!r}, not between the years 2000 and 2100", right)
    return us


def _microseconds(text: str) -> int | None:
    if text.isascii() and text.isdecimal():
        return int(text[:20])
    if not RFC_3339.fullmatch(text):
        return None
    try:
        moment = datetime.fromisoformat(text.upper())
        return (moment - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)
    except ValueError:
        return None


def _bad(name: str, found: str, right: str) -> UnmaskError:
    return UnmaskError(Code.CHUNK_INVALID, f"header {name} is {found}; it must be {right}")


@dataclass(slots=True)
class _Open:
    """A piece being filled: packets of one epoch."""

    epoch: Epoch
    sequence: int
    codec: CodecParameters
    packets: list[Any]
    pts: list[int]


class Assigner:
    """Gives the segments of one stream their places, in order. Parses strangers' bytes: only for decoders."""

    def __init__(self, stream: str, place: Place) -> None:
        self._stream = stream
        self.place = place

    def overtaken(self, attachment: str) -> None:
        """Note an attachment of our own ingest in the same stream: what follows it is newer."""
        if attachment > self.place.attachment:
            self.place = replace(self.place, attachment=attachment, ended=True)

    def take(self, segment: Segment, value: bytes) -> list[Piece]:
        """Return the segment as chunks, one per epoch in it; none if it came twice.

        Raises `UnmaskError` (CHUNK_INVALID) if the value is no such segment; nothing is assigned then.
        """
        digest = content_hash(value)
        place = self._going_on(segment)
        if digest == place.value:
            return []
        pieces, place = _assign(segment, value, replace(place, value=digest))
        for meta, _ in pieces:
            check_times(meta, [] if meta.pts is None else [meta.pts])
        self.place = place
        return pieces

    def control(self, segment: Segment) -> tuple[ChunkMeta, bytes]:
        """Return a tick or an end as our own ingest would have written it."""
        place = self._going_on(segment)
        epoch = Epochs.restored(place.epochs).current
        bare = segment.bare(place.attachment, 0 if epoch is None else epoch.number)
        meta = replace(bare, sequence=place.sequence)
        self.place = replace(place, sequence=place.sequence + 1, ended=segment.control is Control.END)
        if segment.control is Control.END:
            return meta, _json(End(EndReason.FINISHED.value))
        sentence = "its producer says that it has no pictures to send"
        tick = Tick(None, False, FeedPhase.SILENT.value, 0, 0, Code.SOURCE_SILENT.value, sentence)
        return meta, _json(tick)

    def _going_on(self, segment: Segment) -> Place:
        """Return the place that the segment belongs to: that of the record before, or a new attachment."""
        place = self.place
        if not place.ended and place.kind is segment.kind:
            return place
        not_before_us = 0 if is_replay(self._stream) else place.epochs["end_us"]
        epochs = Epochs(segment.kind, max(segment.capture_us, not_before_us), not_before_us)
        attachment = new_attachment(segment.capture_us, place.attachment)
        return Place(attachment, 0, segment.kind, place.codec, "", epochs.state())


def _json(body: End | Tick) -> bytes:
    return json.dumps(to_body(body), separators=(",", ":"), sort_keys=True).encode()


def _assign(segment: Segment, value: bytes, place: Place) -> tuple[list[Piece], Place]:
    if segment.content_type == "video/mp4" and _lacks_init(value):
        raise _unreadable(
            segment, "is a fragment without init data; put the init segment (ftyp, moov) in front of each"
        )
    epochs = Epochs.restored(place.epochs)
    opened: list[_Open] = []
    try:
        with av.open(io.BytesIO(value), format=FORMATS[segment.content_type]) as container:
            if not container.streams.video:
                raise _unreadable(segment, "holds no video stream")
            if container.streams.video[0].codec_context is None:
                raise _unreadable(segment, "holds video of an unknown codec")
            _cut(segment, container, place, epochs, opened)
    except UnmaskError:
        raise
    except Exception as error:  # PyAV raises whatever FFmpeg or its own conversions stumble over
        raise _unreadable(
            segment, f"cannot be read as {segment.content_type} ({type(error).__name__})"
        ) from error
    if not opened:
        raise _unreadable(segment, "holds no video packets")
    pieces = [_piece(segment, place, piece) for piece in opened]
    last = opened[-1]
    return pieces, replace(
        place, sequence=last.sequence + 1, codec=_codec_state(last.codec), epochs=epochs.state()
    )


def _cut(segment: Segment, container: Any, place: Place, epochs: Epochs, opened: list[_Open]) -> None:
    """Put the video packets of an open segment into pieces of one epoch each."""
    watch = ParameterWatch(container.streams.video[0])
    sequence = place.sequence
    for packet in demuxed(container)[0]:
        changed = watch.update(packet)
        codec = _known(watch.current, place)
        if not opened:
            changed = _differs(epochs, place, codec, packet.time_base)
        reached, before = epochs.reached, epochs.current
        stamp = epochs.step(times_of(packet), segment.capture_us, changed)
        if not opened or stamp.epoch is not opened[-1].epoch:
            goes_on = before is not None and before is stamp.epoch
            started = stamp.pts if stamp.dts is None else stamp.dts
            missing = 0 if reached is None or not goes_on else started - reached - 2 * stamp.duration
            sequence += missing * stamp.epoch.time_base > HOLE_S
            opened.append(_Open(stamp.epoch, sequence, codec, [], []))
            sequence += 1
        flag = FLAGS[packet.is_corrupt, packet.is_discard]
        opened[-1].packets.append(restored(packet, stamp.pts, flag, stamp.epoch.time_base))
        opened[-1].pts.append(stamp.pts)


def _differs(epochs: Epochs, place: Place, codec: CodecParameters, time_base: Fraction) -> bool:
    """Whether decoding must begin anew with this segment."""
    epoch = epochs.current
    return epoch is not None and (place.codec != _codec_state(codec) or epoch.time_base != time_base)


def _known(codec: CodecParameters, place: Place) -> CodecParameters:
    """Return the parameters; those of the segment before if this one, begun at a recovery point, has none."""
    if codec.extradata or place.codec is None or place.codec["name"] != codec.name:
        return codec
    return CodecParameters(**{**place.codec, "extradata": bytes.fromhex(place.codec["extradata"])})


def _codec_state(codec: CodecParameters) -> dict[str, Any]:
    return asdict(codec) | {"extradata": codec.extradata.hex()}


def _piece(segment: Segment, place: Place, piece: _Open) -> Piece:
    first = piece.packets[0]
    meta = replace(
        segment.bare(place.attachment, piece.epoch.number),
        sequence=piece.sequence,
        epoch_anchor_us=piece.epoch.anchor_us,
        time_base=piece.epoch.time_base,
        first_pts=piece.epoch.first_pts,
        pts=min(piece.pts),
        starts_on_keyframe=first.is_keyframe and not first.is_corrupt,
        codec=piece.codec,
    )
    return meta, ChunkPackets(tuple(piece.packets), tuple(piece.pts), (), piece.codec)


def _lacks_init(value: bytes) -> bool:
    found = set(_boxes(value))
    return b"moof" in found and b"moov" not in found


def _boxes(value: bytes) -> Iterator[bytes]:
    """Yield the types of the top-level boxes (ISO 14496-12, 4.2) as far as their sizes can be followed."""
    at = 0
    while at + 8 <= len(value):
        size = int.from_bytes(value[at : at + 4], "big")
        yield value[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(value[at + 8 : at + 16], "big")
        if size < 8:  # 0: up to the end
            return
        at += size


def _unreadable(segment: Segment, what: str) -> UnmaskError:
    return UnmaskError(Code.CHUNK_INVALID, f"segment of {segment.stream} {what}")
