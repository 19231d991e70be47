"""Which streams are listed in the topic `sources`, followed record by record (DESIGN 3.9)."""

import math
from collections.abc import Iterator
from typing import Any

from stream.clock import Clock
from stream.log import Readable, TopicPartition
from stream.records import fields_of

STRANGER_S = 1.0
"""A stream found to be unlisted is not looked for again within this: strangers' records cost no more than one
look a second."""
STRANGERS = 1024
"""Strangers remembered; beyond, all are forgotten and looked for anew."""

MAX_FPS = 60
"""As the settings of sampling allow."""


class Listed:
    """The topic as far as it was read. Positions of it mean nothing to others: each reader reads it whole."""

    def __init__(self, log: Readable, topic: str, clock: Clock) -> None:
        self._log = log
        self._topic = topic
        self._clock = clock
        self._next: dict[TopicPartition, int] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._strangers: dict[str, float] = {}
        self.version = 0
        """Changes with the list."""
        self.read_at = -math.inf
        """When it was read last, on the monotonic clock."""

    def __contains__(self, stream: str) -> bool:
        return stream in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def read(self) -> None:
        """Read what is new. Raises `UnmaskError` as the log does; what was read until then counts."""
        self.read_at = self._clock.monotonic()
        for number in range(self._log.partitions(self._topic)):
            partition = TopicPartition(self._topic, number)
            end = self._log.end_offset(partition)
            start = self._next.get(partition)
            if start is None:
                start = self._log.begin_offset(partition)
            if start < end:
                self._follow(partition, start, end)
            self._next[partition] = end

    def look_for(self, stream: str) -> bool:
        """Return whether a stream is listed, after a new look at the topic if it was not. Raises like it."""
        now = self._clock.monotonic()
        if stream in self or now - self._strangers.get(stream, -math.inf) < STRANGER_S:
            return stream in self
        self.read()
        if stream not in self:
            if len(self._strangers) >= STRANGERS:
                self._strangers.clear()
            self._strangers[stream] = now
        return stream in self

    def fps(self, stream: str) -> float | None:
        """Return the sampling rate that the stream's entry asks for, None if it does not."""
        fps = self._entries.get(stream, {}).get("fps")
        return float(fps) if isinstance(fps, int | float) and 0 < fps <= MAX_FPS else None

    def labels(self, stream: str) -> dict[str, str]:
        """Return the labels that the stream's entry gives it, none if it is not listed."""
        labels = self._entries.get(stream, {}).get("labels")
        return labels if isinstance(labels, dict) else {}

    def _follow(self, partition: TopicPartition, start: int, end: int) -> None:
        for record in self._log.read(partition, start, end):
            self.version += 1
            if record.value is None:
                self._entries.pop(record.key, None)
            else:
                # One that cannot be read lists its stream and says no more; ingest tells of it.
                self._entries[record.key] = fields_of(record.value)
