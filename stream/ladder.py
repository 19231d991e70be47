"""Settings of a verdict in one order, from eager to slow to accuse, and which of them footage allows.

The order is fixed before anything is looked at, and it is gone down from the strictest: testing in a fixed
sequence, of which the first failure is the end, needs no correction for having tried many settings (A. N.
Angelopoulos et al., "Learn then Test", 2021, on fixed sequence testing). A free search over thresholds, holds
and durations would find settings that happen to be silent on this footage.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stream import config
from stream.poisson import upper_limit

STEP = 1.5
"""Factor of the odds of `open_probability` from rung to rung: .9, .931, .953 …"""

STRICTER, LOOSER = 12, 4
"""Rungs on either side of the settings in effect: from .9 up to .9991 and down to .64. Beyond, probabilities
are what no calibration on a few hundred people can mean."""

PATIENCE, MOST_PATIENCE = 1.15, 4.0
"""Factor of `open_hold_s` from rung to rung, and in all: an accusation that takes longer than six seconds to
make misses the short manipulations."""

DURATION = 1.06
"""Factor of `min_track_s` from rung to rung: it doubles over the ladder."""

MOST_OF_WINDOW = 0.75
"""Share of the window that `min_track_s` may take: a face is never seen for all of it."""

GAP = 0.1
"""Least distance between the probabilities that open and close: else incidents flap."""

HIGHEST = 0.9999
"""Of `open_probability`: at 1 nothing could ever be said."""


@dataclass(frozen=True, slots=True)
class Rung:
    """What is fixed: probabilities 0..1, seconds. Fields as in the settings' group `verdict`."""

    open_probability: float
    close_probability: float
    open_hold_s: float
    close_hold_s: float
    min_track_s: float

    def applied(self, verdict: config.Verdict) -> config.Verdict:
        """Return `verdict` with these values, all else as it is. Raises `ValueError` out of range."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return config.Verdict.model_validate(verdict.model_dump() | fields)


def ladder(verdict: config.Verdict) -> tuple[Rung, ...]:
    """Return the rungs, the most eager first; `LOOSER` is the index of the settings as they are."""
    return tuple(_rung(verdict, step) for step in range(-LOOSER, STRICTER + 1))


def _rung(verdict: config.Verdict, step: int) -> Rung:
    if step == 0:
        return Rung(**{name: getattr(verdict, name) for name in Rung.__slots__})
    shared = min(max(verdict.open_probability, 1 - HIGHEST), HIGHEST)
    odds = shared / (1 - shared) * STEP**step
    opens = min(round(odds / (1 + odds), 4), HIGHEST)
    if step > 0:
        opens = max(opens, verdict.open_probability)
    patience = min(PATIENCE ** max(step, 0), MOST_PATIENCE)
    most = max(verdict.min_track_s, MOST_OF_WINDOW * verdict.window_s)
    return Rung(
        open_probability=opens,
        close_probability=max(0.0, round(min(verdict.close_probability, opens - GAP), 4)),
        open_hold_s=round(verdict.open_hold_s * patience, 2),
        close_hold_s=verdict.close_hold_s,
        min_track_s=round(min(verdict.min_track_s * DURATION ** max(step, 0), most), 2),
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """The rung chosen, as index, and whether footage supports the target at it."""

    rung: int
    reached: bool


def limits(alarms: Sequence[float], hours: float) -> list[float]:
    """Return the upper limit of false alarms an hour for each count; `hours` above 0."""
    return [upper_limit(count) / hours for count in alarms]


def choose(
    bounds: Sequence[float], target: float, recall: Sequence[float] | None, now: int = LOOSER
) -> Choice:
    """Return the rung to use, given each rung's limit (per hour) and the one wanted.

    Allowed are the rungs from the strictest down to the first whose limit is above `target`. Of them: the one
    that finds most, if `recall` says so; and as near to the settings in effect (`now`) as may be, without
    being looser for nothing. If none is allowed: the least strict, from `now` on, of those with the lowest
    limit.
    """
    allowed: list[int] = []
    for rung in reversed(range(len(bounds))):
        if bounds[rung] > target:
            break
        allowed.append(rung)
    if not allowed:
        return Choice(min(range(now, len(bounds)), key=lambda rung: (bounds[rung], rung)), reached=False)
    if recall is not None:
        most = max(recall[rung] for rung in allowed)
        allowed = [rung for rung in allowed if recall[rung] >= most]
    return Choice(min(allowed, key=lambda rung: (rung < now, abs(rung - now))), reached=True)
