"""Every ensemble of some networks on videos whose truth is known: `unmask evaluate --ensembles` (SCIENCE A).

Videos are looked at once; the logits of every frame and network are kept in `frames.jsonl`, from which all
tables come, and with which a stopped run goes on. Frame: sigmoid(mean over networks of the logit). Video: per
network the mean of its frames' logits, then the mean over networks, then sigmoid.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from numpy.typing import NDArray

from detectors import registry
from detectors.readings import FaceReading, Image
from stream.assemble import Assembly, Reader, build_reader
from stream.config import Config, Members
from stream.curves import Floats, Interval, Truth, auc, bootstrap, log_loss
from stream.errors import Code, UnmaskError
from stream.evaluate import SEED, Item, read_manifest
from stream.score import OK, PICTURES, SOME_FAILED, VIDEO_BATCH, parts, read_picture, reduced
from stream.stills import evenly

SCHEMA = 1

FRAMES = 32
"""Of a video; the paper's tests take as many."""

SMALL = 3
"""Ensembles of up to so many networks are listed, and that of all: with ten networks 176 rows, not 1023."""

Look = Callable[[Path], "Looked"]


@dataclass(frozen=True, slots=True)
class Looked:
    """One video: `frames` looked at, of which `faceless` show no face; `others`: further faces in them.

    `logits` per network, one for each frame with a face, in order. `size` (bytes) and `mtime_ns` tell
    whether the file is still the same.
    """

    size: int
    mtime_ns: int
    frames: int
    faceless: int
    others: int
    logits: Mapping[str, Sequence[float]]

    @property
    def faces(self) -> int:
        return self.frames - self.faceless


@dataclass(frozen=True, slots=True)
class Measured:
    """LogLoss in nats and AUC, over frames or over videos."""

    log_loss: Interval
    auc: Interval

    def __str__(self) -> str:
        return f"{_number(self.log_loss)}/{_number(self.auc)}"


@dataclass(frozen=True, slots=True)
class Row:
    """One ensemble; `published` is what the paper has for these networks on its own test split."""

    members: tuple[str, ...]
    frame: Measured
    video: Measured
    published: registry.Row | None


@dataclass(frozen=True, slots=True)
class Tables:
    """What came out. Every file of the manifest is a video, or in `without_face`, or in `unreadable`."""

    schema: int
    members: Mapping[str, str]
    frames_a_video: int
    videos: int
    real: int
    fake: int
    identities: int
    frames: int
    faceless_frames: int
    further_faces: int
    without_face: tuple[str, ...]
    unreadable: Mapping[str, str]
    rows: tuple[Row, ...]


def run(
    settings: Config,
    manifest: Path,
    wanted: Sequence[str],
    frames: int,
    crops: bool,
    intervals: bool,
    folder: Path,
    as_json: bool,
    out: TextIO,
) -> int:
    """Measure every ensemble of the networks `wanted` (names or patterns; none: those of the settings).

    Writes frames.jsonl, ensembles.json and ensembles.md into `folder`; returns the exit code: 1 if a file
    could not be read. Raises `UnmaskError`.
    """
    items = read_manifest(manifest)
    _refuse_doubles(items, manifest)
    names = expand(wanted) or settings.members.names
    # the largest face of a frame is the one that counts, and shadow or heavy members are not asked
    chosen = settings.model_copy(
        update={
            "members": Members(names=tuple(names)),
            "faces": settings.faces.model_copy(update={"max_faces": 1}),
        }
    )
    assembly = build_reader(chosen)
    look = _look_at(assembly.reader, chosen, frames, crops)
    kept = Kept(folder / "frames.jsonl", _header(assembly, chosen, frames, crops))
    looked, unreadable = look_at_all(items, kept, look, sys.stderr)
    found = tables(items, looked, unreadable, assembly.provenance.versions, frames, intervals)
    text = json.dumps(asdict(found), indent=2) + "\n"
    (folder / "ensembles.json").write_text(text, encoding="utf-8")
    shown = markdown(found)
    (folder / "ensembles.md").write_text(shown, encoding="utf-8")
    out.write(json.dumps(asdict(found)) + "\n" if as_json else shown)
    return SOME_FAILED if unreadable else OK


def expand(patterns: Iterable[str]) -> tuple[str, ...]:
    """Return the networks that the patterns name, each once; what is no pattern stays as it is.

    Raises `UnmaskError` (CONFIG) for a pattern that no shipped or published network matches.
    """
    known = [*registry.shipped(), *(registry.PREFIX + name for name in registry.PUBLISHED)]
    found: dict[str, None] = {}
    for pattern in patterns:
        if not set(pattern) & set("*?["):
            found[pattern] = None
            continue
        matching = [name for name in known if fnmatchcase(name, pattern)]
        if not matching:
            raise UnmaskError(
                Code.CONFIG, f"--members {pattern!r} matches no network; there are: {', '.join(known)}"
            )
        found |= dict.fromkeys(matching)
    return tuple(found)


def _refuse_doubles(items: Sequence[Item], manifest: Path) -> None:
    seen: set[Path] = set()
    for item in items:
        if item.path in seen:
            raise UnmaskError(
                Code.CONFIG, f"manifest {manifest} lists {item.path} twice; each file counts once"
            )
        seen.add(item.path)


def _header(assembly: Assembly, settings: Config, frames: int, crops: bool) -> dict[str, Any]:
    """Return all that the logits of a video depend on besides the video."""
    return {
        "schema": SCHEMA,
        "members": assembly.provenance.versions,
        "frames": frames,
        "crops": crops,
        "faces.min_face_px": settings.faces.min_face_px,
        "faces.confidence": settings.faces.confidence,
        "decode.detect_width": settings.decode.detect_width,
    }


def _look_at(reader: Reader, settings: Config, count: int, crops: bool) -> Look:
    """Return what reads one video, picture or crop. It raises `UnmaskError` for one that cannot be read."""
    width = settings.decode.detect_width

    def look(path: Path) -> Looked:
        before, status = reader.faces_cut_off, _status(path)
        if crops:
            return _looked(status, 1, 0, reader.read_crops([_picture(path)]))
        frames, readings = 0, list[FaceReading]()
        for part in parts(_pictures(path, count, width), VIDEO_BATCH):
            frames += len(part)
            readings += [faces[0] for faces in reader.read(part) if faces]
        return _looked(status, frames, reader.faces_cut_off - before, readings)

    return look


def _pictures(path: Path, count: int, width: int) -> Iterator[tuple[Image, Image]]:
    if path.suffix.lower() in PICTURES:
        picture = _picture(path)
        yield picture, reduced(picture, width)
        return
    for still in evenly(path, count, width):
        yield still.image, still.small


def _picture(path: Path) -> Image:
    picture = read_picture(path)
    if isinstance(picture, str):
        raise UnmaskError(Code.SOURCE_INVALID, picture)
    return picture


def _status(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise UnmaskError(Code.SOURCE_NOT_FOUND, f"cannot be read: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns


def _looked(status: tuple[int, int], frames: int, others: int, readings: Sequence[FaceReading]) -> Looked:
    names = readings[0].logits if readings else {}
    for reading in readings:
        for name, logit in reading.logits.items():
            if not math.isfinite(logit):
                raise UnmaskError(Code.ENGINE, f"network {name} gives a logit of {logit}")
    return Looked(
        size=status[0],
        mtime_ns=status[1],
        frames=frames,
        faceless=frames - len(readings),
        others=others,
        logits={name: [round(reading.logits[name], 6) for reading in readings] for name in names},
    )


class Kept:
    """The videos looked at so far, in a file: a header, then one JSON object a line and video."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Open or make `path`. Raises `UnmaskError` (CONFIG) when it was made with another header."""
        self._path = path
        self._looked: dict[str, Looked] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                self._read(file, header)
        except OSError as error:
            raise UnmaskError(Code.CONFIG, f"{path} cannot be written: {error.strerror}") from None

    def _read(self, file: BinaryIO, header: Mapping[str, Any]) -> None:
        file.seek(0)
        whole = 0
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                break  # a run was killed while it wrote this
            try:
                record = json.loads(line)
                if number == 0:
                    self._check(record, header)
                else:
                    path = record.pop("path")
                    self._looked[path] = Looked(**record)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UnmaskError(
                    Code.CONFIG, f"{self._path} line {number + 1} is not what a run writes; delete the file"
                ) from None
            whole += len(line)
        file.truncate(whole)
        if whole == 0:
            file.write(json.dumps(header).encode() + b"\n")

    def _check(self, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        for field, value in header.items():
            if found.get(field) != value:
                raise UnmaskError(
                    Code.CONFIG,
                    f"{self._path} was made with {field} {found.get(field)}, now it is {value}; "
                    "choose another --out, or delete the file",
                )

    def get(self, path: Path) -> Looked | None:
        """Return what is known of a video, None if nothing is or the file is another by now."""
        looked = self._looked.get(str(path))
        if looked is None or (looked.size, looked.mtime_ns) != _status(path):
            return None
        return looked

    def add(self, path: Path, looked: Looked) -> None:
        """Keep a video. Raises `UnmaskError` (CONFIG) when the disk refuses."""
        line = json.dumps({"path": str(path), **asdict(looked)}) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise UnmaskError(Code.CONFIG, f"{self._path} cannot be written: {error.strerror}") from None
        self._looked[str(path)] = looked


def look_at_all(
    items: Sequence[Item], kept: Kept, look: Look, progress: TextIO
) -> tuple[dict[Path, Looked], dict[str, str]]:
    """Look at each file that `kept` does not know; return all that was seen, and why what was not."""
    looked: dict[Path, Looked] = {}
    unreadable: dict[str, str] = {}
    for number, item in enumerate(items, 1):
        try:
            known = kept.get(item.path)
            found = known or look(item.path)
        except UnmaskError as error:
            unreadable[str(item.path)] = str(error)
            continue
        if known is None:
            kept.add(item.path, found)
        looked[item.path] = found
        if progress.isatty():
            progress.write(f"\r{number} of {len(items)}" + ("\n" if number == len(items) else ""))
            progress.flush()
    return looked, unreadable


def tables(
    items: Sequence[Item],
    looked: Mapping[Path, Looked],
    unreadable: Mapping[str, str],
    versions: Mapping[str, str],
    frames: int,
    intervals: bool,
) -> Tables:
    """Return the figures of every ensemble; a video without any face is left out of them and named.

    Raises `UnmaskError` (SOURCE_INVALID) when no video shows a face.
    """
    seen = [item for item in items if item.path in looked]
    shown = [item for item in seen if looked[item.path].faces]
    if not shown:
        raise UnmaskError(
            Code.SOURCE_INVALID,
            f"no face was found: {len(seen)} files without one, {len(unreadable)} unreadable",
        )
    videos = [looked[item.path] for item in shown]
    return Tables(
        schema=SCHEMA,
        members=dict(versions),
        frames_a_video=frames,
        videos=len(shown),
        real=sum(not item.manipulated for item in shown),
        fake=sum(item.manipulated for item in shown),
        identities=len({item.identity for item in shown}),
        frames=sum(video.faces for video in videos),
        faceless_frames=sum(looked[item.path].faceless for item in seen),
        further_faces=sum(looked[item.path].others for item in seen),
        without_face=tuple(str(item.path) for item in seen if not looked[item.path].faces),
        unreadable=dict(unreadable),
        rows=tuple(_rows(shown, videos, list(versions), intervals)),
    )


def _rows(
    items: Sequence[Item], videos: Sequence[Looked], names: Sequence[str], intervals: bool
) -> Iterator[Row]:
    by_video = {name: np.array([np.mean(video.logits[name]) for video in videos]) for name in names}
    by_frame = {name: np.concatenate([video.logits[name] for video in videos]) for name in names}
    truth = np.array([item.manipulated for item in items], np.bool_)
    groups = [item.identity for item in items]
    repeats = [video.faces for video in videos]
    frame_truth = np.repeat(truth, repeats)
    frame_groups = np.repeat(groups, repeats).tolist()
    for members in subsets(names):
        yield Row(
            members=members,
            frame=_measured(frame_truth, fused([by_frame[m] for m in members]), frame_groups, intervals),
            video=_measured(truth, fused([by_video[m] for m in members]), groups, intervals),
            published=registry.paper_figures(frozenset(members)),
        )


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the ensembles of a table: the paper's baseline, every single, pair and triple, and all."""
    together = [name for name in names if not registry.is_baseline(name)]
    alone = [(name,) for name in names if registry.is_baseline(name)]
    sizes = sorted({*range(1, min(SMALL, len(together)) + 1), len(together)} - {0})
    return alone + [members for size in sizes for members in combinations(together, size)]


def fused(logits: Sequence[Floats]) -> Floats:
    """Return sigmoid(mean over networks) of logits (n,): probabilities (n,)."""
    mean = np.mean(np.stack(logits), axis=0)
    return np.asarray(np.exp(-np.logaddexp(0.0, -mean)), np.float64)


def _measured(truth: Truth, scores: Floats, groups: Sequence[str], intervals: bool) -> Measured:
    def interval(figure: Callable[[NDArray[np.intp]], float | None]) -> Interval:
        if not intervals:
            return Interval(figure(np.arange(len(truth))), None, None)
        return bootstrap(figure, groups, np.random.default_rng(SEED))

    return Measured(
        log_loss=interval(lambda index: log_loss(truth[index], scores[index])),
        auc=interval(lambda index: auc(truth[index], scores[index])),
    )


def markdown(found: Tables) -> str:
    """Return the table in the paper's layout, LogLoss/AUC by frame and by video, and what was left out."""
    published = any(row.published for row in found.rows)
    head = ["model(s)", "frame", "video"] + (["published, frame", "published, video"] if published else [])
    lines = [
        f"{found.videos} videos ({found.real} real, {found.fake} fake; {found.identities} identities), "
        f"{found.frames} faces, up to {found.frames_a_video} frames a video. LogLoss/AUC.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(_cells(row, published))} |" for row in found.rows),
        "",
        *_left_out(found),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Row, published: bool) -> list[str]:
    cells = ["+".join(registry.short_name(name) for name in row.members), str(row.frame), str(row.video)]
    if not published:
        return cells
    return [*cells, *((str(row.published.frame), str(row.published.video)) if row.published else ("", ""))]


def _left_out(found: Tables) -> list[str]:
    return [
        f"Left out: {found.faceless_frames} frames without a face, {found.further_faces} faces that were not "
        f"the largest, {len(found.without_face)} files without a face, {len(found.unreadable)} unreadable.",
        *(f"- without a face: {path}" for path in found.without_face),
        *(f"- unreadable: {path}: {error}" for path, error in found.unreadable.items()),
    ]


def _number(figure: Interval) -> str:
    if figure.value is None:
        return "unknown"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.4f}"
    return f"{figure.value:.4f} ({figure.low:.4f} to {figure.high:.4f})"
