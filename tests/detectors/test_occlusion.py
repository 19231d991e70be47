"""The occlusion estimate: what it sees of a real face, whole and covered, and which files it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors.crops import crop
from detectors.mtcnn import MtcnnDetector
from detectors.occlusion import (
    ARRAYS,
    FEATURES,
    FILE,
    POLICY,
    Estimate,
    Hidden,
    OcclusionError,
    features_of,
    load_estimate,
    shipped_estimate,
)
from detectors.readings import Image, Visible
from detectors.reference import portrait, reference_face
from detectors.training.occluders import COVERING, cover, draw_occluder
from detectors.training.occlusion import examples, fitted, measured, rounded, with_zero, write


@pytest.fixture(scope="module")
def face() -> Image:
    """A real face, framed as at run time, at four times the size that is looked at."""
    return crop(portrait(), reference_face(MtcnnDetector(40, 0.9)), POLICY.at_size(4 * POLICY.size))


def seen(estimate: Estimate, picture: Image) -> Visible:
    from detectors.training.data import resized

    return estimate(resized(picture[None], POLICY.size)[0]).visible(0.5)


def test_a_real_face_is_seen_whole(face: Image) -> None:
    assert seen(shipped_estimate(), face) is Visible.BOTH


@pytest.mark.parametrize("leaves", COVERING)
@pytest.mark.parametrize("held_out", [False, True])
def test_a_covered_half_is_found_on_a_face_it_never_saw(face: Image, leaves: Visible, held_out: bool) -> None:
    rng = np.random.default_rng(5)
    kinds = COVERING[leaves][held_out]
    found = [
        seen(shipped_estimate(), cover(face, draw_occluder(rng, kinds[k % len(kinds)], leaves)))
        for k in range(12)
    ]
    assert found.count(leaves) >= 9


def test_what_is_above_the_limit_is_hidden() -> None:
    assert [Hidden(*pair).visible(0.5) for pair in ((0.5, 0.5), (0.6, 0.2), (0.2, 0.6), (0.6, 0.6))] == [
        Visible.BOTH, Visible.LOWER, Visible.UPPER, Visible.NEITHER,
    ]  # fmt: skip


def test_light_changes_little_of_the_features(face: Image) -> None:
    from detectors.training.data import resized

    small = resized(face[None], POLICY.size)[0]
    brighter = np.clip(small.astype(np.int16) + 20, 0, 255).astype(np.uint8)
    covered = small.copy()
    covered[POLICY.size // 2 :] = 128
    before = features_of(small)
    moved = [float(np.abs(features_of(other) - before).mean()) for other in (brighter, covered)]
    assert before.shape == (FEATURES,)
    assert moved[0] < 0.2 * moved[1]


def test_only_crops_of_its_framing_are_taken() -> None:
    with pytest.raises(OcclusionError, match=r"expected uint8 \(48, 48, 3\)"):
        features_of(np.zeros((32, 32, 3), np.uint8))


def broken(change: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(FILE.read_text())
    if change == "schema":
        record["schema"] = 9
    elif change == "missing":
        del record["numbers"]["out"]
    elif change == "shape":
        record["numbers"]["mean"] = record["numbers"]["mean"][:-1]
    else:
        record["numbers"]["out_bias"][0] = float("nan")
    return record


@pytest.mark.parametrize(
    ("change", "sentence"),
    [("schema", "schema 9, expected 1"), ("missing", "out"), ("shape", "mean"), ("nan", "finite numbers")],
)
def test_a_broken_file_is_refused(change: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "occlusion.json"
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(OcclusionError, match=sentence):
        load_estimate(path)
    with pytest.raises(OcclusionError, match=r"nowhere\.json"):
        load_estimate(tmp_path / "nowhere.json")


def test_what_was_measured_is_in_the_file() -> None:
    record = shipped_estimate().record
    for source in ("dfdc", "lfw_faces", "wide_faces"):
        for half in ("upper", "lower"):
            assert 0.5 < record["measured"][source][half]["auc"] <= 1
    assert set(record["kinds"]["trained"]).isdisjoint(record["kinds"]["held_out"])


def test_training_learns_from_a_few_faces_and_writes_what_is_read(face: Image, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    crops = np.stack([np.clip(face * s, 0, 255).astype(np.uint8) for s in rng.uniform(0.6, 1.3, 24)])
    people = np.arange(len(crops))
    train = examples(crops, people, seed=1, held_out=False)
    assert train.features.shape == (96, FEATURES)
    assert not train.hidden[~train.covered].any()
    estimate = rounded(with_zero(fitted(train, units=8, steps=80), [train], most=0.05))
    assert np.array_equal(fitted(train, units=8, steps=9).out, fitted(train, units=8, steps=9).out)
    found = measured(estimate, examples(crops, people, seed=2, held_out=True))
    assert found["upper"]["auc"] > 0.8
    assert found["lower"]["auc"] > 0.8
    assert ((estimate.margins(train.features[~train.covered]) > 0).sum(0) <= 2).all()  # of 24, 5 %
    path = tmp_path / "occlusion.json"
    write(estimate, path)
    read = load_estimate(path)
    assert all(np.array_equal(getattr(read, name), getattr(estimate, name)) for name in ARRAYS)
