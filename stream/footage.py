"""Footage that a user hands over as files and folders: what is in it, and whose hours they are."""

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stream.errors import Code, UnmaskError
from stream.redact import redact
from stream.score import VIDEOS


@dataclass(frozen=True, slots=True)
class File:
    """One video. `person` groups what is no independent evidence; `sha256` is that of its bytes."""

    path: Path
    person: str
    manipulated: bool
    sha256: str


@dataclass(frozen=True, slots=True)
class Footage:
    """All files, each content once. What was left out is counted: `other` files with other endings in
    folders, `doubled` copies of a file that is there already, `unreadable` files that could not be opened,
    and why."""

    files: tuple[File, ...]
    other: int
    doubled: tuple[Path, ...]
    unreadable: tuple[tuple[Path, str], ...]
    unnamed: int
    """Files that the list of people does not name: their folder stands for the person."""


def gather(authentic: Sequence[str], manipulated: Sequence[str], people: Path | None) -> Footage:
    """Return the videos among and below the given paths, in order, folders by name.

    A person is what `people` (CSV with the columns path, person; a path may be a folder; relative to the CSV)
    says, else the folder a file lies in. Raises `UnmaskError`: SOURCE_REFUSED for a live address,
    SOURCE_NOT_FOUND for a path that is not there and a folder without videos, CONFIG for a CSV that cannot be
    used and for a file given as both authentic and manipulated.
    """
    named = {} if people is None else read_people(people)
    files: dict[str, File] = {}
    doubled: list[Path] = []
    unreadable: list[tuple[Path, str]] = []
    other = unnamed = 0
    for truth, option, paths in ((False, "--authentic", authentic), (True, "--manipulated", manipulated)):
        found, passed_over = _walk(paths, option)
        other += passed_over
        for path in found:
            try:
                digest = _sha256(path)
            except OSError as error:
                unreadable.append((path, f"cannot be read: {error.strerror}"))
                continue
            if digest in files:
                _check_truth(files[digest], path, truth)
                doubled.append(path)
                continue
            person = _person(path, named)
            unnamed += bool(named) and person is None
            files[digest] = File(path, person or f"folder {path.resolve().parent}", truth, digest)
    return Footage(tuple(files.values()), other, tuple(doubled), tuple(unreadable), unnamed)


def read_people(path: Path) -> Mapping[Path, str]:
    """Read `path,person` rows; paths, of files or folders, are relative to the CSV.

    Raises `UnmaskError` (CONFIG) naming line, column and what would be right.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _people(csv.DictReader(file, strict=True), path)
    except OSError as error:
        raise UnmaskError(Code.CONFIG, f"--people {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UnmaskError(Code.CONFIG, f"--people {path} is not CSV in UTF-8: {error}") from None


def _people(rows: "csv.DictReader[str]", path: Path) -> Mapping[Path, str]:
    missing = {"path", "person"} - set(rows.fieldnames or ())
    if missing:
        columns = " and ".join(sorted(missing))
        raise UnmaskError(Code.CONFIG, f"--people {path} has no column {columns}; line 1 must be path,person")
    named: dict[Path, str] = {}
    for row in rows:
        name, person = (row["path"] or "").strip(), (row["person"] or "").strip()
        where = f"--people {path} line {rows.line_num}"
        if not name or not person:
            raise UnmaskError(Code.CONFIG, f"{where}: path or person is empty; both are needed")
        target = (path.parent / name).resolve()
        if not target.exists():
            raise UnmaskError(Code.CONFIG, f"{where}: {name} is not there; paths are relative to the CSV")
        if named.setdefault(target, person) != person:
            raise UnmaskError(
                Code.CONFIG, f"{where}: {name} is {person} here and {named[target]} above; one would be right"
            )
    if not named:
        raise UnmaskError(Code.CONFIG, f"--people {path} names nobody; each line must be path,person")
    return named


def _person(path: Path, named: Mapping[Path, str]) -> str | None:
    """Return who is in a file: what is said of it, else of the nearest folder above it."""
    whole = path.resolve()
    return next((named[place] for place in (whole, *whole.parents) if place in named), None)


def _walk(paths: Iterable[str], option: str) -> tuple[list[Path], int]:
    files: list[Path] = []
    other = 0
    for text in paths:
        _refuse_live(text, option)
        path = Path(text).expanduser()
        if not path.is_dir():
            if not path.exists():
                raise UnmaskError(Code.SOURCE_NOT_FOUND, f"{option} {path}: no such file or folder")
            files.append(path)
            continue
        below = sorted(item for item in path.rglob("*") if item.is_file())
        videos = [item for item in below if item.suffix.lower() in VIDEOS]
        if not videos:
            raise UnmaskError(
                Code.SOURCE_NOT_FOUND,
                f"{option} {path}: the folder holds no file ending in {' '.join(sorted(VIDEOS))}",
            )
        other += len(below) - len(videos)
        files += videos
    return files, other


def _refuse_live(text: str, option: str) -> None:
    if "://" not in text and not text.startswith("env:") and text != "-" and not text.startswith("/dev/"):
        return
    raise UnmaskError(
        Code.SOURCE_REFUSED,
        f"{option} {redact(text)} is a live source; thresholds are fixed on recordings, which can be read "
        "again. Record it (ffmpeg -i ADDRESS -c copy -t 3600 hour.mkv), and give the file or its folder",
    )


def _check_truth(known: File, path: Path, manipulated: bool) -> None:
    if known.manipulated is manipulated:
        return
    raise UnmaskError(
        Code.CONFIG,
        f"{path} is given as manipulated and {known.path}, the same footage, as authentic; "
        "one of them would be right",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
