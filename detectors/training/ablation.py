"""What each part of the recipe brings: short trainings that differ in one thing, measured alike.

`python -m detectors.training.ablation --data DIR --out DIR [NAME...]` trains what is not trained yet and
writes `ablation.json`, rows for the ensemble's card (`detectors.training.report --ablation`). One seed, a
small input and few crops: differences below the intervals say nothing.
"""

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from detectors.training.data import load_faces
from detectors.training.export import weights_file
from detectors.training.loop import fit
from detectors.training.recipe import Mode, load_recipe
from detectors.training.ship import export_run, measured, read_strangers, read_val, stranger_truth

logger = logging.getLogger(__name__)

FIGURES = "figures.json"
"""One run's row, in its folder; a run that has it is done."""

BASE: Mapping[str, Any] = {
    "version": "1",
    "mode": "pairs",
    "backbone": "tf_efficientnet_lite0",
    "attention_block": 4,
    "dropout": 0.2,
    "mirrored": False,
    "crop": {"kind": "tight", "size": 112, "side": 0.81, "shift": 0.06},
    "seed": 41,
    "start": "imagenet",
    "pairs": {"dfdc": 12, "self": 5, "cross": 5, "swap": 6, "lip": 2},
    "sources": {"dfdc": 0.5, "lfw_faces": 0.25, "wide_faces": 0.25},
    "views": [0.75, 1.0],
    "min_width": 0,
    "mask_weight": 0.3,
    "pair_weight": 0.2,
    "label_smoothing": 0.05,
    "learning_rate": 1.0e-3,
    "weight_decay": 0.05,
    "epochs": 1.5,
    "budget_minutes": None,
    "warmup": 0.1,
    "ema_decay": 0.99,  # a tenth of the steps of a whole training, so a shorter memory
    "early_epoch": 1,
    "early_share": 0.0,
}
"""Steps are counted, not minutes: a run under load sees what the others saw."""

TRIPLET = {"mode": "triplet", "triplets": "batch_hard", "margin": 1.0, "learning_rate": 3.0e-4}
HEAD = {
    "mode": "head",
    "dropout": 0.0,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
    "schedule": "plateau",
    "iterations": 150,
    "validate_every": 50,
    "patience": 2,
}
PAIRS_ONLY = ("mask_weight", "pair_weight")
ONE_CYCLE_ONLY = ("epochs", "budget_minutes", "warmup", "ema_decay", "early_epoch", "early_share")

RUNS: Mapping[str, Mapping[str, Any]] = {
    "everything": {},
    "without attention": {"attention_block": None},
    "without blends": {"pairs": {"dfdc": 30}, "sources": {}, "views": [1.0, 1.0]},
    "blends alone": {"pairs": {"self": 10, "cross": 8, "swap": 9, "lip": 3}},
    "without degradations": {"degraded": False},
    "without mask and pair loss": {"mask_weight": 0.0, "pair_weight": 0.0},
    "siamese": TRIPLET,
}
"""What each run changes in BASE."""


def ablate(
    names: Sequence[str],
    data_dir: Path,
    out: Path,
    *,
    threads: int = 2,
    on_progress: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Trains and measures the runs named, those done before only once; returns all rows so far."""
    (out / "cache").mkdir(parents=True, exist_ok=True)
    folders = {name: out / name.replace(" ", "-") for name in RUNS}
    for name in names:
        if not (folders[name] / FIGURES).exists():
            on_progress(f"ablation: {name}")
            _run(name, data_dir, out, folders[name], threads)
    done = {name: folder / FIGURES for name, folder in folders.items() if (folder / FIGURES).exists()}
    rows = {name: json.loads(path.read_text()) for name, path in done.items()}
    (out / "ablation.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def recipe_of(name: str, change: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's fields of one run; a triplet run lacks what only pairs have, a head what one cycle has."""
    fields = {**BASE, "name": f"ablation-{name.replace(' ', '-')}", **change}
    foreign: tuple[str, ...] = ()
    if fields["mode"] != Mode.PAIRS:
        foreign += PAIRS_ONLY
    if fields["mode"] == Mode.TRIPLET:
        foreign += ("label_smoothing",)
    if fields.get("schedule") == "plateau":
        foreign += ONE_CYCLE_ONLY
    return {field: value for field, value in fields.items() if field not in foreign}


def _run(name: str, data_dir: Path, out: Path, folder: Path, threads: int) -> None:
    cache, trained = out / "cache", folder
    recipe = _train(name, RUNS[name], data_dir, cache, trained, threads)
    if load_recipe(recipe).mode is Mode.TRIPLET:
        start = {"start": str(weights_file(trained, load_recipe(recipe)))}
        trained = folder / "head"
        recipe = _train(name, HEAD | start, data_dir, cache, trained, threads)
    member = export_run(recipe, trained, folder)
    faces = load_faces(data_dir, cache, "val")
    found = {"validation": measured(read_val(member, data_dir, cache), faces.labels, faces.identity)}
    truth = stranger_truth(data_dir, cache)
    for family, logits in read_strangers(member, data_dir, cache).items():
        found[f"strangers: {family}"] = measured(logits, *truth[family])
    row = {title: [figure["auc"], *figure["interval"]] for title, figure in found.items()}
    (folder / FIGURES).write_text(json.dumps(row, indent=2) + "\n")


def _train(
    name: str, change: Mapping[str, Any], data_dir: Path, cache: Path, folder: Path, threads: int
) -> Path:
    """Trains into `folder`, on the pictures in `cache`; the recipe's file."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "cache").exists():
        (folder / "cache").symlink_to(cache.absolute())
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(name, change)))
    fit(path, folder, data_dir, threads=threads)
    return path


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RUNS))
    for name in ("data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(RUNS):
        parser.error(f"{min(unknown)}: expected one of {', '.join(RUNS)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ablate(chosen.names or list(RUNS), chosen.data, chosen.out, threads=chosen.threads)


if __name__ == "__main__":
    main()
