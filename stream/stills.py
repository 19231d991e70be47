"""The sampled pictures of a video file, decoded in this process: for files that the user chose to score."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av

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

    `cut`: a shot cut lies between the sampled picture before and this one.
    """

    number: int
    media_us: int
    image: Image
    small: Image
    cut: bool


def stills(path: Path, fps: float, detect_width: int) -> Iterator[Still]:
    """Yield the pictures of the first video stream at `fps` (Hz).

    Damaged frames, and what follows them up to the next keyframe, are left out (DESIGN 3.3). Raises
    `UnmaskError` (SOURCE_NOT_FOUND, SOURCE_INVALID, SOURCE_NO_VIDEO) with a sentence for the user.
    """
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
        stream = container.streams.video[0]
        rotation = read_rotation(stream)
        pictures, sampler, shots, time = Pictures(detect_width), Sampler(), ShotDetector(), _Time()
        number, cut = 0, False
        for frame in _clean_frames(container, stream):
            cut |= shots.add(thumbnail(frame))
            media_us = time.of(frame)
            if not sampler.take(media_us, fps):
                continue
            image, small = pictures.convert(frame, rotation, stream.sample_aspect_ratio)
            yield Still(number, media_us, image, small, cut)
            number, cut = number + 1, False
    if number == 0:
        raise UnmaskError(Code.SOURCE_INVALID, "holds no picture that can be decoded")


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
