"""Fits a calibration: temperature and bias on validation crops, the spreads tau and sigma.

Everything is cross-fitted by identity with the committed `recipes/dfdc-val-folds.yaml`: the reported
figures come from people whom the fit did not see, the shipped numbers from all of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from detectors.calibration import Calibration, CalibrationKind, Scale
from detectors.training.metrics import calibration_error, log_loss

FOLDS = 5
FOLD_FILE = Path(__file__).parent / "recipes" / "dfdc-val-folds.yaml"
LENGTHS = (1.0, 4.0, 16.0)
"""Effective samples at which a scale is stated. No set here has 100 people on video, so all three are the
one of single crops: a score must not sharpen with length on no evidence (SCIENCE D)."""
NEWTON_STEPS = 50
RIDGE = 1e-6


@dataclass(frozen=True, slots=True)
class Fit:
    """A calibration with the cross-fitted figures that speak for it, ready for JSON."""

    calibration: Calibration
    report: dict[str, Any]


def fit_calibration(
    logits: NDArray[np.floating],
    labels: NDArray[np.int64],
    identity: NDArray[np.int64],
    clip_logits: list[NDArray[np.floating]],
    data: str,
) -> Fit:
    """Fits on validation crops [N] and on the frame logits of each clip's track."""
    weights = balanced_weights(labels, identity)
    folds = fold_of(identity)
    crossed = np.empty(len(logits))
    for fold in range(FOLDS):
        rest = folds != fold
        slope, bias = fit_scale(logits[rest], labels[rest], weights[rest])
        crossed[~rest] = slope * logits[~rest] + bias
    slope, bias = fit_scale(logits, labels, weights)
    authentic = labels == 0
    tau = between_identities(logits[authentic], identity[authentic])
    sigma = within_tracks(clip_logits)
    calibration = Calibration(
        kind=CalibrationKind.SHIPPED,
        scales=tuple(Scale(n, 1 / slope, bias) for n in LENGTHS),
        tau=tau,
        sigma=sigma,
        prevalence=0.5,
        data=data,
    )
    report = {
        "temperature": 1 / slope,
        "bias": bias,
        "tau": tau,
        "sigma": sigma,
        "spread_of_authentic_crops": float(logits[authentic].std()),
        "identities": len(np.unique(identity)),
        "log_loss_raw": log_loss(logits, labels, weights),
        "log_loss_cross_fitted": log_loss(crossed, labels, weights),
        "calibration_error_raw": calibration_error(1 / (1 + np.exp(-logits)), labels, weights),
        "calibration_error_cross_fitted": calibration_error(1 / (1 + np.exp(-crossed)), labels, weights),
    }
    return Fit(calibration, report)


def fit_scale(
    logits: NDArray[np.floating], labels: NDArray[np.int64], weights: NDArray[np.float64]
) -> tuple[float, float]:
    """Slope (1 / temperature) and bias that minimise the weighted LogLoss: Newton's method, two parameters.
    Slope (1 / temperature) and bias that minimise the weighted LogLoss: Newton's method, two parameters."""
    x = np.stack([logits.astype(np.float64), np.ones(len(logits))], axis=1)
    theta = np.array([1.0, 0.0])
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(x @ theta, -50, 50)))
        gradient = x.T @ (weights * (p - labels))
        hessian = (x * (weights * p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        theta -= np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-9:
            break
    if theta[0] <= 0:
        raise ValueError(
            f"calibration: slope {theta[0]:.4f}; the logits rank the classes the wrong way round"
        )
    return float(theta[0]), float(theta[1])


def balanced_weights(labels: NDArray[np.int64], identity: NDArray[np.int64]) -> NDArray[np.float64]:
    """Every person counts the same within a class, and the classes count the same; the mean is 1."""
    weights = np.zeros(len(labels))
    for label in (0, 1):
        of_class = labels == label
        _, inverse, counts = np.unique(identity[of_class], return_inverse=True, return_counts=True)
        each = 1 / counts[inverse]
        weights[of_class] = each / each.sum()
    mean_one: NDArray[np.float64] = weights * len(labels) / weights.sum()
    return mean_one


def between_identities(logits: NDArray[np.floating], identity: NDArray[np.int64]) -> float:
    """Standard deviation between people's means, the part due to few crops of each taken off (one-way
    ANOVA)."""
    groups = [logits[identity == person] for person in np.unique(identity)]
    groups = [group for group in groups if len(group) >= 2]
    if len(groups) < 2:
        raise ValueError("tau: needs two people with two crops each")
    sizes = np.array([len(group) for group in groups], np.float64)
    total = sizes.sum()
    within = sum(float(((g - g.mean()) ** 2).sum()) for g in groups) / (total - len(groups))
    means = np.array([g.mean() for g in groups])
    between = float((sizes * (means - np.average(means, weights=sizes)) ** 2).sum()) / (len(groups) - 1)
    effective = (total - (sizes**2).sum() / total) / (len(groups) - 1)
    return float(np.sqrt(max(0.0, (between - within) / effective)))


def within_tracks(tracks: list[NDArray[np.floating]]) -> float:
    """Standard deviation of a frame's logit about its track's mean, pooled."""
    tracks = [track for track in tracks if len(track) >= 2]
    if not tracks:
        raise ValueError("sigma: needs a clip with two scored frames")
    squares = sum(float(((track - track.mean()) ** 2).sum()) for track in tracks)
    return float(np.sqrt(squares / sum(len(track) - 1 for track in tracks)))


def fold_of(identity: NDArray[np.int64]) -> NDArray[np.int64]:
    """Fold 0..4 of each crop by the committed file; a person it does not know goes by number."""
    known = yaml.safe_load(FOLD_FILE.read_text())
    return np.array([known.get(int(person), int(person) % FOLDS) for person in identity], np.int64)
