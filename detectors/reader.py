"""From pictures to readings of the faces in them: detection, quality, crops, the logits of every member."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.crops import CropPolicy, crop, is_loose, recrop, to_tensor
from detectors.members import Member
from detectors.mtcnn import MtcnnDetector
from detectors.quality import QualityLimits, measure
from detectors.readings import Box, Detection, FaceReading, Image, Landmarks, Quality
from engines.engine import Engine

CROP_SEARCH_PX = 256
"""Longer side at which an already cropped face is looked for its margins: the face is large in it anyway."""

UNKNOWN = (math.nan, math.nan)
NO_LANDMARKS: Landmarks = (UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN)
"""Of a face that came already cropped: nobody looked for its eyes."""


@dataclass(frozen=True, slots=True)
class _Face:
    """One face on its way to the members; `inputs` holds its uint8 (S, S, 3) crop for each policy."""

    detection: Detection
    quality: Quality
    inputs: Mapping[CropPolicy, Image]


class FaceReader:
    """Reads every face in a batch of pictures with every member.

    `engines` maps member names to the engine that runs them. Of a picture at most `max_faces` faces are read,
    the largest; the others are counted in `faces_cut_off`. Members see at most `batch` crops at once.
    `deterministic` takes every picture and every crop by itself, so that a reading depends on its picture
    alone and not on what happened to come along with it (DESIGN 3.5: a fixed batch size, here one).

    One reader belongs to one thread at a time. Raises `ValueError` without members, and for a member without
    an engine.
    """

    def __init__(
        self,
        detector: MtcnnDetector,
        members: Sequence[Member],
        engines: Mapping[str, Engine],
        limits: QualityLimits,
        max_faces: int,
        batch: int,
        deterministic: bool,
    ) -> None:
        if not members:
            raise ValueError("no members; at least one is needed to read faces")
        for member in members:
            if member.name not in engines:
                raise ValueError(
                    f"member {member.name} has no engine; there are: {', '.join(engines) or 'none'}"
                )
        self._detector = detector
        self._members = tuple(members)
        self._engines = engines
        self._limits = limits
        self._max_faces = max_faces
        self._batch = 1 if deterministic else batch
        self._deterministic = deterministic
        self._policies = tuple(dict.fromkeys(member.policy for member in members))
        self.faces_cut_off = 0

    @property
    def engine(self) -> str:
        """Names of the engines in use, joined by "+"."""
        return "+".join(dict.fromkeys(self._engines[member.name].name for member in self._members))

    @property
    def precision(self) -> str:
        """Their precisions, joined by "+"."""
        return "+".join(dict.fromkeys(self._engines[member.name].precision for member in self._members))

    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        """Return for each frame its faces, largest first; boxes and landmarks in full-resolution pixels.

        A frame is (picture in full resolution, the same picture reduced), both uint8 (H, W, 3) RGB. Faces are
        sought in the reduced one, cropped and judged in the full one. Readings share no memory with them.
        """
        found = self._detect(frames)
        faces = [
            self._face(image, face)
            for (image, _), faces_of in zip(frames, found, strict=True)
            for face in faces_of
        ]
        readings = iter(self._score(faces))
        return [tuple(next(readings) for _ in faces_of) for faces_of in found]

    def read_crops(self, crops: Sequence[Image]) -> list[FaceReading]:
        """Return a reading of each already cropped face, uint8 (H, W, 3) RGB of any size, in order.

        A face with a margin about it is cut anew as each member wants it (`detectors.crops.recrop`: loose
        crops of 25 clips rose from AUC .83 to .92 so, tight ones stay as they are); of a crop that is not
        square the middle square is used. Its detection is the face found, else the whole crop, at confidence
        1 with landmarks NaN; its pose is not judged.
        """
        found = self._detect([(picture, _reduced(picture)) for picture in crops])
        boxes = [faces[0].box if faces else None for faces in found]
        return self._score([self._cropped(*item) for item in zip(crops, boxes, strict=True)])

    def _detect(self, frames: Sequence[tuple[Image, Image]]) -> list[list[Detection]]:
        smalls = [small for _, small in frames]
        scales = [small.shape[1] / image.shape[1] for image, small in frames]
        if self._deterministic:
            found = [
                self._detector.detect([small], [scale])[0]
                for small, scale in zip(smalls, scales, strict=True)
            ]
        else:
            found = self._detector.detect(smalls, scales)
        self.faces_cut_off += sum(max(0, len(faces) - self._max_faces) for faces in found)
        return [
            [_enlarged(face, image, small) for face in faces[: self._max_faces]]
            for (image, small), faces in zip(frames, found, strict=True)
        ]

    def _face(self, image: Image, face: Detection) -> _Face:
        return _Face(
            face,
            measure(image, face.box, face.landmarks, self._limits),
            {policy: crop(image, face.box, policy) for policy in self._policies},
        )

    def _cropped(self, picture: Image, found: Box | None) -> _Face:
        height, width = picture.shape[:2]
        loose = found is not None and any(is_loose(picture, found, policy) for policy in self._policies)
        box = found if found is not None and loose else (0.0, 0.0, float(width), float(height))
        return _Face(
            Detection(box, NO_LANDMARKS, 1.0),
            measure(picture, box, None, self._limits),
            {policy: recrop(picture, found, policy) for policy in self._policies},
        )

    def _score(self, faces: Sequence[_Face]) -> list[FaceReading]:
        if not faces:
            return []
        outputs = {member.name: self._run(member, faces) for member in self._members}
        first = self._members[0]
        return [
            _reading(
                face,
                {name: float(logits[k]) for name, (logits, _) in outputs.items()},
                face.inputs[first.policy],
                outputs[first.name][1][k],
            )
            for k, face in enumerate(faces)
        ]

    def _run(self, member: Member, faces: Sequence[_Face]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the member's logits (M,) and attention maps (M, h, w) for all faces, batch by batch."""
        engine = self._engines[member.name]
        parts = [
            engine(to_tensor(np.stack([face.inputs[member.policy] for face in part]), member.policy))
            for part in _parts(faces, self._batch)
        ]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _reading(
    face: _Face, logits: dict[str, float], picture: Image, attention: NDArray[np.float32]
) -> FaceReading:
    # copies: a reading outlives the frame and the batch it came from
    fused = math.fsum(logits.values()) / len(logits)
    return FaceReading(face.detection, face.quality, logits, fused, picture.copy(), attention.copy())


def _parts(faces: Sequence[_Face], size: int) -> Iterable[Sequence[_Face]]:
    return (faces[start : start + size] for start in range(0, len(faces), size))


def _reduced(picture: Image) -> Image:
    """Return a picture whose longer side is at most CROP_SEARCH_PX."""
    height, width = picture.shape[:2]
    scale = CROP_SEARCH_PX / max(height, width)
    if scale >= 1:
        return picture
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def _enlarged(face: Detection, image: Image, small: Image) -> Detection:
    """Return a face of the reduced picture in pixels of the full one."""
    x, y = image.shape[1] / small.shape[1], image.shape[0] / small.shape[0]
    x0, y0, x1, y1 = face.box
    a, b, c, d, e = ((px * x, py * y) for px, py in face.landmarks)
    return Detection((x0 * x, y0 * y, x1 * x, y1 * y), (a, b, c, d, e), face.confidence)
