"""Test video made on the spot: any codec and container, with the frame number readable in every picture."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from stream.chunks import Chunk, Chunker, read_chunk
from stream.clock import Clock, FakeClock
from stream.parameters import write_rotation
from stream.records import CodecParameters, Kind

Image = npt.NDArray[np.uint8]

AUDIO_RATE = 48_000
BITS = 12
"""The frame number is drawn as this many blocks, so it wraps at 4096."""

ENCODERS = {
    "h264": "libx264",
    "hevc": "libx265",
    "vp8": "libvpx",
    "vp9": "libvpx-vp9",
    "av1": "libsvtav1",
    "mpeg2": "mpeg2video",
}
FORMATS = {".ts": "mpegts", ".mkv": "matroska", ".webm": "webm", ".flv": "flv", ".mp4": "mp4", ".nut": "nut"}


@dataclass(frozen=True, slots=True)
class Seen:
    """One decoded frame: pts in the units of the container's stream, hash over every plane."""

    pts: int
    time: Fraction
    width: int
    height: int
    md5: str


def has_encoder(codec: str) -> bool:
    """Return whether this PyAV can encode `codec` (a key of ENCODERS)."""
    return _can_encode(ENCODERS[codec])


def _can_encode(name: str) -> bool:
    try:
        av.Codec(name, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def numbered(index: int, width: int = 160, height: int = 120) -> Image:
    """Return RGB picture `index`: a drifting gradient, a moving square, the number in blocks on top."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = (x + 2 * index) % 256
    image[..., 1] = (y + 3 * index) % 256
    image[..., 2] = (x + y + index) % 256
    side = height // 5
    left = (4 * index) % (width - side)
    top = height // 3 + (2 * index) % (height // 3)
    image[top : top + side, left : left + side] = (240, 240, 240)
    block = width // BITS
    for bit in range(BITS):
        image[:block, bit * block : (bit + 1) * block] = 235 if index >> bit & 1 else 16
    return image


def read_number(image: Image) -> int:
    """Return the number that `numbered` drew into an RGB or grey picture."""
    block = image.shape[1] // BITS
    centre = slice(block // 4, max(block // 4 + 1, 3 * block // 4))
    number = 0
    for bit in range(BITS):
        cell = image[centre, bit * block + block // 4 : bit * block + max(block // 4 + 1, 3 * block // 4)]
        number |= int(cell.mean() > 125) << bit
    return number


def uneven_times(count: int, seed: int = 1) -> list[int]:
    """Return `count` strictly rising frame times in milliseconds, 10 to 120 ms apart (variable rate)."""
    steps = np.random.default_rng(seed).integers(10, 120, count)
    return [0, *np.cumsum(steps[:-1]).tolist()]


def make_clip(
    path: Path,
    *,
    codec: str = "h264",
    seconds: float = 2.0,
    fps: int = 25,
    size: tuple[int, int] = (160, 120),
    gop: int = 25,
    bframes: int = 2,
    open_gop: bool = False,
    times_ms: Sequence[int] | None = None,
    audio: str | None = "aac",
    start_s: float = 0.0,
    first_number: int = 0,
    picture: Callable[[int], Image] | None = None,
    crf: int = 30,
    mux_options: dict[str, str] | None = None,
    x264: str = "",
) -> Path:
    """Encode a clip to `path`; the suffix chooses the container (see FORMATS). Return `path`.

    `times_ms` makes the frame rate variable (then `seconds`, `fps` do not count). `start_s` shifts every
    timestamp. `picture(i)` gives RGB picture `i`; default `numbered`. `audio` is an encoder name or None.
    `x264` is added to the parameters of H.264.
    """
    options = dict(mux_options or {})
    if path.suffix == ".ts":
        # Without it the muxer shifts every timestamp by its own delay; start_s says where the clip starts.
        options = {"mpegts_copyts": "1"} | options
    draw = picture or (lambda index: numbered(index, *size))
    times = list(times_ms) if times_ms is not None else None
    count = len(times) if times is not None else round(seconds * fps)
    base = Fraction(1, 1000) if times is not None else Fraction(1, fps)
    with av.open(str(path), "w", format=FORMATS[path.suffix], options=options) as out:
        video: Any = out.add_stream(
            ENCODERS[codec], rate=fps, options=_options(codec, gop, bframes, open_gop, crf, x264)
        )
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = base
        video.codec_context.gop_size = gop
        if codec == "mpeg2":
            video.codec_context.max_b_frames = bframes
        sound: Any = None
        if audio:
            sound = out.add_stream(audio, rate=AUDIO_RATE)
            sound.layout = "mono"
        length = count / fps if times is None else times[-1] / 1000
        packets: list[Any] = []
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(draw(first_number + index), format="rgb24")
            frame.pts = index if times is None else times[index]
            frame.time_base = base
            packets += video.encode(frame)
        packets += video.encode(None)
        if sound is not None:
            for tone in _tones(length):
                packets += sound.encode(tone)
            packets += sound.encode(None)
        packets.sort(key=lambda packet: packet.dts * packet.time_base)
        for packet in packets:
            shift = round(start_s / packet.time_base)
            packet.pts += shift
            packet.dts += shift
            out.mux(packet)
    return path


def _options(codec: str, gop: int, bframes: int, open_gop: bool, crf: int, x264: str = "") -> dict[str, str]:
    """Return encoder options: fast, one thread, and exactly the asked GOP structure."""
    opened = int(open_gop)
    if codec == "h264":
        params = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={bframes}:b-adapt=0:open-gop={opened}"
        return {"preset": "veryfast", "crf": str(crf), "threads": "1", "x264-params": params + x264}
    if codec == "hevc":
        params = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={bframes}:b-adapt=0:open-gop={opened}"
        params += ":log-level=none:pools=none:frame-threads=1"
        return {"preset": "ultrafast", "crf": str(crf), "x265-params": params}
    if codec == "vp8":
        return {
            "deadline": "realtime",
            "cpu-used": "8",
            "lag-in-frames": "8",
            "auto-alt-ref": "1",
            "crf": str(crf),
        }
    if codec == "vp9":
        return {
            "deadline": "realtime",
            "cpu-used": "8",
            "lag-in-frames": "8",
            "auto-alt-ref": "1",
            "crf": str(crf),
        }
    if codec == "av1":
        return {"preset": "12", "crf": str(crf), "svtav1-params": "lp=1"}
    return {}


def _tones(seconds: float) -> Iterable[av.AudioFrame]:
    """Yield mono frames of 1024 samples of a 440 Hz tone."""
    for start in range(0, int(seconds * AUDIO_RATE), 1024):
        phase = np.arange(start, start + 1024, dtype=np.float32) * np.float32(2 * np.pi * 440 / AUDIO_RATE)
        frame = av.AudioFrame.from_ndarray(0.2 * np.sin(phase)[None, :].astype(np.float32), "fltp", "mono")
        frame.sample_rate = AUDIO_RATE
        frame.pts = start
        frame.time_base = Fraction(1, AUDIO_RATE)
        yield frame


def join_flv(path: Path, parts: Sequence[Path]) -> Path:
    """Write FLV `parts` one after the other: what a reader sees when the publisher restarts."""
    data = parts[0].read_bytes() + b"".join(part.read_bytes()[13:] for part in parts[1:])
    path.write_bytes(data)
    return path


def join_ts(path: Path, parts: Sequence[Path]) -> Path:
    """Write MPEG-TS `parts` one after the other; give each its own `start_s` for running timestamps."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def rotated(source: Path, path: Path, degrees: int) -> Path:
    """Copy the MP4 `source` to `path`, marked as to be turned by `degrees` clockwise."""
    data = bytearray(source.read_bytes())
    write_rotation(data, degrees)
    path.write_bytes(data)
    return path


def demux(path: Path, options: dict[str, str] | None = None) -> tuple[Any, list[Any]]:
    """Return the open container and all its video and audio packets without the final flush packets."""
    container = av.open(str(path), options=options or {})
    streams = [stream for stream in container.streams if stream.type in ("video", "audio")]
    return container, [packet for packet in container.demux(streams) if packet.size]


def seen(frame: Any, time_base: Fraction | None = None) -> Seen:
    """Return what is compared of a decoded frame; frames got by flushing know no `time_base`."""
    digest = hashlib.md5(usedforsecurity=False)
    for plane in frame.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        digest.update(np.ascontiguousarray(rows[:, : plane.width]).data)
    return Seen(
        frame.pts, frame.pts * (time_base or frame.time_base), frame.width, frame.height, digest.hexdigest()
    )


def decode_source(path: Path, options: dict[str, str] | None = None) -> list[Seen]:
    """Return every video frame as FFmpeg decodes the file, one thread, in presentation order."""
    with av.open(str(path), options=options or {}) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        return [seen(frame) for frame in container.decode(stream)]


def open_decoder(codec: CodecParameters) -> Any:
    """Return a fresh decoder, one thread, for the packets of one epoch."""
    context: Any = av.CodecContext.create(codec.name, "r")
    context.extradata = codec.extradata or None
    context.thread_count = 1
    return context


def chunk_file(
    path: Path,
    *,
    kind: Kind = Kind.FILE,
    chunk_ms: int = 500,
    clock: Clock | None = None,
    options: dict[str, str] | None = None,
) -> list[Chunk]:
    """Return the whole file as chunks of stream `s`, attachment `00..01`."""
    chunker = Chunker("s", f"{1:016x}", kind, chunk_ms, clock or FakeClock())
    chunks: list[Chunk] = []
    container, packets = demux(path, options)
    with container:
        for packet in packets:
            chunks += chunker.push(packet)
        return chunks + chunker.flush()


def decode_chunks(chunks: Sequence[Chunk]) -> list[Seen]:
    """Return every frame shown, decoded as detect does: one decoder per epoch, fed across its chunks."""
    frames: list[Seen] = []
    decoder: Any = None
    epoch, time_base = -1, Fraction(1)
    for meta, value in chunks:
        if meta.control is not None:
            continue
        packets = read_chunk(meta, value)
        if meta.epoch != epoch:
            frames += _shown(decoder.decode(None), time_base) if decoder else []
            decoder = open_decoder(packets.codec)
            epoch, time_base = meta.epoch, meta.time_base
        for packet in packets.video:
            frames += _shown(decoder.decode(packet), time_base)
    return frames + (_shown(decoder.decode(None), time_base) if decoder else [])


def _shown(frames: Iterable[Any], time_base: Fraction) -> list[Seen]:
    return [seen(frame, time_base) for frame in frames if frame.pts is not None]
