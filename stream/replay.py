"""A video's readings through the stream's own logic, under any settings of the verdict."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from detectors.calibration import Calibration
from detectors.readings import FaceReading
from stream.aggregate import Output, StreamAggregate
from stream.alerts import Provenance
from stream.config import Config
from stream.drift import EVERY_US, SCORE
from stream.evidence import SCHEME, EvidenceStore
from stream.frames import ScoredFrame
from stream.incidents import ClipRequest, EventKind, IncidentEvent
from stream.kept import Look
from stream.sampling import Sampler
from stream.scores import ScoreRecord, VerdictRecord
from stream.windows import MICRO

STREAM, ATTACHMENT = "footage", "0"


class _NoEvidence:
    """Keeps nothing: there are no pictures in what is replayed. References differ, as those of faces do."""

    def __init__(self) -> None:
        self._given = 0

    def put(self, data: bytes, suffix: str) -> str:
        self._given += 1
        return f"{SCHEME}{self._given:064x}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was said of one video: incidents opened, faces (tracks) accused, media time of the first incident
    (None: none), and the probability of every verdict record that had one."""

    alarms: int
    accused: int
    first_us: int | None
    probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """What there was to judge in one video. Seconds of media time: `shown_s` of all footage, `face_s` with a
    face, `good_s` with one good enough to be decided on. `tracks` were seen well for long enough."""

    shown_s: float
    face_s: float
    good_s: float
    tracks: int


class Follower:
    """Feeds looks to an aggregate as the live pipeline does: sampled as often as it asks for."""

    def __init__(
        self, settings: Config, calibration: Calibration, provenance: Provenance, engine: str, precision: str
    ) -> None:
        nothing = cast("EvidenceStore", _NoEvidence())
        self._aggregate = StreamAggregate(STREAM, settings, calibration, provenance, nothing)
        self._engine, self._precision = engine, precision
        self._sampler = Sampler()
        self._cut = False
        self._number = 0
        self._incidents: dict[str, int] = {}
        self._accused: set[str] = set()
        self._probabilities: list[float] = []
        self.tracks: list[tuple[int, ...]] = []
        """Per look that was taken, the track of each face."""
        self.taken: list[Look] = []

    def wanted_fps(self) -> float:
        """Return the sampling rate (Hz) that the stream asks for now."""
        return self._aggregate.wanted_fps()

    def add(self, look: Look) -> None:
        """Apply a look if the stream would have sampled it; looks come in order of time."""
        self._cut |= look.cut
        if not self._sampler.take(look.media_us, self.wanted_fps()):
            return
        cut, self._cut = self._cut, False
        for output in self._aggregate.on_frame(self._frame(look, cut)):
            match output:
                case IncidentEvent():
                    self._note(output)
                case ClipRequest():
                    # There is none; unanswered, it would hold the incident open beside the next one.
                    self._note_all(self._aggregate.on_clip(output.incident, None))
                case VerdictRecord() if output.judgement.probability is not None:
                    self._probabilities.append(output.judgement.probability)
                case ScoreRecord():
                    self.taken.append(look)
                    self.tracks.append(output.tracks)

    def outcome(self) -> Outcome:
        """Return what was said so far, incidents that are open among it."""
        self._note_all(self._aggregate.stop())
        first_us = min(self._incidents.values(), default=None)
        accused = max(len(self._accused), min(1, len(self._incidents)))
        return Outcome(len(self._incidents), accused, first_us, tuple(self._probabilities))

    def _note_all(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            if isinstance(output, IncidentEvent):
                self._note(output)

    def _note(self, event: IncidentEvent) -> None:
        if event.kind is EventKind.OPENED:
            self._incidents[event.incident] = event.moment.media_us
        self._accused |= {view.key for view in event.tracks}

    def _frame(self, look: Look, cut: bool) -> ScoredFrame:
        self._number += 1
        return ScoredFrame(
            stream=STREAM,
            attachment=ATTACHMENT,
            epoch=0,
            sequence=self._number,
            offset=self._number,
            pts=self._number,
            media_us=look.media_us,
            capture_us=look.media_us,
            width=look.width,
            height=look.height,
            cut=cut,
            late=False,
            faces=look.faces,
            engine=self._engine,
            precision=self._precision,
        )


def seen(taken: Sequence[Look], tracks: Sequence[Sequence[int]], settings: Config) -> Seen:
    """Return what there was to judge in the looks that were taken, given the track of each face in them.

    A look stands for the time until the next one, at most for that of the slowest sampling: what was not
    looked at is not counted.
    """
    most_us = MICRO / settings.sampling.idle_fps
    shown = face = good = 0.0
    for look, after in pairwise(taken):
        span = min(after.media_us - look.media_us, most_us)
        shown += span
        face += span * bool(look.faces)
        good += span * any(_good(reading) for reading in look.faces)
    return Seen(shown / MICRO, face / MICRO, good / MICRO, _decidable(taken, tracks, settings))


def parts(taken: Sequence[Look], tracks: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    """Return what `stream.drift` would look at in these looks, by part: each face once in `EVERY_US`."""
    found: dict[str, list[float]] = {}
    looked_us: dict[int, int] = {}
    for look, ids in zip(taken, tracks, strict=True):
        for reading, track in zip(look.faces, ids, strict=True):
            if track in looked_us and look.media_us - looked_us[track] < EVERY_US:
                continue
            looked_us[track] = look.media_us
            score = {SCORE: reading.fused} if _good(reading) and not reading.half else {}
            for part, value in (reading.quality.parts | score).items():
                found.setdefault(part, []).append(value)
    return found


def _good(reading: FaceReading) -> bool:
    return not reading.quality.reasons and reading.quality.weight > 0


def _decidable(taken: Sequence[Look], tracks: Sequence[Sequence[int]], settings: Config) -> int:
    """Count the tracks that had good samples enough, over time enough, to be decided."""
    times: dict[int, list[int]] = {}
    for look, ids in zip(taken, tracks, strict=True):
        for reading, track in zip(look.faces, ids, strict=True):
            if _good(reading):
                times.setdefault(track, []).append(look.media_us)
    verdict = settings.verdict
    return sum(
        len(us) >= verdict.min_samples and us[-1] - us[0] >= verdict.min_track_s * MICRO
        for us in times.values()
    )
