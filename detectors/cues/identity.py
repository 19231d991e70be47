"""Who a face looks like: drift within a track, the same person again after a cut, a claim that does not hold.

An embedding (`detectors.cues.embedding`) is a direction; 1 - cosine of two is their distance, 0 for the same
look, about 1 for two people (Schroff et al., "FaceNet"; SCIENCE E). Embeddings are kept in memory only, of a
bounded number of faces, and leave it in no record.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from detectors.cues import Cue, missing
from detectors.readings import Box, FaceReading

Embedding = NDArray[np.float32]
"""float32 [512], length 1."""

IDENTITY, CLAIM = "identity", "claim"

HALF = 8
"""Looks at either end of a track that are compared: their mean takes out expression and pose."""

LEAST = 4
"""Looks in each of the two before they are compared: a mean of fewer is mostly noise."""

CLAIM_LEAST = 4
"""Looks before a face is compared with the person that it is said to be."""

LINK = 0.4
"""Distance up to which a new track is the person of an earlier one. In FaceNet's published evaluation two
pictures are of one person up to a squared distance of 1.242, a cosine distance of .62; stricter here, since a
wrong link mixes two people and a missed one costs nothing. Not measured here."""

MISMATCH = 0.62
"""Distance from which on a face does not look like who it is said to be: FaceNet's own, see LINK."""

FORGET_US = 600_000_000
"""Media time after which a person who left is forgotten (ten minutes): re-linking is for cuts and breaks."""

MOST = 32
"""People remembered on one feed."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """Who is said to be on a feed: name and embeddings [K, 512] of that person, or why there are none."""

    name: str
    embeddings: NDArray[np.float32] | None
    reason: str = ""

    def distance(self, mean: Embedding) -> float:
        """Distance to the nearest enrolled picture, 0..2. Raises ValueError without embeddings."""
        if self.embeddings is None:
            raise ValueError(f"claim: {self.name} has no embeddings: {self.reason}")
        return float(1 - (self.embeddings @ mean).max())


@dataclass(slots=True)
class _Seen:
    """One track's looks: its first ones, its last ones, and how many there were."""

    first: list[Embedding] = field(default_factory=list)
    last: deque[Embedding] = field(default_factory=lambda: deque(maxlen=HALF))
    looks: int = 0
    largest: list[Embedding] = field(default_factory=list)
    """Looks while it was the largest face of its picture, at most HALF."""
    person: int | None = None
    seen_us: int = 0

    def add(self, embedding: Embedding, media_us: int) -> None:
        if len(self.first) < HALF:
            self.first.append(embedding)
        self.last.append(embedding)
        self.looks += 1
        self.seen_us = media_us

    def halves(self) -> tuple[list[Embedding], list[Embedding]] | None:
        """The begin and the end of the track, without a look in common; None of fewer than 2 * LEAST."""
        if self.looks < 2 * LEAST:
            return None
        size = min(HALF, self.looks // 2)
        return self.first[:size], list(self.last)[-size:]


@dataclass(frozen=True, slots=True, eq=False)
class _Left:
    """A person who is not on screen."""

    person: int
    mean: Embedding
    seen_us: int


class People:
    """Who is who on one feed. Pure: the same calls give the same answers. Used by one thread.

    Only faces that are good enough to be decided on are looked at: a blurred one looks like nobody.
    """

    def __init__(self, claimed: Claimed | None = None, drift: bool = True) -> None:
        """`claimed`: who is said to be on the feed. `drift`: whether the cue identity is wanted."""
        self._claimed = claimed
        self._drift = drift
        self._tracks: dict[int, _Seen] = {}
        self._left: list[_Left] = []
        self._next = 0

    def look(
        self, media_us: int, ids: Sequence[int], faces: Sequence[FaceReading]
    ) -> tuple[FaceReading, ...]:
        """Take the faces of one picture, with the tracks they belong to; return them with their cues and
        without their embeddings."""
        largest = max(range(len(faces)), key=lambda k: _area(faces[k].detection.box), default=-1)
        told = []
        for index, (track_id, face) in enumerate(zip(ids, faces, strict=True)):
            seen = self._tracks.setdefault(track_id, _Seen(seen_us=media_us))
            if face.embedding is not None and not face.quality.reasons:
                seen.add(face.embedding, media_us)
                if index == largest and len(seen.largest) < HALF:
                    seen.largest.append(face.embedding)
                if seen.person is None and seen.looks >= LEAST:
                    seen.person = self._recognised(seen, media_us)
            given = {cue.name for cue in face.cues}
            own = tuple(cue for cue in self._cues(seen) if cue.name not in given)
            told.append(replace(face, cues=(*face.cues, *own), embedding=None))
        return tuple(told)

    def end(self, ids: Sequence[int]) -> None:
        """Take leave of tracks that ended; their people may come back."""
        for track_id in ids:
            seen = self._tracks.pop(track_id, None)
            if seen is None or seen.person is None:
                continue
            self._left = [left for left in self._left if left.person != seen.person]
            self._left.append(_Left(seen.person, _mean(list(seen.last)), seen.seen_us))
            self._left = self._left[-MOST:]

    def person(self, track_id: int) -> int | None:
        """Number of the person that a track shows, by order of appearance; None while nobody can tell."""
        seen = self._tracks.get(track_id)
        return None if seen is None else seen.person

    def claim(self, track_id: int) -> tuple[str, bool] | None:
        """Who a track is said to be, and whether it looks like that person; None while nobody can tell."""
        seen = self._tracks.get(track_id)
        if seen is None or self._claimed is None:
            return None
        distance = self._claim(self._claimed, seen).value
        return None if distance is None else (self._claimed.name, distance < MISMATCH)

    def _cues(self, seen: _Seen) -> list[Cue]:
        cues = [self._drifted(seen)] if self._drift else []
        return cues if self._claimed is None else [*cues, self._claim(self._claimed, seen)]

    def _drifted(self, seen: _Seen) -> Cue:
        halves = seen.halves()
        if halves is None:
            return missing(IDENTITY, f"fewer than {2 * LEAST} good looks at this face")
        begin, end = halves
        return Cue(IDENTITY, float(1 - _mean(begin) @ _mean(end)))

    def _claim(self, claimed: Claimed, seen: _Seen) -> Cue:
        if claimed.embeddings is None:
            return missing(CLAIM, claimed.reason)
        if len(seen.largest) < CLAIM_LEAST:
            return missing(CLAIM, f"fewer than {CLAIM_LEAST} good looks at it as the largest face")
        return Cue(CLAIM, claimed.distance(_mean(seen.largest)))

    def _recognised(self, seen: _Seen, media_us: int) -> int:
        """The person of a track that was just seen well enough: one who left and looks like it, else a new
        one."""
        mean = _mean(seen.first)
        self._left = [left for left in self._left if media_us - left.seen_us <= FORGET_US]
        near = [(float(1 - left.mean @ mean), left) for left in self._left]
        distance, found = min(near, key=lambda pair: pair[0], default=(1.0, None))
        if found is not None and distance <= LINK:
            self._left.remove(found)
            return found.person
        self._next += 1
        return self._next - 1


def _mean(embeddings: Sequence[Embedding]) -> Embedding:
    """The mean direction, of length 1."""
    total = np.stack(embeddings).astype(np.float64).sum(axis=0)
    return np.asarray(total / max(float(np.linalg.norm(total)), 1e-12), np.float32)


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
