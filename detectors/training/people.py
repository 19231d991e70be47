"""Looks at people: what is measured on faces counts people, not pictures (SCIENCE D)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

FOLDS = 5
FOLD_FILE = Path(__file__).parent / "recipes" / "dfdc-val-folds.yaml"

DRAWS = 1000
"""Bootstrap draws: the ends of a 95 % interval are then good to about a twentieth of its width."""


@dataclass(frozen=True, slots=True)
class Looks:
    """One logit a face: `logits` float [N], `labels` 1 for manipulated [N], `identity` a number per person
    [N]. Raises ValueError when they do not match or a logit is not finite."""

    logits: NDArray[np.floating]
    labels: NDArray[np.int64]
    identity: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not (len(self.logits) == len(self.labels) == len(self.identity) > 0):
            raise ValueError(
                f"looks: {len(self.logits)} logits, {len(self.labels)} labels, {len(self.identity)} "
                "identities, expected as many of each, at least one"
            )
        if not np.isfinite(self.logits).all():
            raise ValueError(f"looks: {int((~np.isfinite(self.logits)).sum())} logits are not finite")

    def of(self, chosen: NDArray[np.bool_]) -> "Looks":
        """Those that are chosen, a bool [N]."""
        return Looks(self.logits[chosen], self.labels[chosen], self.identity[chosen])

    def with_logits(self, logits: NDArray[np.floating]) -> "Looks":
        """The same faces by another detector."""
        return Looks(logits, self.labels, self.identity)

    @property
    def folds(self) -> NDArray[np.int64]:
        return fold_of(self.identity)


def fold_of(identity: NDArray[np.int64]) -> NDArray[np.int64]:
    """Fold 0..4 of each crop by the committed file; a person it does not know goes by number."""
    known = yaml.safe_load(FOLD_FILE.read_text())
    return np.array([known.get(int(person), int(person) % FOLDS) for person in identity], np.int64)


def balanced_weights(labels: NDArray[np.int64], identity: NDArray[np.int64]) -> NDArray[np.float64]:
    """Every person counts the same within a class, and the classes count the same; the mean is 1."""
    weights = np.zeros(len(labels))
    for label in (0, 1):
        of_class = labels == label
        if of_class.any():
            each = even_weights(identity[of_class])
            weights[of_class] = each / each.sum()
    mean_one: NDArray[np.float64] = weights * len(labels) / weights.sum()
    return mean_one


def even_weights(identity: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each person's crops add up to 1: what one random crop of each, averaged over all draws, comes to."""
    _, inverse, counts = np.unique(identity, return_inverse=True, return_counts=True)
    each: NDArray[np.float64] = 1.0 / counts[inverse]
    return each


def share(
    hits: NDArray[np.bool_], identity: NDArray[np.int64], level: float = 0.95, seed: int = 0
) -> dict[str, float]:
    """Share of people's looks that hit, every person counting the same, with its bootstrap interval over
    people; `upper` is the one-sided limit, and never below what nobody among so many people can rule out
    (Clopper and Pearson for none: 1 - (1 - level)^(1/n))."""
    people, inverse = np.unique(identity, return_inverse=True)
    each = np.bincount(inverse, weights=hits.astype(np.float64)) / np.bincount(inverse)
    n = len(people)
    rng = np.random.default_rng(seed)
    means = [each[rng.integers(n, size=n)].mean() for _ in range(DRAWS)]
    low, high, upper = np.quantile(means, [(1 - level) / 2, (1 + level) / 2, level])
    return {
        "share": float(each.mean()),
        "low": float(low),
        "high": float(high),
        "upper": float(max(upper, 1 - (1 - level) ** (1 / n))),
        "people": n,
    }
