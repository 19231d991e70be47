"""Real face crops that every installation has, for engines to agree on (DESIGN 3.7)."""

from pathlib import Path

import cv2
import matplotlib
import numpy as np
from torch import Tensor

from detectors.crops import CropPolicy, crop, to_tensor
from detectors.mtcnn import MtcnnDetector
from detectors.readings import Box, Image


def portrait() -> Image:
    """Return the public-domain portrait of Grace Hopper that matplotlib carries, uint8 (600, 512, 3) RGB."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    picture = cv2.imread(str(path))
    if picture is None:
        raise FileNotFoundError(
            f"{path.name} is not among matplotlib's sample pictures; reinstall matplotlib"
        )
    return np.ascontiguousarray(picture[:, :, ::-1])


def reference_face(detector: MtcnnDetector) -> Box:
    """Return where the detector finds the face in the portrait.

    Raises `LookupError` when it finds none, which is a broken installation.
    """
    faces = detector.detect([portrait()])[0]
    if not faces:
        raise LookupError("no face found in the reference portrait; the detector or its weights are broken")
    return faces[0].box


def reference_crops(face: Box, policy: CropPolicy) -> Tensor:
    """Return crops of the portrait's face as `policy` frames them, float32 (12, 3, S, S), ready for a member.

    Two framings each of the face as it is, mirrored, dark, bright, blurred and small, so that logits spread.
    """
    crops = [crop(seen, box, policy) for seen in _seen(portrait()) for box in _framed(face)]
    mirrored = [seen[:, ::-1] for seen in crops[:2]]
    return to_tensor(np.stack(crops + mirrored), policy)


def _seen(picture: Image) -> list[Image]:
    """Return the picture under five conditions of viewing, faces in the same place."""
    height, width = picture.shape[:2]
    low = cv2.resize(picture, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    return [
        picture,
        cv2.convertScaleAbs(picture, alpha=0.35),
        cv2.convertScaleAbs(picture, alpha=1.4, beta=20),
        cv2.GaussianBlur(picture, (0, 0), 3.0),
        cv2.resize(low, (width, height), interpolation=cv2.INTER_LINEAR),
    ]


def _framed(box: Box) -> list[Box]:
    x0, y0, x1, y1 = box
    shift = 0.08 * (y1 - y0)
    return [box, (x0 + shift, y0 - shift, x1 + shift, y1 - shift)]
