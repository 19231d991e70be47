"""Training material: face crops decoded once into memory-mapped arrays, and the pairs drawn from them.

Layout of the data directory: `dfdc_faces.csv`, `dfdc_faces_<split>_NN.tar`, and, for authentic faces of other
sources, `<name>.tar` (see the model card for what was used).
"""

import csv
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.crops import CropPolicy, crop
from detectors.readings import Image
from detectors.training.augment import apply, draw
from detectors.training.blends import self_blend

CACHE_PX = 192
"""Side of the cached crops: a fifth above the 160 px of the network, so that crops can move and grow."""

HELD_OUT_EVERY = 5
"""One in five authentic faces of other sources never trains: false alarms are counted on those."""


class DataError(ValueError):
    """The training material is missing or inconsistent; names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class Faces:
    """Crops of one split with what is known of each, all of length N.

    `images` uint8 [N, 192, 192, 3] RGB, memory-mapped; `labels` 1 for manipulated; `original` the index of a
    manipulated crop's authentic partner, -1 for authentic crops; `identity` a number per person;
    `source_width` in pixels before the data set's resizing; `file_bytes` of the JPEG file.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    original: NDArray[np.int64]
    identity: NDArray[np.int64]
    source_width: NDArray[np.int64]
    file_bytes: NDArray[np.int64]

    def pairs(self) -> NDArray[np.int64]:
        """int64 [P, 2]: (authentic, manipulated) indices, one row per manipulated crop with its original."""
        fake = np.flatnonzero(self.original >= 0)
        return np.stack([self.original[fake], fake], axis=1)


def load_faces(data_dir: Path, cache_dir: Path, split: str) -> Faces:
    """Reads a split of the DFDC crops; decodes it into `cache_dir` the first time."""
    table = {row["name"]: row for row in _rows(data_dir / "dfdc_faces.csv") if row["split"] == split}
    shards = sorted(data_dir.glob(f"dfdc_faces_{split}_*.tar"))
    if not shards:
        raise DataError(f"{data_dir}/dfdc_faces_{split}_*.tar: no such file")
    images, names, sizes = _cached(cache_dir / f"dfdc_{split}_{CACHE_PX}", lambda: _decode(shards))
    unknown = set(names) - set(table)
    if unknown:
        raise DataError(f"{min(unknown)}: in a tar of {split}, but not in dfdc_faces.csv")
    index = {name: i for i, name in enumerate(names)}
    rows = [table[name] for name in names]
    return Faces(
        images=images,
        labels=np.array([row["label"] == "fake" for row in rows], np.int64),
        original=np.array([index.get(row["original"], -1) for row in rows], np.int64),
        identity=np.array([int(row["identity"]) for row in rows], np.int64),
        source_width=np.array([int(row["source_width"]) for row in rows], np.int64),
        file_bytes=np.array(sizes, np.int64),
    )


def load_authentic(
    data_dir: Path, cache_dir: Path, name: str, policy: CropPolicy, *, held_out: bool
) -> NDArray[np.uint8]:
    """Authentic faces of another source, framed as at run time: uint8 [N, 192, 192, 3] RGB.

    A crop that would reach outside of its picture, or into the black wedges of an aligned one, is left out.
    Every fifth is kept from training and returned when `held_out`; these sources have one picture a person.
    """
    path = data_dir / f"{name}.tar"
    if not path.exists():
        raise DataError(f"{path}: no such file")
    images, _, _ = _cached(cache_dir / f"{name}_{CACHE_PX}_{policy.digest()}", lambda: _detect(path, policy))
    chosen = (np.arange(len(images)) % HELD_OUT_EVERY == 0) == held_out
    part: NDArray[np.uint8] = images[chosen]
    return part


def pair_batches(
    faces: Faces,
    authentic: NDArray[np.uint8] | None,
    *,
    seed: int,
    pairs: int,
    blends: int,
    size: int,
    step: int,
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    """Endless batches from `step` on; batch k depends on (seed, k) alone, so a restart repeats nothing.

    Each batch holds `pairs` authentic crops, then `blends` authentic crops of the other source, then in the
    same order the manipulated partner of each: uint8 [2*(pairs+blends), size, size, 3] and labels float32.
    """
    table = faces.pairs()
    per_epoch = len(table) // pairs
    labels = np.repeat(np.array([0, 1], np.float32), pairs + blends)
    while True:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, 1, epoch)).permutation(len(table))
        rng = np.random.default_rng((seed, 2, step))
        couples = [
            (faces.images[real], faces.images[fake]) for real, fake in table[order[place * pairs :][:pairs]]
        ]
        if authentic is not None:
            chosen = rng.choice(len(authentic), blends, replace=False)
            couples.extend((authentic[i], self_blend(authentic[i], rng)) for i in chosen)
        out = np.empty((2, len(couples), size, size, 3), np.uint8)
        for i, (real_crop, fake_crop) in enumerate(couples):
            degradation = draw(rng, CACHE_PX, size)
            out[0, i] = apply(real_crop, degradation, size)
            out[1, i] = apply(fake_crop, degradation, size)
        yield out.reshape(-1, size, size, 3), labels
        step += 1


def resized(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The whole crops at the network's size, as at run time: uint8 [N, size, size, 3]."""
    out = np.empty((len(images), size, size, 3), np.uint8)
    for i, image in enumerate(images):
        out[i] = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return out


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


Decoded = tuple[NDArray[np.uint8], list[str], list[int]]
"""Crops uint8 [N, 192, 192, 3], their names, the bytes of their files."""


def _cached(stem: Path, make: Callable[[], Decoded]) -> Decoded:
    """The names are written last: a cache without them is made again."""
    array, meta = stem.with_suffix(".npy"), stem.with_suffix(".json")
    if not meta.exists():
        stem.parent.mkdir(parents=True, exist_ok=True)
        images, names, sizes = make()
        np.save(array, images)
        meta.write_text(json.dumps({"names": names, "bytes": sizes}))
    known = json.loads(meta.read_text())
    return np.load(array, mmap_mode="r"), known["names"], known["bytes"]


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                yield Path(member.name).stem, file.read()


def _picture(name: str, data: bytes) -> Image:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"{name}: not a picture")
    rgb: Image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return rgb


def _decode(shards: list[Path]) -> Decoded:
    images, names, sizes = [], [], []
    for shard in shards:
        for name, data in _members(shard):
            images.append(
                cv2.resize(_picture(name, data), (CACHE_PX, CACHE_PX), interpolation=cv2.INTER_AREA)
            )
            names.append(name)
            sizes.append(len(data))
    return np.stack(images), names, sizes


def _detect(path: Path, policy: CropPolicy) -> Decoded:
    from facenet_pytorch import MTCNN

    detector = MTCNN(keep_all=False, device="cpu", min_face_size=40)
    framed = policy.at_size(CACHE_PX)
    images, names, sizes = [], [], []
    for name, data in _members(path):
        picture = _picture(name, data)
        boxes, _ = detector.detect(picture)
        if boxes is None:
            continue
        box = (float(boxes[0][0]), float(boxes[0][1]), float(boxes[0][2]), float(boxes[0][3]))
        x0, y0, x1, y1 = framed.square(box)
        if min(x0, y0) < 0 or x1 > picture.shape[1] or y1 > picture.shape[0]:
            continue
        face = crop(picture, box, framed)
        if (face.max(axis=2) < 4).mean() > 0.02:
            continue
        images.append(face)
        names.append(name)
        sizes.append(len(data))
    return np.stack(images), names, sizes
