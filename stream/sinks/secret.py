"""Secrets by reference: `env:NAME` or `file:PATH`, looked up at each use, never written down or printed."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from stream.errors import Code, UnmaskError

REFERENCE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*|file:/.+")

MAX_BYTES = 64 * 1024
"""Far more than any address, token or key."""


def is_reference(text: str) -> bool:
    return REFERENCE.fullmatch(text) is not None


def look_up(reference: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return what an environment variable or a file holds, without white space about it.

    A file is read anew each time, so that a mounted secret can be exchanged under a running process. Raises
    `UnmaskError` (CONFIG) naming the reference, never its content.
    """
    kind, _, where = reference.partition(":")
    found = environ.get(where, "") if kind == "env" else _read(reference, Path(where))
    if not found.strip():
        raise UnmaskError(Code.CONFIG, f"{reference} is empty or not set; it must hold the secret")
    return found.strip()


def _read(reference: str, path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_BYTES)
    except OSError as error:
        raise UnmaskError(Code.CONFIG, f"{reference} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UnmaskError(Code.CONFIG, f"{reference} is not UTF-8 text") from None
