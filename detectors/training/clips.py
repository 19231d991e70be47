"""Face crops of clips with one main face each: what sigma is fitted on and false alarms are counted with."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from detectors.crops import CropPolicy, crop
from detectors.mtcnn import MtcnnDetector
from detectors.readings import Box, Image

CLIP_CLASSES = {"authentic": 0, "manipulated": 1, "manipulated_faces": 1}
"""Directories of clips under `clips/` of the data directory, and their label."""

SAMPLE_S = 0.25
"""Media seconds between frames: the sampling of a stream that is looked at closely."""
MOST_FRAMES = 60
"""Fifteen seconds of a clip: enough for its spread, and no clip outweighs the others."""
SMALLEST_FACE_PX = 40
CONFIDENCE = 0.9
"""As at run time (`faces.confidence`)."""
LONGEST_SIDE = 1280
"""Larger pictures are decoded smaller: MTCNN on 1080p costs seconds a frame and finds no other faces."""


@dataclass(frozen=True, slots=True)
class ClipFaces:
    """`faces` uint8 [N, size, size, 3]: the largest face of each of `sampled` frames that shows one."""

    name: str
    faces: NDArray[np.uint8]
    sampled: int


def load_clips(directory: Path, cache: Path, policy: CropPolicy) -> list[ClipFaces]:
    """Crops of every `*.mp4` through MTCNN and the policy; found once, then read from the `cache`
    directory."""
    folder = cache / f"clips_{directory.name}_{policy.digest()}"
    index = folder / "index.json"
    if not index.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sampled = {}
        for clip in _find(directory, policy, cache / f"clips_{directory.name}_boxes.json"):
            np.save(folder / f"{clip.name}.npy", clip.faces)
            sampled[clip.name] = clip.sampled
        index.write_text(json.dumps(sampled))
    found: dict[str, int] = json.loads(index.read_text())
    return [ClipFaces(name, np.load(folder / f"{name}.npy"), sampled) for name, sampled in found.items()]


def _find(directory: Path, policy: CropPolicy, boxes_path: Path) -> Iterator[ClipFaces]:
    known = json.loads(boxes_path.read_text()) if boxes_path.exists() else {}
    for path in sorted(directory.glob("*.mp4")):
        pictures = list(_pictures(path))
        if path.name not in known:
            known[path.name] = _boxes(pictures)
            boxes_path.write_text(json.dumps(known))
        faces = [
            crop(picture, box, policy)
            for picture, box in zip(pictures, known[path.name], strict=True)
            if box is not None
        ]
        shape = (0, policy.size, policy.size, 3)
        yield ClipFaces(path.stem, np.stack(faces) if faces else np.empty(shape, np.uint8), len(pictures))


def _boxes(pictures: list[Image]) -> list[Box | None]:
    """The largest face of each picture: finding them costs far more than cutting, and serves every policy."""
    detector = MtcnnDetector(SMALLEST_FACE_PX, CONFIDENCE)
    found = (detector.detect([picture])[0] for picture in pictures)
    return [faces[0].box if faces else None for faces in found]


def _pictures(path: Path) -> Iterator[Image]:
    due, count = -1.0, 0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if frame.time is None or frame.time < due:
                continue
            if count == MOST_FRAMES:
                return
            due, count = frame.time + SAMPLE_S, count + 1
            scale = min(1.0, LONGEST_SIDE / max(frame.width, frame.height))
            smaller = frame.reformat(
                width=round(frame.width * scale), height=round(frame.height * scale), format="rgb24"
            )
            yield smaller.to_ndarray().astype(np.uint8, copy=False)
