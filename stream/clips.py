"""Evidence clips: chunks remuxed without re-encoding into a file that any player shows (DESIGN 3.6)."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import av

from stream.chunks import Chunk, ChunkPackets, join_parts, open_chunk, read_chunk
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


_Record = list[Chunk]
"""The parts of a record, as far as they are there."""

_Run = list[tuple[Chunk, ChunkPackets]]
"""Chunks that follow each other, and what is in them."""


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


def cut_clip(
    chunks: Iterable[Chunk], first_us: int, last_us: int, peak_us: int | None = None, whole: bool = False
) -> Clip:
    """Return the pictures from `first_us` to `last_us` (media time), cut outward at keyframes.

    `chunks` are records of one stream, in any order; control records are passed over, parts are joined, what
    lacks one is lost. If they are of several epochs, the clip is of the one that holds `peak_us`
    (default: the middle). Begins at the last keyframe not after `first_us` (the first there is, if there is
    none before) and ends before the first keyframe after which nothing up to `last_us` is shown. Leading
    pictures of the first keyframe cannot be decoded without what came before and are left out. Audio comes
    along if the container can carry its codec. MP4 with its index in front, or WebM or Matroska where MP4
    cannot carry the codec.

    Where chunks cannot be read, or lack a part, the clip is of what lies nearest to the peak without a break.

    Raises `UnmaskError` (CHUNK_INVALID) if there is no keyframe up to `last_us`, and for a chunk that cannot
    be read if nothing else can, or if the `whole` is wanted.
    """
    peak = (first_us + last_us) // 2 if peak_us is None else peak_us
    runs, damage = _runs(_epoch_of(_records(chunks), peak))
    if damage is not None and (whole or not runs):
        raise damage
    epoch, gops = _nearest(runs, first_us, last_us, peak)
    opening = gops[0]
    opening.video = [(packet, pts) for packet, pts in opening.video if pts >= opening.key_pts]
    try:
        return _remux([chunk for chunk, _ in epoch], gops)
    except UnmaskError:
        raise
    except Exception as error:  # PyAV raises whatever FFmpeg or its own conversions stumble over
        stream = epoch[0][0][0].stream
        sentence = f"clip cannot be written from chunks of {stream} ({type(error).__name__}: {error})"
        raise UnmaskError(Code.CHUNK_INVALID, sentence) from error


def _records(chunks: Iterable[Chunk]) -> list[_Record]:
    """Return the media records in order, each with its parts, none twice."""
    media = sorted(
        (chunk for chunk in chunks if chunk[0].control is None), key=lambda chunk: chunk[0].order()
    )
    same = groupby(media, key=lambda chunk: chunk[0].order()[:3])
    return [list({chunk[0].part: chunk for chunk in parts}.values()) for _, parts in same]


def _epoch_of(records: Sequence[_Record], peak_us: int) -> list[_Record]:
    """Return the records of the epoch nearest to `peak_us`."""
    epochs = [list(same) for _, same in groupby(records, key=lambda parts: parts[0][0].order()[:2])]
    timed = [epoch for epoch in epochs if any(parts[0][0].pts is not None for parts in epoch)]
    if not timed:
        raise UnmaskError(Code.CHUNK_INVALID, f"no video in {len(records)} chunks; a clip must hold some")
    return min(timed, key=lambda epoch: _distance([parts[0][0] for parts in epoch], peak_us))


def _distance(metas: Iterable[ChunkMeta], peak_us: int) -> int:
    times = [meta.media_us(meta.pts) for meta in metas if meta.pts is not None]
    return max(0, min(times) - peak_us, peak_us - max(times))


def _runs(epoch: Sequence[_Record]) -> tuple[list[_Run], UnmaskError | None]:
    """Read the chunks; return what is readable without a break, and the first complaint.

    What lacks a part is a break and no complaint: records are read from wherever the log begins.
    """
    runs: list[_Run] = [[]]
    damage: UnmaskError | None = None
    for parts in epoch:
        if len(parts) < parts[0][0].parts:
            runs.append([])
            continue
        try:
            meta, value = join_parts(parts)
            runs[-1].append(((meta, value), read_chunk(meta, value)))
        except UnmaskError as error:
            damage = damage or error
            runs.append([])
    return [run for run in runs if any(packets.video for _, packets in run)], damage


def _nearest(runs: Sequence[_Run], first_us: int, last_us: int, peak_us: int) -> tuple[_Run, list[_Gop]]:
    """Return the run nearest to the peak that holds anything of the wanted range, and what it holds."""
    for run in sorted(runs, key=lambda run: _distance([meta for (meta, _), _ in run], peak_us)):
        gops = list(_wanted(run, first_us, last_us))
        if gops:
            return run, gops
    count = sum(map(len, runs))
    sentence = f"no keyframe before the end of the range in {count} chunks; a clip begins at one"
    raise UnmaskError(Code.CHUNK_INVALID, sentence)


def _wanted(run: _Run, first_us: int, last_us: int) -> Iterator[_Gop]:
    """Yield the groups of pictures that hold the wanted range."""
    meta = run[0][0][0]
    for gop in _gops(run[_start(run, first_us) :]):
        if meta.media_us(gop.lowest_pts) > last_us:
            return
        yield gop


def _start(run: _Run, first_us: int) -> int:
    """Return the index of the chunk to begin with: that of the last keyframe not after `first_us`."""
    keys = [index for index, ((meta, _), _) in enumerate(run) if meta.starts_on_keyframe]
    for index in reversed(keys):
        (meta, _), packets = run[index]
        if packets.video and meta.media_us(packets.video_pts[0]) <= first_us:
            return index
    return keys[0] if keys else len(run)


def _gops(run: _Run) -> Iterator[_Gop]:
    gop = _Gop()
    for _, packets in run:
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
