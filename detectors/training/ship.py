"""Members and their ensemble made ready to ship: weights exported, read on every set, calibrated, fused.

`python -m detectors.training.ship --data DIR --cache DIR --out DIR RECIPE=RUN ...`, one pair of a recipe and
the directory its training left for each member. Writes a member's directory each, its card and learning
curve, `ensemble.json`, and `shipped.json`, the figures that the choice rests on.
"""

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detectors.calibration import Calibration
from detectors.drift import reference_histograms
from detectors.ensemble import FILE
from detectors.members import Member, load_member
from detectors.training import robustness
from detectors.training.calibrate import (
    Looks,
    Panel,
    fit_calibration,
    fit_ensemble,
    operating_point,
)
from detectors.training.card import write_card
from detectors.training.clips import CLIP_CLASSES, load_clips
from detectors.training.data import Faces, framed, load_authentic, load_faces, resized
from detectors.training.evaluate import ClipScore, evaluate
from detectors.training.export import TESTED_FOR, export_member, exported_weights, member_facts
from detectors.training.metrics import auc, bootstrap_by_identity
from detectors.training.objective import score
from detectors.training.probes import Probe, load_probes
from detectors.training.recipe import load_recipe
from detectors.training.robustness import CONDITIONS, quality_of
from detectors.training.served import served
from detectors.training.strangers import stranger_pairs

logger = logging.getLogger(__name__)

EACH_STRANGER = 150
"""Pairs of each stranger family and source: an AUC's standard error of .03 on one source, .017 on all."""
SOURCES = ("lfw_faces", "wide_faces")
WORSE = (
    "blur, sigma 1",
    "blur, sigma 2",
    "0.75x",
    "0.5x",
    "0.5x, enlarged again",
    "JPEG 50",
    "JPEG 30",
    "H.264 CRF 23",
    "H.264 CRF 30",
    "H.264 CRF 37",
    "noise",
    "dark",
)
"""Conditions of `detectors.training.robustness` under which authentic faces are to be safe as well, where the
quality gate lets them pass."""
EACH_WORSE = 300
"""Authentic crops under each condition, people in turn."""
WORSE_SEED = 43
"""Other crops than the report draws."""
LEAST_WORSE = 60
"""People of a condition that pass the gate: fewer cannot tell a rate of 2 %, and the gate does the work."""


@dataclass(frozen=True, slots=True)
class Read:
    """One member's raw logits: `val` [N]; by source, of authentic faces held out; by condition, of
    authentic `val` crops made worse, whatever the gate says of them; by family, of strangers; by clip, frame
    by frame."""

    val: NDArray[np.float32]
    worse: Mapping[str, NDArray[np.float32]]
    authentic: Mapping[str, NDArray[np.float32]]
    strangers: Mapping[str, NDArray[np.float32]]
    clips: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Truth:
    """What is known of the sets that members are read on: by condition, which of the crops made worse
    pass the gate, and the people of all; labels and people by family; labels by clip."""

    faces: Faces
    worse: Mapping[str, tuple[NDArray[np.bool_], NDArray[np.int64]]]
    strangers: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    clips: Mapping[str, int]


def export_run(recipe_path: Path, run: Path, out: Path) -> Member:
    """Writes the averaged weights of a training as an uncalibrated member into `out/<name>`."""
    recipe = load_recipe(recipe_path)
    tensors = exported_weights(run, recipe)
    directory = out / recipe.name
    (directory / "calibration.json").unlink(missing_ok=True)
    export_member(directory, tensors, recipe, None, member_facts(recipe))
    return load_member(directory)


def read_all(member: Member, data_dir: Path, cache: Path) -> Read:
    """Reads every set with one member; kept in `cache` under the hash of its weights."""
    path = cache / f"read2_{member.sha256[:16]}.npz"
    if not path.exists():
        save: Any = np.savez  # its stubs take the arrays' names for options
        save(path, **_read(member, data_dir, cache))
    with np.load(path) as saved:
        groups: dict[str, dict[str, NDArray[np.float32]]] = {
            name: {} for name in ("worse", "authentic", "strangers", "clips")
        }
        for key in saved.files:
            group, _, name = key.partition("/")
            if name:
                groups[group][name] = saved[key]
        return Read(saved["val"], **groups)


def _read(member: Member, data_dir: Path, cache: Path) -> dict[str, NDArray[np.float32]]:
    out = {"val": read_val(member, data_dir, cache)}
    for name in SOURCES:
        crops = load_authentic(data_dir, cache, name, member.policy, held_out=True)
        out[f"authentic/{name}"] = _logits(member, crops)
    probes = _authentic_probes(data_dir)
    for condition in WORSE:
        read = robustness.read([member], probes, CONDITIONS[condition], WORSE_SEED)
        out[f"worse/{condition}"] = read.logits[member.name]
    strangers = read_strangers(member, data_dir, cache)
    out |= {f"strangers/{family}": logits for family, logits in strangers.items()}
    for label in CLIP_CLASSES:
        for clip in load_clips(data_dir / "clips" / label, cache, member.policy):
            out[f"clips/{label} {clip.name}"] = _logits(member, clip.faces)
    return out


def read_val(member: Member, data_dir: Path, cache: Path) -> NDArray[np.float32]:
    """Logits [N] of all validation crops."""
    return _logits(member, resized(load_faces(data_dir, cache, "val").images, member.policy.size))


def read_strangers(member: Member, data_dir: Path, cache: Path) -> dict[str, NDArray[np.float32]]:
    """Logits by family of strangers, in the order of `stranger_truth`."""
    families: dict[str, list[NDArray[np.float32]]] = {}
    for found in stranger_pairs(data_dir, cache, each=EACH_STRANGER):
        for crops in (found.real, found.fake):
            families.setdefault(found.family, []).append(
                _logits(member, framed(crops, found.side, member.policy))
            )
    return {family: np.concatenate(parts) for family, parts in families.items()}


def stranger_truth(data_dir: Path, cache: Path) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Labels and people by family of strangers."""
    families: dict[str, list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = {}
    for found in stranger_pairs(data_dir, cache, each=EACH_STRANGER):
        labels = np.repeat(np.array([0, 1]), len(found.identity))
        families.setdefault(found.family, []).append((labels, np.tile(found.identity, 2)))
    return {
        family: (np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
        for family, parts in families.items()
    }


def _logits(member: Member, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    read: NDArray[np.float32] = score(member.module, crops, member.policy)
    return read


def _authentic_probes(data_dir: Path) -> list[Probe]:
    return [probe for probe in load_probes(data_dir, 2 * EACH_WORSE, WORSE_SEED) if not probe.label]


def truth(data_dir: Path, cache: Path, clips: Sequence[str]) -> Truth:
    """Labels and people in the order of `read_all`."""
    probes = _authentic_probes(data_dir)
    people = np.array([probe.identity for probe in probes])
    passing = {}
    for condition in WORSE:
        seen = robustness.read([], probes, CONDITIONS[condition], WORSE_SEED)
        passing[condition] = np.array([not one.reasons for one in seen.in_video or seen.quality])
    return Truth(
        load_faces(data_dir, cache, "val"),
        {condition: (passes, people) for condition, passes in passing.items()},
        stranger_truth(data_dir, cache),
        {name: CLIP_CLASSES[name.split(" ")[0]] for name in clips},
    )


def figures(read: Read, known: Truth) -> dict[str, Any]:
    """AUC of one member (or of a fusion) on every set, with intervals over people."""
    faces = known.faces
    clips = {name: float(logits.mean()) for name, logits in read.clips.items() if len(logits)}
    return {
        "val": measured(read.val, faces.labels, faces.identity),
        "strangers": {
            family: measured(read.strangers[family], *known.strangers[family]) for family in read.strangers
        },
        "clips_auc": auc(
            np.array(list(clips.values())), np.array([known.clips[name] for name in clips], np.int64)
        ),
        "clips": clips,
    }


def measured(logits: NDArray[Any], labels: NDArray[np.int64], who: NDArray[np.int64]) -> dict[str, Any]:
    """`auc` and its 95 % `interval` over people."""
    interval = bootstrap_by_identity(lambda i: auc(logits[i], labels[i]), who, draws=500)
    return {"auc": auc(logits, labels), "interval": interval}


def calibrated(read: Read, known: Truth) -> tuple[Calibration, dict[str, Any]]:
    """A member's own calibration, its operating point chosen, and the figures of all that."""
    faces = known.faces
    fitted = fit_calibration(
        read.val,
        faces.labels,
        faces.identity,
        [logits for logits in read.clips.values() if len(logits)],
        _data(faces),
        further={
            name: Looks(pick(read), np.zeros(len(who), np.int64), who)
            for name, (pick, who) in _authentic_sources(read, known).items()
        },
        tested_for=TESTED_FOR,
    )
    chosen, point = operating_point(fitted.calibration, fitted.held_out)
    calibration = _with_reference(chosen, read.val, faces)
    return calibration, figures(read, known) | {"calibration": fitted.report, "operating_point": point}


Pick = Callable[[Read], NDArray[np.float32]]


def _authentic_sources(first: Read, known: Truth) -> dict[str, tuple[Pick, NDArray[np.int64]]]:
    """Authentic faces beside `val`: how to pick their logits out of a reading, and who they are. Of crops
    made worse those that the gate lets pass, if they are enough."""
    found: dict[str, tuple[Pick, NDArray[np.int64]]] = {
        name: (lambda read, name=name: read.authentic[name], np.arange(len(logits)))  # type: ignore[misc]
        for name, logits in first.authentic.items()
    }
    for condition, (passes, people) in known.worse.items():
        if len(np.unique(people[passes])) >= LEAST_WORSE:
            found[condition] = (
                lambda read, condition=condition, passes=passes: read.worse[condition][passes],  # type: ignore[misc]
                people[passes],
            )
    return found


def ship(
    pairs: Sequence[tuple[Path, Path]],
    data_dir: Path,
    cache: Path,
    out: Path,
    on_progress: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Everything of the module's first lines, for (recipe, run) pairs; returns what `shipped.json` holds."""
    out.mkdir(parents=True, exist_ok=True)
    members = [export_run(recipe, run, out) for recipe, run in pairs]
    reads = {}
    for member in served(members):
        on_progress(f"reading every set with {member.name}")
        reads[member.name] = read_all(member, data_dir, cache)
    known = truth(data_dir, cache, list(next(iter(reads.values())).clips))
    report: dict[str, Any] = {"members": {}}
    for (recipe_path, run), member in zip(pairs, members, strict=True):
        recipe, read = load_recipe(recipe_path), reads[member.name]
        calibration, found = calibrated(read, known)
        summary = {"val_auc": found["val"]["auc"], "val_auc_interval": found["val"]["interval"]}
        export_member(
            out / member.name,
            exported_weights(run, recipe),
            recipe,
            calibration,
            member_facts(recipe) | {"metrics": summary},
        )
        metrics = evaluate(
            read.val,
            known.faces,
            calibration,
            dict(read.authentic),
            _clip_scores(member, read, data_dir, cache),
        )
        write_card(out, recipe, run, member, metrics | {"calibration": found["calibration"]})
        report["members"][member.name] = found
        on_progress(f"{member.name}: validation AUC {found['val']['auc']:.4f}")
    if len(members) > 1:
        report["ensemble"] = _ensemble(members, reads, known, out)
    (out / "shipped.json").write_text(json.dumps(report, indent=2, default=float) + "\n")
    return report


def _clip_scores(member: Member, read: Read, data_dir: Path, cache: Path) -> dict[str, list[ClipScore]]:
    return {
        label: [
            ClipScore(clip.name, read.clips[f"{label} {clip.name}"], clip.sampled)
            for clip in load_clips(data_dir / "clips" / label, cache, member.policy)
        ]
        for label in CLIP_CLASSES
    }


def _ensemble(
    members: Sequence[Member],
    reads: Mapping[str, Read],
    known: Truth,
    out: Path,
) -> dict[str, Any]:
    faces = known.faces

    def panel(of: Pick, labels: NDArray[np.int64], who: NDArray[np.int64]) -> Panel:
        return Panel({name: of(read) for name, read in reads.items()}, labels, who)

    first = next(iter(reads.values()))
    further = {
        name: panel(pick, np.zeros(len(who), np.int64), who)
        for name, (pick, who) in _authentic_sources(first, known).items()
    }
    clips = [name for name in known.clips if all(len(read.clips[name]) for read in reads.values())]
    tracks = [
        ({name: read.clips[clip] for name, read in reads.items()}, known.clips[clip], number)
        for number, clip in enumerate(clips)
    ]
    fitted = fit_ensemble(
        {member.name: (member.version, member.sha256) for member in members},
        panel(lambda read: read.val, faces.labels, faces.identity),
        {
            family: panel(lambda read, family=family: read.strangers[family], *known.strangers[family])  # type: ignore[misc]
            for family in first.strangers
        },
        tracks,
        _data(faces),
        further=further,
        tested_for=TESTED_FOR,
    )
    ensemble = fitted.ensemble
    calibration, point = operating_point(ensemble.calibration, fitted.held_out)
    fused = _fused(ensemble.fuse, reads)
    calibration = _with_reference(calibration, fused.val, faces)
    record = {**ensemble.to_json(), "calibration": calibration.to_json()}
    (out / FILE).write_text(json.dumps(record, indent=2) + "\n")
    return figures(fused, known) | {"fit": fitted.report, "operating_point": point}


def _fused(fuse: Callable[[Mapping[str, float]], float], reads: Mapping[str, Read]) -> Read:
    def of(pick: Pick) -> NDArray[np.float32]:
        columns = {name: pick(read) for name, read in reads.items()}
        rows = zip(*columns.values(), strict=True)
        return np.array([fuse(dict(zip(columns, map(float, row), strict=True))) for row in rows], np.float32)

    first = next(iter(reads.values()))
    return Read(
        of(lambda read: read.val),
        {name: of(lambda read, name=name: read.worse[name]) for name in first.worse},  # type: ignore[misc]
        {name: of(lambda read, name=name: read.authentic[name]) for name in first.authentic},  # type: ignore[misc]
        {name: of(lambda read, name=name: read.strangers[name]) for name in first.strangers},  # type: ignore[misc]
        {name: of(lambda read, name=name: read.clips[name]) for name in first.clips},  # type: ignore[misc]
    )


def _with_reference(calibration: Calibration, fused: NDArray[np.float32], faces: Faces) -> Calibration:
    """With histograms of authentic faces: what drift is measured against."""
    real = np.flatnonzero(faces.labels == 0)
    parts: dict[str, list[float]] = {}
    good = []
    for index in real:
        width = min(int(faces.source_width[index]), faces.images.shape[1])
        crop = resized(faces.images[index : index + 1], width)[0]
        quality = quality_of(crop)
        good.append(not quality.reasons)
        for name, value in quality.parts.items():
            if name != "face_px":
                parts.setdefault(name, []).append(value)
    scores = fused[real][np.array(good)]
    return replace(calibration, reference=reference_histograms({"score": scores, **parts}))


def _data(faces: Faces) -> str:
    people = len(np.unique(faces.identity))
    crops = f"{len(faces.labels)} DFDC validation crops of {people} people"
    return f"{crops}, every person and class weighted equally"


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RECIPE=RUN")
    for name in ("data", "cache", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pairs = [(Path(recipe), Path(run)) for recipe, _, run in (item.partition("=") for item in chosen.runs)]
    report = ship(pairs, chosen.data, chosen.cache, chosen.out)
    logger.info("%s", json.dumps({name: found["val"] for name, found in report["members"].items()}))


if __name__ == "__main__":
    main()
