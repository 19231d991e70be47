"""Half-face members made ready, and the routed system measured against the ensemble.

`python -m detectors.training.half --data DIR --cache DIR --out DIR RECIPE=RUN ...`, one pair of a recipe of
mode `half` and the directory its training left for each half (none: the ensemble alone, with the occlusion
estimate beside it). Exports each student, calibrates it on covered crops of validation people, writes its
directory and `half.json` into --out, and prints the table: every crop covered by a drawn occluder, one set a
hidden half, and uncovered; routed system and ensemble on the same crops, intervals over people.

Half of the occluders are of kinds that nothing trained on. A crop and its partner share theirs. The quality
gate is left out, for both alike. The students' figures come from people whom their calibration was not fitted
on; the ensemble's calibration is the shipped one, which knows these people, uncovered.
"""

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detectors.calibration import Calibration, ConformalSet
from detectors.ensemble import Ensemble, load_ensemble
from detectors.members import Member, list_members, load_member
from detectors.occlusion import POLICY, Estimate, features_of, shipped_estimate
from detectors.readings import Visible
from detectors.training.calibrate import EVEN, OPEN_PROBABILITY, Fit, Looks, fit_calibration, operating_point
from detectors.training.clips import CLIP_CLASSES, load_clips
from detectors.training.data import Faces, load_authentic, load_faces, resized
from detectors.training.export import TESTED_FOR, export_member, exported_weights, member_facts
from detectors.training.metrics import auc, bootstrap_by_identity
from detectors.training.objective import score
from detectors.training.occluders import cover, random_occluder
from detectors.training.people import share
from detectors.training.recipe import Mode, RecipeError, load_recipe
from detectors.training.ship import SOURCES

logger = logging.getLogger(__name__)

Logits = NDArray[np.float64]

DRAWN_PX = 192
"""Side at which occluders are drawn: that of the largest member's input."""
SEED = 97
"""Occluders that no training drew."""
LEAST_DECIDED = 0.5
"""Of covered faces, classes alike: what half a face can be asked for."""
LIMIT = 0.5
"""Default of `quality.max_covered`."""
UNCOVERED = "uncovered"
HIDDEN = {Visible.UPPER: "lower half hidden", Visible.LOWER: "upper half hidden"}
LEAVES: Mapping[str, Visible | None] = {
    UNCOVERED: None,
    **{name: visible for visible, name in HIDDEN.items()},
}
ACCUSED, CLEARED, UNDECIDED = 1, -1, 0
GAIN = 0.08
"""What the routed system should have above the ensemble on covered crops."""


@dataclass(frozen=True, slots=True)
class Read:
    """What is known of one set of N crops: raw logits by member, which halves the estimate says can be seen,
    and whether the occluder's kind is one that never trained."""

    logits: Mapping[str, NDArray[np.float32]]
    visible: Sequence[Visible]
    held_out: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class System:
    """One system on one set of N crops: `logits` in log odds, `said` ACCUSED, CLEARED or UNDECIDED."""

    logits: Logits
    said: NDArray[np.int64]


def covered_crops(
    images: NDArray[np.uint8], group: NDArray[np.int64], leaves: Visible, *, seed: int = SEED
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The crops uint8 [N, S, S, 3], tightly framed, at DRAWN_PX with one half hidden; crops of the same
    `group` [N] share their occluder. Also whether each is of a held-out kind: half of them are."""
    out = resized(images, DRAWN_PX)
    held_out = np.zeros(len(out), bool)
    for i, number in enumerate(group):
        rng = np.random.default_rng((seed, leaves is Visible.UPPER, int(number)))
        held_out[i] = rng.random() < 0.5
        out[i] = cover(out[i], random_occluder(rng, leaves, held_out=bool(held_out[i])))
    return out, held_out


def visible_in(crops: NDArray[np.uint8], estimate: Estimate, limit: float = LIMIT) -> list[Visible]:
    """What the estimate says of tightly framed crops [N, S, S, 3], as at run time."""
    features = np.stack([features_of(face) for face in resized(crops, POLICY.size)])
    surely = 1 / (1 + np.exp(-np.clip(estimate.margins(features), -30, 30)))
    names = {
        (False, False): Visible.BOTH,
        (True, False): Visible.LOWER,
        (False, True): Visible.UPPER,
        (True, True): Visible.NEITHER,
    }
    return [names[bool(upper > limit), bool(lower > limit)] for upper, lower in surely]


def read_set(name: str, faces: Faces, members: Sequence[Member], estimate: Estimate, cache: Path) -> Read:
    """Every member's logits of one set of the validation crops; those of a member are kept in `cache` under
    the hash of its weights."""
    leaves = LEAVES[name]
    if leaves is None:
        crops, held_out = resized(faces.images, DRAWN_PX), np.zeros(len(faces.labels), bool)
    else:
        crops, held_out = covered_crops(faces.images, pair_of(faces), leaves)
    logits = {}
    for member in members:
        kept = cache / f"half_{member.sha256[:16]}_{name.replace(' ', '_')}_{SEED}_{len(crops)}.npy"
        if not kept.exists():
            logger.info("reading %s with %s", name, member.name)
            np.save(kept, score(member.module, resized(crops, member.policy.size), member.policy))
        logits[member.name] = np.load(kept)
    return Read(logits, visible_in(crops, estimate), held_out)


def pair_of(faces: Faces) -> NDArray[np.int64]:
    """A number [N] that a manipulated crop and its original share."""
    return np.where(faces.original >= 0, faces.original, np.arange(len(faces.labels)))


def calibrated(
    member: Member, leaves: Visible, read: Read, faces: Faces, data_dir: Path, cache: Path
) -> tuple[Calibration, Fit, dict[str, Any]]:
    """A student's calibration from covered validation crops and covered authentic faces of other sources, the
    cross-fitted fit, and what its operating point costs."""
    further = {}
    for name in SOURCES:
        held = load_authentic(data_dir, cache, name, member.policy, held_out=True)
        people = np.arange(len(held))
        crops, _ = covered_crops(held, people, leaves)
        logits = score(member.module, resized(crops, member.policy.size), member.policy)
        further[name] = Looks(logits, np.zeros(len(people), np.int64), people)
    clips = [
        score(member.module, clip.faces, member.policy)
        for label in CLIP_CLASSES
        for clip in load_clips(data_dir / "clips" / label, cache, member.policy)
        if len(clip.faces)
    ]
    people_of = len(np.unique(faces.identity))
    fitted = fit_calibration(
        read.logits[member.name],
        faces.labels,
        faces.identity,
        clips,
        f"{len(faces.labels)} DFDC validation crops of {people_of} people, {HIDDEN[leaves]} by drawn "
        "occluders, every person and class weighted equally",
        further=further,
        tested_for=TESTED_FOR,
    )
    calibration, point = operating_point(fitted.calibration, fitted.held_out, least_decided=LEAST_DECIDED)
    return calibration, fitted, point


def alone(ensemble: Ensemble, read: Read) -> System:
    """The ensemble as it is without an estimate: it reads what there is."""
    names = [name for name in ensemble.names if name in read.logits]
    rows = zip(*(read.logits[name] for name in names), strict=True)
    fused = np.array([ensemble.fuse(dict(zip(names, map(float, row), strict=True))) for row in rows])
    return judged(ensemble.calibration, fused)


def judged(calibration: Calibration, raw: NDArray[np.floating]) -> System:
    """What a calibration says of raw logits [N] of single looks: the rule of `stream.verdicts.judge`."""
    logits = np.array([calibration.calibrated(float(x)) for x in raw])
    sets = calibration.sets
    if sets is None:
        return System(logits, np.zeros(len(raw), np.int64))
    found = [sets.of(float(x)) for x in raw]
    probability = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    accused = np.array([one is ConformalSet.MANIPULATED for one in found]) & (probability >= OPEN_PROBABILITY)
    cleared = np.array([one is ConformalSet.AUTHENTIC for one in found]) & (probability < EVEN)
    return System(logits, np.where(accused, ACCUSED, np.where(cleared, CLEARED, UNDECIDED)))


def held_out(calibration: Calibration, fit: Fit) -> System:
    """The same for the faces that a student was fitted on, each by the fit without its person."""
    assert calibration.sets is not None
    not_authentic, not_manipulated = fit.held_out.placed.excluded(calibration.sets)
    probability = fit.held_out.probability
    accused = not_authentic & ~not_manipulated & (probability >= OPEN_PROBABILITY)
    cleared = ~not_authentic & not_manipulated & (probability < EVEN)
    return System(fit.held_out.calibrated, np.where(accused, ACCUSED, np.where(cleared, CLEARED, UNDECIDED)))


def routed(whole: System, halves: Mapping[Visible, System], visible: Sequence[Visible]) -> System:
    """Each face by who reads it at run time: the ensemble where both halves are seen, the member for the half
    that is seen; where there is none, the ensemble's score stands and nothing is decided (OCCLUSION)."""
    logits, said = whole.logits.copy(), whole.said.copy()
    for i, seen in enumerate(visible):
        if seen is Visible.BOTH:
            continue
        said[i] = UNDECIDED
        if seen in halves:
            logits[i], said[i] = halves[seen].logits[i], halves[seen].said[i]
    return System(logits, said)


def compared(
    before: System, after: System, read: Read, faces: Faces, leaves: Visible | None
) -> dict[str, Any]:
    """The row of one set: both systems on the same crops, and the paired difference of their AUCs."""
    labels, who = faces.labels, faces.identity

    def gain(i: NDArray[np.integer]) -> float:
        return auc(after.logits[i], labels[i]) - auc(before.logits[i], labels[i])

    every = np.arange(len(labels))
    new = np.flatnonzero(read.held_out)
    wanted = Visible.BOTH if leaves is None else leaves
    found: dict[str, Any] = {
        "crops": len(labels),
        "people": len(np.unique(who)),
        "estimate_right": share(np.array([seen is wanted for seen in read.visible]), who),
        "gain": {"auc": gain(every), "interval": bootstrap_by_identity(gain, who)},
        "ensemble": _figures(before, labels, who),
        "routed": _figures(after, labels, who),
    }
    if len(new):
        found["gain_held_out_kinds"] = {
            "auc": gain(new),
            "interval": bootstrap_by_identity(lambda i: gain(new[i]), who[new]),
        }
    return found


def _figures(system: System, labels: NDArray[np.int64], who: NDArray[np.int64]) -> dict[str, Any]:
    authentic, manipulated = labels == 0, labels == 1
    return {
        "auc": auc(system.logits, labels),
        "false_accusations": share(system.said[authentic] == ACCUSED, who[authentic]),
        "decided_authentic": share(system.said[authentic] != UNDECIDED, who[authentic]),
        "recall": share(system.said[manipulated] == ACCUSED, who[manipulated]),
        "missed": share(system.said[manipulated] == CLEARED, who[manipulated]),
    }


def measure(
    pairs: Sequence[tuple[Path, Path]],
    names: Sequence[str],
    data_dir: Path,
    cache: Path,
    out: Path,
    on_progress: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Everything of the module's first lines for (recipe, run) pairs and the ensemble's members; returns what
    `half.json` holds. Raises RecipeError for a recipe of another mode."""
    out.mkdir(parents=True, exist_ok=True)
    students = {}
    for recipe_path, run in pairs:
        recipe = load_recipe(recipe_path)
        if recipe.mode is not Mode.HALF or recipe.half is None:
            raise RecipeError(f"{recipe_path}: mode {recipe.mode}, expected {Mode.HALF}")
        directory = out / recipe.name
        (directory / "calibration.json").unlink(missing_ok=True)
        export_member(directory, exported_weights(run, recipe), recipe, None, member_facts(recipe))
        students[recipe.half] = load_member(directory)
    voters = [load_member(name) for name in names]
    ensemble, estimate = load_ensemble(voters), shipped_estimate()
    faces = load_faces(data_dir, cache, "val")
    reads = {}
    for name in LEAVES:
        on_progress(f"reading {name}")
        reads[name] = read_set(name, faces, [*voters, *students.values()], estimate, cache)

    report: dict[str, Any] = {"ensemble": list(names), "students": {}, "sets": {}}
    finished: dict[Visible, tuple[Calibration, System]] = {}
    for recipe_path, run in pairs:
        recipe = load_recipe(recipe_path)
        assert recipe.half is not None
        member, read = students[recipe.half], reads[HIDDEN[recipe.half]]
        calibration, fit, point = calibrated(member, recipe.half, read, faces, data_dir, cache)
        own = auc(read.logits[member.name], faces.labels)
        facts = member_facts(recipe) | {"metrics": {"val_auc": own, "val_crops": HIDDEN[recipe.half]}}
        export_member(out / recipe.name, exported_weights(run, recipe), recipe, calibration, facts)
        finished[recipe.half] = calibration, held_out(calibration, fit)
        report["students"][member.name] = {"auc": own, "calibration": fit.report, "operating_point": point}
    for name, leaves in LEAVES.items():
        read = reads[name]
        before = alone(ensemble, read)
        halves = {
            half: cross_fitted if half is leaves else judged(calibration, read.logits[students[half].name])
            for half, (calibration, cross_fitted) in finished.items()
        }
        report["sets"][name] = compared(before, routed(before, halves, read.visible), read, faces, leaves)
    (out / "half.json").write_text(json.dumps(report, indent=2, default=float) + "\n")
    return report


def table(report: Mapping[str, Any]) -> list[str]:
    """The report's sets as lines of Markdown."""
    lines = [
        "| crops | estimate right | AUC ensemble | AUC routed | difference | false accusations: ensemble "
        "| routed | authentic decided: ensemble | routed | manipulated found: ensemble | routed |",
        "|" + "---|" * 11,
    ]
    for name, row in report["sets"].items():
        low, high = row["gain"]["interval"]
        told = [
            _told(row["estimate_right"]),
            f"{row['ensemble']['auc']:.3f}",
            f"{row['routed']['auc']:.3f}",
            f"{row['gain']['auc']:+.3f} ({low:+.3f} to {high:+.3f})",
        ]
        told += [
            _told(row[system][figure])
            for figure in ("false_accusations", "decided_authentic", "recall")
            for system in ("ensemble", "routed")
        ]
        lines.append(f"| {name} | {' | '.join(told)} |")
    return lines


def verdicts(report: Mapping[str, Any]) -> list[str]:
    """Which aims are met, one line each."""
    lines = []
    for name in HIDDEN.values():
        row = report["sets"][name]
        low = row["gain"]["interval"][0]
        false, decided = row["routed"]["false_accusations"], row["routed"]["decided_authentic"]
        aims = {
            f"AUC {GAIN} above the ensemble (lower end {low:+.3f})": low >= GAIN,
            f"false accusations at most .02 ({false['share']:.3f})": false["share"] <= 0.02,
            f"half of the authentic decided ({decided['share']:.2f})": decided["share"] >= 0.5,
        }
        lines += [f"{name}: {aim}: {'met' if met else 'missed'}" for aim, met in aims.items()]
    low, high = report["sets"][UNCOVERED]["gain"]["interval"]
    met = low <= 0 <= high or low > 0
    return [*lines, f"uncovered: no loss ({low:+.4f} to {high:+.4f}): {'met' if met else 'missed'}"]


def _told(found: Mapping[str, float]) -> str:
    """A share with its interval; what never happened has the limit that so many people allow."""
    high = found["high"] if found["share"] else found["upper"]
    return f"{found['share']:.3f} ({found['low']:.3f}-{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Calibrates half-face members and measures the routed system."
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ensemble", nargs="+", help="members by name or folder; else every shipped one")
    parser.add_argument("pairs", nargs="*", metavar="RECIPE=RUN")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(given.threads)
    pairs = []
    for pair in given.pairs:
        recipe, is_pair, run = pair.partition("=")
        if not is_pair:
            parser.error(f"{pair}: expected RECIPE=RUN, like half-upper.yaml=runs/half-upper")
        pairs.append((Path(recipe), Path(run)))
    report = measure(pairs, given.ensemble or list_members(), given.data, given.cache, given.out)
    print("\n".join([*table(report), "", *verdicts(report)]))


if __name__ == "__main__":
    main()
