"""What decoders hand to the rest of detect, in order per stream (DESIGN 3.3, 3.9)."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from detectors.readings import FaceReading, Image
from stream.errors import Code
from stream.foreign import Places
from stream.records import ChunkMeta

if TYPE_CHECKING:  # decoders read these records too, and need nothing of the cues
    from detectors.cues.series import FaceLook
    from detectors.cues.voice import Window


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


class Use(Enum):
    """What a picture is wanted for."""

    JUDGED = "judged"
    """Faces are found and read: the ordinary sampling."""
    BOTH = "both"
    """The same, within a burst at full rate: the faces found are followed from here."""
    FOLLOWED = "followed"
    """In a burst, beside the ordinary sampling: landmarks only; no member sees it, no score tells of it."""


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
    """A shot cut lies between the previous frame of the ordinary sampling and this one."""
    release: Callable[[], None]
    qp: float | None = None
    """Mean quantiser of the picture on H.264's scale, 0..51; None: the codec does not tell."""
    use: Use = Use.JUDGED


@dataclass(frozen=True, slots=True)
class Sound:
    """What a chunk sounds like, within a burst: `samples` int16 [N], mono at 16 kHz, from `media_us` on."""

    offset: int
    meta: ChunkMeta
    media_us: int
    samples: NDArray[np.int16]


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


DecoderEvent = SampledFrame | Sound | Applied | Failed


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
    picture: bytes | None = None
    """A small JPEG of it, now and then (`stream.glimpses`)."""


@dataclass(frozen=True, slots=True)
class FollowedFrame:
    """One picture of a burst: `looks` at the faces of the sampled frame before, in its order; of that frame
    itself if `seeded`. `seconds` is the device time it took."""

    stream: str
    attachment: str
    epoch: int
    pts: int
    media_us: int
    cut: bool
    seeded: bool
    looks: "tuple[FaceLook | None, ...]"
    seconds: float


@dataclass(frozen=True, slots=True)
class HeardSound:
    """What was heard within a burst, and the device time that took."""

    stream: str
    windows: "tuple[Window, ...]"
    seconds: float
