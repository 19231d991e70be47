"""Evidence clips: chunks remuxed without re-encoding into a file that any player shows (DESIGN 3.6)."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import av

from stream.chunks import Chunk, join_parts, open_chunk, read_chunk
from stream.errors import Code, UnmaskError
from stream.parameters import write_rotation
from stream.records import ChunkMeta

MP4, WEBM, MATROSKA = "video/mp4", "video/webm", "video/x-matroska"
SUFFIXES = {MP4: ".mp4", WEBM: ".webm", MATROSKA: ".mkv"}
_FORMATS = {MP4: "mp4", WEBM: "webm", MATROSKA: "matroska"}

WEBM_VIDEO = ("vp8", "vp9")
"""MP4 cannot carry VP8, and needs facts about VP9 that only its decoder knows."""

WEBM_AUDIO = ("opus", "vorbis")


@dataclass(frozen=True, slots=True)
class Clip:
    """A playable file. `first_us`, `last_us`: media time of its first and last picture (microseconds UTC)."""

    value: bytes
    content_type: str
    first_us: int
    last_us: int


@dataclass(slots=True)
class _Gop:
    """A keyframe and what follows it up to the next, in decode order; `video` holds (packet, pts)."""

    video: list[tuple[Any, int]] = field(default_factory=list)
    audio: list[Any] = field(default_factory=list)

    @property
    def key_pts(self) -> int:
        return self.video[0][1]

    @property
    def lowest_pts(self) -> int:
        return min(pts for _, pts in self.video)


def cut_clip(chunks: Iterable[Chunk], first_us: int, last_us: int, peak_us: int | None = None) -> Clip:
    """Return the pictures from `first_us` to `last_us` (media time), cut outward at keyframes.

    `chunks` are records of one stream, in any order; control records are passed over, parts are joined. If
    they are of several epochs, the clip is of the one that holds `peak_us` (default: the middle). Begins at
    the last keyframe not after `first_us` (the first there is, if there is none before) and ends before the
    first keyframe after which nothing up to `last_us` is shown. Leading pictures of the first keyframe
    cannot be decoded without what came before and are left out. Audio comes along if the container can
    carry its codec. MP4 with its index in front, or WebM or Matroska where MP4 cannot carry the codec.

    Raises `UnmaskError` (CHUNK_INVALID) if there is no keyframe up to `last_us` or a chunk cannot be read.
    """
    peak = (first_us + last_us) // 2 if peak_us is None else peak_us
    epoch = _epoch_of(_whole(chunks), peak)
    gops = list(_wanted(epoch, first_us, last_us))
    if not gops:
        sentence = f"no keyframe before the end of the range in {len(epoch)} chunks; a clip begins at one"
        raise UnmaskError(Code.CHUNK_INVALID, sentence)
    opening = gops[0]
    opening.video = [(packet, pts) for packet, pts in opening.video if pts >= opening.key_pts]
    try:
        return _remux(epoch, gops)
    except UnmaskError:
        raise
    except Exception as error:  # PyAV raises whatever FFmpeg or its own conversions stumble over
        sentence = (
            f"clip cannot be written from chunks of {epoch[0][0].stream} ({type(error).__name__}: {error})"
        )
        raise UnmaskError(Code.CHUNK_INVALID, sentence) from error


def _whole(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Return the media chunks in order, parts joined, none twice."""
    media = sorted(
        (chunk for chunk in chunks if chunk[0].control is None), key=lambda chunk: chunk[0].order()
    )
    whole = []
    for _, same in groupby(media, key=lambda chunk: chunk[0].order()[:3]):
        parts = {chunk[0].part: chunk for chunk in same}
        whole.append(join_parts(list(parts.values())))
    return whole


def _epoch_of(chunks: Sequence[Chunk], peak_us: int) -> list[Chunk]:
    """Return the chunks of the epoch nearest to `peak_us`."""
    epochs = [list(same) for _, same in groupby(chunks, key=lambda chunk: chunk[0].order()[:2])]
    timed = [epoch for epoch in epochs if any(meta.pts is not None for meta, _ in epoch)]
    if not timed:
        raise UnmaskError(Code.CHUNK_INVALID, f"no video in {len(chunks)} chunks; a clip must hold some")
    return min(timed, key=lambda epoch: _distance(epoch, peak_us))


def _distance(epoch: Sequence[Chunk], peak_us: int) -> int:
    times = [meta.media_us(meta.pts) for meta, _ in epoch if meta.pts is not None]
    return max(0, min(times) - peak_us, peak_us - max(times))


def _wanted(epoch: Sequence[Chunk], first_us: int, last_us: int) -> Iterator[_Gop]:
    """Yield the groups of pictures that hold the wanted range."""
    meta = epoch[0][0]
    for gop in _gops(epoch[_start(epoch, first_us) :]):
        if meta.media_us(gop.lowest_pts) > last_us:
            return
        yield gop


def _start(epoch: Sequence[Chunk], first_us: int) -> int:
    """Return the index of the chunk to begin with: that of the last keyframe not after `first_us`."""
    keys = [index for index, (meta, _) in enumerate(epoch) if meta.starts_on_keyframe]
    for index in reversed(keys):
        meta, value = epoch[index]
        if meta.pts is not None and meta.media_us(meta.pts) > first_us:
            continue
        if meta.media_us(read_chunk(meta, value).video_pts[0]) <= first_us:
            return index
    return keys[0] if keys else len(epoch)


def _gops(chunks: Sequence[Chunk]) -> Iterator[_Gop]:
    gop = _Gop()
    for meta, value in chunks:
        packets = read_chunk(meta, value)
        for packet, pts in zip(packets.video, packets.video_pts, strict=True):
            if packet.is_keyframe and gop.video:
                yield gop
                gop = _Gop()
            gop.video.append((packet, pts))
        gop.audio.extend(packets.audio)
    if gop.video:
        yield gop


def _remux(epoch: Sequence[Chunk], gops: Sequence[_Gop]) -> Clip:
    meta = epoch[0][0]
    video = [pair for gop in gops for pair in gop.video]
    order = sorted(pts for _, pts in video)
    length = sum(_durations(order))
    audio = list(_audible(gops, order[0] * meta.time_base, length * meta.time_base))
    templates = _with_audio(epoch) if audio else epoch[0]
    with open_chunk(*templates) as source, tempfile.TemporaryDirectory() as folder:
        content_type = _container_for(source)
        path = Path(folder) / f"clip{SUFFIXES[content_type]}"
        options = {"movflags": "faststart"} if content_type == MP4 else {}
        with av.open(str(path), "w", format=_FORMATS[content_type], options=options) as out:
            _fill(out, source, templates[0], video, audio)
        data = bytearray(path.read_bytes())
    if content_type == MP4 and templates[0].codec is not None:
        write_rotation(data, templates[0].codec.rotation)
    return Clip(bytes(data), content_type, meta.media_us(order[0]), meta.media_us(order[-1]))


def _with_audio(epoch: Sequence[Chunk]) -> Chunk:
    """Return a chunk whose container describes the audio stream too."""
    for meta, value in epoch:
        with open_chunk(meta, value) as container:
            if container.streams.video and container.streams.audio:
                return meta, value
    return epoch[0]


def _container_for(source: Any) -> str:
    name = source.streams.video[0].codec_context.codec.canonical_name
    if name in WEBM_VIDEO:
        sounds = [stream.codec_context.codec.canonical_name for stream in source.streams.audio[:1]]
        return WEBM if all(sound in WEBM_AUDIO for sound in sounds) else MATROSKA
    with av.open(tempfile.SpooledTemporaryFile(), "w", format="mp4") as trial:
        return MP4 if _added(trial, source.streams.video[0]) is not None else MATROSKA


def _added(out: Any, template: Any) -> Any | None:
    """Return the new output stream, None if the container cannot carry the codec."""
    try:
        return out.add_stream_from_template(template, opaque=True)
    except ValueError:
        return None


def _fill(out: Any, source: Any, meta: ChunkMeta, video: list[tuple[Any, int]], audio: list[Any]) -> None:
    pictures = _added(out, source.streams.video[0])
    if pictures is None:
        raise UnmaskError(Code.CHUNK_INVALID, f"video codec of {meta.stream} cannot be carried in a clip")
    if meta.codec is not None:
        context = pictures.codec_context
        context.width, context.height = meta.codec.width, meta.codec.height
        context.extradata = meta.codec.extradata or None
        if context.codec.canonical_name == "hevc" and out.format.name == "mp4":
            context.codec_tag = "hvc1"  # Apple's players refuse FFmpeg's default, hev1
    sound = _added(out, source.streams.audio[0]) if audio and source.streams.audio else None
    own = [pts for _, pts in video]
    origin = min(own)
    for (packet, pts), dts, shown in zip(video, _decode_times(own), _durations(own), strict=True):
        packet.time_base = meta.time_base
        packet.pts, packet.dts, packet.duration = max(pts, dts) - origin, dts - origin, shown
        packet.stream = pictures
        out.mux(packet)
    if sound is None:
        return
    last = -1
    for packet in audio:
        shifted = packet.pts - round(origin * meta.time_base / packet.time_base)
        last = max(last + 1, shifted)
        packet.pts = packet.dts = last
        packet.stream = sound
        out.mux(packet)


def _decode_times(pts: Sequence[int]) -> list[int]:
    """Return rising decode times, none after its pts: the sorted pts, moved back by the reordering delay."""
    order = sorted(pts)
    delay = max(sorted_pts - own for sorted_pts, own in zip(order, pts, strict=True))
    times: list[int] = []
    for stamp in order:
        times.append(max(stamp - delay, times[-1] + 1 if times else stamp - delay))
    return times


def _durations(pts: Sequence[int]) -> list[int]:
    """Return for how long each picture is shown: up to the next; the last as long as the one before it.

    Without durations the edit list of an MP4 ends before its last picture.
    """
    order = sorted(pts)
    gaps = [later - earlier for earlier, later in pairwise(order)]
    lengths = dict(zip(order, [*gaps, gaps[-1] if gaps else 0], strict=True))
    return [lengths[stamp] for stamp in pts]


def _audible(gops: Sequence[_Gop], start: Fraction, length: Fraction) -> Iterator[Any]:
    for gop in gops:
        for packet in gop.audio:
            if start <= packet.pts * packet.time_base < start + length:
                yield packet
