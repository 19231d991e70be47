"""Follows faces from one sampled picture to the next.

Sampled pictures lie .1 to .5 s apart, so a face may have left its last box: it is sought where it was and
where its motion would have taken it, by overlap and, failing that, by distance.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from detectors.readings import Box

REACH = 0.6
"""Distance between centres, in mean face sides, up to which faces that do not overlap enough may be the same.
Half a second between samples: a head turning or swaying moves about half its size; two people's faces beside
each other are more than one size apart."""
GROWTH = 1.6
"""Largest ratio of sides between two samples of one face: nobody comes that much nearer in half a second."""
SMOOTHING = 0.5
"""Share of the newest step in a track's velocity: one step alone is mostly the detector's jitter."""
HORIZON_S = 0.5
"""Seconds for which motion is believed to go on. Heads turn back; afterwards the face is expected to rest."""


@dataclass(frozen=True, slots=True)
class Track:
    """One face being followed. Velocity is of the box centre, in pixels a second."""

    track_id: int
    box: Box
    seen_us: int
    velocity: tuple[float, float] = (0.0, 0.0)

    def expected(self, media_us: int) -> Box:
        """Return where the face should be at that time if its motion went on."""
        dt = min((media_us - self.seen_us) / 1e6, HORIZON_S)
        dx, dy = self.velocity[0] * dt, self.velocity[1] * dt
        x0, y0, x1, y1 = self.box
        return x0 + dx, y0 + dy, x1 + dx, y1 + dy

    def moved(self, box: Box, media_us: int) -> "Track":
        """Return the track after the face was found again in `box`."""
        dt = (media_us - self.seen_us) / 1e6
        if dt <= 0:
            return replace(self, box=box)
        (ax, ay), (bx, by) = _centre(self.box), _centre(box)
        old_x, old_y = self.velocity
        velocity = (
            old_x + SMOOTHING * ((bx - ax) / dt - old_x),
            old_y + SMOOTHING * ((by - ay) / dt - old_y),
        )
        return Track(self.track_id, box, media_us, velocity)


class Tracker:
    """The faces of one stream. Pure: the same calls give the same ids, whatever else runs.

    `min_iou` in 0..1 is the overlap at which two boxes are the same face whatever else lies near; a face not
    found for more than `lost_s` seconds of media time is gone, and coming back it is a new track. Ids count
    upwards and are never given twice. `ended` lists the ids that ended in the last call, ascending.
    """

    def __init__(self, min_iou: float = 0.3, lost_s: float = 2.0) -> None:
        self._min_iou = min_iou
        self._lost_us = round(lost_s * 1e6)
        self._tracks: list[Track] = []
        self._next_id = 0
        self._now_us: int | None = None
        self.ended: list[int] = []

    @property
    def active(self) -> tuple[int, ...]:
        """Ids of the tracks being followed, ascending."""
        return tuple(track.track_id for track in self._tracks)

    def update(self, media_us: int, boxes: Sequence[Box], cut: bool) -> list[int]:
        """Return the track id of each box of the picture at `media_us`; `cut` ends all tracks before it.

        Raises `ValueError` when media time steps back.
        """
        if self._now_us is not None and media_us < self._now_us:
            raise ValueError(f"media time {media_us} us is before {self._now_us} us; it must not step back")
        self._now_us = media_us
        alive = [] if cut else [t for t in self._tracks if media_us - t.seen_us <= self._lost_us]
        self._end_all_but(alive)
        owners = self._owners(media_us, alive, boxes)
        found = [
            owners[index].moved(box, media_us) if index in owners else self._born(box, media_us)
            for index, box in enumerate(boxes)
        ]
        matched = {track.track_id for track in owners.values()}
        waiting = [track for track in alive if track.track_id not in matched]
        self._tracks = sorted(found + waiting, key=lambda track: track.track_id)
        return [track.track_id for track in found]

    def end_all(self) -> list[int]:
        """End every track (a new epoch, the end of the stream) and return their ids, ascending."""
        self._end_all_but([])
        self._tracks = []
        return self.ended

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, ready for JSON."""
        return {
            "tracks": [asdict(track) for track in self._tracks],
            "next_id": self._next_id,
            "now_us": self._now_us,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`, also one that went through JSON."""
        self._tracks = [
            Track(t["track_id"], _four(t["box"]), t["seen_us"], (t["velocity"][0], t["velocity"][1]))
            for t in state["tracks"]
        ]
        self._next_id = state["next_id"]
        self._now_us = state["now_us"]
        self.ended = []

    def _born(self, box: Box, media_us: int) -> Track:
        track = Track(self._next_id, box, media_us)
        self._next_id += 1
        return track

    def _end_all_but(self, alive: Sequence[Track]) -> None:
        kept = {track.track_id for track in alive}
        self.ended = [track.track_id for track in self._tracks if track.track_id not in kept]

    def _owners(self, media_us: int, tracks: Sequence[Track], boxes: Sequence[Box]) -> dict[int, Track]:
        """Return which track each box index belongs to, the best pairs first."""
        pairs: list[tuple[float, int, int, Track]] = []
        for track in tracks:
            places = (track.expected(media_us), track.box)
            for index, box in enumerate(boxes):
                closeness = max(self._closeness(place, box) for place in places)
                if closeness > 0:
                    pairs.append((-closeness, track.track_id, index, track))
        owners: dict[int, Track] = {}
        taken: set[int] = set()
        for _, track_id, index, track in sorted(pairs, key=lambda pair: pair[:3]):
            if track_id in taken or index in owners:
                continue
            owners[index] = track
            taken.add(track_id)
        return owners

    def _closeness(self, place: Box, box: Box) -> float:
        """Return 0 for boxes that cannot be one face, else more the closer they are.

        Enough overlap (1 to 2) always comes before mere nearness (0 to 1).
        """
        sides = _side(place), _side(box)
        if min(sides) <= 0 or max(sides) > GROWTH * min(sides):
            return 0.0
        overlap = _iou(place, box)
        if overlap >= self._min_iou:
            return 1 + overlap
        (ax, ay), (bx, by) = _centre(place), _centre(box)
        apart = math.hypot(bx - ax, by - ay) / ((sides[0] + sides[1]) / 2)
        return max(0.0, 1 - apart / REACH)


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _side(box: Box) -> float:
    """Return the side of the square of the same area, 0 for an empty box."""
    return math.sqrt(max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0))


def _iou(a: Box, b: Box) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    shared = wide * high
    return shared / (_side(a) ** 2 + _side(b) ** 2 - shared)


def _four(values: Sequence[float]) -> Box:
    x0, y0, x1, y1 = values
    return x0, y0, x1, y1
