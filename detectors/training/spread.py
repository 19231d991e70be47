"""How far logits lie apart: between people, within a track, from moment to moment (SCIENCE D)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from detectors.calibration import Autocorrelation, Calibration
from detectors.training.people import Looks, even_weights, share

LEAST_TRACKS = 20
"""Faces on video below which a pooled autocorrelation is not believed: the prudent default stands then."""

LEAST_LENGTH = 8
"""Samples of a track below which it says nothing about the next second."""

LONGEST_LAG = 40
"""Ten seconds at four samples a second: beyond a window of 6 s nothing is asked."""


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


def of_one_look(logits: NDArray[np.floating], identity: NDArray[np.int64]) -> float:
    """Variance of one random look at each person, averaged over all draws."""
    people = len(np.unique(identity))
    if people < 2:
        raise ValueError("tau: needs two people of each class")
    weights = even_weights(identity)
    mean = np.average(logits, weights=weights)
    return float(np.average((logits - mean) ** 2, weights=weights) * people / (people - 1))


def between_tracks(looks: Looks, sigma: float) -> float:
    """tau: standard deviation of a track's logit between people, one track of each.

    The spread of one look at each person less the noise of a look (sigma), the mean over the classes. One
    person's videos differ too, in light, phone and forgery: what a new person brings is both, and the spread
    of people's means alone (`between_identities` of the authentic, below which tau never lies) would promise
    intervals that new people leave too often.
    """
    authentic = looks.labels == 0
    classes = [c for c in (authentic, ~authentic) if c.any()]
    variances = [of_one_look(looks.logits[c], looks.identity[c]) for c in classes]
    least = between_identities(looks.logits[authentic], looks.identity[authentic]) ** 2
    return float(np.sqrt(max(least, float(np.mean(variances)) - sigma**2)))


def within_tracks(tracks: Sequence[NDArray[np.floating]]) -> float:
    """Standard deviation of a frame's logit about its track's mean, pooled."""
    tracks = [track for track in tracks if len(track) >= 2]
    if not tracks:
        raise ValueError("sigma: needs a clip with two scored frames")
    squares = sum(float(((track - track.mean()) ** 2).sum()) for track in tracks)
    return float(np.sqrt(squares / sum(len(track) - 1 for track in tracks)))


def autocorrelation(tracks: Sequence[NDArray[np.floating]], step_s: float) -> Autocorrelation | None:
    """Autocorrelation of one face's logits about its track's mean, pooled over tracks sampled every `step_s`
    seconds, cut before the first that is not positive; None with fewer than LEAST_TRACKS of at least
    LEAST_LENGTH samples.

    What drifts more slowly than a track is long is in its mean, and so in tau, not here.
    """
    centred = [np.asarray(track - track.mean(), np.float64) for track in tracks if len(track) >= LEAST_LENGTH]
    if len(centred) < LEAST_TRACKS:
        return None
    longest = min(LONGEST_LAG, max(len(track) for track in centred) - 1)
    pooled = np.array([_product(centred, lag) for lag in range(longest + 1)])
    rho = np.clip(pooled[1:] / pooled[0], -1.0, 1.0)
    stop = np.flatnonzero(rho <= 0)
    values = rho[: stop[0]] if len(stop) else rho
    return Autocorrelation(step_s, tuple(float(value) for value in values), len(centred))


def interval_coverage(
    calibration: Calibration,
    centres: tuple[float, float],
    looks: Looks,
    level: float = 0.95,
    n_eff: float = 1.0,
) -> dict[str, dict[str, float]]:
    """How often the interval holds what it says, by class: of one random look at each person the share whose
    `Calibration.logit_interval` covers the mean logit of its class.

    `centres` are those means (authentic, manipulated) where the calibration was fitted; `looks` are other
    people. `n_eff`: effective samples behind each logit.
    """
    inside = covered(calibration, centres, looks, level, n_eff)
    found = {}
    for name, label in (("authentic", 0), ("manipulated", 1)):
        of_class = looks.labels == label
        if of_class.any():
            found[name] = share(inside[of_class], looks.identity[of_class])
    return found


def covered(
    calibration: Calibration,
    centres: tuple[float, float],
    looks: Looks,
    level: float,
    n_eff: float = 1.0,
) -> NDArray[np.bool_]:
    """Which looks' intervals cover the mean logit of their class, bool [N]; as in `interval_coverage`."""
    low, high = calibration.logit_interval(0.0, n_eff, level)
    away = np.array(centres)[looks.labels] - looks.logits
    inside: NDArray[np.bool_] = (low <= away) & (away <= high)
    return inside


def centres(looks: Looks) -> tuple[float, float]:
    """Mean logit of authentic and of manipulated faces, every person counting the same."""
    means = []
    for label in (0, 1):
        of_class = looks.labels == label
        means.append(
            float(np.average(looks.logits[of_class], weights=even_weights(looks.identity[of_class])))
        )
    return means[0], means[1]


def independent(rho: Autocorrelation | None) -> float:
    """Independent samples that one frame of a long track is worth, up to 1."""
    return 1 / (1 + 2 * sum(rho.values)) if rho else 1.0


def _product(centred: Sequence[NDArray[np.float64]], lag: int) -> float:
    long = [track for track in centred if len(track) > lag]
    total = sum(float((track[: len(track) - lag] * track[lag:]).sum()) for track in long)
    return total / sum(len(track) - lag for track in long)
