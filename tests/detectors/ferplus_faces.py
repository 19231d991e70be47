"""A folder in the layout of FER+, drawn: the expression is a bright bar, whose height says which it is."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from detectors.expression import SIDE
from detectors.readings import EXPRESSIONS
from detectors.training.expression.ferplus import VOTES

ACROSS = 10
"""Tiles a row of a drawn mosaic."""
SHOWN = 3
"""Classes that are drawn."""


def drawn(label: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A face uint8 [48, 48]: the bar of its class in both halves, at places of its own, over noise."""
    face = rng.integers(60, 120, (SIDE, SIDE))
    for top in (4, 28):
        left = 2 + 14 * label
        face[top : top + 14, left : left + 12] = 230
    return face.astype(np.uint8)


def write_faces(folder: Path, split: str, count: int, seed: int, pictures: bool = False) -> None:
    """Write `ferplus_SPLIT.csv` and its mosaic, or single pictures; the first row has no agreed label."""
    rng = np.random.default_rng(seed)
    labels = [n % SHOWN for n in range(count)]
    faces = [drawn(label, rng) for label in labels]
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["name", *VOTES] if pictures else ["mosaic", "row", "column", "name", *VOTES]
    with (folder / f"ferplus_{split}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for n, label in enumerate(labels):
            votes = dict.fromkeys(VOTES, 0) | {EXPRESSIONS[label]: 8, EXPRESSIONS[(label + 1) % SHOWN]: 2}
            if n == 0:
                votes |= {EXPRESSIONS[label]: 5, EXPRESSIONS[(label + 1) % SHOWN]: 5}
            place = {"mosaic": f"{split}.png", "row": n // ACROSS, "column": n % ACROSS}
            writer.writerow({"name": f"{split}{n}.png"} | place | votes)
    if pictures:
        (folder / "faces").mkdir()
        for n, face in enumerate(faces):
            Pillow.fromarray(face).save(folder / "faces" / f"{split}{n}.png")
        return
    mosaic = np.zeros((SIDE * -(-count // ACROSS), SIDE * ACROSS), np.uint8)
    for n, face in enumerate(faces):
        top, left = SIDE * (n // ACROSS), SIDE * (n % ACROSS)
        mosaic[top : top + SIDE, left : left + SIDE] = face
    Pillow.fromarray(mosaic).save(folder / f"{split}.png")
