"""The thread that owns the device: forms batches across streams and reads their faces (DESIGN 3.9)."""

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from detectors.readings import FaceReading, Image
from stream import marker
from stream.cascade import Cascade
from stream.clock import Clock
from stream.frames import (
    Applied,
    Dropped,
    Failed,
    FollowedFrame,
    HeardSound,
    SampledFrame,
    ScoredFrame,
    Sound,
    Use,
)
from stream.glimpses import Glimpses
from stream.records import Kind, is_canary

if TYPE_CHECKING:
    from detectors.cues.follow import Follower
    from detectors.cues.series import FaceLook

logger = logging.getLogger(__name__)

QUEUE_ITEMS = 512
"""Bound of each queue. Frames are bounded far below it by the decoders' slots; the rest are markers of a few
hundred bytes."""

UNREADABLE = "UNREADABLE"
"""Reason of a frame on which the reader failed."""

MAX_UNREADABLE = 8
"""Frames in a row, each alone, on which the reader may fail before it is the reader's fault, not theirs."""


class Reader(Protocol):
    """Reads faces: `detectors.reader.FaceReader`, or a test member that knows the truth."""

    @property
    def engine(self) -> str: ...

    @property
    def precision(self) -> str: ...

    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        """Return the faces of each frame; a frame is (full-resolution picture, reduced picture)."""


class Skipped:
    """A sampled frame that was not scored, and why; its picture is released already."""

    __slots__ = ("dropped", "frame")

    def __init__(self, frame: SampledFrame, dropped: Dropped) -> None:
        self.frame = frame
        self.dropped = dropped


Owner = TypeVar("Owner")
"""Whose the work is. Results carry it back, so that what is finished after its owner went reaches nobody."""

Work = SampledFrame | Sound | Applied | Failed | Skipped
Result = ScoredFrame | FollowedFrame | HeardSound | Applied | Failed | Skipped


@dataclass(frozen=True, slots=True)
class _Item(Generic[Owner]):
    work: Work
    late: bool
    suspect: bool
    owner: Owner


class Device(Generic[Owner]):
    """Takes work in order and gives results in the same order.

    The canary's frames go through the reader like all others, and are then read by the one that sees its mark
    (DESIGN 3.10). Owner of both queues. `offer` and `take` never block; the device thread blocks only on its
    own queues.
    """

    def __init__(
        self,
        reader: Reader,
        batch_frames: int,
        clock: Clock,
        cascade: Cascade | None = None,
        follower: "Follower | None" = None,
        glimpses: Glimpses | None = None,
    ) -> None:
        """`cascade` reads suspect frames more deeply, if there are heavy members; `follower` looks at the
        pictures of bursts at full rate, if any cue wants them; `glimpses` keeps small pictures for people."""
        self._reader = reader
        self._glimpses = glimpses
        self._follower = follower
        self._cascade = cascade
        self._canary = marker.MarkerReader()
        self._batch_frames = batch_frames
        self._clock = clock
        self._work: queue.Queue[_Item[Owner] | None] = queue.Queue(QUEUE_ITEMS)
        self._results: queue.Queue[tuple[Owner, Result]] = queue.Queue(QUEUE_ITEMS)
        self._thread = threading.Thread(target=self._run, name="unmask-device", daemon=True)
        self._last_output = clock.monotonic()
        self._pending = 0
        self._unreadable = 0
        self._lock = threading.Lock()
        self.error: BaseException | None = None
        self.seconds_per_frame = 0.0
        """What a frame of the last batch took of the device, heavy members apart."""

    def start(self) -> None:
        self._last_output = self._clock.monotonic()
        self._thread.start()

    def room(self) -> bool:
        """Return whether `offer` has room for one more piece of work."""
        return self._work.qsize() < QUEUE_ITEMS and self._results.qsize() < QUEUE_ITEMS

    def offer(self, work: Work, late: bool, owner: Owner, suspect: bool = False) -> None:
        """Queue work; `suspect`: a frame worth a deeper look. Call only after `room()` said yes, from one
        thread."""
        with self._lock:
            if self._pending == 0:
                self._last_output = self._clock.monotonic()
            self._pending += 1
        self._work.put_nowait(_Item(work, late, suspect, owner))

    def take(self) -> list[tuple[Owner, Result]]:
        """Return what is finished, in order."""
        results: list[tuple[Owner, Result]] = []
        while True:
            try:
                results.append(self._results.get_nowait())
            except queue.Empty:
                return results

    def pending(self) -> int:
        """Return how many pieces of work were offered and not yet finished."""
        with self._lock:
            return self._pending + self._results.qsize()

    def stalled_for(self) -> float:
        """Return for how many seconds there has been work and no output (DESIGN 3.9, a wedged stage)."""
        with self._lock:
            if self._pending == 0:
                return 0.0
            return self._clock.monotonic() - self._last_output

    def stop(self, timeout: float) -> bool:
        """Finish what was offered and end the thread; return whether it ended in time."""
        try:
            self._work.put(None, timeout=timeout)
        except queue.Full:
            return False
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:
            logger.exception("device thread died")
            self.error = error

    def _step(self) -> bool:
        item = self._work.get()
        batch: list[tuple[SampledFrame, _Item[Owner]]] = []
        while item is not None and isinstance(item.work, SampledFrame):
            batch.append((item.work, item))
            if len(batch) >= self._batch_frames:
                break
            try:
                item = self._work.get_nowait()
            except queue.Empty:
                self._score(batch)
                return True
        else:
            self._score(batch)
            if item is None:
                return False
            assert not isinstance(item.work, SampledFrame)
            if isinstance(item.work, Sound):
                self._hear(item.work, item.owner)
            else:
                self._finish(item.owner, item.work)
            return True
        self._score(batch)
        return True

    def _score(self, batch: Sequence[tuple[SampledFrame, _Item[Owner]]]) -> None:
        if not batch:
            return
        try:
            results = self._judged([pair for pair in batch if pair[0].use is not Use.FOLLOWED])
            found = [
                (item.owner, result, self._followed(frame, result))
                for (frame, item), result in _together(batch, results)
            ]
        finally:
            for frame, _ in batch:
                frame.release()
        for owner, result, followed in found:
            if result is not None:
                self._finish(owner, result, last=followed is None)
            if followed is not None:
                self._finish(owner, followed)

    def _judged(self, batch: Sequence[tuple[SampledFrame, _Item[Owner]]]) -> list[Result]:
        if not batch:
            return []
        begun, heavy_s = self._clock.monotonic(), self._heavy_s()
        results = self._read(batch)
        spent = self._clock.monotonic() - begun - (self._heavy_s() - heavy_s)
        self.seconds_per_frame = spent / len(batch)
        return results

    def _followed(self, frame: SampledFrame, result: Result | None) -> FollowedFrame | None:
        """Return what the cues see of a picture of a burst; `result` is what the members made of it, if any.

        Whatever fails costs this look: cues are not worth a reading.
        """
        if self._follower is None:
            return None if result is not None else self._looked(frame, (), 0.0)
        if frame.use is Use.JUDGED:
            self._follower.drop(frame.meta.stream)
            return None
        begun, stream = self._clock.monotonic(), frame.meta.stream
        try:
            if isinstance(result, ScoredFrame):
                looks = self._follower.seed(stream, frame.image, [face.detection for face in result.faces])
            elif frame.cut or result is not None:
                self._follower.drop(stream)
                looks = ()
            else:
                looks = self._follower.follow(stream, frame.image)
        except Exception:
            logger.exception("%s: the cues failed at pts %d", stream, frame.pts)
            self._follower.drop(stream)
            looks = ()
        return self._looked(frame, looks, self._clock.monotonic() - begun)

    @staticmethod
    def _looked(frame: SampledFrame, looks: "tuple[FaceLook | None, ...]", seconds: float) -> FollowedFrame:
        return FollowedFrame(
            stream=frame.meta.stream,
            attachment=frame.meta.attachment,
            epoch=frame.meta.epoch,
            pts=frame.pts,
            media_us=frame.media_us,
            cut=frame.cut,
            seeded=frame.use is Use.BOTH,
            looks=looks,
            seconds=seconds,
        )

    def _hear(self, sound: Sound, owner: Owner) -> None:
        begun, stream = self._clock.monotonic(), sound.meta.stream
        try:
            windows = self._follower.hear(stream, sound.media_us, sound.samples) if self._follower else []
        except Exception:
            logger.exception("%s: voice activity failed at record %d", stream, sound.offset)
            windows = []
        self._finish(owner, HeardSound(stream, tuple(windows), self._clock.monotonic() - begun))

    def _heavy_s(self) -> float:
        return self._cascade.seconds if self._cascade is not None else 0.0

    def _read(self, batch: Sequence[tuple[SampledFrame, _Item[Owner]]]) -> list[Result]:
        """Read a batch; if that fails (no memory, a picture nobody thought of), frame by frame.

        A frame that fails alone is not scored, counted. Raises what the reader raises if all fail.
        """
        try:
            readings = self._reader.read([(frame.image, frame.small) for frame, _ in batch])
        except Exception as error:
            if len(batch) > 1:
                logger.warning("%d frames not read at once, trying each alone: %s", len(batch), error)
                return [result for item in batch for result in self._read([item])]
            self._unreadable += 1
            if self._unreadable >= MAX_UNREADABLE:
                raise
            frame = batch[0][0]
            logger.exception("%s: frame at pts %d cannot be read", frame.meta.stream, frame.pts)
            return [Skipped(frame, Dropped(frame.media_us, frame.media_us, UNREADABLE, 1))]
        self._unreadable = 0
        return [
            self._scored(frame, item.late, self._looked_at(frame, item.suspect, faces))
            for (frame, item), faces in zip(batch, readings, strict=True)
        ]

    def _looked_at(
        self, frame: SampledFrame, suspect: bool, faces: tuple[FaceReading, ...]
    ) -> tuple[FaceReading, ...]:
        """Return the faces as they are to be taken: the canary's mark, a suspect face read more deeply."""
        stream = frame.meta.stream
        if is_canary(stream):
            return self._canary.read([(frame.image, frame.small)])[0]
        if self._cascade is None or not suspect:
            return faces
        return self._cascade.deepen(stream, frame.image, faces, live=frame.meta.kind is Kind.LIVE)

    def _scored(self, frame: SampledFrame, late: bool, faces: tuple[FaceReading, ...]) -> ScoredFrame:
        height, width = frame.image.shape[:2]
        return ScoredFrame(
            stream=frame.meta.stream,
            attachment=frame.meta.attachment,
            epoch=frame.meta.epoch,
            sequence=frame.meta.sequence,
            offset=frame.offset,
            pts=frame.pts,
            media_us=frame.media_us,
            capture_us=frame.meta.capture_us,
            width=width,
            height=height,
            cut=frame.cut,
            late=late,
            faces=faces,
            engine=self._reader.engine,
            precision=self._reader.precision,
            qp=frame.qp,
            picture=self._glimpses.of(frame.meta.stream, frame.small) if self._glimpses else None,
        )

    def _finish(self, owner: Owner, result: Result, last: bool = True) -> None:
        """Hand a result out; `last`: the work it came of is done."""
        self._results.put((owner, result))
        with self._lock:
            self._pending -= last
            self._last_output = self._clock.monotonic()


def _together(
    batch: Sequence[tuple[SampledFrame, _Item[Owner]]], results: Sequence[Result]
) -> Iterator[tuple[tuple[SampledFrame, _Item[Owner]], Result | None]]:
    """Yield each frame of a batch with its result, None of those that no member saw."""
    left = iter(results)
    for pair in batch:
        yield pair, None if pair[0].use is Use.FOLLOWED else next(left)
