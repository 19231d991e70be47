"""Readings on disk: everything that a threshold could depend on comes back, and nothing foreign does."""

import gzip
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from detectors.readings import Detection, FaceReading, Quality, Reason
from stream.kept import Kept, Look

FACE = FaceReading(
    detection=Detection((1.5, 2.0, 30.25, 40.0), ((1.0, 2.0),) * 4 + ((math.nan, math.nan),), 0.97),
    quality=Quality(0.5, {"face_px": 28.75, "yaw": -3.0}, (Reason.BLUR, Reason.POSE)),
    logits={"a": 1.25, "b": -0.5},
    fused=0.375,
    crop=np.full((8, 8, 3), 7, np.uint8),
    attention=np.ones((2, 2), np.float32),
    shadow={"c": 9.0},
    maps={"a": np.ones((2, 2), np.float32)},
)
LOOKS = (Look(0, 640, 360, False, (FACE, FACE)), Look(500_000, 640, 360, True, ()))
PICTURES = {"crop", "attention", "maps"}


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "kept", {"models": ["a"], "fps": 2.0})


def test_what_was_read_comes_back(kept: Kept) -> None:
    kept.save("00", LOOKS)
    found = kept.load("00")
    assert found is not None
    assert [(look.media_us, look.width, look.height, look.cut, len(look.faces)) for look in found] == [
        (0, 640, 360, False, 2),
        (500_000, 640, 360, True, 0),
    ]
    face = found[0].faces[1]
    for field in fields(FaceReading):
        if field.name not in PICTURES | {"detection"}:
            assert getattr(face, field.name) == getattr(FACE, field.name), field.name
    assert face.detection.box == FACE.detection.box
    assert face.detection.landmarks[:4] == FACE.detection.landmarks[:4]
    assert all(math.isnan(value) for value in face.detection.landmarks[4])
    assert isinstance(face.quality.reasons[0], Reason)


def test_no_picture_is_kept(kept: Kept, tmp_path: Path) -> None:
    kept.save("00", LOOKS)
    (path,) = (tmp_path / "kept").iterdir()
    assert len(gzip.decompress(path.read_bytes())) < 2000
    assert found_crop(kept).size == 3


def found_crop(kept: Kept) -> np.ndarray:
    found = kept.load("00")
    assert found is not None
    return found[0].faces[0].crop


def test_other_videos_members_and_settings_have_their_own(kept: Kept, tmp_path: Path) -> None:
    kept.save("00", LOOKS)
    assert kept.load("01") is None
    assert Kept(tmp_path / "kept", {"models": ["b"], "fps": 2.0}).load("00") is None
    assert Kept(tmp_path / "kept", {"fps": 2.0, "models": ["a"]}).load("00") is not None


@pytest.mark.parametrize("damage", [b"", b"\x1f\x8b", b"no gzip at all"])
def test_what_is_damaged_is_read_anew(kept: Kept, tmp_path: Path, damage: bytes) -> None:
    kept.save("00", LOOKS)
    (path,) = (tmp_path / "kept").iterdir()
    path.write_bytes(damage)
    assert kept.load("00") is None


def test_half_a_file_is_none(kept: Kept, tmp_path: Path) -> None:
    kept.save("00", LOOKS * 500)
    (path,) = (tmp_path / "kept").iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    assert kept.load("00") is None
    assert [item.name for item in (tmp_path / "kept").iterdir()] == [path.name]
