"""Measures of a detector's logits."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.integer]


def auc(scores: FloatArray, labels: IntArray) -> float:
    """Area under the ROC curve, ties counted half; NaN when a class is missing."""
    positives = int((labels == 1).sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    above = ranks[labels == 1].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def log_loss(logits: FloatArray, labels: IntArray, weights: FloatArray | None = None) -> float:
    """Mean negative log likelihood of the labels, in nats; weighted when weights [N] are given."""
    signed = np.where(labels == 1, -logits, logits).astype(np.float64)
    return float(np.average(np.logaddexp(0, signed), weights=weights))


def calibration_error(
    probabilities: FloatArray, labels: IntArray, weights: FloatArray | None = None, bins: int = 15
) -> float:
    """Expected calibration error over bins of equal width, 0..1; weighted when weights [N] are given."""
    weights = np.ones(len(labels)) if weights is None else weights
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = place == b
        if inside.any():
            gap = np.average(probabilities[inside] - labels[inside], weights=weights[inside])
            error += weights[inside].sum() * abs(gap)
    return float(error / weights.sum())


def bootstrap_by_identity(
    measure: Callable[[IntArray], float],
    identity: IntArray,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of `measure(indices)` when whole people are drawn with replacement, not crops."""
    people = [np.flatnonzero(identity == person) for person in np.unique(identity)]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = rng.integers(len(people), size=len(people))
        value = measure(np.concatenate([people[i] for i in drawn]))
        if np.isfinite(value):
            values.append(value)
    if not values:
        raise ValueError("bootstrap: the measure is defined in no draw")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
