"""What an examination of members found, as JSON and as Markdown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from detectors.training import explain, groups, robustness
from detectors.training.explain import Explained
from detectors.training.groups import Check
from detectors.training.robustness import Rate, Row, told

ENSEMBLE = "ensemble"
"""What judges when all members do."""


@dataclass(frozen=True, slots=True)
class Gain:
    """The ensemble's AUC less that of its `best` member, on the same clean crops."""

    best: str
    auc: Rate


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found, by who judged (a member's name, ENSEMBLE); explanations by where masks come from.

    `facts`: crops by class, people, seed, versions and hashes of the members. `gain` is None for one member.
    `shipped`: what the choice of the members rested on, as `detectors.training.ship` wrote it; may be empty.
    """

    facts: Mapping[str, Any]
    robustness: Mapping[str, Sequence[Row]]
    gain: Gain | None
    explanation: Mapping[str, Sequence[Explained]]
    groups: Mapping[str, Sequence[Check]]
    shipped: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything, with null for what is not defined."""
        found: dict[str, Any] = _finite(
            {
                **self.facts,
                "robustness": {
                    judge: [row.to_json() for row in rows] for judge, rows in self.robustness.items()
                },
                "ensemble_over_best_member": asdict(self.gain) if self.gain else None,
                "explanation": {
                    source: [one.to_json() for one in rows] for source, rows in self.explanation.items()
                },
                "groups": {judge: [one.to_json() for one in found] for judge, found in self.groups.items()},
            }
        )
        return found


def markdown(report: Report, judge: str | None = None) -> list[str]:
    """The tables of one judge, or of all, as lines of Markdown with what they rest on."""
    parts = (
        _sets(report, judge),
        _fusion(report, judge),
        _robustness(report, judge),
        _explanation(report, judge),
    )
    return [line for part in parts if part for line in (*part, "")] + _groups(report, judge)


def _sets(report: Report, judge: str | None) -> list[str]:
    """The figures on every set that `shipped.json` brings, for the judges it knows."""
    known = {**report.shipped.get("members", {}), ENSEMBLE: report.shipped.get("ensemble", {})}
    found = {name: figures for name, figures in known.items() if "val" in figures and judge in (None, name)}
    if not found:
        return []
    families = list(dict.fromkeys(family for figures in found.values() for family in figures["strangers"]))
    titles = ["", "validation", *(f"strangers: {family}" for family in families), "clips"]
    lines = [
        "## On every set",
        "",
        "AUC. Strangers are forgeries by generators that no member trained on, of authentic faces held out; "
        "clips are whole videos, few of them. Intervals are 95 % bootstraps over people.",
        "",
        "| " + " | ".join(titles) + " |",
        "|---" * len(titles) + "|",
    ]
    for name, figures in found.items():
        cells = [_auc(figures["val"]), *(_auc(figures["strangers"].get(family)) for family in families)]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{figures['clips_auc']:.3f}"]) + " |")
    point = known[ENSEMBLE].get("operating_point", {}).get("chosen") if judge in (None, ENSEMBLE) else None
    return [*lines, *_operating_point(point)] if point else lines


def _operating_point(point: Mapping[str, Any]) -> list[str]:
    """What the ensemble's thresholds cost people whom they were not fitted on."""
    rates = {
        **{f"false accusations, {source}": rate for source, rate in point["false_accusations"].items()},
        "recall": point["recall"],
        "manipulated called authentic": point["missed"],
        "decided of authentic": point["decided_authentic"],
        "decided of manipulated": point["decided_manipulated"],
    }
    return [
        "",
        "The ensemble's verdicts on single crops of people whom the calibration was not fitted on (five "
        "folds), without the quality gate. Every person counts the same.",
        "",
        "| | share | upper 95 % limit |",
        "|---|---|---|",
        *(
            f"| {name} | {told(Rate(rate['share'], rate['low'], rate['high']))} | {rate['upper']:.3f} |"
            for name, rate in rates.items()
        ),
    ]


def _fusion(report: Report, judge: str | None) -> list[str]:
    """How the rule was chosen, what the ensemble is worth beside its best member, what a cascade loses."""
    found = report.shipped.get(ENSEMBLE, {}).get("fit", {}).get("fusion")
    if not found or judge not in (None, ENSEMBLE):
        return []
    families = list(found["ensemble"]["family_auc"])
    titles = " | ".join(["validation", *(f"strangers: {family}" for family in families)])

    def aucs(row: Mapping[str, Any]) -> str:
        return " | ".join(f"{value:.3f}" for value in (row["val_auc"], *row["family_auc"].values()))

    rules = {
        **{f"{name} alone": row for name, row in found["members"].items()},
        **{f"best of {rule}: {_weights(row)}": row for rule, row in found["rules"].items()},
        f"**chosen**: {found['chosen']['rule']}, {_weights(found['ensemble'])}": found["ensemble"],
    }
    return [
        "## Fusion",
        "",
        "AUC of the members' calibrated logits, fused. The even mean stands unless another rule is better on "
        "the worst family beyond what chance explains.",
        "",
        f"| | {titles} |",
        "|---" * (len(families) + 2) + "|",
        *(f"| {name} | {aucs(row)} |" for name, row in rules.items()),
        "",
        "The ensemble's AUC less that of the best member on each set, paired over people:",
        "",
        "| set | best member | difference |",
        "|---|---|---|",
        *(
            f"| {name} | {row['best_member']} | {row['difference']:+.3f} "
            f"({row['interval'][0]:+.3f} to {row['interval'][1]:+.3f}) |"
            for name, row in found["against_best_member"].items()
        ),
        "",
        f"A cascade: `{found['cascade']['always']}` reads every face, the others those that it suspects.",
        "",
        f"| suspected of authentic faces | read by all, of validation faces | {titles} |",
        "|---" * (len(families) + 3) + "|",
        *(
            f"| {row['suspected']:.0%} | {row['read_by_all']['val']:.0%} | "
            + " | ".join(f"{row['auc'][name]:.3f}" for name in ("val", *families))
            + " |"
            for row in found["cascade"]["rows"]
        ),
    ]


def _weights(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {weight:.2g}" for name, weight in row["weights"].items())


def _auc(figures: Mapping[str, Any] | None) -> str:
    if not figures:
        return ""
    return told(Rate(figures["auc"], *figures["interval"]))


def _robustness(report: Report, judge: str | None) -> list[str]:
    crops = report.facts["crops"]
    lines = [
        "## Worse pictures",
        "",
        f"{crops['authentic']} authentic and {crops['manipulated']} manipulated validation crops of "
        f"{report.facts['people']} people, drawn evenly over people with seed {report.facts['seed']}. Every "
        "condition is applied at the size the face had in its video, and the quality gate judges the result, "
        "as at run time. AUC counts every crop, decided or not. False positives: authentic crops called "
        "manipulated, of all authentic ones. Coverage: crops on which anything is decided. Recall: "
        "manipulated crops called manipulated, of all manipulated ones. One crop is the least there is to "
        "decide on; a stream averages many. In a video the decoder tells the quantiser and the gate "
        "knows it; of a picture nobody tells. Intervals are 95 % bootstraps over people; of what never "
        "happened to n people, the upper limit is 3/n. No network trained on these people, but calibration "
        "and the gate's limits were fitted on them: expect false positives and coverage to be a little worse "
        "on others.",
    ]
    for name, rows in report.robustness.items():
        if judge in (None, name):
            lines += ["", f"**{name}**", "", *robustness.table(rows)]
    if report.gain and judge is None:
        lines += [
            "",
            f"On clean crops the ensemble's AUC less that of its best member, {report.gain.best}: "
            f"{report.gain.auc.value:+.4f} "
            f"({report.gain.auc.low:+.4f} to {report.gain.auc.high:+.4f}), paired.",
        ]
    return lines


def _explanation(report: Report, judge: str | None) -> list[str]:
    shown = {
        source: [one for one in rows if judge in (None, one.name) or one.name in explain.BASELINES]
        for source, rows in report.explanation.items()
    }
    return [
        "## Where the map points",
        "",
        "Pointing game: the map's highest point lies in what was changed. IoU: of the mask and the map, cut "
        "at its own mean and at the level that marks as much as the mask covers. A map that beats neither "
        "the centre of the crop nor no preference at all explains nothing, however it looks.",
        "",
        *explain.table(shown),
    ]


def _groups(report: Report, judge: str | None) -> list[str]:
    return [
        "## Groups",
        "",
        "Clean crops. Thirds by brightness of the inner cheeks among the authentic crops: complexion and "
        "light together, which no picture tells apart. Mean activation of the pooled features and the ratio "
        "between groups after InsideBias: 1 is equal.",
        "",
        *groups.table({name: found for name, found in report.groups.items() if judge in (None, name)}),
    ]


def _finite(value: Any) -> Any:
    """The value with None for what is no number: JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
