"""Cues beside the networks: weak by themselves, they raise or lower confidence, never decide (SCIENCE E).

A cue looks at a face, a track or a still and gives a number, or says why it has none. What a number is worth
is not for the cue to say: `detectors.late` puts it on the scale of the fused logit, within bounds, once a
measurement let it in.
"""

import math
from dataclasses import dataclass
from typing import Any

NAMES = ("benford", "blink", "claim", "eyes", "identity", "lips", "motion", "ratios")
"""Every cue there is: of a still `benford` (`cues.benford`), of a track the others."""


@dataclass(frozen=True, slots=True)
class Cue:
    """One cue's reading of one track or still.

    `value` is the cue's own raw number, finite, of any scale; higher need not mean manipulated (that is
    fitted by `detectors.late`). None: the cue is missing, and `reason` is one sentence that says why. Exactly
    one of the two is there. Raises `ValueError` for anything else.
    """

    name: str
    value: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError(
                f"cue {self.name}: value {self.value}, reason {self.reason}; exactly one is right"
            )
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"cue {self.name}: value {self.value}, expected a finite number or a reason")

    def to_json(self) -> dict[str, Any]:
        """The reading as records tell it: `{"value": ...}` or `{"reason": ...}`."""
        return {"reason": self.reason} if self.value is None else {"value": round(self.value, 4)}


def missing(name: str, reason: str) -> Cue:
    """A cue that has no number, and why (one sentence)."""
    return Cue(name, None, reason)
