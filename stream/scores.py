"""The scores topic: what was looked at, what was not, and what was said of it (DESIGN 3.4).

Three records, told apart by `type`: `frame` per sampled frame, `dropped` per range that was not looked at,
`verdict` at each change of the stream's verdict and every `record_every_s`. Schema: `scores.schema.json`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from detectors.readings import FaceReading, Reason
from stream.frames import Dropped, ScoredFrame
from stream.records import SCHEMA
from stream.verdicts import Judgement


@dataclass(frozen=True, slots=True)
class ScoreRecord:
    """One sampled frame; `tracks` are the track ids of its faces, in the same order."""

    frame: ScoredFrame
    tracks: tuple[int, ...]
    models: Mapping[str, str]
    calibration: str

    @property
    def stream(self) -> str:
        return self.frame.stream

    def as_json(self) -> dict[str, Any]:
        """Return the record's value."""
        frame = self.frame
        return {
            "schema": SCHEMA,
            "type": "frame",
            "stream": frame.stream,
            "attachment": frame.attachment,
            "epoch": frame.epoch,
            "sequence": frame.sequence,
            "pts": frame.pts,
            "media_us": frame.media_us,
            "capture_us": frame.capture_us,
            "width": frame.width,
            "height": frame.height,
            "cut": frame.cut,
            "late": frame.late,
            "engine": frame.engine,
            "precision": frame.precision,
            "models": dict(self.models),
            "calibration": self.calibration,
            "faces": [_face(face, track) for face, track in zip(frame.faces, self.tracks, strict=True)],
        }


@dataclass(frozen=True, slots=True)
class DroppedRecord:
    """A range of media time of which nothing was scored, and why."""

    stream: str
    attachment: str
    epoch: int
    dropped: Dropped

    def as_json(self) -> dict[str, Any]:
        """Return the record's value."""
        return {
            "schema": SCHEMA,
            "type": "dropped",
            "stream": self.stream,
            "attachment": self.attachment,
            "epoch": self.epoch,
            "first_us": self.dropped.first_us,
            "last_us": self.dropped.last_us,
            "reason": self.dropped.reason,
            "frames": self.dropped.frames,
        }


@dataclass(frozen=True, slots=True)
class VerdictRecord:
    """What is said of the stream from `media_us` on, until the next such record.

    `sampled` and `dropped` count frames since the previous one, `n_eff` in the judgement what the deciding
    window was worth. `tracks` counts faces on screen, `incident` names the open one.
    """

    stream: str
    attachment: str
    epoch: int
    media_us: int
    judgement: Judgement
    tracks: int
    sampled: int
    dropped: int
    incident: str | None
    calibration: str

    def as_json(self) -> dict[str, Any]:
        """Return the record's value."""
        judgement = self.judgement
        return {
            "schema": SCHEMA,
            "type": "verdict",
            "stream": self.stream,
            "attachment": self.attachment,
            "epoch": self.epoch,
            "media_us": self.media_us,
            "verdict": judgement.verdict.value,
            "reasons": [reason.value for reason in judgement.reasons],
            "probability": rounded(judgement.probability),
            "interval": interval_json(judgement),
            "logit": rounded(judgement.logit),
            "llr": rounded(judgement.llr),
            "conformal_set": judgement.conformal.value if judgement.conformal else None,
            "disagreement": rounded(judgement.disagreement),
            "tracks": self.tracks,
            "sampled": self.sampled,
            "dropped": self.dropped,
            "effective": rounded(judgement.n_eff),
            "incident": self.incident,
            "calibration": self.calibration,
        }


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Return a number as records tell it: digits beyond these are noise, and JSON has no infinity."""
    return round(float(value), digits) if value is not None and math.isfinite(value) else None


def interval_json(judgement: Judgement) -> list[float | None] | None:
    """Return the interval as records tell it."""
    return [rounded(end) for end in judgement.interval] if judgement.interval else None


def numbers_json(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return named numbers as records tell them."""
    return {name: rounded(value) for name, value in values.items()}


def box_json(box: tuple[float, float, float, float]) -> list[float]:
    """Return a box in whole tenths of a pixel."""
    return [round(float(edge), 1) for edge in box]


def reasons_json(reasons: tuple[Reason, ...]) -> list[str]:
    """Return reason codes as records tell them."""
    return [reason.value for reason in reasons]


def _face(face: FaceReading, track: int) -> dict[str, Any]:
    shadow = {"shadow": numbers_json(face.shadow)} if face.shadow else {}
    return {
        "track": track,
        "box": box_json(face.detection.box),
        "confidence": rounded(face.detection.confidence),
        "quality": rounded(face.quality.weight),
        "quality_parts": numbers_json(face.quality.parts),
        "reasons": reasons_json(face.quality.reasons),
        "logits": numbers_json(face.logits),
        "fused": rounded(face.fused),
        **shadow,
    }
