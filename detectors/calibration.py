"""From a logit to a probability that means what it says, and how wide the doubt about it is.

Temperature scaling for each aggregation length (Guo et al., "On Calibration of Modern Neural Networks"),
never sharper with length unless the evidence is there, and a variance that no length of looking brings
below the spread between people (DESIGN 3.5). Fitted by `detectors.training.calibrate`; hashed and shipped
with a member.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import NormalDist
from typing import Any

SCHEMA = 1


class CalibrationKind(StrEnum):
    """Where a calibration comes from; every alert says it (DESIGN 3.6)."""

    NONE = "none"
    SHIPPED = "shipped"
    OWN = "own"


class CalibrationError(ValueError):
    """A calibration that cannot be used; names the file, the field and what would be right."""


@dataclass(frozen=True, slots=True)
class Scale:
    """At `samples` effective samples the calibrated logit is logit / temperature + bias."""

    samples: float
    temperature: float
    bias: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """A member's calibration. Logits are the member's own, averaged over a track's samples.

    `scales` by rising number of effective samples; between two of them temperature and bias are
    interpolated in the logarithm of that number, outside the nearest one holds. `tau`: standard deviation
    of the track logit between authentic people. `sigma`: that of one frame's logit within a track.
    `prevalence`: the share of manipulated material the probability supposes, 0..1. `data`: what it was
    fitted on, in words. `sha256`: of the file, empty when there is none.
    """

    kind: CalibrationKind
    scales: tuple[Scale, ...]
    tau: float
    sigma: float
    prevalence: float = 0.5
    data: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        if not self.scales:
            raise CalibrationError("scales: none given, expected at least one")
        samples = [scale.samples for scale in self.scales]
        if samples != sorted(set(samples)) or samples[0] < 1:
            raise CalibrationError(f"scales: samples {samples}, expected rising numbers from 1 on")
        for scale in self.scales:
            if not (math.isfinite(scale.temperature) and scale.temperature > 0 and math.isfinite(scale.bias)):
                raise CalibrationError(f"scales: {scale}, expected a temperature above 0 and a finite bias")
        for name in ("tau", "sigma"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise CalibrationError(f"{name}: {getattr(self, name)}, expected a finite number >= 0")
        if not 0 < self.prevalence < 1:
            raise CalibrationError(f"prevalence: {self.prevalence}, expected a share between 0 and 1")

    @classmethod
    def identity(cls) -> "Calibration":
        """For an uncalibrated member: the plain sigmoid, and doubt as wide as an untested detector deserves.

        Two logits between people is what the shipped member shows or more; nobody knows it of an unknown one.
        """
        return cls(kind=CalibrationKind.NONE, scales=(Scale(1, 1.0, 0.0),), tau=2.0, sigma=2.0)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Reads `calibration.json`; CalibrationError for a missing file, schema or field."""
        try:
            content = path.read_bytes()
            record = json.loads(content)
        except (OSError, ValueError) as error:
            raise CalibrationError(f"{path}: {error}") from error
        if record.get("schema") != SCHEMA:
            raise CalibrationError(f"{path}: schema {record.get('schema')}, expected {SCHEMA}")
        try:
            return cls(
                kind=CalibrationKind(record["kind"]),
                scales=tuple(Scale(s["samples"], s["temperature"], s["bias"]) for s in record["scales"]),
                tau=record["tau"],
                sigma=record["sigma"],
                prevalence=record["prevalence"],
                data=record["data"],
                sha256=hashlib.sha256(content).hexdigest(),
            )
        except KeyError as error:
            raise CalibrationError(f"{path}: field {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"{path}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """What `load` reads."""
        return {
            "schema": SCHEMA,
            "kind": self.kind.value,
            "scales": [
                {"samples": s.samples, "temperature": s.temperature, "bias": s.bias} for s in self.scales
            ],
            "tau": self.tau,
            "sigma": self.sigma,
            "prevalence": self.prevalence,
            "data": self.data,
        }

    def calibrated(self, logit: float, n_eff: float = 1.0) -> float:
        """The calibrated logit: the log odds at `prevalence`."""
        temperature, bias = self._scale(n_eff)
        return logit / temperature + bias

    def probability(self, logit: float, n_eff: float = 1.0) -> float:
        """Probability of manipulation, 0..1, of a logit averaged over `n_eff` effective samples."""
        return _sigmoid(self.calibrated(logit, n_eff))

    def llr(self, logit: float, n_eff: float = 1.0) -> float:
        """Log-likelihood ratio of manipulated to authentic, in nats: the odds without their prior."""
        return self.calibrated(logit, n_eff) - math.log(self.prevalence / (1 - self.prevalence))

    def variance(self, n_eff: float) -> float:
        """Variance of a track's logit: tau^2 + sigma^2 / n_eff (DESIGN 3.5)."""
        return self.tau**2 + self.sigma**2 / max(1.0, n_eff)

    def interval(self, logit: float, n_eff: float = 1.0, level: float = 0.95) -> tuple[float, float]:
        """Probabilities between which the track's lies, normal in the logit, at `level` between 0 and 1."""
        if not 0 < level < 1:
            raise CalibrationError(f"level: {level}, expected a share between 0 and 1")
        reach = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(self.variance(n_eff))
        return self.probability(logit - reach, n_eff), self.probability(logit + reach, n_eff)

    def _scale(self, n_eff: float) -> tuple[float, float]:
        first, last = self.scales[0], self.scales[-1]
        if n_eff <= first.samples:
            return first.temperature, first.bias
        if n_eff >= last.samples:
            return last.temperature, last.bias
        low, high = next(
            (a, b) for a, b in zip(self.scales, self.scales[1:], strict=False) if n_eff <= b.samples
        )
        t = math.log(n_eff / low.samples) / math.log(high.samples / low.samples)
        return (
            low.temperature + t * (high.temperature - low.temperature),
            low.bias + t * (high.bias - low.bias),
        )


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    odds = math.exp(x)
    return odds / (1 + odds)
