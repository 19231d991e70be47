"""Watches the topics as they grow, as a consumer of the real thing would: when is what there?"""

import json
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from kafka import errors

from tests.chaos.feeds import shown_at
from tests.chaos.topics import consumer, partitions_of

POLL_MS = 100
OFF_S = 30.0
"""A time in a record that is wrong by more than this was written by a clock that had been stepped."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A score became visible to read-committed consumers. Unix times."""

    at: float
    shown: float
    """When the feed had shown the picture."""


class Observer:
    """One thread, one consumer. `origin`: that of the live feeds; `live`: their streams."""

    def __init__(self, servers: str, prefix: str, origin: float, live: frozenset[str]) -> None:
        self._origin = origin
        self._live = live
        self._scores, self._media, self._state = (f"{prefix}.{name}" for name in ("scores", "media", "state"))
        self._reader = consumer(servers)
        topics = (self._scores, self._media, self._state)
        self._reader.assign([place for topic in topics for place in partitions_of(self._reader, topic)])
        self._reader.seek_to_beginning()
        self._arrivals: dict[str, list[Arrival]] = defaultdict(list)
        self.newest: dict[int, int] = {}
        """Offset of the newest record in each partition of media."""
        self.ended: set[str] = set()
        """Streams whose newest record in media is an `end`."""
        self.told_off = 0
        """Chunks and states whose writer's clock was far off."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._reader.close(autocommit=False)

    def arrivals(self, stream: str) -> list[Arrival]:
        return list(self._arrivals[stream])

    def recovery(self, stream: str, fault_at: float) -> float | None:
        """Return how long after a fault a picture shown after it was scored; None: not yet."""
        found = self.arrivals(stream)
        for arrival in found[bisect_left(found, fault_at, key=lambda arrival: arrival.at) :]:
            if arrival.shown > fault_at:
                return arrival.at - fault_at
        return None

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                found = self._reader.poll(timeout_ms=POLL_MS)
            except errors.KafkaError:
                time.sleep(POLL_MS / 1000)
                continue
            now = time.time()
            for place, records in found.items():
                for record in records:
                    self._note(place.topic, record, now)

    def _note(self, topic: str, record: Any, now: float) -> None:
        stream = (record.key or b"").decode()
        if topic == self._scores:
            self._score(stream, record, now)
        elif topic == self._state:
            self.told_off += abs(record.timestamp / 1000 - now) > OFF_S
        else:
            self._chunk(stream, record, now)

    def _chunk(self, stream: str, record: Any, now: float) -> None:
        self.newest[record.partition] = record.offset
        headers = dict(record.headers)
        if headers.get("control") == b"end":
            self.ended.add(stream)
        else:
            self.ended.discard(stream)
        if stream in self._live:
            self.told_off += abs(int(headers["capture_time"]) / 1e6 - now) > OFF_S

    def _score(self, stream: str, record: Any, now: float) -> None:
        body = json.loads(record.value)
        if body["type"] == "frame" and stream in self._live:
            self._arrivals[stream].append(Arrival(now, shown_at(body["pts"], self._origin)))
