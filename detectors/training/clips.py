"""Face crops of clips with one main face each: what sigma is fitted on and false alarms are counted with."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from detectors.crops import CropPolicy, crop
from detectors.readings import Image

SAMPLE_S = 0.25
"""Media seconds between frames: the sampling of a stream that is looked at closely."""
MOST_FRAMES = 60
"""Fifteen seconds of a clip: enough for its spread, and no clip outweighs the others."""
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
        for clip in _find(directory, policy):
            np.save(folder / f"{clip.name}.npy", clip.faces)
            sampled[clip.name] = clip.sampled
        index.write_text(json.dumps(sampled))
    found: dict[str, int] = json.loads(index.read_text())
    return [ClipFaces(name, np.load(folder / f"{name}.npy"), sampled) for name, sampled in found.items()]


def _find(directory: Path, policy: CropPolicy) -> Iterator[ClipFaces]:
    from facenet_pytorch import MTCNN

    detector = MTCNN(keep_all=False, device="cpu", min_face_size=40)
    for path in sorted(directory.glob("*.mp4")):
        faces, sampled = [], 0
        for picture in _pictures(path):
            sampled += 1
            boxes, _ = detector.detect(picture)
            if boxes is not None:
                x0, y0, x1, y1 = (float(v) for v in boxes[0])
                faces.append(crop(picture, (x0, y0, x1, y1), policy))
        shape = (0, policy.size, policy.size, 3)
        yield ClipFaces(path.stem, np.stack(faces) if faces else np.empty(shape, np.uint8), sampled)


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
