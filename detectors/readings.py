"""Records that the detectors exchange: boxes, quality, readings of one face."""

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""A picture: uint8, shape (height, width, 3), RGB."""


class Reason(StrEnum):
    """Why a verdict is inconclusive (DESIGN 3.5)."""

    NO_FACE = "NO_FACE"
    SMALL_FACE = "SMALL_FACE"
    BLUR = "BLUR"
    LOW_LIGHT = "LOW_LIGHT"
    COMPRESSION = "COMPRESSION"
    POSE = "POSE"
    OCCLUSION = "OCCLUSION"
    SHORT_TRACK = "SHORT_TRACK"
    STALE = "STALE"
    CORRUPT = "CORRUPT"
    AMBIGUOUS = "AMBIGUOUS"
    ATYPICAL = "ATYPICAL"
    DISAGREEMENT = "DISAGREEMENT"
    UNCALIBRATED = "UNCALIBRATED"
    EDITED = "EDITED"
    NOT_A_PERSON = "NOT_A_PERSON"
    SCREEN_IN_PICTURE = "SCREEN_IN_PICTURE"


Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the full-resolution picture; may reach outside of it."""

Landmarks = tuple[
    tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]
]
"""Left eye, right eye, nose, left mouth corner, right mouth corner as seen in the picture, in pixels."""


@dataclass(frozen=True, slots=True)
class Detection:
    """One face as MTCNN found it. `confidence` in 0..1."""

    box: Box
    landmarks: Landmarks
    confidence: float


@dataclass(frozen=True, slots=True)
class Quality:
    """How far one face picture can be believed: `weight` in 0..1 and what pulled it down.

    `parts` holds the measured values by name (`detectors.quality`, `detectors.advisory`).
    `reasons` is empty when the face is good enough to be decided upon.
    """

    weight: float
    parts: dict[str, float]
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class FaceReading:
    """All that is known of one face in one frame, before tracking.

    `logits` per member name (> 0 manipulated), raw; `fused` is what the ensemble makes of them; `crop` is the
    first member's input (S, S, 3) uint8 RGB; `attention` is its map (h, w) float32 in 0..1. `shadow` holds
    raw logits of members that have no say: recorded, never fused. `maps` are those of all members that saw
    the face framed as in `crop`, the first one's included; empty where nobody kept them.
    """

    detection: Detection
    quality: Quality
    logits: dict[str, float]
    fused: float
    crop: Image
    attention: NDArray[np.float32]
    shadow: dict[str, float] = field(default_factory=dict)
    maps: dict[str, NDArray[np.float32]] = field(default_factory=dict)
