"""What scores are worth against the truth: curves, areas, intervals. Figures for `unmask evaluate`.

Everywhere `truth` is bool, True for manipulated, `scores` are probabilities of that, both of shape (n,).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Truth = NDArray[np.bool_]

RESAMPLES = 1000
"""Bootstrap draws: the ends of a 95 % interval then move by well under their own width between seeds."""

LEAST_PROBABILITY = 1e-15
"""LogLoss is infinite at a certain error; probabilities are held this far from 0 and 1."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with the ends of its 95 % bootstrap interval; None where it cannot be known."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts at an operating point."""

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int


def roc_curve(truth: Truth, scores: Floats) -> tuple[Floats, Floats, Floats]:
    """Return false positive rate, true positive rate and threshold (score >= it is positive), from (0, 0) on.

    One point per distinct score; the first threshold is infinite. Both classes must be present.
    """
    hits, alarms, thresholds = _cumulated(truth, scores)
    return (
        np.concatenate([[0.0], alarms / alarms[-1]]),
        np.concatenate([[0.0], hits / hits[-1]]),
        np.concatenate([[np.inf], thresholds]),
    )


def precision_recall_curve(truth: Truth, scores: Floats) -> tuple[Floats, Floats]:
    """Return precision and recall at each distinct score, from the highest score down."""
    hits, alarms, _ = _cumulated(truth, scores)
    return hits / (hits + alarms), hits / hits[-1]


def _cumulated(truth: Truth, scores: Floats) -> tuple[Floats, Floats, Floats]:
    """Return true and false positives, and the score, at the end of each run of equal scores, descending."""
    order = np.argsort(-scores, kind="stable")
    ranked, values = truth[order], scores[order]
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)
    hits = np.cumsum(ranked)[ends].astype(np.float64)
    return hits, ends + 1 - hits, values[ends]


def auc(truth: Truth, scores: Floats) -> float | None:
    """Return the chance that a manipulated file scores above an authentic one, ties counting half."""
    if not has_both(truth):
        return None
    false_rate, true_rate, _ = roc_curve(truth, scores)
    return float(np.trapezoid(true_rate, false_rate))


def average_precision(truth: Truth, scores: Floats) -> float | None:
    """Return the sum over distinct scores of precision times the recall gained there (no interpolation)."""
    if not truth.any():
        return None
    precision, recall = precision_recall_curve(truth, scores)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def log_loss(truth: Truth, scores: Floats) -> float:
    """Return the mean negative log likelihood (natural) of the labels under the probabilities `scores`."""
    held = np.clip(scores, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return float(-np.mean(np.where(truth, np.log(held), np.log1p(-held))))


def equal_error_rate(truth: Truth, scores: Floats) -> float | None:
    """Return the rate at which false positives and misses are equal, on the ROC's straight segments."""
    if not has_both(truth):
        return None
    false_rate, true_rate, _ = roc_curve(truth, scores)
    balance = false_rate - (1 - true_rate)
    after = int(np.argmax(balance >= 0))
    before = after - 1
    share = balance[before] / (balance[before] - balance[after])
    return float(false_rate[before] + share * (false_rate[after] - false_rate[before]))


def confusion(truth: Truth, positive: Truth) -> Confusion:
    """Count the four outcomes."""
    return Confusion(
        true_positive=int(np.sum(truth & positive)),
        false_positive=int(np.sum(~truth & positive)),
        true_negative=int(np.sum(~truth & ~positive)),
        false_negative=int(np.sum(truth & ~positive)),
    )


def risk_coverage_curve(truth: Truth, scores: Floats) -> tuple[Floats, Floats]:
    """Return coverage and risk (share of errors) when only the most confident files are decided.

    Confidence is |probability - .5|; a probability of exactly .5 is half an error. Files of one confidence
    enter together.
    """
    sureness = np.abs(scores - 0.5)
    wrong = np.where(scores == 0.5, 0.5, ((scores > 0.5) != truth).astype(np.float64))
    order = np.argsort(-sureness, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(sureness[order])), len(order) - 1)
    return (ends + 1) / len(order), np.cumsum(wrong[order])[ends] / (ends + 1)


def area_under_risk(truth: Truth, scores: Floats) -> float:
    """Return the mean risk over the files, each taken at the coverage at which it enters (AURC)."""
    coverage, risk = risk_coverage_curve(truth, scores)
    return float(np.sum(np.diff(coverage, prepend=0.0) * risk))


def bootstrap(
    figure: Callable[[NDArray[np.intp]], float | None], groups: Sequence[str], rng: np.random.Generator
) -> Interval:
    """Return `figure` over all items with its 95 % interval over `RESAMPLES` draws of whole groups.

    `figure` takes item indices and gives None where it cannot be computed; such draws are left out, and
    fewer than half of the draws left give no interval.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    blocks = [np.array(block, dtype=np.intp) for block in members.values()]
    value = figure(np.arange(len(groups), dtype=np.intp))
    if value is None or len(blocks) < 2:
        return Interval(value, None, None)
    draws = (
        figure(np.concatenate([blocks[index] for index in rng.integers(0, len(blocks), len(blocks))]))
        for _ in range(RESAMPLES)
    )
    values = [draw for draw in draws if draw is not None]
    if len(values) < RESAMPLES // 2:
        return Interval(value, None, None)
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def share(hit: Truth, among: Truth, groups: Sequence[str], rng: np.random.Generator) -> Interval:
    """Return the share of `hit` among `among` with its bootstrap interval over groups.

    None or all of them hit: no draw could differ, so the open end is the rule of three over the groups that
    are there (SCIENCE D: zero alarms in n trials claim no better than 3/n).
    """

    def figure(index: NDArray[np.intp]) -> float | None:
        chosen = among[index]
        return float(np.mean(hit[index][chosen])) if chosen.any() else None

    found = bootstrap(figure, groups, rng)
    if found.value not in (0.0, 1.0):
        return found
    reach = min(1.0, 3 / len({group for group, counts in zip(groups, among, strict=True) if counts}))
    return Interval(0.0, 0.0, reach) if found.value == 0.0 else Interval(1.0, 1 - reach, 1.0)


def has_both(truth: Truth) -> bool:
    return bool(truth.any()) and not bool(truth.all())
