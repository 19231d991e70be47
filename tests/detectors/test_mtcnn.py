"""The cascade against facenet-pytorch's own, on a real portrait and what can befall it."""

import warnings

import cv2
import numpy as np
import pytest
import torch
from facenet_pytorch import MTCNN

from detectors import mtcnn
from detectors.mtcnn import MtcnnDetector
from detectors.readings import Box, Image
from detectors.reference import portrait

SMALLEST = 40.0


@pytest.fixture(scope="module")
def detector() -> MtcnnDetector:
    return MtcnnDetector(SMALLEST, 0.9)


def variations() -> dict[str, Image]:
    face = portrait()
    small = cv2.resize(face, (256, 300), interpolation=cv2.INTER_AREA)
    beside = np.zeros((360, 640, 3), np.uint8)
    beside[30:330, 20:276] = small
    beside[30:330, 340:596] = small[:, ::-1]
    height, width = face.shape[:2]
    tilt = cv2.getRotationMatrix2D((width / 2, height / 2), 12, 1.0)
    return {
        "plain": face,
        "mirrored": np.ascontiguousarray(face[:, ::-1]),
        "half": small,
        "dark": cv2.convertScaleAbs(face, alpha=0.4),
        "bright": cv2.convertScaleAbs(face, alpha=1.3, beta=20),
        "blurred": cv2.GaussianBlur(face, (0, 0), 2.5),
        "tilted": cv2.warpAffine(face, tilt, (width, height)),
        "cut": np.ascontiguousarray(face[60:400, 180:]),
        "two": beside,
        "none": np.full((200, 300, 3), 90, np.uint8),
    }


def iou(a: Box, b: Box) -> float:
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - wide * high
    return wide * high / union


@pytest.mark.parametrize("name", variations())
def test_finds_what_facenet_pytorch_finds(detector: MtcnnDetector, name: str) -> None:
    picture = variations()[name]
    theirs = MTCNN(keep_all=True, min_face_size=SMALLEST, thresholds=[0.6, 0.7, 0.9], factor=0.709)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs builds ragged arrays
        boxes, _, points = theirs.detect(picture, landmarks=True)
    expected = [] if boxes is None else list(zip(boxes.tolist(), points.tolist(), strict=True))

    found = detector.detect([picture])[0]

    assert len(found) == len(expected) == {"two": 2, "none": 0}.get(name, 1)
    for box, landmarks in expected:
        best = max(found, key=lambda face: iou(face.box, tuple(box)))
        assert iou(best.box, tuple(box)) >= 0.8
        apart = np.linalg.norm(np.subtract(best.landmarks, landmarks), axis=1)
        assert apart.max() <= 0.08 * (box[3] - box[1])


def test_batching_changes_no_box(detector: MtcnnDetector) -> None:
    """Frames of several sizes, mixed: each must come back in its place, with the faces it has alone."""
    pictures = [*variations().values(), variations()["plain"], variations()["none"]]
    together = detector.detect(pictures)
    for picture, faces in zip(pictures, together, strict=True):
        alone = detector.detect([picture])[0]
        assert len(alone) == len(faces)
        for one, other in zip(alone, faces, strict=True):
            assert np.allclose(one.box, other.box, atol=0.01)
            assert one.confidence == pytest.approx(other.confidence, abs=1e-4)


def test_sub_batches_bound_what_the_later_stages_see(
    detector: MtcnnDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """facenet-pytorch #179: candidates of a whole batch at once run out of memory."""
    whole = detector.detect([variations()["two"]])[0]
    sizes: list[int] = []
    for stage in ("_refine", "_output"):
        net = getattr(detector, stage)

        def counted(crops: torch.Tensor, net: torch.nn.Module = net) -> object:
            sizes.append(len(crops))
            return net(crops)

        monkeypatch.setattr(detector, stage, counted)
    monkeypatch.setattr(mtcnn, "CANDIDATES", 3)
    parts = detector.detect([variations()["two"]] * 2)
    assert max(sizes) == 3
    assert len(sizes) > 4
    for faces in parts:
        assert [face.box for face in faces] == [pytest.approx(face.box, abs=0.01) for face in whole]


def test_largest_face_first_and_landmarks_where_they_belong(detector: MtcnnDetector) -> None:
    face = portrait()
    picture = np.zeros((600, 1024, 3), np.uint8)
    picture[:300, :256] = cv2.resize(face, (256, 300), interpolation=cv2.INTER_AREA)
    picture[:, 512:] = face
    large, small = detector.detect([picture])[0]
    assert large.box[0] > 512 > small.box[2]
    left_eye, right_eye, nose, left_mouth, right_mouth = large.landmarks
    assert left_eye[0] < nose[0] < right_eye[0]
    assert left_mouth[0] < right_mouth[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])


def test_scale_lowers_the_smallest_face_with_the_picture() -> None:
    """A face of 67 source pixels in a picture reduced to .4 is looked for; without the .4 it is not."""
    detector = MtcnnDetector(60, 0.9)
    reduced = cv2.resize(portrait(), None, fx=0.12, fy=0.12, interpolation=cv2.INTER_AREA)
    assert detector.detect([reduced])[0] == []
    assert len(detector.detect([reduced], [0.4])[0]) == 1


def test_smaller_than_a_window_is_no_error(detector: MtcnnDetector) -> None:
    assert detector.detect([np.zeros((8, 30, 3), np.uint8)]) == [[]]
    assert detector.detect([]) == []


def test_noise_costs_no_exception(detector: MtcnnDetector) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (3, 120, 160, 3), dtype=np.uint8)
    assert len(detector.detect(list(noise))) == 3


@pytest.mark.parametrize(
    "picture",
    [np.zeros((40, 40), np.uint8), np.zeros((40, 40, 4), np.uint8), np.zeros((40, 40, 3), np.float32)],
)
def test_refuses_what_is_no_rgb_picture(detector: MtcnnDetector, picture: Image) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \(height, width, 3\)"):
        detector.detect([picture])
