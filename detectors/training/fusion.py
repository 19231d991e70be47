"""Which rule and weights fuse the members: chosen on forgeries that none of them trained on (SCIENCE A, F).

The even mean is the published rule and stands unless another one is better on the worst family of strangers
beyond what chance explains: a few hundred people tell no finer, and what is fitted to them is fitted to their
noise. But no rule may cost more than SLACK of validation AUC against the best member; where the even mean
does, the best of those that do not is taken.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detectors.ensemble import LEAST_WEIGHT, Rule
from detectors.training.metrics import auc, bootstrap_by_identity
from detectors.training.people import Looks
from detectors.training.scaling import scale_of

STEP = 0.1
"""Of the weights tried: finer ones cannot be told apart."""

SLACK = 0.005
"""Of validation AUC that fusion may cost against the best member: a constraint, not the aim."""

SUSPECTED = (0.02, 0.05, 0.1, 0.25, 0.5)
"""Shares of authentic faces whose suspicion is followed up, in the account of what a cascade brings."""

DRAWS = 400
"""Bootstrap draws of each difference: its ends are good to a tenth of its width."""


@dataclass(frozen=True, slots=True)
class Panel:
    """The same N faces by every member: raw logits [N] by name, `labels` 1 for manipulated, `identity` a
    number per person."""

    logits: Mapping[str, NDArray[np.floating]]
    labels: NDArray[np.int64]
    identity: NDArray[np.int64]

    def looks(self, logits: NDArray[np.floating]) -> Looks:
        return Looks(logits, self.labels, self.identity)

    def of(self, chosen: NDArray[np.bool_]) -> "Panel":
        """Those that are chosen, a bool [N]."""
        logits = {name: values[chosen] for name, values in self.logits.items()}
        return Panel(logits, self.labels[chosen], self.identity[chosen])


Scales = Mapping[str, tuple[float, float]]
"""Slope and bias by member."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """A rule with its weights by member."""

    rule: Rule
    weights: Mapping[str, float]

    def fused(self, logits: Mapping[str, NDArray[np.floating]], scales: Scales) -> NDArray[np.float64]:
        """As `Ensemble.fuse`, for many faces: raw logits [N] by member in, [N] out."""
        names = list(self.weights)
        scaled = np.array([scales[name][0] * logits[name] + scales[name][1] for name in names], np.float64)
        if self.rule is Rule.MAX:
            highest: NDArray[np.float64] = scaled.max(axis=0)
            return highest
        weights = np.array([self.weights[name] for name in names])
        if self.rule is Rule.MEAN:
            mean: NDArray[np.float64] = weights @ scaled
            return mean
        top = scaled.max(axis=0)
        odds: NDArray[np.float64] = top + np.log(weights @ np.exp(scaled - top))
        return odds


def member_scales(val: Panel) -> dict[str, tuple[float, float]]:
    """Each member's own slope and bias."""
    return {name: scale_of(val.looks(logits)) for name, logits in val.logits.items()}


def choose(val: Panel, strangers: Mapping[str, Panel]) -> tuple[Fusion, dict[str, Any]]:
    """The fusion, and a report: every rule's figures, and the paired difference against the best member.

    `strangers`: by family of forgery, authentic and manipulated faces of both classes that no member trained
    on. Without any, the even mean is taken unasked. Raises ValueError for fewer than two members or a family
    without both classes.
    """
    names = list(val.logits)
    if len(names) < 2 or len(names) * LEAST_WEIGHT > 1:
        raise ValueError(f"members: {names}, expected two to {int(1 / LEAST_WEIGHT)}")
    for family, panel in strangers.items():
        if len(np.unique(panel.labels)) < 2:
            raise ValueError(f"family {family}: expected authentic and manipulated faces")
    scales = member_scales(val)
    even = Fusion(Rule.MEAN, {name: 1 / len(names) for name in names})
    alone = {name: Fusion(Rule.MEAN, {name: 1.0}) for name in names}
    least = max(_auc(val, fusion, scales) for fusion in alone.values()) - SLACK
    tried = [even, *_candidates(names)]
    allowed = [fusion for fusion in tried if _auc(val, fusion, scales) >= least]
    chosen, gain = even, None
    if strangers and allowed:
        best = max(allowed, key=lambda fusion: _worst(strangers, fusion, scales))
        gain = _gain(strangers, best, even, scales)
        if gain[0] > 0 or even not in allowed:
            chosen = best
    rules = {rule: _best_of(rule, [even, *tried], val, strangers, scales) for rule in Rule}
    report = {
        "chosen": {"rule": chosen.rule.value, "weights": dict(chosen.weights)},
        "gain_of_the_best_tried_on_the_worst_family": gain,
        "val_auc_allowed_from": least,
        "rules": {rule.value: _figures(fusion, val, strangers, scales) for rule, fusion in rules.items()},
        "members": {name: _figures(fusion, val, strangers, scales) for name, fusion in alone.items()},
        "ensemble": _figures(chosen, val, strangers, scales),
        "against_best_member": _against_best(chosen, alone, val, strangers, scales),
        "cascade": _cascade(chosen, alone, val, strangers, scales),
    }
    return chosen, report


def _candidates(names: Sequence[str]) -> Iterator[Fusion]:
    spare = round((1 - LEAST_WEIGHT * len(names)) / STEP)
    for shares in product(range(spare + 1), repeat=len(names)):
        if sum(shares) != spare:
            continue
        weights = {n: round(LEAST_WEIGHT + STEP * k, 6) for n, k in zip(names, shares, strict=True)}
        yield Fusion(Rule.MEAN, weights)
        yield Fusion(Rule.LOGSUMEXP, weights)
    yield Fusion(Rule.MAX, {name: 1 / len(names) for name in names})


def _auc(panel: Panel, fusion: Fusion, scales: Scales) -> float:
    return auc(fusion.fused(panel.logits, scales), panel.labels)


def _worst(strangers: Mapping[str, Panel], fusion: Fusion, scales: Scales) -> float:
    return min(_auc(panel, fusion, scales) for panel in strangers.values())


def _gain(
    strangers: Mapping[str, Panel], better: Fusion, base: Fusion, scales: Scales
) -> tuple[float, float]:
    """95 % interval of the difference of their worst families' AUC, people drawn anew in every family."""
    rng = np.random.default_rng(0)
    found = {
        family: (better.fused(panel.logits, scales), base.fused(panel.logits, scales))
        for family, panel in strangers.items()
    }
    people = {
        family: [np.flatnonzero(panel.identity == person) for person in np.unique(panel.identity)]
        for family, panel in strangers.items()
    }
    differences = []
    for _ in range(DRAWS):
        worst = np.ones(2)
        for family, panel in strangers.items():
            groups = people[family]
            drawn = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
            labels = panel.labels[drawn]
            pair = np.array([auc(scores[drawn], labels) for scores in found[family]])
            worst = np.fmin(worst, pair)
        differences.append(worst[0] - worst[1])
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


def _best_of(
    rule: Rule, tried: Sequence[Fusion], val: Panel, strangers: Mapping[str, Panel], scales: Scales
) -> Fusion:
    of_rule = [fusion for fusion in tried if fusion.rule is rule]
    panels = strangers or {"val": val}
    return max(of_rule, key=lambda fusion: _worst(panels, fusion, scales))


def _figures(fusion: Fusion, val: Panel, strangers: Mapping[str, Panel], scales: Scales) -> dict[str, Any]:
    families = {family: _auc(panel, fusion, scales) for family, panel in strangers.items()}
    return {
        "weights": dict(fusion.weights),
        "val_auc": _auc(val, fusion, scales),
        "family_auc": families,
        "worst_family": min(families, key=lambda family: families[family]) if families else None,
    }


def _against_best(
    chosen: Fusion,
    alone: Mapping[str, Fusion],
    val: Panel,
    strangers: Mapping[str, Panel],
    scales: Scales,
) -> dict[str, Any]:
    """Paired AUC differences, ensemble less the best member of each set, with 95 % intervals over people."""
    report = {}
    for name, panel in {"val": val, **strangers}.items():
        member = max(alone, key=lambda one: _auc(panel, alone[one], scales))
        ours = chosen.fused(panel.logits, scales)
        theirs = alone[member].fused(panel.logits, scales)
        low, high = bootstrap_by_identity(
            lambda i, ours=ours, theirs=theirs, labels=panel.labels: (  # type: ignore[misc]
                auc(ours[i], labels[i]) - auc(theirs[i], labels[i])
            ),
            panel.identity,
            draws=DRAWS,
        )
        difference = auc(ours, panel.labels) - auc(theirs, panel.labels)
        report[name] = {"best_member": member, "difference": difference, "interval": [low, high]}
    return report


def _cascade(
    chosen: Fusion,
    alone: Mapping[str, Fusion],
    val: Panel,
    strangers: Mapping[str, Panel],
    scales: Scales,
) -> dict[str, Any]:
    """What is lost when all members read only those faces that the best one on `val` suspects.

    Its own calibrated logit stands for the others. By the share of authentic validation faces that it
    suspects: the share of all faces that everybody reads, and the AUCs.
    """
    first = max(alone, key=lambda name: _auc(val, alone[name], scales))
    cheap = alone[first].fused(val.logits, scales)[val.labels == 0]
    rows = []
    for suspected in SUSPECTED:
        limit = float(np.quantile(cheap, 1 - suspected))

        def judged(panel: Panel, limit: float = limit) -> tuple[float, float]:
            by_first = alone[first].fused(panel.logits, scales)
            followed = by_first > limit
            scores = np.where(followed, chosen.fused(panel.logits, scales), by_first)
            return auc(scores, panel.labels), float(followed.mean())

        found = {name: judged(panel) for name, panel in {"val": val, **strangers}.items()}
        rows.append(
            {
                "suspected": suspected,
                "auc": {name: value for name, (value, _) in found.items()},
                "read_by_all": {name: share for name, (_, share) in found.items()},
            }
        )
    return {"always": first, "rows": rows}
