"""How far the picture of one face can be believed. It only ever lowers confidence (SCIENCE D, remedy 1)."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors import advisory
from detectors.limits import QualityLimits
from detectors.readings import Box, Image, Landmarks, Quality, Reason

__all__ = ["QualityLimits", "measure", "pose", "reasons_of", "with_qp"]

FACE_HEIGHT = 160
"""Pixels to which larger faces are reduced before sharpness and noise are measured: members see no more.
Smaller ones stay as they are, because a small face is not blurred by being small."""
HALF_FLOOR, QUARTER_FLOOR = 0.5, 2.0
"""Added to the variances at half and at quarter size: what 8-bit noise has there. A face without any contrast
has then their ratio, and is dark or flat, not blurred."""
ADVISED_HEIGHT = 128
"""Pixels to which every face is brought before it is looked at for what it is (`detectors.advisory`)."""
INNER = 0.8
"""Share of the box, about its centre, that is measured: hair and background are not the face."""
BLOCK = 8
"""Side in pixels of the blocks in which JPEG, MPEG-2 and most of H.264 transform."""
SMALL_BLOCK = 4
"""Side of H.264's smallest transform: on its borders alone little is left at high compression."""
STEP_FLOOR = 1.0
"""Grey levels added to steps on and off the block grid, so that flat skin makes no ratio out of noise."""
NOISE_KERNEL = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
"""Second differences along both axes at once, which gradients, edges and lines leave at 0 (Immerkaer,
"Fast noise variance estimation", CVIU 1996)."""
NOISE_GAIN = 6 * 0.6745
"""Median of what the kernel makes of Gaussian noise of standard deviation 1, without its sign: the median,
because hair and lashes reach the mean."""
CHANGE_FLOOR = 0.05
"""Share added to the shares of changing pixels, for the same reason."""
SMALLEST = 16
"""Pixels of a side below which nothing can be measured: two blocks."""

NOSE_NEUTRAL = 0.54
"""Where the nose tip is between eye line and mouth line of a face looking ahead: median of 1,105 portraits,
FFHQ and LFW faces under MTCNN (5-95 %: .39-.70)."""
NOSE_PER_EYES = 0.48
"""How far the nose tip stands out of the plane of eyes and mouth, in distances between the pupils: 30 mm to
63 mm. With it 95 % of the same faces are within 27 degrees of yaw and 20 of pitch."""
NOSE_PER_HEIGHT = 0.45
"""The same in distances from eye line to mouth line (67 mm)."""


@dataclass(frozen=True, slots=True)
class _Rule:
    reason: Reason
    room: float
    """How well the limit is kept: 1 exactly, more is better, 2 or .5 times the limit are clear of it."""


ADVISED = 0.5
"""Room of a face that is covered or that an advisory speaks against: these are either silent or final, and
leave no weight."""


def measure(image: Image, box: Box, landmarks: Landmarks | None, limits: QualityLimits) -> Quality:
    """Return the quality of the face in `box` of the full-resolution picture.

    `image` is uint8 (H, W, 3) RGB; `landmarks` None (an already cropped face) leaves the pose unjudged. The
    weight falls smoothly from 1 (clear of every limit) through .5 (at the limit) to 0, by the worst part
    alone: small, blurred and blocky go together and must not count thrice.
    """
    parts = {"face_px": min(box[2] - box[0], box[3] - box[1])}
    grey, left, top = _inner(image, box)
    if min(grey.shape) < SMALLEST:
        return _judged(parts, limits)
    height = box[3] - box[1]
    seen = _scaled(grey, min(1.0, FACE_HEIGHT / height))
    parts["sharpness"] = _sharpness(seen)
    parts["brightness"] = float(grey.mean())
    parts["noise"] = _noise(seen)
    parts["blockiness"] = _blockiness(grey, left, top)
    parts["grid"] = _grid(grey, left, top)
    parts |= advisory.parts(grey, _scaled(grey, ADVISED_HEIGHT / height))
    if landmarks is not None:
        parts["yaw"], parts["pitch"], parts["roll"] = pose(landmarks)
    return _judged(parts, limits)


def reasons_of(parts: Mapping[str, float], limits: QualityLimits) -> tuple[Reason, ...]:
    """Return why a face with these parts, as `measure` and `with_qp` tell them, is not decided upon.

    A face of which too little is seen has `face_px` alone, and is small whatever that says.
    """
    return tuple(dict.fromkeys(rule.reason for rule in _rules(parts, limits) if rule.room < 1))


def with_qp(quality: Quality, qp: float | None, limits: QualityLimits) -> Quality:
    """Return the quality of the same face with the quantiser of its picture (0..51) taken into account.

    None (the codec does not tell) and a face of which nothing was measured change nothing.
    """
    if qp is None or "sharpness" not in quality.parts:
        return quality
    return _judged({**quality.parts, "qp": qp}, limits)


def with_covered(quality: Quality, covered: float, limits: QualityLimits) -> Quality:
    """Return the quality of the same face with `covered`: how surely what is looked at is hidden, 0..1.

    Up to the limit nothing else of it changes.
    """
    return _judged({**quality.parts, "covered": covered}, limits)


def pose(landmarks: Landmarks) -> tuple[float, float, float]:
    """Return yaw, pitch and roll in degrees of a head with these landmarks, in closed form.

    Yaw > 0: the nose points to the right of the picture; pitch > 0: up; roll > 0: clockwise. Taken from where
    the nose tip lies between eyes and mouth under weak perspective, with the proportions of an average head:
    good to some ten degrees, which is what five points from MTCNN allow.
    """
    left_eye, right_eye, nose, left_mouth, right_mouth = (complex(*point) for point in landmarks)
    across = right_eye - left_eye
    eyes = abs(across)
    if eyes == 0:
        return 90.0, 0.0, 0.0
    upright = across.conjugate() / eyes
    middle = (left_eye + right_eye) / 2
    tip = (nose - middle) * upright
    mouth = ((left_mouth + right_mouth) / 2 - middle) * upright
    height = max(mouth.imag, 0.1 * eyes)
    aside = tip.real - NOSE_NEUTRAL * mouth.real
    above = NOSE_NEUTRAL * height - tip.imag
    yaw = math.atan2(aside, NOSE_PER_EYES * eyes)
    pitch = math.atan2(above, NOSE_PER_HEIGHT * height)
    roll = math.atan2(across.imag, across.real)
    return math.degrees(yaw), math.degrees(pitch), math.degrees(roll)


def _judged(parts: dict[str, float], limits: QualityLimits) -> Quality:
    weight = min(_smooth(rule.room - 0.5) for rule in _rules(parts, limits))
    return Quality(weight, parts, reasons_of(parts, limits))


def _rules(parts: Mapping[str, float], limits: QualityLimits) -> Iterator[_Rule]:
    if "sharpness" not in parts:
        yield _Rule(Reason.SMALL_FACE, 0.0)
        return
    yield _Rule(Reason.SMALL_FACE, _at_least(parts["face_px"], limits.min_face_px))
    yield _Rule(Reason.BLUR, _at_least(parts["sharpness"], limits.min_sharpness))
    yield _Rule(Reason.LOW_LIGHT, _at_least(parts["brightness"], limits.min_brightness))
    yield _Rule(Reason.LOW_LIGHT, _at_most(parts["noise"], limits.max_noise))
    yield _Rule(Reason.COMPRESSION, _at_most(parts["blockiness"] - 1, limits.max_blockiness - 1))
    yield _Rule(Reason.COMPRESSION, _at_most(parts["grid"] - 1, limits.max_grid - 1))
    if "qp" in parts:
        yield _Rule(Reason.COMPRESSION, _at_most(parts["qp"], limits.max_qp))
    if "yaw" in parts:
        yield _Rule(Reason.POSE, _at_most(abs(parts["yaw"]), limits.max_yaw_deg))
        yield _Rule(Reason.POSE, _at_most(abs(parts["pitch"]), limits.max_pitch_deg))
    if limits.max_covered and parts.get("covered", 0.0) > limits.max_covered:
        yield _Rule(Reason.OCCLUSION, ADVISED)
    if limits.max_moire and parts.get("moire", 0.0) > limits.max_moire:
        yield _Rule(Reason.SCREEN_IN_PICTURE, ADVISED)
    if limits.max_flat_colour and parts["flat_colour"] > limits.max_flat_colour:
        yield _Rule(Reason.NOT_A_PERSON, ADVISED)
    if parts["skin_detail"] < limits.min_skin_detail:
        yield _Rule(Reason.EDITED, ADVISED)


def _at_least(value: float, limit: float) -> float:
    return value / limit if limit > 0 else 2.0


def _at_most(value: float, limit: float) -> float:
    if value <= 0:
        return 2.0
    return 2 - value / limit if limit > 0 else 0.0


def _smooth(share: float) -> float:
    """Return 0 below 0, 1 above 1 and a smooth rise between (.5 at .5)."""
    x = min(max(share, 0.0), 1.0)
    return x * x * (3 - 2 * x)


def _inner(image: Image, box: Box) -> tuple[NDArray[np.uint8], int, int]:
    """Return the grey picture of the inner face, cut at the picture's border, and where its corner lies."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box
    margin = (1 - INNER) / 2
    left = min(max(round(x0 + margin * (x1 - x0)), 0), width)
    right = min(max(round(x1 - margin * (x1 - x0)), left), width)
    top = min(max(round(y0 + margin * (y1 - y0)), 0), height)
    bottom = min(max(round(y1 - margin * (y1 - y0)), top), height)
    if right == left or bottom == top:
        return np.empty((0, 0), dtype=np.uint8), left, top
    grey: NDArray[np.uint8] = cv2.cvtColor(
        np.ascontiguousarray(image[top:bottom, left:right]), cv2.COLOR_RGB2GRAY
    )
    return grey, left, top


def _scaled(grey: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    size = (max(round(grey.shape[1] * scale), 3), max(round(grey.shape[0] * scale), 3))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    face: NDArray[np.uint8] = cv2.resize(grey, size, interpolation=way)
    return face


def _sharpness(face: NDArray[np.uint8]) -> float:
    """Return the Laplacian's variance at half size to that at quarter size.

    Blur takes the finer of two octaves first, whatever the face's contrast; reducing the picture moves both
    alike. The finest octave of all says less: it is sensor noise as often as detail.
    """
    half, quarter = (_scaled(face, share).astype(np.float32) for share in (0.5, 0.25))
    fine, coarse = (float(cv2.Laplacian(octave, cv2.CV_32F).var()) for octave in (half, quarter))
    return (fine + HALF_FLOOR) / (coarse + QUARTER_FLOOR)


def _noise(face: NDArray[np.uint8]) -> float:
    """Return the noise's standard deviation to that of all grey levels.

    Little light leaves noise, or little contrast against it, or both; the ratio sees either.
    """
    levels = face.astype(np.float32)
    left = np.abs(cv2.filter2D(levels, cv2.CV_32F, NOISE_KERNEL)[1:-1, 1:-1])
    return float(np.median(left)) / NOISE_GAIN / max(float(levels.std()), 1.0)


def _blockiness(grey: NDArray[np.uint8], left: int, top: int) -> float:
    """Return the mean over both directions of (step on the block grid) / (step elsewhere)."""
    levels = grey.astype(np.float32)
    return (_step_ratio(levels, left) + _step_ratio(levels.T, top)) / 2


def _step_ratio(levels: NDArray[np.float32], start: int) -> float:
    steps = np.abs(np.diff(levels, axis=1)).mean(axis=0)
    on_grid = (np.arange(start + 1, start + 1 + len(steps)) % BLOCK) == 0
    return float((steps[on_grid].mean() + STEP_FLOOR) / (steps[~on_grid].mean() + STEP_FLOOR))


def _grid(grey: NDArray[np.uint8], left: int, top: int) -> float:
    """Return how much more often something changes across borders of 8 px blocks than of 4 px ones.

    What changes is the mixed second difference, which edges and gradients along an axis leave at 0. Where a
    codec predicts whole blocks and adds nothing, it is 0 inside of them and not across their borders.
    """
    levels = grey.astype(np.int16)
    mixed = levels[1:, 1:] - levels[1:, :-1] - levels[:-1, 1:] + levels[:-1, :-1]
    changes = mixed != 0
    return _border_ratio(changes, left, top, BLOCK) / _border_ratio(changes, left, top, SMALL_BLOCK)


def _border_ratio(changes: NDArray[np.bool_], left: int, top: int, side: int) -> float:
    """Return (share of changes across borders of blocks of `side` px) / (share within)."""
    rows = np.arange(top + 1, top + 1 + changes.shape[0]) % side == 0
    columns = np.arange(left + 1, left + 1 + changes.shape[1]) % side == 0
    across = rows[:, None] | columns
    return float((changes[across].mean() + CHANGE_FLOOR) / (changes[~across].mean() + CHANGE_FLOOR))
