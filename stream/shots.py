"""Shot cuts, found in a thumbnail of every decoded frame (a cut ends tracks, DESIGN 3.5).

Two pictures are compared by the correlation of their thumbnails, which exposure changes and fades leave
alone; where it is low, once more with one of them shifted, so that pans and shaking cameras are not cuts.
A frame is a cut if it resembles none of the frames just before it (so the end of a flash is none), by more
than the shot's own recent motion explains.
"""

from collections import deque
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

Luma = NDArray[np.uint8]
"""A thumbnail: uint8, shape (HEIGHT, WIDTH), luma."""

WIDTH, HEIGHT = 48, 27
"""Large enough to tell two talking heads apart, small enough to cost little beside decoding."""

SHIFT = 2
"""Thumbnail pixels that a picture may move between two frames: 4 % of the width, a picture width a second."""

SIMILAR = 0.1
"""Below this distance the shifted comparison is not made: it could only make it smaller."""

REFERENCES = 4
"""Frames looked back at: a camera flash lasts 1 to 3 frames."""

ACTIVITY = 8
"""Frames whose median change says how much the shot moves: a third of a second."""

HISTORY = ACTIVITY + 1
"""A decision depends on this many frames before it and nothing else: a restart has to decode them again."""

CALM, GAIN, HIGHEST = 0.2, 6.0, 0.42
"""A cut is a distance above min(CALM + GAIN * activity, HIGHEST). Measured at this thumbnail size on ten
clips of talking heads: at most 0.08 between neighbours of calm clips and 0.35 in a shaken one; of 650 splices
of clips, many of the same people in the same rooms, 619 are found. A lower CALM would take flashes that burn
out half of the picture for cuts; a higher one misses cuts, which mixes people up and costs more."""

FLAT = 5.0
"""Grey levels of standard deviation below which a thumbnail (black, white, fog) has nothing to compare."""


def thumbnail(frame: av.VideoFrame) -> Luma:
    """Return the thumbnail of a frame: about 40 us, where decoding a 720p frame takes 2 ms.

    Planar formats give their first plane (luma, or green), thinned before it is averaged; others (packed
    camera formats, palettes) go through the scaler.
    """
    first = frame.format.components[0]
    planar = frame.format.is_planar or len(frame.format.components) == 1
    if not planar or frame.format.has_palette or frame.format.is_bit_stream or first.bits > 16:
        return _scaled(frame)
    plane: Any = frame.planes[0]
    deep = first.bits > 8
    samples: NDArray[Any] = np.frombuffer(plane, np.uint16 if deep else np.uint8)
    rows = samples.reshape(plane.height, -1)[:, : plane.width]
    thin = rows[:: max(1, plane.height // (3 * HEIGHT)), :: max(1, plane.width // (3 * WIDTH))]
    if deep:
        thin = thin >> (first.bits - 8)
    small: Luma = cv2.resize(
        np.ascontiguousarray(thin, dtype=np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA
    )
    return small


def _scaled(frame: av.VideoFrame) -> Luma:
    grey = frame.reformat(WIDTH, HEIGHT, "gray", interpolation="AREA", threads=1)
    plane: Any = grey.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(HEIGHT, plane.line_size)
    small: Luma = np.ascontiguousarray(rows[:, :WIDTH])
    return small


class _Picture:
    """A thumbnail and its normalised form; `unit` is None when it is flat."""

    __slots__ = ("luma", "unit")

    def __init__(self, luma: Luma) -> None:
        self.luma = luma
        centred = luma.ravel().astype(np.float32)
        centred -= centred.mean()
        norm = float(np.sqrt(centred @ centred))
        self.unit = centred / norm if norm >= FLAT * np.sqrt(luma.size) else None

    def distance(self, other: "_Picture") -> float:
        """Return 1 - correlation, in 0..2, the smallest over shifts; 0 if either is flat."""
        if self.unit is None or other.unit is None:
            return 0.0
        plain = 1.0 - float(self.unit @ other.unit)
        if plain <= SIMILAR:
            return plain
        inner = self.luma[SHIFT:-SHIFT, SHIFT:-SHIFT]
        best = float(cv2.matchTemplate(other.luma, inner, cv2.TM_CCOEFF_NORMED).max())
        return min(plain, 1.0 - best)


class ShotDetector:
    """Takes the thumbnails of one unbroken run of frames in presentation order."""

    def __init__(self) -> None:
        self._recent: deque[_Picture] = deque(maxlen=REFERENCES)
        self._changes: deque[float] = deque(maxlen=ACTIVITY)

    def add(self, luma: Luma) -> bool:
        """Return whether a cut lies between the frame before and this one; the first of a run is none."""
        picture = _Picture(luma)
        cut = self._is_cut(picture)
        if self._recent:
            self._changes.append(picture.distance(self._recent[-1]))
        self._recent.append(picture)
        return cut

    def _is_cut(self, picture: _Picture) -> bool:
        if picture.unit is None or not self._recent:
            return False
        structured = [past for past in reversed(self._recent) if past.unit is not None]
        if not structured:
            # A shot that comes out of black or white is a new one, however much it looks like the last.
            return len(self._recent) == REFERENCES
        activity = float(np.median(self._changes)) if self._changes else 0.0
        threshold = min(CALM + GAIN * activity, HIGHEST)
        return all(picture.distance(past) > threshold for past in structured)
