"""Forgeries by strangers, and members made ready to ship, on one real face and made-up logits."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from detectors.crops import CropKind, CropPolicy
from detectors.ensemble import FILE, LEAST_WEIGHT, read_ensemble
from detectors.members import Member
from detectors.mtcnn import MtcnnDetector
from detectors.training import ship, strangers
from detectors.training.blends import Face
from detectors.training.data import CACHE_PX, Faces, framed
from detectors.training.faces import find_points
from detectors.training.ship import Read, Truth, calibrated, figures
from detectors.training.strangers import Autoencoder, StrangerFamily


@pytest.fixture(scope="module")
def face() -> Face:
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    cut = cv2.resize(image[40:290, 150:400], (CACHE_PX, CACHE_PX), interpolation=cv2.INTER_AREA)
    return Face(cut, find_points(cut[None], MtcnnDetector(70, 0.6))[0])


@pytest.mark.parametrize("family", list(StrangerFamily))
def test_strangers_change_the_face_and_leave_its_surroundings(face: Face, family: StrangerFamily) -> None:
    torch.manual_seed(0)
    donor = Face(np.ascontiguousarray(face.image[:, ::-1]), _mirrored(face))
    made = strangers._blend(family, face, donor, Autoencoder().eval(), np.random.default_rng(1))
    np.testing.assert_array_equal(made.fake[made.mask == 0], made.real[made.mask == 0])
    assert 0.1 < (made.mask > 0).mean() < 0.9
    assert cv2.absdiff(made.real, made.fake)[made.mask > 0.9].mean() > 1


def _mirrored(face: Face) -> NDArray[np.float32]:
    turned = face.points * np.array([-1, 1], np.float32) + np.array([CACHE_PX - 1, 0], np.float32)
    return turned[[1, 0, 2, 4, 3]]


def test_strangers_are_framed_as_a_member_wants_them() -> None:
    crops = np.zeros((1, 100, 100, 3), np.uint8)
    crops[0, 25:75, 25:75] = 255  # the middle half

    def policy(side: float) -> CropPolicy:
        return CropPolicy(CropKind.TIGHT, size=20, side=side)

    assert (framed(crops, 1.6, policy(0.8)) == 255).all()
    assert framed(crops, 1.6, policy(1.6))[0, 0, 0, 0] == 0
    np.testing.assert_array_equal(framed(crops, 1.6, policy(3.0)), framed(crops, 1.6, policy(1.6)))


# -- shipping

PEOPLE = 60


def logits(labels: NDArray[np.int64], gain: float, rng: np.random.Generator) -> NDArray[np.float32]:
    noise = rng.normal(size=len(labels))
    return (gain * (labels - 0.5) + noise).astype(np.float32)


def smooth(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """With detail, and without the noise that the gate turns away."""
    return np.asarray(cv2.normalize(cv2.GaussianBlur(image, (0, 0), 1), None, 0, 255, cv2.NORM_MINMAX))


@pytest.fixture(scope="module")
def known() -> Truth:
    labels = np.tile(np.array([0, 1], np.int64), 2 * PEOPLE)
    rng = np.random.default_rng(3)
    faces = Faces(
        images=np.array([smooth(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in labels]),
        labels=labels,
        original=np.where(labels == 1, np.arange(len(labels)) - 1, -1),
        identity=np.repeat(np.arange(PEOPLE), 4),
        source_width=np.full(len(labels), 64),
        file_bytes=np.full(len(labels), 5000),
    )
    strange = (np.repeat([0, 1], 80), np.tile(np.arange(80), 2))
    clips = {f"authentic {k}": 0 for k in range(3)} | {f"manipulated {k}": 1 for k in range(3)}
    everybody = np.arange(PEOPLE * 2) % PEOPLE
    worse = {"dark": (np.arange(PEOPLE * 2) < PEOPLE, everybody), "noise": (everybody < 5, everybody)}
    return Truth(faces, worse, {"cloned": strange, "restored": strange}, clips)


def read(known: Truth, gain: float, seed: int) -> Read:
    rng = np.random.default_rng(seed)
    return Read(
        val=logits(known.faces.labels, gain, rng),
        worse={name: logits(np.zeros(len(p), np.int64), gain, rng) for name, (_, p) in known.worse.items()},
        authentic={name: logits(np.zeros(50, np.int64), gain, rng) for name in ship.SOURCES},
        strangers={name: logits(labels, gain, rng) for name, (labels, _) in known.strangers.items()},
        clips={name: logits(np.full(12, label), gain, rng) for name, label in known.clips.items()},
    )


def test_figures_are_those_of_the_logits(known: Truth) -> None:
    good, useless = figures(read(known, 8.0, 1), known), figures(read(known, 0.0, 2), known)
    assert good["val"]["auc"] > 0.99
    assert good["clips_auc"] == 1
    assert 0.35 < useless["val"]["auc"] < 0.65
    low, high = useless["strangers"]["cloned"]["interval"]
    assert low < useless["strangers"]["cloned"]["auc"] < high


def test_a_calibration_comes_with_sets_and_an_operating_point(known: Truth) -> None:
    calibration, found = calibrated(read(known, 5.0, 4), known)
    assert calibration.sets is not None
    assert found["operating_point"]["chosen"]
    assert "score" in calibration.reference


def test_no_condition_that_the_gate_lets_pass_may_accuse(known: Truth) -> None:
    plain = read(known, 5.0, 4)
    passes, _ = known.worse["dark"]

    def threshold(dark: NDArray[np.float32]) -> float:
        calibration, found = calibrated(replace(plain, worse={**plain.worse, "dark": dark}), known)
        assert calibration.sets is not None
        assert "noise" not in found["operating_point"]["chosen"]["false_accusations"], (
            "five people tell nothing"
        )
        return calibration.sets.authentic[-2]

    usual = threshold(plain.worse["dark"])
    assert threshold(np.where(passes, plain.worse["dark"] + 4, plain.worse["dark"])) > usual + 2
    assert threshold(np.where(passes, plain.worse["dark"], 99).astype(np.float32)) == usual


def test_an_ensemble_is_made_for_its_members(known: Truth, tmp_path: Path) -> None:
    reads = {name: read(known, gain, seed) for seed, (name, gain) in enumerate({"a": 3.0, "b": 2.5}.items())}
    members = cast(
        "list[Member]",
        [
            SimpleNamespace(name=name, version="1", sha256=letter * 64)
            for name, letter in zip("ab", "cd", strict=True)
        ],
    )
    found: dict[str, Any] = ship._ensemble(members, reads, known, tmp_path)
    ensemble = read_ensemble(tmp_path / FILE)
    assert [part.sha256[0] for part in ensemble.parts] == ["c", "d"]
    assert all(part.weight >= LEAST_WEIGHT for part in ensemble.parts)
    assert found["val"]["auc"] > max(figures(one, known)["val"]["auc"] for one in reads.values())
    assert ensemble.calibration.made_for == ensemble.digest
