"""A reader that knows the truth: a drawn square is a face, red is manipulated, green authentic."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from detectors.readings import Detection, FaceReading, Image, Quality

WIDTH, HEIGHT, FPS = 320, 180, 25
LEFT, TOP, SIDE = 128, 58, 64
GREEN, RED = (20, 200, 20), (200, 20, 20)
SURE = 6.0
"""Logit of a marked face; far beyond every threshold, so the truth is never in doubt."""


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

    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        return [self._faces(image) for image, _ in frames]

    @staticmethod
    def _faces(image: Image) -> tuple[FaceReading, ...]:
        square = image[TOP + 8 : TOP + SIDE - 8, LEFT + 8 : LEFT + SIDE - 8].reshape(-1, 3).mean(axis=0)
        red, green = square[0] - square[1], square[1] - square[0]
        if max(red, green) < 80:
            return ()
        logit = SURE if red > green else -SURE
        x, y, s = float(LEFT), float(TOP), float(SIDE)
        landmarks = (
            (x + 0.3 * s, y + 0.4 * s),
            (x + 0.7 * s, y + 0.4 * s),
            (x + 0.5 * s, y + 0.6 * s),
            (x + 0.35 * s, y + 0.8 * s),
            (x + 0.65 * s, y + 0.8 * s),
        )
        return (
            FaceReading(
                detection=Detection((x, y, x + s, y + s), landmarks, 1.0),
                quality=Quality(1.0, {"face_px": s}, ()),
                logits={"marker": logit},
                fused=logit,
                crop=image[TOP : TOP + SIDE, LEFT : LEFT + SIDE].copy(),
                attention=np.full((4, 4), 0.5, dtype=np.float32),
            ),
        )
