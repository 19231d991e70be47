"""Fits a calibration, or an ensemble with its calibration, and says how far to trust it.

Everything is cross-fitted by identity with the committed `recipes/dfdc-val-folds.yaml`: the reported
figures come from people whom the fit did not see, the shipped numbers from all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detectors.calibration import Autocorrelation, Calibration, CalibrationKind, Disagreement, Histogram, Sets
from detectors.ensemble import Ensemble, Part
from detectors.training.conformal import (
    ALPHA_AUTHENTIC,
    ALPHA_MANIPULATED,
    Placed,
    fit_sets,
    joined,
    place,
)
from detectors.training.fusion import Fusion, Panel, choose, member_scales
from detectors.training.metrics import calibration_error, log_loss
from detectors.training.people import (
    FOLDS,
    Looks,
    balanced_weights,
    even_weights,
    fold_of,
    share,
)
from detectors.training.scaling import Track, llr_cost, scales_by_length
from detectors.training.spread import (
    autocorrelation,
    between_identities,
    between_tracks,
    centres,
    covered,
    independent,
    interval_coverage,
    within_tracks,
)

__all__ = [
    "EnsembleFit",
    "Fit",
    "Looks",
    "Panel",
    "fit_calibration",
    "fit_ensemble",
    "interval_coverage",
    "operating_point",
]

STEP_S = 0.25
"""Media seconds between a track's samples: `detectors.training.clips.SAMPLE_S`."""

LEVEL = 0.9
"""Of the interval whose coverage is reported: the default of `verdict.level`."""

OPEN_PROBABILITY = 0.9
"""Probability at which a face is called manipulated: the default of `verdict.open_probability`."""

EVEN = 0.5

ALPHAS = (0.05, 0.04, 0.03, 0.02, 0.01)
"""Shares of authentic faces that may lose their class, tried from the boldest on."""

MOST_FALSE = 0.01
"""Of authentic faces of any source or condition, called manipulated: half of the 2 % that nobody may exceed,
because other people and other cameras are never kinder."""

LEAST_DECIDED = 0.8
"""Of clean faces, called authentic or manipulated: abstaining always is no answer."""

MOST_MISSED = 0.25
"""Of manipulated faces, called authentic: no price in missed forgeries is paid beyond it for deciding."""

CONFLICT_SHARE = 0.98
"""Of calibration faces, on which members contradict each other no more than the limit."""

LEAST_CONFLICT = 1.0
"""Log odds below which nothing is called a contradiction: three to one against three to one the other way."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What people not fitted on got: calibrated logits [N] (log odds), p-values, and whether the interval
    covered; `further` by source of authentic faces."""

    looks: Looks
    calibrated: NDArray[np.float64]
    placed: Placed
    further: Mapping[str, "HeldOut"]

    @property
    def probability(self) -> NDArray[np.float64]:
        p: NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(self.calibrated, -500, 500)))
        return p


@dataclass(frozen=True, slots=True)
class Fit:
    """A calibration with the cross-fitted figures that speak for it, ready for JSON."""

    calibration: Calibration
    report: dict[str, Any]
    held_out: HeldOut


@dataclass(frozen=True, slots=True)
class EnsembleFit:
    """An ensemble, calibration included, with the figures that speak for it, ready for JSON."""

    ensemble: Ensemble
    report: dict[str, Any]
    held_out: HeldOut


@dataclass(frozen=True, slots=True)
class _View:
    """Faces as fused without the people of one fold (or with all of them)."""

    looks: Looks
    further: Mapping[str, Looks]

    def without(self, fold: int) -> "_View":
        return _View(
            self.looks.of(self.looks.folds != fold),
            {name: found.of(found.folds != fold) for name, found in self.further.items()},
        )

    def only(self, fold: int) -> "_View":
        return _View(
            self.looks.of(self.looks.folds == fold),
            {
                name: found.of(found.folds == fold)
                for name, found in self.further.items()
                if (found.folds == fold).any()
            },
        )


def fit_calibration(
    logits: NDArray[np.floating],
    labels: NDArray[np.int64],
    identity: NDArray[np.int64],
    clip_logits: Sequence[NDArray[np.floating]],
    data: str,
    *,
    further: Mapping[str, Looks] | None = None,
    tested_for: Sequence[str] = (),
    reference: Mapping[str, Histogram] | None = None,
) -> Fit:
    """Fits a member's calibration on validation crops [N] and the frame logits of each clip's track.

    Tracks are sampled every STEP_S; they give sigma and, if there are enough of them, the autocorrelation.
    `further`: faces of other sources, or the same people's under degradations, by name, of which the
    authentic are used: the rate of false accusations is kept in each of them too. `reference`: as
    `detectors.drift.reference_histograms` makes it. Raises ValueError for logits that rank the classes the
    wrong way round, and for too few people.
    """
    sources = {name: _authentic(looks) for name, looks in (further or {}).items()}
    view = _View(Looks(logits, labels, identity), sources)
    tracks = [Track(np.asarray(track), 0, number) for number, track in enumerate(clip_logits)]
    fitted = _fit([view] * (FOLDS + 1), tracks, data)
    calibration = replace(fitted.calibration, tested_for=tuple(tested_for), reference=dict(reference or {}))
    return replace(fitted, calibration=calibration)


def fit_ensemble(
    versions: Mapping[str, tuple[str, str]],
    val: Panel,
    strangers: Mapping[str, Panel],
    tracks: Sequence[tuple[Mapping[str, NDArray[np.floating]], int, int]],
    data: str,
    *,
    further: Mapping[str, Panel] | None = None,
    tested_for: Sequence[str] = (),
    reference: Mapping[str, Histogram] | None = None,
) -> EnsembleFit:
    """Fits rule, weights, each member's scale, and the calibration of the fused logit.

    `versions`: version and weights' SHA-256 by member. `val`: validation crops. `strangers`: by family of
    forgery, faces of both classes that no member trained on: rule and weights are chosen on their worst one.
    `tracks`: per clip the frame logits [frames] by member, its label and a number per person. `further`:
    authentic faces of other sources as in `fit_calibration`. Raises ValueError as `choose` and
    `fit_calibration` do.
    """
    fusion, compared = choose(val, strangers)
    authentic = dict(further or {})
    folds = fold_of(val.identity)
    per_fold = [member_scales(val.of(folds != fold)) for fold in range(FOLDS)]
    scales = member_scales(val)
    views = [_view(fusion, found, val, authentic) for found in [*per_fold, scales]]
    fused = [Track(fusion.fused(logits, scales), label, who) for logits, label, who in tracks]
    fitted = _fit(views, fused, data)
    parts = tuple(
        Part(name, *versions[name], fusion.weights[name], 1 / scales[name][0], scales[name][1])
        for name in val.logits
    )
    disagreement = _disagreement(val, scales)
    ensemble = Ensemble(fusion.rule, parts, fitted.calibration)
    calibration = replace(
        fitted.calibration,
        disagreement=disagreement,
        tested_for=tuple(tested_for),
        reference=dict(reference or {}),
        made_for=ensemble.digest,
    )
    report = fitted.report | {"fusion": compared, "disagreement_limit": disagreement.limit}
    return EnsembleFit(replace(ensemble, calibration=calibration), report, fitted.held_out)


def operating_point(
    calibration: Calibration,
    held_out: HeldOut,
    *,
    most_false: float = MOST_FALSE,
    least_decided: float = LEAST_DECIDED,
    open_probability: float = OPEN_PROBABILITY,
) -> tuple[Calibration, dict[str, Any]]:
    """Chooses the sets' alphas, and reports what they cost people whom the calibration was not fitted on.

    `alpha_authentic`: the largest of ALPHAS at which no source of authentic faces has more than `most_false`
    of them called manipulated; that takes a probability too, so fewer are than lose their class.
    `alpha_manipulated`: from .1 on the smallest at which `least_decided` of the faces are decided, every
    person and class counting the same; at most MOST_MISSED.
    The report tells rates with intervals over people, the upper limits among them, and whether both aims are
    met. The rule is that of `stream.verdicts.judge` for a single look. Raises ValueError without sets.
    """
    sets = calibration.sets
    if sets is None:
        raise ValueError("calibration: no conformal sets to choose alphas for")
    pairs = [
        (authentic, manipulated)
        for authentic in ALPHAS
        if authentic >= 1 / (sets.people_authentic + 1)
        for manipulated in np.round(np.arange(ALPHA_MANIPULATED, MOST_MISSED + 0.005, 0.01), 2).tolist()
    ]
    if not pairs:
        raise ValueError(
            f"sets: {sets.people_authentic} people, expected at least 49 for an alpha of {ALPHA_AUTHENTIC}"
        )
    tried = {pair: _rates(_decisions(sets, held_out, *pair, open_probability)) for pair in pairs}
    most_careful = [pair for pair in pairs if pair[0] == pairs[-1][0]]
    just = [pair for pair in pairs if tried[pair][0] <= most_false] or most_careful
    enough = [pair for pair in just if tried[pair][1] >= least_decided]
    chosen = enough[0] if enough else max(just, key=lambda pair: tried[pair][1])
    worst_false, decided = tried[chosen]
    report = {
        "open_probability": open_probability,
        "most_false": most_false,
        "least_decided": least_decided,
        "met": worst_false <= most_false and decided >= least_decided,
        "chosen": _costs(calibration, held_out, *chosen, open_probability),
        "at_default_alphas": _costs(
            calibration, held_out, ALPHA_AUTHENTIC, ALPHA_MANIPULATED, open_probability
        ),
    }
    alphas = replace(sets, alpha_authentic=chosen[0], alpha_manipulated=chosen[1])
    return replace(calibration, sets=alphas), report


def _view(
    fusion: Fusion, scales: Mapping[str, tuple[float, float]], val: Panel, further: Mapping[str, Panel]
) -> _View:
    return _View(
        val.looks(fusion.fused(val.logits, scales)),
        {
            name: _authentic(panel.looks(fusion.fused(panel.logits, scales)))
            for name, panel in further.items()
        },
    )


def _authentic(looks: Looks) -> Looks:
    return looks.of(looks.labels == 0)


def _fit(views: Sequence[_View], tracks: list[Track], data: str) -> Fit:
    """`views`: as fused without the people of fold 0, 1, ..., and with everybody."""
    whole = views[-1]
    rho = autocorrelation([track.logits for track in tracks], STEP_S)
    sigma = within_tracks([track.logits for track in tracks])
    calibration = _calibration(whole, tracks, rho, sigma, data)
    folds = [int(fold) for fold in np.unique(whole.looks.folds)]
    if len(folds) < 2:
        raise ValueError("calibration: expected people of at least two folds")
    fits = {fold: _calibration(views[fold].without(fold), tracks, rho, sigma, data) for fold in folds}
    held_out = _joined([_scored(fits[fold], views[fold], fold) for fold in folds], whole)
    coverage = _coverage(fits, views, whole.looks)
    looks, weights = whole.looks, balanced_weights(whole.looks.labels, whole.looks.identity)
    cllr = llr_cost(held_out.calibrated, looks.labels, weights)
    report = {
        "temperature": calibration.scales[0].temperature,
        "bias": calibration.scales[0].bias,
        "tau": calibration.tau,
        "sigma": sigma,
        "tau_of_peoples_means": between_identities(
            looks.logits[looks.labels == 0], looks.identity[looks.labels == 0]
        ),
        "rho": None if rho is None else {"correlation_s": rho.correlation_s, "tracks": rho.tracks},
        "spread_of_authentic_crops": float(looks.logits[looks.labels == 0].std()),
        "identities": len(np.unique(looks.identity)),
        "log_loss_raw": log_loss(looks.logits, looks.labels, weights),
        "log_loss_cross_fitted": log_loss(held_out.calibrated, looks.labels, weights),
        "calibration_error_raw": calibration_error(1 / (1 + np.exp(-looks.logits)), looks.labels, weights),
        "calibration_error_cross_fitted": calibration_error(held_out.probability, looks.labels, weights),
        "cllr_cross_fitted": cllr,
        "interval": {"level": LEVEL, "covers_cross_fitted": coverage},
        "sets_cross_fitted": _kept(held_out, calibration),
    }
    return Fit(replace(calibration, cllr=cllr), report, held_out)


def _calibration(
    view: _View, tracks: list[Track], rho: Autocorrelation | None, sigma: float, data: str
) -> Calibration:
    return Calibration(
        kind=CalibrationKind.SHIPPED,
        scales=scales_by_length(view.looks, tracks, independent(rho)),
        tau=between_tracks(view.looks, sigma),
        sigma=sigma,
        prevalence=0.5,
        data=data,
        sets=fit_sets(view.looks, list(view.further.values())),
        rho=rho,
    )


def _scored(calibration: Calibration, view: _View, fold: int) -> HeldOut:
    """What the people of a fold get."""
    assert calibration.sets is not None
    here = view.only(fold)
    scale = calibration.scales[0]

    def held(looks: Looks, further: Mapping[str, HeldOut]) -> HeldOut:
        assert calibration.sets is not None
        calibrated = np.asarray(looks.logits, np.float64) / scale.temperature + scale.bias
        return HeldOut(looks, calibrated, place(calibration.sets, looks.logits), further)

    return held(here.looks, {name: held(looks, {}) for name, looks in here.further.items()})


def _joined(parts: Sequence[HeldOut], whole: _View) -> HeldOut:
    return _in_order(
        parts,
        whole.looks,
        {
            name: _in_order([part.further[name] for part in parts if name in part.further], looks, {})
            for name, looks in whole.further.items()
        },
    )


def _in_order(parts: Sequence[HeldOut], looks: Looks, further: Mapping[str, HeldOut]) -> HeldOut:
    """Folds back in the order of the looks."""
    folds = looks.folds
    by_fold = {int(part.looks.folds[0]): part for part in parts}
    calibrated = np.empty(len(folds))
    for fold, part in by_fold.items():
        calibrated[folds == fold] = part.calibrated
    return HeldOut(
        looks, calibrated, joined({fold: part.placed for fold, part in by_fold.items()}, folds), further
    )


def _coverage(
    fits: Mapping[int, Calibration], views: Sequence[_View], looks: Looks
) -> dict[str, dict[str, float]]:
    """Of people not fitted on, the share of looks whose interval covers their class's mean."""
    inside = np.empty(len(looks.labels), bool)
    for fold, calibration in fits.items():
        there = looks.folds == fold
        middle = centres(views[fold].without(fold).looks)
        inside[there] = covered(calibration, middle, views[fold].looks.of(there), LEVEL)
    return {
        name: share(inside[looks.labels == label], looks.identity[looks.labels == label])
        for name, label in (("authentic", 0), ("manipulated", 1))
    }


def _kept(held_out: HeldOut, calibration: Calibration) -> dict[str, dict[str, float]]:
    """Of people not fitted on, the share of looks whose set holds their own class."""
    assert calibration.sets is not None
    not_authentic, not_manipulated = held_out.placed.excluded(calibration.sets)
    labels, identity = held_out.looks.labels, held_out.looks.identity
    kept = {
        "authentic": share(~not_authentic[labels == 0], identity[labels == 0]),
        "manipulated": share(~not_manipulated[labels == 1], identity[labels == 1]),
    }
    for name, source in held_out.further.items():
        kept[name] = share(~source.placed.excluded(calibration.sets)[0], source.looks.identity)
    return kept


@dataclass(frozen=True, slots=True)
class _Decisions:
    """What a rule says of N looks: bool [N] each."""

    looks: Looks
    cleared: NDArray[np.bool_]
    accused: NDArray[np.bool_]
    further: Mapping[str, "_Decisions"]

    def shares(self, of: NDArray[np.bool_], label: int) -> dict[str, float]:
        chosen = self.looks.labels == label
        return share(of[chosen], self.looks.identity[chosen])

    def rate(self, of: NDArray[np.bool_], label: int) -> float:
        chosen = self.looks.labels == label
        return float(np.average(of[chosen], weights=even_weights(self.looks.identity[chosen])))


def _decisions(
    sets: Sets, of: HeldOut, alpha_authentic: float, alpha_manipulated: float, open_probability: float
) -> _Decisions:
    """The rule of `stream.verdicts.judge` for single looks."""
    alphas = alpha_authentic, alpha_manipulated
    not_authentic, not_manipulated = of.placed.excluded(
        replace(sets, alpha_authentic=alpha_authentic, alpha_manipulated=alpha_manipulated)
    )
    return _Decisions(
        of.looks,
        ~not_authentic & not_manipulated & (of.probability < EVEN),
        not_authentic & ~not_manipulated & (of.probability >= open_probability),
        {name: _decisions(sets, source, *alphas, open_probability) for name, source in of.further.items()},
    )


def _rates(found: _Decisions) -> tuple[float, float]:
    """False accusations in the worst source of authentic faces, and the share decided, classes alike."""
    false = [found.rate(found.accused, 0), *(of.rate(of.accused, 0) for of in found.further.values())]
    decided = found.cleared | found.accused
    return max(false), (found.rate(decided, 0) + found.rate(decided, 1)) / 2


def _costs(
    calibration: Calibration,
    held_out: HeldOut,
    alpha_authentic: float,
    alpha_manipulated: float,
    open_probability: float,
) -> dict[str, Any]:
    assert calibration.sets is not None
    found = _decisions(calibration.sets, held_out, alpha_authentic, alpha_manipulated, open_probability)
    worst_false, both = _rates(found)
    decided = found.cleared | found.accused
    reach = calibration.logit_interval(0.0, 1.0, LEVEL)[1] / calibration.scales[0].temperature
    alarming = found.accused & (held_out.calibrated > reach)
    return {
        "alpha_authentic": alpha_authentic,
        "alpha_manipulated": alpha_manipulated,
        "worst_false": worst_false,
        "false_accusations": {
            "val": found.shares(found.accused, 0),
            **{name: of.shares(of.accused, 0) for name, of in found.further.items()},
        },
        "recall": found.shares(found.accused, 1),
        "missed": found.shares(found.cleared, 1),
        "decided": both,
        "decided_authentic": found.shares(decided, 0),
        "decided_manipulated": found.shares(decided, 1),
        "decided_of_further": {
            name: of.shares(of.cleared | of.accused, 0) for name, of in found.further.items()
        },
        "alarms": {
            "level": LEVEL,
            "false": found.shares(alarming, 0),
            "recall": found.shares(alarming, 1),
        },
    }


def _disagreement(val: Panel, scales: Mapping[str, tuple[float, float]]) -> Disagreement:
    """The contradiction that all but a few of the validation faces stay below, people and classes alike."""
    scaled = np.array([slope * val.logits[name] + bias for name, (slope, bias) in scales.items()])
    conflict = np.maximum(0.0, np.minimum(scaled.max(axis=0), -scaled.min(axis=0)))
    weights = balanced_weights(val.labels, val.identity)
    order = np.argsort(conflict)
    at = np.searchsorted(np.cumsum(weights[order]), CONFLICT_SHARE * weights.sum())
    limit = float(conflict[order][min(int(at), len(order) - 1)])
    return Disagreement(
        max(LEAST_CONFLICT, limit), {name: (1 / slope, bias) for name, (slope, bias) in scales.items()}
    )
