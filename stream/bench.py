"""`unmask bench`: what this machine carries, measured with the parts that watch, written as a profile.

The input is made here: a camera moving over the portrait that matplotlib carries, encoded at 720 and 1080
lines. What is counted is CPU seconds, which other work on the machine disturbs far less than it disturbs the
clock; rates by the clock are kept beside them.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

import av
import cv2
import numpy as np

from detectors.readings import Image
from detectors.reference import portrait
from stream.assemble import Assembly, build_reader, data_folder
from stream.bench_log import LogBench, Meter, Taken, row
from stream.chunks import Chunk, Chunker
from stream.clock import SystemClock
from stream.cluster import open_cluster
from stream.config import Config
from stream.controls import End, EndReason, to_body
from stream.decode import DecodeSettings, StreamDecoder
from stream.errors import Code, UnmaskError
from stream.frames import ResumePoint
from stream.kafka_client import KafkaClients
from stream.pictures import Pictures
from stream.profile import FILE, Figure, Name, Of, Profile, Spread, machine
from stream.records import Control, Kind
from stream.score import reduced
from stream.sqlite_log import SqliteLog

OK = 0

FPS = 25
CLIP_S = 4
GOP = 50
"""A keyframe every two seconds, as live encoders set it."""
BIT_RATES = {720: 2_500_000, 1080: 5_000_000}
"""Usual for live H.264 at these sizes."""
WIDTHS = {720: 1280, 1080: 1920}
CAMERA_WIDTH = 520
"""Pixels of the portrait that fill the picture; a face is then a third of it wide."""
NOISE = 3.0
"""Grey levels; without it the encoder would copy one still."""
NOISES = 4

RARELY_FPS = 0.01
"""Nearly every frame is decoded only: converting is measured by itself."""

MANY = 4
"""Faces in the picture that the cost of one face is taken from."""
FACE_CROP = (140, 80, 385, 360)
"""x0, y0, x1, y1 of the head in the portrait."""
BACKGROUND = (60, 400, 460, 590)
"""A uniform with medals: texture, and no face."""
HEAD_HEIGHT = 300
"""Pixels of a head in a picture of 720 lines."""
AT_ONCE = 4
"""Pictures that the device takes at once (`stream.device`)."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a bench takes: repeats of each measurement, and seconds of each repeat."""

    repeats: int
    seconds: float


QUICK = Pace(3, 0.8)
FULL = Pace(7, 3.0)


def run(config: Config, target: Path | None, quick: bool, out: TextIO) -> int:
    """Measure, print a line per figure, write the profile; return the exit code.

    The log of the settings' cluster is measured too if there is one; its topics are removed again.
    """
    pace = QUICK if quick else FULL
    path = target or data_folder(config) / FILE

    def told(line: str) -> None:
        out.write(line + "\n")
        out.flush()

    assembly = build_reader(config)
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory(prefix="unmask-bench-") as folder:
        for lines in WIDTHS:
            figures |= _video(Path(folder) / f"{lines}.mp4", lines, config, pace, told)
        figures |= _faces(assembly, config, pace, told)
        figures |= embedded_log(Path(folder) / "log", config, pace, told)
    if config.kafka.bootstrap_servers:
        figures |= cluster_log(config, pace, {Of.KAFKA: time.process_time}, told)
    profile = Profile(
        name=path.stem,
        made=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        cores=len(os.sched_getaffinity(0)),
        engine=f"{assembly.reader.engine} {assembly.reader.precision}",
        members=tuple(model.name for model in assembly.provenance.models),
        figures=figures,
        **machine(),
    )
    told(f"machine: {profile.machine()}")
    told(f"members: {', '.join(profile.members)} on {profile.engine}")
    _write(path, profile)
    told(f"profile: {path}")
    return OK


def embedded_log(folder: Path, config: Config, pace: Pace, told: Callable[[str], None]) -> dict[str, Figure]:
    """Measure the embedded log in `folder`."""
    log = SqliteLog(folder, config.log, SystemClock())
    try:
        return LogBench(log, "bench", {Of.EMBEDDED: time.process_time}, Of.EMBEDDED).run(
            pace.seconds, pace.repeats, told
        )
    finally:
        log.close()


def cluster_log(
    config: Config, pace: Pace, parties: Mapping[Of, Callable[[], float]], told: Callable[[str], None]
) -> dict[str, Figure]:
    """Measure the log of the settings' cluster in topics and groups of its own, which are removed again."""
    prefix = f"{config.prefix}.bench-{os.getpid()}"
    log = open_cluster(config)
    try:
        return LogBench(log, prefix, parties, Of.KAFKA).run(pace.seconds, pace.repeats, told)
    finally:
        log.close()
        admin = KafkaClients(config.kafka).admin()
        admin.delete_topics([spec.name for spec in LogBench.specs(prefix)])
        admin.delete_groups(LogBench.groups(prefix))
        admin.close()


def _write(path: Path, profile: Profile) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(profile.to_json(), encoding="utf-8")
    except OSError as error:
        raise UnmaskError(Code.CONFIG, f"profile {path} cannot be written: {error.strerror}") from None


# Video


def write_clip(path: Path, lines: int, seconds: float = CLIP_S) -> None:
    """Encode the moving portrait as H.264 in MP4 at `lines` (a key of WIDTHS) and its usual bit rate."""
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "g": str(GOP), "bf": "2"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTHS[lines], lines, "yuv420p"
        stream.bit_rate = BIT_RATES[lines]
        stream.codec_context.time_base = Fraction(1, FPS)
        for index, picture in enumerate(shots(lines, round(seconds * FPS))):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def shots(lines: int, count: int) -> Iterator[Image]:
    """Yield what a camera sees that moves over the portrait, uint8 (lines, W, 3) RGB, with sensor noise."""
    rng, width = np.random.default_rng(41), WIDTHS[lines]
    noises = [
        np.abs(NOISE * rng.standard_normal((lines, width, 1), np.float32)).astype(np.uint8).repeat(3, axis=2)
        for _ in range(NOISES)
    ]
    still, scale = portrait(), width / CAMERA_WIDTH
    for index in range(count):
        x, y = 256 + 20 * np.sin(index / 15), 230 + 15 * np.cos(index / 11)
        look = np.array([[scale, 0, width / 2 - scale * x], [0, scale, lines / 2 - scale * y]])
        seen = cv2.warpAffine(still, look, (width, lines), borderMode=cv2.BORDER_REFLECT)
        yield np.asarray(cv2.add(seen, noises[index % NOISES]), np.uint8)


def _video(
    path: Path, lines: int, config: Config, pace: Pace, told: Callable[[str], None]
) -> dict[str, Figure]:
    write_clip(path, lines)
    chunks = _remuxed(path, config.media.chunk_ms)
    size = sum(len(value) for _, value in chunks)
    picture = f"{WIDTHS[lines]}x{lines}"
    rate = f"H.264, {FPS} frames/s, {size * 8 / CLIP_S / 1e6:.1f} Mbit/s"

    def remux() -> int:
        _remuxed(path, config.media.chunk_ms)
        return CLIP_S

    settings = DecodeSettings.of(config.decode)
    frames = _decoded_frames(path)

    def convert() -> int:
        pictures = Pictures(config.decode.detect_width)
        for frame in frames:
            # Copied as a decoder copies them into the memory that it shares.
            for image in pictures.convert(frame):
                image.copy()
        return len(frames)

    names = {
        720: (Name.REMUX_720, Name.DECODE_720, Name.PICTURE_720),
        1080: (Name.REMUX_1080, Name.DECODE_1080, Name.PICTURE_1080),
    }[lines]
    steps: Sequence[tuple[Name, str, Callable[[], int], str, int]] = (
        (names[0], f"second of {picture} remuxed into chunks", remux, f"{rate}, from a file", size // CLIP_S),
        (names[1], f"frame of {picture} decoded", lambda: _decode(chunks, settings), f"{rate}, in chunks", 0),
        (names[2], f"sampled picture of {picture} converted", convert, "to RGB in both sizes, copied", 0),
    )
    figures = {}
    for name, unit, work, what, bytes_each in steps:
        figures[name.value] = _figure(unit, repeated(work, pace), what, bytes_each)
        told(row(name.value, figures[name.value]))
    return figures


def _remuxed(path: Path, chunk_ms: int) -> list[Chunk]:
    chunker = Chunker("bench", f"{1:016x}", Kind.FILE, chunk_ms, SystemClock())
    chunks: list[Chunk] = []
    with av.open(str(path)) as container:
        for packet in container.demux():
            chunks += chunker.push(packet)
    return chunks + ending(chunker)


def ending(chunker: Chunker) -> list[Chunk]:
    """Return what is left of a stream, and its end: without that a decoder keeps its last frames."""
    left = chunker.flush()
    return [*left, chunker.control(Control.END, to_body(End(EndReason.FINISHED.value)))]


def _decode(chunks: Sequence[Chunk], settings: DecodeSettings) -> int:
    decoder = StreamDecoder(settings, ResumePoint(), lambda: RARELY_FPS)
    for offset, (meta, value) in enumerate(chunks):
        for _ in decoder.feed(offset, meta, value):
            pass
    return decoder.counts.decoded


def _decoded_frames(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        frames = []
        for frame in container.decode(video=0):
            frames.append(frame)
            if len(frames) == FPS:
                break
        return frames


# Faces


def crowd(faces: int) -> Image:
    """Return a picture with `faces` (0 to 4) copies of the portrait's face, uint8 (720, 1280, 3) RGB."""
    still = portrait()
    x0, y0, x1, y1 = BACKGROUND
    picture = cv2.resize(still[y0:y1, x0:x1], (1280, 720), interpolation=cv2.INTER_CUBIC)
    x0, y0, x1, y1 = FACE_CROP
    width = round(HEAD_HEIGHT * (x1 - x0) / (y1 - y0))
    head = cv2.resize(still[y0:y1, x0:x1], (width, HEAD_HEIGHT), interpolation=cv2.INTER_AREA)
    for number in range(faces):
        left, top = 30 + number * 310, 100 + 200 * (number % 2)
        picture[top : top + HEAD_HEIGHT, left : left + width] = head
    return np.asarray(picture, np.uint8)


def _faces(assembly: Assembly, config: Config, pace: Pace, told: Callable[[str], None]) -> dict[str, Figure]:
    """Measure looking for faces, and what each face found costs, members included."""
    reader = assembly.reader
    batches = {}
    for faces in (0, MANY):
        picture = crowd(faces)
        batches[faces] = [(picture, reduced(picture, config.decode.detect_width))] * AT_ONCE
        found = len(reader.read(batches[faces])[0])
        if found != faces:
            raise UnmaskError(
                Code.ENGINE, f"bench: {found} faces found in a picture of {faces}; the detector is broken"
            )

    def read(faces: int) -> int:
        reader.read(batches[faces])
        return AT_ONCE

    none, many = (repeated(lambda count=count: read(count), pace) for count in (0, MANY))  # type: ignore[misc]
    size = f"{batches[0][0][1].shape[1]}x{batches[0][0][1].shape[0]}"
    detect = _figure(f"picture of {size} looked at for faces, none in it", none, f"{AT_ONCE} at once")
    cpu = Spread.of([max(0.0, _cpu(a) - _cpu(b)) / MANY for a, b in zip(many, none, strict=True)])
    wall = [
        max(1e-9, a.wall_s / a.count - b.wall_s / b.count) / MANY for a, b in zip(many, none, strict=True)
    ]
    how = f"pictures of {MANY} faces less pictures of none; {len(none)} times"
    face = Figure("face found, measured and judged", cpu, Spread.of([1 / one for one in wall]), how)
    told(row(Name.DETECT.value, detect))
    told(row(Name.FACE.value, face))
    return {Name.DETECT.value: detect, Name.FACE.value: face}


# Measuring


def repeated(work: Callable[[], int], pace: Pace) -> list[Taken]:
    """Do `work`, which returns how many pieces it did, over and over; one run of it first, unmeasured."""
    work()
    found = []
    for _ in range(pace.repeats):
        meter, count = Meter({Of.EMBEDDED: time.process_time}), 0
        while count == 0 or meter.wall_s() < pace.seconds:
            count += work()
        found.append(meter.taken(count))
    return found


def _cpu(taken: Taken) -> float:
    return taken.cpu_s[Of.EMBEDDED] / taken.count


def _figure(unit: str, taken: Sequence[Taken], what: str, size: int = 0) -> Figure:
    return Figure(
        unit,
        Spread.of([_cpu(one) for one in taken]),
        Spread.of([one.count / one.wall_s for one in taken]),
        f"{what}; {len(taken)} times {taken[0].wall_s:.1f} s",
        size,
    )
