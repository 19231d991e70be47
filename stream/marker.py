"""The member `marker`: a drawn square is a face, red is manipulated, green authentic.

For fire drills, the canary (DESIGN 3.10) and tests: it knows the truth, and needs neither weights nor torch.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from detectors.calibration import Calibration, CalibrationKind, Scale
from detectors.readings import Box, Detection, FaceReading, Image, Quality
from stream.alerts import Model, Provenance

NAME = "marker"

WIDTH, HEIGHT, FPS = 320, 180, 25
LEFT, TOP, SIDE = 128, 58, 64
"""Where the square is, in a picture of that size; in others at the same shares of width and height."""
INSIDE = 0.125
"""Share of the square at each edge that is not read: encoders smear it."""
GREEN, RED = (20, 200, 20), (200, 20, 20)
CONTRAST = 80
"""Least difference of red and green, of 255, that is a mark and no wall."""
SURE = 6.0
"""Logit of a marked face; far beyond every threshold, so the truth is never in doubt."""

CALIBRATION = Calibration(kind=CalibrationKind.SHIPPED, scales=(Scale(1, 1.0, 0.0),), tau=0.8, sigma=1.0)
"""Sure of itself after one look, as nothing that judges real faces may be."""

PROVENANCE = Provenance(
    models=(Model(NAME, "1", "0" * 64),),
    tested_for=("drawn red squares",),
    not_tested_for=("faces",),
    calibration=CALIBRATION.kind.value,
    calibration_version=NAME,
    prior=CALIBRATION.prevalence,
)


def draw(index: int, colour: tuple[int, int, int] | None) -> Image:
    """Return frame `index`: a moving gradient, with a square of `colour` if there is one."""
    ramp = (np.arange(WIDTH, dtype=np.int32)[None, :] + 2 * index) % 128 + 40
    picture = np.repeat(np.repeat(ramp, HEIGHT, axis=0)[:, :, None], 3, axis=2).astype(np.uint8)
    if colour is not None:
        picture[TOP : TOP + SIDE, LEFT : LEFT + SIDE] = colour
    return picture


def write_clip(
    path: Path,
    seconds: float,
    planted: Sequence[tuple[float, float]] = (),
    absent: Sequence[tuple[float, float]] = (),
    gop: int = 50,
    bframes: int = 2,
) -> Path:
    """Write an H.264 clip whose face is red within `planted` and missing within `absent` (seconds)."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "20", "g": str(gop), "bf": str(bframes)}
        stream.codec_context.time_base = Fraction(1, FPS)
        for index in range(round(seconds * FPS)):
            time = index / FPS
            colour: tuple[int, int, int] | None = GREEN
            if any(first <= time < last for first, last in planted):
                colour = RED
            if any(first <= time < last for first, last in absent):
                colour = None
            frame = av.VideoFrame.from_ndarray(draw(index, colour), format="rgb24")
            frame.pts = index
            frame.time_base = Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


class MarkerReader:
    """Reads the drawn square; see `stream.device.Reader`."""

    engine = "marker"
    precision = "exact"
    faces_cut_off = 0

    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        """Return the square of each picture, if there is one."""
        return [_faces(image) for image, _ in frames]

    def read_crops(self, crops: Sequence[Image]) -> list[FaceReading]:
        """Return each picture as one square, which it must be; one that is neither red nor green is green."""
        return [_reading(crop, _whole(crop), _logit(crop) or -SURE) for crop in crops]


def _faces(image: Image) -> tuple[FaceReading, ...]:
    box = _square(image)
    logit = _logit(_cut(image, box))
    return () if logit is None else (_reading(image, box, logit),)


def _square(image: Image) -> Box:
    x, y = image.shape[1] / WIDTH, image.shape[0] / HEIGHT
    return (LEFT * x, TOP * y, (LEFT + SIDE) * x, (TOP + SIDE) * y)


def _whole(image: Image) -> Box:
    return (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))


def _cut(image: Image, box: Box) -> Image:
    left, top, right, bottom = map(round, box)
    return image[top:bottom, left:right]


def _logit(square: Image) -> float | None:
    """Return what the colour says of a square, None if it is none."""
    y, x = (round(size * INSIDE) for size in square.shape[:2])
    inner = square[y : square.shape[0] - y, x : square.shape[1] - x]
    red, green, _ = inner.reshape(-1, 3).mean(axis=0)
    if abs(red - green) < CONTRAST:
        return None
    return SURE if red > green else -SURE


def _reading(image: Image, box: Box, logit: float) -> FaceReading:
    left, top, right, bottom = box
    width, height = right - left, bottom - top

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x * width, top + y * height

    landmarks = (place(0.3, 0.4), place(0.7, 0.4), place(0.5, 0.6), place(0.35, 0.8), place(0.65, 0.8))
    return FaceReading(
        detection=Detection(box, landmarks, 1.0),
        quality=Quality(1.0, {"face_px": width}, ()),
        logits={NAME: logit},
        fused=logit,
        crop=_cut(image, box).copy(),
        attention=np.full((4, 4), 0.5, dtype=np.float32),
    )
