"""What people decide: topic `decisions`, keyed by stream (docs/dashboard.md).

Three records, told apart by `type`. `decision`: an incident, or a face of the audit sample, was looked at by
somebody. `mute`: nobody is to be told of a feed for a while; its incidents are recorded all the same.
`sample`: a face that raised no alert was drawn for review, with the probability of being drawn, by whose
inverse whatever rests on decisions must weight it. The newest decision about something holds; none is ever
overwritten.
"""

import base64
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.incidents import MAX_REASON
from stream.log import Log, everything
from stream.records import SCHEMA, OutRecord, Record, Topic, split_stream_id
from stream.topics import topic_name

WRITE_S = 10.0
"""Longest wait until a decision is durable."""

MAX_AUTHOR = 64
"""Characters of a name."""

LONGEST_MUTE_S = 30 * 86_400.0
"""As long as decisions are kept by default: a mute that outlives its record would end unseen."""


class Choice(StrEnum):
    """What somebody found on looking."""

    CONFIRMED = "confirmed"
    DISMISSED = "dismissed"
    INCONCLUSIVE = "inconclusive"


class Subject(StrEnum):
    INCIDENT = "incident"
    SAMPLE = "sample"


@dataclass(frozen=True, slots=True)
class Decision:
    """`about`: id of the incident or sample. `probability`: how likely it was to be put up for review at all,
    1 for incidents. The rest is what the networks had said (logits; natural log of the likelihood ratio)."""

    stream: str
    subject: Subject
    about: str
    choice: Choice
    reason: str
    author: str
    time_us: int
    probability: float = 1.0
    severity: str | None = None
    llr: float | None = None
    logits: Mapping[str, float] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    calibration: str = ""


@dataclass(frozen=True, slots=True)
class Mute:
    """Nobody is told of `stream` from `from_us` to `until_us` (UTC microseconds); an end in the past ends
    it."""

    stream: str
    from_us: int
    until_us: int
    reason: str
    author: str
    time_us: int

    def holds(self, now_us: int) -> bool:
        return self.from_us <= now_us < self.until_us


@dataclass(frozen=True, slots=True)
class Sample:
    """A face that raised no alert, drawn for review. `crop` is a JPEG of it."""

    stream: str
    id: str
    attachment: str
    epoch: int
    track: int
    media_us: int
    time_us: int
    probability: float
    crop: bytes
    fused: float | None = None
    logits: Mapping[str, float] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    calibration: str = ""


Said = Decision | Mute | Sample
TYPES: Mapping[str, type[Decision] | type[Mute] | type[Sample]] = {
    "decision": Decision,
    "mute": Mute,
    "sample": Sample,
}


def record_of(config: Config, said: Said) -> OutRecord:
    """Return the record that tells it."""
    value = {"schema": SCHEMA, "type": type(said).__name__.lower(), **asdict(said)}
    if isinstance(said, Sample):
        value["crop"] = base64.b64encode(said.crop).decode()
    headers = {"schema": str(SCHEMA).encode(), "content-type": b"application/json"}
    body = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return OutRecord(topic_name(config, Topic.DECISIONS), said.stream, body, headers, said.time_us)


def read(record: Record) -> Said | None:
    """Return what a record says, None if it cannot be read: later versions, strangers."""
    try:
        value = json.loads(record.value or b"null")
        kind = TYPES[value["type"]]
        fields = {name: value[name] for name in kind.__slots__ if name in value}
        if kind is Decision:
            fields |= {"subject": Subject(fields["subject"]), "choice": Choice(fields["choice"])}
        if kind is Sample:
            fields["crop"] = base64.b64decode(fields["crop"], validate=True)
        said = kind(**fields)
        _check(said, record)
    except (ValueError, TypeError, KeyError, AttributeError, UnmaskError):
        return None
    return said


def _check(said: Said, record: Record) -> None:
    """Raise unless what a stranger may have written is of the types that pages and sums rely on."""
    split_stream_id(said.stream)
    if said.stream != record.key or not isinstance(said.time_us, int):
        raise ValueError
    if isinstance(said, Mute):
        numbers: Sequence[Any] = (said.from_us, said.until_us)
    else:
        numbers = (said.probability, *said.logits.values())
        dict(said.models)
        if not 0 < said.probability <= 1:
            raise ValueError
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError
    texts = [getattr(said, name, "") for name in ("about", "reason", "author", "id", "attachment")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError


def write(config: Config, log: Log, *said: Said) -> None:
    """Write and wait until it is durable. Raises `UnmaskError` as the log does."""
    # A name of its own each time: two writers must not end each other.
    with log.producer(f"decisions-{uuid.uuid4().hex[:12]}") as producer:
        for one in said:
            producer.send(record_of(config, one))
        producer.flush(WRITE_S)


def check_reason(reason: str) -> str:
    """Return a reason as it is told: one line, at most MAX_REASON characters. Raises `UnmaskError` if
    empty."""
    plain = " ".join(reason.split())[:MAX_REASON]
    if not plain:
        raise UnmaskError(Code.SOURCE_SYNTAX, "reason is empty; say in a sentence why")
    return plain


def mutes(config: Config, log: Log) -> dict[str, Mute]:
    """Return the newest mute of each stream, over or not: what whoever tells people must ask first."""
    newest: dict[str, Mute] = {}
    for record in everything(log, topic_name(config, Topic.DECISIONS)):
        said = read(record)
        if isinstance(said, Mute):
            newest[said.stream] = said
    return newest


def drawn(stream: str, attachment: str, epoch: int, track: int, rate: float) -> str | None:
    """Return the id of a face's sample if it is drawn, else None.

    The draw is a hash of the face's own id: as good as random, and the same for every process that looks, so
    that several of them, or one started again, draw each face once.
    """
    digest = hashlib.blake2b(f"{stream}\n{attachment}\n{epoch}\n{track}".encode(), digest_size=12).hexdigest()
    return digest if int(digest[:13], 16) < rate * 16**13 else None
