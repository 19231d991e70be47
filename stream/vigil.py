"""Tells silence from what merely was not heard: a log that was away, records not read yet (DESIGN 3.9)."""

import logging

from stream.clock import Clock
from stream.errors import Code, UnmaskError
from stream.log import Readable, TopicPartition
from stream.metrics import Metrics
from stream.positions import Positions

logger = logging.getLogger(__name__)

ASK_S = 1.0
"""What the log said of a partition that is read to its end holds this long: many feeds may want to know."""


class Vigil:
    """Knows whether the log is away, and how far a partition was read. One thread."""

    def __init__(
        self, log: Readable, positions: Positions, orphan_s: float, clock: Clock, metrics: Metrics
    ) -> None:
        self._log = log
        self._positions = positions
        self._orphan_s = orphan_s
        self._clock = clock
        self._metrics = metrics
        self._away_since: float | None = None
        self._heard_from = clock.monotonic()
        self._asked: dict[TopicPartition, tuple[float, bool]] = {}

    @property
    def away(self) -> bool:
        """Whether the log did not answer when it was last asked."""
        return self._away_since is not None

    def note_away(self, error: UnmaskError) -> None:
        """Note that the log does not answer; feeds get their time again when it does."""
        self._heard_from = self._clock.monotonic()
        self._metrics.log_away.inc()
        if self._away_since is None:
            self._away_since = self._heard_from
            self._metrics.log_up.set(0)
            logger.warning("the log is away, waiting for it: %s", error)

    def note_back(self) -> None:
        """Note that the log answers."""
        self._metrics.log_up.set(1)
        if self._away_since is not None:
            self._heard_from = self._clock.monotonic()
            logger.warning("the log is back after %.1f s", self._heard_from - self._away_since)
            self._away_since = None

    def silent(self, partition: TopicPartition, heard: float) -> bool:
        """Return whether a stream of a partition is silent of which the newest record came at `heard`.

        That is after `orphan_s` in which the log was not away, with all of the partition read.
        """
        now = self._clock.monotonic()
        if self.away or now - max(heard, self._heard_from) < self._orphan_s:
            return False
        asked, ended = self._asked.get(partition, (0.0, False))
        if partition not in self._asked or now - asked >= (ASK_S if ended else self._orphan_s):
            ended = self._read_to_the_end(partition)
            self._asked[partition] = (now, ended)
        return ended

    def forget(self, partition: TopicPartition) -> None:
        self._asked.pop(partition, None)

    def _read_to_the_end(self, partition: TopicPartition) -> bool:
        try:
            return next(self._log.read(partition, self._positions.next_read(partition)), None) is None
        except UnmaskError as error:
            if error.code is Code.LOG_AWAY:
                self.note_away(error)
            return False
