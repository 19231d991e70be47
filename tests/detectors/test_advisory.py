"""Each advisory figure sees what it is named for on a real face, and is quiet on the face itself."""

import cv2
import numpy as np
import pytest

from detectors import advisory
from detectors.advisory import flat_colour, moire, skin_detail
from detectors.reference import portrait

FACE = (slice(108, 331), slice(150, 373))


@pytest.fixture(scope="module")
def face() -> advisory.Grey:
    return np.ascontiguousarray(cv2.cvtColor(portrait(), cv2.COLOR_RGB2GRAY)[FACE])


def filmed_screen(face: advisory.Grey, frequency: float, angle: float) -> advisory.Grey:
    down, across = np.mgrid[: face.shape[0], : face.shape[1]]
    phase = 2 * np.pi * frequency * (across * np.cos(angle) + down * np.sin(angle))
    return np.clip(face * (1 + 0.25 * np.cos(phase)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("frequency", "angle"), [(0.15, 0.5), (0.3, 1.0), (0.22, 2.2)])
@pytest.mark.parametrize("side", [90, 200])
def test_moire_stands_out_of_the_spectrum(
    face: advisory.Grey, frequency: float, angle: float, side: int
) -> None:
    small = cv2.resize(face, (side, side), interpolation=cv2.INTER_AREA)
    limit = 2.2
    plain, filmed = moire(small), moire(filmed_screen(small, frequency, angle))
    assert plain is not None
    assert filmed is not None
    assert plain < limit < filmed


def test_block_grids_are_no_moire(face: advisory.Grey) -> None:
    """They lie on the axes of the spectrum, which are left out."""
    _, coded = cv2.imencode(".jpg", face, [cv2.IMWRITE_JPEG_QUALITY, 20])
    peak = moire(np.asarray(cv2.imdecode(coded, cv2.IMREAD_GRAYSCALE), np.uint8))
    assert peak is not None
    assert peak < 2.2


def test_faces_too_small_for_a_spectrum_have_none(face: advisory.Grey) -> None:
    assert moire(face[:63, :63]) is None
    assert "moire" not in advisory.parts(face[:40, :40], face)


def test_a_face_filled_with_few_greys_is_rough(face: advisory.Grey) -> None:
    drawn = (face // 32 * 32 + 16).astype(np.uint8)
    assert flat_colour(drawn) > 3 * flat_colour(face)


def test_smoothed_skin_beside_sharp_eyes_is_seen(face: advisory.Grey) -> None:
    smooth = face
    for _ in range(3):
        smooth = cv2.bilateralFilter(smooth, 0, 40, 4)
    assert skin_detail(smooth) < 0.7 * skin_detail(face)


def test_a_flat_picture_gives_finite_figures() -> None:
    flat = np.full((128, 128), 7, np.uint8)
    assert all(np.isfinite(value) for value in advisory.parts(flat, flat).values())
