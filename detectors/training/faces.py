"""Where the face lies in a crop: five landmarks, and outlines drawn after them.

Blend masks need a face outline. Dense landmark models are trained on non-commercial data; the five points of
MTCNN are not enough for an outline, but enough to lay an average one on: an affine map from the average
points to the found ones carries the outline along, foreshortening of turned heads included.
"""

from enum import StrEnum
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.mtcnn import MtcnnDetector

Points = NDArray[np.float32]
"""float32 [5, 2]: left eye, right eye, nose, left and right mouth corner as seen, in pixels."""

AVERAGE = np.array([[-0.5, 0], [0.5, 0], [0, 0.5], [-0.42, 1.07], [0.42, 1.07]], np.float32)
"""The five points of an average face in distances between the pupils, their middle at 0: medians of the
authentic DFDC, LFW and FFHQ faces under MTCNN."""


class Pictures(Protocol):
    """Pictures uint8 [N, P, P, 3], in memory or read when asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> NDArray[np.uint8]: ...


PADDING = 0.5
"""A tight crop is searched with its border repeated by this share on each side: MTCNN wants surroundings."""


class Shape(StrEnum):
    """What part of a face a mask covers."""

    FACE = "face"
    LOW = "low"
    FEATURES = "features"
    MOUTH = "mouth"
    EYES = "eyes"
    BOX = "box"


OUTLINES: dict[Shape, NDArray[np.float32]] = {
    # to the middle of the forehead, as a hull of landmarks with raised brows
    Shape.FACE: np.array(
        [[-1.0, 0.0], [-0.95, -0.45], [-0.55, -0.85], [0, -0.95], [0.55, -0.85], [0.95, -0.45], [1.0, 0.0],
         [0.93, 0.75], [0.72, 1.3], [0.38, 1.68], [0, 1.78], [-0.38, 1.68], [-0.72, 1.3], [-0.93, 0.75]],
        np.float32,
    ),
    # from the brows down, as a hull of the usual 68 landmarks
    Shape.LOW: np.array(
        [[-1.0, 0.05], [-0.8, -0.4], [-0.4, -0.5], [0.4, -0.5], [0.8, -0.4], [1.0, 0.05],
         [0.93, 0.75], [0.72, 1.3], [0.38, 1.68], [0, 1.78], [-0.38, 1.68], [-0.72, 1.3], [-0.93, 0.75]],
        np.float32,
    ),
    # the hull of brows, eyes, nose and mouth
    Shape.FEATURES: np.array(
        [[-0.85, -0.3], [-0.4, -0.48], [0.4, -0.48], [0.85, -0.3], [0.8, 0.2], [0.62, 1.0], [0.35, 1.35],
         [-0.35, 1.35], [-0.62, 1.0], [-0.8, 0.2]],
        np.float32,
    ),
    Shape.MOUTH: np.array(
        [[-0.62, 1.0], [-0.35, 0.74], [0.35, 0.74], [0.62, 1.0], [0.42, 1.42], [0, 1.55], [-0.42, 1.42]],
        np.float32,
    ),
    Shape.EYES: np.array(
        [[-0.95, 0], [-0.8, -0.42], [0.8, -0.42], [0.95, 0], [0.75, 0.32], [-0.75, 0.32]], np.float32
    ),
    # the aligned square that live swappers paste back, eroded
    Shape.BOX: np.array([[-1.2, -0.8], [1.2, -0.8], [1.2, 1.6], [-1.2, 1.6]], np.float32),
}  # fmt: skip
"""Outlines about the average points, in the same units."""


def find_points(images: Pictures, detector: MtcnnDetector, batch: int = 16) -> NDArray[np.float32]:
    """Landmarks of one face in each of uint8 [N, P, P, 3]: float32 [N, 5, 2] in pixels, NaN where none is.

    Of several faces the largest counts.
    """
    side = images.shape[1]
    pad = round(PADDING * side)
    out = np.full((len(images), 5, 2), np.nan, np.float32)
    for start in range(0, len(images), batch):
        padded = [
            cv2.copyMakeBorder(np.ascontiguousarray(image), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
            for image in images[start : start + batch]
        ]
        for k, faces in enumerate(detector.detect(padded)):
            if faces:
                points = np.array(faces[0].landmarks, np.float32) - pad
                out[start + k] = points if plausible(points, side) else np.nan
    return out


def plausible(points: Points, side: int) -> bool:
    """Whether five points can be those of the face that fills a crop of `side` pixels."""
    eyes, mouth = points[:2].mean(0), points[3:].mean(0)
    apart = float(np.linalg.norm(points[1] - points[0]))
    inside = bool((points > -0.1 * side).all() and (points < 1.1 * side).all())
    return inside and 0.1 * side < apart < 0.8 * side and float(mouth[1] - eyes[1]) > 0.4 * apart


def affine(source: Points, target: Points) -> NDArray[np.float64]:
    """The affine map [2, 3] that takes five points to five others with the least squared error."""
    lifted = np.concatenate([source, np.ones((5, 1), np.float32)], axis=1)
    solved, *_ = np.linalg.lstsq(lifted, target, rcond=None)
    matrix: NDArray[np.float64] = solved.T.astype(np.float64)
    return matrix


def similarity(source: Points, target: Points) -> NDArray[np.float64]:
    """The map [2, 3] of turning, scaling and shifting alone that does it best."""
    middle_s, middle_t = source.mean(0), target.mean(0)
    s = (source - middle_s) @ np.array([1, 1j])
    t = (target - middle_t) @ np.array([1, 1j])
    turn = complex((t * s.conj()).sum() / (abs(s) ** 2).sum())
    linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    return np.concatenate([linear, (middle_t - linear @ middle_s)[:, None]], axis=1)


def outline(points: Points, shape: Shape) -> NDArray[np.float32]:
    """The outline of one part of the face with these landmarks, float32 [K, 2] in pixels."""
    matrix = affine(AVERAGE, points).astype(np.float32)
    laid: NDArray[np.float32] = OUTLINES[shape] @ matrix[:, :2].T + matrix[:, 2]
    return laid


def filled(corners: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """1 inside of a polygon, 0 outside: float32 [side, side]."""
    mask = np.zeros((side, side), np.float32)
    cv2.fillPoly(mask, [np.round(corners).astype(np.int32)], 1.0)
    return mask


def nearest(points: Points, others: NDArray[np.float32]) -> int:
    """Index of the face in [N, 5, 2] whose points lie most like these once moved onto them."""
    middle = others.mean(1, keepdims=True)
    candidates = (others - middle) @ np.array([1, 1j])
    wanted = (points - points.mean(0)) @ np.array([1, 1j])
    turns = (candidates.conj() @ wanted) / (abs(candidates) ** 2).sum(1)
    errors = (abs(candidates * turns[:, None] - wanted) ** 2).sum(1)
    return int(errors.argmin())
