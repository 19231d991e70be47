"""Training material: face crops decoded once into memory-mapped arrays, and the pairs drawn from them.

Layout of the data directory: `dfdc_faces.csv`, `dfdc_faces_<split>_NN.tar`, and, for authentic faces of other
sources, `<name>.tar` (see the model card for what was used).
"""

import csv
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.crops import CropKind, CropPolicy, crop
from detectors.mtcnn import MtcnnDetector
from detectors.readings import Image
from detectors.training.augment import Degradation, apply, apply_to_mask, draw, without_harm
from detectors.training.blends import Face, Family, blend
from detectors.training.eigenfaces import Eigenfaces
from detectors.training.faces import find_points, nearest

CACHE_PX = 224
"""Side of the cached crops: what the DFDC crops have."""
LOOSE_PX = 256
"""Side of the cached authentic faces of other sources, which keep surroundings."""
LOOSE_SIDE = 1.45
"""Their side in MTCNN box heights: all that LFW's pictures have around most faces."""
NEEDED_SIDE = 1.05
"""What of it must lie within the picture, and show no black wedge; beyond, the border is repeated."""
TIGHT_SIDE = 0.81
"""That of the DFDC crops (`detectors.crops.CropPolicy`)."""
SHIFT = 0.06
"""How far the middle of both lies below that of the box, in box heights."""

DFDC = "dfdc"
"""Name of the main source among those of authentic faces."""
HELD_OUT_EVERY = 5
"""One in five authentic faces of other sources never trains: false alarms are counted on those."""
MASK_STRIDE = 16
"""Pixels of input a cell of the mask grid stands for: 14x14 cells at 224 px (SCIENCE C)."""
CANDIDATES = 48
"""Faces among which the one with the nearest landmarks is taken as a donor."""
EIGENFACES_FROM = 2000
"""Faces the components are fitted on: a minute and no more."""


class DataError(ValueError):
    """The training material is missing or inconsistent; names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class Faces:
    """Crops of one split with what is known of each, all of length N.

    `images` uint8 [N, 224, 224, 3] RGB, memory-mapped; `labels` 1 for manipulated; `original` the index of a
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


@dataclass(frozen=True, slots=True)
class Source:
    """Authentic faces with landmarks, of N pictures that show one each.

    `images` uint8 [N, P, P, 3] RGB; `points` float32 [N, 5, 2] in its pixels; `side` of the crop in box
    heights; `native` float32 [N], the share 0..1 of P that the picture had before it was enlarged.
    """

    images: "Pictures"
    points: NDArray[np.float32]
    side: float
    native: NDArray[np.float32]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Which pictures of the split these are, where they are some of one."""
        return self.images.rows if isinstance(self.images, _Rows) else np.arange(len(self.points))

    def face(self, index: int) -> Face:
        return Face(np.asarray(self.images[index]), self.points[index])


@dataclass(frozen=True, slots=True)
class Material:
    """What batches are drawn from: `faces` for DFDC pairs, `sources` by name for pseudo-fakes."""

    faces: Faces
    sources: Mapping[str, Source]
    eigenfaces: Eigenfaces | None


@dataclass(frozen=True, slots=True)
class Mix:
    """What a batch is made of, in pairs.

    `dfdc` pairs of an original and its own manipulated crop; `families` pseudo-fakes beside their authentic
    faces; `shares` how often each source gives the authentic face; `views` the least and largest side of the
    square shown, in box heights, where the source has that much; not `degraded`: pictures as they are, to
    measure what degradations bring.
    """

    dfdc: int
    families: Mapping[Family, int]
    shares: Mapping[str, float]
    views: tuple[float, float]
    degraded: bool = True

    def kept(self, degradation: Degradation) -> Degradation:
        return degradation if self.degraded else without_harm(degradation)

    @property
    def pairs(self) -> int:
        return self.dfdc + sum(self.families.values())


@dataclass(frozen=True, slots=True)
class Batch:
    """`images` uint8 [2P, S, S, 3], the authentic half first, partners in the same order; `labels` float32
    [2P]; `masks` float32 [2P, S/16, S/16], the share of each cell that is manipulated, NaN where unknown."""

    images: NDArray[np.uint8]
    labels: NDArray[np.float32]
    masks: NDArray[np.float32]


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
    """Authentic faces of another source, framed as at run time: uint8 [N, policy.size, policy.size, 3] RGB.

    A policy wider than what is kept of the pictures gets all of that.
    """
    source = load_source(data_dir, cache_dir, name, held_out=held_out)
    return framed(source.images[:], LOOSE_SIDE, policy)


def load_source(data_dir: Path, cache_dir: Path, name: str, *, held_out: bool) -> Source:
    """Authentic faces of another source than DFDC, with surroundings and landmarks.

    A crop that would reach far outside of its picture, or into the black wedges of an aligned one, is left
    out. Every fifth is kept from training and returned when `held_out`; these sources have one picture a
    person.
    """
    path = data_dir / f"{name}.tar"
    if not path.exists():
        raise DataError(f"{path}: no such file")
    images, _, sides = _cached(cache_dir / f"{name}_{LOOSE_PX}", lambda: _detect(path))
    points = _points(cache_dir / f"{name}_{LOOSE_PX}_points.npy", images)
    chosen = (np.arange(len(images)) % HELD_OUT_EVERY == 0) == held_out
    chosen &= np.isfinite(points).all((1, 2))
    native = np.minimum(1, np.array(sides, np.float32) / LOOSE_PX)
    return Source(np.asarray(images)[chosen], points[chosen], LOOSE_SIDE, native[chosen])


def authentic_source(faces: Faces, cache_dir: Path, split: str, *, min_width: int = 0) -> Source:
    """The authentic DFDC crops of one split with landmarks, those at least `min_width` pixels wide."""
    real = np.flatnonzero(faces.labels == 0)
    points = _points(cache_dir / f"dfdc_{split}_{CACHE_PX}_points.npy", _Rows(faces.images, real))
    chosen = np.isfinite(points).all((1, 2)) & (faces.source_width[real] >= min_width)
    native = np.minimum(1, faces.source_width[real].astype(np.float32) / CACHE_PX)
    return Source(
        _Rows(faces.images, real[chosen]),
        points[chosen], TIGHT_SIDE, native[chosen],
    )  # fmt: skip


def load_material(
    data_dir: Path, cache_dir: Path, names: tuple[str, ...], *, eigenfaces: bool, min_width: int = 0
) -> Material:
    """All that batches are drawn from: DFDC's train split and the sources named, `dfdc` among them."""
    faces = load_faces(data_dir, cache_dir, "train")
    sources = {
        name: authentic_source(faces, cache_dir, "train", min_width=min_width)
        if name == DFDC
        else load_source(data_dir, cache_dir, name, held_out=False)
        for name in names
    }
    return Material(faces, sources, _eigenfaces(cache_dir, sources) if eigenfaces else None)


def pair_batches(material: Material, mix: Mix, *, seed: int, size: int, step: int) -> Iterator[Batch]:
    """Endless batches from `step` on; batch k depends on (seed, k) alone, so a restart repeats nothing.

    DFDC pairs come in the order of epochs, pseudo-fakes are drawn anew. The two crops of a pair share every
    degradation.
    """
    table = material.faces.pairs()
    per_epoch = max(1, len(table) // max(1, mix.dfdc))
    labels = np.repeat(np.array([0, 1], np.float32), mix.pairs)
    cells = size // MASK_STRIDE
    while True:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, 1, epoch)).permutation(len(table))
        rng = np.random.default_rng((seed, 2, step))
        images = np.empty((2, mix.pairs, size, size, 3), np.uint8)
        masks = np.zeros((2, mix.pairs, cells, cells), np.float32)
        masks[1, : mix.dfdc] = np.nan
        for i, (real, fake) in enumerate(table[order[place * mix.dfdc :][: mix.dfdc]]):
            native = min(1.0, float(material.faces.source_width[real]) / CACHE_PX)
            degradation = mix.kept(draw(rng, CACHE_PX, size, view=1.0, native=native))
            images[0, i] = apply(material.faces.images[real], degradation)
            images[1, i] = apply(material.faces.images[fake], degradation)
        wanted = [family for family, count in mix.families.items() for _ in range(count)]
        for i, family in enumerate(wanted, mix.dfdc):
            source, index, donor = _drawn(material, mix, rng)
            made = blend(family, source.face(index), donor, _needed(material.eigenfaces), rng)
            view = min(1.0, float(rng.uniform(*mix.views)) / source.side)
            degradation = mix.kept(
                draw(rng, made.real.shape[0], size, view=view, native=float(source.native[index]), coded=True)
            )
            images[0, i] = apply(made.real, degradation)
            images[1, i] = apply(made.fake, degradation)
            masks[1, i] = cv2.resize(
                apply_to_mask(made.mask, degradation), (cells, cells), interpolation=cv2.INTER_AREA
            )
        yield Batch(images.reshape(-1, size, size, 3), labels, masks.reshape(-1, cells, cells))
        step += 1


def framed(crops: NDArray[np.uint8], side: float, policy: CropPolicy) -> NDArray[np.uint8]:
    """Crops `side` box heights wide as a member sees them: uint8 [N, S, S, 3]; a wider policy gets all."""
    wanted = policy.side if policy.kind is CropKind.TIGHT else 1 + policy.side + policy.top
    length = crops.shape[1]
    inside = round(length * min(1.0, wanted / side))
    start = (length - inside) // 2
    return resized(crops[:, start : start + inside, start : start + inside], policy.size)


def resized(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The whole crops at the network's size, as at run time: uint8 [N, size, size, 3]."""
    out = np.empty((len(images), size, size, 3), np.uint8)
    for i, image in enumerate(images):
        way = cv2.INTER_AREA if image.shape[0] > size else cv2.INTER_LINEAR
        out[i] = cv2.resize(np.ascontiguousarray(image), (size, size), interpolation=way)
    return out


class _Rows:
    """Chosen rows of a memory-mapped array, read when asked for."""

    def __init__(self, images: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        self._images, self.rows = images, rows
        self.shape = (len(rows), *images.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: "int | slice") -> NDArray[np.uint8]:
        chosen: NDArray[np.uint8] = self._images[self.rows[index]]
        return chosen


Pictures = NDArray[np.uint8] | _Rows
"""uint8 [N, P, P, 3], in memory or read one by one."""


def _drawn(material: Material, mix: Mix, rng: np.random.Generator) -> tuple[Source, int, Face]:
    """An authentic face of a drawn source, and as donor the most alike of some others there."""
    names = list(mix.shares)
    shares = np.array([mix.shares[name] for name in names])
    source = material.sources[names[int(rng.choice(len(names), p=shares / shares.sum()))]]
    index = int(rng.integers(len(source.points)))
    others = rng.integers(len(source.points), size=CANDIDATES)
    donor = int(others[nearest(source.points[index], source.points[others])])
    return source, index, source.face(donor)


def _needed(eigenfaces: Eigenfaces | None) -> Eigenfaces:
    if eigenfaces is None:
        raise DataError("eigenfaces: not loaded; pseudo-fakes need them")
    return eigenfaces


def _eigenfaces(cache_dir: Path, sources: Mapping[str, Source]) -> Eigenfaces:
    path = cache_dir / f"eigenfaces_{'_'.join(sorted(sources))}.npz"
    if not path.exists():
        each = EIGENFACES_FROM // len(sources)
        faces = [
            source.face(int(index))
            for source in sources.values()
            for index in np.linspace(0, len(source.points) - 1, min(each, len(source.points))).astype(int)
        ]
        fitted = Eigenfaces.fitted(faces)
        np.savez(path, mean=fitted.mean, basis=fitted.basis)
    with np.load(path) as saved:
        return Eigenfaces(saved["mean"], saved["basis"])


def _points(path: Path, images: "Pictures") -> NDArray[np.float32]:
    if not path.exists():
        smallest = 0.3 * images.shape[1]
        np.save(path, find_points(images, MtcnnDetector(smallest, 0.6)))
    points: NDArray[np.float32] = np.load(path)
    return points


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


Decoded = tuple[NDArray[np.uint8], list[str], list[int]]
"""Crops uint8 [N, P, P, 3], their names, and a number for each: bytes of its file, or its side in pixels."""


def _cached(stem: Path, make: Callable[[], Decoded]) -> Decoded:
    """The names are written last: a cache without them is made again."""
    array, meta = stem.with_suffix(".npy"), stem.with_suffix(".json")
    if not meta.exists():
        stem.parent.mkdir(parents=True, exist_ok=True)
        images, names, numbers = make()
        np.save(array, images)
        meta.write_text(json.dumps({"names": names, "numbers": numbers}))
    known = json.loads(meta.read_text())
    return np.load(array, mmap_mode="r"), known["names"], known["numbers"]


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
            images.append(_picture(name, data))
            names.append(name)
            sizes.append(len(data))
    return resized(images, CACHE_PX), names, sizes  # type: ignore[arg-type]  # a list of pictures serves


def _detect(path: Path) -> Decoded:
    detector = MtcnnDetector(40, 0.9)
    framed = CropPolicy(CropKind.TIGHT, size=LOOSE_PX, side=LOOSE_SIDE, shift=SHIFT)
    needed = replace(framed, side=NEEDED_SIDE)
    images, names, sides = [], [], []
    for name, data in _members(path):
        picture = _picture(name, data)
        faces = detector.detect([picture])[0]
        if not faces:
            continue
        x0, y0, x1, y1 = needed.square(faces[0].box)
        if min(x0, y0) < 0 or x1 > picture.shape[1] or y1 > picture.shape[0]:
            continue
        if (crop(picture, faces[0].box, needed).max(axis=2) < 4).mean() > 0.02:
            continue
        face = crop(picture, faces[0].box, framed)
        x0, _, x1, _ = framed.square(faces[0].box)
        images.append(face)
        names.append(name)
        sides.append(round(x1 - x0))
    return np.stack(images), names, sides
