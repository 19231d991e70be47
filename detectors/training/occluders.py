"""Things drawn in front of a face: masks, hands, headsets, microphones, banners, hair.

Drawn shapes, not photographs: a network that learned them would know drawings. So some kinds never train
(`HELD_OUT`) and only measure, every kind has a drawn colour, texture, place and size, and the same draw
covers both crops of a pair: nothing about an occluder tells the classes apart.

`python -m detectors.training.occluders CLIP OUT.mp4 [--kind KIND]` draws one over every face of a video.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.crops import CropKind, CropPolicy
from detectors.mtcnn import MtcnnDetector
from detectors.readings import Box, Image, Visible

Points = NDArray[np.float64]
"""Corners [K, 2] of a shape, x and y in shares of the side of a tight crop (`CropPolicy`): eyes lie at .30 of
its height, nose tip at .51, mouth at .75 (1,665 validation crops; standard deviation .05 to .07)."""

HIDDEN_FROM = 0.6
"""A half of which an occluder covers this share of the face's oval is hidden."""
SEEN_UNTIL = 0.25
"""One of which it covers no more is seen; between the two is either, and teaches nothing."""
FACE_AXES = (0.42, 0.56)
"""Half axes of the face's oval in a tight crop, about its middle, in shares of its side."""
SKIN = ((224, 187, 161), (198, 149, 118), (150, 103, 78), (94, 63, 49), (241, 210, 190))
"""RGB of hands, from fair to dark; each is varied."""
HAIR = ((35, 26, 22), (72, 49, 34), (128, 92, 55), (176, 146, 96), (120, 116, 112))
DAYLIGHT = 120.0
"""Mean grey level of a face at which an occluder shows its own colours; in the dark it is darker too."""
DIMMEST, BRIGHTEST = 0.35, 1.2
NO_BLUR_PX = 0.3
"""A border softer by no more than this looks as before."""
FOLLOWED_EVERY = 5
"""Frames of a clip from one face detection to the next; between them the box stays."""


class Kind(StrEnum):
    """What is in front of the face."""

    MASK = "mask"
    HAND = "hand"
    HEADSET = "headset"
    MICROPHONE = "microphone"
    BANNER = "banner"
    HAIR = "hair"
    SCARF = "scarf"
    GOGGLES = "goggles"
    PHONE = "phone"


TRAINED = (Kind.MASK, Kind.HAND, Kind.HEADSET, Kind.MICROPHONE, Kind.BANNER, Kind.HAIR)
HELD_OUT = (Kind.SCARF, Kind.GOGGLES, Kind.PHONE)
"""Never trained on, by nothing here."""

COVERING: Mapping[Visible, Mapping[bool, tuple[Kind, ...]]] = {
    Visible.UPPER: {False: (Kind.MASK, Kind.HAND, Kind.BANNER), True: (Kind.SCARF, Kind.PHONE)},
    Visible.LOWER: {
        False: (Kind.HEADSET, Kind.HAND, Kind.BANNER, Kind.HAIR),
        True: (Kind.GOGGLES, Kind.PHONE),
    },
}
"""Kinds that can hide a half and leave the one named; by whether they are held out."""


@dataclass(frozen=True, slots=True)
class Occluder:
    """One draw. `shapes` are polygons; `level` -1 to 1 darkens or lights the texture from its top down.

    `colours` RGB [2, 3]; `stripes` per side of the crop (0: plain) at `angle` radians, as strong as
    `contrast` 0..1; `noise` in grey levels; `soft` is the blur of its border, in shares of the side.
    """

    kind: Kind
    shapes: tuple[Points, ...]
    colours: NDArray[np.float64]
    stripes: float
    angle: float
    contrast: float
    level: float
    noise: float
    soft: float
    seed: int


def draw_occluder(rng: np.random.Generator, kind: Kind, leaves: Visible | None = None) -> Occluder:
    """Draws one of this kind. `leaves` UPPER or LOWER: it is to hide the other half (kinds of `COVERING`);
    None: it lies wherever its kind does, and hides what it hides. Raises ValueError for a kind that cannot.
    """
    if leaves is not None and not any(kind in kinds for kinds in COVERING[leaves].values()):
        raise ValueError(f"occluder {kind}: cannot leave the {leaves} half alone")
    shapes = _SHAPES[kind](rng, leaves)
    base = _base_colour(rng, kind)
    return Occluder(
        kind=kind,
        shapes=tuple(_jittered(rng, shape) for shape in shapes),
        colours=np.stack([base, np.clip(base + rng.normal(0, 45, 3), 0, 255)]),
        stripes=float(rng.uniform(2, 14)) if rng.random() < 0.5 else 0.0,
        angle=float(rng.uniform(0, np.pi)),
        contrast=float(rng.uniform(0.1, 1.0)),
        level=float(rng.uniform(-0.5, 0.5)),
        noise=float(rng.uniform(0, 12)),
        soft=float(rng.uniform(0.0, 0.02)),
        seed=int(rng.integers(2**31)),
    )


def random_occluder(
    rng: np.random.Generator, leaves: Visible | None = None, *, held_out: bool = False
) -> Occluder:
    """Draws one of any trained kind, or of any held out; with `leaves` of those that hide the other half."""
    kinds = (HELD_OUT if held_out else TRAINED) if leaves is None else COVERING[leaves][held_out]
    return draw_occluder(rng, kinds[int(rng.integers(len(kinds)))], leaves)


def cover(crop: Image, occluder: Occluder) -> Image:
    """The crop, uint8 [S, S, 3] RGB of tight framing, with the occluder in front, as a new array."""
    size = crop.shape[0]
    alpha = mask_of(occluder, size)[:, :, None]
    out: Image = np.rint(crop * (1 - alpha) + _lit(occluder, crop) * alpha).astype(np.uint8)
    return out


def mask_of(occluder: Occluder, size: int) -> NDArray[np.float32]:
    """How opaque it is, float32 [size, size] in 0..1."""
    mask = np.zeros((size, size), np.uint8)
    for shape in occluder.shapes:
        cv2.fillPoly(mask, [np.rint(shape * size).astype(np.int32)], 255, cv2.LINE_AA)
    alpha = mask.astype(np.float32) / np.float32(255)
    if occluder.soft * size <= NO_BLUR_PX:
        return alpha
    blurred: NDArray[np.float32] = cv2.GaussianBlur(alpha, (0, 0), occluder.soft * size)
    return blurred


def hidden_shares(occluder: Occluder, size: int = 64) -> tuple[float, float]:
    """Shares 0..1 of the face's oval that it covers above and below the middle of a tight crop."""
    oval = np.zeros((size, size), np.uint8)
    axes = (round(FACE_AXES[0] * size), round(FACE_AXES[1] * size))
    cv2.ellipse(oval, (size // 2, size // 2), axes, 0, 0, 360, 1, -1)
    covered = mask_of(occluder, size) * oval
    middle = size // 2
    above, below = covered[:middle].sum() / oval[:middle].sum(), covered[middle:].sum() / oval[middle:].sum()
    return float(above), float(below)


def _base_colour(rng: np.random.Generator, kind: Kind) -> NDArray[np.float64]:
    if kind is Kind.HAND or (kind is Kind.PHONE and rng.random() < 0.2):
        return np.clip(np.array(SKIN[rng.integers(len(SKIN))]) * rng.uniform(0.7, 1.1), 0, 255)
    if kind is Kind.HAIR:
        return np.clip(np.array(HAIR[rng.integers(len(HAIR))]) * rng.uniform(0.7, 1.3), 0, 255)
    if kind in (Kind.HEADSET, Kind.MICROPHONE, Kind.PHONE, Kind.GOGGLES) and rng.random() < 0.6:
        return np.full(3, rng.uniform(5, 90)) + rng.normal(0, 6, 3)
    if kind is Kind.MASK and rng.random() < 0.5:
        pale = ((172, 205, 222), (236, 238, 240), (30, 30, 34))
        return np.clip(np.array(pale[rng.integers(3)]) + rng.normal(0, 10, 3), 0, 255)
    return rng.uniform(0, 255, 3)


def _lit(occluder: Occluder, crop: Image) -> NDArray[np.float32]:
    """Its texture in the light of the crop."""
    light = float(np.clip(crop.mean() / DAYLIGHT, DIMMEST, BRIGHTEST))
    lit: NDArray[np.float32] = np.minimum(_texture(occluder, crop.shape[0]) * np.float32(light), 255)
    return lit


def _texture(occluder: Occluder, size: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(occluder.seed)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    wave = np.zeros((size, size), np.float32)
    if occluder.stripes:
        along = x * np.cos(occluder.angle) + y * np.sin(occluder.angle)
        wave = (np.sin(2 * np.pi * occluder.stripes * along) * 0.5 + 0.5) * occluder.contrast
        if occluder.kind in (Kind.BANNER, Kind.SCARF):
            wave = (wave > 0.5 * occluder.contrast) * np.float32(occluder.contrast)
    else:
        patches = rng.random((5, 5), dtype=np.float32)
        wave = cv2.resize(patches, (size, size), interpolation=cv2.INTER_CUBIC) * 0.4 * occluder.contrast
    first, second = occluder.colours.astype(np.float32)
    mixed = first + (second - first) * wave[:, :, None]
    shaded = mixed * (1 + occluder.level * (y[:, :, None] - 0.5))
    noise = rng.standard_normal((size, size, 1), dtype=np.float32) * np.float32(occluder.noise)
    painted: NDArray[np.float32] = np.clip(shaded + noise, 0, 255)
    return painted


def _jittered(rng: np.random.Generator, shape: Points) -> Points:
    return shape + rng.normal(0, 0.008, shape.shape)


def _turned(shape: Points, angle: float, about: tuple[float, float]) -> Points:
    cos, sin = np.cos(angle), np.sin(angle)
    turned: Points = (shape - about) @ np.array([[cos, sin], [-sin, cos]]) + about
    return turned


def _oval(x: float, y: float, a: float, b: float, corners: int = 24) -> Points:
    t = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + a * np.cos(t), y + b * np.sin(t)], axis=1)


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> Points:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def _mask(rng: np.random.Generator, leaves: Visible | None) -> list[Points]:
    """Nose to chin, narrower below; its upper border bulges over the nose."""
    top, bulge = rng.uniform(0.44, 0.56), rng.uniform(0.0, 0.08)
    left, right = rng.uniform(-0.05, 0.1), rng.uniform(0.9, 1.05)
    low = rng.uniform(0.98, 1.1)
    outline = [
        [left, top + rng.uniform(0, 0.08)], [0.3, top], [0.5, top - bulge], [0.7, top],
        [right, top + rng.uniform(0, 0.08)], [right - 0.05, 0.8], [0.7, low], [0.3, low], [left + 0.05, 0.8],
    ]  # fmt: skip
    return [_turned(np.array(outline), rng.normal(0, 0.06), (0.5, 0.5))]


def _hand(rng: np.random.Generator, leaves: Visible | None) -> list[Points]:
    """A palm with four fingers, from any side."""
    if leaves is None:
        x, y, size = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.2, 0.4)
    else:
        x, y = rng.uniform(0.4, 0.6), 0.22 if leaves is Visible.LOWER else 0.8
        size = rng.uniform(0.36, 0.44)
    wide = 1.5 if leaves is not None else 1.0
    palm = _oval(x, y, size * wide * 0.8, size * 0.72)
    side = rng.choice([-1.0, 1.0])
    fingers = []
    for k in range(4):
        at = y + (k - 1.5) * size * 0.36
        tip = x + side * size * rng.uniform(1.2, 1.7)
        fingers.append(_oval((x + tip) / 2, at, abs(tip - x) / 2 + 0.03, size * 0.19))
    turn = rng.uniform(-0.25, 0.25) if leaves is not None else rng.uniform(0, 2 * np.pi)
    return [_turned(shape, turn, (x, y)) for shape in (palm, *fingers)]


def _headset(rng: np.random.Generator, leaves: Visible | None) -> list[Points]:
    """A box with round corners over brows, eyes and the bridge of the nose, and its strap."""
    top, low = rng.uniform(-0.05, 0.12), rng.uniform(0.44, 0.53)
    left, right, cut = rng.uniform(-0.02, 0.12), rng.uniform(0.88, 1.02), rng.uniform(0.02, 0.1)
    box = [
        [left, top + cut], [left + cut, top], [right - cut, top], [right, top + cut], [right, low - cut],
        [right - cut, low], [0.58, low], [0.5, low - rng.uniform(0, 0.08)], [0.42, low], [left + cut, low],
        [left, low - cut],
    ]  # fmt: skip
    strap = _rectangle(-0.1, rng.uniform(0.1, 0.2), 1.1, rng.uniform(0.25, 0.35))
    return [_turned(shape, rng.normal(0, 0.05), (0.5, 0.3)) for shape in (np.array(box), strap)]


def _microphone(rng: np.random.Generator, leaves: Visible | None) -> list[Points]:
    """A head before mouth or chin, and a handle that leaves the picture below."""
    x, y, r = rng.uniform(0.25, 0.75), rng.uniform(0.68, 0.95), rng.uniform(0.1, 0.24)
    foot = x + rng.uniform(-0.3, 0.3)
    handle = np.array([[x - 0.5 * r, y], [x + 0.5 * r, y], [foot + 0.4 * r, 1.2], [foot - 0.4 * r, 1.2]])
    return [_oval(x, y, r, r * rng.uniform(0.9, 1.3)), handle]


def _banner(rng: np.random.Generator, leaves: Visible | None) -> list[Points]:
    """A lower third, a ticker, a censor's bar: upright, from edge to edge."""
    if leaves is Visible.UPPER:
        top, low = rng.uniform(0.44, 0.56), rng.uniform(0.97, 1.2)
    elif leaves is Visible.LOWER:
        top, low = rng.uniform(-0.1, 0.08), rng.uniform(0.44, 0.56)
    else:
        top = rng.uniform(-0.1, 0.95)
        low = top + rng.uniform(0.08, 0.3)
    return [_rectangle(rng.uniform(-0.2, 0.05), top, rng.uniform(0.95, 1.2), low)]


def _hair(rng: np.random.Generator, leaves: Visible | None) -> list[Points]:
    """A fringe of strands from above, long enough for the eyes if it is to hide them, or from one side."""
    strands = []
    if leaves is None and rng.random() < 0.5:
        side, reach = rng.choice([0.0, 1.0]), rng.uniform(0.15, 0.4)
        for y in np.linspace(-0.05, 0.9, 9):
            tip = abs(side - reach * rng.uniform(0.6, 1.1))
            strands.append(np.array([[side, y - 0.1], [tip, y + rng.uniform(0, 0.1)], [side, y + 0.14]]))
        return strands
    long = rng.uniform(0.42, 0.54) if leaves is not None else rng.uniform(0.1, 0.45)
    for x in np.linspace(-0.05, 1.05, 12):
        tip = x + rng.uniform(-0.08, 0.08)
        low = long * rng.uniform(0.88, 1.1)
        strands.append(np.array([[x - 0.09, -0.1], [x + 0.09, -0.1], [tip + 0.055, low], [tip - 0.055, low]]))
    return strands


def _scarf(rng: np.random.Generator, leaves: Visible | None) -> list[Points]:
    """A wound cloth whose upper border is a slanted, wavy line."""
    top, slope = rng.uniform(0.46, 0.58), rng.uniform(-0.1, 0.1)
    x = np.linspace(-0.1, 1.1, 9)
    border = top + slope * (x - 0.5) + 0.03 * np.sin(rng.uniform(2, 9) * x + rng.uniform(0, 6))
    return [np.concatenate([np.stack([x, border], axis=1), [[1.1, 1.2], [-0.1, 1.2]]])]


def _goggles(rng: np.random.Generator, leaves: Visible | None) -> list[Points]:
    """One wide pane for both eyes, and a cap's brim pulled down to it."""
    y, b = rng.uniform(0.27, 0.34), rng.uniform(0.15, 0.21)
    brim = rng.uniform(0.1, 0.2)
    cap = np.array([[-0.1, -0.2], [1.1, -0.2], [1.1, brim], [0.5, brim + rng.uniform(0, 0.1)], [-0.1, brim]])
    return [_turned(_oval(0.5, y, rng.uniform(0.44, 0.52), b), rng.normal(0, 0.05), (0.5, y)), cap]


def _phone(rng: np.random.Generator, leaves: Visible | None) -> list[Points]:
    """A slab held before eyes or mouth, askew."""
    y = {Visible.UPPER: 0.8, Visible.LOWER: 0.2, None: rng.uniform(0.1, 0.9)}[leaves]
    half = rng.uniform(0.24, 0.3) if leaves is not None else rng.uniform(0.1, 0.3)
    slab = _rectangle(rng.uniform(-0.1, 0.08), y - half, rng.uniform(0.92, 1.1), y + half)
    return [_turned(slab, rng.normal(0, 0.12), (0.5, y))]


_SHAPES: Mapping[Kind, Callable[[np.random.Generator, Visible | None], list[Points]]] = {
    Kind.MASK: _mask,
    Kind.HAND: _hand,
    Kind.HEADSET: _headset,
    Kind.MICROPHONE: _microphone,
    Kind.BANNER: _banner,
    Kind.HAIR: _hair,
    Kind.SCARF: _scarf,
    Kind.GOGGLES: _goggles,
    Kind.PHONE: _phone,
}


def cover_clip(clip: Path, out: Path, occluder: Occluder) -> int:
    """Draws the occluder over every face of a video, in place from frame to frame; returns how many it drew.

    Faces are looked for in every FOLLOWED_EVERY-th frame, and their boxes hold until the next. Pictures only,
    H.264 at CRF 18. Raises what PyAV raises for a file that is no video.
    """
    detector = MtcnnDetector(40, 0.9)
    policy = CropPolicy(CropKind.TIGHT, size=224, side=0.81, shift=0.06)
    boxes: list[Box] = []
    drawn = 0
    with av.open(str(clip)) as source, av.open(str(out), "w") as target:
        video = source.streams.video[0]
        stream = target.add_stream("libx264", rate=Fraction(video.average_rate or 25))
        stream.width, stream.height = video.width - video.width % 2, video.height - video.height % 2
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18", "preset": "veryfast"}
        for number, frame in enumerate(source.decode(video=0)):
            picture = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
            if number % FOLLOWED_EVERY == 0:
                boxes = [face.box for face in detector.detect([picture])[0]]
            for box in boxes:
                picture, drawn = _over_face(picture, policy.square(box), occluder), drawn + 1
            shown = np.ascontiguousarray(picture[: stream.height, : stream.width])
            target.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        target.mux(stream.encode(None))
    return drawn


def _over_face(picture: Image, place: Box, occluder: Occluder) -> Image:
    """Only what lies within the crop's square is drawn on: an occluder has no shape outside of it."""
    height, width = picture.shape[:2]
    side = max(2, round(place[2] - place[0]))
    left, top = round(place[0]), round(place[1])
    x0, y0, x1, y1 = max(0, left), max(0, top), min(width, left + side), min(height, top + side)
    if x1 <= x0 or y1 <= y0:
        return picture
    inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    out = picture.copy()
    square = cv2.copyMakeBorder(
        picture[y0:y1, x0:x1], y0 - top, top + side - y1, x0 - left, left + side - x1, cv2.BORDER_REPLICATE
    )
    out[y0:y1, x0:x1] = cover(square, occluder)[inside]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws something in front of every face of a video.")
    parser.add_argument("clip", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", type=Kind, choices=tuple(Kind), default=Kind.MASK)
    parser.add_argument("--leaves", type=Visible, choices=tuple(COVERING), default=Visible.UPPER)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    occluder = draw_occluder(np.random.default_rng(given.seed), given.kind, given.leaves)
    print(f"{cover_clip(given.clip, given.out, occluder)} faces covered in {given.out}")


if __name__ == "__main__":
    main()
