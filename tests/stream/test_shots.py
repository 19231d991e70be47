"""Shot cuts: found between shots, not in pans, shaking, flashes or fades."""

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from stream.shots import HEIGHT, HISTORY, WIDTH, ShotDetector, thumbnail

Grey = NDArray[np.uint8]
SIZE = (320, 180)


def scene(seed: int, width: int = 900, height: int = 260) -> Grey:
    """Return a scene wider than the picture: broad shapes and fine texture, as photographs have."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width), np.float32)
    for scale, weight in ((6, 60.0), (14, 40.0), (50, 16.0)):
        coarse = rng.normal(size=(max(2, scale * height // width), scale)).astype(np.float32)
        picture += weight * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(picture + 118, 0, 255).astype(np.uint8)


def view(picture: Grey, x: float = 0, y: float = 0, gain: float = 1.0, offset: float = 0.0) -> Grey:
    """Return the camera's picture of a scene at (x, y), exposed."""
    part = cv2.getRectSubPix(picture, SIZE, (x + SIZE[0] / 2, y + SIZE[1] / 2)).astype(np.float32)
    return np.clip(part * gain + offset, 0, 255).astype(np.uint8)


def cuts(pictures: list[Grey]) -> list[int]:
    detector = ShotDetector()
    small = [cv2.resize(picture, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA) for picture in pictures]
    return [n for n, luma in enumerate(small) if detector.add(luma)]


@pytest.mark.parametrize("seed", range(8))
def test_a_cut_is_found_where_it_is(seed: int) -> None:
    first, second = scene(seed), scene(seed + 100)
    pictures = [view(first, n) for n in range(20)] + [view(second, n) for n in range(20)]
    assert cuts(pictures) == [20]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("speed", [2.0, 6.0, 10.0])
def test_a_pan_is_no_cut(seed: int, speed: float) -> None:
    # 10 pixels of 320 a frame cross the picture in 1.3 s; it starts and stops at once.
    picture = scene(seed)
    still = [view(picture)] * 10
    moving = [view(picture, speed * n, 20 * np.sin(n)) for n in range(50)]
    assert cuts(still + moving + [moving[-1]] * 10) == []


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_flash_is_no_cut(seed: int, frames: int) -> None:
    picture = scene(seed)
    pictures = [view(picture, n) for n in range(40)]
    for n in range(15, 15 + frames):
        pictures[n] = view(picture, n, gain=1.3, offset=25)
    assert cuts(pictures) == []


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_flash_that_burns_out_the_picture_never_cuts_twice(seed: int, frames: int) -> None:
    picture = scene(seed)
    pictures = [view(picture, n) for n in range(40)]
    for n in range(15, 15 + frames):
        pictures[n] = view(picture, n, gain=4.0, offset=60)
    assert set(cuts(pictures)) <= {15}


@pytest.mark.parametrize("seed", range(8))
def test_a_flash_to_white_is_no_cut(seed: int) -> None:
    picture = scene(seed)
    pictures = [view(picture, n) for n in range(40)]
    pictures[15] = pictures[16] = np.full((180, 320), 255, np.uint8)
    assert cuts(pictures) == []


@pytest.mark.parametrize("seed", range(8))
def test_a_change_of_exposure_is_no_cut(seed: int) -> None:
    picture = scene(seed)
    assert cuts([view(picture, n, gain=1 - 0.8 * abs(n - 25) / 25) for n in range(50)]) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_fade_through_black_is_one_cut(seed: int) -> None:
    first, second = scene(seed), scene(seed + 100)
    pictures = [view(first, n, gain=max(0.0, 1 - n / 12)) for n in range(18)]
    pictures += [view(second, n, gain=min(1.0, n / 12)) for n in range(30)]
    assert len(cuts(pictures)) == 1


def test_noise_in_the_dark_is_no_cut() -> None:
    rng = np.random.default_rng(3)
    pictures = [np.clip(rng.normal(16, 6, (180, 320)), 0, 255).astype(np.uint8) for _ in range(30)]
    assert cuts(pictures) == []


def test_a_cut_inside_a_fast_pan_is_found() -> None:
    first, second = scene(1), scene(101)
    pictures = [view(first, 8 * n) for n in range(30)] + [view(second, 8 * n) for n in range(30)]
    assert cuts(pictures) == [30]


@pytest.mark.parametrize("seed", range(4))
def test_decisions_depend_on_so_many_frames_and_no_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scenes = [scene(seed), scene(seed + 50), np.zeros((260, 900), np.uint8)]
    pictures: list[Grey] = []
    while len(pictures) < 120:
        shot = scenes[int(rng.integers(3))]
        speed = float(rng.uniform(0, 12))
        pictures += [view(shot, speed * n) for n in range(int(rng.integers(1, 20)))]
    whole = cuts(pictures)
    assert whole
    for start in range(0, 100, 7):
        later = [start + n for n in cuts(pictures[start:]) if n >= HISTORY]
        assert later == [n for n in whole if n >= start + HISTORY]


@pytest.mark.parametrize(
    "pixel_format", ["yuv420p", "nv12", "yuv422p10le", "gray", "rgb24", "yuyv422", "gbrp"]
)
@pytest.mark.parametrize("size", [(320, 180), (1921, 1081), (50, 30), (16, 8)])
def test_thumbnails_look_alike_in_every_format(pixel_format: str, size: tuple[int, int]) -> None:
    picture = cv2.resize(view(scene(5)), size, interpolation=cv2.INTER_AREA)
    source = av.VideoFrame.from_ndarray(np.repeat(picture[:, :, None], 3, axis=2), format="rgb24")
    luma = thumbnail(source.reformat(format=pixel_format))
    assert luma.shape == (HEIGHT, WIDTH)
    assert luma.dtype == np.uint8
    expected = cv2.resize(picture, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(luma.ravel(), expected.ravel())[0, 1] > 0.9
