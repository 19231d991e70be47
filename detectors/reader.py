"""From pictures to readings of the faces in them: detection, quality, crops, the logits of every member."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

import cv2
import numpy as np
from torch import Tensor

from detectors.crops import CropPolicy, crop, is_loose, recrop, to_tensor
from detectors.members import Member
from detectors.mtcnn import MtcnnDetector
from detectors.quality import QualityLimits, measure
from detectors.readings import Box, Detection, FaceReading, Image, Landmarks, Quality
from engines.engine import Engine, Output

logger = logging.getLogger(__name__)

T = TypeVar("T")

CROP_SEARCH_PX = 256
"""Longer side at which an already cropped face is looked for its margins: the face is large in it anyway."""

ANY_SIZE = 64
"""A size at which the framing of two crop policies is compared: the same square, whatever its pixels."""

UNKNOWN = (math.nan, math.nan)
NO_LANDMARKS: Landmarks = (UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN)
"""Of a face that came already cropped: nobody looked for its eyes."""


class Role(StrEnum):
    """What a member is asked for: `VOTER` reads every face and is fused; `HEAVY` reads those that `deepen` is
    called for, and is fused then; `SHADOW` reads every face and is recorded, never fused."""

    VOTER = "voter"
    HEAVY = "heavy"
    SHADOW = "shadow"


@dataclass(frozen=True, slots=True)
class Runner:
    """A member on the engine that runs it."""

    member: Member
    engine: Engine
    role: Role = Role.VOTER


@dataclass(frozen=True, slots=True)
class Usage:
    """What one member did since the start: `faces` read in `seconds` of the reading thread, by the clock.

    `off`: a shadow that failed, and is asked no more.
    """

    name: str
    role: Role
    faces: int = 0
    seconds: float = 0.0
    off: bool = False


@dataclass(frozen=True, slots=True)
class _Face:
    """One face on its way to the members; `inputs` holds its uint8 (S, S, 3) crop for each policy."""

    detection: Detection
    quality: Quality
    inputs: Mapping[CropPolicy, Image]


class FaceReader:
    """Reads every face in a batch of pictures with every member.

    `fuse` makes one logit of the members' raw ones by name; heavy members may be absent
    (`detectors.ensemble.Ensemble.fuse`). Of a picture at most `max_faces` faces are read, the largest; the
    others are counted in `faces_cut_off`. Members see at most `batch` crops at once; members with the same
    crop policy share the crops and the tensors made of them. `deterministic` takes every picture and every
    crop by itself, so that a reading depends on its picture alone and not on what happened to come along with
    it (DESIGN 3.5: a fixed batch size, here one). `clock` counts seconds.

    A shadow that fails, or gives a number that is not finite, is switched off; readings go on without it.

    One reader belongs to one thread at a time; `usage` may be asked from any. Raises `ValueError` without
    voters, and for a name that comes twice.
    """

    def __init__(
        self,
        detector: MtcnnDetector,
        runners: Sequence[Runner],
        fuse: Callable[[Mapping[str, float]], float],
        limits: QualityLimits,
        max_faces: int,
        batch: int,
        deterministic: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        names = [runner.member.name for runner in runners]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise ValueError(f"member {min(doubled)} is there twice; once is right")
        self._voters = [runner for runner in runners if runner.role is Role.VOTER]
        self._heavy = [runner for runner in runners if runner.role is Role.HEAVY]
        self._shadows = [runner for runner in runners if runner.role is Role.SHADOW]
        if not self._voters:
            raise ValueError("no members; at least one that reads every face is needed")
        self._usage = {runner.member.name: Usage(runner.member.name, runner.role) for runner in runners}
        self._detector = detector
        self._fuse = fuse
        self._limits = limits
        self._max_faces = max_faces
        self._batch = 1 if deterministic else batch
        self._deterministic = deterministic
        self._clock = clock
        self._policies = _policies([*self._voters, *self._shadows])
        self._alike = [
            runner.member.name
            for runner in self._voters
            if runner.member.policy.at_size(ANY_SIZE) == self._voters[0].member.policy.at_size(ANY_SIZE)
        ]
        self.faces_cut_off = 0

    @property
    def engine(self) -> str:
        """Names of the engines of all members with a say, joined by "+"."""
        return "+".join(dict.fromkeys(runner.engine.name for runner in self._voters + self._heavy))

    @property
    def precision(self) -> str:
        """Their precisions, joined by "+"."""
        return "+".join(dict.fromkeys(runner.engine.precision for runner in self._voters + self._heavy))

    @property
    def has_heavy(self) -> bool:
        """Whether `deepen` adds anything."""
        return bool(self._heavy)

    def usage(self) -> tuple[Usage, ...]:
        """Return what each member did, in the order they were given."""
        return tuple(self._usage.values())

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

    def deepen(self, image: Image, faces: Sequence[FaceReading]) -> tuple[FaceReading, ...]:
        """Return the readings of one picture with the heavy members' logits added and all fused anew.

        `image` is the full-resolution picture that they were read in. Faces that are not good enough to be
        decided upon are left as they are: no network makes them so. Raises what a member's engine raises, and
        `ValueError` for a number that is not finite.
        """
        chosen = [index for index, face in enumerate(faces) if not face.quality.reasons]
        policies = _policies(self._heavy)
        deeper = list(faces)
        for part in _parts(chosen, self._batch):
            crops = [
                {policy: crop(image, faces[index].detection.box, policy) for policy in policies}
                for index in part
            ]
            outputs = self._outputs(self._heavy, _tensors(crops))
            for name, (found, _) in outputs.items():
                if not np.isfinite(found).all():
                    raise ValueError(f"heavy member {name} gives numbers that are not finite")
            for k, index in enumerate(part):
                logits = faces[index].logits | {name: float(out[0][k]) for name, out in outputs.items()}
                deeper[index] = replace(faces[index], logits=logits, fused=self._fuse(logits))
        return tuple(deeper)

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
        # not by the shadows' policies: they have no say in what is judged
        wanted = _policies(self._voters)
        loose = found is not None and any(is_loose(picture, found, policy) for policy in wanted)
        box = found if found is not None and loose else (0.0, 0.0, float(width), float(height))
        return _Face(
            Detection(box, NO_LANDMARKS, 1.0),
            measure(picture, box, None, self._limits),
            {policy: recrop(picture, found, policy) for policy in self._policies},
        )

    def _score(self, faces: Sequence[_Face]) -> list[FaceReading]:
        readings: list[FaceReading] = []
        first = self._voters[0].member
        for part in _parts(faces, self._batch):
            tensors = _tensors([face.inputs for face in part])
            outputs = self._outputs(self._voters, tensors)
            shadow = self._shadowed(tensors)
            for k, face in enumerate(part):
                logits = {name: float(out[0][k]) for name, out in outputs.items()}
                # copies: a reading outlives the frame and the batch it came from
                reading = FaceReading(
                    detection=face.detection,
                    quality=face.quality,
                    logits=logits,
                    fused=self._fuse(logits),
                    crop=face.inputs[first.policy].copy(),
                    attention=outputs[first.name][1][k].copy(),
                    shadow={name: float(out[0][k]) for name, out in shadow.items()},
                    maps={name: outputs[name][1][k].copy() for name in self._alike},
                )
                readings.append(reading)
        return readings

    def _outputs(self, runners: Sequence[Runner], tensors: Mapping[CropPolicy, Tensor]) -> dict[str, Output]:
        """Return each member's logits (N,) and attention maps (N, h, w) for the faces of one batch."""
        return {runner.member.name: self._run(runner, tensors[runner.member.policy]) for runner in runners}

    def _run(self, runner: Runner, faces: Tensor) -> Output:
        begun = self._clock()
        output = runner.engine(faces)
        used = self._usage[runner.member.name]
        seconds = used.seconds + self._clock() - begun
        self._usage[used.name] = replace(used, faces=used.faces + len(faces), seconds=seconds)
        return output

    def _shadowed(self, tensors: Mapping[CropPolicy, Tensor]) -> dict[str, Output]:
        """Return what the shadows say; one that cannot say anything is switched off for good."""
        outputs: dict[str, Output] = {}
        for runner in tuple(self._shadows):
            try:
                output = self._run(runner, tensors[runner.member.policy])
                if not np.isfinite(output[0]).all():
                    raise ValueError("its logit is no number")
            except Exception as error:  # nothing that a shadow does may cost a reading
                self._switch_off(runner, error)
            else:
                outputs[runner.member.name] = output
        return outputs

    def _switch_off(self, runner: Runner, error: Exception) -> None:
        name = runner.member.name
        self._usage[name] = replace(self._usage[name], off=True)
        self._shadows.remove(runner)
        self._policies = _policies([*self._voters, *self._shadows])
        logger.error("shadow member %s is switched off: %s", name, " ".join(str(error).split()))


def _policies(runners: Iterable[Runner]) -> tuple[CropPolicy, ...]:
    return tuple(dict.fromkeys(runner.member.policy for runner in runners))


def _tensors(crops: Sequence[Mapping[CropPolicy, Image]]) -> dict[CropPolicy, Tensor]:
    """Return for each policy the crops of a batch (at least one) as one input."""
    return {policy: to_tensor(np.stack([face[policy] for face in crops]), policy) for policy in crops[0]}


def _parts(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


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
