"""The derivation of the gate's limits, on made-up readings and on a made-up data set of one portrait."""

import csv
import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detectors.calibration import Calibration
from detectors.crops import CropKind, CropPolicy, crop
from detectors.limits import MEASURED, read_limits
from detectors.members import Member
from detectors.reference import portrait
from detectors.training import gate
from detectors.training.data import DataError
from detectors.training.gate import MILD, RUNGS, Ladder, Readings, derive, rising

FACE = (170.0, 108.0, 353.0, 331.0)
POLICY = CropPolicy(CropKind.TIGHT, size=64, side=0.81, shift=0.06)
LADDER = Ladder("min_sharpness", "sharpness", False, ("blur 1", "blur 2"))
COUNT = 400


class Green(nn.Module):
    """Says manipulated where a crop is green, the brighter the surer."""

    def forward(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        green = torch.relu(faces[:, 1] - faces[:, ::2].amax(1) - 0.3)
        return 40 * green.mean((1, 2)) - 4, green[:, ::16, ::16]


def member() -> Member:
    return Member("green", "1", POLICY, Green(), Calibration.identity(), "a" * 64, "Apache-2.0", {})


def made_up(breaks_at: float, sharpness: tuple[float, float]) -> tuple[dict[str, Readings], np.ndarray]:
    """Crops whose logits tell the classes apart above `breaks_at`, and below call all of them manipulated."""
    rng = np.random.default_rng(4)
    labels = np.arange(COUNT) % 2
    readings = {}
    spans = {"clean": sharpness, "blur 1": (0.3, 0.6), "blur 2": (0.0, 0.3)}
    for name, (low, high) in (spans | dict.fromkeys(MILD, sharpness)).items():
        values = rng.uniform(low, high, COUNT)
        logits = np.where(values > breaks_at, 4.0 * labels - 2, 3.0) + rng.normal(0, 0.3, COUNT)
        readings[name] = Readings(tuple({"sharpness": float(v)} for v in values), logits)
    return readings, labels


def test_a_limit_lies_where_the_members_break() -> None:
    readings, labels = made_up(breaks_at=0.25, sharpness=(0.6, 1.0))
    limit = derive(LADDER, readings, labels, {"others": [{"sharpness": 0.9}]}, threshold=0.0)
    assert limit.value == pytest.approx(0.25, abs=0.08)  # half a window early
    assert limit.cause == "the members' bound"


def test_a_limit_never_costs_more_clean_faces_than_it_may() -> None:
    readings, labels = made_up(breaks_at=0.5, sharpness=(0.6, 1.0))
    others = {"dim portraits": [{"sharpness": float(v)} for v in np.linspace(0.1, 1.0, 200)]}
    limit = derive(LADDER, readings, labels, others, threshold=0.0)
    lost = np.mean([parts["sharpness"] < limit.value for parts in others["dim portraits"]])
    assert limit.bound == pytest.approx(0.5, abs=0.06)
    assert limit.cause == "clean faces of dim portraits"
    assert 0 < lost <= gate.MOST_LOST


def test_where_nothing_breaks_the_limit_is_the_end_of_what_was_measured() -> None:
    readings, labels = made_up(breaks_at=-1.0, sharpness=(0.6, 1.0))
    limit = derive(LADDER, readings, labels, {"others": [{"sharpness": 0.9}]}, threshold=0.0)
    assert limit.cause == "the end of the ladder"
    assert limit.bound is None
    assert limit.value <= min(parts["sharpness"] for parts in readings["blur 2"].parts)


@pytest.mark.parametrize(
    ("values", "fitted"),
    [([1, 2, 3], [1, 2, 3]), ([3, 1, 2], [2, 2, 2]), ([1, 4, 2, 5], [1, 3, 3, 5]), ([], [])],
)
def test_the_fit_that_only_rises(values: list[float], fitted: list[float]) -> None:
    assert rising(np.array(values, np.float64)).tolist() == pytest.approx(fitted)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four people, one take and one forgery with a green patch each, and two other sources."""
    root = tmp_path_factory.mktemp("gate")
    rows, files = [], {}
    face = crop(portrait(), FACE, POLICY.at_size(224))
    for person in range(4):
        real = np.clip(face * (0.7 + 0.1 * person), 0, 255).astype(np.uint8)
        fake = real.copy()
        fake[80:190, 70:150] = (0, 200, 0)
        files |= {f"p{person}": real, f"p{person}f": fake}
        rows += [
            ("val", f"p{person}", "real", "", 150, 150, person),
            ("val", f"p{person}f", "fake", f"p{person}", 150, 150, person),
        ]
    with (root / "dfdc_faces.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "name", "label", "original", "source_width", "source_height", "identity"])
        writer.writerows(rows)
    _pack(root / "dfdc_faces_val_00.tar", files)
    for name in gate.OTHER_SOURCES:
        _pack(root / f"{name}.tar", {name: portrait()})
    return root


def _pack(path: Path, files: dict[str, np.ndarray]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, image in files.items():
            _, coded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
            entry = tarfile.TarInfo(f"{name}.jpg")
            entry.size = len(coded)
            tar.addfile(entry, io.BytesIO(coded.tobytes()))


def test_the_command_writes_limits_that_can_be_read(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "load_member", lambda name: member())
    out = tmp_path / "limits.json"
    assert gate.main(["green", "--data", str(data_dir), "--crops", "8", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert set(read_limits(out)) == MEASURED
    assert [row["rung"] for row in record["rungs"]] == list(RUNGS)
    assert record["members"] == {"green": "a" * 64}
    clean, coarse = record["rungs"][0], next(row for row in record["rungs"] if row["rung"] == "blur 3")
    assert clean["decided"] >= coarse["decided"]
    assert 0 < record["false_advice"]["SCREEN_IN_PICTURE"]["upper"] <= 1


def test_missing_data_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "load_member", lambda name: member())
    assert gate.main(["green", "--data", str(tmp_path), "--out", str(tmp_path / "limits.json")]) == 1
    assert "dfdc_faces.csv" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"lfw_faces\.tar: no such file"):
        gate.other_faces(tmp_path, "lfw_faces", 0)
