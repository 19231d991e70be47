"""Training of the eye-movement machine and of the regression on inside/outside ratios (SCIENCE C 6, E).

Needs scikit-learn (`pip install 'unmask[train]'`) for the support vectors; Platt's sigmoid is fitted on
decisions that were cross-fitted over people, with Platt's own targets.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from detectors.cues.blink import blinks
from detectors.cues.eyes import features
from detectors.cues.ratios import Regression
from detectors.cues.series import FaceSeries
from detectors.cues.svm import Svm

COST = 1.0
"""C of the machine; with some dozens of bursts a search for another would fit the search."""

NEWTON_STEPS = 50
RIDGE = 1.0
"""Of the regression's weights, on standardised ratios: four weights from few bursts."""


def eye_features(series: FaceSeries) -> NDArray[np.float64] | None:
    """Features of one burst as at run time; None where the eyes were not seen open for long enough."""
    found = blinks(series.seconds, series.numbers[:, :2])
    return None if found is None else features(series.seconds, series.numbers, found)


def fit_eyes(x: NDArray[np.float64], y: NDArray[np.int64], person: NDArray[np.int64]) -> Svm:
    """The machine on features x [N, 5], labels y (1 manipulated); both classes weigh the same.

    Raises ValueError with fewer than two people of either class.
    """
    if any(len(np.unique(person[y == label])) < 2 for label in (0, 1)):
        raise ValueError("eyes: fewer than two people in a class; a fit would learn who they are")
    held_out = np.concatenate(_by_person(person))
    decisions = np.concatenate(
        [_decisions(_machine(x[person != p], y[person != p]), x[person == p]) for p in np.unique(person)]
    )
    slope, offset = platt(decisions, y[held_out])
    mean, spread, support, coefficients, gamma, bias = _machine(x, y)
    return Svm(mean, spread, support, coefficients, gamma, bias, slope, offset)


Machine = tuple[
    NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float, float
]


def _by_person(person: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
    return [np.flatnonzero(person == p) for p in np.unique(person)]


def _machine(x: NDArray[np.float64], y: NDArray[np.int64]) -> Machine:
    from sklearn.svm import SVC

    mean, spread = x.mean(axis=0), x.std(axis=0)
    gamma = 1 / x.shape[1]
    if len(np.unique(y)) < 2:
        raise ValueError("eyes: one class only without one of the people; more people are needed")
    made = SVC(C=COST, kernel="rbf", gamma=gamma, class_weight="balanced")
    made.fit((x - mean) / np.maximum(spread, 1e-9), y)
    return mean, spread, made.support_vectors_, made.dual_coef_[0], gamma, float(made.intercept_[0])


def _decisions(machine: Machine, x: NDArray[np.float64]) -> NDArray[np.float64]:
    mean, spread, support, coefficients, gamma, bias = machine
    made = Svm(mean, spread, support, coefficients, gamma, bias, 1.0, 0.0)
    return np.array([made.decision(row) for row in x])


def platt(decisions: NDArray[np.float64], y: NDArray[np.int64]) -> tuple[float, float]:
    """Slope and offset of the log odds, by Newton's method on Platt's smoothed targets; a decision that ranks
    the wrong way round gets slope 0: it says nothing."""
    positives, negatives = int((y == 1).sum()), int((y == 0).sum())
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    x = np.stack([decisions, np.ones(len(decisions))], axis=1)
    weights = np.where(y == 1, 1 / max(positives, 1), 1 / max(negatives, 1)) * len(y) / 2
    theta = _newton(x, target, weights, np.zeros(2))
    return (float(theta[0]), float(theta[1])) if theta[0] > 0 else (0.0, 0.0)


def fit_ratios(x: NDArray[np.float64], y: NDArray[np.int64]) -> Regression:
    """The regression on log ratios x [N, 4], both classes weighing the same."""
    mean, spread = x.mean(axis=0), x.std(axis=0)
    scaled = np.concatenate([(x - mean) / np.maximum(spread, 1e-9), np.ones((len(x), 1))], axis=1)
    counts = np.bincount(y, minlength=2)
    weights = len(y) / 2 / np.maximum(counts[y], 1)
    theta = _newton(scaled, y.astype(np.float64), weights, np.array([RIDGE] * x.shape[1] + [0.0]))
    *found, bias = theta.tolist()
    return Regression(tuple(mean.tolist()), tuple(spread.tolist()), tuple(found), bias)


def _newton(
    x: NDArray[np.float64],
    target: NDArray[np.float64],
    weights: NDArray[np.float64],
    ridge: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Weighted logistic regression with a ridge per column."""
    theta = np.zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(x @ theta, -50, 50)))
        gradient = x.T @ (weights * (p - target)) + ridge * theta
        hessian = (x * (weights * p * (1 - p))[:, None]).T @ x + np.diag(ridge + 1e-6)
        step = np.clip(np.linalg.solve(hessian, gradient), -2, 2)
        theta -= step
        if np.abs(step).max() < 1e-9:
            break
    return theta
