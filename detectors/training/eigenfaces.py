"""A face generator that needs no training run: authentic faces rebuilt from their principal components.

Like an autoencoder's, its faces keep pose, light and expression and lose detail and noise; unlike one it is
fitted in seconds on a CPU.
"""

from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.readings import Image
from detectors.training.faces import AVERAGE, Points, similarity

if TYPE_CHECKING:
    from detectors.training.blends import Face

SIDE = 96
"""Pixels of an aligned face, as early autoencoder swaps had them (64 to 128)."""
COMPONENTS = 256
"""Enough to keep the person and too few to keep the skin."""
KEPT = (64, COMPONENTS)
"""Components are cut at random between these: from ghostly to good."""
CENTRE = np.array([SIDE / 2, SIDE * 0.34], np.float32)
EYES_PX = SIDE / 2.9
"""The aligned square reaches from the forehead to below the chin and from ear to ear."""

FRAME: Points = AVERAGE * EYES_PX + CENTRE
"""Where the landmarks of an aligned face lie."""


class Eigenfaces:
    """The mean and the first components of aligned authentic faces, float32 [D] and [K, D]."""

    def __init__(self, mean: NDArray[np.float32], basis: NDArray[np.float32]) -> None:
        self.mean, self.basis = mean, basis

    @classmethod
    def fitted(cls, faces: "list[Face]", components: int = COMPONENTS) -> "Eigenfaces":
        """Principal components of at least two faces."""
        data = np.stack([aligned(face)[0].reshape(-1) for face in faces]).astype(np.float32)
        mean = data.mean(0)
        data -= mean
        values, vectors = np.linalg.eigh(data @ data.T)
        chosen = np.argsort(-values)[: min(components, len(faces) - 1)]
        basis = (vectors[:, chosen] / np.sqrt(np.maximum(values[chosen], 1e-6))).T @ data
        return cls(mean, np.ascontiguousarray(basis, np.float32))

    def rebuilt(self, face: "Face", rng: np.random.Generator) -> Image:
        """The face from a random number of its components, in place in a copy of its picture."""
        small, matrix = aligned(face)
        kept = self.basis[: int(rng.integers(min(KEPT[0], len(self.basis)), len(self.basis) + 1))]
        shares = kept @ (small.reshape(-1) - self.mean)
        rebuilt = np.clip(self.mean + shares @ kept, 0, 255).reshape(SIDE, SIDE, 3).astype(np.uint8)
        return put_back(rebuilt, matrix, face.image)


def aligned(face: "Face", side: int = SIDE) -> tuple[Image, NDArray[np.float64]]:
    """The face upright, uint8 [side, side, 3], and the map [2, 3] that took it there."""
    matrix = similarity(face.points, FRAME * (side / SIDE))
    out: Image = cv2.warpAffine(
        np.ascontiguousarray(face.image), matrix, (side, side), flags=cv2.INTER_AREA,
        borderMode=cv2.BORDER_REPLICATE,
    )  # fmt: skip
    return out, matrix


def put_back(upright: Image, matrix: NDArray[np.float64], image: Image) -> Image:
    """A copy of the picture with a face that `aligned` had taken from it where it was."""
    side = image.shape[0]
    out: Image = cv2.warpAffine(
        upright, matrix, (side, side), dst=np.ascontiguousarray(image).copy(),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_TRANSPARENT,
    )  # fmt: skip
    return out
