"""The sampled pictures of a video file, decoded in this process: for files that the user chose to score."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from detectors.quantiser import OPTIONS as QP_OPTIONS
from detectors.quantiser import mean_qp
from detectors.readings import Image
from stream.errors import Code, UnmaskError
from stream.parameters import read_rotation
from stream.pictures import Pictures
from stream.sampling import Sampler
from stream.shots import ShotDetector, thumbnail
from stream.windows import MICRO

USUAL_STEP_US = MICRO // 25
"""Time between two frames where the file does not say, or steps back."""


@dataclass(frozen=True, slots=True)
class Still:
    """One sampled picture: full and reduced, uint8 (H, W, 3) RGB, upright. `media_us` counts from the begin.

    `cut`: a shot cut lies between the sampled picture before and this one. `qp`: its mean quantiser, 0..51,
    where the codec tells it.
    """

    number: int
    media_us: int
    image: Image
    small: Image
    cut: bool
    qp: float | None = None


def stills(path: Path, fps: Callable[[], float], detect_width: int) -> Iterator[Still]:
    """Yield the pictures of the first video stream at `fps()` (Hz), asked anew at each picture.

    Damaged frames, and what follows them up to the next keyframe, are left out (DESIGN 3.3). Raises
    `UnmaskError` (SOURCE_NOT_FOUND, SOURCE_INVALID, SOURCE_NO_VIDEO) with a sentence for the user.
    """
    sampler = Sampler()
    return _taken(path, detect_width, lambda _, media_us: sampler.take(media_us, fps()))


def evenly(path: Path, count: int, detect_width: int) -> Iterator[Still]:
    """Yield at most `count` (> 0) pictures, evenly from the first to the last; else as `stills`."""
    with _opened(path) as (container, stream):
        frames = sum(1 for packet in container.demux(stream) if packet.size)
    wanted = set(np.linspace(0, frames - 1, min(count, frames)).round().astype(int).tolist())
    return _taken(path, detect_width, lambda index, _: index in wanted)


def _taken(path: Path, detect_width: int, take: Callable[[int, int], bool]) -> Iterator[Still]:
    """Yield the pictures that `take` wants, told their index among the undamaged and their media time."""
    with _opened(path) as (container, stream):
        rotation = read_rotation(stream)
        stream.codec_context.options = QP_OPTIONS
        pictures, shots, time = Pictures(detect_width), ShotDetector(), _Time()
        number, cut = 0, False
        for index, frame in enumerate(_clean_frames(container, stream)):
            cut |= shots.add(thumbnail(frame))
            media_us = time.of(frame)
            if not take(index, media_us):
                continue
            image, small = pictures.convert(frame, rotation, stream.sample_aspect_ratio)
            yield Still(number, media_us, image, small, cut, mean_qp(frame))
            number, cut = number + 1, False
    if number == 0:
        raise UnmaskError(Code.SOURCE_INVALID, "holds no picture that can be decoded")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    try:
        container = av.open(str(path))
    except FileNotFoundError:
        raise UnmaskError(Code.SOURCE_NOT_FOUND, "cannot be read: No such file or directory") from None
    except (OSError, av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnmaskError(Code.SOURCE_INVALID, f"cannot be opened as video: {reason}") from None
    with container:
        if not container.streams.video:
            raise UnmaskError(Code.SOURCE_NO_VIDEO, "holds no video")
        yield container, container.streams.video[0]


def _clean_frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    healthy = True
    for frame in _frames(container, stream):
        if frame is None or frame.is_corrupt:
            healthy = False
            continue
        healthy |= frame.key_frame
        if healthy:
            yield frame


def _frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame | None]:
    """Yield frames in presentation order, None where a packet could not be decoded or read."""
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.FFmpegError:
                yield None
    except av.FFmpegError:
        yield None


class _Time:
    """Media time that never steps back, whatever a file's timestamps do."""

    def __init__(self) -> None:
        self._offset_us = 0
        self._last_us: int | None = None

    def of(self, frame: av.VideoFrame) -> int:
        """Return the time of the next frame in microseconds, 0 for the first."""
        told = None if frame.time is None else round(frame.time * MICRO)
        if self._last_us is None:
            self._offset_us = -(told or 0)
            self._last_us = 0
            return 0
        if told is None or told + self._offset_us <= self._last_us:
            media_us = self._last_us + USUAL_STEP_US
            self._offset_us = self._offset_us if told is None else media_us - told
        else:
            media_us = told + self._offset_us
        self._last_us = media_us
        return media_us
