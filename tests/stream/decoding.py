"""What the decoder tests share: a clip as log records, the frames it must give, a decoder run to its end."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from detectors.readings import Image
from stream.chunks import Chunker
from stream.clock import FakeClock
from stream.decode import DecodeSettings, StreamDecoder
from stream.foreign import Place
from stream.frames import Applied, DecoderEvent, Failed, ResumePoint, SampledFrame
from stream.pictures import Pictures
from stream.records import ChunkMeta, Control, Kind, Record, encode_headers
from tests.stream.media import demux

EVERY = 1000.0
"""A sampling rate that takes every frame of any test clip."""

ATTACHMENT = f"{1:016x}"
START_US = 1_700_000_000_000_000

Chunk = tuple[ChunkMeta, bytes]


def chunked(
    paths: Path | Sequence[Path],
    chunk_ms: int = 200,
    *,
    stream: str = "cam",
    attachment: str = ATTACHMENT,
    start_us: int = START_US,
    end: bool = True,
    keep: Callable[[int, Any], bool] = lambda index, packet: True,
    change: Callable[[int, Any], Any] = lambda index, packet: packet,
) -> list[Chunk]:
    """Return the records that ingest writes for the clips; packets may be left out or changed before."""
    clock = FakeClock(start_us)
    chunker = Chunker(stream, attachment, Kind.LIVE, chunk_ms, clock)
    chunks = [chunker.control(Control.START, {})]
    for path in [paths] if isinstance(paths, Path) else paths:
        container, packets = demux(path)
        with container:
            for index, packet in enumerate(packets):
                if keep(index, packet):
                    chunks += chunker.push(change(index, packet))
    chunks += chunker.flush()
    if end:
        chunks.append(chunker.control(Control.END, {}))
    return chunks


def with_bytes(packet: Any, data: bytes) -> Any:
    """Return a packet like this one with other content."""
    copy = av.Packet(data)
    copy.stream = packet.stream
    copy.time_base = packet.time_base
    copy.pts, copy.dts, copy.duration = packet.pts, packet.dts, packet.duration
    copy.is_keyframe = packet.is_keyframe
    return copy


def as_records(chunks: Iterable[Chunk], first_offset: int = 0) -> list[Record]:
    """Return the chunks as records of the topic `media`."""
    return [
        Record("media", 0, first_offset + index, meta.stream, value, encode_headers(meta), meta.capture_us)
        for index, (meta, value) in enumerate(chunks)
    ]


def decoder(
    resume: ResumePoint | None = None, fps: float = EVERY, place: Place | None = None, **settings: Any
) -> StreamDecoder:
    return StreamDecoder(DecodeSettings(**settings), resume or ResumePoint(), lambda: fps, place)


def run(chunks: Sequence[Chunk], into: StreamDecoder | None = None, first: int = 0) -> list[DecoderEvent]:
    """Feed chunks[first:] with their index as offset; return all events."""
    target = into or decoder()
    events: list[DecoderEvent] = []
    for offset in range(first, len(chunks)):
        events += target.feed(offset, *chunks[offset])
    return events


def frames(events: Iterable[DecoderEvent]) -> list[SampledFrame]:
    return [event for event in events if isinstance(event, SampledFrame)]


def applied(events: Iterable[DecoderEvent]) -> list[Applied]:
    return [event for event in events if isinstance(event, Applied)]


def failed(events: Iterable[DecoderEvent]) -> list[Failed]:
    return [event for event in events if isinstance(event, Failed)]


@dataclass(frozen=True, slots=True)
class Shown:
    """What must be the same of a frame whatever way it was decoded."""

    media_us: int
    pts: int
    picture: str
    cut: bool


def shown(frame: SampledFrame) -> Shown:
    digest = hashlib.md5(frame.image.tobytes(), usedforsecurity=False).hexdigest()
    return Shown(frame.media_us, frame.pts, digest, frame.cut)


def source_pictures(path: Path) -> list[tuple[int, Image]]:
    """Return (pts, picture) of every frame as FFmpeg decodes the file."""
    pictures = Pictures(10_000)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        return [(frame.pts or 0, pictures.convert(frame)[0]) for frame in container.decode(stream)]


def resume_after(events: Sequence[DecoderEvent], offset: int) -> tuple[ResumePoint, int]:
    """Return what the worker keeps once record `offset` is applied: the resume point and `decode_from`."""
    point, decode_from, last_sample = ResumePoint(), 0, None
    for event in events:
        if isinstance(event, SampledFrame):
            last_sample = event.media_us
        elif isinstance(event, Applied):
            decode_from = event.decode_from
            meta = event.meta
            point = ResumePoint(meta.attachment, meta.epoch, event.last_pts, last_sample)
        if not isinstance(event, SampledFrame) and event.offset == offset:
            return point, decode_from
    raise AssertionError(f"record {offset} was not applied")
