"""Closer looks at suspect feeds: how much of the device they may take, so that they do not starve calm ones
(DESIGN 3.8), and the bursts at full rate that feed the cues over time (docs/cues.md)."""

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

from detectors.cues import Cue
from detectors.cues.burst import LIPS, MOTION, NAMES, RATIOS, BurstCues, Tally
from detectors.cues.follow import Follower
from detectors.cues.landmarks import FOLDER, LandmarkModel, LandmarksError, why_no_landmarks
from detectors.cues.series import FaceLook, FaceSeries, SoundSeries
from detectors.cues.voice import Window, silero, why_no_voice
from stream.clock import Clock
from stream.closer import wanted_cues
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.windows import MICRO

logger = logging.getLogger(__name__)

SPAN_S = 10.0
"""Over which the share is measured: as long as bursts commonly last, so none is cut off at its begin."""

FULL_FPS = 60.0
"""Full rate is every picture, and of faster feeds every second one: saccades want 60 a second, nothing
more."""

LONGEST_US = 4 * MICRO
"""A burst: a blink or two, a sentence, three windows of landmark motion."""

SHORTEST_US = 2 * MICRO
"""What a burst lasts though its budget is spent meanwhile: less says nothing, and was paid for nothing."""

AWAITED_US = 15 * MICRO
"""Until a burst that was opened must show pictures, from the first of which it counts: what was decoded
before the decoder heard of it, a few seconds of a file, has none."""

REST_US = 6 * MICRO
"""After a burst, until the stream may have the next: a feed that stays suspect is at full rate two fifths of
the time at most."""

FIXED = "sampling is fixed (deterministic: true): there are no bursts"


class BurstBudget:
    """Counts device time spent on bursts. Used by one thread."""

    def __init__(self, share: float, clock: Clock) -> None:
        self._allowed_s = share * SPAN_S
        self._clock = clock
        self._spent: deque[tuple[float, float]] = deque()
        self._total_s = 0.0

    def spend(self, seconds: float) -> None:
        """Note device time that a burst took."""
        self._spent.append((self._clock.monotonic(), seconds))
        self._total_s += seconds

    def allows(self) -> bool:
        """Return whether bursts took no more than their share of the last `SPAN_S`."""
        begin = self._clock.monotonic() - SPAN_S
        while self._spent and self._spent[0][0] < begin:
            self._total_s -= self._spent.popleft()[1]
        return self._total_s <= self._allowed_s


class Phase(StrEnum):
    """Where a stream stands with bursts at full rate.

    Legal: CALM -> OPEN (something looks wrong, and bursts keep within their budget), OPEN -> RESTING (it is
    long enough, or the budget is spent), RESTING -> CALM (others had their turn).
    """

    CALM = "calm"
    OPEN = "open"
    RESTING = "resting"


LEGAL: dict[Phase, frozenset[Phase]] = {
    Phase.CALM: frozenset({Phase.OPEN}),
    Phase.OPEN: frozenset({Phase.RESTING}),
    Phase.RESTING: frozenset({Phase.CALM}),
}


class FullRate:
    """Opens and closes the bursts of one stream and keeps what they saw, by track.

    Pure in media time but for `allowed`; everything is state. Used by one thread.
    """

    def __init__(self, cues: BurstCues) -> None:
        self._cues = cues
        self._phase = Phase.CALM
        self._since_us = 0
        self._pictures = 0
        self._series: dict[int, FaceSeries] = {}
        self._sound = SoundSeries()
        self._tallies: dict[int, Tally] = {}
        self.passed_over = 0
        """Looks at faces of no track, and beyond what a series holds, since this object was made."""

    @property
    def open(self) -> bool:
        return self._phase is Phase.OPEN

    def blank(self) -> tuple[Cue, ...]:
        """Return the readings of a new track."""
        return self._cues.blank()

    def step(self, now_us: int, suspect: bool, allowed: bool) -> dict[int, tuple[Cue, ...]]:
        """Let media time go on; return the readings of every track if a burst ended, else nothing."""
        if self._phase is Phase.RESTING and now_us - self._since_us >= REST_US:
            self._enter(Phase.CALM, now_us)
        if self._phase is Phase.CALM and suspect and allowed and self._cues.looks:
            self._enter(Phase.OPEN, now_us)
        return self._end(now_us) if self._phase is Phase.OPEN and self._over(now_us, allowed) else {}

    def _over(self, now_us: int, allowed: bool) -> bool:
        lasted_us = now_us - self._since_us
        if not self._pictures:
            return lasted_us >= AWAITED_US
        return lasted_us >= LONGEST_US or (lasted_us >= SHORTEST_US and not allowed)

    def look(self, media_us: int, ids: Sequence[int], looks: Sequence[FaceLook | None]) -> None:
        """Take one picture of an open burst: what was seen of the faces of the tracks `ids`, in order."""
        if not self.open:
            return
        if not self._pictures:
            self._since_us = media_us
        self._pictures += 1
        self.passed_over += max(0, len(looks) - len(ids))
        for track, look in zip(ids, looks, strict=False):
            if look is not None:
                series = self._series.setdefault(track, FaceSeries())
                self.passed_over += not series.add(media_us, look)

    def hear(self, windows: Iterable[Window]) -> None:
        """Take what was heard during an open burst; what was heard before (a replay) is passed over."""
        if self.open:
            for window in windows:
                self._sound.add(window.media_us, window.voice, window.level_db)

    def forget(self, ids: Iterable[int]) -> None:
        """Drop tracks that ended."""
        for track in ids:
            self._series.pop(track, None)
            self._tallies.pop(track, None)

    def state(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {
            "phase": self._phase.value,
            "since_us": self._since_us,
            "pictures": self._pictures,
            "series": [[track, series.state()] for track, series in self._series.items()],
            "sound": self._sound.state(),
            "tallies": [[track, tally.state()] for track, tally in self._tallies.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()` that may have been through JSON."""
        self._phase, self._since_us = Phase(state["phase"]), state["since_us"]
        self._pictures = state["pictures"]
        self._series = {track: FaceSeries.restored(series) for track, series in state["series"]}
        self._sound = SoundSeries.restored(state["sound"])
        self._tallies = {track: Tally.restored(tally) for track, tally in state["tallies"]}

    def _enter(self, phase: Phase, now_us: int) -> None:
        if phase not in LEGAL[self._phase]:
            raise RuntimeError(f"a burst cannot go from {self._phase} to {phase}")
        self._phase, self._since_us = phase, now_us

    def _end(self, now_us: int) -> dict[int, tuple[Cue, ...]]:
        length_s = (now_us - self._since_us) / MICRO
        read = {
            track: self._cues.add(
                self._tallies.setdefault(track, Tally()), series, self._sound, length_s, self._pictures
            )
            for track, series in self._series.items()
        }
        self._series, self._sound, self._pictures = {}, SoundSeries(), 0
        self._enter(Phase.RESTING, now_us)
        return read


def full_rate_of(settings: Config, spoken_for: Iterable[str]) -> FullRate | None:
    """Return the bursts of a stream; None if no cue on record, or with a say (`spoken_for`), needs them.

    Deterministic runs have none: where a burst begins depends on how far decoding had got.
    """
    names = frozenset((*settings.cues.record, *spoken_for)) & frozenset(NAMES)
    return FullRate(_cues(names, settings.engines.cache_dir, settings.deterministic)) if names else None


def follower_of(settings: Config) -> Follower | None:
    """Return what looks at the pictures of bursts; None if no cue needs it, or what it needs is not there.

    Raises `UnmaskError` (WEIGHTS) for landmark networks that are there and broken.
    """
    names = wanted_cues(settings) & frozenset(NAMES)
    if not names or settings.deterministic:
        return None
    folder = _landmarks(settings.engines.cache_dir)
    against = why_no_landmarks(folder)
    if against:
        logger.warning("the cues %s are off: %s", ", ".join(sorted(names)), against)
        return None
    hearing = silero if LIPS in names and not why_no_voice() else None
    if LIPS in names and hearing is None:
        logger.warning("the cue %s is off: %s", LIPS, why_no_voice())
    try:
        return Follower(LandmarkModel(folder), hearing, MOTION in names, RATIOS in names)
    except LandmarksError as error:
        raise UnmaskError(Code.WEIGHTS, str(error)) from error


def _landmarks(cache: str) -> Path:
    return Path(cache).expanduser() / FOLDER


@lru_cache(maxsize=8)
def _cues(names: frozenset[str], cache: str, deterministic: bool) -> BurstCues:
    against = FIXED if deterministic else why_no_landmarks(_landmarks(cache))
    return BurstCues(names, against)
