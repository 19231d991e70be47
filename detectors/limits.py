"""Limits beyond which a face is not decided upon, and where their shipped values come from.

The values in `quality_limits.json` are measured: `python -m detectors.training.gate` writes the file. This
module needs nothing but the standard library, because settings take their defaults from it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

SCHEMA = 1
FILE = Path(__file__).parent / "quality_limits.json"

NEVER = 0.0
"""A lower limit that never bites, and for those that say so an upper one."""


class LimitsError(ValueError):
    """The shipped limits cannot be used; names the file and what is wrong."""


def read_limits(path: Path = FILE) -> dict[str, float]:
    """The measured limits by the names of `QualityLimits`' fields.

    Raises LimitsError for a missing or broken file and for a missing, unknown or negative limit.
    """
    try:
        record = json.loads(path.read_text())
        if record["schema"] != SCHEMA:
            raise LimitsError(f"{path}: schema {record['schema']}, expected {SCHEMA}")
        limits = {name: float(entry["limit"]) for name, entry in record["limits"].items()}
    except (OSError, TypeError, KeyError, AttributeError, ValueError) as error:
        if isinstance(error, LimitsError):
            raise
        raise LimitsError(f"{path}: {type(error).__name__}: {error}") from error
    if set(limits) != MEASURED:
        raise LimitsError(f"{path}: limits {sorted(limits)}, expected {sorted(MEASURED)}")
    negative = [name for name, value in limits.items() if not value >= 0]
    if negative:
        raise LimitsError(f"{path}: {negative[0]} is {limits[negative[0]]}, expected 0 or more")
    return limits


MEASURED = frozenset(
    {
        "min_face_px", "min_sharpness", "min_brightness", "max_noise", "max_blockiness", "max_grid", "max_qp",
        "max_moire",
    }
)  # fmt: skip
"""What `quality_limits.json` holds."""

_SHIPPED = read_limits()


@dataclass(frozen=True, slots=True)
class QualityLimits:
    """Beyond a limit a face is not decided upon, with the reason. A lower limit of 0 never bites.

    Of each measured limit the file says by what rule it came about and how many faces it costs. It is only
    ever a reason to say nothing: no value on either side of a limit speaks for or against a face.
    """

    min_face_px: float = _SHIPPED["min_face_px"]
    """Pixels of the shorter side."""
    min_sharpness: float = _SHIPPED["min_sharpness"]
    """Detail of the finer to detail of the coarser octave: neither size nor contrast moves it, blur does."""
    min_brightness: float = _SHIPPED["min_brightness"]
    """Mean grey level. Kept low because dark skin in fair light must pass."""
    max_noise: float = _SHIPPED["max_noise"]
    """Noise to the face's own contrast, as a ratio of standard deviations: the less light, the more gain."""
    max_blockiness: float = _SHIPPED["max_blockiness"]
    """Steps on the 8 px grid to steps off it: what JPEG and MPEG-2 leave; 1 is no grid."""
    max_grid: float = _SHIPPED["max_grid"]
    """How much more changes across the borders of 8 px blocks than across those of 4 px ones, as a ratio:
    what H.264 and later codecs leave at high compression, when whole blocks are predicted and nothing is
    added. 1 is no grid."""
    max_qp: float = _SHIPPED["max_qp"]
    """Mean quantiser of the decoded picture on H.264's scale (0..51), where the codec tells it."""
    max_moire: float = _SHIPPED["max_moire"]
    """Peak of the face's spectrum above its surroundings, in natural logarithms; 0 switches it off."""
    max_yaw_deg: float = 45.0
    """Degrees. 99th percentile of 300 LFW faces 41; the tight crops that members are measured on have no
    landmarks, so this one is not derived."""
    max_pitch_deg: float = 35.0
    """Degrees. 99th percentile of 300 LFW faces 25."""
    max_flat_colour: float = NEVER
    """Roughness of the face's histogram of greys; 0 switches it off (`detectors.advisory` says why)."""
    max_covered: float = 0.5
    """How surely a half of the face that a member would look at is hidden, 0..1; .5 is where 1 % of uncovered
    faces lie above (`detectors.occlusion`); 0 switches the estimate off."""
    min_skin_detail: float = NEVER
    """Fine detail of skin to that of eyes and mouth; off (`detectors.advisory` says why)."""
