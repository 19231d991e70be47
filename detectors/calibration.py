"""From a logit to a probability that means what it says, and to the doubt about it.

Temperature scaling for each aggregation length (Guo et al., "On Calibration of Modern Neural Networks"),
never sharper with length unless the evidence is there; class-conditional (Mondrian) conformal sets (Vovk et
al., "Algorithmic Learning in a Random World"); a variance that no length of looking brings below the spread
between people (DESIGN 3.5). Fitted by `detectors.training.calibrate`; hashed and shipped.
"""

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

SCHEMA = 2

OLDER = 1
"""Schema of files without sets, autocorrelation and what came with them; still read."""

LEVELS = 99
"""A table of p-values holds the logits at 99, 98, ... 1 percent."""


class CalibrationKind(StrEnum):
    """Where a calibration comes from; every alert says it (DESIGN 3.6)."""

    NONE = "none"
    SHIPPED = "shipped"
    OWN = "own"


class ConformalSet(StrEnum):
    """Which of the two classes a logit could belong to: one of them, both (ambiguous), neither (atypical)."""

    AUTHENTIC = "authentic"
    MANIPULATED = "manipulated"
    BOTH = "both"
    NEITHER = "neither"


class CalibrationError(ValueError):
    """A calibration that cannot be used; names the file, the field and what would be right."""


@dataclass(frozen=True, slots=True)
class Scale:
    """At `samples` effective samples the calibrated logit is logit / temperature + bias."""

    samples: float
    temperature: float
    bias: float


@dataclass(frozen=True, slots=True)
class Sets:
    """Class-conditional conformal sets over the raw (fused) logit, of single looks.

    `authentic`: rising logits at which the p-value of being authentic is .99, .98, ... .01 (the share of
    authentic people who score as high or higher); `manipulated`: those at which that of being manipulated is
    .01, .02, ... .99 (the share of manipulated faces that score as low or lower). A class is in the set while
    its p-value is above its alpha: of authentic faces like the calibration's at most `alpha_authentic` lose
    their class, of manipulated ones at most `alpha_manipulated`. Neither can be below 1/(people + 1).
    """

    alpha_authentic: float
    alpha_manipulated: float
    people_authentic: int
    people_manipulated: int
    authentic: tuple[float, ...]
    manipulated: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("authentic", "manipulated"):
            logits, people = getattr(self, name), getattr(self, f"people_{name}")
            if len(logits) != LEVELS or any(a > b for a, b in pairwise(logits)) or not _finite(logits):
                raise CalibrationError(f"sets.{name}: {len(logits)} logits, expected {LEVELS} that rise")
            alpha, least = getattr(self, f"alpha_{name}"), max(1 / (people + 1), 1 / (LEVELS + 1))
            if not least <= alpha < 0.5:
                raise CalibrationError(
                    f"sets.alpha_{name}: {alpha}, expected {least:.4f} to .5 with {people} people"
                )

    def p_authentic(self, logit: float) -> float:
        """Share of authentic looks that score as high or higher, .01..1."""
        return 1 - _level(self.authentic, logit)

    def p_manipulated(self, logit: float) -> float:
        """Share of manipulated looks that score as low or lower, .01..1."""
        return max(1 / (LEVELS + 1), _level(self.manipulated, logit))

    def of(self, logit: float) -> ConformalSet:
        """The set of a raw logit."""
        authentic = self.p_authentic(logit) > self.alpha_authentic
        if self.p_manipulated(logit) > self.alpha_manipulated:
            return ConformalSet.BOTH if authentic else ConformalSet.MANIPULATED
        return ConformalSet.AUTHENTIC if authentic else ConformalSet.NEITHER


@dataclass(frozen=True, slots=True)
class Autocorrelation:
    """How like a face's neighbouring logits are: `values` at 1, 2, ... times `step_s` seconds, pooled over
    `tracks`, cut before the first that is not above 0."""

    step_s: float
    values: tuple[float, ...]
    tracks: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.step_s) and self.step_s > 0):
            raise CalibrationError(f"rho.step_s: {self.step_s}, expected seconds above 0")
        if any(not 0 < value <= 1 for value in self.values):
            raise CalibrationError(f"rho.values: {self.values}, expected numbers above 0 and up to 1")

    @property
    def correlation_s(self) -> float:
        """Seconds after which exp(-t/s) with the same sum as `values` has faded to 1/e; 0 without any.

        The variance of a long mean depends on that sum alone, and an exponential can be summed over samples
        at any spacing in linear time.
        """
        total = math.fsum(self.values)
        return self.step_s / math.log1p(1 / total) if total > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Members that contradict each other by more than `limit` (log odds, `between`) decide nothing.

    `scales`: temperature and bias by member, as in the ensemble.
    """

    limit: float
    scales: Mapping[str, tuple[float, float]]

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise CalibrationError(f"disagreement.limit: {self.limit}, expected a number above 0")
        for name, (temperature, bias) in self.scales.items():
            if not (temperature > 0 and _finite((temperature, bias))):
                raise CalibrationError(
                    f"disagreement.scales: {name} has {temperature}, {bias}, expected a temperature above 0 "
                    "and a finite bias"
                )

    def scaled(self, members: Mapping[str, float]) -> dict[str, float]:
        """Log odds by member, of those that have a scale."""
        return {
            name: logit / self.scales[name][0] + self.scales[name][1]
            for name, logit in members.items()
            if name in self.scales
        }

    def between(self, members: Mapping[str, float]) -> float | None:
        """How far the members contradict each other, in log odds >= 0; None with fewer than two of them.

        The strongest that speaks for each class, and of the two the weaker: 0 while all lean to one side. A
        member that is unsure contradicts nobody, however sure another is.
        """
        scaled = self.scaled(members).values()
        if len(scaled) < 2:
            return None
        return max(0.0, min(max(scaled), -min(scaled)))


@dataclass(frozen=True, slots=True)
class FalseAlarms:
    """A bound on false alarms: at most `per_hour` of a stream (upper 95 % Poisson limit), after `hours` of
    authentic footage of `people` people, each counted once."""

    per_hour: float
    hours: float
    people: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """What a number looked like at calibration: `shares` of values below edges[0], between edges, above."""

    edges: tuple[float, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.edges) + 1 or any(a >= b for a, b in pairwise(self.edges)):
            raise CalibrationError(
                f"reference: {len(self.edges)} edges and {len(self.shares)} shares, expected rising edges "
                "and one share more"
            )
        if any(share < 0 for share in self.shares) or abs(math.fsum(self.shares) - 1) > 1e-6:
            raise CalibrationError(f"reference: shares {self.shares}, expected parts of 1")


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration of one logit: a member's, or the fused one of an ensemble, averaged over a track.

    `scales` by rising number of effective samples; between two of them temperature and bias are
    interpolated in the logarithm of that number, outside the nearest one holds. `tau`: standard deviation
    of the track logit between people. `sigma`: that of one frame's logit within a track.
    `prevalence`: the share of manipulated material the probability supposes, 0..1. `data`: what it was
    fitted on, in words. `sha256`: of the file, empty when there is none.

    `cllr`: cost of the likelihood ratio on people not fitted on, in bits: 0 perfect, 1 says nothing.
    `bound`: false alarms of the thresholds it came with. `tested_for`: manipulations it was tested on.
    `operating_point`: thresholds that belong to it, by the names of `verdict` settings, and what is claimed
    of them. `reference`: how scores and quality parts were spread, by name. `made_for`: digest of the
    ensemble whose logit it calibrates (`detectors.ensemble.Ensemble.digest`), empty for a member's own.
    `halves`: the calibrations of members that read half-hidden faces, by member; part of no file.
    """

    kind: CalibrationKind
    scales: tuple[Scale, ...]
    tau: float
    sigma: float
    prevalence: float = 0.5
    data: str = ""
    sha256: str = ""
    sets: Sets | None = None
    rho: Autocorrelation | None = None
    disagreement: Disagreement | None = None
    cllr: float | None = None
    bound: FalseAlarms | None = None
    tested_for: tuple[str, ...] = ()
    operating_point: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, Histogram] = field(default_factory=dict)
    made_for: str = ""
    halves: "Mapping[str, Calibration]" = field(default_factory=dict)

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
        try:
            return cls.from_json(record, hashlib.sha256(content).hexdigest())
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, record: Mapping[str, Any], sha256: str) -> "Calibration":
        """What `to_json` wrote; `sha256` is that of the file it was read from. Raises CalibrationError."""
        if not isinstance(record, Mapping) or record.get("schema") not in (OLDER, SCHEMA):
            found = record.get("schema") if isinstance(record, Mapping) else type(record).__name__
            raise CalibrationError(f"schema {found}, expected {SCHEMA} or {OLDER}")
        try:
            return cls(
                kind=CalibrationKind(record["kind"]),
                scales=tuple(Scale(s["samples"], s["temperature"], s["bias"]) for s in record["scales"]),
                tau=record["tau"],
                sigma=record["sigma"],
                prevalence=record["prevalence"],
                data=record["data"],
                sha256=sha256,
                sets=_sets(record.get("sets")),
                rho=_rho(record.get("rho")),
                disagreement=_disagreement(record.get("disagreement")),
                cllr=record.get("cllr"),
                bound=FalseAlarms(**record["bound"]) if record.get("bound") else None,
                tested_for=tuple(record.get("tested_for", ())),
                operating_point=dict(record.get("operating_point", {})),
                reference={
                    name: Histogram(tuple(found["edges"]), tuple(found["shares"]))
                    for name, found in record.get("reference", {}).items()
                },
                made_for=record.get("made_for", ""),
            )
        except CalibrationError:
            raise
        except KeyError as error:
            raise CalibrationError(f"field {error} is missing") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(str(error)) from error

    def to_json(self) -> dict[str, Any]:
        """What `load` reads; of what there is none of, nothing is written."""
        fields = {name: value for name, value in asdict(self).items() if value not in (None, {}, (), "")}
        for name in ("sha256", "halves"):
            fields.pop(name, None)
        return {"schema": SCHEMA, "data": self.data, **fields, "kind": self.kind.value}

    def of(self, half: str) -> "Calibration":
        """The calibration of the member of that name that reads half faces; this one for "" and for one that
        is not known."""
        return self.halves.get(half, self)

    def calibrated(self, logit: float, n_eff: float = 1.0) -> float:
        """The calibrated logit: the log odds at `prevalence`."""
        temperature, bias = self._scale(n_eff)
        return logit / temperature + bias

    def probability(self, logit: float, n_eff: float = 1.0) -> float:
        """Probability of manipulation, 0..1, of a logit averaged over `n_eff` effective samples."""
        return _sigmoid(self.calibrated(logit, n_eff))

    def shifted(self, logit: float, n_eff: float, shift: float) -> float:
        """The raw logit whose calibrated one lies `shift` (log odds) higher than that of `logit`."""
        return logit + shift * self._scale(n_eff)[0]

    def llr(self, logit: float, n_eff: float = 1.0) -> float:
        """Log-likelihood ratio of manipulated to authentic, in nats: the odds without their prior."""
        return self.calibrated(logit, n_eff) - math.log(self.prevalence / (1 - self.prevalence))

    def variance(self, n_eff: float) -> float:
        """Variance of a track's logit: tau^2 + sigma^2 / n_eff (DESIGN 3.5)."""
        return self.tau**2 + self.sigma**2 / max(1.0, n_eff)

    def logit_interval(self, logit: float, n_eff: float = 1.0, level: float = 0.95) -> tuple[float, float]:
        """Raw logits that the material itself may have: the score, give or take how far people lie apart.

        For a share `level` of people and looks it covers the mean logit of their class, as measured on people
        not fitted on (`detectors.training.calibrate.interval_coverage`). It does not shrink below tau.
        Raises CalibrationError for a level outside of 0..1.
        """
        if not 0 < level < 1:
            raise CalibrationError(f"level: {level}, expected a share between 0 and 1")
        reach = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(self.variance(n_eff))
        return logit - reach, logit + reach

    def interval(self, logit: float, n_eff: float = 1.0, level: float = 0.95) -> tuple[float, float]:
        """The probabilities at the ends of `logit_interval`."""
        low, high = self.logit_interval(logit, n_eff, level)
        return self.probability(low, n_eff), self.probability(high, n_eff)

    def _scale(self, n_eff: float) -> tuple[float, float]:
        first, last = self.scales[0], self.scales[-1]
        if n_eff <= first.samples:
            return first.temperature, first.bias
        if n_eff >= last.samples:
            return last.temperature, last.bias
        low, high = next((a, b) for a, b in pairwise(self.scales) if n_eff <= b.samples)
        t = math.log(n_eff / low.samples) / math.log(high.samples / low.samples)
        return (
            low.temperature + t * (high.temperature - low.temperature),
            low.bias + t * (high.bias - low.bias),
        )


def _level(logits: Sequence[float], logit: float) -> float:
    """Share 0..1 that the rising quantiles `logits` (.01, .02, ... .99) leave below `logit`: 0 below the
    first, .99 from the last on."""
    step = 1 / (len(logits) + 1)
    above = bisect_left(logits, logit)
    if above == 0:
        return step if logit == logits[0] else 0.0
    if above == len(logits):
        return len(logits) * step
    low, high = logits[above - 1], logits[above]
    return (above + (logit - low) / (high - low)) * step


def _sets(fields: Mapping[str, Any] | None) -> Sets | None:
    if fields is None:
        return None
    tables = {name: tuple(fields[name]) for name in ("authentic", "manipulated")}
    return Sets(**{**fields, **tables})


def _rho(fields: Mapping[str, Any] | None) -> Autocorrelation | None:
    if fields is None:
        return None
    return Autocorrelation(fields["step_s"], tuple(fields["values"]), fields["tracks"])


def _disagreement(fields: Mapping[str, Any] | None) -> Disagreement | None:
    if fields is None:
        return None
    scales = {name: (float(scale[0]), float(scale[1])) for name, scale in fields["scales"].items()}
    return Disagreement(fields["limit"], scales)


def _finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in values)


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    odds = math.exp(x)
    return odds / (1 + odds)
