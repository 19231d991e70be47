"""`unmask attach`, `detach`, `streams`: the compacted topic `sources`, written and read (DESIGN 1, 3.9)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from stream.assemble import open_log
from stream.clock import Clock, SystemClock
from stream.config import Config
from stream.console import clean
from stream.errors import Code, UnmaskError
from stream.feeds import Feed
from stream.incidents import Status
from stream.ingest_service import check_public, source_of
from stream.log import Log, partitions_of
from stream.records import SCHEMA, OutRecord, Record, Topic, check_stream_id
from stream.sources import Scheme, Source, check_fps, parse_source
from stream.topics import topic_name, topic_specs

OK = 0

WRITE_S = 20.0
"""Longest wait for the log to take an entry: longer than the election of a leader."""


@dataclass(frozen=True, slots=True)
class Listing:
    """One entry of `sources` as it stands. `source` None: it cannot be attached, `error` says why.

    `state`: up, down, unwatched, ended or, of a file, reading, as detect last told, "" where it never did;
    `incident`: the open one.
    """

    id: str
    source: Source | None
    error: str | None
    state: str
    incident: str | None

    def as_json(self) -> dict[str, Any]:
        entry = {} if self.source is None else self.source.entry()
        entry |= {"id": self.id, "state": self.state or None, "incident": self.incident}
        return entry if self.error is None else entry | {"error": self.error}


def attach(
    config: Config, text: str, name: str | None, fps: float | None, labels: Sequence[str], out: TextIO
) -> int:
    """List a feed, for `unmask ingest` or a running `unmask watch` to attach.

    Raises `UnmaskError` for a wrong address, id, label or rate, and for an address with credentials in it.
    """
    clock = SystemClock()
    source = _source(text, name, check_fps(fps), _labels(labels), clock)
    with _log(config, clock) as log:
        enlist(log, config, source.id, source.entry(), clock)
    out.write(f"{source.id}: {source.shown} is listed\n")
    return OK


def detach(config: Config, name: str, out: TextIO) -> int:
    """Take a feed out of the list. Raises `UnmaskError` (SOURCE_NOT_FOUND) if it is not in it."""
    clock = SystemClock()
    with _log(config, clock) as log:
        unlist(log, config, name, clock)
    out.write(f"{_shown(name)}: detached\n")
    return OK


def streams(config: Config, as_json: bool, out: TextIO) -> int:
    """Print what is listed and, as far as detect has told, how it stands."""
    with _log(config, SystemClock()) as log:
        found = listings(log, config)
    for listing in found:
        out.write(f"{json.dumps(listing.as_json()) if as_json else _line(listing)}\n")
    if not found and not as_json:
        out.write("no stream is attached; unmask attach URL attaches one\n")
    return OK


def enlist(log: Log, config: Config, name: str, entry: Mapping[str, Any], clock: Clock) -> None:
    """Write the entry of a source, in the place of one with its id. Raises as the log does."""
    _write(log, config, name, json.dumps(entry).encode(), clock)


def unlist(log: Log, config: Config, name: str, clock: Clock) -> None:
    """Take an entry out. Raises `UnmaskError` (SOURCE_NOT_FOUND) if there is none."""
    _write(log, config, name, None, clock, _entry(log, config, name).partition)


def change_fps(log: Log, config: Config, name: str, fps: float | None, clock: Clock) -> None:
    """Give a feed another sampling rate (Hz), None for the default, and leave all else of its entry.

    Raises `UnmaskError`: SOURCE_NOT_FOUND if it is not listed, SOURCE_SYNTAX for a wrong rate or an entry
    that cannot be read.
    """
    check_fps(fps)
    record = _entry(log, config, name)
    source_of(record, log.partitions(record.topic))
    entry = {**json.loads(record.value or b"{}"), "fps": fps}
    if fps is None:
        del entry["fps"]
    _write(log, config, name, json.dumps(entry).encode(), clock, record.partition)


def _entry(log: Log, config: Config, name: str) -> Record:
    listed = _newest(log, config)
    if name not in listed:
        known = ", ".join(sorted(map(_shown, listed))[:8]) or "none"
        raise UnmaskError(Code.SOURCE_NOT_FOUND, f"no stream {name!r} is attached; attached are: {known}")
    return listed[name]


def listings(log: Log, config: Config) -> list[Listing]:
    """Return every entry of `sources`, by id."""
    newest, states = _newest(log, config), _states(log, config)
    count = log.partitions(topic_name(config, Topic.SOURCES))
    return [_listing(record, count, states.get(name, {})) for name, record in sorted(newest.items())]


def _listing(record: Record, partitions: int, state: Mapping[str, Any]) -> Listing:
    source, error = None, None
    try:
        source = source_of(record, partitions)
    except UnmaskError as found:
        error = str(found)
    return Listing(record.key, source, error, state.get("state", ""), state.get("incident"))


def _source(text: str, name: str | None, fps: float | None, labels: dict[str, str], clock: Clock) -> Source:
    source, named = parse_source(text)
    if name is not None:
        if named and source.id != name:
            raise UnmaskError(
                Code.SOURCE_SYNTAX, f"the id is given twice, {source.id} and {name}; once would be right"
            )
        source = replace(source, id=check_stream_id(name))
    if source.secret_ref is not None and f"env:{source.secret_ref[4:]}" not in text:
        # Made up for a child of this process; no other could resolve it.
        source = replace(source, secret_ref=None)
    check_public(source)
    if source.scheme in (Scheme.FILE, Scheme.PIPE):
        path = str(Path(source.address).resolve())
        source = replace(source, address=path, shown=path)
    return replace(source, fps=fps, labels=labels, attached_us=clock.now_us())


def _labels(texts: Sequence[str]) -> dict[str, str]:
    labels = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UnmaskError(Code.SOURCE_SYNTAX, f"label {text!r} must look like --label region=north")
        labels[name] = value
    return labels


@contextmanager
def _log(config: Config, clock: Clock) -> Iterator[Log]:
    log = open_log(config, clock)
    try:
        if not config.kafka.bootstrap_servers:
            log.create_topics(topic_specs(config))
        yield log
    finally:
        log.close()


def _write(
    log: Log, config: Config, key: str, value: bytes | None, clock: Clock, partition: int | None = None
) -> None:
    headers = {"schema": str(SCHEMA).encode()}
    record = OutRecord(topic_name(config, Topic.SOURCES), key, value, headers, clock.now_us(), partition)
    # A name of its own each time: two of these commands must not end each other.
    with log.producer(f"sources-{clock.now_us()}") as producer:
        producer.send(record)
        producer.flush(WRITE_S)


def _newest(log: Log, config: Config) -> dict[str, Record]:
    return {record.key: record for record in _compacted(log, topic_name(config, Topic.SOURCES))}


def _states(log: Log, config: Config) -> dict[str, dict[str, Any]]:
    """Return what detect keeps of each stream; what this version cannot read is left out."""
    found: dict[str, dict[str, Any]] = {}
    for record in _compacted(log, topic_name(config, Topic.STATE)):
        if not record.key.startswith("#"):
            state = json.loads(record.value or b"null")
            if isinstance(state, dict):
                found[record.key] = {"state": _standing(state), "incident": _open_incident(state)}
    return found


def _standing(state: Mapping[str, Any]) -> str:
    """Return what the feed's events last said; of a file, which has none, how far it is."""
    told = (state.get("feed") or [""])[0]
    if told != Feed.NEW:
        return str(told)
    return Feed.ENDED.value if state.get("over") else "reading"


def _open_incident(state: Mapping[str, Any]) -> str | None:
    incident = state.get("incident")
    if isinstance(incident, dict) and incident.get("status") == Status.OPEN:
        return str(incident.get("id"))
    return None


def _compacted(log: Log, topic: str) -> Iterator[Record]:
    """Yield the newest record of each key, tombstones left out."""
    for partition in partitions_of(log, topic):
        newest = {record.key: record for record in log.read(partition, log.begin_offset(partition))}
        yield from (record for record in newest.values() if record.value is not None)


def _line(listing: Listing) -> str:
    if listing.source is None:
        return clean(f"{_shown(listing.id)}  refused: {listing.error}")
    source = listing.source
    facts = [source.id, source.shown, source.kind.value, listing.state or "-"]
    facts += [f"fps={source.fps:g}"] if source.fps is not None else []
    facts += [f"{name}={value}" for name, value in sorted(source.labels.items())]
    facts += [f"incident {listing.incident}"] if listing.incident else []
    return clean("  ".join(facts))


def _shown(name: str) -> str:
    return clean(name[:80])
