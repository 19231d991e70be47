"""Late fusion: cues move the calibrated logit of the networks, within bounds (SCIENCE E; DESIGN 3.6).

The ensemble is the base. A cue's number is put on the scale of log odds by its own Platt scaling (Platt,
"Probabilistic Outputs for Support Vector Machines"), times a weight, cut at a limit; the sum of all is cut
too. A cue that is missing says nothing: it adds exactly nothing. Which cues have a say, and the measurement
that let each in, is the committed file `late.json` (`python -m detectors.training.cues`); those that were
measured and left out are there with their measurement.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from detectors.cues import NAMES, Cue

FILE = Path(__file__).parent / "late.json"
SCHEMA = 1

MOST = math.log(2)
"""The most one cue may shift: it can double the odds or halve them. What is weak alone (SCIENCE E) never
decides alone."""

MOST_TOTAL = math.log(3)
"""The most all of them may shift together: from even odds to three to one, a probability of .75, where an
accusation takes .9."""


class LateError(ValueError):
    """A fusion file that cannot be used; names the file, the field and what would be right."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """A cue that has a say: log odds = slope * value + bias, times `weight`, cut at +-`limit` (log odds).

    `measured` is what let it in, as the ablation wrote it. Raises LateError for an unknown name, numbers that
    are not finite, a weight that is not above 0, a limit outside of 0..ln 2.
    """

    name: str
    slope: float
    bias: float
    weight: float
    limit: float
    measured: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise LateError(f"cues: {self.name} is unknown; there are: {', '.join(NAMES)}")
        if not all(map(math.isfinite, (self.slope, self.bias))):
            raise LateError(
                f"cues: {self.name} has slope {self.slope}, bias {self.bias}, expected finite ones"
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise LateError(f"cues: {self.name} has weight {self.weight}, expected a number above 0")
        if not 0 < self.limit <= MOST:
            raise LateError(f"cues: {self.name} has limit {self.limit}, expected 0 to {MOST:.4f}")
        if not self.measured:
            raise LateError(f"cues: {self.name} has no field measured; a cue enters by a measurement only")

    def shift(self, value: float) -> float:
        """Log odds, within +-`limit`."""
        return max(-self.limit, min(self.limit, self.weight * (self.slope * value + self.bias)))


@dataclass(frozen=True, slots=True)
class Share:
    """What one cue did: its `value` (None: missing, and `reason` says why) and the `shift` of the calibrated
    logit that came of it, in log odds: None of a cue that is recorded without a say."""

    name: str
    value: float | None
    reason: str | None
    shift: float | None

    def to_json(self) -> dict[str, Any]:
        """The share as records and alerts tell it."""
        told: dict[str, Any] = (
            {"reason": self.reason} if self.value is None else {"value": round(self.value, 4)}
        )
        return told if self.shift is None else {**told, "shift": round(self.shift, 4)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Share":
        """What `dataclasses.asdict` turned into JSON."""
        return cls(**{name: fields[name] for name in cls.__slots__})


@dataclass(frozen=True, slots=True)
class Late:
    """The cues that have a say, none by default. Raises LateError for a doubled name or a total limit outside
    of 0..ln 3."""

    cues: tuple[Weighed, ...] = ()
    limit_total: float = MOST_TOTAL

    def __post_init__(self) -> None:
        names = self.names
        if len(set(names)) < len(names):
            raise LateError(f"cues: {list(names)}, expected each once")
        if not 0 < self.limit_total <= MOST_TOTAL:
            raise LateError(f"limit_total: {self.limit_total}, expected 0 to {MOST_TOTAL:.4f}")

    @property
    def names(self) -> tuple[str, ...]:
        """Of those with a say."""
        return tuple(cue.name for cue in self.cues)

    def shares(self, readings: Iterable[Cue]) -> tuple[Share, ...]:
        """What each reading does, in the order of the readings. The shifts add up to what is applied: where
        the total is cut, each gives up the same part."""
        weighed = {cue.name: cue for cue in self.cues}
        shares = [_share(reading, weighed.get(reading.name)) for reading in readings]
        total = shift_of(shares)
        if abs(total) <= self.limit_total:
            return tuple(shares)
        part = self.limit_total / abs(total)
        return tuple(
            share if share.shift is None else replace(share, shift=share.shift * part) for share in shares
        )


def shift_of(shares: Sequence[Share]) -> float:
    """Log odds that the shares add to the calibrated logit: exactly 0 without one that has a say."""
    return math.fsum(share.shift for share in shares if share.shift is not None)


@lru_cache(maxsize=8)
def load_late(path: Path = FILE) -> Late:
    """The fusion that is shipped, read once. Raises LateError for a file that is missing or broken."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LateError(f"{path}: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise LateError(f"{path}: expected an object with schema {SCHEMA}")
    try:
        cues = tuple(Weighed(**cue) for cue in record["cues"])
        return Late(cues, float(record["limit_total"]))
    except KeyError as error:
        raise LateError(f"{path}: field {error} is missing") from error
    except LateError as error:
        raise LateError(f"{path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise LateError(f"{path}: {error}") from error


def _share(reading: Cue, weighed: Weighed | None) -> Share:
    if weighed is None:
        return Share(reading.name, reading.value, reading.reason, None)
    if reading.value is None:
        return Share(reading.name, None, reading.reason, 0.0)
    return Share(reading.name, reading.value, None, weighed.shift(reading.value))
