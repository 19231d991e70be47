"""`unmask models`: what networks there are, and pulling the published ones (docs/models/published.md)."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import yaml

from detectors.registry import (
    FOLDER,
    LICENCE,
    PREFIX,
    PUBLISHED,
    SHIPPED,
    TERMS,
    WEIGHTS,
    Published,
    RegistryError,
    State,
    describe,
    paper_figures,
    part_of,
    shipped,
    state,
)
from stream.config import Config
from stream.download import Told, Wanted, fetch
from stream.errors import Code, UnmaskError

OK, DECLINED, WRONG = 0, 1, 2
"""Exit codes."""

Records = Mapping[str, Published]
Ask = Callable[[str], bool]
"""Puts a question to the user."""


def cache_of(settings: Config) -> Path:
    """Return the folder below which pulled checkpoints lie."""
    return Path(settings.engines.cache_dir).expanduser()


def list_models(settings: Config, as_json: bool, out: TextIO, published: Records = PUBLISHED) -> int:
    """Print every network there is, and whether its weights are here; nothing is hashed."""
    described = _described(cache_of(settings), published)
    if as_json:
        for record in described:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
        return OK
    width = max(len(record["name"]) for record in described)
    for record in described:
        out.write(f"{record['name']:{width}}  {record['state']:7}  {_in_short(record)}\n")
    out.write(f"published networks: {LICENCE}; unmask models pull NAME shows the terms first\n")
    return OK


def show(settings: Config, name: str, as_json: bool, out: TextIO, published: Records = PUBLISHED) -> int:
    """Print all that is known of one network. Raises `UnmaskError` (CONFIG) for an unknown name."""
    described = {record["name"]: record for record in _described(cache_of(settings), published)}
    record = described.get(name) or described.get(PREFIX + name)
    if record is None:
        raise UnmaskError(Code.CONFIG, f"network {name!r} is unknown; there are: {', '.join(described)}")
    if as_json:
        out.write(json.dumps(record, ensure_ascii=False) + "\n")
        return OK
    yaml.safe_dump(record, out, sort_keys=False, allow_unicode=True, width=110)
    return OK


def verify(settings: Config, out: TextIO, published: Records = PUBLISHED, folder: Path = SHIPPED) -> int:
    """Hash the weights that are shipped and those that were pulled; exit code 2 if any is not as recorded."""
    cache = cache_of(settings)
    wrong = 0
    for name, own in _shipped(folder).items():
        wrong += _told(out, name, folder / name / WEIGHTS, str(own.get("sha256")), needed=True)
    for record in published.values():
        wrong += _told(out, PREFIX + record.name, record.path(cache), record.sha256, needed=False)
    known = {record.file_name for record in published.values()}
    for path in sorted((cache / FOLDER).glob("*")):
        if path.name.removesuffix(".part") not in known:
            out.write(f"unknown   {path}: of no network in the list; nothing loads it\n")
    return WRONG if wrong else OK


def _told(out: TextIO, name: str, path: Path, sha256: str, needed: bool) -> bool:
    """Print how the weights lie; return whether something is wrong with them."""
    try:
        found = state(path, sha256)
    except OSError as error:
        out.write(f"unread    {name}: {path}: {error.strerror}\n")
        return True
    remedy = "reinstall Unmask" if needed else f"unmask models pull {name} replaces it"
    match found:
        case State.RIGHT:
            out.write(f"right     {name}\n")
        case State.DIFFERS:
            out.write(f"DIFFERS   {name}: {path} has not SHA-256 {sha256}; do not use it: {remedy}\n")
        case State.PARTIAL:
            out.write(f"partial   {name}: unmask models pull {name} goes on\n")
        case State.ABSENT if needed:
            out.write(f"MISSING   {name}: {path}; {remedy}\n")
        case State.ABSENT:
            return False
    return found is State.DIFFERS or (needed and found is not State.RIGHT)


def pull(
    settings: Config,
    names: Sequence[str],
    every: bool,
    base: str,
    accepted: bool,
    out: TextIO,
    ask: Ask | None,
    published: Records = PUBLISHED,
) -> int:
    """Bring published checkpoints into the cache, after their terms were shown and accepted.

    `ask` None: nobody is there to be asked. Exit code 1 when the user declines. Raises `UnmaskError`.
    """
    records = _chosen(names, every, published)
    cache = cache_of(settings)
    left = [record for record in records if not _is_there(record, cache, out)]
    if not left:
        return OK
    out.write(f"{TERMS}\n")
    out.flush()
    if not accepted and not _agreed(ask, len(left)):
        out.write("declined; nothing was pulled\n")
        return DECLINED
    for record in left:
        _pull(record, cache, base, out)
    return OK


def _chosen(names: Sequence[str], every: bool, published: Records) -> list[Published]:
    if every == bool(names):
        raise UnmaskError(
            Code.CONFIG, "name the networks to pull, or --all; unmask models list prints what there is"
        )
    if every:
        return list(published.values())
    bare = [name.removeprefix(PREFIX) for name in dict.fromkeys(names)]
    unknown = [name for name in bare if name not in published]
    if unknown:
        raise UnmaskError(
            Code.CONFIG,
            f"network {unknown[0]!r} is not one that can be pulled; there are: {', '.join(published)}",
        )
    return [published[name] for name in bare]


def _is_there(record: Published, cache: Path, out: TextIO) -> bool:
    path = record.path(cache)
    try:
        found = state(path, record.sha256)
    except OSError as error:
        raise UnmaskError(Code.CONFIG, f"{path} cannot be read: {error.strerror}") from None
    if found is State.RIGHT:
        out.write(f"{PREFIX}{record.name} is there already\n")
    if found is State.DIFFERS:
        out.write(f"{PREFIX}{record.name} is there with another hash; pulled anew\n")
    return found is State.RIGHT


def _agreed(ask: Ask | None, count: int) -> bool:
    if ask is None:
        raise UnmaskError(
            Code.CONFIG,
            "nobody is there to accept these terms; --accept-terms does, where you have read them",
        )
    return ask(f"Accept these terms and pull {count} {'file' if count == 1 else 'files'}?")


def _pull(record: Published, cache: Path, base: str, out: TextIO) -> None:
    name = PREFIX + record.name

    def check(path: Path) -> None:
        from detectors.published import load_published

        try:
            load_published(record.name, path, record.sha256)
        except ValueError as error:
            raise UnmaskError(
                Code.WEIGHTS, f"{name} has the right hash but does not load, so it was deleted: {error}"
            ) from error

    def waits() -> None:
        out.write(f"{name} is being pulled by another process; waiting for it\n")
        out.flush()

    with _progress(name) as told:
        fetch(Wanted(record.file_name, record.sha256, record.path(cache)), base, check, told, waits)
    size = record.path(cache).stat().st_size
    out.write(f"{name} pulled: {size / 1e6:.0f} MB, hash and layout are right; {record.path(cache)}\n")
    out.flush()


def _progress(name: str) -> AbstractContextManager[Told]:
    """A bar on stderr where a person watches; else silence."""
    return _bar(name) if sys.stderr.isatty() else nullcontext(lambda done, total: None)


@contextmanager
def _bar(name: str) -> Iterator[Told]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _described(cache: Path, published: Records) -> list[dict[str, Any]]:
    own = [
        {"kind": "shipped", "state": "shipped", "path": str(SHIPPED / name), **record}
        for name, record in _shipped(SHIPPED).items()
    ]
    pulled = [
        {"kind": "published", "state": _presence(record.path(cache)), "path": str(record.path(cache))}
        | describe(record)
        for record in published.values()
    ]
    return own + pulled


def _shipped(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return shipped(folder)
    except RegistryError as error:
        raise UnmaskError(Code.WEIGHTS, str(error)) from error


def _presence(path: Path) -> str:
    if path.exists():
        return "pulled"
    return "partial" if part_of(path).exists() else "absent"


def _in_short(record: Mapping[str, Any]) -> str:
    figures = paper_figures(frozenset({record["name"].removeprefix(PREFIX)}))
    if figures is not None:
        paper = f"frame {figures.frame}, video {figures.video}"
        return f"{record['training_data']}; the paper's LogLoss/AUC: {paper}"
    auc = record.get("metrics", {}).get("val_auc")
    measured = "" if auc is None else f"; AUC {auc:.4f} on val"
    return f"{record.get('licence', 'licence unknown')}{measured}"
