"""Which cues have a say: `python -m detectors.training.cues --data DIR --cache DIR --out DIR`.

Each cue is set beside the ensemble on forgeries by generators that no member trained on: Platt scaling and
weight are fitted on four fifths of the people and judged on the last. A cue enters `detectors/late.json` only
if the mean AUC over the families rises by an interval (paired, over people) that excludes 0, if no family
falls beyond chance, and if all that enter together cost no more than a fifth of the ensemble's time. The
table stays, for those left out too.

What can be read from a single crop is read here. Cues over time come as files of readings (`--readings`,
`Readings.from_json`), since they need video.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detectors import late
from detectors.cues import NAMES, Cue
from detectors.cues.benford import read_still
from detectors.ensemble import load_ensemble
from detectors.late import MOST, MOST_TOTAL, Late, Weighed
from detectors.members import Member, list_members, load_member
from detectors.mtcnn import MtcnnDetector
from detectors.readings import Image
from detectors.reference import reference_crops, reference_face
from detectors.training.data import DataError
from detectors.training.metrics import auc, bootstrap_by_identity
from detectors.training.people import FOLDS, balanced_weights, fold_of, share
from detectors.training.scaling import fit_scale
from detectors.training.ship import EACH_STRANGER, read_strangers
from detectors.training.strangers import stranger_pairs
from engines.engine import Network, Plan, build

logger = logging.getLogger(__name__)

CROP_CUES: Mapping[str, Callable[[Image], Cue]] = {
    "benford": lambda crop: read_still(crop, (0.0, 0.0, float(crop.shape[1]), float(crop.shape[0])))
}
"""Cues that a single crop is enough for."""

WEIGHTS = (0.25, 0.5, 1.0)
"""Of a cue's own log odds. Cues and networks look at the same face: were all added whole, what both see would
count twice."""

LEAST_PEOPLE = 50
"""People on whom a cue must have a number before it can enter: with fewer, an interval that excludes 0 is
more often luck than not being so."""

FALSE_RATE = 0.02
"""The operating point: the ensemble's threshold at which this share of authentic looks lies above."""

MOST_COST = 0.2
"""Of the ensemble's time per face, for all cues that enter together."""

BATCHES = 7
"""Batches timed of each member."""

DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Readings:
    """Looks that the ensemble and cues read, of length N: `family` who made the forgery (its authentic looks
    carry it too), `labels` 1 for manipulated, `identity` a number per person, `fused` calibrated logits,
    `cues` by name, NaN where one is missing. `milliseconds` of a look: by cue, and of the `ensemble`.

    Raises DataError when they do not match, or for an unknown cue.
    """

    family: NDArray[np.str_]
    labels: NDArray[np.int64]
    identity: NDArray[np.int64]
    fused: NDArray[np.float64]
    cues: Mapping[str, NDArray[np.float64]]
    milliseconds: Mapping[str, float]

    def __post_init__(self) -> None:
        columns = (self.family, self.labels, self.identity, self.fused, *self.cues.values())
        if len({len(column) for column in columns}) > 1 or not len(self.labels):
            raise DataError(
                f"readings: columns of {[len(c) for c in columns]} looks, expected one number of them"
            )
        unknown = sorted(set(self.cues) - set(NAMES))
        if unknown:
            raise DataError(f"readings: cue {unknown[0]} is unknown; there are: {', '.join(NAMES)}")
        if not np.isfinite(self.fused).all():
            raise DataError("readings: a fused logit is not finite")

    def to_json(self) -> dict[str, Any]:
        """The readings as a file holds them; null for a cue that is missing."""
        looks = [
            {
                "family": str(self.family[k]),
                "label": int(self.labels[k]),
                "identity": int(self.identity[k]),
                "fused": float(self.fused[k]),
                "cues": {n: float(v[k]) if np.isfinite(v[k]) else None for n, v in self.cues.items()},
            }
            for k in range(len(self.labels))
        ]
        return {"milliseconds": dict(self.milliseconds), "looks": looks}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Readings":
        """What `to_json` wrote. Raises DataError for anything else."""
        try:
            looks = record["looks"]
            names = dict.fromkeys(name for look in looks for name in look["cues"])
            return cls(
                family=np.array([str(look["family"]) for look in looks]),
                labels=np.array([int(look["label"]) for look in looks], np.int64),
                identity=np.array([int(look["identity"]) for look in looks], np.int64),
                fused=np.array([float(look["fused"]) for look in looks]),
                cues={name: np.array([_number(look["cues"].get(name)) for look in looks]) for name in names},
                milliseconds={name: float(ms) for name, ms in record["milliseconds"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"readings: {error!r}; expected milliseconds and looks") from error


def _number(value: Any) -> float:
    return np.nan if value is None else float(value)


@dataclass(frozen=True, slots=True)
class Row:
    """What one cue does beside the ensemble, on the looks that it could read. `gain` of AUC and `interval` by
    family and as their `mean`; `false` and `found`: share of authentic and of manipulated looks above the
    ensemble's threshold, [without, with]; `reason` why the cue is left out, empty when it enters."""

    name: str
    looks: int
    people: int
    missing: float
    auc: dict[str, list[float]]
    gain: dict[str, dict[str, Any]]
    false: list[float]
    found: list[float]
    milliseconds: float
    share_of_ensemble: float
    reason: str


def platt(
    values: NDArray[np.float64], labels: NDArray[np.int64], identity: NDArray[np.int64]
) -> tuple[float, float]:
    """Slope and bias of a cue's log odds, every person and class weighing the same; the slope may be below 0.

    The values are standardised on the way, since Newton's method wants numbers about 1.
    """
    mean, spread = float(values.mean()), float(values.std()) or 1.0
    weights = balanced_weights(labels, identity)
    standard = (values - mean) / spread
    try:
        slope, bias = fit_scale(standard, labels, weights)
    except ValueError:
        slope, bias = fit_scale(-standard, labels, weights)
        slope = -slope
    return slope / spread, bias - slope * mean / spread


def weighed(name: str, readings: Readings, rows: NDArray[np.bool_], measured: Mapping[str, Any]) -> Weighed:
    """The cue as fusion would hold it, fitted on those of the given looks that it has read: Platt scaling
    and the weight under which the mean AUC over families is highest."""
    rows = rows & np.isfinite(readings.cues[name])
    values, labels = readings.cues[name][rows], readings.labels[rows]
    slope, bias = platt(values, labels, readings.identity[rows])
    candidates = [Weighed(name, slope, bias, weight, MOST, measured) for weight in WEIGHTS]
    return max(candidates, key=lambda cue: _mean_auc(readings, _moved(readings, Late((cue,))), rows))


def examined(name: str, readings: Readings) -> Row:
    """One cue beside the ensemble, cross-fitted over five folds of people."""
    there = np.isfinite(readings.cues[name])
    ms = readings.milliseconds.get(name, float("nan"))
    cost = ms / readings.milliseconds["ensemble"]
    missing = float(1 - there.mean())
    people = len(np.unique(readings.identity[there]))
    blank: dict[str, Any] = {
        "name": name,
        "looks": int(there.sum()),
        "people": people,
        "missing": missing,
        "milliseconds": ms,
        "share_of_ensemble": cost,
    }
    if people < LEAST_PEOPLE:
        reason = f"read {people} people, {LEAST_PEOPLE} are needed"
        return Row(**blank, auc={}, gain={}, false=[], found=[], reason=reason)
    return compared(blank, readings, crossed([name], readings), there)


def crossed(names: Sequence[str], readings: Readings) -> NDArray[np.float64]:
    """Fused logits with the cues' shifts, each look by a fusion fitted on other people."""
    fold = fold_of(readings.identity)
    out = readings.fused.copy()
    for held in range(FOLDS):
        fusion = Late(
            tuple(weighed(name, readings, fold != held, {"fold": held}) for name in names), MOST_TOTAL
        )
        rows = fold == held
        out[rows] = _moved(readings, fusion)[rows]
    return out


def compared(
    blank: Mapping[str, Any], readings: Readings, moved: NDArray[np.float64], there: NDArray[np.bool_]
) -> Row:
    """What the shift does to the looks that are there, and whether that lets it in."""
    labels, identity = readings.labels[there], readings.identity[there]
    old, new, family = readings.fused[there], moved[there], readings.family[there]
    names = [str(one) for one in np.unique(family)]

    def gains(rows: NDArray[np.integer]) -> dict[str, float]:
        return {
            one: auc(new[chosen], labels[chosen]) - auc(old[chosen], labels[chosen])
            for one in names
            if len(chosen := rows[family[rows] == one])
        }

    everything = np.arange(len(labels))
    gain: dict[str, dict[str, Any]] = {}
    measures: dict[str, Callable[[NDArray[np.integer]], float]] = {
        one: partial(lambda one, rows: gains(rows).get(one, float("nan")), one) for one in names
    }
    measures["mean"] = lambda rows: _mean(gains(rows).values())
    for one, measure in measures.items():
        low, high = bootstrap_by_identity(measure, identity, draws=DRAWS)
        gain[one] = {"gain": measure(everything), "interval": [low, high]}
    threshold = float(np.quantile(old[labels == 0], 1 - FALSE_RATE))
    above = [_above(logits, threshold, labels, identity) for logits in (old, new)]
    fallen = [one for one in names if gain[one]["interval"][1] < 0]
    reason = "" if low > 0 else f"the gain's interval {low:+.4f} to {high:+.4f} does not exclude 0"
    if not reason and fallen:
        reason = f"worse on {', '.join(fallen)} beyond chance"
    return Row(
        **blank,
        auc={
            one: [auc(logits[family == one], labels[family == one]) for logits in (old, new)] for one in names
        },
        gain=gain,
        false=[false for false, _ in above],
        found=[found for _, found in above],
        reason=reason,
    )


def decide(readings: Sequence[Readings]) -> tuple[Late, list[Row]]:
    """The fusion of those that enter, fitted on everybody, and a row for each cue; a last row, `together`, of
    what they do at once, if they are several. A cue comes from the first readings that know it."""
    rows: list[Row] = []
    entered: list[tuple[str, Readings, Row]] = []
    for one in readings:
        for name in one.cues:
            if name in {row.name for row in rows}:
                raise DataError(f"readings: cue {name} comes from two files; once is right")
            rows.append(examined(name, one))
            if not rows[-1].reason:
                entered.append((name, one, rows[-1]))
    entered.sort(key=lambda item: -item[2].gain["mean"]["gain"])
    cues, spent = [], 0.0
    for name, one, row in entered:
        spent += row.share_of_ensemble
        if spent <= MOST_COST:
            everybody = np.ones(len(one.labels), np.bool_)
            cues.append(weighed(name, one, everybody, asdict(row)))
            continue
        spent -= row.share_of_ensemble
        reason = f"costs {row.share_of_ensemble:.0%} of the ensemble's time, {MOST_COST - spent:.0%} are left"
        rows[rows.index(row)] = Row(**{**asdict(row), "reason": reason})
    return Late(tuple(cues), MOST_TOTAL), rows


def to_file(fusion: Late, rows: Iterable[Row]) -> dict[str, Any]:
    """What `late.json` holds."""
    return {
        "schema": late.SCHEMA,
        "limit_total": fusion.limit_total,
        "cues": [asdict(cue) for cue in fusion.cues],
        "left_out": [asdict(row) for row in rows if row.reason],
    }


def told(rows: Sequence[Row]) -> list[str]:
    """The table as lines of Markdown."""
    lines = [
        "| cue | people | gain of AUC, mean over families | false positives | recall | ms a face | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mean = row.gain.get("mean")
        gain = "" if mean is None else "{:+.4f} ({:+.4f} to {:+.4f})".format(mean["gain"], *mean["interval"])
        false, found = (f"{pair[0]:.3f} → {pair[1]:.3f}" if pair else "" for pair in (row.false, row.found))
        verdict = f"left out: {row.reason}" if row.reason else "has a say"
        lines.append(
            f"| {row.name} | {row.people} | {gain} | {false} | {found} | "
            f"{row.milliseconds:.1f} ({row.share_of_ensemble:.0%} of the ensemble's) | {verdict} |"
        )
    return lines


def collect(data_dir: Path, cache_dir: Path) -> Readings:
    """Ensemble and crop cues on every stranger; kept in `cache_dir` under the hash of the ensemble."""
    members = [load_member(name) for name in list_members()]
    ensemble = load_ensemble(members)
    path = cache_dir / f"cues_{ensemble.digest[:16]}.json"
    if path.exists():
        return Readings.from_json(json.loads(path.read_text()))
    pairs = stranger_pairs(data_dir, cache_dir, each=EACH_STRANGER)
    logits = {member.name: read_strangers(member, data_dir, cache_dir) for member in members}
    crops = sum(2 * len(found.identity) for found in pairs)
    milliseconds = {"ensemble": sum(_engine_ms(member, cache_dir) for member in members)}
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in ("family", "labels", "identity", "fused")}
    values: dict[str, list[float]] = {name: [] for name in CROP_CUES}
    for name in CROP_CUES:
        milliseconds[name] = 0.0
    read: dict[str, int] = {}
    for found in pairs:
        for label, images in enumerate((found.real, found.fake)):
            start = read.get(found.family, 0)
            read[found.family] = start + len(images)
            fused = [
                ensemble.calibration.calibrated(
                    ensemble.fuse({n: float(of[found.family][start + k]) for n, of in logits.items()})
                )
                for k in range(len(images))
            ]
            columns["family"].append(np.full(len(images), str(found.family)))
            columns["labels"].append(np.full(len(images), label, np.int64))
            columns["identity"].append(found.identity)
            columns["fused"].append(np.array(fused))
            for name, cue in CROP_CUES.items():
                begun = time.perf_counter()
                values[name] += [_number(cue(image).value) for image in images]
                milliseconds[name] += 1000 * (time.perf_counter() - begun) / crops
        logger.info("%s: %d looks read", found.family, read[found.family])
    readings = Readings(
        **{name: np.concatenate(parts) for name, parts in columns.items()},
        cues={name: np.array(found) for name, found in values.items()},
        milliseconds=milliseconds,
    )
    path.write_text(json.dumps(readings.to_json()))
    return readings


def _engine_ms(member: Member, cache_dir: Path) -> float:
    """Milliseconds a face on the engine that serves the member here: the median of some batches."""
    face = reference_face(MtcnnDetector(40, 0.9))
    engine = build(
        Network(member.name, member.module, member.sha256),
        plan=Plan(order=("openvino", "eager"), precision="fp32"),
        cache_dir=cache_dir,
        reference=reference_crops(face, member.policy),
        to_probability=member.calibration.probability,
    )
    faces = reference_crops(face, member.policy)
    spent = []
    for _ in range(BATCHES):
        begun = time.perf_counter()
        engine(faces)
        spent.append(1000 * (time.perf_counter() - begun) / len(faces))
    return float(np.median(spent))


def _moved(readings: Readings, fusion: Late) -> NDArray[np.float64]:
    """Fused logits with the shifts of those cues that could be read."""
    out = readings.fused.copy()
    for index in range(len(out)):
        present = [
            Cue(cue.name, float(value))
            for cue in fusion.cues
            if np.isfinite(value := readings.cues[cue.name][index])
        ]
        out[index] += late.shift_of(fusion.shares(present))
    return out


def _mean_auc(readings: Readings, logits: NDArray[np.float64], rows: NDArray[np.bool_]) -> float:
    families = np.unique(readings.family[rows])
    chosen = [rows & (readings.family == family) for family in families]
    return _mean(auc(logits[of_family], readings.labels[of_family]) for of_family in chosen)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _above(
    logits: NDArray[np.float64],
    threshold: float,
    labels: NDArray[np.int64],
    identity: NDArray[np.int64],
) -> tuple[float, float]:
    false, found = (
        share(logits[labels == label] > threshold, identity[labels == label])["share"] for label in (0, 1)
    )
    return false, found


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, decide, write `late.json` and `cues.md` into --out."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the training data")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is slow to make")
    parser.add_argument("--out", type=Path, required=True, help="folder for late.json and cues.md")
    parser.add_argument("--readings", type=Path, nargs="*", default=[], help="cues over time, read elsewhere")
    given = parser.parse_args(arguments)
    further = [Readings.from_json(json.loads(path.read_text())) for path in given.readings]
    fusion, rows = decide([collect(given.data, given.cache), *further])
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "late.json").write_text(json.dumps(to_file(fusion, rows), indent=2) + "\n")
    (given.out / "cues.md").write_text("\n".join(told(rows)) + "\n")
    print("\n".join(told(rows)))


if __name__ == "__main__":
    main()
