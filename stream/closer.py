"""What is looked at in a face beside the members: cues of a single picture, and what the face looks like.

Nothing of this runs unless a cue has a say (`detectors/late.json`) or the settings record it (`cues.record`,
`expression`).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from detectors.cues import missing
from detectors.cues.identity import CLAIM, IDENTITY
from detectors.late import LateError, load_late
from detectors.readings import FaceReading, Image
from detectors.registry import FACENET
from stream.config import Config
from stream.errors import Code, UnmaskError

logger = logging.getLogger(__name__)

Faces = Sequence[tuple[Image, FaceReading]]
Look = Callable[[Faces], list[FaceReading]]
"""Takes faces with the full-resolution pictures they are in, and returns them with more known of them."""


class Reader(Protocol):
    """What is wrapped: `detectors.reader.FaceReader`."""

    @property
    def engine(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def faces_cut_off(self) -> int: ...

    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]: ...

    def read_crops(self, crops: Sequence[Image]) -> list[FaceReading]: ...


class Closer:
    """A reader whose faces are looked at more closely. Used by the thread that the reader belongs to.

    Cropped faces are left as they are: there is no track in them.
    """

    def __init__(self, reader: Reader, looks: Sequence[Look]) -> None:
        self._reader = reader
        self._looks = looks

    @property
    def engine(self) -> str:
        return self._reader.engine

    @property
    def precision(self) -> str:
        return self._reader.precision

    @property
    def faces_cut_off(self) -> int:
        return self._reader.faces_cut_off

    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        """As the reader's."""
        found = self._reader.read(frames)
        pictures = [image for (image, _), faces in zip(frames, found, strict=True) for _ in faces]
        flat = [face for faces in found for face in faces]
        for look in self._looks:
            flat = look(list(zip(pictures, flat, strict=True)))
        faces = iter(flat)
        return [tuple(next(faces) for _ in of_frame) for of_frame in found]

    def read_crops(self, crops: Sequence[Image]) -> list[FaceReading]:
        """As the reader's."""
        return self._reader.read_crops(crops)


def wanted_cues(settings: Config) -> frozenset[str]:
    """Names of the cues that are computed: those with a say, and those to be recorded.

    Raises `UnmaskError` (WEIGHTS) for a broken `late.json`.
    """
    try:
        return frozenset(load_late().names) | frozenset(settings.cues.record)
    except LateError as error:
        raise UnmaskError(Code.WEIGHTS, str(error)) from error


def looks_of(settings: Config) -> list[Look]:
    """What the settings want looked at in each face; empty by default, and then nothing is loaded."""
    wanted = wanted_cues(settings)
    looks = [_embedding_look(settings, wanted)] if wanted & {IDENTITY, CLAIM} else []
    if settings.expression:
        from stream.expression import expression_look

        looks.append(expression_look(settings))
    return looks


def _embedding_look(settings: Config, wanted: frozenset[str]) -> Look:
    names = sorted(wanted & {IDENTITY, CLAIM})
    path = FACENET.path(Path(settings.engines.cache_dir).expanduser())
    if not path.exists():
        reason = "off: its weights are not there; unmask models pull facenet brings them"
        logger.warning("cues %s are %s", ", ".join(names), reason)
        told = tuple(missing(name, reason) for name in names)
        return lambda faces: [replace(face, cues=(*face.cues, *told)) for _, face in faces]
    from detectors.cues.embedding import Embedder, EmbeddingError, cut

    try:
        embedder = Embedder.load(path, FACENET.sha256)
    except EmbeddingError as error:
        raise UnmaskError(Code.WEIGHTS, f"{error}; unmask models pull facenet replaces it") from error

    def look(faces: Faces) -> list[FaceReading]:
        good = [index for index, (_, face) in enumerate(faces) if not face.quality.reasons]
        embeddings = embedder([cut(faces[k][0], faces[k][1].detection.box) for k in good])
        found = dict(zip(good, embeddings, strict=True))
        return [replace(face, embedding=found.get(index)) for index, (_, face) in enumerate(faces)]

    return look
