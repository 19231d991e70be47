"""Clips cut in a process of their own: chunks are strangers' bytes, and what reads them may die of them.

A demuxer that kills a worker while it cuts a clip would kill the next one too, at the same clip. Children are
confined like decoders (DESIGN 3.9), and one that dies or takes too long costs its clip and nothing else.
"""

import atexit
import io
import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import av

from stream import decoder_child
from stream.chunks import FORMATS, Chunk, Chunker
from stream.clips import Clip, cut_clip
from stream.clock import FakeClock
from stream.decoders import JOIN_S, no_main_module
from stream.errors import Code, UnmaskError
from stream.foreign import Segment, read_headers
from stream.parameters import stream_parameters
from stream.records import ChunkMeta, CodecParameters, Kind, Record

CHUNK_MS = 500
"""Length of the chunks that segments are cut into on their way into a clip; nobody sees them."""


@dataclass(frozen=True, slots=True)
class ClipJob:
    """What to cut: see `cut_clip`. `records`: headers and value of each record of `stream`, in order.

    `from_us`: media time at which the first record begins; None takes what the records say of themselves.
    `first_us`, `last_us` None mean all there is, and that all of it must be readable.
    """

    stream: str
    records: Sequence[tuple[Mapping[str, bytes], bytes]]
    from_us: int | None = None
    first_us: int | None = None
    last_us: int | None = None
    peak_us: int | None = None

    @property
    def whole(self) -> bool:
        """Whether a damaged record is no clip, rather than a shorter one."""
        return self.first_us is None and self.last_us is None


def clip_job(stream: str, records: Iterable[Record], **times: int | None) -> ClipJob:
    """Return the job for records as read from the log."""
    return ClipJob(stream, [(dict(record.headers), record.value or b"") for record in records], **times)


def cut_apart(job: ClipJob, memory_limit_bytes: int, timeout: float) -> Clip:
    """Return the clip, cut in a child process of at most `memory_limit_bytes` within `timeout` seconds.

    Raises `UnmaskError` (CHUNK_INVALID) if there is none to be had.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([decoder_child.__name__])
    near, far = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(far, job, memory_limit_bytes), daemon=True)
    try:
        with no_main_module():
            process.start()
        # It ignores SIGTERM, by which multiprocessing would end it, and wait for, at exit.
        atexit.register(process.kill)
        far.close()
        return _received(job, near, timeout)
    finally:
        atexit.unregister(process.kill)
        process.kill()
        process.join(JOIN_S)
        near.close()


def _received(job: ClipJob, near: Connection, timeout: float) -> Clip:
    try:
        answer = near.recv() if near.poll(timeout) else f"its cutting took more than {timeout:g} s"
    except (EOFError, OSError):
        answer = "its records killed the process that cut it"
    if isinstance(answer, Clip):
        return answer
    raise UnmaskError(Code.CHUNK_INVALID, f"no clip of {job.stream}: {answer}")


def _main(far: Connection, job: ClipJob, memory_limit_bytes: int) -> None:
    decoder_child.confine(memory_limit_bytes)
    try:
        far.send(cut(job))
    except Exception as error:  # whatever PyAV raises; the parent has a sentence for each
        far.send(str(error) or type(error).__name__)


def cut(job: ClipJob) -> Clip:
    """Cut the clip here and now. Raises as `cut_clip`, `read_headers` and PyAV do."""
    chunks = list(as_chunks(job))
    times = [meta.media_us(meta.pts) for meta, _ in chunks if meta.pts is not None and not meta.control]
    first_us = min(times, default=0) if job.first_us is None else job.first_us
    # The last chunk goes on after its first picture, by less than it may last.
    last_us = max(times, default=0) + 3_600_000_000 if job.last_us is None else job.last_us
    peak_us = first_us if job.peak_us is None else job.peak_us
    return cut_clip(chunks, first_us, last_us, peak_us, whole=job.whole)


def as_chunks(job: ClipJob) -> Iterator[Chunk]:
    """Yield the records as chunks of our own; segments of other producers are cut anew.

    A record that cannot be read is passed over, unless the job wants all: then raises what `read_headers` and
    PyAV do.
    """
    segments = _Segments(job)
    for headers, value in job.records:
        try:
            yield from _chunks_of(segments, read_headers(job.stream, headers), value)
        except Exception:  # whatever PyAV raises
            if job.whole:
                raise
            segments.interrupt()


def _chunks_of(segments: "_Segments", read: ChunkMeta | Segment, value: bytes) -> list[Chunk]:
    if isinstance(read, ChunkMeta):
        return [(read, value)]
    return [] if read.control is not None else segments.chunks(read, value)


class _Segments:
    """Cuts segments into chunks. Media time follows the first of them, epochs are found as at ingest."""

    def __init__(self, job: ClipJob) -> None:
        self._stream = job.stream
        self._from_us = job.from_us
        self._first_us: int | None = None
        self._clock = FakeClock()
        self._chunker: Chunker | None = None
        self._shape: tuple[CodecParameters, list[int]] | None = None
        self._attachment = 0

    def chunks(self, segment: Segment, value: bytes) -> list[Chunk]:
        if self._first_us is None:
            self._first_us = segment.capture_us
            self._from_us = segment.capture_us if self._from_us is None else self._from_us
        assert self._from_us is not None
        wanted_us = self._from_us + segment.capture_us - self._first_us
        self._clock.advance((wanted_us - self._clock.now_us()) / 1e6)
        opened: Any = av.open(io.BytesIO(value), format=FORMATS[segment.content_type])
        with opened as container:
            chunker = self._chunker_for(container)
            found = [chunk for packet in container.demux() for chunk in chunker.push(packet)]
            # Packets end with their container.
            return found + chunker.flush()

    def interrupt(self) -> None:
        """Begin anew with the next segment: what was not read is not bridged."""
        self._chunker = None

    def _chunker_for(self, container: Any) -> Chunker:
        """Return the chunker that the segment goes on in: another one if its parameters are others."""
        video, audio = container.streams.video[0], container.streams.audio[:1]
        shape = (stream_parameters(video), [stream.index for stream in (video, *audio)])
        if self._chunker is None or shape != self._shape:
            self._shape = shape
            self._attachment += 1
            self._chunker = Chunker(
                self._stream, f"{self._attachment:016x}", Kind.LIVE, CHUNK_MS, self._clock
            )
        return self._chunker
