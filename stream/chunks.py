"""Media chunks: packets of one stream, at most `chunk_ms` long, in a standard container (DESIGN 3.2).

The container is NUT for every codec. It keeps packet bytes, pts and keyframe flags exactly, takes any codec
that reaches live video without a bitstream filter (also ADTS AAC, which fragmented MP4 refuses), and costs
least. Measured with 500 ms chunks, bytes over the packets' own:

| clip                      | NUT    | Matroska | fragmented MP4 | MPEG-TS |
|---------------------------|--------|----------|----------------|---------|
| 1080p H.264, 5 Mbit/s     | 0.28 % | 0.37 %   | 0.69 %         | 4.5 %   |
| 512x512 H.264, 1 Mbit/s   | 1.0 %  | 1.6 %    | 3.0 %          | 15 %    |
| 512x512 H.264, 0.6 Mbit/s | 1.8 %  | 2.9 %    | 5.4 %          | 23 %    |

That is 500 to 700 bytes a chunk; the headers (codec parameters) come to 450 more.

What NUT does not keep, and where it goes instead:

- Negative timestamps: all of a chunk are shifted by `unmask_base` (a tag in the NUT header, in units of the
  video time base); the reader shifts back.
- The time base: FFmpeg's muxer refines it by a whole factor; the reader divides by it again, exactly.
- Per-packet flags: `unmask_flags`, one letter per video packet: `.` plain, `c` corrupt, `d` hidden (decoded
  for reference only: MP4 edit lists), `x` both. Its length tells how many video packets there must be, and
  `unmask_size` how many bytes of packets in all: a truncated NUT file reads as a shorter one.
- dts: not kept. Decoders do not need it, and a clip gets new ones (`stream.clips`).

Chunks need not start at keyframes and need not be decodable alone: the reader's decoder lives across the
chunks of an epoch. A chunk is also cut before every keyframe, so a keyframe is always its chunk's first
video packet and `starts_on_keyframe` finds them all.
"""

import hashlib
import io
import json
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import repeat
from math import ceil
from typing import Any

import av

from stream.clock import Clock
from stream.epochs import Epoch, Epochs, Stamp, Times
from stream.errors import Code, UnmaskError
from stream.parameters import ParameterWatch, new_extradata, stream_parameters
from stream.records import ChunkMeta, CodecParameters, Control, Kind

log = logging.getLogger(__name__)

Chunk = tuple[ChunkMeta, bytes]

NUT = "application/x-nut"
JSON = "application/json"

FORMATS = {NUT: "nut", "video/mp4": "mp4", "video/mp2t": "mpegts", "video/x-matroska": "matroska"}
"""FFmpeg's demuxer for each content type (DESIGN 3.2). Only NUT is written here."""

NUT_OPTIONS = {"avoid_negative_ts": "disabled", "write_index": "0"}
"""Timestamps as given; no index behind the packets, which nobody seeks by."""

MAX_PACKETS = 1000
"""FFmpeg's NUT reader cuts a tag at 1023 characters, and there is one flag per video packet."""

MAX_CHUNK_BYTES = 4 * 1024 * 1024
"""A chunk is cut before it grows beyond this: half of the default `max_message_bytes`, since one more packet
and the container come on top."""

MAX_EARLY_AUDIO = 64
"""Audio packets kept until the first video packet says which epoch they belong to: 1.4 s of AAC."""

AUDIO_STEP = Fraction(1, 1000)
"""How far audio timestamps are moved apart where the source's do not rise: more than one tick of the audio
sample rate, which the muxer rounds to."""

START_TIME_BASE = Fraction(1, 1_000_000)
"""Time base of control records before any video was seen."""

FLAGS = {(False, False): ".", (True, False): "c", (False, True): "d", (True, True): "x"}
"""The letter of a packet in `unmask_flags`, by whether it is corrupt and whether it is hidden."""


@dataclass(frozen=True, slots=True)
class SoundParameters:
    """What a decoder needs beside audio packets; codec and channels by FFmpeg's names."""

    codec: str
    rate_hz: int
    layout: str
    extradata: bytes


@dataclass(frozen=True, slots=True)
class ChunkPackets:
    """The packets of one chunk, in decode order, ready for a decoder that lives across chunks.

    Video packets have `pts` in `ChunkMeta.time_base` as the source numbered them and `dts` None. A packet
    whose `pts` is None is decoded for reference only: so is the frame that comes of it, and it must not be
    shown. `video_pts` has every video packet's pts, hidden ones too. Audio packets are on the same time
    line, in a time base of their own. `codec` is the chunk's own parameters, or, of other producers, what
    their container says.
    """

    video: tuple[Any, ...]
    video_pts: tuple[int, ...]
    audio: tuple[Any, ...]
    codec: CodecParameters
    sound: SoundParameters | None = None
    """Of the audio packets; None without any."""


@dataclass(slots=True)
class _Pending:
    """What has come in since the last chunk. `first_us` is the first time stamp of each kind of stream."""

    epoch: Epoch
    capture_us: int
    due_s: float
    video: list[tuple[Any, int]] = field(default_factory=list)
    audio: list[tuple[Any, int]] = field(default_factory=list)
    size: int = 0
    first: dict[str, Fraction] = field(default_factory=dict)

    def fits(self, kind: str, end: Fraction, size: int, longest: Fraction) -> bool:
        if len(self.video) >= MAX_PACKETS or len(self.audio) >= MAX_PACKETS:
            return False
        return end - self.first.get(kind, end) <= longest and self.size + size <= MAX_CHUNK_BYTES


class Chunker:
    """Turns the packets of one attachment into chunks and gives every record its sequence number.

    Packets are only referred to, never changed. Not for use by several threads at once.

    `not_before_us`: `media_end_us` of the previous attachment of the stream, so that media time never
    steps back across attachments (0: none).
    """

    def __init__(
        self, stream: str, attachment: str, kind: Kind, chunk_ms: int, clock: Clock, not_before_us: int = 0
    ) -> None:
        self._stream = stream
        self._attachment = attachment
        self._kind = kind
        self._longest = Fraction(chunk_ms, 1000)
        self._clock = clock
        self._attach_us = max(clock.now_us(), not_before_us)
        self._epochs = Epochs(kind, self._attach_us, not_before_us)
        self._sequence = 0
        self._parameters: ParameterWatch | None = None
        self._codec: CodecParameters | None = None
        self._shelf = av.open(io.BytesIO(), "w", format="nut")
        self._index: dict[str, int] = {}
        self._templates: dict[str, Any] = {}
        self._audio_extradata: bytes | None = None
        self._early: deque[Any] = deque()
        self._pending: _Pending | None = None
        self.dropped_audio = 0
        """Audio packets left out: too long before the first video packet, without a timestamp, of a codec
        that the container does not take, or of unknown rate."""

    @property
    def media_end_us(self) -> int:
        """Media time at which the last video frame pushed so far ends (microseconds UTC)."""
        return self._epochs.end_us

    def push(self, packet: Any) -> list[Chunk]:
        """Take the next packet in demux order; return the chunks it completes, mostly none.

        Flush packets (size 0) are ignored. The first video and the first audio stream seen are taken,
        packets of others are not. Raises `UnmaskError` (SOURCE_INVALID) if the video codec cannot be carried.
        """
        kind = packet.stream.type
        if not packet.size or kind not in ("video", "audio"):
            return []
        if kind not in self._index:
            self._index[kind] = packet.stream_index
            self._take(kind, packet.stream)
        if self._index[kind] != packet.stream_index:
            return []
        return self._video(packet) if kind == "video" else self._audio(packet)

    def flush(self) -> list[Chunk]:
        """Return what is pending as a chunk: before `gap` and `end`, and when a source closes."""
        pending, self._pending = self._pending, None
        if pending is None or not (pending.video or pending.audio):
            return []
        return [self._write(pending)]

    def flush_due(self) -> list[Chunk]:
        """Return what is pending if it has waited for `chunk_ms` of wall time (a live source that stalls)."""
        if self._pending is None or self._clock.monotonic() < self._pending.due_s:
            return []
        return self.flush()

    def control(self, control: Control, body: dict[str, Any]) -> Chunk:
        """Return a control record in sequence.

        Call `flush` before `gap` and `end`: what is pending is older than they are.
        """
        value = json.dumps(body, separators=(",", ":"), sort_keys=True).encode()
        now = self._clock.now_us()
        epoch = self._epochs.current
        meta = ChunkMeta(
            stream=self._stream,
            attachment=self._attachment,
            epoch=0 if epoch is None else epoch.number,
            sequence=self._next(),
            kind=self._kind,
            capture_us=now,
            epoch_anchor_us=self._attach_us if epoch is None else epoch.anchor_us,
            time_base=START_TIME_BASE if epoch is None else epoch.time_base,
            first_pts=0 if epoch is None else epoch.first_pts,
            pts=None,
            starts_on_keyframe=False,
            codec=None,
            content_type=JSON,
            content_hash=content_hash(value),
            control=control,
        )
        return meta, value

    def _take(self, kind: str, stream: Any) -> None:
        """Keep a copy of the stream's parameters: reading them once the source is closed would crash."""
        name = stream.codec_context.name if stream.codec_context else "unknown"
        if kind == "audio" and not _is_known(stream.codec_context):
            log.warning("%s: audio %s is of unknown rate or layout and is left out", self._stream, name)
            return
        try:
            self._templates[kind] = self._shelf.add_stream_from_template(stream, opaque=True)
        except ValueError:
            if kind == "audio":
                log.warning("%s: audio codec %s cannot be carried and is left out", self._stream, name)
                return
            sentence = f"video codec {name} cannot be carried; publish H.264, HEVC, VP8, VP9 or AV1"
            raise UnmaskError(Code.SOURCE_INVALID, sentence) from None

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence - 1

    def _video(self, packet: Any) -> list[Chunk]:
        if self._parameters is None:
            self._parameters = ParameterWatch(packet.stream)
        changed = self._parameters.update(packet)
        stamp = self._epochs.step(times_of(packet), self._clock.now_us(), changed)
        base = stamp.epoch.time_base
        end = ((stamp.pts if stamp.dts is None else stamp.dts) + stamp.duration) * base
        done = [] if self._goes_on(packet, stamp, end) else self.flush()
        self._codec = self._parameters.current
        pending = self._open(stamp.epoch)
        pending.video.append((packet, stamp.pts))
        pending.size += packet.size
        pending.first.setdefault("video", end - stamp.duration * base)
        while self._early:
            self._keep_audio(pending, self._early.popleft())
        return done

    def _goes_on(self, packet: Any, stamp: Stamp, end: Fraction) -> bool:
        """Return whether the packet belongs into the pending chunk."""
        pending = self._pending
        if pending is None or pending.epoch is not stamp.epoch:
            return False
        if packet.is_keyframe and pending.video:
            return False
        return pending.fits("video", end, packet.size, self._longest)

    def _audio(self, packet: Any) -> list[Chunk]:
        extradata = new_extradata(packet)
        if extradata is not None:
            self._audio_extradata = extradata
        if "audio" not in self._templates or (packet.pts is None and packet.dts is None):
            self.dropped_audio += 1
            return []
        epoch = self._epochs.current
        if epoch is None:
            self._early.append(packet)
            if len(self._early) > MAX_EARLY_AUDIO:
                self._early.popleft()
                self.dropped_audio += 1
            return []
        pts = self._epochs.near_video(_stamp(packet), packet.time_base)
        end = (pts + (packet.duration or 0)) * packet.time_base
        done = []
        if self._pending is not None and not self._pending.fits("audio", end, packet.size, self._longest):
            done = self.flush()
        self._keep_audio(self._open(epoch), packet)
        return done

    def _keep_audio(self, pending: _Pending, packet: Any) -> None:
        pts = self._epochs.near_video(_stamp(packet), packet.time_base)
        pending.audio.append((packet, pts))
        pending.size += packet.size
        pending.first.setdefault("audio", pts * packet.time_base)

    def _open(self, epoch: Epoch) -> _Pending:
        if self._pending is None:
            due = self._clock.monotonic() + float(self._longest)
            self._pending = _Pending(epoch, self._clock.now_us(), due)
        return self._pending

    def _write(self, pending: _Pending) -> Chunk:
        assert self._codec is not None
        value = _write_nut(pending, self._templates, self._codec, self._audio_extradata)
        epoch = pending.epoch
        meta = ChunkMeta(
            stream=self._stream,
            attachment=self._attachment,
            epoch=epoch.number,
            sequence=self._next(),
            kind=self._kind,
            capture_us=pending.capture_us,
            epoch_anchor_us=epoch.anchor_us,
            time_base=epoch.time_base,
            first_pts=epoch.first_pts,
            pts=min((pts for _, pts in pending.video), default=None),
            starts_on_keyframe=bool(pending.video) and pending.video[0][0].is_keyframe,
            codec=self._codec,
            content_type=NUT,
            content_hash=content_hash(value),
        )
        return meta, value


def content_hash(value: bytes) -> str:
    """Return what the header `content_hash` says of `value`: SHA-256 in hex."""
    return hashlib.sha256(value).hexdigest()


def read_chunk(meta: ChunkMeta, value: bytes) -> ChunkPackets:
    """Return the packets of a chunk, with the source's own timestamps.

    Reads NUT, MP4, MPEG-TS and Matroska by `meta.content_type`. Raises `UnmaskError` (CHUNK_INVALID) and
    nothing else if the value is not what its headers say: another hash, another type, truncated, garbage.
    An empty `content_hash` (other producers) is not checked.
    """
    if meta.control is not None:
        raise _invalid(meta, f"is a control record ({meta.control}), not media")
    if meta.parts != 1:
        raise _invalid(meta, f"is part {meta.part} of {meta.parts}; join the parts first")
    if meta.content_type not in FORMATS:
        raise _invalid(meta, f"has content-type {meta.content_type!r}; known are {', '.join(FORMATS)}")
    if meta.content_hash and meta.content_hash != content_hash(value):
        raise _invalid(meta, "does not match its content_hash")
    try:
        return _read_nut(meta, value) if meta.content_type == NUT else _read_foreign(meta, value)
    except UnmaskError:
        raise
    except Exception as error:  # PyAV raises whatever FFmpeg or its own conversions stumble over
        raise _invalid(meta, f"cannot be read as {meta.content_type} ({type(error).__name__})") from error


def open_chunk(meta: ChunkMeta, value: bytes) -> Any:
    """Return the open PyAV container of a chunk's value, for use in a `with`.

    Raises whatever PyAV raises if it cannot be opened.
    """
    name = FORMATS[meta.content_type]
    if name != "nut":
        return av.open(io.BytesIO(value), format=name)
    # As stored: no parser may split packets, no guess may fill in timestamps. With no decoder allowed,
    # opening does not decode the first picture to find out what the headers say (1080p: 0.2 ms, not 4 ms).
    options = {"fflags": "nofillin+noparse", "codec_whitelist": "none"}
    return av.open(io.BytesIO(value), format=name, options=options)


def split_parts(meta: ChunkMeta, value: bytes, limit: int) -> list[Chunk]:
    """Return the record in parts of at most `limit` (> 0) bytes each; one part if it fits.

    All parts have the sequence and the `content_hash` of the whole.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1 byte")
    parts = max(1, -(-len(value) // limit))
    return [
        (replace(meta, part=part, parts=parts), value[part * limit : (part + 1) * limit])
        for part in range(parts)
    ]


def join_parts(parts: Sequence[Chunk]) -> Chunk:
    """Return the record that `split_parts` split, given its parts in any order.

    Raises `UnmaskError` (CHUNK_INVALID) if parts are missing, doubled, foreign or altered.
    """
    if not parts:
        raise UnmaskError(Code.CHUNK_INVALID, "no parts to join; there must be at least one")
    ordered = sorted(parts, key=lambda chunk: chunk[0].part)
    whole = replace(ordered[0][0], part=0, parts=1)
    count = ordered[0][0].parts
    if [meta.part for meta, _ in ordered] != list(range(count)):
        found = ", ".join(str(meta.part) for meta, _ in ordered[:8])
        raise _invalid(whole, f"has parts {found}; they must be 0 to {count - 1}, each once")
    if any(replace(meta, part=0, parts=1) != whole or meta.parts != count for meta, _ in ordered):
        raise _invalid(whole, "has parts of other records among its own")
    value = b"".join(part for _, part in ordered)
    if whole.content_hash and content_hash(value) != whole.content_hash:
        raise _invalid(whole, "joined from its parts does not match its content_hash")
    return whole, value


def _invalid(meta: ChunkMeta, what: str) -> UnmaskError:
    where = f"{meta.stream} {meta.attachment}/{meta.epoch}/{meta.sequence}"
    return UnmaskError(Code.CHUNK_INVALID, f"chunk {where} {what}")


def times_of(packet: Any) -> Times:
    return Times(
        pts=packet.pts,
        dts=packet.dts,
        duration=packet.duration or None,
        time_base=packet.time_base,
        keyframe=packet.is_keyframe,
        hidden=packet.is_discard,
    )


def _is_known(audio: Any) -> bool:
    """Return whether the attach found out what the container's header must say of audio."""
    return audio is None or bool(audio.sample_rate and audio.layout.nb_channels)


def _stamp(packet: Any) -> int:
    """Return the packet's pts, or its dts if it has none."""
    return int(packet.dts if packet.pts is None else packet.pts)


def _write_nut(
    pending: _Pending, templates: dict[str, Any], codec: CodecParameters, audio_extradata: bytes | None
) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="nut", options=NUT_OPTIONS) as out:
        video = out.add_stream_from_template(templates["video"], opaque=True)
        # A size of 0, unknown until the first keyframe, would make the file unreadable.
        video.codec_context.width, video.codec_context.height = codec.width or 1, codec.height or 1
        video.codec_context.extradata = codec.extradata or None
        base = _base(pending)
        out.metadata["unmask_base"] = str(base)
        out.metadata["unmask_flags"] = "".join(
            FLAGS[packet.is_corrupt, packet.is_discard] for packet, _ in pending.video
        )
        out.metadata["unmask_size"] = str(pending.size)
        audio = None
        if pending.audio:
            audio = out.add_stream_from_template(templates["audio"], opaque=True)
            if audio_extradata is not None:
                audio.codec_context.extradata = audio_extradata or None
        for packet in _video_copies(pending, base, video):
            out.mux(packet)
        for packet in _audio_copies(pending, base, audio):
            out.mux(packet)
    return file.getvalue()


def _base(pending: _Pending) -> int:
    """Return what to subtract from every timestamp (units of the video time base) so that none is negative.

    The made-up dts lie at most as many ticks before the smallest pts as there are packets.
    """
    unit = pending.epoch.time_base
    lowest = [pts - len(pending.video) for _, pts in pending.video]
    lowest += [(pts * packet.time_base) // unit - 1 for packet, pts in pending.audio]
    return min(lowest)


def _video_copies(pending: _Pending, base: int, stream: Any) -> Iterable[Any]:
    """Yield the video packets for the muxer, with dts made up: rising, never above a later pts.

    NUT does not store dts, its muxer only wants to see legal ones.
    """
    decode_times = []
    lowest = None
    for back, (_, pts) in enumerate(reversed(pending.video)):
        lowest = pts if lowest is None else min(lowest, pts)
        decode_times.append(lowest - back)
    for (packet, pts), dts in zip(pending.video, reversed(decode_times), strict=True):
        copy = av.Packet(packet)
        copy.time_base = pending.epoch.time_base
        copy.pts, copy.dts = pts - base, dts - base
        copy.is_keyframe = packet.is_keyframe
        copy.stream = stream
        yield copy


def _audio_copies(pending: _Pending, base: int, stream: Any) -> Iterable[Any]:
    """Yield the audio packets for the muxer; where the source's timestamps do not rise they are made to."""
    last = None
    for packet, pts in pending.audio:
        copy = av.Packet(packet)
        copy.time_base = packet.time_base
        stamp = round(pts - base * pending.epoch.time_base / packet.time_base)
        last = stamp if last is None else max(last + ceil(AUDIO_STEP / packet.time_base), stamp)
        copy.pts = copy.dts = last
        copy.is_keyframe = packet.is_keyframe
        copy.stream = stream
        yield copy


def _read_nut(meta: ChunkMeta, value: bytes) -> ChunkPackets:
    if meta.codec is None:
        raise _invalid(meta, "has no header codec; every chunk must carry it")
    with open_chunk(meta, value) as container:
        flags = container.metadata.get("unmask_flags", "")
        base = int(container.metadata["unmask_base"])
        video, audio = demuxed(container)
        size = sum(packet.size for packet in video + audio)
        promised = int(container.metadata["unmask_size"])
        if len(video) != len(flags) or size != promised:
            raise _invalid(
                meta,
                f"holds {len(video)} video packets, {size} bytes in all; "
                f"its header says {len(flags)} and {promised}",
            )
        pts = tuple(_ticks(packet, meta.time_base) + base for packet in video)
        shown = tuple(map(restored, video, pts, flags, repeat(meta.time_base)))
        heard = tuple(_restored_audio(packet, base * meta.time_base) for packet in audio)
        sound = _sound_parameters(container) if heard else None
    lowest = min(pts, default=None)
    if lowest != meta.pts:
        raise _invalid(meta, f"begins at pts {lowest}; its header says {meta.pts}")
    return ChunkPackets(shown, pts, heard, meta.codec, sound)


def demuxed(container: Any) -> tuple[list[Any], list[Any]]:
    """Return the packets of the first video and the first audio stream."""
    chosen = [*container.streams.video[:1], *container.streams.audio[:1]]
    packets = [packet for packet in container.demux(chosen) if packet.size]
    video = [packet for packet in packets if packet.stream.type == "video"]
    return video, [packet for packet in packets if packet.stream.type == "audio"]


def _sound_parameters(container: Any) -> SoundParameters | None:
    """Return what a decoder needs beside the audio packets; None if FFmpeg has none for them."""
    context = container.streams.audio[0].codec_context
    if context is None or not context.sample_rate or not context.layout.nb_channels:
        return None
    return SoundParameters(
        context.name, context.sample_rate, context.layout.name, bytes(context.extradata or b"")
    )


def _ticks(packet: Any, time_base: Fraction) -> int:
    ticks = Fraction(packet.pts) * packet.time_base / time_base
    if ticks.denominator != 1:
        raise ValueError(f"pts {packet.pts} is not a whole number of {time_base} s")
    return int(ticks)


def restored(packet: Any, pts: int, flag: str, time_base: Fraction) -> Any:
    # A packet of one's own: the demuxed one points at its stream, which ends with the container.
    copy = av.Packet(packet)
    copy.time_base = time_base
    copy.pts = None if flag in "dx" else pts
    copy.is_keyframe = packet.is_keyframe
    copy.is_corrupt = flag in "cx"
    return copy


def _restored_audio(packet: Any, base_s: Fraction) -> Any:
    copy = av.Packet(packet)
    copy.time_base = packet.time_base
    copy.pts = copy.dts = _stamp(packet) + round(base_s / packet.time_base)
    copy.is_keyframe = packet.is_keyframe
    return copy


def _read_foreign(meta: ChunkMeta, value: bytes) -> ChunkPackets:
    with open_chunk(meta, value) as container:
        if not container.streams.video:
            raise _invalid(meta, "holds no video stream")
        codec = meta.codec or stream_parameters(container.streams.video[0])
        video, audio = demuxed(container)
        pts = tuple(_foreign_ticks(packet, meta.time_base) for packet in video)
        flags = (FLAGS[packet.is_corrupt, packet.is_discard] for packet in video)
        shown = tuple(map(restored, video, pts, flags, repeat(meta.time_base)))
        heard = tuple(_restored_audio(packet, Fraction(0)) for packet in audio)
        sound = _sound_parameters(container) if heard else None
    return ChunkPackets(shown, pts, heard, codec, sound)


def _foreign_ticks(packet: Any, time_base: Fraction) -> int:
    ticks: Fraction = _stamp(packet) * packet.time_base / time_base
    return round(ticks)
