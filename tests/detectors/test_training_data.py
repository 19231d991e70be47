"""Pseudo-fakes, degradations and the batches made of them, on one real face."""

from itertools import islice
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest

from detectors.mtcnn import MtcnnDetector
from detectors.readings import Image
from detectors.training.augment import (
    SEVERE_SHARE,
    apply,
    apply_to_mask,
    draw,
    h264_round_trip,
    jpeg_round_trip,
)
from detectors.training.blends import Face, Family, blend, generated, matched, mixed, soft_mask, visible
from detectors.training.data import CACHE_PX, DFDC, Batch, Faces, Material, Mix, Source, pair_batches
from detectors.training.eigenfaces import Eigenfaces, aligned
from detectors.training.faces import (
    AVERAGE,
    Shape,
    affine,
    filled,
    find_points,
    nearest,
    outline,
    plausible,
    similarity,
)

SIZE = 64


def portrait(side: int = CACHE_PX) -> Image:
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    cut: Image = cv2.resize(image[40:290, 150:400], (side, side), interpolation=cv2.INTER_AREA)
    return cut


@pytest.fixture(scope="module")
def face() -> Face:
    image = portrait()
    return Face(image, find_points(image[None], MtcnnDetector(70, 0.6))[0])


@pytest.fixture(scope="module")
def others(face: Face) -> list[Face]:
    """Stand-ins for other people: the same face under other light and seen from elsewhere."""
    rng = np.random.default_rng(7)
    made = []
    for _ in range(12):
        matrix = np.array([[1, 0, 0], [0, 1, 0]]) + rng.normal(0, [[0.05, 0.05, 5], [0.05, 0.05, 5]])
        image = cv2.warpAffine(face.image, matrix, (CACHE_PX, CACHE_PX), borderMode=cv2.BORDER_REFLECT)
        tinted = cv2.convertScaleAbs(image, alpha=rng.uniform(0.6, 1.1), beta=rng.uniform(0, 20))
        points = face.points @ matrix[:, :2].T.astype(np.float32) + matrix[:, 2].astype(np.float32)
        made.append(Face(tinted, points.astype(np.float32)))
    return made


@pytest.fixture(scope="module")
def eigenfaces(others: list[Face]) -> Eigenfaces:
    return Eigenfaces.fitted(others)


# -- landmarks


def test_landmarks_lie_on_the_face(face: Face) -> None:
    assert plausible(face.points, CACHE_PX)
    left, right, nose, _, _ = face.points
    assert left[0] < nose[0] < right[0]
    assert left[1] < nose[1]


def test_a_picture_without_a_face_has_no_landmarks() -> None:
    flat = np.full((1, 96, 96, 3), 127, np.uint8)
    assert np.isnan(find_points(flat, MtcnnDetector(40, 0.6))).all()


def test_affine_and_similarity_find_the_map_they_were_given() -> None:
    angle, scale = 0.3, 40.0
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = (AVERAGE @ turn.T + [70, 50]).astype(np.float32)
    for fit in (affine, similarity):
        np.testing.assert_allclose(fit(AVERAGE, moved)[:, :2], turn, atol=1e-3)
        np.testing.assert_allclose(fit(AVERAGE, moved)[:, 2], [70, 50], atol=1e-3)
    sheared = (AVERAGE @ np.array([[30, 8], [0, 40]]) + 60).astype(np.float32)
    np.testing.assert_allclose(affine(AVERAGE, sheared)[:, :2].T, [[30, 8], [0, 40]], atol=1e-3)


def test_the_nearest_face_is_the_one_of_the_same_shape(face: Face) -> None:
    wide = face.points * np.array([1.4, 1.0], np.float32)
    turned_and_larger = face.points @ np.array([[0, 1.5], [-1.5, 0]], np.float32) + 20
    assert nearest(face.points, np.stack([wide, turned_and_larger.astype(np.float32), wide * 2])) == 1


@pytest.mark.parametrize("shape", list(Shape))
def test_outlines_hold_what_they_are_named_for(face: Face, shape: Shape) -> None:
    mask = filled(outline(face.points, shape), CACHE_PX)
    inside = [bool(mask[int(y), int(x)]) for x, y in face.points]
    held = {
        Shape.MOUTH: [False, False, False, True, True],
        Shape.EYES: [True, True, False, False, False],
    }.get(shape, [True] * 5)
    assert inside == held


def test_faces_are_aligned_upright(face: Face) -> None:
    small, matrix = aligned(face)
    moved = face.points @ matrix[:, :2].T + matrix[:, 2]
    assert small.shape[0] == small.shape[1]
    assert abs(moved[0, 1] - moved[1, 1]) < 0.1 * abs(moved[1, 0] - moved[0, 0])


# -- blends (SCIENCE C, checks)


@pytest.mark.parametrize("family", list(Family))
def test_a_blend_equals_its_target_outside_of_the_mask(
    face: Face, others: list[Face], eigenfaces: Eigenfaces, family: Family
) -> None:
    for seed in range(8):
        made = blend(family, face, others[seed], eigenfaces, np.random.default_rng(seed))
        np.testing.assert_array_equal(made.fake[made.mask == 0], made.real[made.mask == 0])
        assert visible(made)
        assert made.fake.dtype == np.uint8


def test_the_same_seed_makes_the_same_blend(face: Face, others: list[Face], eigenfaces: Eigenfaces) -> None:
    for family in Family:
        one, two = (blend(family, face, others[0], eigenfaces, np.random.default_rng(5)) for _ in range(2))
        np.testing.assert_array_equal(one.fake, two.fake)


def test_ratio_zero_gives_the_identical_picture(face: Face, others: list[Face]) -> None:
    nothing = np.zeros((CACHE_PX, CACHE_PX), np.float32)
    np.testing.assert_array_equal(mixed(face.image, others[0].image, nothing).fake, face.image)


def test_ratio_one_gives_the_source(face: Face, others: list[Face]) -> None:
    everything = np.ones((CACHE_PX, CACHE_PX), np.float32)
    np.testing.assert_array_equal(mixed(face.image, others[0].image, everything).fake, others[0].image)


def test_a_pair_that_does_not_differ_is_not_a_pair(face: Face) -> None:
    mask = soft_mask(face, Shape.FACE, np.random.default_rng(1), feather=0.3)
    assert not visible(mixed(face.image, face.image, mask))
    assert not visible(mixed(face.image, 255 - face.image, mask * 0))


def test_colours_are_matched_under_the_mask(face: Face) -> None:
    mask = filled(outline(face.points, Shape.FACE), CACHE_PX)
    blue = np.clip(face.image * np.array([0.5, 0.6, 1.0]), 0, 255).astype(np.uint8)
    back = matched(blue, face.image, mask)
    inside = mask > 0
    before = abs(blue[inside].mean(0) - face.image[inside].mean(0)).max()
    after = abs(back[inside].mean(0) - face.image[inside].mean(0)).max()
    assert after < 4 < before


def test_a_generator_loses_detail(face: Face) -> None:
    def detail(image: Image) -> float:
        return float(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var())

    made = [detail(generated(face, np.random.default_rng(seed))) for seed in range(10)]
    assert np.median(made) < 0.7 * detail(face.image)


def test_eigenfaces_rebuild_the_face_and_leave_the_rest(face: Face, others: list[Face]) -> None:
    known = Eigenfaces.fitted([*others, face])
    rebuilt = known.rebuilt(face, np.random.default_rng(0))
    changed = cv2.absdiff(rebuilt, face.image).max(2)
    assert changed[0, 0] == 0
    middle = slice(CACHE_PX // 2 - 20, CACHE_PX // 2 + 20)
    assert 0 < changed[middle, middle].mean() < 12


# -- degradations


def test_a_degradation_treats_both_of_a_pair_alike() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        degradation = draw(rng, CACHE_PX, SIZE)
        first, second = apply(portrait(), degradation), apply(portrait(), degradation)
        np.testing.assert_array_equal(first, second)
        assert first.shape == (SIZE, SIZE, 3)


def test_severe_degradations_stay_rare() -> None:
    rng = np.random.default_rng(5)
    blurred = np.mean([draw(rng, CACHE_PX, SIZE).sigma > 0.8 for _ in range(2000)])
    assert SEVERE_SHARE <= 0.3
    assert 0.02 < blurred < SEVERE_SHARE


def test_where_a_codec_is_asked_for_there_is_one() -> None:
    rng = np.random.default_rng(6)
    drawn = [draw(rng, CACHE_PX, SIZE, coded=True) for _ in range(500)]
    assert all((d.jpeg > 0) != (d.crf > 0) for d in drawn)
    free = [draw(rng, CACHE_PX, SIZE) for _ in range(500)]
    assert any(d.jpeg == d.crf == 0 for d in free)


def test_no_detail_is_left_beyond_what_the_source_had() -> None:
    rng = np.random.default_rng(8)
    assert all(draw(rng, CACHE_PX, SIZE, native=0.5).work <= CACHE_PX // 2 for _ in range(100))


def test_masks_move_with_their_crops() -> None:
    spot = np.zeros((CACHE_PX, CACHE_PX, 3), np.uint8)
    spot[60:120, 90:150] = 255
    rng = np.random.default_rng(9)
    for _ in range(20):
        degradation = draw(rng, CACHE_PX, SIZE, view=0.8)
        seen = apply_to_mask(spot[..., 0].astype(np.float32) / 255, degradation) > 0.5
        image = apply(spot, degradation).mean(2)
        if degradation.patch is None:
            assert image[seen].mean() > 3 * image[~seen].mean()


@pytest.mark.parametrize("side", [63, 100])
def test_h264_gives_back_a_worse_picture_of_the_same_size(side: int) -> None:
    picture = portrait(side)
    errors = [
        float(cv2.absdiff(picture, h264_round_trip(picture, crf, seed=1)).mean()) for crf in (20, 30, 40)
    ]
    assert h264_round_trip(picture, 30, seed=1).shape == picture.shape
    assert 0 < errors[0] < errors[1] < errors[2] < 30


def test_jpeg_loses_more_at_lower_quality() -> None:
    picture = portrait(100)
    errors = [float(cv2.absdiff(picture, jpeg_round_trip(picture, quality)).mean()) for quality in (95, 30)]
    assert 0 < errors[0] < errors[1]


# -- batches


@pytest.fixture(scope="module")
def material(face: Face, others: list[Face], eigenfaces: Eigenfaces) -> Material:
    images = np.stack([other.image for other in others])
    points = np.stack([other.points for other in others])
    index = np.arange(12)
    faces = Faces(
        images=images,
        labels=index % 2,
        original=np.where(index % 2 == 1, index - 1, -1),
        identity=index // 2,
        source_width=np.full(12, 150),
        file_bytes=np.full(12, 5000),
    )
    source = Source(images, points, 1.45, np.ones(12, np.float32))
    return Material(faces, {DFDC: source}, eigenfaces)


MIX = Mix(dfdc=2, families={Family.SELF: 1, Family.SWAP: 1}, shares={DFDC: 1.0}, views=(0.8, 1.2))


def batches(material: Material, *, step: int, count: int) -> list[Batch]:
    return list(islice(pair_batches(material, MIX, seed=3, size=SIZE, step=step), count))


def test_batches_depend_on_seed_and_step_alone(material: Material) -> None:
    first = batches(material, step=0, count=5)
    again = batches(material, step=4, count=1)[0]
    np.testing.assert_array_equal(first[4].images, again.images)
    np.testing.assert_array_equal(first[4].masks, again.masks)
    assert not np.array_equal(first[0].images, first[1].images)


def test_a_batch_is_its_authentic_half_and_their_partners(material: Material) -> None:
    batch = batches(material, step=0, count=1)[0]
    np.testing.assert_array_equal(batch.labels, [0, 0, 0, 0, 1, 1, 1, 1])
    assert batch.images.shape == (8, SIZE, SIZE, 3)
    assert batch.masks.shape == (8, SIZE // 16, SIZE // 16)
    assert (batch.masks[:4] == 0).all()
    assert np.isnan(batch.masks[4:6]).all()
    assert (batch.masks[6:] >= 0).all()
    assert (batch.masks[6:].max((1, 2)) > 0).all()


def test_a_batch_differs_where_its_mask_says_so(material: Material) -> None:
    for batch in batches(material, step=0, count=6):
        for real, fake, mask in zip(batch.images[2:4], batch.images[6:], batch.masks[6:], strict=True):
            change = cv2.resize(cv2.absdiff(real, fake).mean(2), mask.shape, interpolation=cv2.INTER_AREA)
            if mask.min() == 0 and mask.max() > 0.5:
                assert change[mask > 0.5].mean() > change[mask == 0].mean()


def test_pairs_are_an_original_and_its_own_fake(material: Material) -> None:
    faces = material.faces
    for real, fake in faces.pairs():
        assert (faces.labels[real], faces.labels[fake]) == (0, 1)
        assert faces.identity[real] == faces.identity[fake]
