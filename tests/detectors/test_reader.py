"""The reader of faces: right faces to right frames, right crops to right members, batched or not."""

import math

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detectors.calibration import Calibration
from detectors.crops import CropKind, CropPolicy, crop, to_tensor
from detectors.members import Member
from detectors.mtcnn import MtcnnDetector
from detectors.quality import QualityLimits, measure
from detectors.reader import FaceReader
from detectors.readings import Image, Reason
from detectors.reference import portrait, reference_crops
from engines.eager import EagerEngine

TIGHT = CropPolicy(CropKind.TIGHT, 48, 1.0)
WIDE = CropPolicy(CropKind.MARGIN_SQUARE, 64, 0.2, top=0.4)


class Brightness(nn.Module):
    """Its logit is the mean of its input, its map where it is red: both can be told from outside."""

    def forward(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        return faces.mean(dim=(1, 2, 3)), torch.sigmoid(nn.functional.avg_pool2d(faces[:, 0], 8))


class Counting:
    """An engine that notes the batches it is given."""

    name = "counting"
    precision = "fp32"

    def __init__(self) -> None:
        self._engine = EagerEngine(Brightness(), "fp32", 1)
        self.batches: list[int] = []

    def __call__(self, faces: Tensor) -> tuple[np.ndarray, np.ndarray]:
        self.batches.append(len(faces))
        return self._engine(faces)


def member(name: str, policy: CropPolicy) -> Member:
    return Member(name, "1", policy, Brightness(), Calibration.identity(), "0" * 64, "Apache-2.0", {})


@pytest.fixture(scope="module")
def detector() -> MtcnnDetector:
    return MtcnnDetector(40, 0.9)


def reader(
    detector: MtcnnDetector,
    members: tuple[Member, ...] = (member("tight", TIGHT),),
    engine: Counting | None = None,
    max_faces: int = 8,
    batch: int = 4,
    deterministic: bool = False,
) -> FaceReader:
    engines = {one.name: engine or Counting() for one in members}
    return FaceReader(detector, members, engines, QualityLimits(), max_faces, batch, deterministic)  # type: ignore[arg-type]


def frame(faces: int, alpha: float = 1.0) -> tuple[Image, Image]:
    """A 1280x720 picture with so many portraits side by side, and its reduction to 640x360."""
    image = np.full((720, 1280, 3), 60, np.uint8)
    face = cv2.convertScaleAbs(cv2.resize(portrait(), (400, 469), interpolation=cv2.INTER_AREA), alpha=alpha)
    for k in range(faces):
        small = cv2.resize(face, None, fx=1 - 0.1 * k, fy=1 - 0.1 * k, interpolation=cv2.INTER_AREA)
        image[100 : 100 + small.shape[0], 20 + 420 * k : 20 + 420 * k + small.shape[1]] = small
    return image, cv2.resize(image, (640, 360), interpolation=cv2.INTER_AREA)


def test_faces_come_back_with_their_frames(detector: MtcnnDetector) -> None:
    frames = [frame(2), frame(0), frame(1), frame(3)]
    found = reader(detector).read(frames)
    assert [len(faces) for faces in found] == [2, 0, 1, 3]
    for (image, _), faces in zip(frames, found, strict=True):
        for face in faces:
            box = face.detection.box
            assert np.array_equal(face.crop, crop(image, box, TIGHT))
            assert face.quality == measure(image, box, face.detection.landmarks, QualityLimits())
            expected, attention = Brightness()(to_tensor(face.crop[None], TIGHT))
            assert face.logits == {"tight": pytest.approx(float(expected[0]), abs=1e-5)}
            assert np.allclose(face.attention, attention[0].numpy(), atol=1e-5)


def test_boxes_are_of_the_full_picture(detector: MtcnnDetector) -> None:
    image, small = frame(1)
    full = detector.detect([image])[0][0]
    (face,) = reader(detector).read([(image, small)])[0]
    for a, b in zip(face.detection.box, full.box, strict=True):
        assert a == pytest.approx(b, abs=20)
    left, top, right, bottom = face.detection.box
    assert all(left < x < right and top < y < bottom for x, y in face.detection.landmarks)


def test_each_member_gets_its_own_framing_and_fused_is_the_mean_of_logits(detector: MtcnnDetector) -> None:
    members = (member("wide", WIDE), member("tight", TIGHT), member("tight2", TIGHT))
    image, small = frame(2)
    for face in reader(detector, members).read([(image, small)])[0]:
        box = face.detection.box
        for name, policy in (("wide", WIDE), ("tight", TIGHT), ("tight2", TIGHT)):
            expected, _ = Brightness()(to_tensor(crop(image, box, policy)[None], policy))
            assert face.logits[name] == pytest.approx(float(expected[0]), abs=1e-5)
        assert face.logits["wide"] != face.logits["tight"]
        assert face.fused == pytest.approx(sum(face.logits.values()) / 3)
        assert face.crop.shape == (64, 64, 3)
        assert face.attention.shape == (8, 8)


def test_crops_of_all_frames_share_batches_of_bounded_size(detector: MtcnnDetector) -> None:
    engine = Counting()
    reader(detector, engine=engine, batch=4).read([frame(3), frame(0), frame(3)])
    assert engine.batches == [4, 2]


def test_largest_faces_first_and_the_rest_counted(detector: MtcnnDetector) -> None:
    small_crowd = reader(detector, max_faces=2)
    (faces,) = small_crowd.read([frame(3)])
    assert len(faces) == 2
    areas = [(f.detection.box[2] - f.detection.box[0]) ** 2 for f in faces]
    assert areas == sorted(areas, reverse=True)
    assert small_crowd.faces_cut_off == 1
    small_crowd.read([frame(3), frame(1)])
    assert small_crowd.faces_cut_off == 2


def test_deterministic_readings_do_not_depend_on_the_company(detector: MtcnnDetector) -> None:
    engine = Counting()
    alone = reader(detector, deterministic=True).read([frame(2)])[0]
    company = [frame(1), frame(2), frame(3, alpha=0.5)]
    together = reader(detector, engine=engine, deterministic=True).read(company)[1]
    assert set(engine.batches) == {1}
    for a, b in zip(alone, together, strict=True):
        assert a.detection == b.detection
        assert a.logits == b.logits
        assert np.array_equal(a.attention, b.attention)


def test_readings_survive_the_frame(detector: MtcnnDetector) -> None:
    """Frames live in shared memory that is reused as soon as they are read."""
    image, small = frame(1)
    (face,) = reader(detector).read([(image, small)])[0]
    kept = face.crop.copy(), face.attention.copy()
    image[:] = 0
    small[:] = 0
    assert np.array_equal(face.crop, kept[0])
    assert np.array_equal(face.attention, kept[1])


def test_nothing_to_read(detector: MtcnnDetector) -> None:
    engine = Counting()
    assert reader(detector, engine=engine).read([]) == []
    assert reader(detector, engine=engine).read([frame(0)]) == [()]
    assert reader(detector, engine=engine).read_crops([]) == []
    assert engine.batches == []


def test_ready_crops_of_any_size_and_shape(detector: MtcnnDetector) -> None:
    square = np.ascontiguousarray(portrait()[100:324, 150:374])
    small = cv2.resize(square, (100, 100), interpolation=cv2.INTER_AREA)
    tall = np.ascontiguousarray(portrait()[60:380, 150:374])
    engine = Counting()
    found = reader(detector, engine=engine, batch=2).read_crops([square, small, tall])
    assert engine.batches == [2, 1]
    for face, (width, height) in zip(found, [(224, 224), (100, 100), (224, 320)], strict=True):
        assert face.detection.box == (0, 0, width, height)
        assert face.detection.confidence == 1
        assert all(math.isnan(x) and math.isnan(y) for x, y in face.detection.landmarks)
        assert "yaw" not in face.quality.parts
        assert face.crop.shape == (48, 48, 3)
        assert face.quality.reasons == ()
    assert np.abs(found[0].crop.astype(int) - found[1].crop).mean() < 6
    middle = cv2.resize(tall[48:272], (48, 48), interpolation=cv2.INTER_AREA)
    assert np.array_equal(found[2].crop, middle)


def test_a_loose_crop_is_cut_as_the_member_wants_it(detector: MtcnnDetector) -> None:
    loose = np.ascontiguousarray(portrait()[0:460, 30:490])
    (face,) = reader(detector).read_crops([loose])
    x0, y0, x1, y1 = face.detection.box
    assert 0 < x0 < x1 < 460
    assert 0 < y0 < y1 < 460
    assert np.array_equal(face.crop, crop(loose, face.detection.box, TIGHT))


def test_ready_crops_are_judged_too(detector: MtcnnDetector) -> None:
    dark = cv2.convertScaleAbs(np.ascontiguousarray(portrait()[100:324, 150:374]), alpha=0.1)
    tiny = cv2.resize(dark, (30, 30), interpolation=cv2.INTER_AREA)
    first, second = reader(detector).read_crops([dark, tiny])
    assert Reason.LOW_LIGHT in first.quality.reasons
    assert Reason.SMALL_FACE in second.quality.reasons


def test_says_which_engine_runs(detector: MtcnnDetector) -> None:
    made = reader(detector, (member("a", TIGHT), member("b", WIDE)))
    assert (made.engine, made.precision) == ("counting", "fp32")


def test_refuses_to_be_made_of_nothing(detector: MtcnnDetector) -> None:
    with pytest.raises(ValueError, match="no members"):
        reader(detector, ())
    with pytest.raises(ValueError, match="member b has no engine; there are: a"):
        FaceReader(
            detector, [member("b", TIGHT)], {"a": Counting()}, QualityLimits(), 8, 4, False  # type: ignore[dict-item]
        )  # fmt: skip


def test_reference_crops_are_faces_and_differ(detector: MtcnnDetector) -> None:
    crops = reference_crops(detector, TIGHT)
    assert crops.shape == (12, 3, 48, 48)
    assert crops.dtype == torch.float32
    assert torch.pdist(crops.flatten(1)).min() > 1
