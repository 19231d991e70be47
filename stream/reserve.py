"""A file that only takes space, given up when the disk is full: deleting from a log needs space too."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from stream.errors import Code, UnmaskError

logger = logging.getLogger(__name__)

T = TypeVar("T")

RESERVE_BYTES = 8 * 1024 * 1024
"""Twice what SQLite's WAL holds between checkpoints: enough to empty it into the file and delete."""


def set_aside(directory: Path) -> None:
    """Take the space, if it is not taken; a full disk is no error here, the next call tries again."""
    path = directory / "reserve"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
    except OSError as error:
        path.unlink(missing_ok=True)
        logger.debug("no space to set aside in %s: %s", directory, error)
    finally:
        os.close(descriptor)


def with_reserve(directory: Path, action: Callable[[], T]) -> T:
    """Return what `action` returns; if it finds the disk full, give the reserve up and try once more."""
    try:
        return action()
    except UnmaskError as error:
        if error.code is not Code.LOG_FULL or not (directory / "reserve").exists():
            raise
    logger.warning("the disk under %s is full: using what was set aside", directory)
    (directory / "reserve").unlink(missing_ok=True)
    return action()
