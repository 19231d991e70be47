"""Crops that a member is examined on: drawn evenly over people, in the size they had in their picture.

The data set's files are all 224 px; what a face had in its video is in `source_width` and `source_height`.
What happens to a face before the network sees it (blur, noise, an encoder) happens at that size, and the
quality gate judges it there.
"""

import csv
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.readings import Image
from detectors.training.data import DataError

TABLE = "dfdc_faces.csv"


@dataclass(frozen=True, slots=True)
class Probe:
    """One crop at its source size: `image` uint8 [h, w, 3] RGB, `label` 1 for manipulated, `identity` of the
    person filmed."""

    name: str
    image: Image
    label: int
    identity: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A manipulated crop and the authentic one it was made of, uint8 [224, 224, 3] RGB each."""

    name: str
    authentic: Image
    manipulated: Image
    identity: int


def load_probes(data_dir: Path, count: int, seed: int, split: str = "val") -> list[Probe]:
    """Draws `count` crops, half of each class, people in turn; fewer when there are fewer.

    The same seed draws the same crops. Raises DataError for a missing file, column or picture.
    """
    rows = _rows(data_dir, split)
    rng = np.random.default_rng(seed)
    wanted = [
        row
        for label in ("real", "fake")
        for row in in_turn([row for row in rows if row["label"] == label], count // 2, rng)
    ]
    files = _files(data_dir, split, {row["name"] for row in wanted})
    return [
        Probe(
            name=row["name"],
            image=_at_source_size(_picture(row["name"], files), row),
            label=int(row["label"] == "fake"),
            identity=int(row["identity"]),
        )
        for row in wanted
    ]


def load_pairs(data_dir: Path, count: int, seed: int, split: str = "val") -> list[Pair]:
    """Draws `count` pairs whose two crops had one size in their pictures, people in turn; fewer when there
    are fewer. Raises DataError as `load_probes` does."""
    rows = _rows(data_dir, split)
    by_name = {row["name"]: row for row in rows}
    aligned = [row for row in rows if row["original"] in by_name and _equal(row, by_name[row["original"]])]
    wanted = in_turn(aligned, count, np.random.default_rng(seed))
    files = _files(data_dir, split, {row[field] for row in wanted for field in ("name", "original")})
    return [
        Pair(
            name=row["name"],
            authentic=_picture(row["original"], files),
            manipulated=_picture(row["name"], files),
            identity=int(row["identity"]),
        )
        for row in wanted
    ]


def in_turn(rows: Sequence[dict[str, str]], count: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """Return `count` rows (fewer when there are fewer), drawn from one identity after the other, so that no
    person with many videos outweighs the rest."""
    of_person: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        of_person.setdefault(row["identity"], []).append(row)
    people = [of_person[person] for person in sorted(of_person)]
    shuffled = [[person[i] for i in rng.permutation(len(person))] for person in people]
    deepest = max(map(len, shuffled), default=0)
    turns = [[person[turn] for person in shuffled if turn < len(person)] for turn in range(deepest)]
    mixed = [turn[i] for turn in turns for i in rng.permutation(len(turn))]
    return mixed[:count]


def _equal(one: dict[str, str], other: dict[str, str]) -> bool:
    return all(one[field] == other[field] for field in ("source_width", "source_height"))


def _rows(data_dir: Path, split: str) -> list[dict[str, str]]:
    path = data_dir / TABLE
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == split]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except KeyError as error:
        raise DataError(f"{path}: no column {error}") from None
    if not rows:
        raise DataError(f"{path}: no row with split {split}")
    return rows


def _files(data_dir: Path, split: str, names: set[str]) -> dict[str, bytes]:
    shards = sorted(data_dir.glob(f"dfdc_faces_{split}_*.tar"))
    if not shards:
        raise DataError(f"{data_dir}/dfdc_faces_{split}_*.tar: no such file")
    return {name: data for shard in shards for name, data in _read(shard) if name in names}


def _read(shard: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                yield Path(member.name).stem, file.read()


def _picture(name: str, files: dict[str, bytes]) -> Image:
    if name not in files:
        raise DataError(f"{name}: in {TABLE}, but in none of the tars")
    picture = cv2.imdecode(np.frombuffer(files[name], np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise DataError(f"{name}: not a picture")
    rgb: NDArray[np.uint8] = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
    return rgb


def _at_source_size(picture: Image, row: dict[str, str]) -> Image:
    try:
        size = int(row["source_width"]), int(row["source_height"])
    except ValueError as error:
        raise DataError(f"{row['name']}: source size: {error}") from None
    # Without averaging: what was enlarged to 224 px holds no detail that could alias.
    restored: Image = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC).astype(np.uint8, copy=False)
    return restored


def resized(picture: Image, size: tuple[int, int]) -> Image:
    """Return the picture in (width, height) `size`: areas averaged on reduction, bilinear on enlargement."""
    smaller = size[0] < picture.shape[1]
    way = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    out: Image = cv2.resize(picture, size, interpolation=way).astype(np.uint8, copy=False)
    return out
