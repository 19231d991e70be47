"""Many members, one logit: each member's logit on its own scale, weighted, fused (SCIENCE A).

Which weights, scales and rule is decided on people and forgeries that no member trained on
(`detectors.training.calibrate.fit_ensemble`) and shipped as `weights/ensemble.json`, made for exactly the
members it names by the SHA-256 of their weights. Other members together have no such file: they are fused
evenly and the result is uncalibrated, so that nobody is accused on it.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from detectors.calibration import Calibration, CalibrationError
from detectors.members import Member
from detectors.registry import SHIPPED

SCHEMA = 1
FILE = "ensemble.json"

LEAST_WEIGHT = 0.2
"""No member counts for less: one that deserves less is not worth running, and a fit that says so on a few
hundred people is fitting noise."""

ROUNDING = 1e-6
"""Weights are written in decimal."""


class EnsembleError(ValueError):
    """An ensemble that cannot be used; names the file, the field and what would be right."""


class Rule(StrEnum):
    """How scaled logits become one. `MEAN` is the published one (SCIENCE A); `LOGSUMEXP` is the logarithm of
    the weighted mean of odds, between mean and maximum."""

    MEAN = "mean"
    MAX = "max"
    LOGSUMEXP = "logsumexp"


@dataclass(frozen=True, slots=True)
class Part:
    """One member's share: its scaled logit is logit / temperature + bias. `sha256` is that of its weights."""

    name: str
    version: str
    sha256: str
    weight: float
    temperature: float
    bias: float

    def scaled(self, logit: float) -> float:
        """The member's calibrated logit, in log odds."""
        return logit / self.temperature + self.bias


@dataclass(frozen=True, slots=True)
class Ensemble:
    """How the logits of `parts` become one; `calibration` turns that one into a probability.

    Raises EnsembleError for no or doubled members, weights that are not positive or do not add up to 1,
    temperatures that are not positive.
    """

    rule: Rule
    parts: tuple[Part, ...]
    calibration: Calibration

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not names or len(set(names)) < len(names):
            raise EnsembleError(f"parts: {names}, expected at least one member, each once")
        for part in self.parts:
            if not (math.isfinite(part.temperature) and part.temperature > 0 and math.isfinite(part.bias)):
                raise EnsembleError(f"parts: {part}, expected a temperature above 0 and a finite bias")
            if not 0 < part.weight <= 1 + ROUNDING:
                raise EnsembleError(f"parts: weight {part.weight} of {part.name}, expected 0 to 1")
        total = math.fsum(part.weight for part in self.parts)
        if abs(total - 1) > len(names) * ROUNDING:
            raise EnsembleError(f"parts: the weights add up to {total}, expected 1")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    @property
    def digest(self) -> str:
        """SHA-256 of members and fusion without the calibration: what a calibration is made for."""
        content = {"rule": self.rule.value, "parts": [_part_json(part) for part in self.parts]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def scaled(self, logits: Mapping[str, float]) -> dict[str, float]:
        """Each present part's calibrated logit (log odds); members that are no part are left out."""
        return {part.name: part.scaled(logits[part.name]) for part in self.parts if part.name in logits}

    def fuse(self, logits: Mapping[str, float]) -> float:
        """One logit of the members' raw ones.

        Members that are absent (heavy ones not asked) leave their weight to the others; logits of members
        that are no part (shadows) are passed over. NaN if one is NaN. Raises EnsembleError when no part is
        there.
        """
        present = [
            (part.weight, part.scaled(logits[part.name])) for part in self.parts if part.name in logits
        ]
        if not present:
            raise EnsembleError(f"logits of {list(logits)}, expected at least one of {list(self.names)}")
        if any(math.isnan(logit) for _, logit in present):
            return math.nan
        highest = max(logit for _, logit in present)
        if self.rule is Rule.MAX or not math.isfinite(highest):
            return highest
        total = math.fsum(weight for weight, _ in present)
        if self.rule is Rule.MEAN:
            return math.fsum(weight * logit for weight, logit in present) / total
        odds = math.fsum(weight * math.exp(logit - highest) for weight, logit in present)
        return highest + math.log(odds / total)

    def to_json(self) -> dict[str, Any]:
        """What `read_ensemble` reads."""
        return {
            "schema": SCHEMA,
            "rule": self.rule.value,
            "parts": [_part_json(part) for part in self.parts],
            "calibration": self.calibration.to_json(),
        }


def load_ensemble(members: Sequence[Member], path: Path = SHIPPED / FILE) -> Ensemble:
    """How these members (at least one) are fused.

    By the file at `path` when it was made for exactly these, by the weights' SHA-256. Else a single member is
    itself, with its own calibration; several are fused evenly, each scaled by its own calibration, and the
    whole is uncalibrated. Raises EnsembleError and CalibrationError for a broken file.
    """
    if not members:
        raise EnsembleError("no members, expected at least one")
    if path.exists():
        shipped = read_ensemble(path)
        if {part.sha256 for part in shipped.parts} == {member.sha256 for member in members}:
            return shipped
    if len(members) == 1:
        return single(members[0])
    return unfitted(members)


def single(member: Member) -> Ensemble:
    """A member by itself: its raw logit, its own calibration."""
    part = Part(member.name, member.version, member.sha256, 1.0, 1.0, 0.0)
    return Ensemble(Rule.MEAN, (part,), member.calibration)


def unfitted(members: Sequence[Member]) -> Ensemble:
    """Members that nobody fitted together: the even mean of their own scaled logits, uncalibrated."""
    scales = [member.calibration.scales[0] for member in members]
    parts = tuple(
        Part(member.name, member.version, member.sha256, 1 / len(members), scale.temperature, scale.bias)
        for member, scale in zip(members, scales, strict=True)
    )
    return Ensemble(Rule.MEAN, parts, Calibration.identity())


def read_ensemble(path: Path) -> Ensemble:
    """Reads an ensemble file; its hash is that of the whole file and becomes the calibration's.

    Raises EnsembleError for a missing or broken file and for a weight below `LEAST_WEIGHT`, CalibrationError
    for its calibration.
    """
    try:
        content = path.read_bytes()
        record = json.loads(content)
    except (OSError, ValueError) as error:
        raise EnsembleError(f"{path}: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise EnsembleError(f"{path}: expected an object with schema {SCHEMA}")
    try:
        parts = tuple(Part(**{name: part[name] for name in Part.__slots__}) for part in record["parts"])
        calibration = Calibration.from_json(record["calibration"], hashlib.sha256(content).hexdigest())
        ensemble = Ensemble(Rule(record["rule"]), parts, calibration)
    except KeyError as error:
        raise EnsembleError(f"{path}: field {error} is missing") from error
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise EnsembleError(f"{path}: {error}") from error
    light = [part.name for part in parts if part.weight < LEAST_WEIGHT - ROUNDING]
    if light:
        raise EnsembleError(f"{path}: the weight of {light[0]} is below {LEAST_WEIGHT}")
    return ensemble


def _part_json(part: Part) -> dict[str, Any]:
    return {name: getattr(part, name) for name in Part.__slots__}
