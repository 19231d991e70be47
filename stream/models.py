"""`unmask models`: what networks there are, and pulling the published ones (docs/models/published.md)."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import yaml

from detectors.registry import (
    BASE_URL,
    FACENET,
    FOLDER,
    LICENCE,
    PREFIX,
    PUBLISHED,
    SHIPPED,
    TERMS,
    WEIGHTS,
    Published,
    Recogniser,
    RegistryError,
    State,
    describe,
    paper_figures,
    part_of,
    shipped,
    state,
)
from stream import carried
from stream.config import Config
from stream.download import Told, Wanted, fetch
from stream.errors import Code, UnmaskError

OK, DECLINED, WRONG = 0, 1, 2
"""Exit codes."""

Records = Mapping[str, Published]
Pulled = Published | Recogniser

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
    there = "pulled" if carried.is_pulled(cache_of(settings)) else "absent"
    out.write(f"{carried.NAME}, {there}: landmarks for the cues over time, Apache-2.0 (docs/cues.md)\n")
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
    pulled: list[Pulled] = [*published.values(), FACENET]
    for record in pulled:
        wrong += _told(out, _name(record), record.path(cache), record.sha256, needed=False)
    known = {record.file_name for record in pulled}
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
    base: str | None,
    accepted: bool,
    out: TextIO,
    ask: Ask | None,
    published: Records = PUBLISHED,
    recogniser: Recogniser = FACENET,
) -> int:
    """Bring published checkpoints into the cache, after their terms were shown and accepted.

    `base` is where they are, None for their authors' addresses. `ask` None: nobody is there to be asked. Exit
    code 1 when the user declines. Raises `UnmaskError`.
    """
    if carried.NAME in names:
        told = carried.pull(cache_of(settings), accepted, out, ask)
        names = [name for name in names if name != carried.NAME]
        if told != OK or not names:
            return told
    records = _chosen(names, every, published, recogniser)
    cache = cache_of(settings)
    left = [record for record in records if not _is_there(record, cache, out)]
    if not left:
        return OK
    for terms in dict.fromkeys(_terms(record) for record in left):
        out.write(f"{terms}\n")
    out.flush()
    if not accepted and not _agreed(ask, len(left)):
        out.write("declined; nothing was pulled\n")
        return DECLINED
    for record in left:
        _pull(record, cache, base, out)
    return OK


def _chosen(names: Sequence[str], every: bool, published: Records, recogniser: Recogniser) -> list[Pulled]:
    if every == bool(names):
        raise UnmaskError(
            Code.CONFIG, "name the networks to pull, or --all; unmask models list prints what there is"
        )
    if every:
        return [*published.values()]
    bare = [name.removeprefix(PREFIX) for name in dict.fromkeys(names)]
    records: dict[str, Pulled] = {**published, recogniser.name: recogniser}
    unknown = [name for name in bare if name not in records]
    if unknown:
        raise UnmaskError(
            Code.CONFIG,
            f"network {unknown[0]!r} is not one that can be pulled; there are: {', '.join(records)}",
        )
    return [records[name] for name in bare]


def _name(record: Pulled) -> str:
    return record.name if isinstance(record, Recogniser) else PREFIX + record.name


def _terms(record: Pulled) -> str:
    return record.terms if isinstance(record, Recogniser) else TERMS


def _is_there(record: Pulled, cache: Path, out: TextIO) -> bool:
    path = record.path(cache)
    try:
        found = state(path, record.sha256)
    except OSError as error:
        raise UnmaskError(Code.CONFIG, f"{path} cannot be read: {error.strerror}") from None
    if found is State.RIGHT:
        out.write(f"{_name(record)} is there already\n")
    if found is State.DIFFERS:
        out.write(f"{_name(record)} is there with another hash; pulled anew\n")
    return found is State.RIGHT


def _agreed(ask: Ask | None, count: int) -> bool:
    if ask is None:
        raise UnmaskError(
            Code.CONFIG,
            "nobody is there to accept these terms; --accept-terms does, where you have read them",
        )
    return ask(f"Accept these terms and pull {count} {'file' if count == 1 else 'files'}?")


def _loaded(record: Pulled, path: Path) -> None:
    if isinstance(record, Recogniser):
        from detectors.cues.embedding import Embedder

        Embedder.load(path, record.sha256)
        return
    from detectors.published import load_published

    load_published(record.name, path, record.sha256)


def _pull(record: Pulled, cache: Path, base: str | None, out: TextIO) -> None:
    name = _name(record)
    base = base or (record.base if isinstance(record, Recogniser) else BASE_URL)

    def check(path: Path) -> None:
        try:
            _loaded(record, path)
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
    recogniser = {
        "kind": "recogniser",
        "state": _presence(FACENET.path(cache)),
        "path": str(FACENET.path(cache)),
        "name": FACENET.name,
        "address": f"{FACENET.base}/{FACENET.file_name}",
        "sha256": FACENET.sha256,
        "licence": FACENET.licence,
        "training_data": FACENET.trained_on,
        "input": "uint8 RGB face, 160x160, about the box; (x - 127.5) / 128",
        "output": "float32 [512], length 1: for the cues identity and claim, of no member",
    }
    return [*own, *pulled, recogniser]


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
    if record["kind"] == "recogniser":
        return f"for the cues identity and claim; {record['licence']}"
    figures = paper_figures(frozenset({record["name"].removeprefix(PREFIX)}))
    if figures is not None:
        paper = f"frame {figures.frame}, video {figures.video}"
        return f"{record['training_data']}; the paper's LogLoss/AUC: {paper}"
    auc = record.get("metrics", {}).get("val_auc")
    measured = "" if auc is None else f"; AUC {auc:.4f} on val"
    return f"{record.get('licence', 'licence unknown')}{measured}"
