"""`unmask score`: pictures, videos and cropped faces, each judged by itself."""

import json
import logging
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

import cv2
import numpy as np

from detectors.cues import Cue, missing
from detectors.cues.benford import FOREST, STILLS_ONLY, ForestError, read_forest, read_still
from detectors.cues.benford import NAME as BENFORD
from detectors.late import Late, Share, load_late
from detectors.readings import Box, FaceReading, Image
from stream.aggregate import StreamAggregate
from stream.alerts import Provenance
from stream.clock import SystemClock
from stream.closer import wanted_cues
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.evidence import EvidenceStore
from stream.frames import ScoredFrame
from stream.incidents import IncidentEvent
from stream.scores import ScoreRecord, box_json, claim_json, cues_json, numbers_json, reasons_json
from stream.stills import Still, stills
from stream.verdicts import Calibration, Judgement, Verdict, correlation_s, judge, worst
from stream.windows import MICRO, Sample, estimate, sample_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
VIDEOS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".mpg", ".flv"})
"""What is taken out of a folder. A file that is named itself is a video unless its ending is a picture's."""

READ_THREADS = 2
"""Decoding JPEG releases the interpreter: two keep one network busy, more would only take its cores."""

VIDEO_BATCH = 8
"""Pictures of a video that are read at once: full resolution is held of these only."""

LEAST_WEIGHT = 1e-3
"""A face too bad to decide on still has a score to report: only where there is no face is there none."""

StillCue = Callable[[Image, Box], Cue]
"""Reads a face in a still: `detectors.cues.benford.read_still`."""

OK, SOME_FAILED = 0, 1
"""Exit codes."""


class Reader(Protocol):
    """What is needed of `detectors.reader.FaceReader`."""

    @property
    def engine(self) -> str: ...

    @property
    def precision(self) -> str: ...

    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]: ...

    def read_crops(self, crops: Sequence[Image]) -> list[FaceReading]: ...


@dataclass(slots=True)
class _Face:
    """One face through a file: a track of a video, or the one look at it in a picture."""

    box: Box
    samples: list[Sample] = field(default_factory=list)
    cues: tuple[Share, ...] = ()
    person: int | None = None
    claim: tuple[str, bool] | None = None
    shadow: dict[str, list[float]] = field(default_factory=dict)

    def add(self, reading: FaceReading, media_us: int) -> None:
        self.box = reading.detection.box
        self.samples.append(_sample(reading, media_us))
        for name, logit in reading.shadow.items():
            self.shadow.setdefault(name, []).append(logit)


class Scorer:
    """Judges files. Used by one thread."""

    def __init__(
        self,
        settings: Config,
        reader: Reader,
        calibration: Calibration,
        provenance: Provenance,
        scratch: Path,
        still_cue: StillCue | None = None,
        late: Late | None = None,
    ) -> None:
        """`scratch` is a folder for the evidence that videos raise; whoever made it removes it. `still_cue`
        reads the faces of stills, nobody does without. `late`: how cues are fused, else as shipped."""
        self._settings = settings
        self._reader = reader
        self._calibration = calibration
        self._provenance = provenance
        self._scratch = scratch
        self._still_cue = still_cue
        self._late = late if late is not None else load_late()

    def score(self, paths: Iterable[Path], crops: bool) -> Iterator[dict[str, Any]]:
        """Yield one JSON object per file, in order, as soon as it is known; memory does not grow with them.

        `crops`: the pictures are faces already cropped. A file that cannot be read is `{"path", "error"}`.
        """
        for is_picture, group in groupby(paths, lambda path: crops or path.suffix.lower() in PICTURES):
            if not is_picture:
                yield from (self._video(path) for path in group)
                continue
            look = self._look_at_crops if crops else self._look_at_pictures
            for part in parts(_read_ahead(group, self._settings.engines.batch), self._settings.engines.batch):
                yield from look(part)

    def _look_at_crops(self, part: Sequence[tuple[Path, Image | str]]) -> Iterator[dict[str, Any]]:
        readings = iter(
            self._reader.read_crops([picture for _, picture in part if not isinstance(picture, str)])
        )
        for path, picture in part:
            if isinstance(picture, str):
                yield _failed(path, picture)
            else:
                yield self._still(path, picture, [next(readings)])

    def _look_at_pictures(self, part: Sequence[tuple[Path, Image | str]]) -> Iterator[dict[str, Any]]:
        for path, picture in part:
            if isinstance(picture, str):
                yield _failed(path, picture)
                continue
            small = reduced(picture, self._settings.decode.detect_width)
            yield self._still(path, picture, self._reader.read([(picture, small)])[0])

    def _still(self, path: Path, picture: Image, readings: Sequence[FaceReading]) -> dict[str, Any]:
        """Judge the faces of one picture, which has no time to ask for tracks and many samples in."""
        faces = {index: _Face(reading.detection.box) for index, reading in enumerate(readings)}
        for face, reading in zip(faces.values(), readings, strict=True):
            face.add(reading, 0)
            face.cues = self._late.shares(self._read_still(picture, reading))
        once = self._settings.verdict.model_copy(update={"min_samples": 1, "min_track_s": 0.0})
        judgements = {
            index: judge(estimate(face.samples), self._calibration, once, cues=face.cues)
            for index, face in faces.items()
        }
        chosen = _whole(judgements.values()) or self._faceless(judge(None, self._calibration, once))
        return _result(path, chosen, faces, judgements)

    def _read_still(self, picture: Image, reading: FaceReading) -> list[Cue]:
        """The cues of a face in a still; a face that came cropped is the whole picture."""
        if self._still_cue is None:
            return list(reading.cues)
        return [*reading.cues, self._still_cue(picture, reading.detection.box)]

    def _faceless(self, judgement: Judgement) -> Judgement:
        if self._still_cue is None:
            return judgement
        return replace(judgement, cues=self._late.shares([missing(BENFORD, "no face was found")]))

    def _video(self, path: Path) -> dict[str, Any]:
        try:
            return self._watched(path)
        except UnmaskError as error:
            return _failed(path, str(error))

    def _watched(self, path: Path) -> dict[str, Any]:
        """Judge a video by the stream's own logic; a track counts whole, an incident by its best window."""
        aggregate = StreamAggregate(
            "file",
            self._settings,
            self._calibration,
            self._provenance,
            EvidenceStore(self._scratch, SystemClock()),
            late=self._late,
        )
        skipped = () if self._still_cue is None else self._late.shares([missing(BENFORD, STILLS_ONLY)])
        faces: dict[int, _Face] = {}
        incidents: dict[str, Judgement] = {}
        sampling, decode = self._settings.sampling, self._settings.decode
        for part in parts(stills(path, lambda: sampling.idle_fps, decode.detect_width), VIDEO_BATCH):
            readings = self._reader.read([(still.image, still.small) for still in part])
            for still, found in zip(part, readings, strict=True):
                for output in aggregate.on_frame(self._frame(still, found)):
                    if isinstance(output, ScoreRecord):
                        _follow(faces, output)
                    if isinstance(output, IncidentEvent):
                        incidents[output.incident] = output.judgement
        verdict, correlation = self._settings.verdict, correlation_s(self._calibration)
        judgements = {
            track: judge(
                estimate(face.samples, correlation),
                self._calibration,
                verdict,
                cues=(*face.cues, *skipped),
            ).watched()
            for track, face in faces.items()
        }
        accusations = [
            replace(judgement, verdict=Verdict.MANIPULATED, reasons=()) for judgement in incidents.values()
        ]
        chosen = _whole([*judgements.values(), *accusations]) or judge(None, self._calibration, verdict)
        known = {share.name for share in chosen.cues}
        told = tuple(share for share in skipped if share.name not in known)
        chosen = replace(chosen, cues=(*chosen.cues, *told))
        return _result(path, chosen, faces, judgements)

    def _frame(self, still: Still, faces: tuple[FaceReading, ...]) -> ScoredFrame:
        height, width = still.image.shape[:2]
        return ScoredFrame(
            stream="file",
            attachment="0",
            epoch=0,
            sequence=still.number,
            offset=still.number,
            pts=still.number,
            media_us=still.media_us,
            capture_us=still.media_us,
            width=width,
            height=height,
            cut=still.cut,
            late=False,
            faces=faces,
            engine=self._reader.engine,
            precision=self._reader.precision,
            qp=still.qp,
        )


def run(settings: Config, paths: Sequence[Path], crops: bool, as_json: bool, out: TextIO) -> int:
    """Score `paths` and write what is found to `out`, JSON or lines for a person; return the exit code."""
    files = expand(paths, crops)
    code = OK
    with tempfile.TemporaryDirectory(prefix="unmask-score-") as scratch:
        for result in assembled(settings, Path(scratch), tell_cues=True).score(files, crops):
            if "error" in result:
                code = SOME_FAILED
            text = json.dumps(result, ensure_ascii=False) if as_json else "\n".join(lines(result))
            out.write(text + "\n")
            out.flush()
    return code


def assembled(settings: Config, scratch: Path, tell_cues: bool = False) -> Scorer:
    """Return a scorer with the settings' members and engines. `tell_cues`: the cue of stills, if one is
    shipped, is read even if it has no say. Raises `UnmaskError` (WEIGHTS, ENGINE)."""
    from stream.assemble import build_reader

    parts = build_reader(settings, cascade=False)
    wanted = (tell_cues and FOREST.exists()) or BENFORD in wanted_cues(settings)
    try:
        if wanted and FOREST.exists():
            read_forest(FOREST)
    except ForestError as error:
        raise UnmaskError(Code.WEIGHTS, str(error)) from error
    return Scorer(
        settings,
        parts.reader,
        parts.calibration,
        parts.provenance,
        scratch,
        still_cue=read_still if wanted else None,
    )


def expand(paths: Sequence[Path], crops: bool) -> list[Path]:
    """Return the files among and below `paths`, folders in order of name.

    Raises `UnmaskError` (SOURCE_NOT_FOUND) when a folder holds nothing to score.
    """
    wanted = PICTURES if crops else PICTURES | VIDEOS
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        below = sorted(item for item in path.rglob("*") if item.is_file())
        taken = [item for item in below if item.suffix.lower() in wanted]
        if not taken:
            endings = " ".join(sorted(wanted))
            raise UnmaskError(Code.SOURCE_NOT_FOUND, f"folder {path} holds no file ending in {endings}")
        if len(taken) < len(below):
            logger.warning(
                "%d files in %s have other endings and are passed over", len(below) - len(taken), path
            )
        files += taken
    return files


def lines(result: dict[str, Any]) -> list[str]:
    """Return a result as lines for a person."""
    if "error" in result:
        return [f"{result['path']}: not scored: {result['error']}"]
    return [
        f"{result['path']}: {_told(result)}",
        *(line for track in result["tracks"] for line in _track_lines(track)),
    ]


def reduced(picture: Image, width: int) -> Image:
    """Return the picture at most `width` wide, for face detection."""
    if picture.shape[1] <= width:
        return picture
    height = max(1, round(picture.shape[0] * width / picture.shape[1]))
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _track_lines(track: dict[str, Any]) -> list[str]:
    members = [f"{name} {_number(logit)}" for name, logit in track["members"].items()]
    members += [f"{name} {_number(logit)} (shadow)" for name, logit in track.get("shadow", {}).items()]
    told = [f"  face {track['track']}, {_when(track)}: {_told(track)}"]
    told += [f"    logits: {', '.join(members)}"] if len(members) > 1 else []
    told += [f"    cue {name}: {_cue_told(cue)}" for name, cue in track.get("cues", {}).items()]
    claim = track.get("claim")
    if claim is None:
        return told
    looks = "looks" if claim["looks_like"] else "does not look"
    return [*told, f"    claims to be {claim['name']}: {looks} like it"]


def _cue_told(cue: dict[str, Any]) -> str:
    value = cue["reason"] if "reason" in cue else f"{cue['value']:+.2f}"
    return value if "shift" not in cue else f"{value} (adds {cue['shift']:+.2f} to the log odds)"


def _number(logit: float | None) -> str:
    return "none" if logit is None else f"{logit:+.2f}"


def _told(judged: dict[str, Any]) -> str:
    parts = [judged["verdict"], *judged["reasons"]]
    if judged["probability"] is not None:
        low, high = judged["interval"]
        parts.append(f"probability {judged['probability']:.2f} ({low:.2f} to {high:.2f})")
    return " ".join(parts)


def _when(track: dict[str, Any]) -> str:
    if track["samples"] == 1:
        return "seen once"
    return f"{track['first_s']:.1f} s to {track['last_s']:.1f} s, {track['samples']} readings"


def _sample(reading: FaceReading, media_us: int) -> Sample:
    sample = sample_of(reading, media_us)
    return replace(sample, weight=max(sample.weight, LEAST_WEIGHT))


def _whole(judgements: Iterable[Judgement]) -> Judgement | None:
    """Return what a file with such faces is; reasons say why it is not decided, if it is not."""
    found = list(judgements)
    if not found:
        return None
    chosen = worst(found)
    return chosen if chosen.verdict is Verdict.INCONCLUSIVE else replace(chosen, reasons=())


def _follow(faces: dict[int, _Face], record: ScoreRecord) -> None:
    for index, (reading, track) in enumerate(zip(record.frame.faces, record.tracks, strict=True)):
        face = faces.setdefault(track, _Face(reading.detection.box))
        face.add(reading, record.frame.media_us)
        face.cues = record.cues[index] if record.cues else ()
        face.person = record.people[index] if record.people else None
        face.claim = record.claims[index] if record.claims else None


def _result(
    path: Path, chosen: Judgement, faces: dict[int, _Face], judgements: dict[int, Judgement]
) -> dict[str, Any]:
    return {
        "path": str(path),
        **_judged(chosen),
        "tracks": [
            {
                "track": track,
                **_judged(judgements[track]),
                "box": box_json(face.box),
                "first_s": round(face.samples[0].media_us / MICRO, 3),
                "last_s": round(face.samples[-1].media_us / MICRO, 3),
                "samples": len(face.samples),
                "quality": round(max(sample.weight for sample in face.samples), 4),
                **_shadowed(face),
                **({} if face.person is None else {"person": face.person}),
                **({} if face.claim is None else {"claim": claim_json(face.claim)}),
            }
            for track, face in faces.items()
        ],
    }


def _shadowed(face: _Face) -> dict[str, Any]:
    """What members without a say made of a face: the mean of their logits, if there are any."""
    means = {name: sum(logits) / len(logits) for name, logits in face.shadow.items()}
    return {"shadow": numbers_json(means)} if means else {}


def _judged(judgement: Judgement) -> dict[str, Any]:
    return {
        "verdict": judgement.verdict.value,
        "probability": judgement.probability,
        "interval": list(judgement.interval) if judgement.interval else None,
        "reasons": reasons_json(judgement.reasons),
        "members": numbers_json(judgement.members or {}),
        **cues_json(judgement.cues),
    }


def _failed(path: Path, sentence: str) -> dict[str, Any]:
    return {"path": str(path), "error": sentence}


def read_picture(path: Path) -> Image | str:
    """Return a picture as uint8 (H, W, 3) RGB, turned upright, or a sentence that says why there is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    except cv2.error:
        picture = None
    if picture is None:
        return "is not a picture that can be decoded"
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)


def _read_ahead(paths: Iterable[Path], ahead: int) -> Iterator[tuple[Path, Image | str]]:
    """Yield pictures in order, at most `ahead` of them read before they are asked for."""
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="unmask-pictures") as pool:
        yield from _mapped(pool, lambda path: (path, read_picture(path)), paths, ahead)


def _mapped(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[R]:
    """Map in order like `pool.map`, which would queue every item at once."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield `items` in lists of at most `size`."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
