"""What decoders hand to the rest of detect, in order per stream (DESIGN 3.3, 3.9)."""

from collections.abc import Callable
from dataclasses import dataclass

from detectors.readings import FaceReading, Image
from stream.errors import Code
from stream.foreign import Places
from stream.records import ChunkMeta


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a decoder takes up a stream again: decode from there, emit only what is newer than `last_pts`.

    `epoch` None means nothing was ever emitted. `last_sample_us` is the media time of the last sampled
    frame (sampling decisions are state), None before the first.
    """

    attachment: str = ""
    epoch: int | None = None
    last_pts: int | None = None
    last_sample_us: int | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A range of media time of which nothing was scored, and why. `frames` None when unknown."""

    first_us: int
    last_us: int
    reason: str
    frames: int | None


@dataclass(frozen=True, slots=True)
class SampledFrame:
    """One sampled picture. `image` (full resolution) and `small` (reduced, for detection) are views into
    shared memory: they are valid until `release()` is called, once, by whoever is last to need them."""

    offset: int
    meta: ChunkMeta
    pts: int
    media_us: int
    image: Image
    small: Image
    cut: bool
    """A shot cut lies between the previous sampled frame and this one."""
    release: Callable[[], None]
    qp: float | None = None
    """Mean quantiser of the picture on H.264's scale, 0..51; None: the codec does not tell."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The record at `offset` is wholly applied: all its frames that could be emitted were emitted before.

    `decode_from` is the offset of the record holding the last keyframe whose leading pictures are all
    emitted, `last_pts` the last frame emitted or passed over in presentation order (None: none yet).
    `decoded`, `sampled`, `warmup` count frames since the previous `Applied`; `dropped` what was not scored.
    `meta` with `control` set is a control record, passed through in order.
    """

    offset: int
    meta: ChunkMeta
    control_body: bytes
    decode_from: int
    last_pts: int | None
    decoded: int
    sampled: int
    warmup: int
    dropped: tuple[Dropped, ...] = ()
    places: Places | None = None
    """Only of streams of other producers."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The record at `offset` could not be decoded; every chunk from `decode_from` through it is to be
    dead-lettered. The stream goes on at the next clean keyframe. Counts as applied."""

    offset: int
    meta: ChunkMeta | None
    decode_from: int
    code: Code
    sentence: str
    places: Places | None = None


DecoderEvent = SampledFrame | Applied | Failed


@dataclass(frozen=True, slots=True)
class ScoredFrame:
    """One sampled frame with every face in it read; `dropped` since the previous scored frame."""

    stream: str
    attachment: str
    epoch: int
    sequence: int
    offset: int
    pts: int
    media_us: int
    capture_us: int
    width: int
    height: int
    cut: bool
    late: bool
    faces: tuple[FaceReading, ...]
    engine: str
    precision: str
    qp: float | None = None
    """As in `SampledFrame`."""
