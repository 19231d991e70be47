"""What building left behind: a folder for each thing built, named by all it depends on (DESIGN 3.7).

A folder is `<cache>/<engine>/<digest of its facts>/` with the files and a `facts.json`: the facts themselves
and the SHA-256 of each file, so that a spoiled one is made anew rather than run.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FACTS = "facts.json"

Facts = Mapping[str, Any]
"""What a built thing depends on, as JSON."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Something built earlier. `size` in bytes, `made` in seconds since 1970."""

    engine: str
    folder: Path
    facts: Facts
    size: int
    made: float


def digest(facts: Facts) -> str:
    """Return 64 hex digits that change with any fact."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each, "" for what is not installed."""
    return {package: _version(package) for package in packages}


def find(cache_dir: Path, engine: str, facts: Facts) -> Path | None:
    """Return the folder that was built from these facts, None if there is none or a file of it is spoiled."""
    folder = _folder(cache_dir, engine, facts)
    if not folder.is_dir():
        return None
    found = _read(folder)
    if found is not None and all(_sha256(folder / name) == sha for name, sha in found["files"].items()):
        return folder
    logger.warning("kept %s network %s is spoiled and is made anew", engine, folder.name[:12])
    discard(folder)
    return None


def keep(cache_dir: Path, engine: str, facts: Facts, write: Callable[[Path], None]) -> Path:
    """Return a folder that `write` filled, so that no other process ever sees half of it.

    Raises `OSError` when the cache cannot be written, and what `write` raises.
    """
    folder = _folder(cache_dir, engine, facts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix="."))
    try:
        write(fresh)
        files = {path.name: _sha256(path) for path in sorted(fresh.iterdir())}
        (fresh / FACTS).write_text(json.dumps({"facts": facts, "files": files}, indent=1), encoding="utf-8")
        _into_place(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def discard(folder: Path) -> None:
    """Delete what was kept there."""
    shutil.rmtree(folder, ignore_errors=True)


def entries(cache_dir: Path, engines: tuple[str, ...]) -> Iterator[Kept]:
    """Yield everything that is kept for these engines, whatever it was built with."""
    for engine in engines:
        for folder in sorted((cache_dir.expanduser() / engine).glob("[!.]*/")):
            found = _read(folder)
            if found is not None:
                files = [path.stat() for path in folder.iterdir()]
                made = (folder / FACTS).stat().st_mtime
                yield Kept(engine, folder, found["facts"], sum(file.st_size for file in files), made)


def _folder(cache_dir: Path, engine: str, facts: Facts) -> Path:
    return cache_dir.expanduser() / engine / digest(facts)


def _into_place(fresh: Path, folder: Path) -> None:
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        # another process was first; what it built is as good


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and all(isinstance(found.get(key), dict) for key in ("facts", "files"))
    return found if whole else None


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
