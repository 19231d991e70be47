"""The life of one feed as a state machine, judged from outside of the reader (DESIGN 3.9, FIELD 2).

A reader may block for ever, be restarted by audio, or be told that all is well while nothing comes. So
nothing it says is believed but one thing: when the last picture was received. Whoever owns the feed calls
`check` several times a second and does what it returns.
"""

from collections.abc import Mapping
from enum import StrEnum

from stream.backoff import Backoff
from stream.clock import Clock
from stream.config import Ingest
from stream.controls import FeedPhase
from stream.errors import Code, UnmaskError

LEGAL: Mapping[FeedPhase, frozenset[FeedPhase]] = {
    FeedPhase.CONNECTING: frozenset(
        {FeedPhase.LIVE, FeedPhase.SILENT, FeedPhase.BACKOFF, FeedPhase.ENDED, FeedPhase.STOPPED}
    ),
    FeedPhase.LIVE: frozenset({FeedPhase.SILENT, FeedPhase.BACKOFF, FeedPhase.ENDED, FeedPhase.STOPPED}),
    FeedPhase.SILENT: frozenset({FeedPhase.LIVE, FeedPhase.BACKOFF, FeedPhase.ENDED, FeedPhase.STOPPED}),
    FeedPhase.BACKOFF: frozenset({FeedPhase.CONNECTING, FeedPhase.STOPPED}),
    FeedPhase.ENDED: frozenset(),
    FeedPhase.STOPPED: frozenset(),
}

OVER = frozenset({FeedPhase.ENDED, FeedPhase.STOPPED})

NOTICE_SHARE = 0.9
"""Share of `silence_s` after which silence is noticed: the rest is for saying so in time."""


class Loss(StrEnum):
    """What becomes of a feed whose reader is lost."""

    REATTACH = "reattach"
    """Live sources: again, for ever."""
    WAIT = "wait"
    """stdin: there is only one; silence is told, but the reader stays. Its end is the end."""
    END = "end"
    """Files: reading on after a fault would skip or repeat."""


class Step(StrEnum):
    """What the owner of the feed is to do now."""

    NOTHING = "nothing"
    ATTACH = "attach"
    """Start a reader."""
    ABANDON = "abandon"
    """Believe nothing the reader says from now on; `error` says why."""


class Watchdog:
    """State machine of one feed on an injected clock. Begins in CONNECTING, its first reader starting."""

    def __init__(self, name: str, settings: Ingest, loss: Loss, backoff: Backoff, clock: Clock) -> None:
        self.phase = FeedPhase.CONNECTING
        self.error: UnmaskError | None = None
        """Why the feed is not live; None while nothing is known against it."""
        self._name = name
        self._settings = settings
        self._loss = loss
        self._backoff = backoff
        self._clock = clock
        self._since = clock.monotonic()
        self._seen: float | None = None
        self._retry_at = 0.0

    @property
    def alive(self) -> bool:
        """Whether pictures come."""
        return self.phase is FeedPhase.LIVE

    def learned(self, loss: Loss) -> None:
        """Take in what attaching has shown of the source: a recording behind HTTP has an end."""
        self._loss = loss

    def picture(self) -> None:
        """A picture was received."""
        self._seen = self._clock.monotonic()
        if self.phase is not FeedPhase.LIVE:
            self._to(FeedPhase.LIVE)
            self.error = None

    def excuse(self) -> None:
        """That nothing came is our own doing (no room to put it): do not hold it against the source."""
        now = self._clock.monotonic()
        self._since = max(self._since, now) if self._seen is None else self._since
        self._seen = now if self._seen is not None else None

    def lost(self, error: UnmaskError) -> None:
        """The reader gave up with `error`."""
        self.error = error
        if self._loss is not Loss.REATTACH:
            self._to(FeedPhase.ENDED)
            return
        if self._stable():
            self._backoff.reset()
        self._retry_at = self._clock.monotonic() + self._backoff.wait_s()
        self._to(FeedPhase.BACKOFF)

    def finished(self) -> None:
        """The source came to its real end."""
        self.error = None
        self._to(FeedPhase.ENDED)

    def stop(self) -> None:
        if self.phase not in OVER:
            self._to(FeedPhase.STOPPED)

    def check(self) -> Step:
        """Judge the feed at this moment; return what to do, having changed the phase accordingly."""
        if self.phase is FeedPhase.BACKOFF:
            return self._retry()
        late = self._late()
        if late is None:
            return Step.NOTHING
        self.error = late
        self._to(FeedPhase.SILENT)
        if self._loss is Loss.WAIT:
            return Step.NOTHING
        self.lost(late)
        return Step.ABANDON

    def _retry(self) -> Step:
        if self._clock.monotonic() < self._retry_at:
            return Step.NOTHING
        self._to(FeedPhase.CONNECTING)
        self._seen = None
        return Step.ATTACH

    def _late(self) -> UnmaskError | None:
        """Return what is to be held against the reader, if anything."""
        now = self._clock.monotonic()
        if self.phase is FeedPhase.CONNECTING:
            waited, bound = now - self._since, self._settings.first_frame_s
            if waited < bound:
                return None
            return UnmaskError(
                Code.SOURCE_TIMEOUT, f"source {self._name} showed no picture for {waited:.1f} s"
            )
        if self.phase is FeedPhase.LIVE and self._seen is not None:
            silent, bound = now - self._seen, self._settings.silence_s
            if silent >= bound * NOTICE_SHARE:
                return UnmaskError(
                    Code.SOURCE_SILENT, f"source {self._name} sends no video for {silent:.1f} s"
                )
        return None

    def _stable(self) -> bool:
        """Whether the feed was live long enough for its loss to count as a new one."""
        live = self.phase in (FeedPhase.LIVE, FeedPhase.SILENT)
        return live and self._clock.monotonic() - self._since >= self._settings.silence_s

    def _to(self, phase: FeedPhase) -> None:
        if phase not in LEGAL[self.phase]:
            raise ValueError(f"source {self._name}: {self.phase} does not lead to {phase}")
        if not (self.phase is FeedPhase.LIVE and phase is FeedPhase.SILENT):
            # Silence is judged as the end of the live time it follows.
            self._since = self._clock.monotonic()
        self.phase = phase
