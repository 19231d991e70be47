"""The reader of faces: right faces to right frames, right crops to right members, batched or not."""

import math
from collections.abc import Mapping
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detectors.calibration import Calibration
from detectors.crops import CropKind, CropPolicy, crop, to_tensor
from detectors.members import Member
from detectors.mtcnn import MtcnnDetector
from detectors.occlusion import Hidden
from detectors.quality import QualityLimits, measure
from detectors.reader import FaceReader, Role, Runner
from detectors.readings import Image, Reason, Visible
from detectors.reference import portrait, reference_crops, reference_face
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

    def __init__(self, shift: float = 0.0) -> None:
        self._engine = EagerEngine(Brightness(), "fp32", 1)
        self._shift = shift
        self.batches: list[int] = []
        self.inputs: list[Tensor] = []

    def __call__(self, faces: Tensor) -> tuple[np.ndarray, np.ndarray]:
        self.batches.append(len(faces))
        self.inputs.append(faces)
        logits, attention = self._engine(faces)
        return logits + self._shift, attention


class Failing:
    """An engine that fails at its n-th call, from 1."""

    name = "failing"
    precision = "fp32"

    def __init__(self, at: int) -> None:
        self._at = at
        self.calls = 0

    def __call__(self, faces: Tensor) -> tuple[np.ndarray, np.ndarray]:
        self.calls += 1
        if self.calls == self._at:
            raise RuntimeError("out of memory")
        return np.full(len(faces), 9.0, np.float32), np.zeros((len(faces), 2, 2), np.float32)


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
    runners = [Runner(one, engine or Counting()) for one in members]  # type: ignore[arg-type]
    return made_of(detector, runners, max_faces, batch, deterministic)


def made_of(
    detector: MtcnnDetector,
    runners: list[Runner],
    max_faces: int = 8,
    batch: int = 4,
    deterministic: bool = False,
) -> FaceReader:
    return FaceReader(detector, runners, mean, QualityLimits(), max_faces, batch, deterministic)


def mean(logits: Mapping[str, float]) -> float:
    return sum(logits.values()) / len(logits)


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


def test_each_member_gets_its_own_framing_and_all_are_fused(detector: MtcnnDetector) -> None:
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


def test_maps_are_kept_of_the_members_that_saw_the_same_square(detector: MtcnnDetector) -> None:
    large = TIGHT.at_size(96)
    members = (member("tight", TIGHT), member("large", large), member("wide", WIDE))
    (face,) = reader(detector, members).read([frame(1)])[0]
    assert list(face.maps) == ["tight", "large"]
    assert np.array_equal(face.maps["tight"], face.attention)
    expected = Brightness()(to_tensor(crop(frame(1)[0], face.detection.box, large)[None], large))[1]
    assert np.allclose(face.maps["large"], expected[0].numpy(), atol=1e-5)


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


def test_members_of_one_policy_share_their_input(detector: MtcnnDetector) -> None:
    engines = [Counting(), Counting(), Counting()]
    policies = (TIGHT, WIDE, TIGHT)
    made_of(
        detector,
        [
            Runner(member(name, policy), engine)  # type: ignore[arg-type]
            for name, policy, engine in zip("abc", policies, engines, strict=True)
        ],
    ).read([frame(1)])
    assert engines[0].inputs[0] is engines[2].inputs[0]
    assert engines[0].inputs[0].shape != engines[1].inputs[0].shape


def runners(*told: tuple[str, CropPolicy, object, Role]) -> list[Runner]:
    return [Runner(member(name, policy), engine, role) for name, policy, engine, role in told]  # type: ignore[arg-type]


def test_a_shadow_is_recorded_and_has_no_say(detector: MtcnnDetector) -> None:
    pictures = [frame(2), frame(1)]
    voters = runners(("a", TIGHT, Counting(), Role.VOTER))
    shadow = runners(("s", WIDE, Counting(3.0), Role.SHADOW))
    alone = made_of(detector, voters).read(pictures)
    watched = made_of(detector, voters + shadow)
    beside = watched.read(pictures)
    for mine, theirs in zip(sum(alone, ()), sum(beside, ()), strict=True):
        assert (mine.logits, mine.fused, mine.shadow) == (theirs.logits, theirs.fused, {})
        assert np.array_equal(mine.crop, theirs.crop)
        assert theirs.shadow["s"] > 1
    assert watched.engine == "counting"
    assert [(used.name, used.role, used.faces, used.off) for used in watched.usage()] == [
        ("a", Role.VOTER, 3, False),
        ("s", Role.SHADOW, 3, False),
    ]


@pytest.mark.parametrize("shift", [None, math.nan, math.inf])
def test_a_shadow_that_fails_costs_nothing_and_is_switched_off(
    detector: MtcnnDetector, shift: float | None
) -> None:
    engine = Failing(at=1) if shift is None else Counting(shift)
    told = runners(("a", TIGHT, Counting(), Role.VOTER), ("s", WIDE, engine, Role.SHADOW))
    made = made_of(detector, told, batch=2)
    found = made.read([frame(3)])[0]
    assert len(found) == 3
    assert [face.shadow for face in found] == [{}, {}, {}]
    made.read([frame(1)])
    assert (engine.calls if isinstance(engine, Failing) else len(engine.batches)) == 1
    assert [used.off for used in made.usage()] == [False, True]


def test_heavy_members_read_only_when_asked_and_only_good_faces(detector: MtcnnDetector) -> None:
    heavy = Counting(8.0)
    made = made_of(
        detector, runners(("a", TIGHT, Counting(), Role.VOTER), ("h", WIDE, heavy, Role.HEAVY)), batch=1
    )
    image, small = frame(3)
    cheap = made.read([(image, small)])[0]
    assert heavy.batches == []
    bad = replace(cheap[1], quality=replace(cheap[1].quality, reasons=(Reason.BLUR,)))
    deeper = made.deepen(image, (cheap[0], bad, cheap[2]))
    assert heavy.batches == [1, 1]
    assert deeper[1] is bad
    for before, after in ((cheap[0], deeper[0]), (cheap[2], deeper[2])):
        expected, _ = Brightness()(to_tensor(crop(image, before.detection.box, WIDE)[None], WIDE))
        assert after.logits == before.logits | {"h": pytest.approx(float(expected[0]) + 8, abs=1e-5)}
        assert after.fused == mean(after.logits)
        assert (after.detection, after.quality) == (before.detection, before.quality)
    assert made.has_heavy
    assert not reader(detector).has_heavy


def half_member(name: str, half: Visible) -> Member:
    return replace(member(name, TIGHT), record={"architecture": {"half": half.value}})


def answering(reader: FaceReader, *answers: Hidden) -> FaceReader:
    """The same reader whose estimate says this of the faces, in turn."""
    told = iter(answers)
    reader._estimate = lambda _: next(told)  # type: ignore[assignment]
    return reader


WHOLE, MASKED, BLINDED, GONE = Hidden(0.1, 0.2), Hidden(0.1, 0.9), Hidden(0.8, 0.3), Hidden(0.9, 0.7)


def test_a_covered_face_is_read_by_the_member_for_its_visible_half(detector: MtcnnDetector) -> None:
    voters = [Runner(member("voter", TIGHT), Counting(1.0))]  # type: ignore[arg-type]
    upper = Counting(7.0)
    halves = [Runner(half_member("upper", Visible.UPPER), upper, Role.HALF)]  # type: ignore[arg-type]
    pictures = [frame(2), frame(2)]
    plain = made_of(detector, voters).read(pictures)
    made = answering(made_of(detector, voters + halves), WHOLE, MASKED, BLINDED, GONE)
    (first, masked), (blinded, gone) = made.read(pictures)
    assert upper.batches == [1]
    assert "covered" not in first.quality.parts
    assert (first.fused, first.logits, first.quality, first.visible, first.half) == (
        plain[0][0].fused, plain[0][0].logits, plain[0][0].quality, Visible.BOTH, ""
    )  # fmt: skip
    assert (masked.visible, masked.half) == (Visible.UPPER, "upper")
    assert masked.fused == masked.logits["upper"] == pytest.approx(masked.logits["voter"] + 6)
    assert masked.logits["voter"] == plain[0][1].logits["voter"]
    assert masked.quality.parts["covered"] == 0.1
    assert masked.quality.reasons == plain[0][1].quality.reasons
    assert set(masked.maps) == {"upper"}
    for face, before, visible in (
        (blinded, plain[1][0], Visible.LOWER),
        (gone, plain[1][1], Visible.NEITHER),
    ):
        assert (face.visible, face.half, face.fused) == (visible, "", before.fused)
        assert set(face.quality.reasons) == {Reason.OCCLUSION, *before.quality.reasons}
        assert face.logits == before.logits
    assert [(used.name, used.faces) for used in made.usage()] == [("voter", 4), ("upper", 1)]


def test_without_a_half_member_a_covered_face_is_not_decided(detector: MtcnnDetector) -> None:
    made = answering(reader(detector), WHOLE, MASKED)
    (whole,), (masked,) = made.read([frame(1), frame(1)])
    assert masked.fused == whole.fused
    assert masked.quality.reasons == (Reason.OCCLUSION, *whole.quality.reasons)
    assert masked.quality.parts["covered"] == 0.9
    assert masked.quality.weight < whole.quality.weight


def test_a_limit_of_0_asks_nobody(detector: MtcnnDetector) -> None:
    runners = [Runner(member("voter", TIGHT), Counting())]  # type: ignore[arg-type]
    picture = frame(1)
    picture[0][200:] = 90  # everything below the eyes
    off = FaceReader(detector, runners, mean, QualityLimits(max_covered=0), 8, 4, False)
    for face in off.read_crops([picture[0][:, :600]]):
        assert face.visible is Visible.BOTH
        assert Reason.OCCLUSION not in face.quality.reasons


def test_heavy_members_leave_half_read_faces_alone(detector: MtcnnDetector) -> None:
    runners = [
        Runner(member("voter", TIGHT), Counting()),  # type: ignore[arg-type]
        Runner(member("heavy", WIDE), Counting(), Role.HEAVY),  # type: ignore[arg-type]
        Runner(half_member("upper", Visible.UPPER), Counting(3.0), Role.HALF),  # type: ignore[arg-type]
    ]
    made = answering(made_of(detector, runners), MASKED, WHOLE)
    picture = frame(2)
    (faces,) = made.read([picture])
    masked, whole = made.deepen(picture[0], faces)
    assert masked.logits == faces[0].logits
    assert masked.fused == faces[0].fused
    assert "heavy" in whole.logits


def test_half_members_read_one_half_each(detector: MtcnnDetector) -> None:
    voter = Runner(member("voter", TIGHT), Counting())  # type: ignore[arg-type]
    upper = half_member("upper", Visible.UPPER)
    for members, sentence in (
        ((member("whole", TIGHT),), "whole reads whole faces"),
        ((upper, replace(upper, name="again")), "upper and again both read the upper half"),
    ):
        halves = [Runner(one, Counting(), Role.HALF) for one in members]  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=sentence):
            made_of(detector, [voter, *halves])


def test_a_heavy_member_that_fails_says_so(detector: MtcnnDetector) -> None:
    image, small = frame(1)
    for engine, said in ((Failing(at=1), "out of memory"), (Counting(math.nan), "heavy member h gives")):
        told = runners(("a", TIGHT, Counting(), Role.VOTER), ("h", WIDE, engine, Role.HEAVY))
        made = made_of(detector, told)
        faces = made.read([(image, small)])[0]
        with pytest.raises((RuntimeError, ValueError), match=said):
            made.deepen(image, faces)


def test_refuses_to_be_made_of_nothing(detector: MtcnnDetector) -> None:
    with pytest.raises(ValueError, match="no members"):
        reader(detector, ())
    with pytest.raises(ValueError, match="no members"):
        made_of(detector, [Runner(member("b", TIGHT), Counting(), Role.SHADOW)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="member b is there twice"):
        reader(detector, (member("b", TIGHT), member("b", WIDE)))


def test_reference_crops_are_faces_and_differ(detector: MtcnnDetector) -> None:
    crops = reference_crops(reference_face(detector), TIGHT)
    assert crops.shape == (12, 3, 48, 48)
    assert crops.dtype == torch.float32
    assert torch.pdist(crops.flatten(1)).min() > 1
