"""Finds faces: the MTCNN cascade on facenet-pytorch's weights, batched across frames.

Three small networks look at the picture in turn (Zhang et al., "Joint Face Detection and Alignment using
Multi-task Cascaded Convolutional Networks"): the first proposes windows on a pyramid of reduced pictures,
the second throws most of them out, the third settles box, confidence and five landmarks.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import batched_nms

from detectors.readings import Detection, Image

WINDOW = 12
"""Side in pixels of the first network's window: a face of the smallest size is reduced to it."""
STRIDE = 2
"""Pixels between neighbouring windows of the first network (its one pooling)."""
REFINE = 24
"""Side in pixels of the second network's input."""
OUTPUT = 48
"""Side in pixels of the third network's input."""
PYRAMID = 0.709
"""Reduction from level to level: half the area, the value the networks were trained with."""
PROPOSE_CONFIDENCE = 0.6
REFINE_CONFIDENCE = 0.7
"""What the published cascade passes on from its first and second stage."""
LEVEL_OVERLAP = 0.5
"""IoU above which windows of one pyramid level are one."""
OVERLAP = 0.7
"""IoU, and in the last stage share of the smaller box, above which boxes are one."""
CANDIDATES = 64
"""Most candidates the later stages see at once: memory stays bounded however many windows a picture
proposes (facenet-pytorch #179), and 64 of 48 px keep the first activations near the cache."""
SMALLEST_FACE = 20.0
"""Pixels in the picture searched. Below it the first level would be enlarged rather than reduced much, and
neither the cascade's landmarks nor any member's score mean anything."""


class MtcnnDetector:
    """Faces in pictures, as facenet-pytorch's MTCNN finds them.

    `min_face_px` is the smallest face wanted, in pixels of the source picture; `confidence` in 0..1 is the
    least the last network must be sure of. One detector belongs to one thread at a time.
    """

    def __init__(self, min_face_px: float = 40.0, confidence: float = 0.9) -> None:
        self._min_face_px = min_face_px
        self._confidence = confidence
        self._propose, self._refine, self._output = (_prepared(net) for net in (PNet(), RNet(), ONet()))

    def detect(self, images: Sequence[Image], scales: Sequence[float] | None = None) -> list[list[Detection]]:
        """Return the faces of each picture, largest first, in that picture's own pixels.

        `images` are uint8 (H, W, 3) RGB; pictures of one size go through the networks together. `scales`
        tells per picture how many of its pixels a source pixel became (reduced to a third: 1/3), 1 when
        not given. Raises `ValueError` for an array that is no such picture.
        """
        found: list[list[Detection]] = [[] for _ in images]
        if scales is None:
            scales = [1.0] * len(images)
        groups: dict[tuple[int, int, float], list[int]] = defaultdict(list)
        for index, (image, scale) in enumerate(zip(images, scales, strict=True)):
            _check(image)
            smallest = max(SMALLEST_FACE, self._min_face_px * scale)
            groups[image.shape[0], image.shape[1], smallest].append(index)
        for (_, _, smallest), members in groups.items():
            for index, faces in zip(
                members, self._cascade([images[i] for i in members], smallest), strict=True
            ):
                found[index] = faces
        return found

    @torch.inference_mode()
    def _cascade(self, frames: list[Image], smallest: float) -> list[list[Detection]]:
        boxes, frame = self._first_stage(frames, smallest)
        boxes, frame = self._second_stage(frames, boxes, frame)
        return self._third_stage(frames, boxes, frame)

    def _first_stage(self, frames: list[Image], smallest: float) -> tuple[Tensor, Tensor]:
        """Return square candidate boxes (M, 4) float32 and the frame (M,) int64 each is in."""
        height, width = frames[0].shape[:2]
        proposals = [_Proposals.none()]
        levels: list[Sequence[Image]] = [frames, frames]
        for scale in _pyramid(min(height, width), smallest):
            size = (int(width * scale + 1), int(height * scale + 1))
            # from two levels up, half the size: as good as from the frame itself, and a third of the time
            level = np.stack([cv2.resize(above, size, interpolation=cv2.INTER_AREA) for above in levels[-2]])
            levels.append(list(level))
            shifts, probabilities = self._propose(_input(level))
            proposals.append(_Proposals.of(shifts, probabilities[:, 1], scale).suppressed(LEVEL_OVERLAP))
        kept = _Proposals.merged(proposals).suppressed(OVERLAP)
        return _squared(_shifted(kept.boxes, kept.shifts, 0.0)), kept.frame

    def _second_stage(self, frames: list[Image], boxes: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Return the boxes that the second network lets pass, shifted and squared again."""
        crops, inside = _crops(frames, boxes, frame, REFINE)
        if not len(crops):
            return boxes[:0], frame[:0]
        shifts, probabilities = _in_parts(self._refine, crops)
        passed = probabilities[:, 1] > REFINE_CONFIDENCE
        kept = _Proposals(
            boxes[inside][passed], probabilities[passed, 1], shifts[passed], frame[inside][passed]
        ).suppressed(OVERLAP)
        return _squared(_shifted(kept.boxes, kept.shifts, 1.0)), kept.frame

    def _third_stage(self, frames: list[Image], boxes: Tensor, frame: Tensor) -> list[list[Detection]]:
        found: list[list[Detection]] = [[] for _ in frames]
        crops, inside = _crops(frames, boxes, frame, OUTPUT)
        if not len(crops):
            return found
        shifts, points, probabilities = _in_parts(self._output, crops)
        passed = probabilities[:, 1] > self._confidence
        boxes, frame = boxes[inside][passed], frame[inside][passed]
        landmarks = _landmarks(boxes, points[passed]).numpy()
        final = _shifted(boxes, shifts[passed], 1.0).numpy()
        confidence = probabilities[passed, 1].numpy()
        usable = _in_picture(final, frames[0].shape[1], frames[0].shape[0])
        for index in range(len(frames)):
            own = np.flatnonzero((frame.numpy() == index) & usable)
            for k in own[_distinct(final[own], confidence[own])]:
                found[index].append(_detection(final[k], landmarks[k], confidence[k]))
            found[index].sort(key=_area, reverse=True)
        return found


class _Proposals:
    """Boxes (M, 4), confidence (M,), shifts (M, 4) in box sides, frame (M,) int64."""

    def __init__(self, boxes: Tensor, confidence: Tensor, shifts: Tensor, frame: Tensor) -> None:
        self.boxes = boxes
        self.confidence = confidence
        self.shifts = shifts
        self.frame = frame

    @classmethod
    def none(cls) -> "_Proposals":
        return cls(torch.empty(0, 4), torch.empty(0), torch.empty(0, 4), torch.empty(0, dtype=torch.int64))

    @classmethod
    def of(cls, shifts: Tensor, probability: Tensor, scale: float) -> "_Proposals":
        """Return the windows of one level that look like faces, of (N, 4, h, w) shifts and (N, h, w)."""
        frame, row, column = torch.nonzero(probability >= PROPOSE_CONFIDENCE, as_tuple=True)
        corner = torch.stack((column, row), dim=1).float() * STRIDE + 1
        boxes = torch.cat((corner / scale, (corner + WINDOW - 1) / scale), dim=1).floor()
        return cls(boxes, probability[frame, row, column], shifts[frame, :, row, column], frame)

    @classmethod
    def merged(cls, parts: "list[_Proposals]") -> "_Proposals":
        return cls(
            torch.cat([part.boxes for part in parts]),
            torch.cat([part.confidence for part in parts]),
            torch.cat([part.shifts for part in parts]),
            torch.cat([part.frame for part in parts]),
        )

    def suppressed(self, overlap: float) -> "_Proposals":
        """Return those that no surer one of the same frame overlaps by more than `overlap` (IoU)."""
        keep = batched_nms(self.boxes, self.confidence, self.frame, overlap)
        return _Proposals(self.boxes[keep], self.confidence[keep], self.shifts[keep], self.frame[keep])


def _prepared(net: nn.Module) -> nn.Module:
    # channels_last halves the time of these thin networks on CPUs, and pictures come in that order anyway
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _check(image: Image) -> None:
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return
    raise ValueError(f"picture is {image.dtype} of shape {image.shape}; it must be uint8 (height, width, 3)")


def _pyramid(shorter_side: int, smallest: float) -> list[float]:
    """Return the reductions at which faces from `smallest` pixels to the whole picture fill a window."""
    scales = []
    scale = WINDOW / smallest
    while shorter_side * scale >= WINDOW:
        scales.append(scale)
        scale *= PYRAMID
    return scales


def _input(pictures: NDArray[np.uint8]) -> Tensor:
    """Return uint8 (N, h, w, 3) as the networks take it: float32 (N, 3, h, w) in -1..1, channels last."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().sub_(127.5).mul_(1 / 128)


def _in_parts(net: Callable[[Tensor], tuple[Tensor, ...]], crops: NDArray[np.uint8]) -> tuple[Tensor, ...]:
    parts = [net(_input(crops[start : start + CANDIDATES])) for start in range(0, len(crops), CANDIDATES)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _crops(frames: list[Image], boxes: Tensor, frame: Tensor, side: int) -> tuple[NDArray[np.uint8], Tensor]:
    """Return the pictures in the boxes as uint8 (K, side, side, 3) and which boxes (M,) bool hold any pixel.

    The networks' coordinates count pixels from 1 and include both ends; parts outside the frame are cut off.
    """
    height, width = frames[0].shape[:2]
    corners = boxes.trunc().long().numpy()
    start = np.maximum(corners[:, :2], 1) - 1
    stop = np.minimum(corners[:, 2:], (width, height))
    inside = (stop > start).all(axis=1)
    crops = np.empty((int(inside.sum()), side, side, 3), dtype=np.uint8)
    spans = np.concatenate((start, stop, frame.numpy()[:, None]), axis=1)[inside].tolist()
    for crop, (x0, y0, x1, y1, index) in zip(crops, spans, strict=True):
        cv2.resize(frames[index][y0:y1, x0:x1], (side, side), dst=crop, interpolation=cv2.INTER_AREA)
    return crops, torch.from_numpy(inside)


def _shifted(boxes: Tensor, shifts: Tensor, inclusive: float) -> Tensor:
    """Return boxes with each corner coordinate moved by its share of the side, `inclusive` longer."""
    sides = boxes[:, 2:] - boxes[:, :2] + inclusive
    return boxes + shifts * sides.repeat(1, 2)


def _squared(boxes: Tensor) -> Tensor:
    """Return about each box's centre the square of its longer side."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True) / 2
    return torch.cat((centre - half, centre + half), dim=1)


def _landmarks(boxes: Tensor, points: Tensor) -> Tensor:
    """Return the five points (M, 5, 2) in pixels; `points` (M, 10) are shares of the box, x before y."""
    sides = (boxes[:, 2:] - boxes[:, :2] + 1).unsqueeze(1)
    return points.view(-1, 2, 5).transpose(1, 2) * sides + boxes[:, None, :2] - 1


def _in_picture(boxes: NDArray[np.float32], width: int, height: int) -> NDArray[np.bool_]:
    """Return which boxes have an extent and show some of the picture: the last shift may spoil both."""
    low = np.maximum(boxes[:, :2], 0)
    high = np.minimum(boxes[:, 2:], (width, height))
    shown: NDArray[np.bool_] = np.logical_and.reduce(high - low >= 1, axis=1)
    return shown


def _distinct(boxes: NDArray[np.float32], confidence: NDArray[np.float32]) -> list[int]:
    """Return which boxes to keep: of two that share most of the smaller one, the surer.

    Unlike IoU this also removes a small box inside a large one; torchvision has no such rule.
    """
    kept: list[int] = []
    area = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    for k in np.argsort(-confidence, kind="stable"):
        low = np.maximum(boxes[kept, :2], boxes[k, :2])
        high = np.minimum(boxes[kept, 2:], boxes[k, 2:])
        shared = np.clip(high - low + 1, 0, None).prod(axis=1)
        if (shared <= OVERLAP * np.minimum(area[kept], area[k])).all():
            kept.append(int(k))
    return kept


def _detection(box: NDArray[np.float32], points: NDArray[np.float32], confidence: np.float32) -> Detection:
    x0, y0, x1, y1 = box.tolist()
    a, b, c, d, e = ((float(x), float(y)) for x, y in points)
    return Detection((x0, y0, x1, y1), (a, b, c, d, e), float(confidence))


def _area(face: Detection) -> float:
    x0, y0, x1, y1 = face.box
    return (x1 - x0) * (y1 - y0)
