"""How far the picture of one face can be believed. It only ever lowers confidence (SCIENCE D, remedy 1)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.readings import Box, Image, Landmarks, Quality, Reason

FACE_HEIGHT = 128
"""Height in pixels to which every face is brought before its sharpness is measured: a Laplacian variance
depends on the scale, and members see faces of about this size."""
CONTRAST = 1000.0
"""Grey variance (a standard deviation of 32 levels, that of a well-lit face) to which sharpness is referred,
so that a dark face is not also called blurred: a third of the light cuts the plain figure by ten."""
CONTRAST_FLOOR = 25.0
"""Grey variance added before dividing: what 8-bit noise has on a face without any contrast."""
INNER = 0.8
"""Share of the box, about its centre, that is measured: hair and background are not the face."""
BLOCK = 8
"""Side in pixels of the blocks in which JPEG, MPEG-2 and most of H.264 transform."""
STEP_FLOOR = 1.0
"""Grey levels added to steps on and off the block grid, so that flat skin makes no ratio out of noise."""
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
class QualityLimits:
    """Beyond a limit a face is not decided upon, with the reason. A lower limit of 0 never bites.

    Set so that of authentic faces 99 % (300 portraits and FFHQ), 94 % (300 LFW) and 93 % (350 DFDC crops of
    `val`) keep all of them; the percentiles below are of these.
    """

    min_face_px: float = 64.0
    """Pixels of the shorter side. 99 % of the crops that members learn from come from above 74."""
    min_sharpness: float = 25.0
    """Laplacian variance at `FACE_HEIGHT` and `CONTRAST`. 5th percentiles: portraits 222, LFW 24, DFDC 31;
    medians after a blur of sigma 2, which makes authentic faces score as manipulated: 28, 11, 22."""
    min_brightness: float = 30.0
    """Mean grey level. 1st and 5th percentile of DFDC 19 and 32, of LFW 77 and 88. Kept low because dark
    skin in fair light must pass."""
    max_blockiness: float = 2.0
    """Steps on the block grid to steps off it; 1 is no grid. 99th percentiles 1.2, 1.3, 1.5; medians after
    JPEG 30, 20, 10 of DFDC: 1.7, 2.1, 3.0. H.264 smooths its block edges away: two clips encoded at CRF 47
    had a median of 1.06, and on seven neither flatness nor high frequencies told CRF 47 from the original.
    Such a picture is only noticed once it is blurred."""
    max_yaw_deg: float = 45.0
    """99th percentile of LFW 41."""
    max_pitch_deg: float = 35.0
    """99th percentile of LFW 25."""


@dataclass(frozen=True, slots=True)
class _Rule:
    reason: Reason
    room: float
    """How well the limit is kept: 1 exactly, more is better, 2 or .5 times the limit are clear of it."""


def measure(image: Image, box: Box, landmarks: Landmarks | None, limits: QualityLimits) -> Quality:
    """Return the quality of the face in `box` of the full-resolution picture.

    `image` is uint8 (H, W, 3) RGB; `landmarks` None (an already cropped face) leaves the pose unjudged. The
    weight falls smoothly from 1 (clear of every limit) through .5 (at the limit) to 0, by the worst part
    alone: small, blurred and blocky go together and must not count thrice.
    """
    parts = {"face_px": min(box[2] - box[0], box[3] - box[1])}
    grey, left, top = _inner(image, box)
    if min(grey.shape) < SMALLEST:
        return Quality(0.0, parts, (Reason.SMALL_FACE,))
    parts["sharpness"] = _sharpness(grey, box[3] - box[1])
    parts["brightness"] = float(grey.mean())
    parts["blockiness"] = _blockiness(grey, left, top)
    if landmarks is not None:
        parts["yaw"], parts["pitch"], parts["roll"] = pose(landmarks)
    rules = list(_rules(parts, limits))
    reasons = dict.fromkeys(rule.reason for rule in rules if rule.room < 1)
    return Quality(min(_smooth(rule.room - 0.5) for rule in rules), parts, tuple(reasons))


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


def _rules(parts: dict[str, float], limits: QualityLimits) -> Iterator[_Rule]:
    yield _Rule(Reason.SMALL_FACE, _at_least(parts["face_px"], limits.min_face_px))
    yield _Rule(Reason.BLUR, _at_least(parts["sharpness"], limits.min_sharpness))
    yield _Rule(Reason.LOW_LIGHT, _at_least(parts["brightness"], limits.min_brightness))
    excess, allowed = parts["blockiness"] - 1, limits.max_blockiness - 1
    yield _Rule(Reason.COMPRESSION, _at_most(excess, allowed))
    if "yaw" in parts:
        yield _Rule(Reason.POSE, _at_most(abs(parts["yaw"]), limits.max_yaw_deg))
        yield _Rule(Reason.POSE, _at_most(abs(parts["pitch"]), limits.max_pitch_deg))


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


def _sharpness(grey: NDArray[np.uint8], box_height: float) -> float:
    scale = FACE_HEIGHT / box_height
    size = (max(round(grey.shape[1] * scale), 3), max(round(grey.shape[0] * scale), 3))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    face = cv2.resize(grey, size, interpolation=way).astype(np.float32)
    return float(cv2.Laplacian(face, cv2.CV_32F).var() * CONTRAST / (face.var() + CONTRAST_FLOOR))


def _blockiness(grey: NDArray[np.uint8], left: int, top: int) -> float:
    """Return the mean over both directions of (step on the block grid) / (step elsewhere)."""
    levels = grey.astype(np.float32)
    return (_step_ratio(levels, left) + _step_ratio(levels.T, top)) / 2


def _step_ratio(levels: NDArray[np.float32], start: int) -> float:
    steps = np.abs(np.diff(levels, axis=1)).mean(axis=0)
    on_grid = (np.arange(start + 1, start + 1 + len(steps)) % BLOCK) == 0
    return float((steps[on_grid].mean() + STEP_FLOOR) / (steps[~on_grid].mean() + STEP_FLOOR))
