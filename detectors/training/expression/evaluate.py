"""How often the methods are right: accuracy, F1 and confusion, of whole faces and of either half."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detectors.expression import ExpressionModels, Method, Read, joined, softmax
from detectors.readings import EXPRESSIONS, Visible

VIEWS: Mapping[str, Visible] = {
    "full": Visible.BOTH,
    "lower_half": Visible.LOWER,
    "upper_half": Visible.UPPER,
}
"""What can be seen, by the name in reports, in their order."""

DRAWS = 1000
"""Of the bootstrap: the ends of a 95 % interval are then good to about a twentieth of its width."""
CHUNK = 1000
"""Draws times pictures at once, in thousands: 8 MB."""

Scores = Mapping[str, Mapping[Method, NDArray[np.float32]]]
"""By view and method, [N, 8]: the largest is the answer."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares, 0..1, over `n` faces."""

    accuracy: float
    macro_f1: float
    n: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def all_scores(
    models: ExpressionModels, images: NDArray[np.uint8]
) -> dict[str, dict[Method, NDArray[np.float32]]]:
    """What every method says of grey faces uint8 [N, 48, 48], whole and with either half hidden.

    Of a half-hidden face the teacher gets the hidden half blanked, the others read their half. Of a whole
    face the students of both halves are asked and averaged: their probabilities, or the SVMs' distances.
    """
    reads: dict[tuple[Visible, Method], Read] = {
        key: model.read(images) for key, model in models.networks.items() if key[1] is not Method.TEACHER
    }
    halves: dict[Visible, dict[Method, NDArray[np.float32]]] = {Visible.LOWER: {}, Visible.UPPER: {}}
    for (half, method), read in reads.items():
        halves[half][method] = softmax(read.logits)
    for half, combined in models.combined.items():
        features = joined([reads[half, part].embeddings for part in combined.parts])
        halves[half][Method.COMBINED] = combined.svm.scores(features)
    told: dict[str, dict[Method, NDArray[np.float32]]] = {view: {} for view in VIEWS}
    if (teacher := models.networks.get((Visible.BOTH, Method.TEACHER))) is not None:
        for view, visible in VIEWS.items():
            told[view][Method.TEACHER] = softmax(teacher.read(images, visible).logits)
    return with_students(told, halves[Visible.LOWER], halves[Visible.UPPER])


def with_students(
    teacher: Mapping[str, Mapping[Method, NDArray[np.float32]]],
    lower: Mapping[Method, NDArray[np.float32]],
    upper: Mapping[Method, NDArray[np.float32]],
) -> dict[str, dict[Method, NDArray[np.float32]]]:
    """The teacher's scores by view with those of the students of both halves, in the order of the methods."""
    both = {
        method: np.asarray((lower[method] + upper[method]) / 2, np.float32)
        for method in lower
        if method in upper
    }
    students: Scores = {"full": both, "lower_half": lower, "upper_half": upper}
    return {view: _ordered({**teacher.get(view, {}), **students[view]}) for view in VIEWS}


def _ordered(found: Mapping[Method, NDArray[np.float32]]) -> dict[Method, NDArray[np.float32]]:
    return {method: found[method] for method in Method if method in found}


def figures(scores: NDArray[np.float32], labels: NDArray[np.int64]) -> Figures:
    """Of scores [N, 8] and labels [N], places in EXPRESSIONS."""
    table = confusion(scores.argmax(1), labels)
    return Figures(float(np.trace(table) / len(labels)), macro_f1(table), len(labels))


def confusion(answers: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts [8, 8]: row by label, column by answer."""
    table = np.zeros((len(EXPRESSIONS), len(EXPRESSIONS)), np.int64)
    np.add.at(table, (labels, answers), 1)
    return table


def macro_f1(table: NDArray[np.int64]) -> float:
    """Mean F1 over the classes that occur, among labels or answers, of a confusion [8, 8]."""
    total = table.sum(0) + table.sum(1)
    occurs = total > 0
    return float(np.mean(2 * np.diag(table)[occurs] / total[occurs]))


def interval(values: NDArray[np.floating], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean of values [N], over pictures: FER2013 does not say who is on them."""
    rng = np.random.default_rng(seed)
    n = len(values)
    at_once = max(1, CHUNK * 1000 // n)
    means = [
        values[rng.integers(n, size=(min(at_once, DRAWS - done), n))].mean(1)
        for done in range(0, DRAWS, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def draw_confusions(scores: Scores, labels: NDArray[np.int64], path: Path) -> None:
    """Write a picture of every confusion: rows of labels, columns of answers, shares of the label's faces."""
    from matplotlib.figure import Figure

    columns = max(1, *(len(found) for found in scores.values()))
    figure = Figure(figsize=(2 + 3 * columns, 2 + 3 * len(scores)))
    grid = figure.subplots(len(scores), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, (view, found) in zip(grid, scores.items(), strict=True):
        for place, (method, given) in enumerate(found.items()):
            _draw(row[place], confusion(given.argmax(1), labels), f"{view}: {method}", first=place == 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _draw(axes: Any, table: NDArray[np.int64], title: str, first: bool) -> None:
    shares = table / np.maximum(1, table.sum(1, keepdims=True))
    axes.set_axis_on()
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set_title(title, fontsize=9)
    places = range(len(EXPRESSIONS))
    axes.set_xticks(places, [name[:4] for name in EXPRESSIONS], rotation=90, fontsize=7)
    axes.set_yticks(places, EXPRESSIONS if first else [""] * len(places), fontsize=7)
    for label, answer in np.argwhere(table):
        colour = "white" if shares[label, answer] > 0.5 else "black"
        count = int(table[label, answer])
        axes.text(answer, label, count, ha="center", va="center", fontsize=6, color=colour)
