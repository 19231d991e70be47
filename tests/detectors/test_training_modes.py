"""Every mode of training on made-up faces: it learns, and a kill changes nothing, to the bit."""

import csv
import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from detectors.backbones import Architecture, FaceNetwork
from detectors.readings import Image
from detectors.training import loop
from detectors.training.average import AverageError, average_of
from detectors.training.data import DataError
from detectors.training.hardware import DTYPES, Hardware, HardwareError, Precision, choose_hardware
from detectors.training.loop import fit
from detectors.training.objective import Objective
from detectors.training.prefetch import AHEAD, prefetched
from detectors.training.recipe import RecipeError, load_recipe
from detectors.training.start import StartError, begin

SIZE = 64
COLUMNS = ["split", "shard", "name", "label", "original", "source_width", "source_height", "identity"]
PEOPLE = {"train": range(12), "val": range(20, 26)}

COMMON: dict[str, Any] = {
    "name": "made-up",
    "version": "1",
    "backbone": "tf_efficientnet_lite0",
    "attention_block": 4,
    "dropout": 0.2,
    "mirrored": False,
    "crop": {"kind": "tight", "size": SIZE, "side": 0.81, "shift": 0.06},
    "seed": 3,
    "start": "start.pt",
    "pairs": {"dfdc": 3},
    "sources": {},
    "views": [1.0, 1.0],
    "min_width": 0,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
}
ONE_CYCLE = {
    "epochs": 1.5,
    "budget_minutes": None,
    "warmup": 0.1,
    "ema_decay": 0.5,
    "early_epoch": 1,
    "early_share": 0.0,
}
PLATEAU = {"schedule": "plateau", "iterations": 6, "validate_every": 2, "optimizer": "adam"}
PAIRS = {"label_smoothing": 0.05, "pair_weight": 0.2, "mask_weight": 0.0}

MODES: dict[str, dict[str, Any]] = {
    "pairs": ONE_CYCLE | PAIRS,
    "pairs, SAM, mask head": ONE_CYCLE | PAIRS | {"mask_weight": 0.5, "sam_rho": 0.05, "optimizer": "sgd"},
    "distilled": ONE_CYCLE
    | PAIRS
    | {"teachers": ["teacher"], "distil_temperature": 2.0, "distil_weight": 0.7},
    "half": ONE_CYCLE
    | {"mode": "half", "half": "upper", "label_smoothing": 0.05, "pair_weight": 0.2}
    | {"teachers": ["teacher"], "distil_temperature": 4.0, "distil_weight": 0.7}
    | {"bridge_weight": 1.0, "margin": 0.2},
    "binary": PLATEAU | {"mode": "binary", "label_smoothing": 0.0, "loss": "cross_entropy"},
    "ArcFace": PLATEAU | {"mode": "binary", "label_smoothing": 0.0, "loss": "arcface"},
    "AM-Softmax": ONE_CYCLE | {"mode": "binary", "label_smoothing": 0.0, "loss": "am_softmax"},
    "triplet": PLATEAU | {"mode": "triplet", "triplets": "random", "margin": 1.0},
    "batch-hard": ONE_CYCLE | {"mode": "triplet", "triplets": "batch_hard", "margin": 1.0},
    "head": PLATEAU | {"mode": "head", "label_smoothing": 0.0, "patience": 2},
}


KILLED = ("pairs, SAM, mask head", "distilled", "half", "ArcFace", "triplet", "batch-hard", "head")
"""The others go the same ways."""


class Killed(BaseException):
    """Stands for `kill -9`: nothing of the training's own runs after it."""


def picture(rng: np.random.Generator, fake: bool) -> Image:
    """Noise of some brightness; a manipulated one has a green cheek that no degradation hides."""
    image = np.clip(rng.normal(rng.uniform(80, 160), 20, (224, 224, 3)), 0, 255).astype(np.uint8)
    if fake:
        image[60:180, 50:150] = (0, 210, 0)
    return image


def write_faces(root: Path, people: dict[str, range]) -> None:
    """The layout that docs/training.md asks for: a table and a tar a split."""
    rng = np.random.default_rng(9)
    rows = []
    for split, chosen in people.items():
        with tarfile.open(root / f"dfdc_faces_{split}_00.tar", "w") as tar:
            for person in chosen:
                for fake in (False, True):
                    name = f"{split}{person}{'fake' if fake else 'real'}"
                    original = f"{split}{person}real" if fake else ""
                    rows.append((split, "00", name, "fake" if fake else "real", original, 150, 150, person))
                    _, coded = cv2.imencode(".jpg", cv2.cvtColor(picture(rng, fake), cv2.COLOR_RGB2BGR))
                    info = tarfile.TarInfo(f"{name}.jpg")
                    info.size = len(coded)
                    tar.addfile(info, io.BytesIO(coded.tobytes()))
    with (root / "dfdc_faces.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these trainings; `test_training.py` looks at the picture."""
    monkeypatch.setattr(loop, "learning_curve", lambda *_: None)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_faces(root, PEOPLE)
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "start.pt"
    torch.manual_seed(0)
    torch.save(FaceNetwork(Architecture("tf_efficientnet_lite0", 4)).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Path:
    from detectors.training.export import export_member

    directory = tmp_path_factory.mktemp("teacher")
    fields = COMMON | ONE_CYCLE | PAIRS
    (directory / "recipe.yaml").write_text(yaml.safe_dump(fields))
    facts = {"licence": "Apache-2.0", "training_data": "", "tested_for": [], "not_tested_for": []}
    export_member(directory, torch.load(start), load_recipe(directory / "recipe.yaml"), None, facts)
    return directory


@pytest.fixture
def write_recipe(tmp_path: Path, start: Path, teacher: Path) -> Callable[..., Path]:
    def write(**change: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        known = {"start": str(start)}
        if "teachers" in change:
            known["teachers"] = [str(teacher)]  # type: ignore[assignment]
        path.write_text(yaml.safe_dump(COMMON | change | known))
        return path

    return write


def late() -> Callable[[], float]:
    """A clock by which every look is past the next checkpoint."""
    ticks = iter(range(0, 1_000_000, 200))
    return lambda: float(next(ticks))


def killing(looks: int) -> Callable[[], float]:
    ticks: Iterator[int] = iter(range(0, looks * 200, 200))

    def clock() -> float:
        now = next(ticks, None)
        if now is None:
            raise Killed
        return float(now)

    return clock


@pytest.mark.parametrize("mode", KILLED)
def test_a_killed_training_goes_on_to_the_same_bits(
    mode: str, data_dir: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(**MODES[mode])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    record = fit(recipe, whole, data_dir, threads=1, device="cpu", clock=late())
    with pytest.raises(Killed):
        fit(recipe, killed, data_dir, threads=1, device="cpu", clock=killing(6))
    left = torch.load(killed / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert 0 < left < record["steps"]
    again = fit(recipe, killed, data_dir, threads=1, device="cpu", clock=late())
    assert again["steps"] == record["steps"] == 6
    timed = ("minutes", "schedule")
    for before, after in zip(record["history"], again["history"], strict=True):
        assert {k: v for k, v in before.items() if k not in timed} == {
            k: v for k, v in after.items() if k not in timed
        }
    names = ["average.pt"] + (["best.pt"] if MODES[mode].get("schedule") == "plateau" else [])
    for name in names:
        first, second = (torch.load(out / name, weights_only=True) for out in (whole, killed))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)
    start = torch.load(load_recipe(recipe).start, weights_only=True)
    last = torch.load(whole / "average.pt", weights_only=True)
    assert torch.equal(start["net.conv_stem.weight"], last["net.conv_stem.weight"]) == (mode == "head")


def test_a_frozen_backbone_keeps_its_norms_too(
    data_dir: Path, write_recipe: Callable[..., Path], tmp_path: Path, start: Path
) -> None:
    fit(write_recipe(**MODES["head"]), tmp_path / "out", data_dir, threads=1, device="cpu")
    before = torch.load(start, weights_only=True)
    after = torch.load(tmp_path / "out" / "average.pt", weights_only=True)
    frozen = [name for name in after if not name.startswith("head.")]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert float(after["head.0.running_mean"].abs().sum()) > 0
    assert int(after["head.0.num_batches_tracked"]) == 6


def test_triplets_then_a_head_find_the_green_cheek(
    data_dir: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    embed = write_recipe(**MODES["triplet"] | {"iterations": 12, "validate_every": 4})
    found = fit(embed, tmp_path / "triplet", data_dir, threads=1, device="cpu")
    assert found["history"][-1]["val_auc"] > 0.8
    path = tmp_path / "head.yaml"
    fields = COMMON | MODES["head"] | {"start": str(tmp_path / "triplet" / "best.pt"), "learning_rate": 1e-2}
    path.write_text(yaml.safe_dump(fields))
    record = fit(path, tmp_path / "head", data_dir, threads=1, device="cpu")
    assert record["history"][-1]["val_auc"] > 0.8


def test_without_improvement_the_training_ends_early(
    data_dir: Path, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.7, 0.6, 0.65, 0.61, 0.5])
    monkeypatch.setattr(Objective, "validate", lambda *_: {"val_loss": next(losses), "val_auc": 0.5})
    recipe = write_recipe(**MODES["head"] | {"iterations": 40})
    record = fit(recipe, tmp_path / "out", data_dir, threads=1, device="cpu")
    assert record["steps"] == 8
    best = torch.load(tmp_path / "out" / "best.pt", weights_only=True)
    assert int(best["head.0.num_batches_tracked"]) == 4


def test_the_mean_of_two_runs_is_validated_and_left(data_dir: Path, tmp_path: Path, start: Path) -> None:
    first = torch.load(start, weights_only=True)
    second = {name: 1.01 * t if t.is_floating_point() else t for name, t in first.items()}
    torch.save(second, tmp_path / "second.pt")
    fields = {name: COMMON[name] for name in list(COMMON)[:7]}
    path = tmp_path / "mean.yaml"
    runs = [str(start), str(tmp_path / "second.pt")]
    path.write_text(yaml.safe_dump(fields | {"mode": "average", "average": runs}))
    record = fit(path, tmp_path / "mean", data_dir, threads=1, device="cpu")
    assert record["steps"] == 0
    assert 0 <= record["history"][0]["val_auc"] <= 1
    mean = torch.load(tmp_path / "mean" / "average.pt", weights_only=True)
    torch.testing.assert_close(mean["net.conv_stem.weight"], 1.005 * first["net.conv_stem.weight"])
    assert json.loads((tmp_path / "mean" / "record.json").read_text())["recipe"]["mode"] == "average"


def test_files_of_other_networks_are_not_averaged(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "n": torch.tensor(3)}, tmp_path / "1.pt")
    torch.save({"a": torch.zeros(2), "n": torch.tensor(5)}, tmp_path / "2.pt")
    mean = average_of([tmp_path / "1.pt", tmp_path / "2.pt"])
    assert mean["a"].tolist() == [0.5, 0.5]
    assert int(mean["n"]) == 3
    torch.save({"a": torch.zeros(3), "n": torch.tensor(5)}, tmp_path / "2.pt")
    with pytest.raises(AverageError, match=r"2\.pt: a: \(3,\), expected \(2,\)"):
        average_of([tmp_path / "1.pt", tmp_path / "2.pt"])
    torch.save({"b": torch.zeros(2)}, tmp_path / "2.pt")
    with pytest.raises(AverageError, match=r"2\.pt: a: not in both"):
        average_of([tmp_path / "1.pt", tmp_path / "2.pt"])


# -- data that cannot be trained on


def test_a_person_in_both_splits_is_refused(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    write_faces(tmp_path, {"train": range(6), "val": range(5, 9)})
    with pytest.raises(DataError, match="1 people are in train and in val, the first of them 5"):
        fit(write_recipe(**MODES["pairs"]), tmp_path / "out", tmp_path, threads=1, device="cpu")


@pytest.mark.parametrize("lacking", ["dfdc_faces.csv", "dfdc_faces_train_00.tar", "dfdc_faces_val_00.tar"])
def test_a_missing_file_is_named_with_the_layout(
    tmp_path: Path, write_recipe: Callable[..., Path], lacking: str
) -> None:
    write_faces(tmp_path, {"train": range(2), "val": range(2, 3)})
    (tmp_path / lacking).unlink()
    with pytest.raises(DataError, match=r"no such file; expected in the folder of --data: dfdc_faces\.csv"):
        fit(write_recipe(**MODES["pairs"]), tmp_path / "out", tmp_path, threads=1, device="cpu")


def test_a_missing_source_is_named(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    write_faces(tmp_path, {"train": range(2), "val": range(2, 3)})
    recipe = write_recipe(**MODES["pairs"] | {"sources": {"dfdc": 0.5, "strangers": 0.5}})
    with pytest.raises(DataError, match=r"strangers\.tar: no such file"):
        fit(recipe, tmp_path / "out", tmp_path, threads=1, device="cpu")


# -- recipes


@pytest.mark.parametrize(
    ("mode", "change", "said"),
    [
        ("pairs", {"mode": "guess"}, "mode: 'guess', expected one of pairs, binary, triplet, head, half"),
        ("pairs", {"margin": 1.0}, "margin: no field of mode pairs with schedule one_cycle"),
        ("pairs", {"validate_every": 5}, "validate_every: no field of mode pairs"),
        ("pairs", {"teachers": ["x"]}, "distil_temperature: missing"),
        ("pairs", {"learning_rate": "1e-5"}, "learning_rate: '1e-5', expected a number"),
        ("pairs", {"pair_weight": -1}, "pair_weight: -1, expected 0 or more"),
        ("pairs", {"pairs": {"dreams": 3}}, "pairs: .* expected counts above 0 for some of cross, dfdc"),
        ("pairs", {"pairs": {"self": 3}}, "sources: none"),
        ("binary", {"loss": "guess"}, "loss: 'guess', expected one of cross_entropy, am_softmax, arcface"),
        ("binary", {"pair_weight": 0.2}, "pair_weight: no field of mode binary"),
        ("binary", {"optimizer": "lion"}, "optimizer: 'lion', expected one of adamw, adam, sgd"),
        ("triplet", {"pairs": {"dfdc": 4}}, "pairs: 4 a batch, expected a multiple of 3"),
        ("triplet", {"patience": 0}, "patience: 0, expected more than 0"),
        ("head", {"start": "imagenet"}, "start: imagenet, expected the weights that a run of mode triplet"),
    ],
)
def test_an_impossible_recipe_is_refused_by_field(
    mode: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(COMMON | MODES[mode] | change))
    with pytest.raises(RecipeError, match=said):
        load_recipe(path)


def test_a_field_that_the_mode_needs_is_missed_by_name(tmp_path: Path) -> None:
    fields = COMMON | MODES["triplet"]
    del fields["margin"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(RecipeError, match="margin: missing; mode triplet with schedule plateau needs it"):
        load_recipe(tmp_path / "recipe.yaml")


def test_one_run_is_no_average(tmp_path: Path) -> None:
    fields = {name: COMMON[name] for name in list(COMMON)[:7]} | {"mode": "average", "average": ["a.pt"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(RecipeError, match=r"average: \['a.pt'\], expected two files"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_recognition_member_still_gives_one_logit(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(COMMON | MODES["ArcFace"]))
    architecture = load_recipe(path).architecture()
    network = FaceNetwork(Architecture(**architecture.to_json())).eval()
    with torch.no_grad():
        faces = torch.randn(3, 3, SIZE, SIZE)
        logits, attention = network(faces)
        features = network.features(faces)
    weight = network.net.classifier.weight[0].detach()
    cosine = features @ weight / features.norm(dim=1) / weight.norm()
    torch.testing.assert_close(logits, 16 * cosine)
    assert attention.shape[0] == 3


# -- where weights come from


def test_a_training_starts_from_timms_own_weights_or_another_training(tmp_path: Path) -> None:
    torch.manual_seed(1)
    donor = FaceNetwork(Architecture("tf_efficientnet_lite0", None))
    torch.save(donor.net.state_dict() | {"classifier.weight": torch.zeros(1000, 1280)}, tmp_path / "timm.pt")
    torch.save(donor.state_dict(), tmp_path / "ours.pt")
    for name in ("timm.pt", "ours.pt"):
        network = FaceNetwork(Architecture("tf_efficientnet_lite0", 4, siamese=True))
        begin(network, str(tmp_path / name))
        assert torch.equal(network.net.conv_head.weight, donor.net.conv_head.weight)
        assert network.attention is not None


def test_a_start_that_does_not_fit_is_refused_by_tensor(tmp_path: Path) -> None:
    network = FaceNetwork(Architecture("tf_efficientnet_lite0", 4))
    tensors = dict(network.state_dict())
    missing = {name: tensor for name, tensor in tensors.items() if name != "net.bn2.weight"}
    for content, said in (
        (missing, r"net\.bn2\.weight: missing; expected weights of tf_efficientnet_lite0"),
        (tensors | {"net.more": torch.ones(1)}, r"net\.more: not in the network"),
        (tensors | {"net.bn2.weight": torch.ones(3)}, r"net\.bn2\.weight: \(3,\), expected \(1280,\)"),
        ([1, 2], "expected a bare state dict"),
    ):
        torch.save(content, tmp_path / "start.pt")
        with pytest.raises(StartError, match=said):
            begin(network, str(tmp_path / "start.pt"))
    (tmp_path / "start.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(StartError, match="not a file of weights"):
        begin(network, str(tmp_path / "start.pt"))


# -- hardware, prefetching


def test_what_is_not_here_is_refused() -> None:
    assert choose_hardware("cpu", "auto").precision is Precision.FP32
    assert choose_hardware("cpu", "bf16").precision is Precision.BF16
    with pytest.raises(HardwareError, match="precision 'fp16' on a CPU"):
        choose_hardware("cpu", "fp16")
    with pytest.raises(HardwareError, match=r"device 'cuda:97': this machine has \d+ GPUs"):
        choose_hardware("cuda:97", "auto")
    with pytest.raises(HardwareError, match="one of auto, fp32, bf16, fp16"):
        choose_hardware("cpu", "int8")


def test_bf16_trains_on_a_cpu(data_dir: Path, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(**MODES["pairs"] | {"mask_weight": 0.3, "epochs": 0.5})
    record = fit(recipe, tmp_path / "out", data_dir, threads=1, device="cpu", precision="bf16")
    assert "bf16" in record["hardware"]
    assert all(math.isfinite(row["train_loss"]) for row in record["history"])


def test_the_scaled_loss_of_half_precision_goes_on_where_it_stopped(
    data_dir: Path, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, because tests have no GPU, and in bf16, because a CPU takes minutes for fp16."""
    monkeypatch.setitem(DTYPES, Precision.FP16, torch.bfloat16)
    half = Hardware(torch.device("cpu"), Precision.FP16)
    monkeypatch.setattr(loop, "choose_hardware", lambda *_: half)
    recipe = write_recipe(**MODES["pairs, SAM, mask head"])
    with pytest.raises(Killed):
        fit(recipe, tmp_path / "out", data_dir, threads=1, clock=killing(6))
    left = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert left["scaler"]["scale"] > 1
    record = fit(recipe, tmp_path / "out", data_dir, threads=1, clock=late())
    assert record["steps"] == 6
    assert all(math.isfinite(row["train_loss"]) for row in record["history"])
    weights = torch.load(tmp_path / "out" / "average.pt", weights_only=True)
    start = torch.load(load_recipe(recipe).start, weights_only=True)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert not torch.equal(weights["net.conv_stem.weight"], start["net.conv_stem.weight"])


def test_batches_come_in_order_and_not_too_many_ahead() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        if step == 9:
            raise ValueError("the tenth")
        return step

    batches = prefetched(make, 3, workers=2)
    assert [next(batches) for _ in range(6)] == [3, 4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="the tenth"):
        next(batches)
    assert max(made) <= 9 + 2 * AHEAD
