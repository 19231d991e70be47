"""Temperature and bias (Guo et al., "On Calibration of Modern Neural Networks"), and what they are worth."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detectors.calibration import Scale
from detectors.training.people import Looks, balanced_weights

LENGTHS = (1.0, 4.0, 16.0)
"""Effective samples at which a scale is stated."""

PEOPLE_TO_SHARPEN = 100
"""People on video below which a score may not sharpen with length (SCIENCE D)."""

NEWTON_STEPS = 50
RIDGE = 1e-6


@dataclass(frozen=True, slots=True)
class Track:
    """Logits [frames] of one face on video, evenly spaced; `label` 1 for manipulated, `identity` a number per
    person."""

    logits: NDArray[np.floating]
    label: int
    identity: int


def fit_scale(
    logits: NDArray[np.floating], labels: NDArray[np.int64], weights: NDArray[np.float64]
) -> tuple[float, float]:
    """Slope (1 / temperature) and bias that minimise the weighted LogLoss: Newton's method, two parameters.

    Raises ValueError for logits that rank the classes the wrong way round.
    """
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


def scale_of(looks: Looks) -> tuple[float, float]:
    """Slope and bias with every person and class weighing the same."""
    return fit_scale(looks.logits, looks.labels, balanced_weights(looks.labels, looks.identity))


def scales_by_length(looks: Looks, tracks: list[Track], effective: float) -> tuple[Scale, ...]:
    """A scale for each of LENGTHS: that of single looks, unless PEOPLE_TO_SHARPEN people on video say more.

    `effective`: independent samples that one frame of a track is worth (1 or less). At each length the means
    of so many frames are fitted, every person weighing the same; fewer people, or one class only, and one
    scale stands for every length, so that no score sharpens by being looked at for longer.
    """
    slope, bias = scale_of(looks)
    if len({track.identity for track in tracks}) < PEOPLE_TO_SHARPEN or len({t.label for t in tracks}) < 2:
        return tuple(Scale(length, 1 / slope, bias) for length in LENGTHS)
    scales = [Scale(LENGTHS[0], 1 / slope, bias)]
    for length in LENGTHS[1:]:
        blocks = [_means(track, max(1, round(length / effective))) for track in tracks]
        found = [(track, block) for track, block in zip(tracks, blocks, strict=True) if len(block)]
        if len({track.identity for track, _ in found}) < PEOPLE_TO_SHARPEN:
            scales.append(Scale(length, scales[-1].temperature, scales[-1].bias))
            continue
        slope, bias = scale_of(
            Looks(
                np.concatenate([block for _, block in found]),
                np.concatenate([np.full(len(block), track.label) for track, block in found]),
                np.concatenate([np.full(len(block), track.identity) for track, block in found]),
            )
        )
        scales.append(Scale(length, 1 / slope, bias))
    return tuple(scales)


def llr_cost(
    llr: NDArray[np.floating], labels: NDArray[np.int64], weights: NDArray[np.float64] | None = None
) -> float:
    """Cllr in bits (Brummer and du Preez, "Application-independent evaluation of speaker detection"): 0 for
    perfect likelihood ratios (`llr` their natural logarithms), 1 for those that say nothing, more for worse.
    """
    weights = np.ones(len(labels)) if weights is None else weights
    cost = np.logaddexp(0, np.where(labels == 1, -llr, llr)) / np.log(2)
    return float(np.mean([np.average(cost[labels == k], weights=weights[labels == k]) for k in (0, 1)]))


def _means(track: Track, frames: int) -> NDArray[np.float64]:
    whole = len(track.logits) // frames
    blocks: NDArray[np.float64] = (
        np.asarray(track.logits[: whole * frames], np.float64).reshape(whole, frames).mean(axis=1)
    )
    return blocks
