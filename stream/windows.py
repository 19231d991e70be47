"""Sliding windows over media time: the quality-weighted mean logit of a face and how much it rests on.

Source: DESIGN 3.5; SCIENCE A (logits are averaged, not probabilities) and D (effective samples).
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from detectors.readings import FaceReading, Reason

MICRO = 1_000_000

CORRELATION_S = 1.0
"""Time over which the errors of one face's logits are taken to fade to 1/e while the calibration holds no
measured autocorrelation (SCIENCE D). A prudent default: however fast the sampling, ten seconds of one face
count as about five independent looks."""

SPACING_S = 0.5
"""A sample stands for the time since the one before, up to this: the spacing of the slowest default sampling.
Sampling speeds up while scores are high; were every sample to count alike, the mean would lean towards the
moments that looked worst, and authentic faces whose scores waver would be accused for being looked at."""

LOGIT_DIGITS = 4
"""Logits are rounded as they enter, so that state written as JSON is short and restores to the same sums."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of one face. `weight` is its quality, 0..1; no `reasons` when good enough to decide on.

    `half` names the member that read the visible half of a covered face, whose logit `fused` is; empty: the
    ensemble read it. Logits of different ones are on different scales and are never averaged.
    """

    media_us: int
    fused: float
    members: dict[str, float]
    weight: float
    reasons: tuple[Reason, ...] = ()
    half: str = ""

    @property
    def good(self) -> bool:
        return not self.reasons and self.weight > 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a window says.

    `logit` and `members` are means over the good samples, weighted by quality and by the time that each
    stands for (while none is good over all of them, so that something can be reported; nothing is decided on
    those). A member that did not read all of them (heavy ones are asked on suspicion only) has the mean of
    those that it read. `n_eff` >= 1 is the number of independent samples they are worth, `spread` the
    variance of their logits. `span_us` lies between the first and last good sample, `onset_us` is the first
    good sample that leans to manipulated (None: none does). `reasons` are those of the samples that are not
    good, the most frequent first. `half`: all of that is about the samples of that one, which are most of
    the good ones (`Sample.half`); the others count as not good.
    """

    logit: float
    members: dict[str, float]
    n_eff: float
    spread: float
    samples: int
    good: int
    span_us: int
    first_us: int
    last_us: int
    onset_us: int | None
    reasons: tuple[Reason, ...]
    half: str = ""


def sample_of(reading: FaceReading, media_us: int) -> Sample:
    """Return a face's reading as a sample at `media_us`; a logit that is no number decides nothing.

    Of a half-hidden face that another member speaks for, `members` holds that one alone: what counts.
    """
    if not all(math.isfinite(logit) for logit in (reading.fused, *reading.logits.values())):
        return Sample(media_us, 0.0, {}, 0.0, (*reading.quality.reasons, Reason.ATYPICAL))
    return Sample(
        media_us=media_us,
        fused=round(reading.fused, LOGIT_DIGITS),
        members={
            name: round(logit, LOGIT_DIGITS)
            for name, logit in reading.logits.items()
            if reading.half in ("", name)
        },
        weight=round(reading.quality.weight, LOGIT_DIGITS),
        reasons=reading.quality.reasons,
        half=reading.half,
    )


def pooled_sample(samples: Sequence[Sample]) -> Sample:
    """Return all faces of one frame as one sample (at least one in, same media time).

    A frame counts once whatever the number of faces, and an authentic face dilutes a manipulated one: the
    stream's own window can only be slower to accuse than a track's.
    """
    half = _mostly(samples)
    kept = [sample for sample in samples if sample.good and sample.half == half]
    reasons = () if kept else _most_frequent(samples)
    kept = kept or [sample for sample in samples if sample.half == half]
    weight = sum(sample.weight for sample in kept)
    return Sample(
        media_us=samples[0].media_us,
        fused=round(_mean((sample.fused, sample.weight) for sample in kept), LOGIT_DIGITS),
        members={name: round(mean, LOGIT_DIGITS) for name, mean in _member_means(kept).items()},
        weight=round(weight / len(kept), LOGIT_DIGITS),
        reasons=reasons,
        half=half,
    )


def effective_samples(times_us: Sequence[int], weights: Sequence[float], correlation_s: float) -> float:
    """Return how many independent samples a weighted mean is worth, from 1 to len(weights).

    (sum w)^2 / sum_ij w_i w_j rho(|t_i - t_j|) with rho(t) = exp(-t / correlation_s): SCIENCE D's
    (sum w)^2 / sum w^2 over 1 + 2 sum_k (1 - k/n) rho_k, but for any spacing, since sampling speeds up on
    suspicion. Times ascend; weights are > 0; `correlation_s` >= 0, where 0 means independent. Linear in the
    number of samples.
    """
    if not weights:
        return 0.0
    if correlation_s == 0:
        return max(1.0, sum(weights) ** 2 / sum(weight * weight for weight in weights))
    diagonal = sum(weight * weight for weight in weights)
    cross = carried = 0.0
    for index in range(1, len(weights)):
        step_s = (times_us[index] - times_us[index - 1]) / MICRO
        carried = math.exp(-step_s / correlation_s) * (carried + weights[index - 1])
        cross += weights[index] * carried
    return max(1.0, sum(weights) ** 2 / (diagonal + 2.0 * cross))


def estimate(samples: Sequence[Sample], correlation_s: float = CORRELATION_S) -> Estimate | None:
    """Return what `samples` (ascending in time) say together, None if there are none."""
    if not samples:
        return None
    half = _mostly(samples)
    good = [sample for sample in samples if sample.good and sample.half == half]
    kept = [
        replace(sample, weight=spacing_s * (sample.weight if good else 1.0))
        for sample, spacing_s in zip(samples, _spacings_s(samples), strict=True)
        if sample.half == half and (sample.good or not good)
    ]
    logit = _mean((sample.fused, sample.weight) for sample in kept)
    leaning = (sample.media_us for sample in good if sample.fused > 0)
    return Estimate(
        logit=logit,
        members=_member_means(kept),
        n_eff=effective_samples(
            [sample.media_us for sample in kept], [sample.weight for sample in kept], correlation_s
        ),
        spread=_mean(((sample.fused - logit) ** 2, sample.weight) for sample in kept),
        samples=len(samples),
        good=len(good),
        span_us=good[-1].media_us - good[0].media_us if good else 0,
        first_us=samples[0].media_us,
        last_us=samples[-1].media_us,
        onset_us=next(leaning, None),
        reasons=_most_frequent(samples),
        half=half,
    )


class Window:
    """The samples of the last `length_us` of media time: those in (now - length_us, now].

    `correlation_s`: time over which the errors of their logits fade to 1/e.
    """

    def __init__(self, length_us: int, correlation_s: float = CORRELATION_S) -> None:
        self._length_us = length_us
        self._correlation_s = correlation_s
        self._samples: deque[Sample] = deque()

    def __len__(self) -> int:
        return len(self._samples)

    def samples(self) -> tuple[Sample, ...]:
        return tuple(self._samples)

    def add(self, sample: Sample) -> None:
        """Append a sample and forget what it pushes out. Raises `ValueError` if it is older than the last."""
        if self._samples and sample.media_us < self._samples[-1].media_us:
            raise ValueError(
                f"sample at {sample.media_us} us is older than the last at {self._samples[-1].media_us} us; "
                "samples must come in the order of media time"
            )
        self._samples.append(sample)
        self.evict(sample.media_us)

    def evict(self, now_us: int) -> None:
        """Forget samples that are `length_us` old or older at media time `now_us`."""
        while self._samples and self._samples[0].media_us <= now_us - self._length_us:
            self._samples.popleft()

    def clear(self) -> None:
        self._samples.clear()

    def estimate(self) -> Estimate | None:
        return estimate(tuple(self._samples), self._correlation_s)

    def state(self) -> list[list[Any]]:
        """Return the samples as JSON: one row each."""
        return [
            [
                s.media_us,
                s.fused,
                s.weight,
                s.members,
                [reason.value for reason in s.reasons],
                *([s.half] if s.half else []),
            ]
            for s in self._samples
        ]

    def restore(self, rows: Iterable[Sequence[Any]]) -> None:
        self._samples = deque(
            Sample(media_us, fused, dict(members), weight, tuple(Reason(reason) for reason in reasons), *half)
            for media_us, fused, weight, members, reasons, *half in rows
        )


def _mostly(samples: Sequence[Sample]) -> str:
    """Who read most of the samples that are good (of all, if none is): the ensemble, or one of the halves."""
    good = [sample for sample in samples if sample.good]
    counts = Counter(sample.half for sample in good or samples)
    return max(counts, key=lambda half: (counts[half], half == "", half))


def _spacings_s(samples: Sequence[Sample]) -> list[float]:
    """Seconds that each sample stands for, above 0; the first as long as the second."""
    gaps = [(after.media_us - before.media_us) / MICRO for before, after in pairwise(samples)]
    gaps = [min(max(gap, 1 / MICRO), SPACING_S) for gap in gaps]
    return [gaps[0] if gaps else SPACING_S, *gaps]


def _mean(pairs: Iterable[tuple[float, float]]) -> float:
    total = weight_sum = 0.0
    for value, weight in pairs:
        total += value * weight
        weight_sum += weight
    return total / weight_sum if weight_sum else 0.0


def _member_means(samples: Sequence[Sample]) -> dict[str, float]:
    """Return each member's mean logit over the samples that it read."""
    names = dict.fromkeys(name for sample in samples for name in sample.members)
    return {
        name: _mean((sample.members[name], sample.weight) for sample in samples if name in sample.members)
        for name in names
    }


def _most_frequent(samples: Iterable[Sample]) -> tuple[Reason, ...]:
    counts = Counter(reason for sample in samples for reason in sample.reasons)
    order = list(Reason)
    return tuple(sorted(counts, key=lambda reason: (-counts[reason], order.index(reason))))
