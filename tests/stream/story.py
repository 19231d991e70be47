"""Draws a stream as text and tells it to an aggregate: one sign per half second of media time.

    M  a manipulated face      a  an authentic face      ?  a face nobody can tell
    b  a blurred face (its logit says manipulated)        .  a picture without a face
    2  two faces: the first manipulated, the second authentic
    x  corrupt: half a second that was not scored         -  a tick: the feed shows nothing, and says so
    |  a shot cut before the next picture                 E  a new epoch begins with the next picture
    R  the publisher is back: a new attachment            $  the end of the stream

`|`, `E`, `R`, `$` take no time.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from detectors.calibration import Calibration, CalibrationKind, Scale
from detectors.late import Late
from detectors.readings import Box, Detection, FaceReading, Quality, Reason
from stream.aggregate import Output, StreamAggregate
from stream.alerts import Model, Provenance
from stream.clock import FakeClock
from stream.config import Config, Verdict
from stream.evidence import EvidenceStore
from stream.feeds import FeedEvent
from stream.frames import Applied, Dropped, ScoredFrame
from stream.incidents import ClipRequest, IncidentEvent
from stream.records import ChunkMeta, CodecParameters, Control, Kind
from stream.scores import VerdictRecord

START_US = 1_700_000_000_000_000
STEP_US = 500_000
LEFT: Box = (100.0, 100.0, 200.0, 200.0)
RIGHT: Box = (400.0, 100.0, 500.0, 200.0)
CLIP = "evidence://" + "c" * 64

CALIBRATION = Calibration(kind=CalibrationKind.SHIPPED, scales=(Scale(1, 1.0, 0.0),), tau=0.8, sigma=1.0)
PROVENANCE = Provenance(
    models=(Model("m", "1", "a" * 64),),
    tested_for=("face swap",),
    not_tested_for=("lip sync",),
    calibration="shipped",
    calibration_version="b" * 12,
    prior=0.5,
)


MAP = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)


def face(logit: float, box: Box = LEFT, reasons: tuple[Reason, ...] = (), weight: float = 1.0) -> FaceReading:
    """Return a face as a reader would."""
    eye = (box[0], box[1])
    return FaceReading(
        detection=Detection(box, (eye, eye, eye, eye, eye), 0.99),
        quality=Quality(weight, {"face_px": 100.0}, reasons),
        logits={"m": logit},
        fused=logit,
        crop=np.full((16, 16, 3), int(abs(logit) * 10) % 255, dtype=np.uint8),
        attention=MAP,
        maps={"m": MAP, "second": MAP[::-1]},
    )


FACES: dict[str, tuple[FaceReading, ...]] = {
    "M": (face(6.0),),
    "a": (face(-6.0),),
    "?": (face(0.3),),
    "b": (face(6.0, reasons=(Reason.BLUR,), weight=0.2),),
    "2": (face(6.0), face(-6.0, RIGHT)),
    ".": (),
}


@dataclass
class Teller:
    """Turns signs into decoder events, as a decoder and a device would bring them."""

    kind: Kind = Kind.LIVE
    media_us: int = START_US
    attachment: int = 1
    epoch: int = 0
    offset: int = 0
    pts: int = 0
    cut: bool = False

    def meta(self, control: Control | None = None) -> ChunkMeta:
        return ChunkMeta(
            stream="studio",
            attachment=f"{self.attachment:016x}",
            epoch=self.epoch,
            sequence=self.offset,
            kind=self.kind,
            capture_us=self.media_us,
            epoch_anchor_us=self.media_us - self.pts * STEP_US,
            time_base=Fraction(1, 2),
            first_pts=0,
            pts=None if control else self.pts,
            starts_on_keyframe=control is None,
            codec=CodecParameters("h264", 640, 360),
            content_type="video/mp2t",
            content_hash="",
            control=control,
        )

    def applied(
        self, control: Control | None = None, body: dict[str, Any] | None = None, *dropped: Dropped
    ) -> Applied:
        event = Applied(
            offset=self.offset,
            meta=self.meta(control),
            control_body=json.dumps(body).encode() if body else b"",
            decode_from=self.offset,
            last_pts=self.pts if self.pts else None,
            decoded=1,
            sampled=1,
            warmup=0,
            dropped=dropped,
        )
        self.offset += 1
        return event

    def tell(self, sign: str) -> Iterator[ScoredFrame | Applied]:
        if sign == "|":
            self.cut = True
        elif sign == "E":
            self.epoch, self.pts = self.epoch + 1, 0
        elif sign == "R":
            self.attachment, self.epoch, self.pts = self.attachment + 1, 0, 0
        elif sign == "$":
            yield self.applied(Control.END, {"reason": "finished", "code": None, "sentence": None})
        else:
            self.media_us += STEP_US
            self.pts += 1
            yield from self._half_second(sign)

    def _half_second(self, sign: str) -> Iterator[ScoredFrame | Applied]:
        if sign == "x":
            hole = Dropped(self.media_us - STEP_US, self.media_us, "CORRUPT", None)
            yield self.applied(None, None, hole)
        elif sign == "-":
            self.pts -= 1
            yield self.applied(Control.TICK, tick(False))
        else:
            yield self.frame(FACES[sign])
            yield self.applied()

    def frame(self, faces: tuple[FaceReading, ...]) -> ScoredFrame:
        cut, self.cut = self.cut, False
        return ScoredFrame(
            stream="studio",
            attachment=f"{self.attachment:016x}",
            epoch=self.epoch,
            sequence=self.offset,
            offset=self.offset,
            pts=self.pts,
            media_us=self.media_us,
            capture_us=self.media_us,
            width=640,
            height=360,
            cut=cut,
            late=False,
            faces=faces,
            engine="eager",
            precision="fp32",
        )


def tick(video: bool, code: str | None = "source_silent") -> dict[str, Any]:
    """Return the body of a tick."""
    return {
        "capture_us": None,
        "video": video,
        "phase": "live" if video else "silent",
        "frames": 0,
        "bytes": 0,
        "code": None if video else code,
        "sentence": None if video else "no picture for 10 s",
    }


@dataclass
class Story:
    """An aggregate and all it said. Clip requests are answered at once, as the worker does."""

    folder: Path
    settings: Config = field(default_factory=lambda: Config(verdict=Verdict(window_s=10.0)))
    calibration: Calibration = CALIBRATION
    teller: Teller = field(default_factory=Teller)
    clip: str | None = CLIP
    said: list[Output] = field(default_factory=list)
    restart: Callable[[int], bool] = lambda index: False
    late: Late | None = None

    def __post_init__(self) -> None:
        self.ids = 0
        self.events = 0
        self.fps: list[float] = []
        self.store = EvidenceStore(self.folder, FakeClock())
        self.aggregate = self.fresh()

    def fresh(self) -> StreamAggregate:
        return StreamAggregate(
            "studio",
            self.settings,
            self.calibration,
            PROVENANCE,
            self.store,
            lambda stream, us: f"i{us - START_US}",
            self.late,
        )

    def tell(self, drawn: str) -> "Story":
        for sign in drawn.replace(" ", ""):
            for event in self.teller.tell(sign):
                self.apply(event)
        return self

    def apply(self, event: ScoredFrame | Applied) -> None:
        if isinstance(event, ScoredFrame):
            self.take(self.aggregate.on_frame(event))
        else:
            self.take(self.aggregate.on_applied(event))
        self.events += 1
        self.fps.append(self.aggregate.wanted_fps())
        if self.restart(self.events):
            state = json.loads(json.dumps(self.aggregate.state()))
            self.aggregate = self.fresh().restore(state)

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.said.append(output)
            if isinstance(output, ClipRequest):
                self.take(self.aggregate.on_clip(output.incident, self.clip))

    def incidents(self) -> list[IncidentEvent]:
        return [output for output in self.said if isinstance(output, IncidentEvent)]

    def feeds(self) -> list[str]:
        return [output.kind for output in self.said if isinstance(output, FeedEvent)]

    def told(self) -> list[tuple[str, float, str]]:
        """Incident events as (kind, seconds from the start, why)."""
        return [
            (
                event.kind.value,
                (event.moment.media_us - START_US) / 1e6,
                event.reason or " ".join(change.value for change in event.changes),
            )
            for event in self.incidents()
        ]

    def verdicts(self) -> list[tuple[float, str, str]]:
        """Changes of verdict as (seconds from the start, verdict, reasons)."""
        said: list[tuple[float, str, str]] = []
        for output in self.said:
            if not isinstance(output, VerdictRecord):
                continue
            judgement = output.judgement
            entry = ((output.media_us - START_US) / 1e6, judgement.verdict.value, " ".join(judgement.reasons))
            if not said or said[-1][1:] != entry[1:]:
                said.append(entry)
        return said
