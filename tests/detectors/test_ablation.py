"""The ablation's recipes differ in one thing each, and a run is trained once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from detectors.training import ablation
from detectors.training.ablation import BASE, HEAD, RUNS, ablate, recipe_of
from detectors.training.augment import apply, draw, without_harm
from detectors.training.recipe import Mode, load_recipe
from tests.detectors.test_training_modes import write_faces


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_a_recipe(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(name, RUNS[name])))
    recipe = load_recipe(path)
    assert recipe.name == f"ablation-{name.replace(' ', '-')}"
    changed = {field for field, value in RUNS[name].items() if BASE.get(field) != value}
    assert changed == set(RUNS[name])
    assert recipe.mix().pairs == load_base(tmp_path).mix().pairs, "as many crops as the others"


def load_base(tmp_path: Path) -> Any:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(recipe_of("everything", {})))
    return load_recipe(path)


def test_without_harm_a_crop_is_cut_alike_and_not_much_changed() -> None:
    rng = np.random.default_rng(3)
    crop = np.kron(rng.integers(60, 200, (8, 8, 3)), np.ones((28, 28, 1))).astype(np.uint8)
    for seed in range(20):
        drawn = draw(np.random.default_rng(seed), 224, 112)
        spared = without_harm(drawn)
        assert (spared.flip, spared.plane) == (drawn.flip, drawn.plane)
        np.testing.assert_array_equal(spared.matrix, drawn.matrix)
        assert abs(apply(crop, spared).mean() - crop.mean()) < 12


def test_a_siamese_run_trains_features_and_a_head_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_faces(data, {"train": range(6), "val": range(10, 16)})
    small: dict[str, Any] = {
        "crop": {"kind": "tight", "size": 64, "side": 0.81, "shift": 0.06},
        "pairs": {"dfdc": 3},
    }
    monkeypatch.setattr(
        ablation,
        "BASE",
        {**BASE, **small, "pairs": {"dfdc": 3}, "sources": {}, "views": [1.0, 1.0], "epochs": 0.5},
    )
    monkeypatch.setattr(ablation, "HEAD", {**HEAD, "iterations": 1, "validate_every": 1})
    monkeypatch.setattr(
        ablation, "stranger_truth", lambda *_: {"made up": (np.array([0, 1]), np.array([0, 1]))}
    )
    monkeypatch.setattr(ablation, "read_strangers", lambda *_: {"made up": np.array([0.0, 1.0])})
    rows = ablate(["siamese"], data, tmp_path / "out", threads=1)
    assert rows["siamese"]["strangers: made up"][0] == 1.0
    assert 0 <= rows["siamese"]["validation"][0] <= 1
    head = load_recipe(tmp_path / "out" / "siamese" / "head" / "recipe.yaml")
    assert head.mode is Mode.HEAD
    assert json.loads((tmp_path / "out" / "ablation.json").read_text()) == rows

    monkeypatch.setattr(ablation, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert ablate(["siamese"], data, tmp_path / "out") == rows
