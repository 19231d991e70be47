"""Small pictures of feeds, now and then, so that people see what is being watched: topic `pictures`.

Not evidence: reduced, JPEG, kept for minutes. Each tells which faces were found in it and what was read of
them, so that boxes always belong to the picture that they are drawn on.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2

from detectors.readings import Image
from stream.clock import Clock
from stream.records import SCHEMA, OutRecord, Record, is_canary
from stream.scores import ScoreRecord, box_json, reasons_json, rounded

WIDTH = 384
"""Pixels: a tile of the wall on a phone, and no more of a stranger's face than that."""

QUALITY = 70
"""Of JPEG: 8 to 15 kB a picture."""

STREAMS = 4096
"""Streams whose last picture is remembered; beyond, all are forgotten and get one sooner than due."""

FACTS = "glimpse"
"""Header that tells of the picture."""


class Glimpses:
    """Says when a stream's next picture is due, and makes it. Used by one thread."""

    def __init__(self, every_s: float, clock: Clock) -> None:
        """`every_s`: seconds between pictures of one stream, 0 for none."""
        self._every_s = every_s
        self._clock = clock
        self._last: dict[str, float] = {}
        self.failed = 0
        """Pictures that could not be encoded."""

    def of(self, stream: str, image: Image) -> bytes | None:
        """Return the RGB picture as a small JPEG if one of `stream` is due, else None."""
        if self._every_s <= 0 or is_canary(stream):
            return None
        now = self._clock.monotonic()
        last = self._last.get(stream)
        if last is not None and now - last < self._every_s:
            return None
        if len(self._last) >= STREAMS:
            self._last.clear()
        self._last[stream] = now
        try:
            return jpeg(image)
        except cv2.error:
            self.failed += 1
            return None


def jpeg(image: Image, width: int = WIDTH) -> bytes:
    """Return an RGB picture as JPEG, at most `width` pixels wide. Raises `cv2.error`."""
    height, full = image.shape[:2]
    if full > width:
        size = (width, max(1, round(height * width / full)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    )
    return bytes(data)


@dataclass(frozen=True, slots=True)
class Glimpse:
    """One picture. `facts`: media_us, attachment, epoch, width and height of the whole picture, and its faces
    (track, box in pixels of the whole picture, reasons, logits, fused)."""

    stream: str
    data: bytes
    facts: Mapping[str, Any]


def glimpse_record(topic: str, score: ScoreRecord, picture: bytes, now_us: int) -> OutRecord:
    """Return the record of the picture that was made of a scored frame."""
    frame = score.frame
    facts = {
        "media_us": frame.media_us,
        "attachment": frame.attachment,
        "epoch": frame.epoch,
        "width": frame.width,
        "height": frame.height,
        "models": dict(score.models),
        "calibration": score.calibration,
        "faces": [
            {
                "track": track,
                "box": box_json(face.detection.box),
                "reasons": reasons_json(face.quality.reasons),
                "logits": {name: rounded(value) for name, value in face.logits.items()},
                "fused": rounded(face.fused),
            }
            for face, track in zip(frame.faces, score.tracks, strict=True)
        ],
    }
    headers = {
        "schema": str(SCHEMA).encode(),
        "content-type": b"image/jpeg",
        FACTS: json.dumps(facts, separators=(",", ":")).encode(),
    }
    return OutRecord(topic, frame.stream, picture, headers, now_us)


def read_glimpse(record: Record) -> Glimpse | None:
    """Return the picture of a record, None if it is none."""
    try:
        facts = json.loads(record.headers.get(FACTS, b"null"))
    except ValueError:
        return None
    if not isinstance(facts, dict) or not record.value or not isinstance(facts.get("faces"), list):
        return None
    return Glimpse(record.key, record.value, facts)
