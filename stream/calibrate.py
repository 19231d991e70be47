"""`unmask calibrate`: thresholds for a user's own feeds, and what may be claimed for them.

Faces are read once, by the same parts that watch live; the readings are then replayed through the stream's
own logic under every rung of `stream.ladder`. What is claimed is a limit, not an estimate (SCIENCE D).
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from detectors.calibration import Histogram
from detectors.drift import reference_histograms
from detectors.readings import FaceReading
from stream import own
from stream.assemble import Assembly, build_reader, data_folder
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.footage import File, Footage, gather
from stream.gate import gated, quality_limits
from stream.kept import Kept, Look, without_pictures
from stream.ladder import LOOSER, Choice, Rung, choose, ladder, limits
from stream.poisson import CONFIDENCE, upper_limit
from stream.replay import Follower, Outcome, Seen, parts, seen
from stream.stills import Still, stills
from stream.verdicts import NO_CALIBRATION
from stream.windows import MICRO

logger = logging.getLogger(__name__)

OK, SOME_FAILED = 0, 1
"""Exit codes; as those of `unmask score`."""

PERSON_HOURS = 1.0
"""What one person counts for at most: the claim is about an hour of anybody's, and more hours of somebody who
was watched for one say little of others (SCIENCE D: hours of one person count as one person)."""

BATCH = 8
"""Pictures that are read at once: full resolution is held of these only."""

BATCH_US = MICRO
"""Media time of a batch: how much later than live a burst may begin."""

PERSON_LOOKS = 360
"""Looks of one person that count in the reference for drift: those of an hour."""

REFERENCE_PEOPLE = 30
"""Fewer people are no reference for drift, and the shipped one stays: its ten bins need some people each."""

HOUR_S = 3600.0

LEAST_TOLD_S = 60.0
"""Less than this left is not worth a word."""

Unreadable = tuple[Path, str]
"""A file that could not be read, and why."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user wants: footage, who is in it (CSV, None: by folder), false alarms an hour at most."""

    authentic: tuple[str, ...]
    manipulated: tuple[str, ...]
    people: Path | None
    target: float


@dataclass(frozen=True, slots=True)
class Watched:
    """One video after replay: what there was to judge, and the outcome of every rung."""

    file: File
    seen: Seen
    outcomes: tuple[Outcome, ...]
    reasons: Mapping[str, int]
    """Why faces in it were not good enough, by number of pictures."""
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What drift is measured by, face by face."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the footage says, per rung where it differs.

    `hours` with a face good enough to be decided on; `effective_hours` with each person counted for at most
    `PERSON_HOURS`; `alarms` are incidents opened on authentic footage, `weighted` the same with the hours'
    weights; `accused` is the sum over people of the share of their tracks that were accused. `recall` is the
    mean over people of the share of their manipulated videos in which an incident opened, None without any.
    """

    people: int
    files: int
    footage_hours: float
    hours: float
    effective_hours: float
    tracks: int
    alarms: tuple[int, ...]
    weighted: tuple[float, ...]
    accused: tuple[float, ...]
    manipulated_people: int
    manipulated_files: int
    recall: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Calibrated:
    """All that a calibration found, for file and report."""

    rungs: tuple[Rung, ...]
    bounds: tuple[float, ...]
    choice: Choice
    evidence: Evidence
    watched: tuple[Watched, ...]
    point: own.OperatingPoint


class Calibrator:
    """Reads and replays videos. Used by one thread."""

    def __init__(self, settings: Config, assembly: Assembly, folder: Path) -> None:
        """`folder` keeps readings. Raises `UnmaskError` (CONFIG) for members without a calibration."""
        if assembly.calibration.kind == NO_CALIBRATION:
            names = ", ".join(model.name for model in assembly.provenance.models)
            raise UnmaskError(
                Code.CONFIG,
                f"members {names} have no calibration together, so nobody is ever accused and there are no "
                "thresholds to fix; name calibrated members in members.names",
            )
        self._settings = settings
        self._assembly = assembly
        self._rungs = ladder(settings.verdict)
        self._kept = Kept(folder, _facts(settings, assembly))

    def watch(self, file: File) -> tuple[Watched, bool]:
        """Return a video replayed under every rung, and whether its readings were there already.

        Raises `UnmaskError` when it cannot be read.
        """
        looks = self._kept.load(file.sha256)
        known = looks is not None
        if looks is None:
            looks = self._read(file.path)
            self._keep(file, looks)
        followers = [self._follower(rung) for rung in self._rungs]
        for follower in followers:
            for look in looks:
                follower.add(look)
        now = followers[LOOSER]
        reasons = Counter(
            reason.value for look in now.taken for face in look.faces for reason in face.quality.reasons
        )
        outcomes = tuple(follower.outcome() for follower in followers)
        shown = seen(now.taken, now.tracks, self._settings)
        return Watched(file, shown, outcomes, reasons, parts(now.taken, now.tracks)), known

    def _keep(self, file: File, looks: Sequence[Look]) -> None:
        try:
            self._kept.save(file.sha256, looks)
        except OSError as error:
            # A full disk costs reading this video again, not the calibration.
            logger.warning("readings of %s could not be kept: %s", file.path, error.strerror)

    def _read(self, path: Path) -> tuple[Look, ...]:
        """Read the faces of a video, as often as the most eager rung asks for: more than any other one."""
        follower = self._follower(self._rungs[0])
        pictures = stills(path, follower.wanted_fps, self._settings.decode.detect_width)
        looks: list[Look] = []
        for part in _batches(pictures):
            readings = self._assembly.reader.read([(still.image, still.small) for still in part])
            for still, found in zip(part, readings, strict=True):
                faces = gated(found, still.qp, quality_limits(self._settings))
                suspicious = follower.wanted_fps() > self._settings.sampling.idle_fps
                look = _look(still, self._deepened(still, faces) if suspicious else faces)
                looks.append(look)
                follower.add(look)
        return tuple(looks)

    def _deepened(self, still: Still, faces: tuple[FaceReading, ...]) -> tuple[FaceReading, ...]:
        """Let heavy members, if there are any, read what looks wrong, as they do live within their budget."""
        if self._assembly.heavy is None:
            return faces
        return self._assembly.heavy.deepen(still.image, faces)

    def _follower(self, rung: Rung) -> Follower:
        settings = self._settings.model_copy(update={"verdict": rung.applied(self._settings.verdict)})
        reader = self._assembly.reader
        return Follower(
            settings, self._assembly.calibration, self._assembly.provenance, reader.engine, reader.precision
        )


def run(settings: Config, asked: Asked, target_file: Path, report: Path | None, out: TextIO) -> int:
    """Calibrate, write the file (and the report), tell it; return the exit code.

    Raises `UnmaskError` for what the user can put right.
    """
    _check_target(asked.target)
    _check_out(target_file)
    footage = gather(asked.authentic, asked.manipulated, asked.people)
    # With the cascade: live, a heavy member is heard only where the cheap ones are suspicious.
    assembly = build_reader(settings)
    calibrator = Calibrator(settings, assembly, data_folder(settings) / "calibrate")
    watched, unreadable = _watch_all(calibrator, footage, out, time.monotonic)
    try:
        found = calibrated(settings, assembly, watched, asked.target)
    except UnmaskError:
        for line in left_out(footage, unreadable, watched):
            out.write(line + "\n")
        raise
    sha256 = own.write(target_file, assembly.calibration, found.point, reference(watched))
    written = [target_file]
    if report is not None:
        from stream.calibrate_report import write_report

        written += write_report(report, found, footage, unreadable, sha256)
    told = [
        *lines(found, footage, unreadable),
        f"written: {', '.join(map(str, written))}",
        f"use it: --set verdict.calibration={target_file} (SHA-256 {sha256})",
    ]
    out.write("\n".join(told) + "\n")
    return SOME_FAILED if unreadable else OK


def calibrated(settings: Config, assembly: Assembly, watched: Sequence[Watched], target: float) -> Calibrated:
    """Return the operating point for `target` false alarms an hour, and what it rests on.

    Raises `UnmaskError` (SOURCE_INVALID) when there is no authentic footage with a face that could be judged.
    """
    rungs = ladder(settings.verdict)
    evidence = weigh(watched)
    bounds = limits(evidence.weighted, evidence.effective_hours)
    choice = choose(bounds, target, evidence.recall)
    chosen = choice.rung
    point = own.OperatingPoint(
        **{name: getattr(rungs[chosen], name) for name in own.THRESHOLDS},
        false_alarms_per_hour=target,
        uncalibrated_for_target=not choice.reached,
        confidence=CONFIDENCE,
        bound_per_hour=bounds[chosen],
        bound_per_track=min(1.0, upper_limit(evidence.accused[chosen]) / evidence.people),
        bound_for_these_people=upper_limit(evidence.alarms[chosen]) / evidence.hours,
        alarms=evidence.alarms[chosen],
        people=evidence.people,
        tracks=evidence.tracks,
        hours=evidence.hours,
        effective_hours=evidence.effective_hours,
        footage_hours=evidence.footage_hours,
        files=evidence.files,
        recall=evidence.recall[chosen] if evidence.recall else None,
        manipulated_files=evidence.manipulated_files,
        made_for=own.made(assembly.provenance.models),
        calibrated_from=assembly.calibration.sha256,
        settings=own.facts(settings),
    )
    return Calibrated(rungs, tuple(bounds), choice, evidence, tuple(watched), point)


def weigh(watched: Sequence[Watched]) -> Evidence:
    """Add up what was seen and said, people counted once; videos without a face to judge count for nothing.

    Raises `UnmaskError` (SOURCE_INVALID) when no authentic one is left.
    """
    judged = [item for item in watched if item.seen.good_s > 0]
    authentic = _by_person(item for item in judged if not item.file.manipulated)
    manipulated = _by_person(item for item in judged if item.file.manipulated)
    if not authentic:
        raise UnmaskError(Code.SOURCE_INVALID, _nothing([w for w in watched if not w.file.manipulated]))
    hours = [sum(item.seen.good_s for item in items) / HOUR_S for items in authentic.values()]
    shares = [min(1.0, PERSON_HOURS / own_hours) for own_hours in hours]
    tracks = [max(1, sum(item.seen.tracks for item in items)) for items in authentic.values()]
    rungs = range(len(watched[0].outcomes))
    alarms = [[sum(w.outcomes[r].alarms for w in items) for items in authentic.values()] for r in rungs]
    accused = [[sum(w.outcomes[r].accused for w in items) for items in authentic.values()] for r in rungs]
    return Evidence(
        people=len(authentic),
        files=sum(map(len, authentic.values())),
        footage_hours=sum(item.seen.shown_s for items in authentic.values() for item in items) / HOUR_S,
        hours=sum(hours),
        effective_hours=sum(map(_product, zip(hours, shares, strict=True))),
        tracks=sum(tracks),
        alarms=tuple(map(sum, alarms)),
        weighted=tuple(sum(map(_product, zip(counts, shares, strict=True))) for counts in alarms),
        accused=tuple(
            sum(min(1.0, count / total) for count, total in zip(counts, tracks, strict=True))
            for counts in accused
        ),
        manipulated_people=len(manipulated),
        manipulated_files=sum(map(len, manipulated.values())),
        recall=tuple(_recall(manipulated, rung) for rung in rungs) if manipulated else None,
    )


def reference(watched: Sequence[Watched]) -> dict[str, Histogram]:
    """Return how faces and scores of the authentic footage are spread, for drift to be measured against.

    Empty with fewer than `REFERENCE_PEOPLE`. Each person gives at most `PERSON_LOOKS` of his looks, evenly.
    """
    people = _by_person(item for item in watched if item.seen.good_s > 0 and not item.file.manipulated)
    if len(people) < REFERENCE_PEOPLE:
        return {}
    names = dict.fromkeys(part for items in people.values() for item in items for part in item.parts)
    values = {part: [look for items in people.values() for look in _thinned(items, part)] for part in names}
    return reference_histograms(values)


def _thinned(items: Sequence[Watched], part: str) -> list[float]:
    looks = [value for item in items for value in item.parts.get(part, ())]
    return looks[:: max(1, math.ceil(len(looks) / PERSON_LOOKS))]


def lines(found: Calibrated, footage: Footage, unreadable: Sequence[Unreadable]) -> list[str]:
    """Return what was found as lines for a person."""
    point, evidence = found.point, found.evidence
    claim = (
        f"at most {point.bound_per_hour:.3g} false alarms an hour ({point.confidence:.0%} confidence) and "
        f"{point.bound_per_track:.3g} per face followed"
    )
    if point.uncalibrated_for_target:
        headline = f"NOT calibrated for {point.false_alarms_per_hour:g}: this footage supports {claim}"
    else:
        headline = f"calibrated for {point.false_alarms_per_hour:g} false alarms an hour: {claim}"
    return [
        *left_out(footage, unreadable, found.watched),
        headline,
        f"  {point.alarms} false alarms in {point.hours:.4g} h with a face that can be judged "
        f"({point.footage_hours:.4g} h of footage, {point.files} videos)",
        f"  {point.people} people, each counted for at most {PERSON_HOURS:g} h: "
        f"{point.effective_hours:.4g} effective hours",
        f"  were nobody but these ever on screen: at most {point.bound_for_these_people:.3g} an hour",
        *_missing(point),
        "  " + ", ".join(f"{name} {getattr(point, name):g}" for name in own.THRESHOLDS),
        *(
            [f"  found {point.recall:.0%} of {evidence.manipulated_files} manipulated videos"]
            if point.recall is not None
            else []
        ),
    ]


def left_out(footage: Footage, unreadable: Sequence[Unreadable], watched: Sequence[Watched]) -> list[str]:
    """Return a line for everything that was given and does not count, and why."""
    told = [f"not read: {path}: {reason}" for path, reason in unreadable]
    told += [f"counted once, it is there already: {path}" for path in footage.doubled]
    told += [
        f"no face in it that could be judged: {item.file.path}{_why(item.reasons)}"
        for item in watched
        if item.seen.good_s <= 0
    ]
    if footage.other:
        told.append(f"{footage.other} files with other endings passed over")
    if footage.unnamed:
        told.append(f"{footage.unnamed} videos are not in the list of people: a folder counts as a person")
    return told


def _watch_all(
    calibrator: Calibrator, footage: Footage, out: TextIO, monotonic: Callable[[], float]
) -> tuple[list[Watched], list[Unreadable]]:
    watched: list[Watched] = []
    unreadable = list(footage.unreadable)
    begun, read = monotonic(), 0
    for number, file in enumerate(footage.files, start=1):
        try:
            item, known = calibrator.watch(file)
        except UnmaskError as error:
            unreadable.append((file.path, str(error)))
            out.write(f"{number}/{len(footage.files)} {file.path}: not read: {error}\n")
            continue
        watched.append(item)
        read += not known
        left = (monotonic() - begun) / max(1, read) * (len(footage.files) - number)
        out.write(
            f"{number}/{len(footage.files)} {file.path}: {item.seen.shown_s:.0f} s, "
            f"{item.seen.good_s:.0f} s with a face that can be judged, "
            f"{item.outcomes[LOOSER].alarms} incidents{' (read before)' if known else ''}"
            f"{f', about {left / 60:.0f} min left' if left >= LEAST_TOLD_S else ''}\n"
        )
        out.flush()
    return watched, unreadable


def _nothing(authentic: Sequence[Watched]) -> str:
    if not authentic:
        return "none of the authentic videos could be read; thresholds need footage of faces"
    shown_s = sum(item.seen.shown_s for item in authentic)
    if not any(item.seen.face_s or item.reasons for item in authentic):
        return (
            f"no face was found in {len(authentic)} authentic videos ({shown_s:.0f} s); thresholds need "
            "footage with faces at least faces.min_face_px wide"
        )
    reasons = sum((Counter(item.reasons) for item in authentic), Counter[str]())
    return (
        f"no face in {len(authentic)} authentic videos ({shown_s:.0f} s) was good enough to be judged"
        f"{_why(reasons)}; footage must be such that a face in it can be decided on"
    )


def _why(reasons: Mapping[str, int]) -> str:
    most = Counter(reasons).most_common(2)
    return f" ({', '.join(f'{name} {count} times' for name, count in most)})" if most else ""


def _missing(point: own.OperatingPoint) -> list[str]:
    """Say how much more footage the target takes, if it was not reached."""
    if not point.uncalibrated_for_target:
        return []
    needed = upper_limit(0) / point.false_alarms_per_hour
    if point.effective_hours >= needed:
        return [f"  {point.alarms} false alarms even with the strictest thresholds are more than that allows"]
    return [
        f"  the target takes {needed:.4g} effective hours without one: {math.ceil(needed / PERSON_HOURS)} "
        f"people for {PERSON_HOURS:g} h each; {needed - point.effective_hours:.4g} h are missing"
    ]


def _by_person(items: Iterable[Watched]) -> dict[str, list[Watched]]:
    people: dict[str, list[Watched]] = {}
    for item in items:
        people.setdefault(item.file.person, []).append(item)
    return people


def _recall(people: Mapping[str, Sequence[Watched]], rung: int) -> float:
    shares = [sum(w.outcomes[rung].alarms > 0 for w in items) / len(items) for items in people.values()]
    return sum(shares) / len(shares)


def _product(pair: tuple[float, float]) -> float:
    return pair[0] * pair[1]


def _facts(settings: Config, assembly: Assembly) -> dict[str, Any]:
    """Return what the readings of a video depend on: when to read more of it, thresholds among it."""
    return {
        "models": [model.model_dump() for model in own.made(assembly.provenance.models)],
        "calibration": assembly.calibration.sha256,
        "engine": [assembly.reader.engine, assembly.reader.precision],
        "verdict": settings.verdict.model_dump(),
        "deterministic": settings.deterministic,
        **own.facts(settings),
    }


def _look(still: Still, faces: tuple[FaceReading, ...]) -> Look:
    height, width = still.image.shape[:2]
    # Pictures would fill the memory long before the end of a video.
    return Look(still.media_us, width, height, still.cut, tuple(map(without_pictures, faces)))


def _batches(pictures: Iterable[Still]) -> Iterator[list[Still]]:
    """Yield pictures in lists of at most `BATCH`, over at most `BATCH_US`."""
    part: list[Still] = []
    for still in pictures:
        part.append(still)
        if len(part) == BATCH or still.media_us - part[0].media_us >= BATCH_US:
            yield part
            part = []
    if part:
        yield part


def _check_target(target: float) -> None:
    if not (math.isfinite(target) and target > 0):
        raise UnmaskError(
            Code.CONFIG, f"--false-alarms-per-hour is {target:g}; it must be a number above 0, like 0.05"
        )


def _check_out(path: Path) -> None:
    """Refuse before hours of reading what could not be written after them."""
    if path.is_dir():
        raise UnmaskError(
            Code.CONFIG, f"--out {path} is a folder; it must name a file, like calibration.json"
        )
