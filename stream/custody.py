"""`unmask evidence`: what must be kept, and what must go, whatever retention says (docs/evidence.md).

Works on the evidence of this data folder. Who holds, releases or purges is written into a journal there,
before it is done.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from stream.alerts import iso
from stream.assemble import data_folder
from stream.clock import Clock, SystemClock
from stream.config import Config
from stream.console import clean
from stream.copies import Store, purge_everywhere, read_evidence, share_hold, store_of, unshare_hold
from stream.deadletters import recorded
from stream.errors import Code, UnmaskError
from stream.evidence import SCHEME, EvidenceStore
from stream.holds import INCIDENT, Hold, Holds
from stream.incidents import EventKind
from stream.log import everything
from stream.records import Topic
from stream.topics import topic_name

OK = 0

MAX_WORDS = 500
"""Characters of a reason, and of a name."""

OVER = (EventKind.CLOSED.value, EventKind.RETRACTED.value)


@dataclass(frozen=True, slots=True)
class Asked:
    """Which incident, why, who asks; and of which face, `<attachment>/<epoch>/<track>`, None for all."""

    incident: str
    reason: str
    by: str
    track: str | None = None


def hold(config: Config, asked: Asked, out: TextIO) -> int:
    """Keep an incident's evidence, and its events, until it is released; again: what has come since, too."""
    _check(asked)
    clock, shared, (store, holds) = SystemClock(), store_of(config), _opened(config)
    events = _events(config, asked.incident)
    before = holds.of(asked.incident)
    named = {ref for event in events for ref, _, _ in _evidence(event)} | set(
        before.references if before else ()
    )
    since = before.since_us if before else clock.now_us()
    _note(holds, clock, "hold", asked, named)
    made = Hold(asked.incident, asked.reason, asked.by, since, tuple(sorted(named)), tuple(events))
    with _told():
        holds.put(made)
    if shared is not None:
        share_hold(shared, asked.incident, asdict(made))
    missing = sum(not _there(store, shared, reference) for reference in named)
    out.write(f"{asked.incident}: {len(named) - missing} files are held\n")
    if missing:
        out.write(f"{missing} more are not here: expired, or on another machine\n")
    _tell_if_open(events, "hold it again when it has closed", out)
    return OK


def release(config: Config, asked: Asked, out: TextIO) -> int:
    """Let retention have an incident's evidence again."""
    _check(asked)
    clock, shared, (_, holds) = SystemClock(), store_of(config), _opened(config)
    if _hold_of(holds, asked.incident) is None:
        raise UnmaskError(Code.SOURCE_NOT_FOUND, f"incident {asked.incident} is not held")
    _note(holds, clock, "release", asked, ())
    if shared is not None:
        unshare_hold(shared, asked.incident)
    with _told():
        holds.release(asked.incident)
    out.write(f"{asked.incident} is released: what is old enough goes with the next sweep\n")
    return OK


def list_holds(config: Config, as_json: bool, out: TextIO) -> int:
    """Write a line per hold, the oldest first."""
    with _told():
        found = _opened(config)[1].all()
    for each in found:
        facts = {"incident": each.incident, "since": iso(each.since_us), "by": each.by, "reason": each.reason}
        if as_json:
            out.write(json.dumps(facts | {"files": len(each.references)}) + "\n")
        else:
            when = facts["since"][:19]
            words = f"{each.incident}  {when}Z  {len(each.references)} files  {each.by}: {each.reason}"
            out.write(clean(words) + "\n")
    if not found and not as_json:
        out.write("nothing is held\n")
    return OK


def purge(config: Config, asked: Asked, out: TextIO) -> int:
    """Delete an incident's evidence now, or what shows one face of it: its pictures and every clip.

    Raises `UnmaskError` (SOURCE_REFUSED) for evidence that is held, by this incident or another.
    """
    _check(asked)
    clock, shared, (store, holds) = SystemClock(), store_of(config), _opened(config)
    events = _events(config, asked.incident)
    named = {
        ref
        for event in events
        for ref, kind, track in _evidence(event)
        # A clip shows everybody who was there.
        if asked.track is None or track == asked.track or kind == "clip"
    }
    if asked.track is not None and asked.track not in {track for e in events for _, _, track in _evidence(e)}:
        raise UnmaskError(
            Code.SOURCE_NOT_FOUND, f"incident {asked.incident} has no picture of track {asked.track[:80]!r}"
        )
    with _told():
        held = [each.incident for each in holds.all() if named & set(each.references)]
    if shared is not None and not held and named & shared.held():
        held = ["an incident on another machine"]
    if held:
        raise UnmaskError(
            Code.SOURCE_REFUSED, f"it is under legal hold for {', '.join(held)}; release that first"
        )
    _note(holds, clock, "purge", asked, named)
    if shared is not None:
        out.write(f"{asked.incident}: {purge_everywhere(shared, named)} files deleted in evidence.store\n")
    with _told():
        gone = store.purge(named)
    out.write(f"{asked.incident}: {gone} files deleted\n")
    if gone < len(named):
        out.write(f"{len(named) - gone} more are not in this folder: expired, or on another machine\n")
    _tell_if_open(events, "purge it again when it has closed", out)
    return OK


def fetch(config: Config, reference: str, target: Path, out: TextIO) -> int:
    """Write what a reference names into a file, from this data folder or from the store."""
    store, _ = _opened(config)
    try:
        content, suffix = read_evidence(reference, store, store_of(config))
    except ValueError as error:
        raise UnmaskError(Code.SOURCE_SYNTAX, str(error)) from None
    except FileNotFoundError as error:
        raise UnmaskError(Code.SOURCE_NOT_FOUND, str(error)) from None
    try:
        target.write_bytes(content)
    except OSError as error:
        raise UnmaskError(Code.CONFIG, f"--out {target} cannot be written: {error.strerror}") from None
    out.write(f"{target}: {len(content)} bytes, {suffix.removeprefix('.')}\n")
    return OK


def _opened(config: Config) -> tuple[EvidenceStore, Holds]:
    folder = data_folder(config) / "evidence"
    if not folder.is_dir() and not config.evidence.store:
        raise UnmaskError(
            Code.SOURCE_NOT_FOUND,
            f"there is no evidence in {folder}; name the folder with --set data_dir=...",
        )
    return EvidenceStore(folder, SystemClock()), Holds(folder)


def _events(config: Config, incident: str) -> Sequence[Mapping[str, Any]]:
    """Return the bodies of an incident's events, at least one. Raises `UnmaskError` (SOURCE_NOT_FOUND)."""
    found = []
    with recorded(config) as log:
        for record in everything(log, topic_name(config, Topic.ALERTS)):
            if record.headers.get("ce_id", b"").startswith(f"{incident}.".encode()):
                data = json.loads(record.value or b"null")
                found += [data] if data.get("incident") == incident else []
    if found:
        return found
    raise UnmaskError(
        Code.SOURCE_NOT_FOUND,
        f"no incident {incident!r} in {topic_name(config, Topic.ALERTS)}, which keeps them for "
        f"{config.log.records_retention_s / 86400:g} days",
    )


def _evidence(event: Mapping[str, Any]) -> list[tuple[str, str, str | None]]:
    return [(each["ref"], each["kind"], each.get("track")) for each in event.get("evidence", ())]


def _check(asked: Asked) -> None:
    if not INCIDENT.fullmatch(asked.incident):
        raise UnmaskError(
            Code.SOURCE_SYNTAX,
            f"{asked.incident[:80]!r} is no incident's id, which is an event's without its number",
        )
    for name, words in (("reason", asked.reason), ("by", asked.by)):
        if not words.strip() or len(words) > MAX_WORDS:
            raise UnmaskError(Code.SOURCE_SYNTAX, f"--{name} must be 1 to {MAX_WORDS} characters")


def _note(holds: Holds, clock: Clock, what: str, asked: Asked, named: Collection[str]) -> None:
    facts = {
        "time": iso(clock.now_us()),
        "action": what,
        "incident": asked.incident,
        "track": asked.track,
        "by": asked.by,
        "reason": asked.reason,
        "references": sorted(named),
    }
    with _told():
        holds.note(facts)


def _hold_of(holds: Holds, incident: str) -> Hold | None:
    with _told():
        return holds.of(incident)


def _there(store: EvidenceStore, shared: Store | None, reference: str) -> bool:
    try:
        store.path(reference)
    except FileNotFoundError:
        return shared is not None and bool(shared.find(reference.removeprefix(SCHEME)))
    return True


def _tell_if_open(events: Sequence[Mapping[str, Any]], advice: str, out: TextIO) -> None:
    if not any(event.get("event") in OVER for event in events):
        out.write(f"the incident is still open and more may come: {advice}\n")


@contextmanager
def _told() -> Iterator[None]:
    """What the disk refuses is one sentence."""
    try:
        yield
    except OSError as error:
        where = error.filename or "the evidence folder"
        raise UnmaskError(Code.CONFIG, f"{where}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UnmaskError(Code.CONFIG, f"a hold in the evidence folder cannot be read: {error}") from None
