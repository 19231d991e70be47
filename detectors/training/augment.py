"""What happens to a face between a camera and a stream, drawn at random and cheap.

One `Degradation` is drawn for a PAIR and applied to both of its crops, the authentic and the manipulated one:
no property of the degradation can tell the classes apart (SCIENCE C: a class-dependent one is a shortcut the
network takes). The order is that of a stream: light and lens, scaling, sensor noise, codec; and only then the
cut to the network's size.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.readings import Image

SEVERE_SHARE = 0.25
"""Severe degradation erases the cue: at most 30 % of the samples (SCIENCE C)."""
H264_SHARE = 0.3
"""Share of the samples that go through H.264 instead of JPEG: live feeds do, and it costs ten times more."""
H264_FRAMES = 3
"""Pictures encoded of which the last is kept, so that it is a predicted one as most of a stream's are."""
LOW_LIGHT = (0.2, 0.7)
"""Share of the light that is left. Down to .35 alone, authentic faces at .3 were what set the threshold."""
GOOD_JPEG = 90
SMALLEST = 40
"""Pixels of a side that no scaling goes below."""


@dataclass(frozen=True, slots=True)
class Degradation:
    """One draw for crops of `source` pixels that leave with `size`.

    `sigma` and `motion` are in pixels of the source, `noise` in grey levels, `work` the side to which the
    crop is scaled before it is encoded; `matrix` takes a crop scaled to `plane` pixels to the network's
    input. `jpeg` is a quality, 0 for none; `crf` that of H.264, 0 for none.
    """

    source: int
    size: int
    flip: bool
    lut: NDArray[np.uint8]
    saturation: float
    sigma: float
    motion: int
    work: int
    noise: float
    jpeg: int
    crf: int
    plane: int
    matrix: NDArray[np.float64]
    seed: int
    patch: tuple[float, float, float, float, int] | None = field(default=None)


def draw(
    rng: np.random.Generator, source: int, size: int, *, view: float = 1.0, native: float = 1.0,
    coded: bool = False, mild: bool = False,
) -> Degradation:  # fmt: skip
    """Draws one degradation for crops of `source` px of which the middle `view` is shown at `size` px.

    `native` is the share of `source` that the picture had before it was enlarged. `coded`: always ends in a
    codec, as it must where one of a pair was changed after its last one. `mild`: never a severe one.
    """
    severe = rng.random() < SEVERE_SHARE and not mild
    which = rng.integers(6) if severe else -1
    jpeg, crf = _codec(rng, severe=severe, coded=coded)
    work = max(min(SMALLEST, source), round(source * native * _shrink(rng, severe=which in (1, 5))))
    plane = round(size / view)
    return Degradation(
        source=source,
        size=size,
        flip=bool(rng.random() < 0.5),
        lut=_tone(rng, low_light=which == 0),
        saturation=float(rng.uniform(0.6, 1.3)) if rng.random() < 0.4 else 1.0,
        sigma=_sigma(rng, severe=which in (2, 5)),
        motion=int(rng.integers(3, 8)) if which == 4 else 0,
        work=work,
        noise=_noise(rng, severe=which in (0, 3)),
        jpeg=jpeg,
        crf=crf,
        plane=plane,
        matrix=_affine(rng, plane, size),
        seed=int(rng.integers(2**31)),
        patch=_patch(rng),
    )


def without_harm(degradation: Degradation) -> Degradation:
    """The same cut of a picture that nothing happened to but one good JPEG, which hides what was blended."""
    plain = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1).reshape(1, 256, 3)
    return replace(
        degradation,
        lut=plain,
        saturation=1.0,
        sigma=0.0,
        motion=0,
        work=degradation.source,
        noise=0.0,
        jpeg=GOOD_JPEG,
        crf=0,
        patch=None,
    )


def apply(image: Image, degradation: Degradation) -> Image:
    """uint8 [S, S, 3] RGB in, uint8 [size, size, 3] RGB out; the same draw gives the same result."""
    d = degradation
    out: Image = np.ascontiguousarray(image[:, ::-1] if d.flip else image)
    out = cv2.LUT(out, d.lut)
    if d.saturation != 1.0:
        grey = cv2.cvtColor(cv2.cvtColor(out, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        out = cv2.addWeighted(out, d.saturation, grey, 1 - d.saturation, 0)
    if d.patch is not None:
        x, y, w, h, grey_level = d.patch
        rows = slice(int(y * d.source), int((y + h) * d.source))
        out[rows, int(x * d.source) : int((x + w) * d.source)] = grey_level
    if d.motion:
        kernel = np.zeros((d.motion, d.motion), np.float32)
        kernel[d.motion // 2] = 1 / d.motion
        out = cv2.filter2D(out, -1, kernel)
    if d.sigma:
        out = cv2.GaussianBlur(out, (0, 0), d.sigma)
    out = _scaled(out, d.work)
    if d.noise:
        noise = np.random.default_rng(d.seed).standard_normal(out.shape, dtype=np.float32) * d.noise
        out = np.clip(out + noise, 0, 255).astype(np.uint8)
    if d.crf:
        out = h264_round_trip(out, d.crf, d.seed)
    elif d.jpeg:
        out = jpeg_round_trip(out, d.jpeg)
    shown: Image = cv2.warpAffine(
        _scaled(out, d.plane), d.matrix, (d.size, d.size), flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )  # fmt: skip
    return shown


def apply_to_mask(mask: NDArray[np.float32], degradation: Degradation) -> NDArray[np.float32]:
    """float32 [S, S] in, [size, size] out: moved with its crop, and nothing else."""
    d = degradation
    turned = np.ascontiguousarray(mask[:, ::-1] if d.flip else mask)
    scaled = cv2.resize(turned, (d.plane, d.plane), interpolation=cv2.INTER_AREA)
    moved: NDArray[np.float32] = cv2.warpAffine(scaled, d.matrix, (d.size, d.size), flags=cv2.INTER_LINEAR)
    return moved


def jpeg_round_trip(image: Image, quality: int) -> Image:
    """The picture as JPEG of this quality (1 to 100) gives it back."""
    _, coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    if decoded is None:
        raise ValueError(f"JPEG of quality {quality} cannot be read back")
    out: Image = decoded
    return out


def h264_round_trip(image: Image, crf: int, seed: int, frames: int = H264_FRAMES) -> Image:
    """The last of `frames` jittered copies of uint8 [H, W, 3] RGB that went through x264 at this CRF.

    Sides are odd or even; the encoder sees even ones. The same seed gives the same jitter.
    """
    height, width = image.shape[:2]
    even = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    rng = np.random.default_rng(seed)
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height = even.shape[1], even.shape[0]
    encoder.pix_fmt, encoder.time_base = "yuv420p", Fraction(1, 25)
    encoder.options = {"crf": str(crf), "preset": "veryfast", "tune": "zerolatency", "threads": "1"}
    decoder = av.CodecContext.create("h264", "r")
    packets = []
    for number in range(frames):
        dx, dy = (0, 0) if number == frames - 1 else rng.integers(-2, 3, 2)
        picture = av.VideoFrame.from_ndarray(np.roll(even, (dy, dx), axis=(0, 1)), format="rgb24")
        picture.pts = number
        packets.extend(encoder.encode(picture))
    packets.extend(encoder.encode(None))
    decoded = [frame for packet in packets for frame in decoder.decode(packet)]
    decoded.extend(decoder.decode(None))
    last = decoded[-1].to_ndarray(format="rgb24")
    return np.ascontiguousarray(last[:height, :width], np.uint8)


def _scaled(image: Image, side: int) -> Image:
    if image.shape[0] == side:
        return image
    way = cv2.INTER_AREA if image.shape[0] > side else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (side, side), interpolation=way), np.uint8)


def _affine(rng: np.random.Generator, plane: int, size: int) -> NDArray[np.float64]:
    """About what two face detectors disagree by: 12 % of scale, 5 % of place, 4 % of aspect, 8 degrees."""
    scale = rng.uniform(0.89, 1.13)
    aspect = rng.uniform(0.98, 1.02)
    angle = np.deg2rad(rng.uniform(-8, 8)) if rng.random() < 0.5 else 0.0
    cos, sin = np.cos(angle), np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag([scale * aspect, scale / aspect])
    centre = np.array([size / 2, size / 2]) * (1 + rng.uniform(-0.1, 0.1, 2))
    offset = centre - linear @ np.array([plane / 2, plane / 2])
    return np.concatenate([linear, offset[:, None]], axis=1)


def _codec(rng: np.random.Generator, *, severe: bool, coded: bool) -> tuple[int, int]:
    """JPEG quality and H.264 CRF, one of them 0."""
    if rng.random() < H264_SHARE:
        return 0, int(rng.integers(30, 40)) if severe else int(rng.integers(18, 30))
    if severe:
        return int(rng.integers(25, 70)), 0
    return int(rng.integers(50, 99)) if coded or rng.random() < 0.7 else 0, 0


def _tone(rng: np.random.Generator, *, low_light: bool) -> NDArray[np.uint8]:
    """Exposure, contrast, gamma and white balance in one table, uint8 [256, 3]."""
    x = np.linspace(0, 1, 256)[:, None].repeat(3, axis=1)
    if rng.random() < 0.6:
        contrast, brightness = rng.uniform(0.85, 1.2), rng.uniform(-0.06, 0.06)
        x = (x - 0.5) * contrast + 0.5 + brightness
        x = np.clip(x, 0, 1) ** rng.uniform(0.8, 1.25)
        x = x * (1 + rng.uniform(-0.05, 0.05, 3))
    if low_light:
        x = np.clip(x, 0, 1) * rng.uniform(*LOW_LIGHT)
    table: NDArray[np.uint8] = np.clip(x * 255 + 0.5, 0, 255).astype(np.uint8)
    return table.reshape(1, 256, 3)


def _shrink(rng: np.random.Generator, *, severe: bool) -> float:
    if severe:
        return float(rng.uniform(0.33, 0.6))
    return float(rng.uniform(0.6, 0.95)) if rng.random() < 0.25 else 1.0


def _sigma(rng: np.random.Generator, *, severe: bool) -> float:
    if severe:
        return float(rng.uniform(0.8, 2.0))
    return float(rng.uniform(0.3, 0.8)) if rng.random() < 0.15 else 0.0


def _noise(rng: np.random.Generator, *, severe: bool) -> float:
    if severe:
        return float(rng.uniform(4, 12))
    return float(rng.uniform(1, 8)) if rng.random() < 0.3 else 0.0


def _patch(rng: np.random.Generator) -> tuple[float, float, float, float, int] | None:
    """A hand, a microphone, a caption: a flat rectangle at one sample in eight."""
    if rng.random() >= 0.125:
        return None
    w, h = rng.uniform(0.1, 0.4, 2)
    x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
    return float(x), float(y), float(w), float(h), int(rng.integers(256))
