"""Follows faces through the pictures of a burst at full rate: landmarks only, no detector and no member.

Where the detector looked (a sampled picture) the faces it found are taken up; in the pictures between, each
is sought where its mesh was in the one before. The largest faces only: the others keep their ordinary
sampling.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detectors.cues.landmarks import LandmarkModel, Mesh, Region, region_of
from detectors.cues.ratios import ratios
from detectors.cues.series import FaceLook, look_of
from detectors.cues.voice import VoiceActivity, Window
from detectors.readings import Detection, Image

MOST_FACES = 2
"""Faces of a picture that are followed, the largest: each costs some 8 ms a picture on one core."""

MOST_STREAMS = 64
"""Streams remembered; bursts share half of a device, so that hardly more than a few run at a time."""

Looks = tuple[FaceLook | None, ...]
"""Of each face of the last sampled picture, in its order, as far as followed; None where it was lost."""


class Follower:
    """Used by the thread that owns the device; streams are told apart by name.

    `hearing` makes the voice activity of one stream; None: no sound is wanted. `with_points`, `with_ratios`:
    what to take beside eyes and mouth.
    """

    def __init__(
        self,
        model: LandmarkModel,
        hearing: Callable[[], VoiceActivity] | None,
        with_points: bool,
        with_ratios: bool,
    ) -> None:
        self._model = model
        self._hearing = hearing
        self._with_points = with_points
        self._with_ratios = with_ratios
        self._regions: OrderedDict[str, list[Region | None]] = OrderedDict()
        self._ears: OrderedDict[str, VoiceActivity] = OrderedDict()
        # Made now: loading a network takes a second, in which the device would stand still.
        self._spare = [hearing()] if hearing is not None else []

    @property
    def hears(self) -> bool:
        """Whether sound is wanted."""
        return self._hearing is not None

    def seed(self, stream: str, image: Image, faces: Sequence[Detection]) -> Looks:
        """Take up the faces that the detector found in a sampled picture, largest first."""
        return self._look(stream, image, [region_of(face) for face in faces[:MOST_FACES]], self._with_ratios)

    def follow(self, stream: str, image: Image) -> Looks:
        """Look at the same faces in the next picture; nothing where none were taken up."""
        return self._look(stream, image, self._regions.get(stream, []), False)

    def hear(self, stream: str, media_us: int, samples: NDArray[np.int16]) -> list[Window]:
        """Return the windows of sound that these samples complete (`VoiceActivity.hear`)."""
        if self._hearing is None:
            return []
        if stream not in self._ears:
            self._ears[stream] = self._spare.pop() if self._spare else self._hearing()
            _bound(self._ears)
        return self._ears[stream].hear(media_us, samples)

    def drop(self, stream: str) -> None:
        """Forget a stream: its burst is over, or the picture was cut."""
        self._regions.pop(stream, None)
        ear = self._ears.pop(stream, None)
        if ear is not None:
            ear.forget()
            self._spare.append(ear)

    def _look(self, stream: str, image: Image, regions: Sequence[Region | None], measured: bool) -> Looks:
        meshes = [None if region is None else self._model.look(image, region) for region in regions]
        self._regions[stream] = [None if mesh is None else mesh.region() for mesh in meshes]
        self._regions.move_to_end(stream)
        _bound(self._regions)
        return tuple(None if mesh is None else self._numbers(image, mesh, measured) for mesh in meshes)

    def _numbers(self, image: Image, mesh: Mesh, measured: bool) -> FaceLook:
        return look_of(mesh, self._with_points, ratios(image, mesh.points) if measured else None)


def _bound(kept: OrderedDict[str, Any]) -> None:
    while len(kept) > MOST_STREAMS:
        kept.popitem(last=False)
