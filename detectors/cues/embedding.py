"""Face embeddings by facenet-pytorch's InceptionResnetV1; its weights are pulled, never shipped.

`unmask models pull facenet` brings them (trained on VGGFace2; the published LFW accuracy is 99.65 %). Loads
torch: import it only to embed.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from facenet_pytorch.models.inception_resnet_v1 import InceptionResnetV1
from numpy.typing import NDArray

from detectors.readings import Box, Image
from detectors.registry import file_sha256

SIDE = 160
"""Pixels of the network's input."""

MARGIN = 14
"""Of these 160 pixels, what lies about MTCNN's box, on both sides together: as in the published LFW
evaluation of these weights."""

BATCH = 16
"""Faces at once."""

CLASSES = "logits."
"""Begins the names of the published file's classifier of VGGFace2's people, which is not needed."""


class EmbeddingError(ValueError):
    """Weights that cannot be used; names the file and what would be right."""


class Embedder:
    """Faces in, directions out. One thread at a time."""

    def __init__(self, network: InceptionResnetV1) -> None:
        self._network = network.eval()

    @classmethod
    def load(cls, path: Path, sha256: str) -> "Embedder":
        """Load the published weights. Raises EmbeddingError for a missing file, another hash or layout."""
        try:
            found = file_sha256(path)
        except OSError as error:
            raise EmbeddingError(f"{path}: {error.strerror}") from error
        if found != sha256:
            raise EmbeddingError(f"{path} has SHA-256 {found}, expected {sha256}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            network = InceptionResnetV1()
            network.load_state_dict({k: v for k, v in state.items() if not k.startswith(CLASSES)})
        except Exception as error:  # torch raises what it likes for a file that is not its own
            raise EmbeddingError(f"{path}: not the weights of InceptionResnetV1: {error}") from error
        return cls(network)

    def __call__(self, faces: Sequence[Image]) -> NDArray[np.float32]:
        """Embeddings float32 [N, 512] of length 1 of uint8 [160, 160, 3] RGB faces (`cut`)."""
        parts = [self._embedded(faces[k : k + BATCH]) for k in range(0, len(faces), BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, 512), np.float32)

    def _embedded(self, faces: Sequence[Image]) -> NDArray[np.float32]:
        pixels = torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2).float()
        with torch.inference_mode():
            out: NDArray[np.float32] = self._network((pixels - 127.5) / 128).numpy()
        return out


def cut(image: Image, box: Box) -> Image:
    """The face as the network wants it, uint8 [160, 160, 3]: the box with its margin, inside of the picture
    (H, W, 3), brought to a square without keeping its shape, as these weights were trained. Raises ValueError
    for a box outside of the picture."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box
    grow_x, grow_y = (MARGIN * (x1 - x0) / (SIDE - MARGIN) / 2, MARGIN * (y1 - y0) / (SIDE - MARGIN) / 2)
    left, top = max(0, int(x0 - grow_x)), max(0, int(y0 - grow_y))
    right, bottom = min(width, int(x1 + grow_x)), min(height, int(y1 + grow_y))
    if right - left < 1 or bottom - top < 1:
        raise ValueError(f"box {box}: outside of a picture of {width} x {height}")
    part = image[top:bottom, left:right]
    way = cv2.INTER_AREA if min(part.shape[:2]) > SIDE else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(part, (SIDE, SIDE), interpolation=way), np.uint8)
