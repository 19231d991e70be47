"""Mondrian conformal sets from looks at people (SCIENCE D; Vovk, Gammerman, Shafer 2005, chapter 4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detectors.calibration import LEVELS, Sets
from detectors.training.people import Looks, even_weights

ALPHA_AUTHENTIC = 0.02
"""Share of authentic faces that may lose their class, and with it the presumption of innocence."""

ALPHA_MANIPULATED = 0.1
"""Share of manipulated faces that may lose theirs: SCIENCE D's default."""


@dataclass(frozen=True, slots=True)
class Placed:
    """p-values of N looks: float [N] each."""

    authentic: NDArray[np.float64]
    manipulated: NDArray[np.float64]

    def excluded(self, sets: Sets) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which looks cannot be authentic, and which cannot be manipulated, at the sets' alphas."""
        return self.authentic <= sets.alpha_authentic, self.manipulated <= sets.alpha_manipulated


def high_table(logits: NDArray[np.floating], identity: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rising logits [99] at which the p-value of a class that scores low falls to .99, .98, ... .01.

    The p-value of x is (1 + the number of people whose random look scores x or more) / (people + 1), averaged
    over all draws of one look at each person: exactly, by counting a look 1/(looks at that person).
    """
    order = np.argsort(-logits, kind="stable")
    people = len(np.unique(identity))
    p = (1 + np.cumsum(even_weights(identity)[order])) / (people + 1)
    levels = np.arange(LEVELS, 0, -1) / (LEVELS + 1)
    at = np.searchsorted(p, levels, side="right")
    table: NDArray[np.float64] = logits[order][np.minimum(at, len(order) - 1)].astype(np.float64)
    return table


def fit_sets(
    looks: Looks,
    further: Sequence[Looks] = (),
    alpha_authentic: float = ALPHA_AUTHENTIC,
    alpha_manipulated: float = ALPHA_MANIPULATED,
) -> Sets:
    """Sets of two classes, by one random look at each person and class.

    So few people that they cannot carry an alpha get the least that they can: 1/(people + 1).
    `further`: authentic faces of other sources, or the same under degradations. A face is told from authentic
    ones only if it would be told from those of every source: at each level the highest logit counts. So the
    rate at which authentic faces lose their class is kept in each source by itself. Raises `CalibrationError`
    when two people of a class are not there.
    """
    authentic = looks.labels == 0
    sources = [looks.of(authentic), *further]
    high = np.max([high_table(source.logits, source.identity) for source in sources], axis=0)
    low = -high_table(-looks.logits[~authentic], looks.identity[~authentic])[::-1]
    people = [len(np.unique(looks.identity[c])) for c in (authentic, ~authentic)]
    return Sets(
        alpha_authentic=max(alpha_authentic, 1 / (people[0] + 1)),
        alpha_manipulated=max(alpha_manipulated, 1 / (people[1] + 1)),
        people_authentic=people[0],
        people_manipulated=people[1],
        authentic=tuple(float(x) for x in high),
        manipulated=tuple(float(x) for x in low),
    )


def place(sets: Sets, logits: NDArray[np.floating]) -> Placed:
    """p-values of many logits, as `Sets` has them one by one."""
    return Placed(
        np.array([sets.p_authentic(float(x)) for x in logits]),
        np.array([sets.p_manipulated(float(x)) for x in logits]),
    )


def joined(parts: Mapping[int, Placed], folds: NDArray[np.int64]) -> Placed:
    """p-values of cross-fitted folds in the order of the looks."""
    out = Placed(np.empty(len(folds)), np.empty(len(folds)))
    for fold, part in parts.items():
        out.authentic[folds == fold], out.manipulated[folds == fold] = part.authentic, part.manipulated
    return out
