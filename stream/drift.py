"""Whether a feed's faces still look like those of the calibration (SCIENCE D, remedy 3).

A calibration speaks for pictures like its own. Scores and quality of each feed are counted, slowly forgotten,
and compared with the calibration's reference; a feed that has moved away is told once, and once more when it
is back. Nothing is decided by it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from detectors.calibration import Histogram
from detectors.drift import bin_of, chance, median, stability
from detectors.readings import FaceReading
from stream.windows import MICRO, Sample

SCORE = "score"
"""The part that is not one of quality: the fused logit."""

EVERY_US = 10 * MICRO
"""Between two looks at the same face: nearer ones say the same."""

HALF_LIFE_US = 3600 * MICRO
"""Media time after which a look counts half: a change of camera or encoder shows within the hour, an
advertisement does not."""

STEP_US = 60 * MICRO
"""Forgetting goes in steps, since counts are rounded as they are kept: smaller ones would round away."""

LEAST_LOOKS = 50.0
"""Looks below which nothing is exported: ten bins need some each."""

DRIFTED, STEADY = 0.25, 0.1
"""PSI at which a part has moved, and below which it is back: the conventional limits, far enough apart for a
hysteresis."""

QUIET_US = 3600 * MICRO
"""Least media time between two events of one feed."""

DIGITS = 3
"""Of counts: they are part of a state that is written twice a second, and must restore to the same sums."""


class Standing(StrEnum):
    """Where a feed stands. Legal: STEADY -> DRIFTED -> STEADY, each at most once per `QUIET_US`."""

    STEADY = "steady"
    DRIFTED = "drifted"


@dataclass(frozen=True, slots=True)
class Shift:
    """One part that moved: its `psi`, and where its middle lies now and lay at calibration."""

    part: str
    psi: float
    median: float
    reference_median: float


@dataclass(frozen=True, slots=True)
class Turn:
    """A change of standing; `shifts` are the parts away now, the farthest first (none when back)."""

    standing: Standing
    shifts: tuple[Shift, ...]

    @property
    def sentence(self) -> str:
        """What the turn means, for a person."""
        if self.standing is Standing.STEADY:
            return "faces of this feed look like those of the calibration again"
        parts = [
            f"{one.part} about {one.median:.4g} against {one.reference_median:.4g} (PSI {one.psi:.2f})"
            for one in self.shifts
        ]
        return f"faces of this feed no longer look like those of the calibration: {', '.join(parts)}"


def _score(sample: Sample) -> float | None:
    """Logits of half a face are on another scale than the reference."""
    return sample.fused if sample.good and not sample.half else None


class Drift:
    """The looks of one feed against `reference`, by part. Used by one thread; `psi` may be read from any.

    Every track counts as one independent look for `chance`, however long it is seen: it is one person. So a
    feed with one face on it all day is measured and never told of. Without a reference nothing is done.
    """

    def __init__(self, reference: Mapping[str, Histogram], version: str) -> None:
        """`version` is the calibration's: counts against another reference are forgotten."""
        self._reference = reference
        self._version = version
        self._counts: dict[str, list[float]] = {
            part: [0.0] * len(found.shares) for part, found in reference.items()
        }
        self._tracks = 0.0
        self._at_us = 0
        self._standing = Standing.STEADY
        self._told_us: int | None = None
        self.psi: Mapping[str, float] = {}
        """By part, of those with looks enough."""

    def due(self, looked_us: int | None, media_us: int) -> bool:
        """Return whether a face last looked at then (None: never) is to be looked at now."""
        return bool(self._reference) and (looked_us is None or media_us - looked_us >= EVERY_US)

    def look(self, face: FaceReading, sample: Sample, new: bool) -> Turn | None:
        """Count one face (`new`: the first time that its track is looked at); return the turn it led to."""
        self._forget(sample.media_us)
        self._tracks = round(self._tracks + new, DIGITS)
        for part, reference in self._reference.items():
            value = _score(sample) if part == SCORE else face.quality.parts.get(part)
            if value is not None and math.isfinite(value):
                counts, index = self._counts[part], bin_of(reference, value)
                counts[index] = round(counts[index] + 1.0, DIGITS)
        self._measure()
        return self._turn(sample.media_us)

    def _forget(self, now_us: int) -> None:
        self._at_us = self._at_us or now_us
        steps = max(0, now_us - self._at_us) // STEP_US
        if steps == 0:
            return
        self._at_us += steps * STEP_US
        kept = 0.5 ** (steps * STEP_US / HALF_LIFE_US)
        self._tracks = round(self._tracks * kept, DIGITS)
        for counts in self._counts.values():
            counts[:] = [round(count * kept, DIGITS) for count in counts]

    def _measure(self) -> None:
        self.psi = {
            part: stability(reference, self._counts[part])
            for part, reference in self._reference.items()
            if sum(self._counts[part]) >= LEAST_LOOKS
        }

    def _turn(self, now_us: int) -> Turn | None:
        if not self.psi or (self._told_us is not None and now_us - self._told_us < QUIET_US):
            return None
        shifts = self._shifts(DRIFTED if self._standing is Standing.STEADY else STEADY)
        if bool(shifts) is (self._standing is Standing.DRIFTED):
            return None
        self._standing = Standing.DRIFTED if shifts else Standing.STEADY
        self._told_us = now_us
        return Turn(self._standing, shifts)

    def _shifts(self, limit: float) -> tuple[Shift, ...]:
        looks = max(self._tracks, 1.0)
        moved = [
            (psi, part)
            for part, psi in self.psi.items()
            if psi >= max(limit, chance(self._reference[part], looks))
        ]
        return tuple(self._shift(part, psi) for psi, part in sorted(moved, reverse=True))

    def _shift(self, part: str, psi: float) -> Shift:
        reference = self._reference[part]
        return Shift(part, psi, median(reference, self._counts[part]), median(reference, reference.shares))

    def state(self) -> dict[str, Any]:
        """Return everything, ready for JSON; empty without a reference."""
        if not self._reference:
            return {}
        return {
            "version": self._version,
            "counts": self._counts,
            "tracks": self._tracks,
            "at_us": self._at_us,
            "standing": self._standing.value,
            "told_us": self._told_us,
        }

    def restore(self, fields: Mapping[str, Any]) -> None:
        """Go on from a `state()` that was made against the same calibration; leave any other behind."""
        if fields.get("version") != self._version or not self._reference:
            return
        self._counts = {part: list(fields["counts"][part]) for part in self._reference}
        self._tracks, self._at_us = fields["tracks"], fields["at_us"]
        self._standing, self._told_us = Standing(fields["standing"]), fields["told_us"]
        self._measure()
