"""What control records in `media` say (DESIGN 3.2): written by ingest, read by the aggregate. JSON objects.

`start`  first record of every attachment: `Start`
`tick`   every `ingest.tick_s`, whatever happens, also while nothing is attached: `Tick`
`gap`    the feed was lost or media was dropped; what follows does not join what came before: `Gap`
`end`    the last record of an attachment that will not be taken up again by this ingest: `End`
`retract` of no attachment, from `unmask retract` or a dashboard: an incident is withdrawn: `Retract`

A feed is up when a tick says `video`, down when one says it is not; `code` and `sentence` (redacted) say
why. No code with `video` false means: still connecting. Files have ticks too; only live feeds go down.
"""

import json
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, TypeVar

from stream.errors import Code, UnmaskError


class FeedPhase(StrEnum):
    """Where a feed is in its life; legal transitions are in `stream.watchdog`."""

    CONNECTING = "connecting"
    LIVE = "live"
    SILENT = "silent"
    BACKOFF = "backoff"
    ENDED = "ended"
    STOPPED = "stopped"


class EndReason(StrEnum):
    """Why an attachment has its last record."""

    FINISHED = "finished"
    """The source came to its end: a file, a recording, stdin."""
    FAILED = "failed"
    """A file could not be read (on); `code` and `sentence` say why."""
    STOPPED = "stopped"
    """Somebody stopped watching: `watch` ended or the source was taken out."""


@dataclass(frozen=True, slots=True)
class Start:
    """`source` is the redacted address."""

    source: str
    scheme: str
    kind: str


@dataclass(frozen=True, slots=True)
class Tick:
    """`capture_us`: receipt of the newest video packet, None if there was none yet (UTC microseconds).
    `video`: pictures have come within `silence_s`. `frames`, `bytes`: video packets and bytes received in
    this attachment."""

    capture_us: int | None
    video: bool
    phase: str
    frames: int
    bytes: int
    code: str | None = None
    sentence: str | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """`packets`: how many packets were received and thrown away, 0 if the source just stopped sending."""

    code: str
    sentence: str
    packets: int
    capture_us: int | None


@dataclass(frozen=True, slots=True)
class End:
    reason: str
    code: str | None = None
    sentence: str | None = None


@dataclass(frozen=True, slots=True)
class Retract:
    """`reason` is told to everybody who was told of the incident."""

    incident: str
    reason: str


Body = Start | Tick | Gap | End | Retract
B = TypeVar("B", Start, Tick, Gap, End, Retract)


def to_body(body: Body) -> dict[str, Any]:
    """Return the JSON object of a control record."""
    return asdict(body)


def from_body(kind: type[B], value: bytes) -> B:
    """Return what a control record's value says; fields of later versions are passed over.

    Raises `UnmaskError` (CHUNK_INVALID) if it is no JSON object or lacks a field.
    """
    try:
        found = json.loads(value)
        return kind(**{field.name: found[field.name] for field in fields(kind) if field.name in found})
    except (ValueError, TypeError, KeyError) as error:
        raise UnmaskError(
            Code.CHUNK_INVALID,
            f"control record of {len(value)} bytes is no {kind.__name__.lower()} ({type(error).__name__});"
            f" it must be a JSON object with {', '.join(field.name for field in fields(kind))}",
        ) from None
