"""Cuts clips beside the worker's loop: reading the log and the child that cuts take seconds (DESIGN 3.6)."""

import threading
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from stream.clip_child import clip_job, cut_apart
from stream.clips import Clip
from stream.clock import Clock
from stream.config import Decode
from stream.incidents import ClipRequest
from stream.log import PositionError, Readable, TopicPartition
from stream.pulse import LOG_CALL_S
from stream.records import Record

QUEUE_CLIPS = 8
"""Clips asked for and not taken back, each of up to tens of megabytes; who finds no room asks again."""

Owner = TypeVar("Owner")
"""Whose the clip is. Answers carry it back, so that one that comes after its owner went reaches nobody."""


@dataclass(frozen=True, slots=True)
class _Job(Generic[Owner]):
    owner: Owner
    partition: TopicPartition
    request: ClipRequest
    start: int


@dataclass(frozen=True, slots=True)
class Cut(Generic[Owner]):
    """The answer to a request: the clip, or why there is none."""

    owner: Owner
    request: ClipRequest
    found: Clip | Exception


class Clipper(Generic[Owner]):
    """Owner of a queue and of the one thread that works it off, begun with the first clip.

    `log` is read in that thread: the log itself, none that tells a loop's pulse. All methods are for one
    thread, but for `stuck`, and none but `stop` waits.
    """

    def __init__(self, log: Readable, settings: Decode, clock: Clock) -> None:
        self._log = log
        self._settings = settings
        self._clock = clock
        self._jobs: deque[_Job[Owner]] = deque()
        self._done: list[Cut[Owner]] = []
        self._running = self._stopped = False
        self._changed = threading.Condition()
        self._moved = clock.monotonic()
        self._thread: threading.Thread | None = None

    def ask(self, owner: Owner, partition: TopicPartition, request: ClipRequest) -> bool:
        """Queue a request, of which `from_offset` is known; False, with nothing done, if there is no room."""
        assert request.from_offset is not None, "there is nothing to cut"
        with self._changed:
            if len(self._jobs) + len(self._done) + self._running >= QUEUE_CLIPS:
                return False
            if not self._jobs and not self._running:
                self._moved = self._clock.monotonic()
            self._jobs.append(_Job(owner, partition, request, request.from_offset))
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="unmask-clips", daemon=True)
            self._thread.start()
        return True

    def take(self) -> list[Cut[Owner]]:
        """Return what is answered, in order."""
        with self._changed:
            done, self._done = self._done, []
        return done

    def busy(self) -> bool:
        """Return whether anything was asked that is not taken back yet."""
        with self._changed:
            return bool(self._jobs or self._done or self._running)

    def forget(self, partitions: Collection[TopicPartition]) -> None:
        """Cut nothing more of `partitions`; a clip that is being cut is finished."""
        with self._changed:
            self._jobs = deque(job for job in self._jobs if job.partition not in partitions)

    def stuck(self) -> bool:
        """Return whether there is work and none of it went on for longer than any step of it may take."""
        with self._changed:
            still_s = self._clock.monotonic() - self._moved
            return bool(self._jobs or self._running) and still_s > LOG_CALL_S + self._settings.stall_s

    def stop(self, timeout: float) -> None:
        """End the thread, after the clip that is being cut if that takes no more than `timeout` seconds."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            found = self._cut(job)
            with self._changed:
                self._running = False
                self._done.append(Cut(job.owner, job.request, found))
                self._moved = self._clock.monotonic()

    def _next(self) -> _Job[Owner] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._stopped)
            if self._stopped:
                return None
            self._running = True
            return self._jobs.popleft()

    def _cut(self, job: _Job[Owner]) -> Clip | Exception:
        request = job.request
        try:
            cutting = clip_job(
                request.stream,
                self._read(job),
                from_us=request.from_us,
                first_us=request.first_us,
                last_us=request.last_us,
                peak_us=request.peak_us,
            )
            return cut_apart(cutting, self._settings.memory_limit_bytes, self._settings.stall_s)
        except Exception as error:  # the next clip must be cut whatever became of this one
            return error

    def _read(self, job: _Job[Owner]) -> Iterator[Record]:
        request = job.request
        for record in readable(self._log, job.partition, job.start, request.to_offset):
            self._moved = self._clock.monotonic()
            if record.key == request.stream:
                yield record


def readable(log: Readable, partition: TopicPartition, start: int, stop: int) -> Iterator[Record]:
    """Yield the records from `start` (inclusive) to `stop` (exclusive) that the log still holds undamaged.

    Raises `UnmaskError` (LOG_AWAY, LOG_UNUSABLE), and (LOG_POSITION) if the log ends before `start`.
    """
    position = max(start, log.begin_offset(partition))
    while position < stop:
        try:
            for record in log.read(partition, position, stop):
                position = record.offset + 1
                yield record
        except PositionError as error:
            if error.resume_at <= position:
                raise
            position = error.resume_at
        else:
            return
