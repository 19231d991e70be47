"""What was read of a video, kept on disk: faces are read once, thresholds are tried as often as one likes.

No pictures: boxes, quality and logits only. A file is there wholly or not at all, so an interrupted run goes
on with the first video that was not finished.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from detectors.readings import Detection, FaceReading, Landmarks, Quality, Reason, Visible

SCHEMA = 1
"""Of the files; another one is read anew."""

NO_PICTURE = np.zeros((1, 1, 3), np.uint8)
NO_MAP = np.zeros((1, 1), np.float32)
"""Stand where crop and attention were: no threshold depends on them."""

LEVEL = 1
"""Of gzip: JSON of numbers shrinks fivefold at once and hardly more with patience."""


@dataclass(frozen=True, slots=True)
class Look:
    """One sampled picture of a video and the faces that were read in it."""

    media_us: int
    width: int
    height: int
    cut: bool
    faces: tuple[FaceReading, ...]


def without_pictures(face: FaceReading) -> FaceReading:
    """Return a reading as it is kept."""
    return replace(face, crop=NO_PICTURE, attention=NO_MAP, maps={})


class Kept:
    """A folder of readings. `facts` are whatever they depend on besides the video: members, settings."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self._folder = folder
        self._facts = json.dumps({"schema": SCHEMA, **facts}, sort_keys=True)

    def load(self, video_sha256: str) -> tuple[Look, ...] | None:
        """Return what was read of the video with this hash, None if that is not here (or damaged)."""
        try:
            with gzip.open(self._path(video_sha256), "rt", encoding="utf-8") as file:
                return tuple(_look(json.loads(line)) for line in file) or None
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return None

    def save(self, video_sha256: str, looks: Sequence[Look]) -> None:
        """Keep the readings. Raises `OSError` when the disk refuses."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(video_sha256)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with gzip.open(partial, "wt", compresslevel=LEVEL, encoding="utf-8") as file:
            file.writelines(_rows(looks))
        partial.replace(path)

    def _path(self, video_sha256: str) -> Path:
        key = hashlib.sha256(f"{video_sha256} {self._facts}".encode()).hexdigest()
        return self._folder / f"{key[:32]}.jsonl.gz"


def _rows(looks: Sequence[Look]) -> Iterator[str]:
    for look in looks:
        faces = [_face_json(face) for face in look.faces]
        yield json.dumps([look.media_us, look.width, look.height, int(look.cut), faces]) + "\n"


def _look(row: Sequence[Any]) -> Look:
    media_us, width, height, cut, faces = row
    return Look(media_us, width, height, bool(cut), tuple(_face(face) for face in faces))


def _face_json(face: FaceReading) -> dict[str, Any]:
    return {
        "box": face.detection.box,
        "landmarks": face.detection.landmarks,
        "confidence": face.detection.confidence,
        "weight": face.quality.weight,
        "parts": face.quality.parts,
        "reasons": [reason.value for reason in face.quality.reasons],
        "logits": face.logits,
        "fused": face.fused,
        "shadow": face.shadow,
        **({} if face.visible is Visible.BOTH else {"visible": face.visible.value, "half": face.half}),
    }


def _face(fields: Mapping[str, Any]) -> FaceReading:
    x0, y0, x1, y1 = fields["box"]
    return FaceReading(
        detection=Detection((x0, y0, x1, y1), _landmarks(fields["landmarks"]), fields["confidence"]),
        quality=Quality(
            fields["weight"], fields["parts"], tuple(Reason(reason) for reason in fields["reasons"])
        ),
        logits=fields["logits"],
        fused=fields["fused"],
        crop=NO_PICTURE,
        attention=NO_MAP,
        shadow=fields["shadow"],
        visible=Visible(fields.get("visible", Visible.BOTH)),
        half=fields.get("half", ""),
    )


def _landmarks(points: Sequence[Sequence[float]]) -> Landmarks:
    a, b, c, d, e = ((point[0], point[1]) for point in points)
    return (a, b, c, d, e)
