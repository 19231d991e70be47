"""Face crops: framing, resampling and normalisation, frozen with the weights they were trained with.

A score means nothing when the crop is not framed as in training, so the one definition here serves training,
evaluation and live video.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch import Tensor

from detectors.readings import Box, Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

TIGHT_SHARE = 0.85
"""A wanted square above this share of a given crop is the crop itself. Of 500 tight validation crops 2 % fall
below it and their AUC does not move (.8769, so cut .8773); of loose crops, 1.3 boxes wide, of 25 clips
cutting again lifts it from .83 to .92."""


class CropKind(StrEnum):
    """How a square is laid about a face box."""

    TIGHT = "tight"
    MARGIN_SQUARE = "margin_square"


class Resampling(StrEnum):
    """How a cut square comes to the network's size.

    area: reduction averages areas (antialiased), enlargement is bilinear; OpenCV. pil_bilinear: Pillow's
    bilinear, which widens its triangle on reduction (antialiased too, softer); the published networks were
    trained on it.
    """

    AREA = "area"
    PIL_BILINEAR = "pil_bilinear"


class CropError(ValueError):
    """A box, picture or policy that cannot give a crop; names the value and what would be right."""


@dataclass(frozen=True, slots=True)
class CropPolicy:
    """From a detector's face box to the network's input.

    tight: the square of side `side` box heights about the box's centre moved down by `shift` heights. The
    DFDC crops the first member was trained with are squares of another detector's, from the brows' top to
    the chin. Measured with facenet-pytorch's MTCNN: the distance from eyes to mouth is .452 of a DFDC
    crop's side (237 validation crops, padded) and .372 (LFW, 1500 pictures) and .357 (1209 others) of an
    MTCNN box's height, which makes the side .82 and .79 heights, the centre .055 and .059 lower; boxes
    found on the padded crops say .82 and .07. Hence .81 and .06.

    margin_square: the box grown by `side`
    heights on the left, right and bottom and by `top` heights upwards, then the square of side max(w, h)
    about the centre of that (Bonettini et al.: 0.2 and 0.4; never a rectangle squashed to a square).

    `size` is the side of the network's input in pixels; `mean` and `std` are of RGB in 0..1. `resampling` is
    left out of the record while it is the default: records and digests from before the field stay the same.
    """

    kind: CropKind
    size: int
    side: float
    top: float = 0.0
    shift: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resampling: Resampling = Resampling.AREA

    def __post_init__(self) -> None:
        if self.size < 16:
            raise CropError(f"crop size {self.size}: expected at least 16 pixels")
        if self.kind is CropKind.TIGHT and self.side <= 0:
            raise CropError(f"crop side {self.side}: expected more than 0 box heights")

    def square(self, box: Box) -> Box:
        """The square to cut out, in the box's coordinates; may reach outside of the picture."""
        x0, y0, x1, y1 = box
        height = y1 - y0
        if not (x1 > x0 and height > 0):
            raise CropError(f"face box {box}: expected x0 < x1 and y0 < y1")
        if self.kind is CropKind.TIGHT:
            half = self.side * height / 2
            cx, cy = (x0 + x1) / 2, (y0 + y1) / 2 + self.shift * height
        else:
            left, right = x0 - self.side * height, x1 + self.side * height
            upper, lower = y0 - self.top * height, y1 + self.side * height
            half = max(right - left, lower - upper) / 2
            cx, cy = (left + right) / 2, (upper + lower) / 2
        return cx - half, cy - half, cx + half, cy + half

    def at_size(self, size: int) -> "CropPolicy":
        """The same framing at another resolution."""
        return replace(self, size=size)

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        if self.resampling is Resampling.AREA:
            del record["resampling"]
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "CropPolicy":
        """Reads what `to_json` wrote; CropError names an unknown kind or resampling."""
        fields = {"resampling": Resampling.AREA} | record
        for name, known in (("kind", CropKind), ("resampling", Resampling)):
            try:
                fields[name] = known(fields[name])
            except (KeyError, ValueError) as error:
                raise CropError(f"crop {name} {fields.get(name)!r}: expected {', '.join(known)}") from error
        fields["mean"], fields["std"] = tuple(fields["mean"]), tuple(fields["std"])
        return cls(**fields)

    def digest(self) -> str:
        """Short name of the framing, the same for the same fields."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]


def crop(image: Image, box: Box, policy: CropPolicy) -> Image:
    """Cuts the policy's square out: uint8 [H, W, 3] RGB in, uint8 [size, size, 3] RGB out.

    Edges are cut to whole pixels; what lies outside of the picture repeats its border.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise CropError(f"picture {image.dtype} {image.shape}: expected uint8 (height, width, 3)")
    height, width = image.shape[:2]
    x0, y0, x1, y1 = policy.square(box)
    side = max(2, round(x1 - x0))
    left, top = round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2)
    if left >= width or top >= height or left + side <= 0 or top + side <= 0:
        raise CropError(f"face box {box}: outside of the picture of {width}x{height}")
    inside = image[max(0, top) : top + side, max(0, left) : left + side]
    missing = (
        max(0, -top),
        max(0, top + side - height),
        max(0, -left),
        max(0, left + side - width),
    )
    if any(missing):
        inside = cv2.copyMakeBorder(inside, *missing, borderType=cv2.BORDER_REPLICATE)
    return fit(inside, policy.size, policy.resampling)


def fit(face: Image, size: int, resampling: Resampling = Resampling.AREA) -> Image:
    """An already cut face at the network's size; of a picture that is not square the middle square is
    taken."""
    height, width = face.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(face[top : top + side, left : left + side])
    if side == size:
        return square
    if resampling is Resampling.PIL_BILINEAR:
        return np.array(Pillow.fromarray(square).resize((size, size), Pillow.Resampling.BILINEAR))
    out: Image = cv2.resize(
        square, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    )
    return out


def recrop(face: Image, box: Box | None, policy: CropPolicy) -> Image:
    """An already cut face of unknown framing: uint8 [size, size, 3] out.

    When the face found in it (`box`, None when there is none) leaves a margin that the policy does not
    want, the policy's own square is cut; a face that fills the picture stays as it is, because a detector's
    box about a face without surroundings is too unsure to cut by.
    """
    if box is None or not is_loose(face, box, policy):
        return fit(face, policy.size, policy.resampling)
    return crop(face, box, policy)


def is_loose(face: Image, box: Box, policy: CropPolicy) -> bool:
    """Return whether the face at `box` leaves a margin in the picture that the policy does not want."""
    x0, _, x1, _ = policy.square(box)
    return bool(x1 - x0 <= TIGHT_SHARE * min(face.shape[:2]))


def to_tensor(faces: NDArray[np.uint8], policy: CropPolicy) -> Tensor:
    """uint8 [N, S, S, 3] RGB in, normalised float32 [N, 3, S, S] out, in channels-last memory."""
    if faces.ndim != 4 or faces.shape[1:] != (policy.size, policy.size, 3):
        raise CropError(f"face batch {faces.shape}: expected (N, {policy.size}, {policy.size}, 3)")
    pixels = torch.from_numpy(np.ascontiguousarray(faces)).permute(0, 3, 1, 2)
    scale = torch.tensor(policy.std).mul(255).reciprocal().view(1, 3, 1, 1)
    offset = torch.tensor(policy.mean).div(torch.tensor(policy.std)).view(1, 3, 1, 1)
    return pixels.float().mul_(scale).sub_(offset)
