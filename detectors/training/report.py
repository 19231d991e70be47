"""The evidence for members: `python -m detectors.training.report MEMBER... --data DIR --out docs/models`.

Examines each member by itself and, when there are several, the ensemble they make, on validation crops: how
they stand bad pictures (`robustness`), whether their maps point at what was changed (`explain`), whether some
people fare worse (`groups`). Writes `evidence.json` and `ensemble.md` into the output folder and each
member's part into its card `<name>.md`.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detectors.calibration import Calibration, CalibrationKind, ConformalSet
from detectors.ensemble import Ensemble, load_ensemble, single
from detectors.members import Member, load_member
from detectors.mtcnn import MtcnnDetector
from detectors.readings import Quality, Reason
from detectors.training import explain, groups, robustness
from detectors.training.blends import Face, Family, blend
from detectors.training.calibrate import LEVEL, OPEN_PROBABILITY
from detectors.training.card import ensemble_card, member_card, with_evidence
from detectors.training.data import DataError
from detectors.training.eigenfaces import Eigenfaces
from detectors.training.evidence import ENSEMBLE, Gain, Report, markdown
from detectors.training.explain import Explained, Known
from detectors.training.faces import find_points
from detectors.training.groups import Check
from detectors.training.metrics import auc
from detectors.training.probes import Pair, Probe, load_pairs, load_probes
from detectors.training.robustness import CONDITIONS, Condition, Decision, Readings, by_crop
from detectors.training.served import served

logger = logging.getLogger(__name__)

CROPS = 600
"""Crops that every condition is tried on: three to a person and class of `val`, and minutes, not hours."""
MASKS = 300
"""Pairs, and as many authentic crops to blend, whose masks are known."""
SEED = 41


@dataclass(frozen=True, slots=True)
class Judge:
    """One way to come to a verdict: a member by itself, or the ensemble."""

    name: str
    ensemble: Ensemble

    def decide(self, logits: Mapping[str, float], quality: Quality) -> tuple[Decision, tuple[Reason, ...]]:
        """What is said of one crop, by the rule for stills at run time (`stream.verdicts.judge`, which this
        package cannot import; a test holds them together)."""
        calibration = self.ensemble.calibration
        if calibration.kind is CalibrationKind.NONE:
            return Decision.INCONCLUSIVE, (Reason.UNCALIBRATED,)
        if quality.reasons:
            return Decision.INCONCLUSIVE, quality.reasons
        agreement = calibration.disagreement
        apart = agreement.between(logits) if agreement else None
        if agreement and apart is not None and apart > agreement.limit:
            return Decision.INCONCLUSIVE, (Reason.DISAGREEMENT,)
        return decided(calibration, self.ensemble.fuse(logits))


def decided(calibration: Calibration, logit: float) -> tuple[Decision, tuple[Reason, ...]]:
    """What a calibration makes of one look's fused logit, when nothing else speaks against deciding."""
    probability = calibration.probability(logit)
    if calibration.sets is None:
        low, high = calibration.interval(logit, 1.0, LEVEL)
        authentic, manipulated, reason = high < 0.5, low > 0.5, Reason.AMBIGUOUS
    else:
        found = calibration.sets.of(logit)
        authentic = found is ConformalSet.AUTHENTIC and probability < 0.5
        manipulated = found is ConformalSet.MANIPULATED
        reason = Reason.ATYPICAL if found is ConformalSet.NEITHER else Reason.AMBIGUOUS
    if manipulated and probability >= OPEN_PROBABILITY:
        return Decision.MANIPULATED, ()
    return (Decision.AUTHENTIC, ()) if authentic else (Decision.INCONCLUSIVE, (reason,))


def examine(
    members: Sequence[Member],
    data_dir: Path,
    *,
    crops: int = CROPS,
    masks: int = MASKS,
    seed: int = SEED,
    conditions: Mapping[str, Condition] = CONDITIONS,
    sexes: Mapping[str, str] | None = None,
    shipped: Mapping[str, Any] | None = None,
    on_progress: Callable[[str], None] = logger.info,
) -> Report:
    """Examine members, at least one; raises DataError for missing material, EnsembleError for a broken file.

    `crops` and `masks` bound how much is looked at: all `conditions` (one of them "clean") together take
    `crops` x 20 readings of every member. `sexes` are labels by crop name, `shipped` is what
    `detectors.training.ship` left in `shipped.json`, told as it is.
    """
    probes = load_probes(data_dir, crops, seed)
    readings = {}
    for number, (name, condition) in enumerate(conditions.items(), 1):
        readings[name] = robustness.read(members, probes, condition, seed)
        on_progress(f"condition {number} of {len(conditions)}: {name}")
    judges = judges_of(members)
    rows = {
        judge.name: [
            row
            for name, read in readings.items()
            for row in robustness.rows(name, read, probes, judge.ensemble.fuse, judge.decide)
        ]
        for judge in judges
    }
    on_progress("explanation")
    explanation = _explanation(members, load_pairs(data_dir, masks, seed), seed)
    on_progress("groups")
    checks = _groups(members, judges, probes, readings["clean"], sexes or {})
    return Report(
        facts=_facts(members, probes, seed),
        robustness=rows,
        gain=_gain(judges, readings["clean"], probes),
        explanation=explanation,
        groups=checks,
        shipped=shipped or {},
    )


def judges_of(members: Sequence[Member]) -> list[Judge]:
    """Every member by itself, and all together when there are several."""
    alone = [Judge(member.name, single(member)) for member in members]
    return alone if len(alone) == 1 else [*alone, Judge(ENSEMBLE, load_ensemble(members))]


def blended(pairs: Sequence[Pair], seed: int, detector: MtcnnDetector) -> dict[Family, list[Known]]:
    """Blends of the pairs' authentic crops by family; each with another person's face where one is needed.

    Crops without landmarks are left out. What is nearly outside of the mask (less than half of its weight)
    counts as outside.
    """
    if not pairs:
        return {}
    points = find_points(np.stack([pair.authentic for pair in pairs]), detector)
    found = [
        (Face(pair.authentic, place), pair.identity)
        for pair, place in zip(pairs, points, strict=True)
        if np.isfinite(place).all()
    ]
    if len({identity for _, identity in found}) < 2:
        return {}
    rng = np.random.default_rng((seed, 1))
    eigenfaces = Eigenfaces.fitted([face for face, _ in found])
    by_family: dict[Family, list[Known]] = {family: [] for family in Family}
    for family, known in by_family.items():
        for face, identity in found:
            donors = [other for other, person in found if person != identity]
            made = blend(family, face, donors[rng.integers(len(donors))], eigenfaces, rng)
            known.append(Known(made.fake, made.mask >= max(made.mask.max(), 1e-3) / 2, identity))
    return by_family


def _explanation(members: Sequence[Member], pairs: Sequence[Pair], seed: int) -> dict[str, list[Explained]]:
    sources = {"manipulated crop against its original": explain.known_pairs(pairs)}
    blends = blended(pairs, seed, MtcnnDetector())
    sources |= {f"blends, family {family.value}": known for family, known in blends.items()}
    return {source: _pointed(members, known) for source, known in sources.items() if known}


def _pointed(members: Sequence[Member], known: Sequence[Known]) -> list[Explained]:
    images = [one.image for one in known]
    maps = {member.name: explain.attention(member, images) for member in members}
    return [
        *(explain.explained(name, found, known) for name, found in maps.items()),
        *explain.baselines(known),
    ]


def _groups(
    members: Sequence[Member],
    judges: Sequence[Judge],
    probes: Sequence[Probe],
    clean: Readings,
    sexes: Mapping[str, str],
) -> dict[str, list[Check]]:
    authentic = np.array([probe.label == 0 for probe in probes])
    skin = groups.thirds([groups.skin_brightness(probe.image) for probe in probes], authentic)
    divisions: dict[str, list[str | None]] = {"brightness of skin": [groups.THIRDS[third] for third in skin]}
    if sexes:
        divisions["sex as labelled"] = [sexes.get(probe.name) for probe in probes]
    activations = {member.name: groups.activations(member, probes) for member in members}
    unknown = np.full(len(probes), np.nan)
    found = {}
    for judge in judges:
        logits = by_crop(clean.logits)
        fused = np.array([judge.ensemble.fuse(of_crop) for of_crop in logits])
        said = [
            judge.decide(of_crop, quality)[0] for of_crop, quality in zip(logits, clean.quality, strict=True)
        ]
        found[judge.name] = [
            groups.check(by, names, probes, activations.get(judge.name, unknown), fused, said)
            for by, names in divisions.items()
        ]
    return found


def _gain(judges: Sequence[Judge], clean: Readings, probes: Sequence[Probe]) -> Gain | None:
    """By how much the ensemble's AUC exceeds its best member's, paired crop by crop."""
    if judges[-1].name != ENSEMBLE:
        return None
    labels = np.array([probe.label for probe in probes])
    identity = np.array([probe.identity for probe in probes])
    logits = by_crop(clean.logits)
    fused = {judge.name: np.array([judge.ensemble.fuse(of_crop) for of_crop in logits]) for judge in judges}
    best = max((judge.name for judge in judges[:-1]), key=lambda name: auc(fused[name], labels))
    together, alone = fused[ENSEMBLE], fused[best]
    rate = robustness.bootstrapped(lambda i: auc(together[i], labels[i]) - auc(alone[i], labels[i]), identity)
    return Gain(best, rate)


def _facts(members: Sequence[Member], probes: Sequence[Probe], seed: int) -> dict[str, Any]:
    labels = [probe.label for probe in probes]
    return {
        "crops": {"authentic": labels.count(0), "manipulated": labels.count(1)},
        "people": len({probe.identity for probe in probes}),
        "seed": seed,
        "members": {member.name: {"version": member.version, "sha256": member.sha256} for member in members},
    }


def write(report: Report, members: Sequence[Member], out: Path, ablation: Mapping[str, Any]) -> list[Path]:
    """Write the report into `out`; return the files. A member without a card gets a plain one."""
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "evidence.json"]
    found = report.to_json()
    written[0].write_text(json.dumps(found, indent=2) + "\n")
    for member in members:
        card = out / f"{member.name}.md"
        text = card.read_text() if card.exists() else member_card(member, out)
        card.write_text(with_evidence(text, report, member.name))
        written.append(card)
    if len(members) > 1:
        card = out / "ensemble.md"
        card.write_text(ensemble_card(load_ensemble(members), members, report, ablation))
        written.append(card)
    return written


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """A JSON object of objects: an ablation, or `shipped.json`. Raises DataError naming what is wrong."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(rows, dict) or not all(isinstance(figures, dict) for figures in rows.values()):
        raise DataError(f"{path}: expected an object of rows, each an object of figures")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m detectors.training.report", description=__doc__)
    parser.add_argument("members", nargs="+", help="names of shipped members, or their folders")
    parser.add_argument("--data", type=Path, required=True, help="folder of dfdc_faces.csv and its tars")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cards, docs/models")
    parser.add_argument("--crops", type=int, default=CROPS, help="crops for every condition (%(default)s)")
    parser.add_argument("--masks", type=int, default=MASKS, help="pairs with a known mask (%(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="draws the crops (%(default)s)")
    parser.add_argument("--sex", type=Path, help="CSV name,sex: labels of crops, for the group check")
    parser.add_argument("--ablation", type=Path, help="JSON, rows of figures for the ensemble's card")
    parser.add_argument("--shipped", type=Path, help="shipped.json of the members: figures on every set")
    parser.add_argument("--threads", type=int, default=2, help="threads of the networks (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    chosen = parser.parse_args(arguments)
    try:
        members = served([load_member(name) for name in chosen.members], chosen.threads)
        ablation = read_rows(chosen.ablation) if chosen.ablation else {}
        shipped = read_rows(chosen.shipped) if chosen.shipped else {}
        sexes = groups.read_sexes(chosen.sex) if chosen.sex else {}
        report = examine(
            members,
            chosen.data,
            crops=chosen.crops,
            masks=chosen.masks,
            seed=chosen.seed,
            sexes=sexes,
            shipped=shipped,
            on_progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except ValueError as error:  # members, ensembles, calibrations and data all name what is wrong
        print(error, file=sys.stderr)
        return 2
    written = write(report, members, chosen.out, ablation)
    if chosen.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print("\n".join(markdown(report)))
    print("written: " + ", ".join(map(str, written)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
