"""`unmask enroll`: people whom a feed may be said to show, kept encrypted (docs/identity.md)."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from detectors.cues.identity import MISMATCH
from detectors.readings import Box, Image
from detectors.registry import FACENET
from stream.clock import Clock, SystemClock
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.vault import Person, Vault

OK, ABSENT = 0, 1
"""Exit codes; 1: nobody of that name is enrolled."""

LIST, DELETE = "list", "delete"

Find = Callable[[Image], Box | None]
"""The box of the largest face, None without one."""

Embed = Callable[[Sequence[tuple[Image, Box]]], NDArray[np.float32]]
"""Embeddings [N, 512] of faces in pictures."""


def run(settings: Config, words: Sequence[str], as_json: bool, out: TextIO) -> int:
    """`list`, `delete NAME`, or NAME and pictures to enroll. Return the exit code; raises `UnmaskError`."""
    vault = Vault.of(settings)
    if words[0] == LIST and len(words) == 1:
        return listed(vault, as_json, out)
    if words[0] == DELETE and len(words) == 2:
        return delete(vault, words[1], out)
    if words[0] in (LIST, DELETE) or len(words) < 2:
        raise UnmaskError(
            Code.CONFIG,
            f"enroll {' '.join(words)} is not complete; NAME PATH..., list, or delete NAME is right",
        )
    find, embed = _networks(settings)
    return enroll(vault, words[0], [Path(word) for word in words[1:]], find, embed, SystemClock(), out)


def listed(vault: Vault, as_json: bool, out: TextIO) -> int:
    """Print who is enrolled."""
    for person in vault.people():
        told = {"name": person.name, "pictures": len(person.embeddings), "enrolled_us": person.enrolled_us}
        out.write(json.dumps(told, ensure_ascii=False) if as_json else f"{person.name}  {told['pictures']}")
        out.write("\n")
    return OK


def delete(vault: Vault, name: str, out: TextIO) -> int:
    """Delete a person for good."""
    if not vault.delete(name):
        out.write(f"nobody named {name} is enrolled\n")
        return ABSENT
    out.write(f"{name} deleted\n")
    return OK


def enroll(
    vault: Vault, name: str, paths: Sequence[Path], find: Find, embed: Embed, clock: Clock, out: TextIO
) -> int:
    """Enroll a person by pictures with one face each, the largest counts; replaces who had that name.

    Raises `UnmaskError` for a picture without a face, and for one that does not look like the others.
    """
    from stream.score import expand, read_picture

    faces: list[tuple[Image, Box]] = []
    files = expand(paths, crops=True)
    for path in files:
        picture = read_picture(path)
        if isinstance(picture, str):
            raise UnmaskError(Code.SOURCE_INVALID, f"{path} {picture}")
        box = find(picture)
        if box is None:
            raise UnmaskError(Code.SOURCE_INVALID, f"{path} shows no face; a picture with one is right")
        faces.append((picture, box))
    embeddings = embed(faces)
    mean = embeddings.mean(0) / max(float(np.linalg.norm(embeddings.mean(0))), 1e-12)
    for path, embedding in zip(files, embeddings, strict=True):
        if 1 - float(embedding @ mean) > MISMATCH:
            raise UnmaskError(
                Code.SOURCE_INVALID, f"{path} does not look like the others; pictures of one person are right"
            )
    vault.put(Person(name, embeddings, clock.now_us()))
    out.write(f"{name} enrolled by {len(files)} {'picture' if len(files) == 1 else 'pictures'}\n")
    return OK


def _networks(settings: Config) -> tuple[Find, Embed]:
    path = FACENET.path(Path(settings.engines.cache_dir).expanduser())
    if not path.exists():
        raise UnmaskError(
            Code.WEIGHTS, "enrolling needs weights that are not there; unmask models pull facenet brings them"
        )
    from detectors.cues.embedding import Embedder, EmbeddingError, cut
    from detectors.mtcnn import MtcnnDetector
    from stream.score import reduced

    try:
        embedder = Embedder.load(path, FACENET.sha256)
    except EmbeddingError as error:
        raise UnmaskError(Code.WEIGHTS, f"{error}; unmask models pull facenet replaces it") from error
    detector = MtcnnDetector(settings.faces.min_face_px, settings.faces.confidence)

    def find(picture: Image) -> Box | None:
        small = reduced(picture, settings.decode.detect_width)
        scale = picture.shape[1] / small.shape[1]
        found = detector.detect([small], [1 / scale])[0]
        if not found:
            return None
        x0, y0, x1, y1 = found[0].box
        return x0 * scale, y0 * scale, x1 * scale, y1 * scale

    def embed(faces: Sequence[tuple[Image, Box]]) -> NDArray[np.float32]:
        return embedder([cut(picture, box) for picture, box in faces])

    return find, embed
