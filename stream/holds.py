"""Legal hold: evidence that retention may not delete until somebody releases it.

A hold is a file beside the evidence, one per incident, with the events as they were: the log forgets them
sooner than a court asks.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stream.durable import append_line, write_whole

INCIDENT = re.compile(r"[0-9a-zA-Z_-]{1,64}")

FOLDER, JOURNAL = "holds", "custody.ndjson"


@dataclass(frozen=True, slots=True)
class Hold:
    """`since_us` in UTC microseconds; `events` are bodies of alerts, oldest first."""

    incident: str
    reason: str
    by: str
    since_us: int
    references: tuple[str, ...]
    events: tuple[Mapping[str, Any], ...]


class Holds:
    """The holds in an evidence directory. Any process may read them at any time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._folder = directory / FOLDER

    def put(self, hold: Hold) -> None:
        """Write a hold durably; one of the same incident is replaced. Raises `OSError`, `ValueError`."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        write_whole(self._path(hold.incident), json.dumps(asdict(hold)).encode())

    def of(self, incident: str) -> Hold | None:
        """Return the hold of an incident, None if there is none."""
        path = self._path(incident)
        return _read(path) if path.exists() else None

    def all(self) -> list[Hold]:
        """Return every hold, the oldest first. Raises `OSError` or `ValueError` if one cannot be read."""
        found = [_read(path) for path in self._folder.glob("*.json")] if self._folder.is_dir() else []
        return sorted(found, key=lambda hold: hold.since_us)

    def references(self) -> frozenset[str]:
        """Return what may not be deleted. Raises like `all`: whoever cannot know must not delete."""
        return frozenset(reference for hold in self.all() for reference in hold.references)

    def release(self, incident: str) -> None:
        self._path(incident).unlink()

    def note(self, what: Mapping[str, Any]) -> None:
        """Write into the journal who did what, before it is done."""
        append_line(self._directory / JOURNAL, json.dumps(what).encode())

    def journal(self) -> Sequence[Mapping[str, Any]]:
        path = self._directory / JOURNAL
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def _path(self, incident: str) -> Path:
        if not INCIDENT.fullmatch(incident):
            raise ValueError(f"{incident[:80]!r} is no incident's id")
        return self._folder / f"{incident}.json"


def _read(path: Path) -> Hold:
    fields = json.loads(path.read_bytes())
    return Hold(**{**fields, "references": tuple(fields["references"]), "events": tuple(fields["events"])})
