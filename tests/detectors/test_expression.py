"""Expression networks on drawn faces: everything trained by one command, resumed, shipped, read."""

import fcntl
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from detectors.expression import (
    INDEX,
    ExpressionError,
    ExpressionNetwork,
    ExpressionReader,
    Method,
    grey_face,
    load_expression,
)
from detectors.reader import NO_LANDMARKS
from detectors.readings import EXPRESSIONS, Detection, FaceReading, Quality, Reason, Visible
from detectors.training import train
from detectors.training.data import DataError
from detectors.training.expression import drive
from detectors.training.expression.drive import UnfinishedError, jobs_of, train_expression
from detectors.training.expression.ferplus import load_votes
from detectors.training.expression.loop import Lesson, fit, lesson
from detectors.training.expression.recipe import (
    SHIPPED_RECIPES,
    AllRecipe,
    NetworkRecipe,
    load_expression_recipe,
)
from detectors.training.expression.runs import run_folder, taught, trained
from detectors.training.expression.ship import MODELS, publish
from detectors.training.hardware import choose_hardware
from tests.detectors.ferplus_faces import write_faces

TINY = {"batch": 8, "sizes": [48], "epochs": 0.5, "budget_minutes": None}
RUNS = [
    "expression-teacher", "expression-lower-occlusion-trained", "expression-lower-distilled",
    "expression-lower-triplet", "expression-lower-combined", "expression-upper-distilled",
]  # fmt: skip


def tiny(folder: Path, name: str, **changes: object) -> Path:
    """A shipped recipe cut down to seconds, in `folder`."""
    recipe = yaml.safe_load((SHIPPED_RECIPES / f"{name}.yaml").read_text())
    if "sizes" in recipe:
        recipe |= TINY
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"seeds": [1]} | changes))
    return path


def go(
    recipe: Path, out: Path, data: Path, said: list[str] | None = None, **further: object
) -> dict[str, object]:
    return train_expression(
        recipe,
        out,
        data,
        threads=1,
        device="cpu",
        precision="fp32",
        on_progress=(said if said is not None else []).append,
        **further,  # type: ignore[arg-type]
    )


@pytest.fixture(autouse=True)
def _quick(one_thread: None) -> None:
    """Every test here runs small networks."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ferplus")
    write_faces(folder, "train", 33, seed=1)
    write_faces(folder, "val", 13, seed=2)
    return folder


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, trained by the one command."""
    folder = tmp_path_factory.mktemp("expression")
    recipes = folder / "recipes"
    recipes.mkdir()
    for name in RUNS:
        tiny(recipes, name)
    everything = recipes / "expression-all.yaml"
    everything.write_text(
        yaml.safe_dump({"task": "expression", "name": "expression-all", "method": "all", "runs": RUNS})
    )
    report = train(
        everything, folder, data, threads=1, device="cpu", precision="fp32", on_progress=lambda _: None
    )
    assert report["pictures"] == 12
    return folder


def test_report_and_shipped_networks(out: Path, data: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    halves = ["teacher", "occlusion_trained", "distilled", "triplet", "combined"]
    assert list(report["table"]["lower_half"]) == halves
    assert list(report["table"]["full"]) == ["teacher", "distilled"]  # both halves' students are there
    assert list(report["table"]["upper_half"]) == ["teacher", "distilled"]
    assert [row["better"] for row in report["order"]["lower_half"]] == halves[1:]
    for by_method in report["table"].values():
        for row in by_method.values():
            assert row["low"] <= row["accuracy"] <= row["high"]
            assert len(row["seeds"]) == 1
    text = (out / "report.md").read_text()
    assert "| combined less triplet | lower_half |" in text
    models = load_expression(out / MODELS)
    assert set(models.networks) == {
        (Visible.BOTH, Method.TEACHER),
        *((Visible.LOWER, m) for m in (Method.OCCLUSION_TRAINED, Method.DISTILLED, Method.TRIPLET)),
        (Visible.UPPER, Method.DISTILLED),
    }
    check = load_votes([data / "ferplus_val.csv"])
    teacher = load_expression_recipe(out / "recipes" / "expression-teacher.yaml")
    assert isinstance(teacher, NetworkRecipe)
    exact = trained(out, teacher, 1).read(check.images).logits
    shipped = models.of(Visible.BOTH, Method.TEACHER).read(check.images).logits
    np.testing.assert_allclose(shipped, exact, atol=0.05)  # fp16
    with pytest.raises(ExpressionError, match="no expression network triplet for upper"):
        models.of(Visible.UPPER, Method.TRIPLET)


def test_report_of_what_is_finished(out: Path, data: Path, tmp_path: Path) -> None:
    recipes = [
        load_expression_recipe(out / "recipes" / f"{name}.yaml")
        for name in ("expression-teacher", "expression-lower-distilled")
    ]
    networks = [recipe for recipe in recipes if isinstance(recipe, NetworkRecipe)]
    check = load_votes([data / "ferplus_val.csv"])
    with pytest.raises(
        ValueError, match="none of expression-teacher, expression-lower-distilled is finished"
    ):
        publish(tmp_path, networks, check, print)
    shutil.copytree(out / "expression-teacher", tmp_path / "expression-teacher")
    said: list[str] = []
    report = publish(tmp_path, networks, check, said.append)
    assert {view: list(found) for view, found in report["table"].items()} == {
        "full": ["teacher"],
        "lower_half": ["teacher"],
        "upper_half": ["teacher"],
    }
    assert said[0] == "expression-lower-distilled: not finished"
    assert list(load_expression(tmp_path / MODELS).networks) == [(Visible.BOTH, Method.TEACHER)]


def test_first_seeds_come_first() -> None:
    names = ("expression-lower-distilled", "expression-upper-distilled", "expression-lower-combined")
    recipes = [load_expression_recipe(SHIPPED_RECIPES / f"{name}.yaml") for name in names]
    jobs = jobs_of([recipe for recipe in recipes if not isinstance(recipe, AllRecipe)])
    assert [str(job).removeprefix("expression-") for job in jobs] == [
        "lower-distilled seed 1",
        "upper-distilled seed 1",
        "lower-combined seed 1",
        "lower-distilled seed 2",
        "lower-combined seed 2",
        "lower-distilled seed 3",
        "lower-combined seed 3",
    ]


def test_finished_runs_are_left_alone(out: Path, data: Path) -> None:
    weights = run_folder(out, "expression-teacher", 1) / "average.pt"
    before = weights.stat().st_mtime_ns
    said: list[str] = []
    go(out / "recipes" / "expression-teacher.yaml", out, data, said)
    assert said == []
    assert weights.stat().st_mtime_ns == before


def test_other_recipe_over_a_finished_run_is_refused(out: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="made by another recipe"):
        go(tiny(tmp_path, "expression-teacher", learning_rate=0.5), out, data)


def test_teacher_is_asked_once(out: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_expression_recipe(out / "recipes" / "expression-teacher.yaml")
    assert isinstance(teacher, NetworkRecipe)
    faces = load_votes([data / "ferplus_train.csv"])
    fresh = trained(out, teacher, 1).read(faces.images)
    monkeypatch.setattr("detectors.training.expression.runs.trained", None)
    kept = taught(out, teacher, torch.device("cpu"), faces)
    np.testing.assert_allclose(kept.logits, fresh.logits, atol=1e-4)
    np.testing.assert_allclose(kept.embeddings, fresh.embeddings, rtol=1e-2, atol=1e-2)


def test_student_without_teacher_is_told_what_to_do(data: Path, tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "expression-lower-distilled")
    with pytest.raises(
        UnfinishedError, match=r"needs expression-teacher seed 1.* `unmask train expression-teacher "
    ):
        go(recipe, tmp_path / "out", data)


def test_data_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ferplus_train\.csv: no such file"):
        go(tiny(tmp_path, "expression-teacher"), tmp_path / "out", tmp_path)


def test_what_another_process_trains_is_waited_for(out: Path, data: Path, tmp_path: Path) -> None:
    """The teacher's folder is locked until the second look, and finished then."""
    folder = run_folder(tmp_path, "expression-teacher", 1)
    folder.mkdir(parents=True)
    lock = (folder / drive.LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        shutil.copytree(run_folder(out, "expression-teacher", 1), folder, dirs_exist_ok=True)
        lock.close()

    said: list[str] = []
    go(tiny(tmp_path, "expression-teacher"), tmp_path, data, said, sleep=sleep)
    assert slept == [drive.POLL_S]
    assert said == ["expression-teacher seed 1: waiting for what another process works on"]


class StoppedError(Exception):
    """Stands for a kill."""


def test_interrupted_run_ends_with_the_same_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_expression_recipe(tiny(tmp_path, "expression-teacher", epochs=0.8, start="imagenet"))
    assert isinstance(recipe, NetworkRecipe)
    train_faces = load_votes([data / "ferplus_train.csv"])
    material = lesson(recipe, train_faces, load_votes([data / "ferplus_val.csv"]), None)
    assert len(material.train.images) == 33
    monkeypatch.setattr("detectors.training.pace.CHECKPOINT_S", 0.0)

    def run(folder: Path, stop_at: int | None, seed: int = 1) -> dict[str, torch.Tensor]:
        ticks = iter(range(10**6))

        def clock() -> float:
            now = next(ticks)
            if now == stop_at:
                raise StoppedError
            return float(now)

        torch.manual_seed(seed)
        network = ExpressionNetwork(recipe.backbone, recipe.dropout)
        hardware = choose_hardware("cpu", "fp32")
        fit(recipe, seed, folder, material, network, hardware, clock=clock, on_progress=lambda _: None)
        weights: dict[str, torch.Tensor] = torch.load(folder / "average.pt", weights_only=True)
        return weights

    whole = run(tmp_path / "whole", None)
    with pytest.raises(StoppedError):
        run(tmp_path / "stopped", stop_at=3)
    assert (tmp_path / "stopped" / "checkpoint.pt").exists()
    resumed = run(tmp_path / "stopped", None)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = run(tmp_path / "other", None, seed=2)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)
    record = json.loads((tmp_path / "whole" / "record.json").read_text())
    assert record["finished"]
    assert record["steps"] == 4
    assert not (tmp_path / "whole" / "checkpoint.pt").exists()


def test_majority_learns_only_from_agreed_pictures(data: Path) -> None:
    recipe = load_expression_recipe(SHIPPED_RECIPES / "expression-teacher-majority.yaml")
    assert isinstance(recipe, NetworkRecipe)
    faces = load_votes([data / "ferplus_train.csv"])
    found: Lesson = lesson(recipe, faces, faces, None)
    assert len(found.train.images) == 32
    assert (found.told.labels >= 0).all()


def test_no_networks_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ExpressionError, match=r"no expression networks in .*: this installation ships none; train"
    ):
        load_expression(tmp_path)


def test_tampered_and_broken_weights_are_refused(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(out / MODELS, folder)
    weights = folder / "upper-distilled.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ExpressionError, match=r"upper-distilled\.safetensors: SHA-256"):
        load_expression(folder)
    assert load_expression(folder, lambda visible, method: visible == Visible.LOWER).networks
    record = json.loads((folder / INDEX).read_text())
    del record["networks"][0]["backbone"]
    (folder / INDEX).write_text(json.dumps(record))
    with pytest.raises(ExpressionError, match=r"expression\.json: KeyError: 'backbone'"):
        load_expression(folder, lambda visible, method: method is Method.TEACHER)


def face(visible: Visible, *reasons: Reason) -> FaceReading:
    return FaceReading(
        detection=Detection((20.0, 10.0, 80.0, 90.0), NO_LANDMARKS, 1.0),
        quality=Quality(1.0, {}, reasons),
        logits={},
        fused=0.0,
        crop=np.zeros((2, 2, 3), np.uint8),
        attention=np.zeros((1, 1), np.float32),
        visible=visible,
    )


def test_reader_speaks_of_good_faces_only_and_by_what_is_seen(out: Path) -> None:
    models = load_expression(out / MODELS)
    picture = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    faces = [
        face(Visible.BOTH),
        face(Visible.UPPER, Reason.OCCLUSION),
        face(Visible.NEITHER, Reason.OCCLUSION),
        face(Visible.BOTH, Reason.BLUR),
        face(Visible.LOWER),
    ]
    told = ExpressionReader(models, batch=2).read([(picture, one) for one in faces])
    assert [one and one.visible for one in told] == [Visible.BOTH, Visible.UPPER, None, None, Visible.LOWER]
    for one in told:
        if one is not None:
            assert tuple(one.distribution) == EXPRESSIONS
            assert sum(one.distribution.values()) == pytest.approx(1, abs=1e-5)
    grey = grey_face(picture, faces[0])
    assert grey.shape == (48, 48)
    half = ExpressionReader(models).read([(picture, faces[1])])[0]
    covered = picture.copy()
    covered[51:] = 0  # below the middle of the crop
    same = ExpressionReader(models).read([(covered, faces[1])])[0]
    assert half is not None
    assert same is not None
    assert half.distribution == pytest.approx(same.distribution, abs=1e-5)


def test_backbones_that_cannot_be_had() -> None:
    with pytest.raises(ExpressionError, match="backbone 'nothing'"):
        ExpressionNetwork("nothing")
    with pytest.raises(ExpressionError, match="is a ResNet: expected an EfficientNet"):
        ExpressionNetwork("resnet10t")
