"""Epochs and media time: where timestamps are continuous, and what they mean (DESIGN 3.2, 3.3).

Decisions, all taken packet by packet from timestamps alone, so that they do not depend on chunking:

- A new epoch starts when timestamps fall back or leap ahead, or when the caller says that the codec
  parameters changed. Decoders and tracks end there.
- A timestamp that wraps (2^33 in MPEG-TS, 2^32 in FLV and RTP) is carried on beyond the wrap and starts no
  epoch: around the wrap packets with B-frames straddle it, and a decoder that began anew in the middle of a
  group of pictures would lose frames. FFmpeg unwraps the first wrap itself, not the later ones.
- `first_pts` is the pts of the epoch's first video packet. Leading pictures of an open GOP may come before
  it, by at most that packet's pts - dts (16 frames if dts is unknown); the anchor leaves that much room after
  the end of the epoch before, so media time never steps back across epochs. Within one it may by less than
  MIN_BACK_S, where a source's own timestamps do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any, Self

from stream.records import Kind

MIN_BACK_S = 1.0
"""Smaller steps back are jitter of bad muxers (RTMP relays, cameras), not a new publisher."""

KEY_BACK_S = 0.2
"""At a keyframe a smaller step is believed: a publisher may restart within its first second, and beginning
anew at a keyframe loses nothing."""

REORDER_FRAMES = 16
"""H.264 and HEVC reorder at most 16 pictures: at low frame rates that is more than MIN_BACK_S."""

LIVE_LEAP_S = 10.0
"""How far timestamps of a live stream may run ahead of the wall clock's advance before it is a jump; HLS
delivers whole segments at once, 10 s covers the usual ones."""

FILE_LEAP_S = 60.0
"""Files may show one picture for long (slides); the time line of their container is to be believed."""

WRAPS = (1 << 33, 1 << 32)

DEFAULT_STEP = Fraction(1, 25)
"""Frame duration of streams that carry neither timestamps nor durations (raw elementary streams)."""


class Cause(StrEnum):
    """Why an epoch began."""

    FIRST = "first"
    BACKWARD = "backward"
    FORWARD = "forward"
    PARAMETERS = "parameters"


@dataclass(frozen=True, slots=True)
class Epoch:
    """One stretch of continuous timestamps. `anchor_us` is the media time of `first_pts`."""

    number: int
    anchor_us: int
    first_pts: int
    time_base: Fraction
    cause: Cause

    def media_us(self, pts: int) -> int:
        """Return the media time of `pts` in microseconds UTC."""
        return self.anchor_us + int((pts - self.first_pts) * self.time_base * 1_000_000)


@dataclass(frozen=True, slots=True)
class Times:
    """What a video packet says of time, in `time_base` units; pts, dts, duration None if unknown."""

    pts: int | None
    dts: int | None
    duration: int | None
    time_base: Fraction
    keyframe: bool
    hidden: bool
    """Decoded for reference only, not shown (MP4 edit lists)."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Where a packet belongs: `pts` is never None and runs on beyond wraps; `duration` 0 if unknown."""

    epoch: Epoch
    pts: int
    dts: int | None
    duration: int


class Epochs:
    """State machine of one attachment: one `step` per video packet in decode order.

    `attach_us`: media time at which a file begins. `not_before_us`: end of the previous attachment's media
    time; this attachment's never lies before it.
    """

    def __init__(self, kind: Kind, attach_us: int, not_before_us: int = 0) -> None:
        self._kind = kind
        self._attach_us = attach_us
        self._end_us = self._floor_us = not_before_us
        self._epoch: Epoch | None = None
        self._offset = 0
        self._dts: int | None = None
        self._max_pts: int | None = None
        self._capture_us = 0
        self._step = 0

    @property
    def current(self) -> Epoch | None:
        return self._epoch

    @property
    def end_us(self) -> int:
        """Media time at which the last frame seen so far ends (microseconds UTC)."""
        return self._end_us

    @property
    def reached(self) -> int | None:
        """Where the next packet continues what was seen (decode time, units of the epoch); None at first."""
        last = self._dts if self._dts is not None else self._max_pts
        return None if last is None else last + self._step

    def state(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        epoch = self._epoch
        return {
            "kind": self._kind.value,
            "attach_us": self._attach_us,
            "end_us": self._end_us,
            "floor_us": self._floor_us,
            "number": None if epoch is None else epoch.number,
            "anchor_us": None if epoch is None else epoch.anchor_us,
            "first_pts": None if epoch is None else epoch.first_pts,
            "time_base": None if epoch is None else str(epoch.time_base),
            "cause": None if epoch is None else epoch.cause.value,
            "offset": self._offset,
            "dts": self._dts,
            "max_pts": self._max_pts,
            "capture_us": self._capture_us,
            "step": self._step,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Self:
        """Return what goes on from a `state()` that may have been through JSON."""
        made = cls(Kind(state["kind"]), state["attach_us"])
        made._end_us, made._floor_us = state["end_us"], state["floor_us"]
        if state["number"] is not None:
            base, cause = Fraction(state["time_base"]), Cause(state["cause"])
            made._epoch = Epoch(state["number"], state["anchor_us"], state["first_pts"], base, cause)
        made._offset, made._dts, made._max_pts = state["offset"], state["dts"], state["max_pts"]
        made._capture_us, made._step = state["capture_us"], state["step"]
        return made

    def step(self, times: Times, capture_us: int, changed: bool) -> Stamp:
        """Place one packet. `changed`: decoding must begin anew with it."""
        pts, dts = self._unwrap(times)
        cause = self._cause(pts, dts, times, capture_us, changed)
        if cause is not None:
            self._offset, self._dts, self._max_pts, self._step = 0, None, None, 0
            pts, dts = times.pts, times.dts
        self._step = (
            times.duration or self._advance(dts) or self._step or round(DEFAULT_STEP / times.time_base)
        )
        shown = self._shown(pts, dts)
        epoch = self._epoch if cause is None else self._begin(cause, shown, dts, times, capture_us)
        assert epoch is not None
        self._epoch = epoch
        self._dts = dts
        self._max_pts = shown if self._max_pts is None else max(self._max_pts, shown)
        self._capture_us = capture_us
        if not times.hidden:
            self._end_us = max(self._end_us, epoch.media_us(shown + self._step))
        return Stamp(epoch, shown, dts, self._step)

    def near_video(self, value: int, time_base: Fraction) -> int:
        """Return a timestamp of another stream, continued beyond a wrap if the video's was."""
        if self._epoch is None or self._max_pts is None:
            return value
        last = round(self._max_pts * self._epoch.time_base / time_base)
        return _continue(value, last, round(Fraction(LIVE_LEAP_S) / time_base))

    def _shown(self, pts: int | None, dts: int | None) -> int:
        """Return the pts, made up where the source gives none."""
        if pts is not None:
            return pts
        if dts is not None:
            return dts
        return 0 if self._max_pts is None else self._max_pts + self._step

    def _advance(self, dts: int | None) -> int:
        if dts is None or self._dts is None:
            return 0
        return max(0, dts - self._dts)

    def _unwrap(self, times: Times) -> tuple[int | None, int | None]:
        """Return pts and dts continued beyond a wrap of the source's counter."""
        last = self._dts if self._dts is not None else self._max_pts
        if last is None:
            return times.pts, times.dts
        near = round(Fraction(LIVE_LEAP_S) / times.time_base)
        pts, dts = (
            None if value is None else _continue(value + self._offset, last, near)
            for value in (times.pts, times.dts)
        )
        raw, continued = (times.dts, dts) if times.dts is not None else (times.pts, pts)
        if raw is not None and continued is not None:
            self._offset = continued - raw
        return pts, dts

    def _cause(
        self, pts: int | None, dts: int | None, times: Times, capture_us: int, changed: bool
    ) -> Cause | None:
        if self._epoch is None:
            return Cause.FIRST
        if changed:
            return Cause.PARAMETERS
        moved = self._moved(pts, dts)
        if moved is None:
            return None
        seconds = float(moved * times.time_base)
        if seconds < -self._back_limit(dts, times) or self._below_floor(pts, dts, times):
            return Cause.BACKWARD
        if self._leaps(seconds, times.keyframe, capture_us):
            return Cause.FORWARD
        return None

    def _moved(self, pts: int | None, dts: int | None) -> int | None:
        if dts is not None and self._dts is not None:
            return dts - self._dts
        value = pts if pts is not None else dts
        if value is None or self._max_pts is None:
            return None
        return value - self._max_pts

    def _back_limit(self, dts: int | None, times: Times) -> float:
        if times.keyframe:
            return KEY_BACK_S
        if dts is not None and self._dts is not None:
            return MIN_BACK_S
        return max(MIN_BACK_S, float(REORDER_FRAMES * self._step * times.time_base))

    def _below_floor(self, pts: int | None, dts: int | None, times: Times) -> bool:
        """Return whether even jitter would show the picture before the end of the previous epoch."""
        assert self._epoch is not None
        return not times.hidden and self._epoch.media_us(self._shown(pts, dts)) < self._floor_us

    def _leaps(self, seconds: float, keyframe: bool, capture_us: int) -> bool:
        if self._kind is Kind.FILE:
            return keyframe and seconds > FILE_LEAP_S
        return seconds - (capture_us - self._capture_us) / 1e6 > LIVE_LEAP_S

    def _begin(self, cause: Cause, shown: int, dts: int | None, times: Times, capture_us: int) -> Epoch:
        first_pts = max(shown, 0) if times.hidden else shown
        lead = max(0, first_pts - dts) if dts is not None else REORDER_FRAMES * self._step
        self._floor_us = self._end_us
        after = self._end_us + int(lead * times.time_base * 1_000_000) + 1
        number = 0 if self._epoch is None else self._epoch.number + 1
        return Epoch(number, max(self._wanted(capture_us), after), first_pts, times.time_base, cause)

    def _wanted(self, capture_us: int) -> int:
        if self._kind is Kind.LIVE:
            return capture_us
        return self._attach_us if self._epoch is None else 0


def _continue(value: int, last: int, near: int) -> int:
    """Return `value`, or what it would be without a wrap if that is within `near` of `last`."""
    for wrap in WRAPS:
        for candidate in (value + wrap, value - wrap):
            if abs(candidate - last) <= near < abs(value - last):
                return candidate
    return value
