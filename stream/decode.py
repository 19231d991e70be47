"""Chunks of one stream in, sampled pictures out: what runs in a decoder child (DESIGN 3.2, 3.3, 3.9).

No torch here, nor anything that imports it. `StreamDecoder` has no clock, no threads and no files: the same
records give the same events, in one go or resumed at any `decode_from`.

Two rules keep smeared pictures from accusing anybody. FFmpeg is told to fail where it would conceal
(`err_detect=explode`; of 60 clips with one damaged H.264 packet, 774 wrong frames pass without it and 15 with
it), and after any damage nothing is emitted until a keyframe decodes in a new context, as after a restart.

H.264 that begins at a recovery point (open GOP, intra refresh) refers to pictures from before it, as it may.
FFmpeg would fail there and lose pictures that are sound, the keyframe itself among them; concealing, it shows
them exactly. So there it may conceal, and whatever it says of errors counts as damage, but for those that
such a start explains. Over 1200 damaged clips that let 1622 wrong frames pass, `explode` 1704.
"""

import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import av

from detectors.quantiser import OPTIONS as QP_OPTIONS
from detectors.quantiser import mean_qp
from stream.chunks import Chunk, ChunkPackets, join_parts, read_chunk
from stream.errors import Code, UnmaskError
from stream.foreign import Assigner, Place, Places, Segment
from stream.frames import Applied, DecoderEvent, Dropped, Failed, ResumePoint, SampledFrame, Sound, Use
from stream.pictures import Pictures
from stream.records import ChunkMeta, CodecParameters, Control, check_times
from stream.sampling import Sampler
from stream.shots import HISTORY, ShotDetector, thumbnail
from stream.sound import SoundDecoder

if TYPE_CHECKING:  # config brings pydantic with it, 15 MB in every child
    from stream.config import Decode

logger = logging.getLogger(__name__)

MAX_PIXELS = 8192 * 4320
"""8K of digital cinema. A damaged header can ask for 2^28 pixels; FFmpeg refuses them before it allocates."""

MAX_PARTS_BYTES = 64 * 1024 * 1024
"""A packet in parts larger than this is none: 64 MiB is an uncompressed 4K picture."""

MAX_ANCHORS = 256
"""Keyframes remembered as possible starting points while none is sampled; more are only further back."""

LENIENT_AFTER = 3
"""Keyframes in a row that fail by themselves before `explode` is given up for the epoch: a camera whose
every keyframe carries a malformed SEI must not go unwatched. Damage seldom hits every keyframe."""

OPEN_START_PACKETS = 16
"""Packets after a start at a recovery point, and after the last picture that leads it, in which the encoder
may go on dismissing reference pictures from before it: there are at most 16 (H.264, A.3.1). x264 needs 7."""

DISMISSED = ("mmco: unref short failure", "number of reference frames ")
"""How FFmpeg's messages on that begin."""

UNKNOWN_REFERENCES = (
    "Missing reference picture",
    "reference picture missing during reorder",
    "co located POCs unavailable",
    "decode_slice_header error",
)
"""What FFmpeg says besides of pictures that lead a recovery point and refer to what was never decoded. They
are not shown, and no later picture may refer to them."""

AVCC = b"\x01"
"""How the extradata of H.264 begins if units have their length before them; else it begins with a zero."""

AVCC_BASELINE = b"\x01\x42"
"""How the extradata (avcC) of H.264 in Baseline profile begins: it has no B pictures, so no reordering."""

FIRST_SLICE = re.compile(rb"\x00\x00\x01[\x01\x21\x41\x61\x05\x25\x45\x65]")
"""A start code and the header of a slice of H.264: its lower five bits are 1, or 5 in an IDR picture."""

IDR = 5

I_PICTURE = 1
"""FFmpeg's AV_PICTURE_TYPE_I. A recovery point of intra refresh is a keyframe too, but no start."""


class Phase(StrEnum):
    """What a stream's decoder is doing."""

    WARMUP = "warmup"
    """Nothing of the epoch was decoded yet: waits for a keyframe."""
    REPLAY = "replay"
    """Decodes up to the resume point, emits nothing."""
    DECODING = "decoding"
    CORRUPT = "corrupt"
    """After damage or a gap: waits for a keyframe that decodes cleanly."""


LEGAL: dict[Phase, frozenset[Phase]] = {
    Phase.WARMUP: frozenset({Phase.REPLAY, Phase.DECODING, Phase.WARMUP, Phase.CORRUPT}),
    Phase.REPLAY: frozenset({Phase.DECODING, Phase.CORRUPT, Phase.WARMUP}),
    Phase.DECODING: frozenset({Phase.CORRUPT, Phase.WARMUP}),
    Phase.CORRUPT: frozenset({Phase.REPLAY, Phase.DECODING, Phase.WARMUP, Phase.CORRUPT}),
}


class DropReason(StrEnum):
    """Why frames were not scored, in `Dropped.reason`."""

    WARMUP = "WARMUP"
    CORRUPT = "CORRUPT"


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """What a decoder needs of `config.Decode`; durations in microseconds."""

    threads: int = 1
    detect_width: int = 640
    max_warmup_us: int = 20_000_000

    @classmethod
    def of(cls, config: "Decode") -> "DecodeSettings":
        return cls(config.threads, config.detect_width, round(config.max_warmup_s * 1e6))


@dataclass(slots=True)
class Counts:
    """What happened so far; every number only grows.

    `decoded` frames of which `sampled`, and `followed` beside them within bursts; `warmup` decoded again
    after a restart; `corrupt`, `waited` frames passed over after damage, before the first keyframe; `hidden`
    decoded for reference only; `unordered` frames that came out behind a later one; `stale` records not newer
    than the last; `gaps` holes in the sequence; `errors` refused by the codec; `invalid` chunks that are
    none; `lenient` epochs decoded without `explode`; `unheard` audio packets that a burst could not decode.
    """

    records: int = 0
    stale: int = 0
    gaps: int = 0
    invalid: int = 0
    errors: int = 0
    decoded: int = 0
    sampled: int = 0
    warmup: int = 0
    corrupt: int = 0
    waited: int = 0
    hidden: int = 0
    unordered: int = 0
    cuts: int = 0
    epochs: int = 0
    lenient: int = 0
    followed: int = 0
    unheard: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Counts)))

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Counts)))


@dataclass(slots=True)
class _Epoch:
    """Where the stream stands; `last_pts`, `last_us` are of the last frame that was decoded in its turn."""

    key: tuple[str, int]
    last_pts: int | None = None
    last_us: int | None = None
    strict: bool = True
    failed_starts: int = 0


@dataclass(slots=True)
class _Run:
    """One decoder context, from a keyframe until damage or the end of the epoch.

    `pending` holds, by pts, the record of every packet whose frame has not come out; `keyframes` those of
    keyframes. `anchors` are (offset of the record that holds a keyframe, number of its frame), the first
    being where a restart has to begin. `cut`: a cut since the last sampled frame. `reason`: why pictures
    that lead `start_pts` are not shown. `watched`: FFmpeg may conceal, and what it says is read;
    `open_until` is the number of the last packet whose references may be unknown.
    """

    context: Any
    codec: CodecParameters
    start_pts: int | None
    reason: "DropReason"
    anchors: deque[tuple[int, int]]
    cut: bool
    shots: ShotDetector = field(default_factory=ShotDetector)
    pending: dict[int, tuple[int, ChunkMeta]] = field(default_factory=dict)
    keyframes: dict[int, int] = field(default_factory=dict)
    frames: int = 0
    packets: int = 0
    watched: bool = False
    open_until: int = OPEN_START_PACKETS

    def leads(self, pts: int) -> bool:
        """Return whether a picture comes before the first keyframe: it refers to what was never decoded."""
        return self.start_pts is not None and pts < self.start_pts

    def sampled(self) -> None:
        """The last frame was sampled: drop the anchors that the next cut decision does not need."""
        while len(self.anchors) > 1 and self.anchors[1][1] + HISTORY < self.frames:
            self.anchors.popleft()


@dataclass(slots=True)
class _Skipped:
    """Frames passed over within one record, for one reason."""

    first_us: int
    last_us: int
    frames: int = 1


@dataclass(frozen=True, slots=True)
class Burst:
    """What a burst at full rate wants of a decoder: `fps` pictures a second at most (0: there is none), and
    whether the sound with them."""

    fps: float = 0.0
    sound: bool = False


NO_BURST = Burst()


def _nothing() -> None:
    """Pictures of an in-process decoder are plain arrays: there is no slot to give back."""


class StreamDecoder:
    """Decodes one stream, in order: `feed` every record of it, chunks and controls alike.

    `fps` is asked at every frame, so a new rate holds from the next frame on. `place` is where a stream of
    another producer stands before the first record that will be fed. `burst` is asked at every frame and
    chunk too: what it wants comes beside the ordinary sampling, which is the same with and without it.
    """

    def __init__(
        self,
        settings: DecodeSettings,
        resume: ResumePoint,
        fps: Callable[[], float],
        place: Place | None = None,
        burst: Callable[[], Burst] = lambda: NO_BURST,
    ) -> None:
        self._settings = settings
        self._burst = burst
        self._between = Sampler()
        self._sound = SoundDecoder()
        self._place = place
        self._assigner: Assigner | None = None
        self._places: deque[tuple[int, Place]] = deque()
        """The place before each record of another producer, from `decode_from` on."""
        self._resume = resume
        self._fps = fps
        self._sampler = Sampler(resume.last_sample_us)
        self._pictures = Pictures(settings.detect_width)
        self._phase = Phase.WARMUP
        self._epoch: _Epoch | None = None
        self._run: _Run | None = None
        self._order: tuple[str, int, int, int] | None = None
        self._parts: list[Chunk] = []
        self._parts_bytes = 0
        self._offset = 0
        self._decode_from: int | None = None
        self._hole_us: int | None = None
        self._skipped: dict[DropReason, _Skipped] = {}
        self._holes: list[Dropped] = []
        self._error: str | None = None
        self._before: int | None = None
        """Where decoding began when the present record came: what it failed on, it failed on with that."""
        self._reported = Counts()
        self.counts = Counts()

    @property
    def phase(self) -> Phase:
        return self._phase

    def feed(self, offset: int, record: ChunkMeta | Segment, value: bytes) -> Iterator[DecoderEvent]:
        """Take the record at `offset`; yield its sampled frames, then exactly one `Applied` or `Failed`.

        Iterate to the end before feeding the next. Frames come in presentation order and belong to the
        record that held their packet, which may be an earlier one. Raises nothing for bad input.
        """
        self.counts.records += 1
        segment = record if isinstance(record, Segment) else None
        meta = record.bare(*self._newest()) if isinstance(record, Segment) else record
        if segment is None and self._is_stale(meta):
            self.counts.stale += 1
            yield self._applied(offset, self._stand_in(meta), b"")
            return
        try:
            if segment is None:
                yield from self._apply(offset, meta, value)
            else:
                yield from self._apply_segment(offset, segment, value)
        except UnmaskError as error:
            self.counts.invalid += error.code is Code.CHUNK_INVALID
            yield self._broken(offset, meta, value, error.code, str(error))
        except Exception as error:
            # The last line before hostile bytes: whatever PyAV stumbles over is this record's fault.
            logger.debug("%s: record %d failed", meta.stream, offset, exc_info=True)
            if self._run is not None:
                self._spoil()
            sentence = f"record {offset} could not be decoded ({type(error).__name__}: {error})"
            yield self._broken(offset, meta, value, Code.DECODE_FAILED, sentence)

    def _broken(
        self, offset: int, meta: ChunkMeta, value: bytes, code: Code, sentence: str
    ) -> Applied | Failed:
        """Report a record that failed; a control record is applied though frames before it were not."""
        return (
            self._failed(offset, meta, code, sentence)
            if meta.control is None
            else self._applied(offset, meta, value)
        )

    def _apply(self, offset: int, meta: ChunkMeta, value: bytes) -> Iterator[DecoderEvent]:
        self._error = None
        self._before = self._decode_from
        yield from self._arrive(offset, meta)
        if self._place or self._assigner:
            self._assigner_of(meta.stream).overtaken(meta.attachment)
        if meta.control is not None:
            yield from self._control(offset, meta.control)
            yield self._applied(offset, meta, value)
            return
        try:
            chunk = self._assemble(offset, meta, value)
            if chunk is not None:
                check_times(meta, [packet.pts for packet in chunk.video if packet.pts is not None])
        except UnmaskError:
            yield from self._interrupt()
            raise
        if chunk is not None:
            yield from self._chunk(meta, chunk)
        if self._error is not None:
            raise UnmaskError(Code.DECODE_FAILED, f"record {offset} could not be decoded ({self._error})")
        yield self._applied(offset, meta, b"")

    def _apply_segment(self, offset: int, segment: Segment, value: bytes) -> Iterator[DecoderEvent]:
        """Apply a record of another producer; `_offset` and parts are as for a whole chunk."""
        self._error = None
        self._before = self._decode_from
        self._offset = offset
        assigner = self._assigner_of(segment.stream)
        self._places.append((offset, assigner.place))
        if segment.control is not None:
            meta, body = assigner.control(segment)
            yield from self._arrive(offset, meta)
            yield from self._control(offset, segment.control)
            yield self._applied(offset, meta, body)
            return
        try:
            pieces = assigner.take(segment, value)
        except UnmaskError:
            yield from self._interrupt()
            raise
        fresh = [piece for piece in pieces if not self._is_stale(piece[0])]
        if not fresh:
            self.counts.stale += 1
        for meta, chunk in fresh:
            yield from self._arrive(offset, meta)
            yield from self._chunk(meta, chunk)
        if self._error is not None:
            raise UnmaskError(Code.DECODE_FAILED, f"record {offset} could not be decoded ({self._error})")
        yield self._applied(offset, fresh[-1][0] if fresh else segment.bare(*self._newest()), b"")

    def _assigner_of(self, stream: str) -> Assigner:
        if self._assigner is None:
            self._assigner = Assigner(stream, self._place or Place.behind(self._newest()[0]))
        return self._assigner

    def _newest(self) -> tuple[str, int]:
        """Return attachment and epoch of the stream as far as it is known."""
        if self._epoch is not None:
            return self._epoch.key
        return self._resume.attachment, self._resume.epoch or 0

    # --- order ---

    def _arrive(self, offset: int, meta: ChunkMeta) -> Iterator[DecoderEvent]:
        """Take note of a record's place in the stream: what is missing before it, an epoch that it begins."""
        gap = self._is_gap(meta)
        self._order = meta.order()
        if gap:
            self.counts.gaps += 1
            self._parts.clear()
            yield from self._interrupt()
        if self._epoch is None or self._epoch.key != (meta.attachment, meta.epoch):
            yield from self._finish_run()
            self._begin_epoch(offset, meta)

    def _is_stale(self, meta: ChunkMeta) -> bool:
        if self._order is not None:
            return meta.order() <= self._order
        if self._resume.epoch is None:
            return meta.attachment < self._resume.attachment
        return (meta.attachment, meta.epoch) < (self._resume.attachment, self._resume.epoch)

    def _is_gap(self, meta: ChunkMeta) -> bool:
        if self._order is None:
            return meta.part != 0
        attachment, _, sequence, part = self._order
        if meta.part > 0:
            return (attachment, sequence, part + 1) != (meta.attachment, meta.sequence, meta.part)
        return bool(self._parts) or (meta.attachment == attachment and meta.sequence != sequence + 1)

    def _stand_in(self, meta: ChunkMeta) -> ChunkMeta:
        """Return what a stale record is reported with: no older place, no control, nothing to be indexed."""
        attachment, epoch = self._newest()
        return replace(
            meta, attachment=attachment, epoch=epoch, control=None, pts=None, starts_on_keyframe=False
        )

    def _begin_epoch(self, offset: int, meta: ChunkMeta) -> None:
        key = (meta.attachment, meta.epoch)
        self._epoch = _Epoch(key)
        if key == (self._resume.attachment, self._resume.epoch) and self._resume.last_pts is not None:
            self._epoch.last_pts = self._resume.last_pts
            self._epoch.last_us = meta.media_us(self._resume.last_pts)
        self.counts.epochs += 1
        if self._hole_us is None:
            self._decode_from = offset
        passed_over = self._epoch.last_pts is not None
        self._enter(Phase.WARMUP)
        if passed_over:
            # A restart in the middle of damage, not of an epoch; a keyframe of this record changes that.
            self._enter(Phase.CORRUPT)

    def _enter(self, phase: Phase) -> None:
        if phase not in LEGAL[self._phase]:
            raise RuntimeError(f"decoder cannot go from {self._phase} to {phase}")
        self._phase = phase

    def _control(self, offset: int, control: Control) -> Iterator[DecoderEvent]:
        if control is Control.GAP:
            self.counts.gaps += 1
            yield from self._interrupt()
        elif control is Control.END:
            yield from self._finish_run()
            if self._hole_us is None:
                self._decode_from = offset

    def _assemble(self, offset: int, meta: ChunkMeta, value: bytes) -> ChunkPackets | None:
        """Return the packets of the record, None while parts are missing."""
        if meta.part == 0:
            self._offset = offset
            self._parts.clear()
            self._parts_bytes = 0
        if meta.parts == 1:
            return read_chunk(meta, value)
        if meta.part != len(self._parts):
            return None  # its beginning is lost, which was counted as a gap
        self._parts.append((meta, value))
        self._parts_bytes += len(value)
        if self._parts_bytes > MAX_PARTS_BYTES:
            self._parts.clear()
            raise UnmaskError(
                Code.CHUNK_INVALID, f"parts of record {self._offset} exceed {MAX_PARTS_BYTES} bytes"
            )
        if meta.part < meta.parts - 1:
            return None
        try:
            return read_chunk(*join_parts(self._parts))
        finally:
            self._parts = []

    # --- packets ---

    def _chunk(self, meta: ChunkMeta, chunk: ChunkPackets) -> Iterator[DecoderEvent]:
        self._close_hole(meta)
        yield from self._hear(meta, chunk)
        for packet in chunk.video:
            yield from self._packet(packet, meta, chunk.codec)
        if self._run is None:
            # What was passed over is reported with this record, so a restart needs nothing before it.
            self._decode_from = self._offset

    def _hear(self, meta: ChunkMeta, chunk: ChunkPackets) -> Iterator[DecoderEvent]:
        """Emit what a chunk sounds like, within a burst that wants it."""
        burst = self._burst()
        if not (burst.fps and burst.sound):
            self._sound.stop()
            return
        errors = self._sound.errors
        for media_us, samples in self._sound.hear(meta, chunk):
            yield Sound(self._offset, meta, media_us, samples)
        self.counts.unheard += self._sound.errors - errors

    def _packet(self, packet: Any, meta: ChunkMeta, codec: CodecParameters) -> Iterator[DecoderEvent]:
        pts = packet.pts
        if self._run is not None and packet.is_corrupt:
            self._spoil()
        run = self._run or self._start(packet, meta, codec)
        if run is None:
            self._skip(pts, meta, self._waiting_reason())
            return
        run.packets += 1
        if pts is not None:
            run.pending[pts] = (self._offset, meta)
            if packet.is_keyframe:
                run.keyframes[pts] = self._offset
        try:
            frames = _watch(run, packet) if run.watched else run.context.decode(packet)
        except (av.FFmpegError, UnmaskError) as error:
            if not isinstance(error, _NoReferenceError):
                self._failed_start(run, meta.stream)
            self._spoil()
            self._error = str(error)
            return
        for frame in frames:
            yield from self._frame(run, frame)
            if self._run is not run:
                return

    def _start(self, packet: Any, meta: ChunkMeta, codec: CodecParameters) -> _Run | None:
        """Open a decoder if a run can begin with this packet."""
        assert self._epoch is not None
        if not packet.is_keyframe or packet.is_corrupt:
            return None
        last_pts = self._epoch.last_pts
        replay = last_pts is not None and packet.pts is not None and packet.pts <= last_pts
        if replay and meta.media_us(last_pts or 0) - meta.media_us(packet.pts) > self._settings.max_warmup_us:
            return None
        watched = self._epoch.strict and _is_recovery_point(codec, packet)
        self._run = _Run(
            context=_open(codec, self._settings.threads, self._epoch.strict and not watched),
            codec=codec,
            start_pts=packet.pts,
            reason=self._waiting_reason(),
            anchors=deque([(self._offset, 0)]),
            cut=last_pts is not None,
            watched=watched,
        )
        self._decode_from = self._offset
        self._enter(Phase.REPLAY if replay else Phase.DECODING)
        return self._run

    def _waiting_reason(self) -> DropReason:
        return DropReason.CORRUPT if self._phase is Phase.CORRUPT else DropReason.WARMUP

    def _failed_start(self, run: _Run, stream: str) -> None:
        assert self._epoch is not None
        if run.packets > 1 or not self._epoch.strict:
            return
        self._epoch.failed_starts += 1
        if self._epoch.failed_starts < LENIENT_AFTER:
            return
        self._epoch.strict = False
        self.counts.lenient += 1
        logger.warning(
            "%s: %d keyframes in a row violate their standard; errors are concealed from now on",
            stream,
            LENIENT_AFTER,
        )

    def _spoil(self) -> None:
        """Damage: end the run, pass over every frame that has not come out."""
        run, self._run = self._run, None
        assert run is not None
        self.counts.errors += 1
        self._enter(Phase.CORRUPT)
        for pts, (_, meta) in run.pending.items():
            self._skip(pts, meta, DropReason.CORRUPT)

    def _skip(self, pts: int | None, meta: ChunkMeta, reason: DropReason) -> None:
        """Count a frame that will not be emitted, and report it unless that was done before a restart."""
        assert self._epoch is not None
        if pts is None:
            self.counts.hidden += 1
            return
        if self._epoch.last_pts is not None and pts <= self._epoch.last_pts:
            self.counts.warmup += 1
            return
        if reason is DropReason.CORRUPT:
            self.counts.corrupt += 1
        else:
            self.counts.waited += 1
        media_us = meta.media_us(pts)
        seen = self._skipped.get(reason)
        if seen is None:
            self._skipped[reason] = _Skipped(media_us, media_us)
            return
        seen.first_us = min(seen.first_us, media_us)
        seen.last_us = max(seen.last_us, media_us)
        seen.frames += 1

    # --- frames ---

    def _frame(self, run: _Run, frame: Any) -> Iterator[DecoderEvent]:
        assert self._epoch is not None
        pts = frame.pts
        if pts is None:
            self.counts.hidden += 1
            return
        source = run.pending.pop(pts, None)
        if source is None:
            self.counts.unordered += 1
            return
        offset, meta = source
        if run.leads(pts):
            self._skip(pts, meta, run.reason)
            return
        if frame.is_corrupt:
            self._skip(pts, meta, DropReason.CORRUPT)
            self._spoil()
            return
        self._forget(run, pts)
        cut = self._follow(run, frame, pts)
        run.cut |= cut
        media_us = meta.media_us(pts)
        if self._replayed(run, pts, media_us):
            return
        if self._epoch.last_pts is not None and pts <= self._epoch.last_pts:
            self.counts.unordered += 1
            return
        if self._phase is Phase.REPLAY:
            self._enter(Phase.DECODING)
        self._epoch.failed_starts = 0
        self._epoch.last_pts, self._epoch.last_us = pts, media_us
        self.counts.decoded += 1
        self.counts.cuts += cut
        use = self._use(media_us)
        if use is None:
            return
        image, small = self._pictures.convert(
            frame, run.codec.rotation, run.context.sample_aspect_ratio, reduced=use is not Use.FOLLOWED
        )
        if use is Use.FOLLOWED:
            self.counts.followed += 1
            yield SampledFrame(offset, meta, pts, media_us, image, small, run.cut, _nothing, None, use)
            return
        self.counts.sampled += 1
        since, run.cut = run.cut, False
        run.sampled()
        self._decode_from = run.anchors[0][0]
        yield SampledFrame(offset, meta, pts, media_us, image, small, since, _nothing, mean_qp(frame), use)

    def _use(self, media_us: int) -> Use | None:
        """Return what the frame is wanted for; None: for nothing."""
        ordinary, fps = self._sampler.take(media_us, self._fps()), self._burst().fps
        if not fps:
            return Use.JUDGED if ordinary else None
        between = self._between.take(media_us, fps)
        if ordinary:
            return Use.BOTH
        return Use.FOLLOWED if between else None

    def _forget(self, run: _Run, pts: int) -> None:
        """Let go of packets whose turn has passed: decoders give no frame for what they cannot reconstruct
        (an intra refresh shows nothing until it is complete), nor for VP8's invisible packets."""
        for late in [other for other in run.pending if other < pts]:
            _, meta = run.pending.pop(late)
            if run.leads(late) or run.frames == 0:
                self._skip(late, meta, run.reason)
            else:
                self.counts.hidden += 1

    @staticmethod
    def _follow(run: _Run, frame: Any, pts: int) -> bool:
        """Take the frame into the history of cuts and of starting points; return whether it is a cut."""
        record = run.keyframes.pop(pts, None)
        started = record is not None and frame.key_frame and int(frame.pict_type) == I_PICTURE
        fresh = record != run.anchors[-1][0] and len(run.anchors) < MAX_ANCHORS
        if record is not None and started and fresh:
            run.anchors.append((record, run.frames))
        run.frames += 1
        return run.shots.add(thumbnail(frame))

    def _replayed(self, run: _Run, pts: int, media_us: int) -> bool:
        """Return whether the frame was already emitted or passed over before a restart."""
        assert self._epoch is not None
        if self._phase is not Phase.REPLAY or self._epoch.last_pts is None or pts > self._epoch.last_pts:
            return False
        self.counts.warmup += 1
        if self._sampler.last_us is not None and media_us <= self._sampler.last_us:
            run.cut = False
            run.sampled()
            self._decode_from = run.anchors[0][0]
        return True

    def _finish_run(self) -> Iterator[DecoderEvent]:
        """Emit what the decoder still holds and close it: at an epoch's end, at `end`, before a hole."""
        run = self._run
        if run is None:
            return
        try:
            frames = run.context.decode(None)
        except av.FFmpegError:
            self._spoil()
            return
        for frame in frames:
            yield from self._frame(run, frame)
            if self._run is not run:
                return
        self._run = None
        self.counts.hidden += len(run.pending)
        self._enter(Phase.CORRUPT)

    def _interrupt(self) -> Iterator[DecoderEvent]:
        """Records are missing: what came before them is sound, what follows needs a keyframe."""
        if self._epoch is None:
            return
        yield from self._finish_run()
        if self._hole_us is None:
            self._hole_us = self._epoch.last_us
        self._enter(Phase.CORRUPT)

    def _close_hole(self, meta: ChunkMeta) -> None:
        """Report the range between the last frame before missing records and this chunk's first."""
        if self._hole_us is None or meta.pts is None:
            return
        first_us, last_us = self._hole_us, meta.media_us(meta.pts)
        self._hole_us = None
        if last_us > first_us:
            self._holes.append(Dropped(first_us, last_us, DropReason.CORRUPT.value, None))

    # --- reports ---

    def _report(self) -> tuple[Counts, tuple[Dropped, ...]]:
        since = self.counts - self._reported
        self._reported = replace(self.counts)
        dropped = (
            *self._holes,
            *(
                Dropped(seen.first_us, seen.last_us, reason.value, seen.frames)
                for reason, seen in self._skipped.items()
            ),
        )
        self._holes, self._skipped = [], {}
        return since, dropped

    def _applied(self, offset: int, meta: ChunkMeta, body: bytes) -> Applied:
        since, dropped = self._report()
        decode_from = offset if self._decode_from is None else self._decode_from
        return Applied(
            offset=offset,
            meta=meta,
            control_body=body,
            decode_from=decode_from,
            last_pts=self._resume.last_pts if self._epoch is None else self._epoch.last_pts,
            decoded=since.decoded,
            sampled=since.sampled,
            warmup=since.warmup,
            dropped=dropped,
            places=self._places_from(decode_from),
        )

    def _failed(self, offset: int, meta: ChunkMeta, code: Code, sentence: str) -> Failed:
        decode_from = offset if self._before is None else self._before
        return Failed(offset, meta, decode_from, code, sentence, self._places_from(decode_from))

    def _places_from(self, decode_from: int) -> Places | None:
        """Return the places to go on from, and forget those before them."""
        now = self._assigner.place if self._assigner else self._place
        while self._places and self._places[0][0] < decode_from:
            self._places.popleft()
        at = self._places[0][1] if self._places else now
        return Places(at, now) if self._places or now else None


def _is_recovery_point(codec: CodecParameters, packet: Any) -> bool:
    """Return whether a keyframe is one of H.264 after which pictures may still refer to what precedes it."""
    if codec.name != "h264":
        return False
    data = bytes(packet)
    if codec.extradata[:1] != AVCC:
        found = FIRST_SLICE.search(data)
        return found is not None and data[found.end() - 1] & 31 != IDR
    size, at = (codec.extradata[4] & 3) + 1, 0
    while at + size < len(data):
        kind = data[at + size] & 31
        if 1 <= kind <= IDR:
            return kind != IDR
        at += size + int.from_bytes(data[at : at + size], "big")
    return False


def _watch(run: _Run, packet: Any) -> list[Any]:
    """Return the frames that a packet brings out.

    Raises `UnmaskError` (DECODE_FAILED) with what FFmpeg says of errors, unless the run's start explains it.
    """
    leads = packet.pts is not None and run.leads(packet.pts)
    if leads:
        run.open_until = run.packets + OPEN_START_PACKETS
    with _said() as said:
        frames: list[Any] = run.context.decode(packet)
    explained = DISMISSED * (run.packets <= run.open_until) + UNKNOWN_REFERENCES * leads
    for _, name, message in said:
        if not message.startswith(explained):
            kind = _NoReferenceError if message.startswith(UNKNOWN_REFERENCES) else UnmaskError
            raise kind(Code.DECODE_FAILED, f"{name}: {message.strip()}")
    return frames


class _NoReferenceError(UnmaskError):
    """A picture refers to what was never decoded: the stream keeps its standard, this start is none."""


@contextmanager
def _said() -> Iterator[list[tuple[int, str, str]]]:
    """Collect FFmpeg's messages on errors, of any thread: a decoder has its process to itself."""
    level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_skip_repeated(False)
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture(local=False) as said:
            yield said
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skips)


def _open(codec: CodecParameters, threads: int, strict: bool) -> Any:
    """Return a decoder context for the codec. Raises `UnmaskError` (DECODE_FAILED) if there is none."""
    try:
        context: Any = av.CodecContext.create(codec.name, "r")
    except (ValueError, LookupError) as error:
        sentence = f"codec {codec.name!r} is not known here; FFmpeg's names are (h264, hevc, vp9, av1)"
        raise UnmaskError(Code.DECODE_FAILED, sentence) from error
    if codec.extradata:
        context.extradata = codec.extradata
    context.thread_count = threads
    # FRAME threads hold back as many frames as there are threads, and have deadlocked (PyAV #1962).
    context.thread_type = "SLICE" if threads > 1 else "NONE"
    options = {"max_pixels": str(MAX_PIXELS), **QP_OPTIONS}
    if codec.name == "h264" and codec.extradata[:2] != AVCC_BASELINE:
        # Encoders that do not say how far they reorder: FFmpeg would guess, lose a frame at every start, and
        # learn. Now it holds back as many as the level allows; those that say so are not affected.
        options["strict"] = "strict"
    if strict:
        options["err_detect"] = "crccheck+explode"
    context.options = options
    return context
