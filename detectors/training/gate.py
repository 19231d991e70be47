"""The quality gate's limits, from data: `python -m detectors.training.gate --data DIR`.

Crops are made worse step by step in the one respect that a part of the quality measures (a ladder), and read
by the members. Ordered from good to bad by the part's value, whatever made it so, a window over them shows
how the members' AUC falls and how the false positives rise; the limit is where either leaves its bound. But
no limit may cost more than a stated share of clean authentic faces, nor of the mildly degraded ones that
must stay decided: abstaining always is no answer. Writes `quality_limits.json` with rule, cause and cost of
each limit and what the whole gate then does to every rung.
"""

import argparse
import json
import logging
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from detectors.ensemble import Ensemble, load_ensemble
from detectors.limits import FILE, SCHEMA, QualityLimits
from detectors.members import Member, crop_logits, list_members, load_member
from detectors.mtcnn import MtcnnDetector
from detectors.quality import measure, reasons_of, with_qp
from detectors.readings import Image, Quality, Reason
from detectors.training.data import DataError
from detectors.training.metrics import auc
from detectors.training.probes import Probe, load_probes
from detectors.training.robustness import (
    DARK,
    DARK_NOISE,
    blurred,
    by_crop,
    coded_h264,
    jpeg,
    rescaled,
    with_noise,
)
from detectors.training.served import served

logger = logging.getLogger(__name__)

CROPS = 300
"""Crops that climb every ladder: enough for windows of a hundred authentic ones, minutes on two cores."""
AUC_LOST = 0.07
"""A limit lies where the members have lost this much of the AUC that they have on clean crops."""
CLEAN_FALSE = 0.02
"""The threshold is set where this share of clean authentic crops lies above it ..."""
FALSE_BOUND = 0.04
"""... and a limit lies where this share of authentic crops does."""
WINDOW = 200
"""Crops in a window: its false positives are then known to some 2 %."""
STEP = 20
MOST_LOST = 0.05
"""Of clean authentic faces of any source a limit may turn away this share. A tenth of all is a third of the
darker third, and dark skin in fair light must be judged like any other."""
MILD_LOST = 0.20
"""Of faces at half size, at CRF 30 or at JPEG 50 a limit may turn away this share: half stay decided."""
OTHER_SOURCES = ("lfw_faces", "wide_faces")
OTHER_COUNT = 150
"""Faces of each."""
MOIRE_MARGIN = 1.05
"""Above the highest peak among all authentic faces: no member decides this limit, false alarms do."""
SIGNIFICANT = 3
"""Digits of a limit."""

Rung = Callable[[Image, np.random.Generator], tuple[Image, float | None]]
"""A crop in, the degraded one and the quantiser of its picture out."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """A field of `QualityLimits`, the part it limits, and the rungs that make the part worse."""

    field: str
    part: str
    upper: bool
    rungs: tuple[str, ...]


def _plain(condition: Callable[[Image, np.random.Generator], Image]) -> Rung:
    return lambda image, rng: (condition(image, rng), None)


def _h264(crf: int) -> Rung:
    return lambda image, rng: coded_h264(image, crf, rng)


def _dark(share: float) -> Rung:
    return lambda image, _: (np.asarray(cv2.convertScaleAbs(image, alpha=share), np.uint8), None)


def _noisy(sigma: float, share: float = 1.0) -> Rung:
    return _plain(lambda image, rng: with_noise(image * np.float32(share), sigma, rng))


RUNGS: Mapping[str, Rung] = {
    "clean": lambda image, _: (image, None),
    **{f"{factor:g}x": _plain(rescaled(factor)) for factor in (0.75, 0.5, 0.33, 0.25)},
    **{f"blur {sigma:g}": _plain(blurred(sigma)) for sigma in (1, 1.5, 2, 3)},
    **{f"light {share:g}": _dark(share) for share in (0.5, 0.3, 0.15, 0.08)},
    **{f"noise {sigma:g}": _noisy(sigma) for sigma in (2, 4, 8, 16)},
    **{f"light {share:g}, noise": _noisy(DARK_NOISE, share) for share in (0.5, DARK)},
    **{f"JPEG {quality}": _plain(jpeg(quality)) for quality in (50, 30, 20, 10)},
    **{f"CRF {crf}": _h264(crf) for crf in (23, 30, 34, 37, 40, 44)},
}
ENLARGED = (1.5, 2.0)
"""Authentic faces are also enlarged before their spectrum is looked at: interpolation leaves peaks."""

NOISES = tuple(name for name in RUNGS if "noise" in name)
CRFS = tuple(name for name in RUNGS if name.startswith("CRF"))
LADDERS = (
    Ladder("min_face_px", "face_px", False, ("0.75x", "0.5x", "0.33x", "0.25x")),
    Ladder("min_sharpness", "sharpness", False, ("blur 1", "blur 1.5", "blur 2", "blur 3")),
    Ladder("min_brightness", "brightness", False, ("light 0.5", "light 0.3", "light 0.15", "light 0.08")),
    Ladder("max_noise", "noise", True, NOISES),
    Ladder("max_blockiness", "blockiness", True, ("JPEG 50", "JPEG 30", "JPEG 20", "JPEG 10")),
    Ladder("max_grid", "grid", True, CRFS),
    Ladder("max_qp", "qp", True, CRFS),
)
MILD = ("0.5x", "CRF 30", "JPEG 50")

Parts = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Readings:
    """All crops under one rung, in the order of the probes: quality parts, and fused logits [N]."""

    parts: tuple[Parts, ...]
    logits: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit with what fixed it: `bound` is where members or false positives leave theirs (None: not on
    this ladder), `allowed` how far it may go by what it costs."""

    value: float
    cause: str
    bound: float | None
    allowed: float


def derive(
    ladder: Ladder,
    readings: Mapping[str, Readings],
    labels: NDArray[np.int64],
    others: Mapping[str, Sequence[Parts]],
    threshold: float,
) -> Limit:
    """The limit of one part by the rule above; `others` are parts of clean authentic faces by source.

    `threshold` is the logit above which `CLEAN_FALSE` of clean authentic crops lie.
    """
    sign = 1.0 if ladder.upper else -1.0
    climbed = [readings[name] for name in ("clean", *ladder.rungs)]
    badness, logits, truth = _pooled(ladder.part, sign, climbed, labels)
    bound = _crossing(badness, logits, truth, threshold, _clean_auc(readings, labels) - AUC_LOST)
    allowed, costs = _allowed(ladder.part, sign, readings, labels, others)
    worst = float(badness.max()) if bound is None else bound
    cause = "the members' bound" if bound is not None else "the end of the ladder"
    value, cause = (allowed, costs) if allowed > worst else (worst, cause)
    value = _rounded(sign * value, upper=ladder.upper)
    return Limit(value, cause, None if bound is None else sign * bound, sign * allowed)


def _pooled(
    part: str, sign: float, climbed: Iterable[Readings], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """How bad (the larger, the worse), logit and label of every crop on the ladder that has the part."""
    rows = [
        (sign * parts[part], logit, label)
        for rung in climbed
        for parts, logit, label in zip(rung.parts, rung.logits, labels, strict=True)
        if part in parts
    ]
    table = np.array(sorted(rows), np.float64)
    return table[:, 0], table[:, 1], table[:, 2].astype(np.int64)


def _crossing(
    badness: NDArray[np.float64],
    logits: NDArray[np.float64],
    labels: NDArray[np.int64],
    threshold: float,
    least_auc: float,
) -> float | None:
    """The badness at which the window's AUC, fitted to fall, or its false positives, fitted to rise, leave
    their bound; None where they never do."""
    starts = range(0, max(1, len(badness) - WINDOW + 1), STEP)
    windows = [slice(start, start + WINDOW) for start in starts]
    windows = [w for w in windows if 0 < labels[w].sum() < len(labels[w])]
    losses = rising(np.array([-auc(logits[w], labels[w]) for w in windows]))
    false = rising(np.array([float((logits[w][labels[w] == 0] > threshold).mean()) for w in windows]))
    beyond = np.flatnonzero((losses > -least_auc) | (false > FALSE_BOUND))
    return float(np.median(badness[windows[beyond[0]]])) if len(beyond) else None


def rising(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest sequence that never falls, by least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values.tolist():
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    return np.array([mean for mean, count in blocks for _ in range(count)])


def _allowed(
    part: str,
    sign: float,
    readings: Mapping[str, Readings],
    labels: NDArray[np.int64],
    others: Mapping[str, Sequence[Parts]],
) -> tuple[float, str]:
    """The badness that a limit must at least let pass, and who asks for it."""
    clean = [parts for parts, label in zip(readings["clean"].parts, labels, strict=True) if label == 0]
    asked = [(MOST_LOST, f"clean faces of {name}", found) for name, found in others.items()]
    asked += [(MOST_LOST, "clean faces of the ladder", clean)]
    asked += [(MILD_LOST, f"faces at {name}", readings[name].parts) for name in MILD]
    return max(
        (float(np.quantile([sign * parts[part] for parts in found], 1 - lost)), who)
        for lost, who, found in asked
        if all(part in parts for parts in found)
    )


def _rounded(value: float, *, upper: bool) -> float:
    """Rounded away from biting, to `SIGNIFICANT` digits."""
    scale = 10.0 ** (SIGNIFICANT - 1 - int(np.floor(np.log10(max(value, 1e-9)))))
    whole = np.ceil(value * scale) if upper else np.floor(value * scale)
    return round(float(whole / scale), 6)


def _clean_auc(readings: Mapping[str, Readings], labels: NDArray[np.int64]) -> float:
    return auc(readings["clean"].logits, labels)


def read_ladders(
    members: Sequence[Member], ensemble: Ensemble, probes: Sequence[Probe], seed: int
) -> dict[str, Readings]:
    """Every probe under every rung, read by the members and fused; the same seed gives the same crops."""
    readings = {}
    for name, rung in RUNGS.items():
        made = [rung(probe.image, np.random.default_rng((seed, k))) for k, probe in enumerate(probes)]
        pictures = [picture for picture, _ in made]
        logits = by_crop({member.name: crop_logits(pictures, member) for member in members})
        readings[name] = Readings(
            tuple(_parts(picture, qp) for picture, qp in made),
            np.array([ensemble.fuse(of_crop) for of_crop in logits]),
        )
        logger.info("%s: AUC %.3f", name, auc(readings[name].logits, _labels(probes)))
    return readings


def _parts(picture: Image, qp: float | None) -> Parts:
    return with_qp(_quality(picture), qp, QualityLimits()).parts


def _quality(picture: Image) -> Quality:
    height, width = picture.shape[:2]
    return measure(picture, (0.0, 0.0, float(width), float(height)), None, QualityLimits())


def _labels(probes: Iterable[Probe]) -> NDArray[np.int64]:
    return np.array([probe.label for probe in probes], np.int64)


def other_faces(data_dir: Path, name: str, seed: int) -> list[Parts]:
    """Parts of the largest face in pictures of another authentic source, found as at run time.

    Raises DataError for a missing file.
    """
    detector = MtcnnDetector(min_face_px=40, confidence=0.9)
    found: list[Parts] = []
    for picture in _pictures(data_dir / f"{name}.tar", seed):
        faces = detector.detect([picture])[0]
        if faces:
            found.append(measure(picture, faces[0].box, faces[0].landmarks, QualityLimits()).parts)
    return found


def _pictures(path: Path, seed: int) -> Iterable[Image]:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    with tarfile.open(path) as tar:
        files = [entry for entry in tar if entry.isfile()]
        for index in sorted(np.random.default_rng(seed).permutation(len(files))[:OTHER_COUNT]):
            file = tar.extractfile(files[index])
            assert file is not None
            picture = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR)
            if picture is None:
                raise DataError(f"{files[index].name}: not a picture")
            yield np.ascontiguousarray(picture[:, :, ::-1], np.uint8)


def moire_limit(
    readings: Mapping[str, Readings],
    probes: Sequence[Probe],
    others: Mapping[str, Sequence[Parts]],
) -> tuple[Limit, int]:
    """Above every face on every rung and authentic ones enlarged; and how many people that rests on."""
    authentic = [probe for probe in probes if probe.label == 0]
    found = [
        *(parts for rung in readings.values() for parts in rung.parts),
        *(parts for source in others.values() for parts in source),
        *(_parts(rescaled(factor)(p.image, RNG), None) for p in authentic for factor in ENLARGED),
    ]
    peaks = [parts["moire"] for parts in found if "moire" in parts]
    people = len({probe.identity for probe in authentic}) + sum(len(source) for source in others.values())
    highest = max(peaks)
    value = _rounded(highest * MOIRE_MARGIN, upper=True)
    return Limit(value, "no face of the data exceeds it", None, highest), people


RNG = np.random.default_rng(0)
"""For conditions that draw nothing."""


def gate_table(
    readings: Mapping[str, Readings], labels: NDArray[np.int64], limits: QualityLimits, threshold: float
) -> list[dict[str, Any]]:
    """What the whole gate does to every rung: shares, 0..1, and the reasons' shares of all crops."""
    rows = []
    for name, rung in readings.items():
        judged = [reasons_of(parts, limits) for parts in rung.parts]
        kept = np.array([not reasons for reasons in judged])
        false = (rung.logits > threshold) & (labels == 0)
        reasons = {
            reason.value: float(np.mean([reason in found for found in judged]))
            for reason in Reason
            if any(reason in found for found in judged)
        }
        rows.append(
            {
                "rung": name,
                "auc": round(auc(rung.logits, labels), 4),
                "decided": round(float(kept.mean()), 4),
                "false_positives_before": round(float(false.sum() / (labels == 0).sum()), 4),
                "false_positives_after": round(float((false & kept).sum() / (labels == 0).sum()), 4),
                "reasons": {reason: round(share, 4) for reason, share in reasons.items()},
            }
        )
    return rows


def run(data_dir: Path, members: Sequence[Member], crops: int, seed: int) -> dict[str, Any]:
    """Everything that the file holds. Raises DataError for missing data."""
    probes = load_probes(data_dir, crops, seed)
    labels, ensemble = _labels(probes), load_ensemble(members)
    readings = read_ladders(members, ensemble, probes, seed)
    others = {name: other_faces(data_dir, name, seed) for name in OTHER_SOURCES}
    threshold = float(np.quantile(readings["clean"].logits[labels == 0], 1 - CLEAN_FALSE))
    limits = {ladder.field: derive(ladder, readings, labels, others, threshold) for ladder in LADDERS}
    limits["max_moire"], people = moire_limit(readings, probes, others)
    gate = QualityLimits(**{name: limit.value for name, limit in limits.items()})
    return {
        "schema": SCHEMA,
        "members": {member.name: member.sha256 for member in members},
        "data": _data(probes, others),
        "rule": {
            "auc_lost": AUC_LOST,
            "clean_false_positives": CLEAN_FALSE,
            "false_positive_bound": FALSE_BOUND,
            "most_clean_faces_lost": MOST_LOST,
            "most_mild_faces_lost": MILD_LOST,
        },
        "limits": {name: _told(limit) for name, limit in sorted(limits.items())},
        "false_advice": {"SCREEN_IN_PICTURE": {"people": people, "alarms": 0, "upper": round(3 / people, 4)}},
        "clean_faces_decided": {
            name: round(float(np.mean([not reasons_of(parts, gate) for parts in found])), 4)
            for name, found in others.items()
        },
        "rungs": gate_table(readings, labels, gate, threshold),
    }


def _data(probes: Sequence[Probe], others: Mapping[str, Sequence[Parts]]) -> str:
    people = len({probe.identity for probe in probes})
    counts = ", ".join(f"{len(found)} of {name}" for name, found in others.items())
    return f"{len(probes)} crops of val at source size of {people} people; {counts}"


def _told(limit: Limit) -> dict[str, Any]:
    return {
        "limit": limit.value,
        "because_of": limit.cause,
        "bound": None if limit.bound is None else round(limit.bound, 4),
        "allowed": round(limit.allowed, 4),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Derive the limits and write the file; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m detectors.training.gate", description=__doc__)
    parser.add_argument("members", nargs="*", help="names or folders; none: every shipped member")
    parser.add_argument("--data", type=Path, required=True, help="folder of the training data")
    parser.add_argument("--out", type=Path, default=FILE, help="file to write (default: the shipped one)")
    parser.add_argument("--crops", type=int, default=CROPS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        members = served([load_member(name) for name in given.members or list_members()])
        with torch.inference_mode():
            record = run(given.data, members, given.crops, given.seed)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    given.out.write_text(json.dumps(record, indent=2) + "\n")
    for row in record["rungs"]:
        logger.info("%s", row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
