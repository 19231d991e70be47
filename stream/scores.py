"""The scores topic: what was looked at, what was not, and what was said of it (DESIGN 3.4).

Three records, told apart by `type`: `frame` per sampled frame, `dropped` per range that was not looked at,
`verdict` at each change of the stream's verdict and every `record_every_s`. Schema: `scores.schema.json`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectors.late import Share
from detectors.readings import FaceReading, Reason, Visible
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
    cues: tuple[tuple[Share, ...], ...] = ()
    """Of each face, what was read beside the members; empty where nothing is."""
    people: tuple[int | None, ...] = ()
    """Of each face, the number of the person it looks like among those seen on this feed."""
    claims: tuple[tuple[str, bool] | None, ...] = ()
    """Of each face, who it is said to be and whether it looks like that person."""

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
            "faces": [
                {**_face(face, track), **self._beside(index)}
                for index, (face, track) in enumerate(zip(frame.faces, self.tracks, strict=True))
            ],
        }

    def _beside(self, index: int) -> dict[str, Any]:
        person = self.people[index] if self.people else None
        claim = self.claims[index] if self.claims else None
        return {
            **(cues_json(self.cues[index]) if self.cues else {}),
            **({} if person is None else {"person": person}),
            **({} if claim is None else {"claim": claim_json(claim)}),
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
            **cues_json(judgement.cues),
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


def claim_json(claim: tuple[str, bool]) -> dict[str, Any]:
    """Return who a face is said to be, and whether it looks like that person, as records tell it."""
    return {"name": claim[0], "looks_like": claim[1]}


def cues_json(shares: Sequence[Share]) -> dict[str, Any]:
    """Return what cues said as records tell it, under `cues`; nothing where there are none."""
    return {"cues": {share.name: share.to_json() for share in shares}} if shares else {}


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
        **_seen(face),
        **_expression(face),
        **shadow,
    }


def _seen(face: FaceReading) -> dict[str, Any]:
    """Of a covered face which half is seen, and by which member it was read instead of the ensemble."""
    if face.visible is Visible.BOTH:
        return {}
    return {"visible": face.visible.value, **({"half": face.half} if face.half else {})}


def _expression(face: FaceReading) -> dict[str, Any]:
    if face.expression is None:
        return {}
    told = face.expression
    return {"expression": {"visible": told.visible.value, "distribution": numbers_json(told.distribution)}}
