"""What a folder of training data must hold, checked before anything is computed."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from detectors.training.data import DataError, Faces

EXPECTED = (
    "expected in the folder of --data: dfdc_faces.csv, dfdc_faces_train_*.tar, dfdc_faces_val_*.tar, and "
    "NAME.tar for every further source that the recipe names (docs/training.md)"
)


def check_layout(data_dir: Path, sources: Iterable[str]) -> None:
    """Raises DataError for the first thing that is missing; names it, and the whole layout."""
    patterns = ["dfdc_faces.csv", "dfdc_faces_train_*.tar", "dfdc_faces_val_*.tar"]
    for pattern in [*patterns, *(f"{name}.tar" for name in sources)]:
        if not any(data_dir.glob(pattern)):
            raise DataError(f"{data_dir / pattern}: no such file; {EXPECTED}")


def check_clips(data_dir: Path) -> None:
    """Raises DataError when there is no clip to calibrate a member with."""
    if not any(data_dir.glob("clips/*/*.mp4")):
        raise DataError(
            f"{data_dir / 'clips'}: no clip; expected clips/authentic/*.mp4, clips/manipulated/*.mp4 or "
            "clips/manipulated_faces/*.mp4: how a score moves from frame to frame is measured on them"
        )


def check_strangers(train: Faces, check: Faces) -> None:
    """Raises DataError when a person of the validation crops is also trained on."""
    both = np.intersect1d(train.identity, check.identity)
    if len(both):
        raise DataError(
            f"dfdc_faces.csv: {len(both)} people are in train and in val, the first of them {both[0]}; "
            "expected every identity in one split: a network recognises whom it has seen"
        )
