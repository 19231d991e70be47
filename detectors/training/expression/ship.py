"""What all runs together give: the folder of networks to ship, and the tables with the order of the methods.

    python -m detectors.training.expression.ship --data faces --out expression

writes both anew from the runs that are finished; `unmask train expression-all` ends with it.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from detectors.expression import INDEX, SCHEMA, Method, load_expression, softmax
from detectors.readings import EXPRESSIONS, Visible
from detectors.registry import file_sha256
from detectors.training.export import halved
from detectors.training.expression.evaluate import VIEWS, all_scores, figures, interval, with_students
from detectors.training.expression.ferplus import VAL, Voted, load_votes
from detectors.training.expression.loop import is_finished
from detectors.training.expression.recipe import (
    SHIPPED_RECIPES,
    AllRecipe,
    CombinedRecipe,
    NetworkRecipe,
    load_expression_recipe,
    named,
)
from detectors.training.expression.runs import agreed_only, kept_answers, run_folder, trained

MODELS = "models"
VERSION = "1"
FACTS = {
    "licence": "Apache-2.0",
    "training_data": "FER2013 faces (Kaggle) with FER+ votes (MIT), training split; start: ImageNet weights "
    "(Apache-2.0)",
}
COMBINED_FILE = "{reads}-combined.safetensors"

Answers = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Seeds:
    """A recipe's scores [N, 8] of the validation pictures by what could be seen, a dict for each seed."""

    recipe: NetworkRecipe | CombinedRecipe
    answers: tuple[Mapping[Visible, Answers], ...]

    def hits(self, visible: Visible, labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Share of the seeds that are right on each picture, float64 [N]."""
        right = [found[visible].argmax(1) == labels for found in self.answers]
        return np.asarray(np.mean(right, axis=0), np.float64)


def publish(
    out: Path,
    recipes: Sequence[NetworkRecipe | CombinedRecipe],
    check: Voted,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Write `out/models`, `out/report.json` and `out/report.md` from the runs that are finished; returns the
    report. Raises ValueError when none is.

    Of several recipes for one method and half the first is shipped and in the table, the others are variants.
    Of several seeds the first is shipped: to take the best would be to choose by the pictures that judge.
    """
    _, labels = agreed_only(check)
    every = [_seeds(out, recipe) for recipe in recipes]
    found = [seeds for seeds in every if seeds is not None]
    if not found:
        raise ValueError(f"{out}: none of {', '.join(one.name for one in recipes)} is finished here")
    for recipe, seeds in zip(recipes, every, strict=True):
        if seeds is None or len(seeds.answers) < len(recipe.seeds):
            on_progress(f"{recipe.name}: not finished{'' if seeds is None else ' with every seed'}")
    report = tables(found, labels)
    chosen = _first_of_each(found)
    on_progress(f"writing {out / MODELS}")
    write_models(out, [seeds.recipe for seeds in chosen.values()])
    on_progress("reading the validation pictures with the networks as they are shipped")
    shipped = all_scores(load_expression(out / MODELS), agreed_only(check)[0])
    report["shipped"] = {
        view: {method: figures(scores, labels).to_json() for method, scores in by_method.items()}
        for view, by_method in shipped.items()
    }
    index = json.loads((out / MODELS / INDEX).read_text())
    index["metrics"] = {"FER+ val": report["shipped"]}
    (out / MODELS / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "report.md").write_text("\n".join(markdown(report)) + "\n")
    on_progress(f"{out / 'report.md'}")
    return report


def _seeds(out: Path, recipe: NetworkRecipe | CombinedRecipe) -> Seeds | None:
    """The finished seeds; None without the first, which is the one that is shipped."""
    folders = [run_folder(out, recipe.name, seed) for seed in recipe.seeds]
    if not is_finished(folders[0]):
        return None
    return Seeds(recipe, tuple(kept_answers(folder) for folder in folders if is_finished(folder)))


def _first_of_each(found: Sequence[Seeds]) -> dict[tuple[Visible, Method], Seeds]:
    first: dict[tuple[Visible, Method], Seeds] = {}
    for seeds in found:
        first.setdefault((Visible(seeds.recipe.reads), seeds.recipe.method), seeds)
    return first


def tables(found: Sequence[Seeds], labels: NDArray[np.int64]) -> dict[str, Any]:
    """The report as JSON: `table` by view and method, `order` (each method against the one before it), and
    `variants`. Intervals are over pictures, the mean of the seeds counting for each."""
    chosen = _first_of_each(found)
    by_view = _hits(chosen, labels)
    variants = {
        seeds.recipe.name: _row(seeds.hits(Visible(seeds.recipe.reads), labels), _accuracies(seeds, labels))
        for seeds in found
    }
    return {
        "pictures": len(labels),
        "table": {
            view: {method: _row(hits, seeds) for method, (hits, seeds) in by_method.items()}
            for view, by_method in by_view.items()
        },
        "order": {view: _order(by_method) for view, by_method in by_view.items()},
        "variants": variants,
    }


Hits = dict[Method, tuple[NDArray[np.float64], list[float]]]
"""By method: the share of the seeds right on each picture [N], and the accuracy of each seed."""


def _hits(chosen: Mapping[tuple[Visible, Method], Seeds], labels: NDArray[np.int64]) -> dict[str, Hits]:
    teacher = chosen.get((Visible.BOTH, Method.TEACHER))
    told = {
        view: {} if teacher is None else {Method.TEACHER: teacher.answers[0][visible]}
        for view, visible in VIEWS.items()
    }
    first: dict[Visible, dict[Method, Answers]] = {Visible.LOWER: {}, Visible.UPPER: {}}
    for (reads, method), seeds in chosen.items():
        if reads != Visible.BOTH:
            scores = seeds.answers[0][reads]
            first[reads][method] = scores if method is Method.COMBINED else softmax(scores)
    hits: dict[str, Hits] = {}
    for view, by_method in with_students(told, first[Visible.LOWER], first[Visible.UPPER]).items():
        hits[view] = {}
        for method, scores in by_method.items():
            hits[view][method] = _right(chosen.get((VIEWS[view], method)), VIEWS[view], scores, labels)
    return hits


def _right(
    seeds: Seeds | None, visible: Visible, scores: Answers, labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], list[float]]:
    """Of all seeds of a recipe that reads what is visible; else of `scores`, the first seeds' together."""
    if seeds is not None:
        return seeds.hits(visible, labels), _accuracies(seeds, labels, visible)
    right = (scores.argmax(1) == labels).astype(np.float64)
    return right, [float(right.mean())]


def _accuracies(seeds: Seeds, labels: NDArray[np.int64], visible: Visible | None = None) -> list[float]:
    visible = Visible(seeds.recipe.reads) if visible is None else visible
    return [float((found[visible].argmax(1) == labels).mean()) for found in seeds.answers]


def _row(hits: NDArray[np.float64], seeds: list[float]) -> dict[str, Any]:
    low, high = interval(hits)
    return {"accuracy": float(hits.mean()), "low": low, "high": high, "seeds": seeds}


def _order(by_method: Hits) -> list[dict[str, Any]]:
    methods = list(by_method)
    rows = []
    for worse, better in pairwise(methods):
        gain = by_method[better][0] - by_method[worse][0]
        low, high = interval(gain)
        rows.append({"better": better, "than": worse, "gain": float(gain.mean()), "low": low, "high": high})
    return rows


def markdown(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of Markdown."""
    lines = [
        f"Accuracy on the {report['pictures']} FER+ validation pictures on which the voters agree, in per "
        "cent; 95 % bootstrap intervals over pictures. With several seeds: their mean, and each.",
        "",
        "| | " + " | ".join(VIEWS) + " |",
        "|---" * (1 + len(VIEWS)) + "|",
    ]
    for method in Method:
        cells = [_cell(report["table"][view].get(method)) for view in VIEWS]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", "| paired difference | view | points | |", "|---|---|---|---|"]
    lines += [
        f"| {row['better']} less {row['than']} | {view} | {_points(row)} | {_judged(row)} |"
        for view, rows in report["order"].items()
        for row in rows
    ]
    lines += ["", "| recipe | accuracy |", "|---|---|"]
    return lines + [f"| {name} | {_cell(row)} |" for name, row in report["variants"].items()]


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    each = f"; {', '.join(f'{100 * one:.2f}' for one in row['seeds'])}" if len(row["seeds"]) > 1 else ""
    return f"{100 * row['accuracy']:.2f} ({100 * row['low']:.1f} to {100 * row['high']:.1f}{each})"


def _points(row: Mapping[str, Any]) -> str:
    return f"{100 * row['gain']:+.2f} ({100 * row['low']:+.2f} to {100 * row['high']:+.2f})"


def _judged(row: Mapping[str, Any]) -> str:
    if row["low"] > 0:
        return "confirmed"
    return "refuted" if row["high"] < 0 else "open"


def write_models(out: Path, recipes: Sequence[NetworkRecipe | CombinedRecipe]) -> None:
    """Write `out/models`: fp16 weights of the first seed of each recipe, the SVMs, and `expression.json`."""
    folder = out / MODELS
    folder.mkdir(parents=True, exist_ok=True)
    networks = [
        _write_network(out, folder, recipe) for recipe in recipes if isinstance(recipe, NetworkRecipe)
    ]
    combined = [
        _write_combined(out, folder, recipe, recipes)
        for recipe in recipes
        if isinstance(recipe, CombinedRecipe)
    ]
    index = {
        "schema": SCHEMA,
        "version": VERSION,
        "classes": list(EXPRESSIONS),
        **FACTS,
        "networks": networks,
        "combined": combined,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_network(out: Path, folder: Path, recipe: NetworkRecipe) -> dict[str, Any]:
    tensors = trained(out, recipe, recipe.seeds[0]).network.state_dict()
    path = folder / f"{recipe.reads}-{recipe.method}.safetensors"
    save_file({name: halved(tensor).contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)  # safetensors writes for the owner alone; an installed package is read by others
    return {
        "reads": recipe.reads,
        "method": recipe.method,
        "file": path.name,
        "sha256": file_sha256(path),
        "backbone": recipe.backbone,
        "size": recipe.size,
    }


def _write_combined(
    out: Path, folder: Path, recipe: CombinedRecipe, recipes: Sequence[NetworkRecipe | CombinedRecipe]
) -> dict[str, Any]:
    by_name = {one.name: one for one in recipes}
    if missing := [part for part in recipe.parts if part not in by_name]:
        raise ValueError(f"recipe {recipe.name}: its part {missing[0]} is not among those that are shipped")
    path = folder / COMBINED_FILE.format(reads=recipe.reads)
    path.write_bytes((run_folder(out, recipe.name, recipe.seeds[0]) / "svm.safetensors").read_bytes())
    return {
        "reads": recipe.reads,
        "parts": [by_name[part].method for part in recipe.parts],
        "file": path.name,
        "sha256": file_sha256(path),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Publish finished runs anew."""
    parser = argparse.ArgumentParser(prog="python -m detectors.training.expression.ship", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with ferplus_val.csv")
    parser.add_argument("--out", type=Path, required=True, help="as given to `unmask train`")
    parser.add_argument("--recipe", type=Path, default=SHIPPED_RECIPES / "expression-all.yaml")
    given = parser.parse_args(arguments)
    recipe = load_expression_recipe(given.recipe)
    if not isinstance(recipe, AllRecipe):
        parser.error(f"{given.recipe}: expected a recipe of method all")
    found = [load_expression_recipe(named(name, given.recipe.parent)) for name in recipe.runs]
    recipes = [one for one in found if not isinstance(one, AllRecipe)]
    publish(given.out, recipes, load_votes([given.data / VAL]), print)


if __name__ == "__main__":
    main()
