"""A decoder child: records in through a socket, pictures out through shared memory (DESIGN 3.9).

Up goes, in order: `Ready`, then for each record any number of `Picture` and one `Done`; `Ring` before the
first picture that lies in it; `Alive` while it waits. Down the same socket come `Job`s. A second pipe brings
what must not queue behind chunks: slots given back, a new sampling rate, a burst.

The pictures lie in an anonymous memory file (`memfd`) handed over by descriptor: it has no name to leak when
a process is killed, and no part in /dev/shm, which containers limit to 64 MiB.
"""

import ctypes
import mmap
import os
import resource
import select
import signal
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle

import cv2
import numpy as np

from detectors.readings import Image
from stream.decode import NO_BURST, Burst, Counts, DecodeSettings, StreamDecoder
from stream.errors import Code, UnmaskError
from stream.foreign import Place, read_headers
from stream.frames import Applied, Failed, ResumePoint, SampledFrame, Sound

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""

ALIVE_S = 0.5
"""A waiting child says so this often: well below any sensible `stall_s`."""

SIDE = struct.Struct("<Bd2I")
"""A message on the side pipe: kind, rate, generation of the ring, slot."""

RATE, RELEASE, BURST = 0, 1, 2
"""Kinds: a new sampling rate; a slot is free again; a burst at `fps` begins, or ends (0), with the sound if
`slot` is 1."""

SIDE_BYTES = SIDE.size * 1024
"""Read at once from the side pipe; whole messages, since writes below PIPE_BUF are atomic."""

ALIGN = 64
"""The reduced picture begins on a cache line of its own."""


@dataclass(frozen=True, slots=True)
class ChildSettings:
    """What a child is started with; `slots` pictures may be out at a time."""

    decode: DecodeSettings
    memory_limit_bytes: int
    slots: int
    resume: ResumePoint
    fps: float
    place: Place | None = None
    burst: Burst = NO_BURST


@dataclass(frozen=True, slots=True)
class Job:
    """One record, as read from the log."""

    offset: int
    key: str
    headers: Mapping[str, bytes]
    value: bytes


@dataclass(frozen=True, slots=True)
class Ready:
    """The child runs and takes jobs."""


@dataclass(frozen=True, slots=True)
class Alive:
    """The child waits for a slot."""


@dataclass(frozen=True, slots=True)
class Ring:
    """From now on pictures lie in a new memory file, whose descriptor follows."""

    generation: int
    slot_bytes: int
    slots: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A sampled frame in a slot: shapes are (height, width, 3); `small_at` bytes into the slot, None if the
    picture serves as its own reduction."""

    generation: int
    slot: int
    shape: tuple[int, int, int]
    small_shape: tuple[int, int, int]
    small_at: int | None
    frame: SampledFrame
    """Its pictures are empty and its release does nothing."""


@dataclass(frozen=True, slots=True)
class Done:
    """A record is applied or failed; `counts` since the `Done` before."""

    event: Applied | Failed
    counts: Counts


Message = Ready | Alive | Ring | Picture | Sound | Done

EMPTY: Image = np.empty((0, 0, 3), np.uint8)


def main(connection: Connection, side: Connection, settings: ChildSettings) -> None:
    """Run a decoder until the parent closes the socket or dies."""
    confine(settings.memory_limit_bytes)
    child = _Child(connection, side, settings)
    connection.send(Ready())
    while True:
        try:
            job = connection.recv()
        except (EOFError, ConnectionError):
            return
        child.apply(job)


def confine(memory_limit_bytes: int) -> None:
    """Let this process die with its parent, by SIGKILL only, or of wanting more memory than it may have."""
    # The parent stops children by SIGKILL; Ctrl-C and a supervisor's SIGTERM go to whole groups, and a child
    # that obeyed them would look like one that its chunk has killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:  # it died before we asked to be told
        os._exit(1)
    # Private memory only: address space counts libraries and the shared ring, which cost nothing.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_limit_bytes, memory_limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cv2.setNumThreads(1)


class _Child:
    def __init__(self, connection: Connection, side: Connection, settings: ChildSettings) -> None:
        self._connection = connection
        self._slots = SlotWriter(connection, side, settings.slots, settings.fps, settings.burst)
        self._decoder = StreamDecoder(
            settings.decode, settings.resume, self._slots.rate, settings.place, self._slots.wanted_burst
        )
        self._reported = Counts()

    def apply(self, job: Job) -> None:
        try:
            read = read_headers(job.key, job.headers)
        except UnmaskError as error:
            self._decoder.counts.records += 1
            self._decoder.counts.invalid += error.code is Code.CHUNK_INVALID
            self._done(Failed(job.offset, None, job.offset, error.code, str(error)))
            return
        for event in self._decoder.feed(job.offset, read, job.value):
            if isinstance(event, SampledFrame):
                self._connection.send(self._slots.put(event))
            elif isinstance(event, Sound):
                self._connection.send(event)
            else:
                self._done(event)

    def _done(self, event: Applied | Failed) -> None:
        counts = replace(self._decoder.counts)
        self._connection.send(Done(event, counts - self._reported))
        self._reported = counts


class SlotWriter:
    """The child's end of the ring: finds a free slot for each picture, waits while there is none.

    It waits as long as the parent lives: pictures are given back by whoever is last to need them, and a
    device that is behind is no fault of the decoder's. What piles up meanwhile is bounded by `queue_chunks`.
    """

    def __init__(
        self, connection: Connection, side: Connection, slots: int, fps: float, burst: Burst
    ) -> None:
        self._connection = connection
        self._side = side.fileno()
        self._side_owner = side
        os.set_blocking(self._side, False)
        self._count = slots
        self._fps = fps
        self._burst = burst
        self._generation = 0
        self._slot_bytes = 0
        self._memory: mmap.mmap | None = None
        self._free: list[int] = []

    def rate(self) -> float:
        """Return the sampling rate as it is now."""
        self._read_side()
        return self._fps

    def wanted_burst(self) -> Burst:
        """Return the burst as it was when the rate was last asked for: at every frame."""
        return self._burst

    def put(self, frame: SampledFrame) -> Picture:
        """Copy the pictures of a frame into a slot."""
        shared = frame.small is frame.image
        small_at = None if shared else -(-frame.image.nbytes // ALIGN) * ALIGN
        needed = frame.image.nbytes if small_at is None else small_at + frame.small.nbytes
        if needed > self._slot_bytes:
            self._grow(needed)
        slot = self._take()
        assert self._memory is not None
        start = slot * self._slot_bytes
        _copy(self._memory, start, frame.image)
        if small_at is not None:
            _copy(self._memory, start + small_at, frame.small)
        return Picture(
            generation=self._generation,
            slot=slot,
            shape=_shape(frame.image),
            small_shape=_shape(frame.small),
            small_at=small_at,
            frame=replace(frame, image=EMPTY, small=EMPTY),
        )

    def _grow(self, needed: int) -> None:
        """Go over to a ring of larger slots; the old one lives until its last picture is given back."""
        self._slot_bytes = -(-needed // mmap.PAGESIZE) * mmap.PAGESIZE
        self._generation += 1
        descriptor = memory_file(self._slot_bytes * self._count)
        self._memory = mmap.mmap(descriptor, self._slot_bytes * self._count)
        self._free = list(range(self._count))
        self._connection.send(Ring(self._generation, self._slot_bytes, self._count))
        send_handle(self._connection, descriptor, os.getpid())
        os.close(descriptor)

    def _take(self) -> int:
        self._read_side()
        while not self._free:
            ready, _, _ = select.select([self._side], [], [], ALIVE_S)
            if ready:
                self._read_side()
            else:
                self._connection.send(Alive())
        return self._free.pop()

    def _read_side(self) -> None:
        try:
            data = os.read(self._side, SIDE_BYTES)
        except BlockingIOError:
            return
        if not data:
            os._exit(0)  # the parent closed us, or is gone
        for kind, fps, generation, slot in SIDE.iter_unpack(data):
            if kind == RATE:
                self._fps = fps
            elif kind == BURST:
                self._burst = Burst(fps, bool(slot))
            elif generation == self._generation:
                self._free.append(slot)


def memory_file(size: int) -> int:
    """Return the descriptor of `size` zero bytes that live in memory and have no name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("unmask-frames", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        return descriptor
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return os.dup(file.fileno())


def _copy(memory: mmap.mmap, start: int, image: Image) -> None:
    target = np.frombuffer(memory, np.uint8, image.nbytes, start)
    np.copyto(target.reshape(image.shape), image)


def _shape(image: Image) -> tuple[int, int, int]:
    height, width, channels = image.shape
    return height, width, channels
