"""Faces of FER2013 with the ten votes of FER+: reading them, and what the votes say.

Barsoum et al., "Training Deep Networks for Facial Expression Recognition with Crowd-Sourced Label
Distribution".
"""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from detectors.expression import SIDE
from detectors.readings import EXPRESSIONS
from detectors.training.data import DataError

VOTES = (*EXPRESSIONS, "unknown", "no_face")
"""Columns of the table, in this order everywhere."""

PATTERN = "ferplus_*.csv"
TRAIN, VAL = "ferplus_train.csv", "ferplus_val.csv"
NONE = -1
"""Label of a picture on which the voters do not agree."""


@dataclass(frozen=True, slots=True)
class Voted:
    """`images` uint8 [N, 48, 48], grey; `votes` int64 [N, 10], columns as in VOTES."""

    images: NDArray[np.uint8]
    votes: NDArray[np.int64]

    def of(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Voted":
        """Those rows alone."""
        return Voted(self.images[chosen], self.votes[chosen])


def agreed(votes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The label of each picture for evaluation, a place in EXPRESSIONS, or NONE: int64 [N] of votes [N, 10].

    Single votes are taken for slips and dropped; one answer must then have more than half of what remains,
    and be an expression rather than unknown or no face. 3,191 of the 3,579 validation pictures have one.
    """
    kept = _without_slips(votes)
    best = kept.argmax(axis=1)
    clear = 2 * kept.max(axis=1) > kept.sum(axis=1)
    return np.where(clear & (best < len(EXPRESSIONS)), best, NONE).astype(np.int64)


def distributions(votes: NDArray[np.int64]) -> NDArray[np.float32]:
    """How the votes are shared among the expressions, float32 [N, 8] of votes [N, 10], slips dropped.

    Rows add up to 1, or are 0 where no expression has more votes than unknown and than no face.
    """
    kept = _without_slips(votes).astype(np.float32)
    shown, other = kept[:, : len(EXPRESSIONS)], kept[:, len(EXPRESSIONS) :]
    usable = shown.max(axis=1) > other.max(axis=1)
    total = np.where(usable, shown.sum(axis=1), np.inf)
    return np.asarray(shown / total[:, None], np.float32)


def _without_slips(votes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(votes > 1, votes, 0)


def tables(folder: Path) -> list[Path]:
    """The tables of a folder to be judged by: all, but that of the training pictures when there are others.

    Raises DataError when there is none.
    """
    found = sorted(folder.glob(PATTERN))
    if not found:
        raise DataError(
            f"{folder / PATTERN}: no such file; expected tables of FER+ votes beside the mosaics or pictures "
            "that they name (docs/expression.md)"
        )
    return [path for path in found if path.name != TRAIN] or found


def load_votes(paths: Iterable[Path]) -> Voted:
    """Read tables and the faces that they name, in their order.

    A row names a mosaic, and row and column of its 48 px tile there; or, where there is no such mosaic, a
    picture by `name`, anywhere below the table's folder. Raises DataError naming table, line, and what would
    be right.
    """
    parts = [_table(path) for path in paths]
    return Voted(
        np.concatenate([part.images for part in parts]), np.concatenate([part.votes for part in parts])
    )


def _table(path: Path) -> Voted:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := {"name", *VOTES} - set(reader.fieldnames or ()):
                raise DataError(f"{path}: no column {min(missing)}; expected name, {', '.join(VOTES)}")
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a table of FER+ votes") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not CSV in UTF-8: {error}") from error
    if not rows:
        raise DataError(f"{path}: no rows; expected a face a row")
    faces = _Faces(path)
    images = np.stack([faces.of(line, row) for line, row in rows])
    return Voted(images, np.array([_votes(path, line, row) for line, row in rows], np.int64))


def _votes(path: Path, line: int, row: Mapping[str, str | None]) -> list[int]:
    return [_number(path, line, row, name) for name in VOTES]


def _number(path: Path, line: int, row: Mapping[str, str | None], column: str) -> int:
    text = (row.get(column) or "").strip()
    if not text.isdecimal():
        raise DataError(f"{path} line {line}: {column} is {text!r}; expected a whole number, 0 or more")
    return int(text)


class _Faces:
    """The faces that one table names; each mosaic is decoded once."""

    def __init__(self, table: Path) -> None:
        self._table = table
        self._mosaics: dict[str, NDArray[np.uint8]] = {}
        self._pictures: dict[str, Path] | None = None

    def of(self, line: int, row: Mapping[str, str | None]) -> NDArray[np.uint8]:
        mosaic = (row.get("mosaic") or "").strip()
        if mosaic not in self._mosaics and not (mosaic and (self._table.parent / mosaic).is_file()):
            return _fitted(_grey(self._picture(line, row)))
        if mosaic not in self._mosaics:
            self._mosaics[mosaic] = _grey(self._table.parent / mosaic)
        top, left = (SIDE * _number(self._table, line, row, name) for name in ("row", "column"))
        tile = self._mosaics[mosaic][top : top + SIDE, left : left + SIDE]
        if tile.shape != (SIDE, SIDE):
            raise DataError(
                f"{self._table} line {line}: row {row['row']}, column {row['column']}: outside of {mosaic}, "
                f"tiles of {SIDE} px"
            )
        return tile

    def _picture(self, line: int, row: Mapping[str, str | None]) -> Path:
        name = (row["name"] or "").strip()
        beside = self._table.parent / name
        if name and beside.is_file():
            return beside
        if self._pictures is None:
            self._pictures = {path.name: path for path in self._table.parent.rglob("*.png")}
        if name not in self._pictures:
            raise DataError(
                f"{self._table} line {line}: neither a picture named {name!r} below {self._table.parent} nor "
                f"a mosaic named {(row.get('mosaic') or '').strip()!r} in it; expected one of them"
            )
        return self._pictures[name]


def _grey(path: Path) -> NDArray[np.uint8]:
    try:
        with Pillow.open(path) as picture:
            return np.asarray(picture.convert("L"), np.uint8)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: cannot be read as a picture: {error}") from error


def _fitted(face: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if face.shape == (SIDE, SIDE):
        return face
    how = cv2.INTER_AREA if min(face.shape) > SIDE else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(face, (SIDE, SIDE), interpolation=how), np.uint8)
