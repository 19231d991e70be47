"""What a trained member is worth: on validation people, by band, on authentic faces of other sources, on
clips."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detectors.calibration import Calibration
from detectors.training.data import Faces
from detectors.training.metrics import auc, bootstrap_by_identity, log_loss

WIDTH_BANDS = (0, 100, 140, 200, 10_000)
"""Pixels of the face before the data set's resizing: edges between the steps its face detector came in."""
BRIGHTNESS_BANDS = (0, 60, 90, 120, 256)
"""Mean luma: dark, dim, normal, bright."""
THRESHOLDS = (0.5, 0.8, 0.9, 0.95)
"""Calibrated probabilities at which alarms are counted."""
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, slots=True)
class ClipScore:
    """`logits` float32 [frames with a face] of one clip; `sampled` counts the frames looked at."""

    name: str
    logits: NDArray[np.floating]
    sampled: int


def evaluate(
    logits: NDArray[np.floating],
    faces: Faces,
    calibration: Calibration,
    authentic: dict[str, NDArray[np.floating]],
    clips: dict[str, list[ClipScore]],
) -> dict[str, Any]:
    """All figures of the model card, ready for JSON.

    `logits` [N] of `faces`; `authentic`: logits by source of faces that never trained; `clips`: by class.
    """
    brightness = mean_luma(faces)
    return {
        "crops": len(logits),
        "identities": len(np.unique(faces.identity)),
        "overall": _band(logits, faces, np.ones(len(logits), bool)),
        "by_source_width": _bands(logits, faces, faces.source_width, WIDTH_BANDS),
        "by_brightness": _bands(logits, faces, brightness, BRIGHTNESS_BANDS),
        "at_threshold": [_operating_point(logits, faces, calibration, p) for p in THRESHOLDS],
        "same_pair_order": _pairs_in_order(logits, faces),
        "false_alarms": {
            source: {"faces": len(values)} | _alarms(values, calibration)
            for source, values in authentic.items()
        },
        "clips": {label: [_clip(clip, calibration) for clip in found] for label, found in clips.items()},
        "shortcut_auc": shortcut(faces),
    }


def mean_luma(faces: Faces) -> NDArray[np.float64]:
    """Mean brightness of each crop, 0..255."""
    return np.array([image.mean(axis=(0, 1)) @ LUMA for image in faces.images])


def shortcut(faces: Faces) -> dict[str, float]:
    """AUC, cross-fitted by identity, of a logistic regression on what has nothing to do with manipulation."""
    colour = np.array([image.mean(axis=(0, 1)) for image in faces.images]) / 255
    size = np.log(faces.file_bytes)[:, None]
    return {
        "file_size": _regression_auc(size, faces),
        "mean_colour": _regression_auc(colour, faces),
        "both": _regression_auc(np.concatenate([size, colour], axis=1), faces),
    }


def _regression_auc(features: NDArray[np.floating], faces: Faces) -> float:
    x = (features - features.mean(axis=0)) / features.std(axis=0)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    folds, scores = faces.identity % 5, np.empty(len(x))
    for fold in range(5):
        rest = folds != fold
        theta = np.zeros(x.shape[1])
        for _ in range(20):
            p = 1 / (1 + np.exp(-x[rest] @ theta))
            hessian = (x[rest] * (p * (1 - p))[:, None]).T @ x[rest] + 1e-3 * np.eye(x.shape[1])
            theta -= np.linalg.solve(hessian, x[rest].T @ (p - faces.labels[rest]))
        scores[~rest] = x[~rest] @ theta
    return auc(scores, faces.labels)


def _band(logits: NDArray[np.floating], faces: Faces, inside: NDArray[np.bool_]) -> dict[str, Any]:
    scores, labels = logits[inside], faces.labels[inside]
    low, high = bootstrap_by_identity(lambda i: auc(scores[i], labels[i]), faces.identity[inside])
    return {
        "crops": int(inside.sum()),
        "auc": auc(scores, labels),
        "auc_interval": [low, high],
        "log_loss": log_loss(scores, labels),
    }


def _bands(
    logits: NDArray[np.floating], faces: Faces, values: NDArray[Any], edges: Iterable[int]
) -> list[dict[str, Any]]:
    edges = tuple(edges)
    bands = []
    for low, high in pairwise(edges):
        inside = (values >= low) & (values < high)
        if len(np.unique(faces.labels[inside])) == 2:
            bands.append({"from": low, "below": high} | _band(logits, faces, inside))
    return bands


def _probabilities(logits: NDArray[np.floating], calibration: Calibration) -> NDArray[np.float64]:
    return np.array([calibration.probability(float(logit)) for logit in logits])


def _operating_point(
    logits: NDArray[np.floating], faces: Faces, calibration: Calibration, threshold: float
) -> dict[str, Any]:
    alarm = _probabilities(logits, calibration) > threshold
    real = faces.labels == 0
    low, high = bootstrap_by_identity(lambda i: float(alarm[i][real[i]].mean()), faces.identity)
    return {
        "probability": threshold,
        "false_positive_rate": float(alarm[real].mean()),
        "false_positive_interval": [low, high],
        "recall": float(alarm[~real].mean()),
    }


def _pairs_in_order(logits: NDArray[np.floating], faces: Faces) -> float:
    """Share of pairs in which the manipulated crop scores above its own original."""
    pairs = faces.pairs()
    return float((logits[pairs[:, 1]] > logits[pairs[:, 0]]).mean())


def _alarms(logits: NDArray[np.floating], calibration: Calibration) -> dict[str, float]:
    p = _probabilities(logits, calibration)
    return {f"above_{threshold}": float((p > threshold).mean()) for threshold in THRESHOLDS}


def _clip(clip: ClipScore, calibration: Calibration) -> dict[str, Any]:
    if not len(clip.logits):
        return {"name": clip.name, "sampled": clip.sampled, "faces": 0}
    mean = float(clip.logits.mean())
    return {
        "name": clip.name,
        "sampled": clip.sampled,
        "faces": len(clip.logits),
        "mean_logit": mean,
        "frame_spread": float(clip.logits.std()),
        "probability": calibration.probability(mean, len(clip.logits)),
    } | _alarms(clip.logits, calibration)
