"""Records that the detectors exchange: boxes, quality, readings of one face."""

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from detectors.cues import Cue

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


class Visible(StrEnum):
    """Which halves of a face can be seen: eyes and brows above, nose tip, mouth and chin below."""

    BOTH = "both"
    UPPER = "upper"
    LOWER = "lower"
    NEITHER = "neither"


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


EXPRESSIONS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
"""The classes of FER+, in its order."""


@dataclass(frozen=True, slots=True)
class Expression:
    """What a face shows: a share for each of EXPRESSIONS, adding up to 1, as ten people would vote; and what
    of the face was `visible` to whoever says so."""

    visible: Visible
    distribution: dict[str, float]


@dataclass(frozen=True, slots=True)
class FaceReading:
    """All that is known of one face in one frame, before tracking.

    `logits` per member name (> 0 manipulated), raw; `fused` is what the ensemble makes of them; `crop` is the
    first member's input (S, S, 3) uint8 RGB; `attention` is its map (h, w) float32 in 0..1. `shadow` holds
    raw logits of members that have no say: recorded, never fused. `maps` are those of all members that saw
    the face framed as in `crop`, the first one's included; empty where nobody kept them. `visible` is what
    the occlusion estimate says (`BOTH` also where nobody asked it). `half` names the member that read the
    visible half instead of the ensemble: `fused` is its raw logit then, and its calibration holds; empty: the
    whole face was read. `cues` are readings of this one picture, `embedding` is what the face looks like
    (float32 [512], length 1), where the settings ask for them; it is never written down. `expression` is
    there only where the settings ask for it too, and no verdict rests on it.
    """

    detection: Detection
    quality: Quality
    logits: dict[str, float]
    fused: float
    crop: Image
    attention: NDArray[np.float32]
    shadow: dict[str, float] = field(default_factory=dict)
    maps: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    visible: Visible = Visible.BOTH
    half: str = ""
    cues: tuple[Cue, ...] = ()
    embedding: NDArray[np.float32] | None = None
    expression: Expression | None = None
