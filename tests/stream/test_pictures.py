"""Pictures: upright, square pixels, deinterlaced, tone-mapped, reduced."""

from fractions import Fraction

import av
import numpy as np
import pytest

from stream.pictures import HDR, Pictures
from tests.stream.media import numbered


def colours(width: int = 64, height: int = 48) -> av.VideoFrame:
    """Return a frame with a red, a green, a blue and a white corner."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2, 0] = 255
    image[: height // 2, width // 2 :, 1] = 255
    image[height // 2 :, : width // 2, 2] = 255
    image[height // 2 :, width // 2 :] = 255
    return av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv444p")


def corner(image: np.ndarray, right: bool, lower: bool) -> str:
    height, width, _ = image.shape
    pixel = image[height * (3 if lower else 1) // 4, width * (3 if right else 1) // 4] > 128
    return {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}[
        tuple(int(v) for v in pixel)
    ]


@pytest.mark.parametrize(
    ("rotation", "upper_left", "upper_right"),
    [(0, "red", "green"), (90, "blue", "red"), (180, "white", "blue"), (270, "green", "white")],
)
def test_turned_clockwise(rotation: int, upper_left: str, upper_right: str) -> None:
    for image in Pictures(32).convert(colours(), rotation):
        assert corner(image, right=False, lower=False) == upper_left
        assert corner(image, right=True, lower=False) == upper_right
        assert (image.shape[0] > image.shape[1]) == (rotation in (90, 270))


@pytest.mark.parametrize("size", [(1281, 721), (640, 360), (333, 77), (17, 31), (2, 2)])
def test_sizes(size: tuple[int, int]) -> None:
    width, height = size
    frame = av.VideoFrame.from_ndarray(numbered(3, 64, 48), format="rgb24")
    image, small = Pictures(300).convert(frame.reformat(width, height, "yuv420p"))
    assert image.shape == (height, width, 3)
    if width <= 300:
        assert small is image
    else:
        assert small.shape == (round(height * 300 / width), 300, 3)
    assert image.dtype == np.uint8


def test_one_converter_takes_frames_of_changing_shape() -> None:
    pictures = Pictures(100)
    for width, height, pixel_format in ((320, 180, "yuv420p"), (64, 48, "yuv422p10le"), (320, 180, "nv12")):
        frame = colours(width, height).reformat(format=pixel_format)
        for image in pictures.convert(frame):
            assert corner(image, right=False, lower=False) == "red"
            assert corner(image, right=True, lower=True) == "white"


def test_anamorphic_pictures_get_square_pixels() -> None:
    image, _ = Pictures(1000).convert(colours(72, 57), 0, Fraction(64, 45))
    assert image.shape == (57, 102, 3)
    image, _ = Pictures(1000).convert(colours(72, 57), 0, Fraction(1000, 1))
    assert image.shape == (57, 72, 3)


def test_interlaced_pictures_lose_their_combs() -> None:
    """Two fields 8 pixels apart: rows alternate at every upright edge."""
    image = np.zeros((120, 160, 3), np.uint8)
    image[0::2, 40:80] = 255
    image[1::2, 48:88] = 255
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
    combed, _ = Pictures(640).convert(frame)
    options = {"x264-params": "interlaced=1:tff=1:qp=1"}
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 160, 120, "yuv420p"
    encoder.time_base = Fraction(1, 25)
    encoder.options = options
    frame.pts = 0
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    decoder = av.CodecContext.create("h264", "r")
    [coded] = [f for packet in [*packets, None] for f in decoder.decode(packet)]
    assert coded.interlaced_frame
    clean, _ = Pictures(640).convert(coded)
    assert clean.shape == combed.shape
    assert _comb(clean) < _comb(combed) / 4


def _comb(image: np.ndarray) -> float:
    rows = image[20:100].astype(float)
    return float(np.abs(2 * rows[1:-1] - rows[:-2] - rows[2:]).mean())


def pq(nits: float) -> float:
    """Return the PQ signal (SMPTE ST 2084) of a luminance, in 0..1."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = (nits / 10000) ** m1
    return float(((c1 + c2 * power) / (1 + c3 * power)) ** m2)


def hlg(light: float) -> float:
    """Return the HLG signal (BT.2100) of relative scene light in 0..1."""
    if light <= 1 / 12:
        return float(np.sqrt(3 * light))
    return float(0.17883277 * np.log(12 * light - 0.28466892) + 0.55991073)


def grey_10_bit(signals: list[float], transfer: int, primaries: int = 9) -> av.VideoFrame:
    """Return 10-bit BT.2020 bars, 16 pixels wide, of the given signals."""
    luma = np.repeat(np.array([64 + round(876 * s) for s in signals], np.uint16), 16)[None].repeat(32, axis=0)
    planes = np.concatenate([luma.ravel(), np.full(luma.size // 2, 512, np.uint16)])
    frame = av.VideoFrame.from_ndarray(planes.reshape(48, luma.shape[1]), format="yuv420p10le")
    frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = transfer, primaries, 9, 1
    return frame


@pytest.mark.parametrize("primaries", [9, 2])
def test_hdr_is_mapped_to_the_brightness_of_sdr(primaries: int) -> None:
    nits = [0.0, 20.0, 80.0, 203.0, 1000.0]
    mapped, _ = Pictures(640).convert(grey_10_bit([pq(n) for n in nits], HDR[0], primaries))
    shown = mapped[16, 8::16, 1].astype(int)
    # BT.2408: 203 nits is reference white; SDR would show 20 and 80 nits at 255 * (n / 203) ** (1 / 2.4).
    assert shown[0] <= 2
    assert abs(shown[1] - 255 * (20 / 203) ** (1 / 2.4)) < 15
    assert abs(shown[2] - 255 * (80 / 203) ** (1 / 2.4)) < 15
    assert shown[3] >= 245
    assert shown[4] == 255
    plain, _ = Pictures(640).convert(grey_10_bit([pq(n) for n in nits], 1))
    assert plain[16, 56, 1] < 160  # what a face would look like unmapped: grey and flat


def test_hlg_is_mapped_too() -> None:
    mapped, _ = Pictures(640).convert(grey_10_bit([0.0, hlg(0.05), hlg(0.1), 0.75, 1.0], HDR[1]))
    shown = mapped[16, 8::16, 1].astype(int)
    assert list(shown) == sorted(shown)
    assert shown[0] <= 2
    assert shown[3] >= 235  # signal 0.75 is reference white (BT.2408)
