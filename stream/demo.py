"""`unmask demo`: a clip with a planted manipulation, made here and watched for real.

Needs no network and no data of the user's: the face is the public-domain portrait of Rear Admiral Grace
Hopper that matplotlib carries. Nothing is tuned for it; if the planted stretch is missed, the demo says so.
"""

import csv
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.readings import Box, Image
from detectors.reference import portrait
from stream.config import Config
from stream.console import Console, FeedView, open_console
from stream.timeline import Summary
from stream.windows import MICRO

WIDTH, HEIGHT, FPS = 640, 360, 25
"""Small enough to encode in seconds; the face is then some 200 pixels wide, well above the quality gate."""

FACE: Box = (165.0, 115.0, 360.0, 335.0)
"""x0, y0, x1, y1 of the face in the portrait, forehead to chin."""

NOISE = 3.0
"""Standard deviation of the sensor noise in grey levels; without it the encoder would copy one still."""

SEED = 41
"""The clip is the same on every machine with the same libraries."""


class Stretch(StrEnum):
    """What a part of the clip shows."""

    AUTHENTIC = "authentic"
    MANIPULATED = "manipulated"
    NO_FACE = "no face"


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the clip. `path`: the camera's centre x, y and width at begin and end, in pixels."""

    kind: Stretch
    first_s: float
    last_s: float
    path: tuple[tuple[float, float, float], tuple[float, float, float]]


SCRIPT = (
    Part(Stretch.AUTHENTIC, 0, 7, ((255, 225, 490), (262, 235, 440))),
    Part(Stretch.NO_FACE, 7, 10, ((240, 470, 440), (280, 480, 400))),
    Part(Stretch.MANIPULATED, 10, 18, ((205, 230, 380), (215, 225, 400))),
    Part(Stretch.AUTHENTIC, 18, 24, ((305, 225, 400), (295, 235, 420))),
)
"""Each part begins with a cut to another framing, as edited footage does. Eight planted seconds are longer
than a glimpse and shorter than the window."""

RECORD_EVERY_S = 1.0
"""The timeline of so short a clip wants more than the usual record every ten seconds."""

SAMPLED_FPS = 5.0
"""Fixed, with every picture read by itself: the answer must not depend on how busy the machine is."""


def altered(picture: Image) -> Image:
    """Return `picture` with its face blended with a changed copy of itself, as face swaps do.

    The copy is shifted in colour, loses fine detail and is bent slightly; a soft mask joins it.
    """
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = FACE
    centre, radius = ((x0 + x1) / 2, (y0 + y1) / 2), (x1 - x0) / 2
    down, across = np.mgrid[0:height, 0:width].astype(np.float32)
    bend = 5.0 * np.exp(-((across - centre[0]) ** 2 + (down - centre[1]) ** 2) / (2 * (radius * 0.6) ** 2))
    copy = cv2.remap(
        picture,
        (across + bend * np.sin(down / 23)).astype(np.float32),
        (down + bend * np.cos(across / 19)).astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )
    copy = cv2.resize(cv2.resize(copy, None, fx=0.4, fy=0.4, interpolation=cv2.INTER_AREA), (width, height))
    toned = np.clip(copy.astype(np.float32) * (0.95, 1.0, 1.04) + (10, -2, -6), 0, 255)
    mask = _face_mask(height, width)[..., None]
    return np.asarray(mask * toned + (1 - mask) * picture, dtype=np.uint8)


def _face_mask(height: int, width: int) -> NDArray[np.float32]:
    x0, y0, x1, y1 = FACE
    mask = np.zeros((height, width), np.float32)
    axes = (round((x1 - x0) * 0.42), round((y1 - y0) * 0.46))
    cv2.ellipse(mask, (round((x0 + x1) / 2), round((y0 + y1) / 2)), axes, 0, 0, 360, 1.0, -1)
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), 7), dtype=np.float32)


def frames() -> Iterator[Image]:
    """Yield the clip's pictures, uint8 (HEIGHT, WIDTH, 3) RGB: a camera moves over the portrait."""
    rng = np.random.default_rng(SEED)
    original = portrait()
    fake = altered(original)
    for part in SCRIPT:
        still = fake if part.kind is Stretch.MANIPULATED else original
        count = round((part.last_s - part.first_s) * FPS)
        for index in range(count):
            yield _shot(still, part, index / count, rng)


def _shot(still: Image, part: Part, moment: float, rng: np.random.Generator) -> Image:
    """Return what the camera sees at `moment` (0..1) of a part; its hand shakes a little."""
    begin, end = np.array(part.path, dtype=np.float64)
    x, y, width = begin + (end - begin) * moment
    x, y = x + 1.5 * np.sin(moment * 29), y + 1.5 * np.sin(moment * 37)
    scale = WIDTH / width
    look = np.array([[scale, 0, WIDTH / 2 - scale * x], [0, scale, HEIGHT / 2 - scale * y]])
    seen = cv2.warpAffine(still, look, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    noise = NOISE * rng.standard_normal((HEIGHT, WIDTH, 1), dtype=np.float32)
    return np.asarray(np.clip(seen + noise, 0, 255), dtype=np.uint8)


def write_clip(path: Path) -> None:
    """Encode the clip as H.264 in MP4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for picture in frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_all(folder: Path) -> Path:
    """Write clip.mp4, portrait.jpg, altered.jpg and a manifest of them into `folder`; return the clip."""
    folder.mkdir(parents=True, exist_ok=True)
    original = portrait()
    for name, picture in (("portrait.jpg", original), ("altered.jpg", altered(original))):
        cv2.imwrite(str(folder / name), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    clip = folder / "clip.mp4"
    write_clip(clip)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [["path", "label"], ["portrait.jpg", "real"], ["altered.jpg", "fake"], ["clip.mp4", "fake"]]
        )
    return clip


@dataclass(frozen=True, slots=True)
class Found:
    """An incident in seconds from the begin of the clip."""

    id: str
    first_s: float
    last_s: float


class Listening:
    """A console that also remembers the summaries it passes on."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.summaries: tuple[Summary, ...] = ()

    def update(self, views: Sequence[FeedView]) -> None:
        self._console.update(views)

    def event(self, cloud_event: Mapping[str, Any]) -> None:
        self._console.event(cloud_event)

    def summary(self, summaries: Sequence[Summary]) -> None:
        self.summaries = tuple(summaries)
        self._console.summary(summaries)

    def __enter__(self) -> Self:
        self._console.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console.__exit__(kind, error, trace)


def run(settings: Config, keep: Path | None, out: TextIO) -> int:
    """Build the clip in `keep` (a temporary folder if None), watch it, compare; return the exit code."""
    from stream.watch import watch

    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unmask-demo-")))
        out.write("building a clip with a planted manipulation\n")
        out.flush()
        clip = write_all(folder)
        # A folder of its own: what is watched here must not stand among the user's records.
        verdict = settings.verdict.model_copy(update={"record_every_s": RECORD_EVERY_S})
        sampling = settings.sampling.model_copy(update={"idle_fps": SAMPLED_FPS})
        own = settings.model_copy(
            update={
                "data_dir": str(folder / "data"),
                "verdict": verdict,
                "sampling": sampling,
                "deterministic": True,
                "web": settings.web.model_copy(update={"listen": "off"}),
            }
        )
        with Listening(open_console(None)) as console:
            code = watch(own, [str(clip)], False, console)
    if code == 0:
        out.write("\n".join(comparison(_found(console.summaries))) + "\n")
    return code


def _found(summaries: Sequence[Summary]) -> list[Found]:
    return [
        Found(
            span.id,
            (span.first_us - summary.coverage.from_us) / MICRO,
            (span.last_us - summary.coverage.from_us) / MICRO,
        )
        for summary in summaries
        for span in summary.incidents
        if not span.retracted
    ]


def comparison(found: Sequence[Found], script: Sequence[Part] = SCRIPT) -> list[str]:
    """Return, line by line, what was planted and what was found there, and what that means."""
    lines = ["", "planted and found:"]
    missed = false = 0
    for part in script:
        hits = [item for item in found if item.first_s < part.last_s and item.last_s > part.first_s]
        began = [item for item in hits if part.first_s <= item.first_s]
        planted = part.kind is Stretch.MANIPULATED
        missed += planted and not hits
        false += not planted and bool(began)
        told = ", ".join(
            f"incident {item.id} from {item.first_s:.1f} to {item.last_s:.1f} s" for item in hits
        )
        lines.append(
            f"  {part.first_s:4.1f} to {part.last_s:4.1f} s  {part.kind.value:12} {told or 'no incident'}"
        )
    if missed:
        lines.append(
            "The planted manipulation was MISSED. The clip is not tuned to the detector; this is its answer."
        )
    else:
        lines.append("The planted manipulation was found.")
    if false:
        lines.append(f"FALSE ALARM: {false} incident(s) began where nothing was planted.")
    return lines
