"""Heavy members read feeds under suspicion, within a share of the device's time (DESIGN 3.8; SCIENCE A)."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from detectors.readings import FaceReading, Image
from stream.clock import Clock

logger = logging.getLogger(__name__)

PAUSE_S = 60.0
"""After a failure, before heavy members are tried again: what they lacked, memory say, may have come back."""


class Heavy(Protocol):
    """What is needed of `detectors.reader.FaceReader`."""

    def deepen(self, image: Image, faces: Sequence[FaceReading]) -> tuple[FaceReading, ...]:
        """Return the faces of a full-resolution picture with the heavy members' logits added and fused."""


class Outcome(StrEnum):
    """What became of a picture that heavy members were wanted for."""

    READ = "read"
    REFUSED = "refused"
    FAILED = "failed"


class Cascade:
    """Lets heavy members read. Used by the device thread; `pictures` may be read from any.

    After a picture that took s seconds the next is read no sooner than s / `share` after that one began, so
    that in any stretch of time they take their share and at most one picture more, evenly spread. Files are
    read whenever they are suspect: nobody waits for them. A failure costs nothing but itself.
    """

    def __init__(self, heavy: Heavy, share: float, clock: Clock) -> None:
        self._heavy = heavy
        self._share = share
        self._clock = clock
        self._next_at = -math.inf
        self._paused_until = -math.inf
        self.seconds = 0.0
        """Device time taken so far."""
        self.pictures = Counter(dict.fromkeys(Outcome, 0))

    def deepen(
        self, stream: str, image: Image, faces: tuple[FaceReading, ...], live: bool
    ) -> tuple[FaceReading, ...]:
        """Return the faces of a suspect picture, read more deeply if the budget allows it.

        A picture without a face good enough to be decided upon is passed over, and not counted.
        """
        if all(face.quality.reasons for face in faces):
            return faces
        begun = self._clock.monotonic()
        if begun < self._paused_until or (live and begun < self._next_at):
            self.pictures[Outcome.REFUSED] += 1
            return faces
        try:
            deeper = self._heavy.deepen(image, faces)
        except Exception as error:  # the cheap members' reading stands, whatever it was
            logger.warning("%s: heavy members failed, not asked for %g s: %s", stream, PAUSE_S, error)
            self._paused_until = begun + PAUSE_S
            self.pictures[Outcome.FAILED] += 1
            deeper = faces
        else:
            self.pictures[Outcome.READ] += 1
        spent = self._clock.monotonic() - begun
        self.seconds += spent
        self._next_at = begun + spent / self._share
        return deeper
