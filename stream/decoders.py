"""The decoders of a worker: one child process per stream, fed in order, watched and replaced (DESIGN 3.9).

Everything of a stream happens in the order of its records. What is queued is bounded: `queue_chunks` records
per stream (owner: the pool; `submit` refuses more, and the worker pauses the partition) and `slots` pictures
(owner: whoever holds the `SampledFrame`; the child waits while none is free). `poll` never waits for either.

A child that dies, or says nothing for `stall_s` while it has work, is killed. The record it was at is tried
once more, alone, in a fresh child that first decodes again what lies between `decode_from` and it; if that
child fails too, the record is `Failed` and the stream goes on at the next clean keyframe.
"""

import atexit
import logging
import mmap
import multiprocessing
import os
import queue
import sys
import threading
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle
from typing import Any

import numpy as np

from detectors.readings import Image
from stream import decoder_child
from stream.clock import Clock, Deadline
from stream.config import Decode
from stream.decode import NO_BURST, Burst, Counts, DecodeSettings
from stream.decoder_child import (
    BURST,
    RATE,
    RELEASE,
    SIDE,
    Alive,
    ChildSettings,
    Done,
    Job,
    Message,
    Picture,
    Ready,
    Ring,
)
from stream.errors import Code, UnmaskError
from stream.foreign import Place, Places, Segment, read_headers
from stream.frames import Applied, DecoderEvent, Failed, ResumePoint, SampledFrame, Sound, Use
from stream.records import ChunkMeta, Record

logger = logging.getLogger(__name__)

START_S = 60.0
"""What a child gets to start: importing FFmpeg takes a second, on a machine in trouble much longer."""

KEPT_BYTES = 64 * 1024 * 1024
"""Records kept per stream to feed a fresh child from `decode_from` on: 100 s at 5 Mbit/s. Beyond it they are
given up, and a fresh child waits for a keyframe."""

MESSAGES_A_TURN = 64
"""Messages taken from one child before the next has its turn."""

JOIN_S = 2.0
"""What a killed process gets to disappear; one stuck in the kernel is left behind."""


class ChildState(StrEnum):
    """How the pool stands with the child of a stream.

    Legal: IDLE -> RUNNING (a record came), RUNNING -> RETRYING (it failed at a record), RETRYING -> RUNNING
    (the record passed), RETRYING -> IDLE (it failed again), RUNNING -> IDLE (it died without work), and any
    -> CLOSED.
    """

    IDLE = "idle"
    RUNNING = "running"
    RETRYING = "retrying"
    CLOSED = "closed"


LEGAL: dict[ChildState, frozenset[ChildState]] = {
    ChildState.IDLE: frozenset({ChildState.RUNNING, ChildState.CLOSED}),
    ChildState.RUNNING: frozenset({ChildState.RETRYING, ChildState.IDLE, ChildState.CLOSED}),
    ChildState.RETRYING: frozenset({ChildState.RUNNING, ChildState.IDLE, ChildState.CLOSED}),
    ChildState.CLOSED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counters since the pool was made; `streams`, `children`, `queued`, `kept_bytes` as they are now.

    `died`, `stalled` children; `retried` records; `failed` records given up after their second try;
    `forgotten`: times that the records since a keyframe outgrew their bound. `decode` sums over streams.
    """

    streams: int
    children: int
    queued: int
    kept_bytes: int
    started: int
    died: int
    stalled: int
    retried: int
    failed: int
    forgotten: int
    decode: Counts


@dataclass(slots=True)
class _Totals:
    started: int = 0
    died: int = 0
    stalled: int = 0
    retried: int = 0
    failed: int = 0
    forgotten: int = 0
    decode: Counts = field(default_factory=Counts)


class DecoderPool:
    """Decodes any number of streams. Used by one thread; frames may be released from any."""

    def __init__(self, decode: Decode, clock: Clock) -> None:
        self.config = decode
        self.clock = clock
        self.totals = _Totals()
        self._streams: dict[str, _Stream] = {}
        self._context = multiprocessing.get_context("forkserver")
        # Children are forked from a server that has these modules already: no start-up, and shared pages.
        self._context.set_forkserver_preload([decoder_child.__name__])

    def open(self, stream: str, resume: ResumePoint, fps: float, place: Place | None = None) -> None:
        """Take up a stream at `resume`, sampled `fps` times a second. Raises ValueError if it is open.

        `place`: where a stream of another producer stands before the first record that will be submitted.
        """
        if stream in self._streams:
            raise ValueError(f"stream {stream} is open already; close it first")
        self._streams[stream] = _Stream(self, stream, resume, fps, place)

    def submit(self, record: Record) -> bool:
        """Queue the next record of an open stream; False if its queue is full: then submit it again later.

        Raises ValueError if the stream is not open, or the offset not above the last one submitted.
        """
        return self._stream(record.key).submit(record)

    def set_fps(self, stream: str, fps: float) -> None:
        """Sample a stream `fps` times a second from the next decoded frame on."""
        self._stream(stream).set_fps(fps)

    def set_burst(self, stream: str, burst: Burst) -> None:
        """Begin or end a burst at full rate with the next decoded frame."""
        self._stream(stream).set_burst(burst)

    def poll(self, timeout: float) -> list[DecoderEvent]:
        """Return what the decoders have to say, in order per stream; nothing after `timeout` seconds.

        Also finds children that died or hang, so call it often, whether or not there is room for frames.
        """
        sockets = {s.child.connection: s for s in self._streams.values() if s.child is not None}
        events: list[DecoderEvent] = []
        for connection in wait(list(sockets), timeout):
            sockets[connection].read(events)
        for stream in self._streams.values():
            stream.check(events)
        return events

    def close(self, stream: str) -> None:
        """Forget a stream and what is queued. Frames that are out stay valid; unknown streams are ignored."""
        found = self._streams.pop(stream, None)
        if found is not None:
            found.close(JOIN_S)

    def shutdown(self, deadline: Deadline) -> None:
        """Close all streams within `deadline`: every kill goes out before the first process is waited for."""
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            if stream.child is not None:
                stream.child.process.kill()
        for stream in streams:
            stream.close(deadline.left())

    def stats(self) -> PoolStats:
        streams = self._streams.values()
        totals = self.totals
        return PoolStats(
            streams=len(streams),
            children=sum(stream.child is not None for stream in streams),
            queued=sum(stream.queued() for stream in streams),
            kept_bytes=sum(stream.kept.size for stream in streams),
            started=totals.started,
            died=totals.died,
            stalled=totals.stalled,
            retried=totals.retried,
            failed=totals.failed,
            forgotten=totals.forgotten,
            decode=replace(totals.decode),
        )

    def start(self, settings: ChildSettings, name: str) -> "_Child":
        """Start a child for a stream of this pool."""
        self.totals.started += 1
        return _Child(self._context, settings, name)

    def _stream(self, stream: str) -> "_Stream":
        if stream not in self._streams:
            raise ValueError(f"stream {stream} is not open")
        return self._streams[stream]


class _Kept:
    """The applied records from `decode_from` on, while they are small enough to keep."""

    def __init__(self) -> None:
        self.records: deque[Record] = deque()
        self.size = 0

    def add(self, record: Record, decode_from: int) -> bool:
        """Return False if the records had to be given up."""
        self.records.append(record)
        self.size += _size(record)
        while self.records and self.records[0].offset < decode_from:
            self.size -= _size(self.records.popleft())
        if self.size <= KEPT_BYTES:
            return True
        self.clear()
        return False

    def clear(self) -> None:
        self.records.clear()
        self.size = 0


class _Stream:
    """One stream of the pool."""

    def __init__(
        self, pool: DecoderPool, name: str, resume: ResumePoint, fps: float, place: Place | None
    ) -> None:
        self._pool = pool
        self._places = Places(place, place)
        self._name = name
        self._resume = resume
        self._fps = fps
        self._burst = NO_BURST
        self._state = ChildState.IDLE
        self._sent: deque[Record] = deque()
        self._waiting: deque[Record] = deque()
        self._submitted = -1
        self._done = -1
        self._decode_from: int | None = None
        self._heard = pool.clock.monotonic()
        self._early = 0
        self.kept = _Kept()
        self.child: _Child | None = None

    def queued(self) -> int:
        return len(self._sent) + len(self._waiting)

    def submit(self, record: Record) -> bool:
        if record.offset <= self._submitted:
            raise ValueError(f"{self._name}: record {record.offset} comes after record {self._submitted}")
        if self.queued() >= self._pool.config.queue_chunks:
            return False
        self._submitted = record.offset
        self._waiting.append(record)
        self._advance()
        return True

    def set_fps(self, fps: float) -> None:
        if fps == self._fps:
            return
        self._fps = fps
        if self.child is not None:
            self.child.side.tell(RATE, fps)

    def set_burst(self, burst: Burst) -> None:
        if burst == self._burst:
            return
        self._burst = burst
        if self.child is not None:
            self.child.side.tell(BURST, burst.fps, slot=int(burst.sound))

    def close(self, timeout: float) -> None:
        self._enter(ChildState.CLOSED)
        self._drop_child(timeout)
        self.kept.clear()

    def read(self, events: list[DecoderEvent]) -> None:
        """Take messages from the child, at most a turn's worth; notice its death."""
        assert self.child is not None
        connection = self.child.connection
        try:
            for _ in range(MESSAGES_A_TURN):
                if not connection.poll(0):
                    return
                self._take(connection.recv(), events)
        except (EOFError, OSError):
            self._pool.totals.died += 1
            self._lost(Code.DECODER_DIED, events)

    def check(self, events: list[DecoderEvent]) -> None:
        """Kill a child that has work and says nothing. Call after `read`."""
        if self.child is None or not self._sent:
            return
        bound = self._pool.config.stall_s if self.child.ready else START_S
        if self._pool.clock.monotonic() - self._heard <= bound or self.child.connection.poll(0):
            return
        self._pool.totals.stalled += 1
        self._lost(Code.DECODER_STALLED, events)

    def _enter(self, state: ChildState) -> None:
        if state not in LEGAL[self._state]:
            raise RuntimeError(f"{self._name}: a child cannot go from {self._state} to {state}")
        self._state = state

    def _advance(self) -> None:
        """Send what waits, unless a record has to be alone."""
        if not self._waiting or self._state is ChildState.RETRYING:
            return
        if self._state is ChildState.IDLE:
            self._start()
            self._enter(ChildState.RUNNING)
        while self._waiting:
            self._send(self._waiting.popleft())

    def _start(self) -> None:
        """Start a fresh child and feed it what it needs before the next record."""
        config = self._pool.config
        settings = ChildSettings(
            DecodeSettings.of(config),
            config.memory_limit_bytes,
            config.slots,
            self._resume,
            self._fps,
            self._places.at if self.kept.records else self._places.now,
            self._burst,
        )
        self.child = self._pool.start(settings, self._name)
        self._heard = self._pool.clock.monotonic()
        for record in self.kept.records:
            self.child.send(record)

    def _send(self, record: Record) -> None:
        assert self.child is not None
        if not self._sent:
            self._heard = self._pool.clock.monotonic()
        self._sent.append(record)
        self.child.send(record)

    def _take(self, message: Message, events: list[DecoderEvent]) -> None:
        assert self.child is not None
        self._heard = self._pool.clock.monotonic()
        match message:
            case Ready():
                self.child.ready = True
            case Alive():
                pass
            case Ring():
                self.child.map(message)
            case Picture():
                frame = self.child.frame(message)
                ordinary = frame.use is not Use.FOLLOWED
                sample_us = frame.media_us if ordinary else self._resume.last_sample_us
                self._resume = ResumePoint(frame.meta.attachment, frame.meta.epoch, frame.pts, sample_us)
                self._early += ordinary
                events.append(frame)
            case Sound():
                events.append(message)
            case Done():
                self._finished(message, events)

    def _finished(self, done: Done, events: list[DecoderEvent]) -> None:
        event = done.event
        if event.offset <= self._done:
            return  # decoded again for a fresh child: told and counted before
        record = self._sent.popleft()
        self._done = event.offset
        self._decode_from = event.decode_from
        self._places = event.places or self._places
        totals = self._pool.totals
        totals.decode += done.counts
        if not self.kept.add(record, event.decode_from):
            totals.forgotten += 1
        if isinstance(event, Applied):
            meta = event.meta
            self._resume = replace(
                self._resume, attachment=meta.attachment, epoch=meta.epoch, last_pts=event.last_pts
            )
            if event.sampled < self._early:
                # Some were sampled by a child that died before it could report them.
                missing = self._early - event.sampled
                event = replace(event, sampled=self._early, decoded=event.decoded + missing)
            self._early = 0
        events.append(event)
        if self._state is ChildState.RETRYING:
            self._enter(ChildState.RUNNING)
            self._advance()

    def _lost(self, code: Code, events: list[DecoderEvent]) -> None:
        """The child is gone or hangs: try its record once more alone, or give the record up."""
        self._drop_child(JOIN_S)
        if not self._sent:
            self._enter(ChildState.IDLE)
            return
        suspect = self._sent.popleft()
        self._waiting.extendleft(reversed(self._sent))
        self._sent.clear()
        if self._state is ChildState.RUNNING:
            logger.warning("%s: %s at record %d; trying it once more", self._name, code, suspect.offset)
            self._pool.totals.retried += 1
            self._enter(ChildState.RETRYING)
            self._start()
            self._send(suspect)
            return
        logger.error("%s: %s again at record %d; given up", self._name, code, suspect.offset)
        self._pool.totals.failed += 1
        self._done = suspect.offset
        events.append(self._given_up(suspect, code))
        self._early = 0
        self.kept.clear()
        self._enter(ChildState.IDLE)
        self._advance()

    def _given_up(self, record: Record, code: Code) -> Applied | Failed:
        """Return what becomes of a record that failed twice; a control record is applied all the same.

        It needs no decoder, and without its `end` a stream would never be over.
        """
        meta = self._meta(record)
        if meta is None or meta.control is None:
            return self._failed(record, code)
        decode_from = record.offset if self._decode_from is None else self._decode_from
        last_pts = self._resume.last_pts if self._is_at(meta) else None
        return Applied(
            record.offset, meta, record.value or b"", decode_from, last_pts, self._early, self._early, 0
        )

    def _meta(self, record: Record) -> ChunkMeta | None:
        try:
            read = read_headers(record.key, record.headers)
        except UnmaskError:
            return None
        if isinstance(read, Segment):
            return read.bare(self._resume.attachment, self._resume.epoch or 0)
        return read

    def _is_at(self, meta: ChunkMeta) -> bool:
        return (meta.attachment, meta.epoch) == (self._resume.attachment, self._resume.epoch)

    def _failed(self, record: Record, code: Code) -> Failed:
        what = "killed its decoder" if code is Code.DECODER_DIED else "stalled its decoder"
        decode_from = self._decode_from
        if decode_from is None:
            decode_from = record.offset
        sentence = f"record {record.offset} {what} twice"
        places = self._places if self._places.now else None
        return Failed(record.offset, self._meta(record), decode_from, code, sentence, places)

    def _drop_child(self, timeout: float) -> None:
        child, self.child = self.child, None
        if child is not None:
            child.kill(timeout)


class _Child:
    """One child process and the parent's ends of its channels."""

    def __init__(self, context: Any, settings: ChildSettings, name: str) -> None:
        self.ready = False
        self.connection, far = context.Pipe()
        reader, writer = context.Pipe(duplex=False)
        self.side = _Side(writer)
        self._rings: dict[int, tuple[mmap.mmap, int]] = {}
        self.process = context.Process(
            target=decoder_child.main, args=(far, reader, settings), name=f"unmask-decode-{name}", daemon=True
        )
        with no_main_module():
            self.process.start()
        # Children ignore SIGTERM, by which multiprocessing would end them, and wait for, at exit.
        atexit.register(self.process.kill)
        far.close()
        reader.close()
        self._outbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._run, name=f"unmask-feed-{name}", daemon=True)
        self._sender.start()

    def send(self, record: Record) -> None:
        self._outbox.put(Job(record.offset, record.key, dict(record.headers), record.value or b""))

    def map(self, ring: Ring) -> None:
        descriptor = recv_handle(self.connection)
        try:
            memory = mmap.mmap(descriptor, ring.slot_bytes * ring.slots)
        finally:
            os.close(descriptor)
        # Frames keep the memory of older rings alive for as long as they need it.
        self._rings = {ring.generation: (memory, ring.slot_bytes)}

    def frame(self, picture: Picture) -> SampledFrame:
        """Return the frame with views into the ring."""
        memory, slot_bytes = self._rings[picture.generation]
        start = picture.slot * slot_bytes
        image = _view(memory, start, picture.shape)
        small = image
        if picture.small_at is not None:
            small = _view(memory, start + picture.small_at, picture.small_shape)
        release = _Release(self.side, picture.generation, picture.slot)
        return replace(picture.frame, image=image, small=small, release=release)

    def kill(self, timeout: float) -> None:
        """End the process. What it had sent and we had not read is lost: it will be decoded again."""
        self.process.kill()
        atexit.unregister(self.process.kill)
        self._outbox.put(None)
        self.process.join(timeout)
        self._sender.join(timeout)
        self.side.close()
        if not self._sender.is_alive():  # else it still writes to the socket, whose number must stay taken
            self.connection.close()

    def _run(self) -> None:
        """Write jobs to the socket: a child that does not read blocks this thread and nobody else."""
        while (job := self._outbox.get()) is not None:
            try:
                self.connection.send(job)
            except OSError:
                return


class _Side:
    """The parent's end of the side pipe. Frames outlive their child, so it is told things after its end."""

    def __init__(self, writer: Connection) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        os.set_blocking(writer.fileno(), False)

    def tell(self, kind: int, fps: float = 0.0, generation: int = 0, slot: int = 0) -> None:
        with self._lock:
            if self._writer.closed:
                return
            try:
                os.write(self._writer.fileno(), SIDE.pack(kind, fps, generation, slot))
            except OSError:
                return  # gone, or so long asleep that the pipe is full: it will be replaced

    def close(self) -> None:
        with self._lock:
            self._writer.close()


class _Release:
    """Gives a slot back, once."""

    __slots__ = ("_generation", "_side", "_slot")

    def __init__(self, side: _Side, generation: int, slot: int) -> None:
        self._side: _Side | None = side
        self._generation = generation
        self._slot = slot

    def __call__(self) -> None:
        side, self._side = self._side, None
        if side is not None:
            side.tell(RELEASE, generation=self._generation, slot=self._slot)


_MAIN = threading.Lock()
"""Decoders and clips start their children in threads of their own."""


@contextmanager
def no_main_module() -> Iterator[None]:
    """Start a process that does not import our main module again: it would bring torch into every child."""
    with _MAIN:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _view(memory: mmap.mmap, start: int, shape: tuple[int, int, int]) -> Image:
    flat: Image = np.frombuffer(memory, np.uint8, shape[0] * shape[1] * shape[2], start)
    return flat.reshape(shape)


def _size(record: Record) -> int:
    return len(record.value or b"")
