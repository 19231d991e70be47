"""What a calibration found, for people: report.md, report.json and pictures."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stream.calibrate import PERSON_HOURS, Calibrated, Unreadable, Watched, left_out, lines
from stream.curves import Floats, Truth
from stream.footage import Footage
from stream.ladder import LOOSER

BINS = 10
"""Of the reliability diagram."""


def write_report(
    folder: Path, found: Calibrated, footage: Footage, unreadable: Sequence[Unreadable], sha256: str
) -> list[Path]:
    """Write report.md, report.json, operating_point.png and, with manipulated footage, reliability.png."""
    folder.mkdir(parents=True, exist_ok=True)
    reliability = reliability_of(found.watched)
    pictures = [_picture(folder / "operating_point.png", lambda axes: _draw_curve(axes, found))]
    if reliability is not None:
        pictures.append(
            _picture(folder / "reliability.png", lambda axes: _draw_reliability(axes, reliability))
        )
    summary, text = folder / "report.json", folder / "report.md"
    record = _record(found, footage, unreadable, sha256, reliability)
    summary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    told = [*_markdown(found, footage, unreadable, sha256, reliability), *_shown(pictures)]
    text.write_text("\n".join(told) + "\n", encoding="utf-8")
    return [text, summary, *pictures]


def reliability_of(watched: Sequence[Watched]) -> Mapping[str, Any] | None:
    """Return how often what was called so and so likely was manipulated; None without both classes.

    Over the verdict records of every video that could be judged, under the settings in effect. Both classes
    weigh the same, and within a class every person. `gap` is the mean distance of probability and share
    (expected calibration error), bins by weight.
    """
    truth, scores, weights = _spoken(watched)
    if not truth.any() or truth.all():
        return None
    of_bin = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    bins: list[dict[str, float]] = []
    for index in range(BINS):
        inside = of_bin == index
        if not inside.any():
            continue
        total = float(weights[inside].sum())
        bins.append(
            {
                "probability": float(weights[inside] @ scores[inside]) / total,
                "manipulated": float(weights[inside] @ truth[inside]) / total,
                "weight": total,
                "records": int(inside.sum()),
            }
        )
    gap = sum(found["weight"] * abs(found["probability"] - found["manipulated"]) for found in bins)
    return {"bins": bins, "gap": gap, "records": len(scores)}


def _spoken(watched: Sequence[Watched]) -> tuple[Truth, Floats, Floats]:
    """Return truth, probability and weight of each verdict record; the weights of all add up to 1."""
    people: dict[tuple[bool, str], list[float]] = {}
    for item in watched:
        if item.seen.good_s <= 0:
            continue
        spoken = people.setdefault((item.file.manipulated, item.file.person), [])
        spoken += item.outcomes[LOOSER].probabilities
    people = {key: spoken for key, spoken in people.items() if spoken}
    sizes = {truth: sum(key[0] is truth for key in people) for truth in (False, True)}
    rows = [
        (truth, score, 0.5 / sizes[truth] / len(spoken))
        for (truth, _), spoken in people.items()
        for score in spoken
    ]
    truths, scores, weights = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(truths, np.bool_), np.array(scores, np.float64), np.array(weights, np.float64)


def _record(
    found: Calibrated,
    footage: Footage,
    unreadable: Sequence[Unreadable],
    sha256: str,
    reliability: Mapping[str, Any] | None,
) -> dict[str, Any]:
    return {
        "schema": 1,
        "calibration_sha256": sha256,
        "operating_point": found.point.model_dump(mode="json"),
        "rungs": _rungs(found),
        "reliability": reliability,
        "left_out": left_out(footage, unreadable, found.watched),
        "videos": [
            {
                "path": str(item.file.path),
                "sha256": item.file.sha256,
                "person": item.file.person,
                "manipulated": item.file.manipulated,
                **asdict(item.seen),
                "incidents": [outcome.alarms for outcome in item.outcomes],
                "first_incident_us": item.outcomes[found.choice.rung].first_us,
            }
            for item in found.watched
        ],
    }


def _rungs(found: Calibrated) -> list[dict[str, Any]]:
    evidence = found.evidence
    return [
        {
            **asdict(rung),
            "alarms": evidence.alarms[index],
            "false_alarms_per_hour": evidence.weighted[index] / evidence.effective_hours,
            "bound_per_hour": found.bounds[index],
            "recall": evidence.recall[index] if evidence.recall else None,
            "in_effect_before": index == LOOSER,
            "chosen": index == found.choice.rung,
        }
        for index, rung in enumerate(found.rungs)
    ]


def _markdown(
    found: Calibrated,
    footage: Footage,
    unreadable: Sequence[Unreadable],
    sha256: str,
    reliability: Mapping[str, Any] | None,
) -> list[str]:
    told = [
        "# Calibration on own footage",
        "",
        *(f"- {line.strip()}" for line in lines(found, footage, unreadable)),
        f"- SHA-256 of the calibration file: `{sha256}`",
        "",
        "## What holds, and what does not",
        "",
        "- The limits are upper 95 % limits of a Poisson rate, for the thresholds in bold. A person counts "
        f"for at most {PERSON_HOURS:g} h, however long he was watched.",
        "- They hold for feeds like this footage: its people, cameras, light, codecs. A new studio is new.",
        "- The settings were tried from the strictest to the most eager, in an order fixed before, and the "
        "first that failed was the end: so the limit needs no correction for having tried many.",
        "- Hours count only while a face was seen well enough to be judged.",
        "",
        "## Settings tried",
        "",
        "| open at | close below | hold s | track s | false alarms | an hour | at most | found |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in _rungs(found):
        mark = "**" if row["chosen"] else ""
        recall = "" if row["recall"] is None else f"{row['recall']:.0%}"
        told.append(
            f"| {mark}{row['open_probability']:g}{mark}{' (as set)' if row['in_effect_before'] else ''} "
            f"| {row['close_probability']:g} | {row['open_hold_s']:g} | {row['min_track_s']:g} "
            f"| {row['alarms']} | {row['false_alarms_per_hour']:.3g} | {row['bound_per_hour']:.3g} "
            f"| {recall} |"
        )
    if reliability is not None:
        told += [
            "",
            f"Probabilities are off by {reliability['gap']:.3f} on average over {reliability['records']} "
            "verdicts, every person weighing the same and half of all supposed manipulated.",
        ]
    return told


def _shown(pictures: Sequence[Path]) -> list[str]:
    return ["", *(f"![{path.stem.replace('_', ' ')}]({path.name})" for path in pictures)]


def _picture(path: Path, draw: Callable[[Any], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    draw(figure.add_subplot())
    figure.savefig(path, dpi=120)
    return path


def _draw_curve(axes: Any, found: Calibrated) -> None:
    """Draw false alarms an hour, counted and at most, against recall, or against the threshold without it."""
    rows, chosen = _rungs(found), found.choice.rung
    recall = found.evidence.recall
    across = list(recall) if recall else [rung.open_probability for rung in found.rungs]
    bounds = [row["bound_per_hour"] for row in rows]
    axes.plot(across, bounds, marker="o", label="at most (95 %)")
    axes.plot(across, [row["false_alarms_per_hour"] for row in rows], marker=".", label="counted")
    axes.plot([across[chosen]], [bounds[chosen]], "o", ms=12, mfc="none", color="black", label="chosen")
    axes.axhline(found.point.false_alarms_per_hour, color="grey", linestyle=":", label="wanted")
    axes.set_yscale("symlog", linthresh=found.point.false_alarms_per_hour)
    axes.set_ylim(0, 3 * max(bounds))
    axes.set_xlabel("share of manipulated videos found" if recall else "open_probability")
    axes.set_ylabel("false alarms an hour")
    axes.set_title("Every rung of the ladder")
    axes.legend()


def _draw_reliability(axes: Any, reliability: Mapping[str, Any]) -> None:
    bins = reliability["bins"]
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.scatter(
        [found["probability"] for found in bins],
        [found["manipulated"] for found in bins],
        [20 + 400 * found["weight"] for found in bins],
    )
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("probability said")
    axes.set_ylabel("share that was manipulated")
    axes.set_title(f"Reliability, mean gap {reliability['gap']:.3f} (area: weight)")
