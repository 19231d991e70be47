"""The quality gate's settings as the detectors take them, and what a picture's coding adds to a reading."""

from collections.abc import Iterable
from dataclasses import replace

from detectors.limits import NEVER, QualityLimits
from detectors.quality import with_qp
from detectors.readings import FaceReading
from stream.config import Config

RETOUCHED_SKIN_DETAIL = 0.04
"""Below this ratio a face is EDITED where `policy.retouch` is `flag`. One of 434 authentic stills and no
frame of 24 clips lies below; of strongly retouched faces one in four, of slightly retouched ones one in a
hundred."""


def quality_limits(config: Config) -> QualityLimits:
    """Return the limits that the settings name."""
    flagged = config.policy.retouch == "flag"
    return QualityLimits(
        **config.quality.model_dump(), min_skin_detail=RETOUCHED_SKIN_DETAIL if flagged else NEVER
    )


def gated(faces: Iterable[FaceReading], qp: float | None, limits: QualityLimits) -> tuple[FaceReading, ...]:
    """Return the readings with the quantiser of their picture (0..51, None if untold) taken into account."""
    return tuple(replace(face, quality=with_qp(face.quality, qp, limits)) for face in faces)
