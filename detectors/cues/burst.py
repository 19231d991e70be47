"""What the cues make of a burst at full rate: a number for each, or the reason why there is none."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from detectors.cues import Cue, missing
from detectors.cues.blink import blinks
from detectors.cues.eyes import features
from detectors.cues.lips import agreement
from detectors.cues.ratios import Regression
from detectors.cues.series import FaceSeries, SoundSeries
from detectors.cues.svm import Svm
from detectors.cues.voice import why_no_voice

if TYPE_CHECKING:  # it brings torch, which only a trained network needs
    from detectors.cues.motion import MotionModel

BLINK, EYES, LIPS, MOTION, RATIOS = "blink", "eyes", "lips", "motion", "ratios"
NAMES = (BLINK, EYES, LIPS, MOTION, RATIOS)
"""The cues that need a burst."""

TRAINED = Path(__file__).parent / "trained"
"""Where trained cues are shipped: eyes.json, ratios.json, motion.json with motion.safetensors."""

LEAST_S = 1.5
"""A burst shorter than this (the face left, or was lost) says nothing."""

LEAST_SHARE = 0.7
"""Share of the burst's pictures in which the face must have been followed."""

LEAST_RATE_HZ = 15.0
"""Below this a blink is one picture or none."""

BLINK_S = 10.0
"""Time watched over all bursts of a face before its blink rate means anything: people blink every four."""

NOT_YET = "no burst at full rate has looked at this face"


@dataclass(slots=True)
class Tally:
    """One face over all its bursts: seconds watched and blinks in them; of the other cues the sum of their
    values and how many there were; and why the newest burst gave none."""

    watched_s: float = 0.0
    blinks: int = 0
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return asdict(self)

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Self:
        """What `state` wrote, also through JSON."""
        sums = {name: (float(total), int(count)) for name, (total, count) in state["sums"].items()}
        return cls(float(state["watched_s"]), int(state["blinks"]), sums, dict(state["reasons"]))


class BurstCues:
    """Reads the wanted cues, of NAMES; those that want a trained model say so where there is none.

    `against`: why nothing can be looked at at all (landmarks not pulled); "" if it can. Raises ValueError for
    a trained model that is broken.
    """

    def __init__(self, names: Iterable[str], against: str = "", trained: Path = TRAINED) -> None:
        self.names = tuple(name for name in NAMES if name in set(names))
        self.against = against
        self._eyes = _loaded(trained / "eyes.json", Svm.from_json) if EYES in self.names else None
        self._ratios = (
            _loaded(trained / "ratios.json", Regression.from_json) if RATIOS in self.names else None
        )
        self._motion = _motion(trained) if MOTION in self.names else None

    @property
    def looks(self) -> bool:
        """Whether there is anything to open a burst for."""
        return not self.against and any(not self._without(name) for name in self.names)

    def blank(self) -> tuple[Cue, ...]:
        """Return the readings of a face that no burst has looked at."""
        return tuple(missing(name, self.against or self._without(name) or NOT_YET) for name in self.names)

    def add(
        self, tally: Tally, series: FaceSeries, sound: SoundSeries, length_s: float, pictures: int
    ) -> tuple[Cue, ...]:
        """Take a burst of `length_s` seconds and `pictures` into the tally; return the readings as they are
        now."""
        against = _unfit(series, length_s, pictures)
        for name in self.names:
            if name == BLINK:
                self._add_blinks(tally, series, against)
                continue
            found = against or self._without(name) or self._read(name, series, sound)
            if isinstance(found, str):
                tally.reasons[name] = found
                continue
            total, count = tally.sums.get(name, (0.0, 0))
            tally.sums[name] = (total + found, count + 1)
        return tuple(self._reading(name, tally) for name in self.names)

    def _reading(self, name: str, tally: Tally) -> Cue:
        if name == BLINK:
            if tally.watched_s >= BLINK_S:
                return Cue(name, 60 * tally.blinks / tally.watched_s)
            short = f"watched for {tally.watched_s:.1f} s; a blink rate needs {BLINK_S:g} s"
            return missing(name, tally.reasons.get(name) or short)
        total, count = tally.sums.get(name, (0.0, 0))
        return Cue(name, total / count) if count else missing(name, tally.reasons[name])

    def _add_blinks(self, tally: Tally, series: FaceSeries, against: str) -> None:
        found = None if against else blinks(series.seconds, series.numbers[:, :2])
        if found is None:
            tally.reasons[BLINK] = against or "the eyes were not seen open"
            return
        tally.reasons.pop(BLINK, None)
        tally.watched_s += found.seconds
        tally.blinks += len(found.lengths)

    def _without(self, name: str) -> str:
        """Return what a cue lacks here, "" if nothing."""
        if name == LIPS:
            return why_no_voice()
        models = {EYES: self._eyes, RATIOS: self._ratios, MOTION: self._motion}
        if name in models and models[name] is None:
            return "no trained model is shipped"
        return ""

    def _read(self, name: str, series: FaceSeries, sound: SoundSeries) -> float | str:
        if name == LIPS:
            start = series.times[0]
            heard = (np.asarray(sound.times, np.float64) - start) / 1e6
            return agreement(series.seconds, series.numbers[:, 6], heard, sound.voice, sound.level)
        if name == EYES:
            return self._read_eyes(series)
        if name == RATIOS:
            assert self._ratios is not None
            found = series.ratios
            return (
                self._ratios.log_odds(found.mean(axis=0))
                if len(found)
                else "no ring about the face in the picture"
            )
        assert self._motion is not None
        logit = self._motion.logit(series.seconds, series.points)
        return "the burst is shorter than one window" if logit is None else logit

    def _read_eyes(self, series: FaceSeries) -> float | str:
        assert self._eyes is not None
        found = blinks(series.seconds, series.numbers[:, :2])
        described = None if found is None else features(series.seconds, series.numbers, found)
        return (
            "the eyes were not seen open for long enough"
            if described is None
            else self._eyes.log_odds(described)
        )


def _unfit(series: FaceSeries, length_s: float, pictures: int) -> str:
    """Return why a series says nothing, "" if it does."""
    if series.length_s < LEAST_S:
        return f"followed for {series.length_s:.1f} s; a burst needs {LEAST_S:g} s"
    if len(series.times) < LEAST_SHARE * pictures * min(1.0, series.length_s / max(length_s, 1e-3)):
        return f"followed in {len(series.times)} of {pictures} pictures; the landmarks lost the face"
    rate = (len(series.times) - 1) / series.length_s
    if rate < LEAST_RATE_HZ:
        return f"{rate:.0f} pictures a second; full rate means at least {LEAST_RATE_HZ:g}"
    return ""


def _motion(trained: Path) -> "MotionModel | None":
    if not (trained / "motion.json").exists():
        return None
    from detectors.cues.motion import MotionModel

    return MotionModel(trained)


def _loaded(path: Path, read: Any) -> Any:
    if not path.exists():
        return None
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
