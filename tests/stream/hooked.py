"""`python -m tests.stream.hooked ...`: the command line, with faults that environment variables name."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectors.readings import FaceReading, Image
from stream import decoder_child, decoders, marker, worker
from stream.cli import main
from tests.stream import poison

HANG = "UNMASK_TEST_HANG"
"""Names a file: the first reader of all to see a picture without a square makes it, and never returns."""
HANG_START = "UNMASK_TEST_HANG_START"
"""Names a file: the first of all to start a decoder makes it, and never returns."""
HANG_CANARY = "UNMASK_TEST_HANG_CANARY"
"""Names a file: while it exists readers return nothing."""
POISON = "UNMASK_TEST_POISON"
"""Set: decoder children obey the poison in chunks."""


class _Hanging(marker.MarkerReader):
    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        found = super().read(frames)
        if not all(found):
            _hang_once(os.environ[HANG])
        return found


class _HangingPool(decoders.DecoderPool):
    def start(self, *args: Any) -> Any:
        _hang_once(os.environ[HANG_START])
        return super().start(*args)


def _hang_once(name: str) -> None:
    try:
        Path(name).touch(exist_ok=False)
    except FileExistsError:
        return
    time.sleep(3600)


class _Holding(marker.MarkerReader):
    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        while Path(os.environ[HANG_CANARY]).exists():
            time.sleep(0.05)
        return super().read(frames)


if __name__ == "__main__":
    if HANG_CANARY in os.environ:
        marker.MarkerReader = _Holding  # type: ignore[misc]
    if HANG_START in os.environ:
        worker.DecoderPool = _HangingPool  # type: ignore[misc]
    if HANG in os.environ:
        marker.MarkerReader = _Hanging  # type: ignore[misc]
    if POISON in os.environ:
        decoder_child.main = poison.main  # type: ignore[assignment]
    sys.exit(main())
