"""Quality: each fault is named, each only lowers the weight, and they do not take one another's blame."""

import dataclasses
import math

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detectors.mtcnn import MtcnnDetector
from detectors.quality import QualityLimits, measure, pose, with_qp
from detectors.readings import Detection, Image, Landmarks, Quality, Reason
from detectors.reference import portrait
from detectors.training.robustness import coded_h264, with_noise

LIMITS = QualityLimits(
    min_face_px=45,
    min_sharpness=0.17,
    min_brightness=25,
    max_noise=0.15,
    max_blockiness=2.0,
    max_grid=1.24,
    max_qp=40,
    max_moire=2.2,
)
"""Fixed here, so that limits derived anew do not change what these tests say."""


@pytest.fixture(scope="module")
def face() -> Detection:
    return MtcnnDetector(40, 0.9).detect([portrait()])[0][0]


def judged(picture: Image, face: Detection, limits: QualityLimits = LIMITS) -> Quality:
    return measure(picture, face.box, face.landmarks, limits)


def jpeg(picture: Image, quality: int) -> Image:
    ok, data = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok
    return np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1])


def noisy(picture: Image, sigma: float) -> Image:
    return with_noise(picture.astype(np.float32), sigma, np.random.default_rng(5))


def test_a_good_portrait_passes_with_full_weight(face: Detection) -> None:
    quality = judged(portrait(), face)
    assert quality.reasons == ()
    assert quality.weight > 0.95
    assert set(quality.parts) == {
        "face_px", "sharpness", "brightness", "noise", "blockiness", "grid", "yaw", "pitch", "roll",
        "moire", "flat_colour", "skin_detail",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda p: cv2.GaussianBlur(p, (0, 0), 6), Reason.BLUR),
        (lambda p: cv2.convertScaleAbs(p, alpha=0.12), Reason.LOW_LIGHT),
        (lambda p: noisy(p, 50), Reason.LOW_LIGHT),
        (lambda p: jpeg(p, 6), Reason.COMPRESSION),
    ],
)
def test_one_fault_one_reason(face: Detection, fault: object, reason: Reason) -> None:
    quality = judged(fault(portrait()), face)  # type: ignore[operator]
    assert quality.reasons == (reason,)
    assert quality.weight < 0.5


def test_a_small_face_is_small(face: Detection) -> None:
    scale = 0.8 * LIMITS.min_face_px / quality_side(face)
    picture = cv2.resize(portrait(), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    box = tuple(scale * v for v in face.box)
    quality = measure(picture, box, None, LIMITS)  # type: ignore[arg-type]
    assert Reason.SMALL_FACE in quality.reasons
    assert quality.parts["face_px"] == pytest.approx(0.8 * LIMITS.min_face_px)


def quality_side(face: Detection) -> float:
    x0, y0, x1, y1 = face.box
    return min(x1 - x0, y1 - y0)


def test_more_of_a_fault_never_raises_the_weight(face: Detection) -> None:
    blurs = [judged(cv2.GaussianBlur(portrait(), (0, 0), s), face).weight for s in (0.5, 1.2, 1.8, 2.4, 4)]
    darks = [
        judged(cv2.convertScaleAbs(portrait(), alpha=a), face).weight for a in (1, 0.4, 0.25, 0.15, 0.05)
    ]
    for weights in (blurs, darks):
        assert weights == sorted(weights, reverse=True)
        assert weights[0] > 0.9
        assert weights[-1] < 0.1


def test_sharpness_is_of_the_face_not_of_its_size(face: Detection) -> None:
    """The same face, smaller, is not more blurred for that; enlarged again it is."""
    half = cv2.resize(portrait(), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    small = measure(half, tuple(0.5 * v for v in face.box), None, LIMITS)  # type: ignore[arg-type]
    third = cv2.resize(portrait(), None, fx=0.3, fy=0.3, interpolation=cv2.INTER_AREA)
    enlarged = cv2.resize(third, portrait().shape[1::-1], interpolation=cv2.INTER_LINEAR)
    assert small.parts["sharpness"] > LIMITS.min_sharpness
    assert judged(enlarged, face).parts["sharpness"] < 0.7 * judged(portrait(), face).parts["sharpness"]
    dim = judged(cv2.convertScaleAbs(portrait(), alpha=0.4), face).parts["sharpness"]
    assert dim == pytest.approx(judged(portrait(), face).parts["sharpness"], rel=0.1)


def test_noise_is_measured_against_the_contrast_that_it_hides(face: Detection) -> None:
    """In grey levels it is what was added, grain apart; less light makes the same noise more."""
    x0, y0, x1, y1 = face.box
    scale = 160 / (y1 - y0)
    small = cv2.resize(portrait(), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    box = (x0 * scale, y0 * scale, x1 * scale, y1 * scale)

    def ratio(picture: Image) -> float:
        return measure(picture, box, None, LIMITS).parts["noise"]

    grain = ratio(small)
    added = {sigma: (ratio(noisy(small, sigma)) ** 2 - grain**2) ** 0.5 for sigma in (8, 16)}
    assert grain < 0.06
    assert added[16] / added[8] == pytest.approx(2, rel=0.1)
    dim = cv2.convertScaleAbs(small, alpha=0.3)
    assert ratio(noisy(dim, 4.8)) == pytest.approx(ratio(noisy(small, 16)), rel=0.1)


def test_blockiness_sees_the_grid_wherever_the_face_lies(face: Detection) -> None:
    """The grid belongs to the picture; a face that starts off the grid must not hide it."""
    blocky = jpeg(portrait(), 8)
    x0, y0, x1, y1 = face.box
    measured = [
        measure(blocky, (x0 + d, y0 + d, x1 + d, y1 + d), None, LIMITS).parts["blockiness"] for d in range(8)
    ]
    assert min(measured) > LIMITS.max_blockiness
    assert judged(portrait(), face).parts["blockiness"] < 1.3


def h264(picture: Image, crf: int) -> Image:
    return coded_h264(picture, crf, np.random.default_rng(3))[0]


def test_what_h264_leaves_at_high_compression_is_seen(face: Detection) -> None:
    """The deblocking filter smooths its block edges away; that nothing changes within blocks remains."""
    small = cv2.resize(portrait(), None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA)
    x0, y0, x1, y1 = (0.75 * v for v in face.box)
    grids = {
        crf: [measure(picture, (x0 + d, y0 + d, x1 + d, y1 + d), None, LIMITS).parts["grid"] for d in (0, 3)]
        for crf, picture in ((0, small), (20, h264(small, 20)), (47, h264(small, 47)))
    }
    assert max(grids[0] + grids[20]) < LIMITS.max_grid < min(grids[47])


@pytest.mark.parametrize(("qp", "reasons"), [(None, ()), (20.0, ()), (50.0, (Reason.COMPRESSION,))])
def test_the_quantiser_only_ever_lowers_the_weight(
    face: Detection, qp: float | None, reasons: tuple[Reason, ...]
) -> None:
    plain = judged(portrait(), face)
    told = with_qp(plain, qp, LIMITS)
    assert told.weight <= plain.weight
    assert told.reasons == reasons
    assert told.parts.get("qp") == qp
    assert with_qp(told, qp, LIMITS) == told


def test_a_quantiser_says_nothing_of_a_face_that_was_not_measured() -> None:
    nothing = measure(portrait(), (5.0, 5.0, 9.0, 9.0), None, LIMITS)
    assert with_qp(nothing, 50.0, LIMITS) == nothing


def test_advice_makes_a_face_inconclusive_and_no_more(face: Detection) -> None:
    down, across = np.mgrid[: portrait().shape[0], : portrait().shape[1]]
    pattern = 1 + 0.3 * np.cos(2 * np.pi * (0.22 * down + 0.17 * across))
    screen = np.clip(portrait() * pattern[..., None], 0, 255)
    quality = judged(screen.astype(np.uint8), face)
    assert Reason.SCREEN_IN_PICTURE in quality.reasons
    assert quality.weight < 0.5
    off = dataclasses.replace(LIMITS, max_moire=0)
    assert Reason.SCREEN_IN_PICTURE not in judged(screen.astype(np.uint8), face, off).reasons


def test_what_the_data_does_not_support_is_off() -> None:
    assert QualityLimits().max_flat_colour == QualityLimits().min_skin_detail == 0


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"max_flat_colour": 0.01}, Reason.NOT_A_PERSON), ({"min_skin_detail": 0.9}, Reason.EDITED)],
)
def test_what_is_off_can_be_switched_on(face: Detection, limits: dict[str, float], reason: Reason) -> None:
    assert judged(portrait(), face, dataclasses.replace(LIMITS, **limits)).reasons == (reason,)


def test_a_face_without_landmarks_has_no_pose(face: Detection) -> None:
    parts = measure(portrait(), face.box, None, LIMITS).parts
    assert not {"yaw", "pitch", "roll"} & set(parts)


@pytest.mark.parametrize(
    "box", [(-500.0, 0.0, -300.0, 200.0), (505.0, 100.0, 800.0, 400.0), (5.0, 5.0, 9.0, 9.0)]
)
def test_a_face_of_which_nothing_is_seen_has_no_weight(box: tuple[float, float, float, float]) -> None:
    quality = measure(portrait(), box, None, LIMITS)
    assert quality.weight == 0
    assert quality.reasons == (Reason.SMALL_FACE,)


def test_limits_of_zero(face: Detection) -> None:
    """Lower limits of 0 never bite; an upper limit of 0 leaves nothing."""
    nothing = QualityLimits(min_face_px=0, min_sharpness=0, min_brightness=0)
    black = np.zeros_like(portrait())
    assert measure(black, face.box, None, nothing).reasons == ()
    strict = dataclasses.replace(LIMITS, max_yaw_deg=0)
    assert judged(portrait(), face, strict).reasons == (Reason.POSE,)


def head(yaw: float, pitch: float, roll: float, x: float, y: float, size: float) -> Landmarks:
    """Five points of an average head in millimetres, turned, seen from afar and put into a picture."""
    points = np.array([[-31.5, 0, 0], [31.5, 0, 0], [0, 36.2, 30], [-26, 67, 0], [26, 67, 0]])
    a, b, c = np.radians([yaw, pitch, roll])
    turn = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    nod = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    tilt = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    seen = (points @ turn.T @ nod.T @ tilt.T)[:, :2] * size + (x, y)
    return tuple(tuple(point) for point in seen.tolist())


@given(
    yaw=st.floats(-70, 70),
    roll=st.floats(-60, 60),
    x=st.floats(-500, 500),
    y=st.floats(-500, 500),
    size=st.floats(0.3, 10),
)
def test_yaw_and_roll_of_a_turned_head(yaw: float, roll: float, x: float, y: float, size: float) -> None:
    found = pose(head(yaw, 0, roll, x, y, size))
    assert found[0] == pytest.approx(yaw, abs=1)
    assert found[1] == pytest.approx(0, abs=1)
    assert found[2] == pytest.approx(roll, abs=1)


@given(pitch=st.floats(-50, 50))
def test_pitch_of_a_nodding_head(pitch: float) -> None:
    assert pose(head(0, pitch, 0, 0, 0, 2))[1] == pytest.approx(pitch, abs=1)


def test_a_profile_is_refused_for_its_pose(face: Detection) -> None:
    quality = measure(portrait(), face.box, head(75, 0, 0, 230, 200, 1.5), LIMITS)
    assert quality.reasons == (Reason.POSE,)


def test_eyes_in_one_point_are_a_profile() -> None:
    yaw, _, _ = pose(((5, 5), (5, 5), (9, 9), (5, 12), (5, 12)))
    assert abs(yaw) == 90


@given(
    parts=st.tuples(*[st.floats(1, 200)] * 3),
    noise=st.integers(0, 255),
)
def test_weight_and_reasons_agree(parts: tuple[float, float, float], noise: int) -> None:
    """A reason means a weight below one half and the other way round, whatever the limits."""
    picture = np.random.default_rng(noise).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    limits = QualityLimits(min_face_px=parts[0], min_sharpness=100 * parts[1], min_brightness=parts[2])
    quality = measure(picture, (5.0, 5.0, 85.0, 85.0), None, limits)
    assert 0 <= quality.weight <= 1
    assert bool(quality.reasons) == (quality.weight < 0.5)
