"""Where the parts of a face are, to a fraction of a pixel: Google's face mesh and iris networks.

Both are of MediaPipe (Apache-2.0; Kartynnik et al., "Real-time Facial Surface Geometry from Monocular Video
on Mobile GPUs", and Ablavatski et al., "Real-time Pupil Tracking from Monocular Video"), trained by Google on
pictures of its own: free for any use, where the usual 68 points come from data for research only. They are
not shipped: `unmask models pull face-mesh` takes the two files out of the package mediapipe (docs/cues.md).
OpenVINO reads them as they are; that package itself is not needed.

The mesh network looks at a square about the face, turned upright, and gives 468 points; the iris network
looks at each eye and gives its contour and its iris.
"""

import hashlib
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.readings import Detection, Image

Points = NDArray[np.float32]
"""float32 [N, 2]: x, y in pixels."""

FILES = {
    "face_landmark.tflite": "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814",
    "iris_landmark.tflite": "d1744d2a09c25f501d39eba4faff47e53ecca8852c5ce19bce8eeac39357521f",
}
"""The networks and their SHA-256, as the package mediapipe 0.10.21 carries them."""

FOLDER = "face-mesh"
"""Where they lie in the cache folder (`engines.cache_dir`)."""

PULL = "unmask models pull face-mesh"

MESH_PX, EYE_PX = 192, 64
"""Sides of the networks' inputs."""

GROWTH, EYE_GROWTH = 1.5, 2.3
"""The squares looked at, in face sides and in eye widths: what the networks were trained with."""

PRESENCE = 0.5
"""Below this the mesh network sees no face in its square."""

LEFT_CORNERS, RIGHT_CORNERS = (33, 133), (362, 263)
"""Mesh points of the eyes' corners, left and right as seen in the picture, each from left to right."""

UPPER_LIP, LOWER_LIP = 13, 14
"""Mesh points in the middle of the lips' inner edges."""

CONTOUR = 16
"""Points of an eye's contour: 0 and 8 its corners, 1..7 the lower lid, 9..15 the upper one above them."""

OVAL = (
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176,
    149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)  # fmt: skip
"""Mesh points of the face's outline, in order."""

SIXTY_EIGHT = (
    127, 234, 93, 132, 172, 136, 149, 148, 152, 377, 378, 365, 397, 361, 323, 454, 356,
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300,
    168, 197, 5, 4, 98, 97, 2, 326, 327,
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,
    61, 40, 37, 0, 267, 270, 291, 321, 314, 17, 84, 91, 78, 81, 13, 311, 308, 402, 14, 178,
)  # fmt: skip
"""Mesh points nearest to the usual 68 landmarks: jaw, brows, nose, eyes, mouth (ours)."""


NO_OPENVINO = "landmarks: OpenVINO is not installed here, and only it reads these networks"


class LandmarksError(ValueError):
    """The networks cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Region:
    """A square of `side` pixels about (`x`, `y`), turned clockwise by `angle` radians."""

    x: float
    y: float
    side: float
    angle: float


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """One face: `points` float32 [468, 2]; `contours` float32 [2, 16, 2] and `irises` float32 [2, 5, 2] of
    the left and the right eye as seen, the iris's first point its middle. All in pixels of the picture."""

    points: Points
    contours: NDArray[np.float32]
    irises: NDArray[np.float32]

    def region(self) -> Region:
        """Where to look for the face in the next picture."""
        low, high = self.points.min(0), self.points.max(0)
        x, y = (low + high) / 2
        across = self.points[RIGHT_CORNERS[1]] - self.points[LEFT_CORNERS[0]]
        angle = math.atan2(float(across[1]), float(across[0]))
        return Region(float(x), float(y), GROWTH * float((high - low).max()), angle)


def region_of(face: Detection) -> Region:
    """Where a detected face is looked at."""
    x0, y0, x1, y1 = face.box
    (ax, ay), (bx, by) = face.landmarks[:2]
    angle = math.atan2(by - ay, bx - ax) if math.isfinite(bx) else 0.0
    return Region((x0 + x1) / 2, (y0 + y1) / 2, GROWTH * max(x1 - x0, y1 - y0), angle)


class LandmarkModel:
    """Finds the points of a face. Used by one thread at a time.

    `folder` holds the two files. Raises LandmarksError if they are missing or others, or OpenVINO is missing.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        for name, sha256 in FILES.items():
            _check(folder / name, sha256)
        try:
            import openvino
        except ImportError as error:
            raise LandmarksError(NO_OPENVINO) from error
        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        self._mesh, self._iris = (core.compile_model(folder / name, "CPU", settings) for name in FILES)

    def look(self, image: Image, region: Region) -> Mesh | None:
        """Return the face in a region of a picture, uint8 (H, W, 3) RGB; None if there is none."""
        if not (region.side >= 1 and all(map(math.isfinite, (region.x, region.y, region.angle)))):
            return None
        picture, matrix = _cut(image, region, MESH_PX)
        points, presence = (np.asarray(found).ravel() for found in _run(self._mesh, picture))
        if 1 / (1 + math.exp(-max(-50.0, float(presence[0])))) < PRESENCE:
            return None
        mesh = _back(points.reshape(-1, 3)[:, :2], matrix)
        # The network knows one kind of eye: the other is shown to it in a mirror.
        eyes = [self._eye(image, mesh, LEFT_CORNERS, True), self._eye(image, mesh, RIGHT_CORNERS, False)]
        return Mesh(mesh, np.stack([contour for contour, _ in eyes]), np.stack([iris for _, iris in eyes]))

    def _eye(
        self, image: Image, mesh: Points, corners: tuple[int, int], mirrored: bool
    ) -> tuple[Points, Points]:
        first, last = mesh[corners[0]], mesh[corners[1]]
        (x, y), across = (first + last) / 2, last - first
        side = max(1.0, EYE_GROWTH * float(np.hypot(*across)))
        region = Region(float(x), float(y), side, math.atan2(float(across[1]), float(across[0])))
        picture, matrix = _cut(image, region, EYE_PX, mirrored)
        contour, iris = (np.asarray(found).reshape(-1, 3)[:, :2] for found in _run(self._iris, picture))
        return _back(contour[:CONTOUR], matrix), _back(iris, matrix)


def why_no_landmarks(folder: Path) -> str:
    """Return why faces cannot be looked at here, in a sentence; "" if they can. Hashes nothing."""
    absent = [name for name in FILES if not (folder / name).exists()]
    if absent:
        return f"landmarks: {absent[0]} was not pulled; {PULL} brings it"
    if importlib.util.find_spec("openvino") is None:
        return NO_OPENVINO
    return ""


def openness(contour: Points) -> float:
    """Return how far an eye is open: mean gap between its lids in eye widths; about .25 open, .05 closed."""
    width = max(float(np.linalg.norm(contour[8] - contour[0])), 1e-6)
    return float(np.linalg.norm(contour[9:] - contour[1:8], axis=1).mean()) / width


def gaze(contour: Points, iris: Points) -> tuple[float, float]:
    """Return where the iris's middle is, along the eye and across it, in eye widths from the eye's middle."""
    across = contour[8] - contour[0]
    width = max(float(np.linalg.norm(across)), 1e-6)
    along = across / width
    if along[0] < 0:  # the mirrored eye counts from the other corner: both are to look the same way
        along = -along
    offset = (iris[0] - (contour[0] + contour[8]) / 2) / width
    return float(offset @ along), float(offset @ np.array([-along[1], along[0]]))


def mouth(points: Points) -> float:
    """Return the gap between the lips in distances between the eyes' outer corners."""
    apart = max(float(np.linalg.norm(points[RIGHT_CORNERS[1]] - points[LEFT_CORNERS[0]])), 1e-6)
    return float(np.linalg.norm(points[LOWER_LIP] - points[UPPER_LIP])) / apart


def normalised(points: Points) -> Points:
    """Return the 68 points upright, the eyes' outer corners one apart, their middle at 0: float32 [68, 2]."""
    first, last = points[LEFT_CORNERS[0]], points[RIGHT_CORNERS[1]]
    across = last - first
    size = max(float(across @ across), 1e-6)
    moved = points[list(SIXTY_EIGHT)] - (first + last) / 2
    turn = np.array([[across[0], -across[1]], [across[1], across[0]]], np.float32) / size
    upright: Points = (moved @ turn).astype(np.float32)
    return upright


def _check(path: Path, sha256: str) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise LandmarksError(f"landmarks: {path}: {error.strerror}; {PULL} brings it") from None
    if found != sha256:
        raise LandmarksError(f"landmarks: {path} has another SHA-256 than {sha256}; {PULL} replaces it")


def _cut(
    image: Image, region: Region, size: int, mirrored: bool = False
) -> tuple[Image, NDArray[np.float64]]:
    """Return the region as a picture of `size` pixels, and the map [2, 3] from the image to it."""
    scale = size / region.side
    c, s = math.cos(region.angle), math.sin(region.angle)
    linear = np.array([[c, s], [-s, c]]) * scale
    if mirrored:
        linear[0] *= -1
    shift = np.array([size / 2, size / 2]) - linear @ np.array([region.x, region.y])
    matrix = np.concatenate([linear, shift[:, None]], axis=1)
    cut = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(cut, np.uint8), matrix


def _back(points: NDArray[np.floating], matrix: NDArray[np.float64]) -> Points:
    """Return points of a cut in pixels of the image it was cut from."""
    moved: Points = ((points - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T).astype(np.float32)
    return moved


def _run(network: Any, picture: Image) -> tuple[Any, Any]:
    found = network(picture[None].astype(np.float32) / 255)
    return found[0], found[1]
