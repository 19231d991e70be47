"""Framing by both policies, edges of the picture, resampling, normalisation."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from detectors.crops import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CropError,
    CropKind,
    CropPolicy,
    Resampling,
    crop,
    fit,
    recrop,
    to_tensor,
)
from detectors.readings import Image

TIGHT = CropPolicy(CropKind.TIGHT, size=32, side=0.8, shift=0.05)
MARGIN = CropPolicy(CropKind.MARGIN_SQUARE, size=32, side=0.2, top=0.4)


def ramp(height: int, width: int) -> Image:
    """Red rises by one a column, green by one a row."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)[None, :]
    image[..., 1] = np.arange(height)[:, None]
    return image


def test_tight_square_is_centred_lower() -> None:
    assert TIGHT.square((10, 20, 90, 120)) == pytest.approx((10, 35, 90, 115))


def test_margin_square_follows_the_paper() -> None:
    # grown: x 30..170, y 60..220 (0.2 of 100 on each side and below, 0.4 on top), so a square of 160
    assert MARGIN.square((50, 100, 150, 200)) == pytest.approx((20, 60, 180, 220))


def test_margin_square_of_a_wide_box_is_as_wide() -> None:
    x0, y0, x1, y1 = MARGIN.square((0, 100, 300, 200))
    assert (x1 - x0, y1 - y0) == pytest.approx((340, 340))


@given(
    st.floats(-500, 500),
    st.floats(-500, 500),
    st.floats(1, 800),
    st.floats(1, 800),
    st.sampled_from([TIGHT, MARGIN]),
)
def test_always_a_square_never_squashed(x: float, y: float, w: float, h: float, policy: CropPolicy) -> None:
    x0, y0, x1, y1 = policy.square((x, y, x + w, y + h))
    assert x1 - x0 == pytest.approx(y1 - y0)
    assert (x0 + x1) / 2 == pytest.approx(x + w / 2, abs=1e-6)


def test_a_crop_at_its_own_size_is_the_picture_itself() -> None:
    image = ramp(100, 120)
    policy = CropPolicy(CropKind.TIGHT, size=40, side=1.0)
    np.testing.assert_array_equal(crop(image, (30, 20, 60, 60), policy), image[20:60, 25:65])


def test_beyond_the_edge_the_border_repeats() -> None:
    image = ramp(100, 100)
    face = crop(image, (-20, 10, 20, 50), CropPolicy(CropKind.TIGHT, size=40, side=1.0))
    assert (face[:, :20, 0] == 0).all()
    np.testing.assert_array_equal(face[:, 20:], image[10:50, :20])


def test_reduction_averages_areas() -> None:
    checks = np.zeros((128, 128, 3), np.uint8)
    checks[::2, ::2] = 255
    checks[1::2, 1::2] = 255
    face = fit(checks, 32)
    assert face.shape == (32, 32, 3)
    assert np.abs(face.astype(int) - 127).max() <= 1


def test_of_a_picture_that_is_not_square_the_middle_is_taken() -> None:
    image = ramp(60, 40)
    np.testing.assert_array_equal(fit(image, 40), image[10:50])
    np.testing.assert_array_equal(fit(image.transpose(1, 0, 2), 40), image.transpose(1, 0, 2)[:, 10:50])


def test_a_loose_crop_is_framed_again_and_a_tight_one_left_alone() -> None:
    image = ramp(200, 200)
    policy = CropPolicy(CropKind.TIGHT, size=32, side=0.8)
    loose, tight = (60.0, 60.0, 140.0, 160.0), (20.0, 0.0, 180.0, 240.0)
    np.testing.assert_array_equal(recrop(image, loose, policy), crop(image, loose, policy))
    np.testing.assert_array_equal(recrop(image, tight, policy), fit(image, 32))
    np.testing.assert_array_equal(recrop(image, None, policy), fit(image, 32))


@pytest.mark.parametrize("box", [(10, 10, 10, 20), (10, 20, 20, 20), (20, 10, 10, 20), (300, 10, 340, 50)])
def test_an_impossible_box_is_refused_with_its_numbers(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(CropError, match=rf"face box \({box[0]}"):
        crop(ramp(100, 100), box, TIGHT)


def test_a_picture_of_another_type_is_refused() -> None:
    with pytest.raises(CropError, match="float64"):
        crop(np.zeros((10, 10, 3)), (1, 1, 5, 5), TIGHT)  # type: ignore[arg-type]


def test_normalisation() -> None:
    faces = np.full((2, 32, 32, 3), (255, 0, 128), np.uint8)
    tensor = to_tensor(faces, TIGHT)
    assert tensor.shape == (2, 3, 32, 32)
    assert tensor.dtype == torch.float32
    expected = [(v / 255 - m) / s for v, m, s in zip((255, 0, 128), IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    torch.testing.assert_close(tensor[1, :, 5, 7], torch.tensor(expected))


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(CropError, match=r"\(N, 32, 32, 3\)"):
        to_tensor(np.zeros((1, 16, 16, 3), np.uint8), TIGHT)


@pytest.mark.parametrize("policy", [TIGHT, MARGIN])
def test_survives_json(policy: CropPolicy) -> None:
    again = CropPolicy.from_json(policy.to_json())
    assert again == policy
    assert again.digest() == policy.digest()
    assert policy.at_size(64).digest() != policy.digest()


def test_an_unknown_kind_is_refused_with_those_known() -> None:
    with pytest.raises(CropError, match=r"'loose'.*tight, margin_square"):
        CropPolicy.from_json(TIGHT.to_json() | {"kind": "loose"})


PAPER = CropPolicy(CropKind.MARGIN_SQUARE, 224, side=0.2, top=0.4, resampling=Resampling.PIL_BILINEAR)


def test_digests_from_before_the_resampling_field_stay_the_same() -> None:
    assert "resampling" not in MARGIN.to_json()
    assert MARGIN.digest() == "6634e5da9c64"
    assert TIGHT.digest() == "1f5f3ec9fe5d"


def test_the_papers_resampling_is_recorded_and_read_back() -> None:
    assert PAPER.to_json()["resampling"] == "pil_bilinear"
    again = CropPolicy.from_json(json.loads(json.dumps(PAPER.to_json())))
    assert again == PAPER
    assert again.digest() != replace(PAPER, resampling=Resampling.AREA).digest()
    with pytest.raises(CropError, match=r"resampling 'cubic'.*area, pil_bilinear"):
        CropPolicy.from_json(PAPER.to_json() | {"resampling": "cubic"})


@pytest.mark.parametrize("side", [500, 224, 90])
def test_the_papers_crop_is_pillows_bilinear_of_the_square(side: int) -> None:
    """A face box of side/1.6 grows to `side`: .2 of its height on each side and below, .4 above."""
    rng = np.random.default_rng(2)
    image = rng.integers(256, size=(600, 600, 3), dtype=np.uint8)
    height = side / 1.6
    box = (50 + 0.3 * height, 40 + 0.4 * height, 50 + 1.3 * height, 40 + 1.4 * height)
    expected = Pillow.fromarray(image[40 : 40 + side, 50 : 50 + side]).resize(
        (224, 224), Pillow.Resampling.BILINEAR
    )
    face = crop(image, box, PAPER)
    np.testing.assert_array_equal(face, np.asarray(expected))
    assert face.flags.writeable
    assert (side == 224) == np.array_equal(face, crop(image, box, replace(PAPER, resampling=Resampling.AREA)))


def test_pillows_bilinear_does_not_alias() -> None:
    checks = np.zeros((128, 128, 3), np.uint8)
    checks[::2, ::2] = checks[1::2, 1::2] = 255
    assert np.abs(fit(checks, 32, Resampling.PIL_BILINEAR)[1:-1, 1:-1].astype(int) - 127).max() <= 1
