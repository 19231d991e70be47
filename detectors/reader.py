"""From pictures to readings of the faces in them: detection, quality, crops, the logits of every member."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from detectors.crops import CropPolicy, crop, is_loose, recrop, to_tensor
from detectors.members import Member
from detectors.mtcnn import MtcnnDetector
from detectors.occlusion import POLICY, Hidden, shipped_estimate
from detectors.quality import QualityLimits, measure, with_covered
from detectors.readings import Box, Detection, FaceReading, Image, Landmarks, Quality, Visible
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
    called for, and is fused then; `SHADOW` reads every face and is recorded, never fused; `HALF` reads those
    whose other half is hidden, and speaks for them instead of all voters."""

    VOTER = "voter"
    HEAVY = "heavy"
    SHADOW = "shadow"
    HALF = "half"


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
    visible: Visible


class FaceReader:
    """Reads every face in a batch of pictures with every member.

    `fuse` makes one logit of the members' raw ones by name; heavy members may be absent
    (`detectors.ensemble.Ensemble.fuse`). Of a picture at most `max_faces` faces are read, the largest; the
    others are counted in `faces_cut_off`. Members see at most `batch` crops at once; members with the same
    crop policy share the crops and the tensors made of them. `deterministic` takes every picture and every
    crop by itself, so that a reading depends on its picture alone and not on what happened to come along with
    it (DESIGN 3.5: a fixed batch size, here one). `clock` counts seconds.

    Unless `limits.max_covered` is 0, each face is asked which half of it is hidden (`detectors.occlusion`).
    Where one is, and a member of role HALF reads the other, that member's raw logit is `fused`; where none
    does, or both halves are hidden, the reason is OCCLUSION and the voters' logits stand as they would.

    A shadow that fails, or gives a number that is not finite, is switched off; readings go on without it.

    One reader belongs to one thread at a time; `usage` may be asked from any. Raises `ValueError` without
    voters, for a name that comes twice, and for a member of role HALF that reads whole faces or the same half
    as another; `OcclusionError` for a broken estimate.
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
        self._halves = _by_half([runner for runner in runners if runner.role is Role.HALF])
        self._estimate = shipped_estimate() if limits.max_covered else None
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
        self._policies = self._wanted()
        self._alike = [
            runner.member.name
            for runner in self._voters
            if runner.member.policy.at_size(ANY_SIZE) == self._voters[0].member.policy.at_size(ANY_SIZE)
        ]
        self.faces_cut_off = 0

    @property
    def engine(self) -> str:
        """Names of the engines of all members with a say, joined by "+"."""
        return "+".join(dict.fromkeys(runner.engine.name for runner in self._with_a_say))

    @property
    def precision(self) -> str:
        """Their precisions, joined by "+"."""
        return "+".join(dict.fromkeys(runner.engine.precision for runner in self._with_a_say))

    @property
    def has_heavy(self) -> bool:
        """Whether `deepen` adds anything."""
        return bool(self._heavy)

    @property
    def _with_a_say(self) -> list[Runner]:
        return [*self._voters, *self._heavy, *self._halves.values()]

    def _wanted(self) -> tuple[CropPolicy, ...]:
        """Every framing that a face is cut in as soon as it is found."""
        return _policies([*self._voters, *self._halves.values(), *self._shadows])

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
        chosen = [index for index, face in enumerate(faces) if not face.quality.reasons and not face.half]
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
        hidden = None if self._estimate is None else self._estimate(crop(image, face.box, POLICY))
        quality, visible = self._seen(measure(image, face.box, face.landmarks, self._limits), hidden)
        inputs = {policy: crop(image, face.box, policy) for policy in self._policies}
        return _Face(face, quality, inputs, visible)

    def _cropped(self, picture: Image, found: Box | None) -> _Face:
        height, width = picture.shape[:2]
        # not by the shadows' policies: they have no say in what is judged
        wanted = _policies(self._voters)
        loose = found is not None and any(is_loose(picture, found, policy) for policy in wanted)
        box = found if found is not None and loose else (0.0, 0.0, float(width), float(height))
        hidden = None if self._estimate is None else self._estimate(recrop(picture, found, POLICY))
        quality, visible = self._seen(measure(picture, box, None, self._limits), hidden)
        inputs = {policy: recrop(picture, found, policy) for policy in self._policies}
        return _Face(Detection(box, NO_LANDMARKS, 1.0), quality, inputs, visible)

    def _seen(self, quality: Quality, hidden: Hidden | None) -> tuple[Quality, Visible]:
        """The quality, with how surely is hidden what its members look at, and what can be seen; nothing
        changes of one that is seen whole."""
        if hidden is None or "sharpness" not in quality.parts:
            return quality, Visible.BOTH
        visible = hidden.visible(self._limits.max_covered)
        if visible is Visible.BOTH:
            return quality, visible
        if visible in self._halves:
            covered = hidden.upper if visible is Visible.UPPER else hidden.lower
        else:
            covered = max(hidden.upper, hidden.lower)
        return with_covered(quality, covered, self._limits), visible

    def _score(self, faces: Sequence[_Face]) -> list[FaceReading]:
        readings: list[FaceReading] = []
        first = self._voters[0].member
        for part in _parts(faces, self._batch):
            tensors = _tensors([face.inputs for face in part])
            outputs = self._outputs(self._voters, tensors)
            shadow = self._shadowed(tensors)
            halves = self._halved(part)
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
                    visible=face.visible,
                )
                readings.append(halves[k](reading) if k in halves else reading)
        return readings

    def _halved(self, faces: Sequence[_Face]) -> dict[int, Callable[[FaceReading], FaceReading]]:
        """By place in the batch, what the member for a face's visible half makes of its reading."""
        made: dict[int, Callable[[FaceReading], FaceReading]] = {}
        for visible, runner in self._halves.items():
            places = [k for k, face in enumerate(faces) if face.visible is visible]
            if not places:
                continue
            policy, name = runner.member.policy, runner.member.name
            logits, maps = self._run(
                runner, to_tensor(np.stack([faces[k].inputs[policy] for k in places]), policy)
            )
            for k, logit, attention in zip(places, map(float, logits), maps, strict=True):
                made[k] = partial(
                    _read_by, name, logit, attention.copy() if self._framed_alike(policy) else None
                )
        return made

    def _framed_alike(self, policy: CropPolicy) -> bool:
        """Whether a map of this framing lies over the crop that is kept, the first voter's."""
        return policy.at_size(ANY_SIZE) == self._voters[0].member.policy.at_size(ANY_SIZE)

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
        self._policies = self._wanted()
        logger.error("shadow member %s is switched off: %s", name, " ".join(str(error).split()))


def _by_half(runners: Sequence[Runner]) -> dict[Visible, Runner]:
    halves: dict[Visible, Runner] = {}
    for runner in runners:
        half = runner.member.half
        if half is None:
            raise ValueError(
                f"half member {runner.member.name} reads whole faces; one that reads half is right"
            )
        if half in halves:
            raise ValueError(
                f"half members {halves[half].member.name} and {runner.member.name} both read the {half} "
                "half; one is right"
            )
        halves[half] = runner
    return halves


def _read_by(
    name: str, logit: float, attention: NDArray[np.float32] | None, reading: FaceReading
) -> FaceReading:
    """A covered face's reading as the member for its visible half has it; voters' logits stay recorded."""
    read = replace(reading, fused=logit, logits=reading.logits | {name: logit}, half=name)
    return read if attention is None else replace(read, attention=attention, maps={name: attention})


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
