"""What sinks there are: `sinks.file`, a YAML file of its own, validated on load (docs/sinks.md)."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from stream.config import Bytes, Config, Count, Kafka, Seconds, Section, setting
from stream.errors import Code, UnmaskError
from stream.records import Topic
from stream.redact import redact
from stream.sinks.quiet import QuietHours, clock_time
from stream.sinks.secret import is_reference
from stream.topics import topic_name

SINK_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")

SEVERITIES = ("low", "medium", "high")
"""Weakest first."""

DAY_S = 86400.0

MAX_ATTEMPT_S = 30.0
"""Longest attempt: a member that polls its group no more often than once a minute is taken for dead."""

SECRET_RIGHT = "env:NAME or file:/PATH, where the secret stands"

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

HEADER = re.compile(r"[A-Za-z0-9-]{1,64}")

Severity = Literal["low", "medium", "high"]


class Only(Section):
    """Which alerts a sink gets; what is empty holds back nothing."""

    events: tuple[Literal["incident", "feed"], ...] = setting(
        ("incident", "feed"), "", "Kinds: incidents, and what happens to feeds (down, up, unwatched, drift)."
    )
    severity: Severity = setting("low", "", "Alerts of this severity or a higher one.")
    verdicts: tuple[Literal["manipulated", "inconclusive"], ...] = setting(
        (), "", "Verdicts of incidents; feed events have none and are not touched by it."
    )
    streams: tuple[str, ...] = setting((), "", "Stream ids, * standing for anything: [studio-*, lobby].")
    labels: dict[str, str] = setting(
        {}, "", "Labels that the feed must have, as `unmask attach --label` gave them: {site: berlin}."
    )


class Quiet(Section):
    """Hours in which weaker alerts are held back and told of in one message when the hours end."""

    begin: str = Field(description='On the clock of zone, in quotes: "22:00".')
    end: str = Field(description="At or before begin: on the next day.")
    zone: str = setting("UTC", "", "Time zone by its IANA name, like Europe/Berlin.")
    days: tuple[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"], ...] = setting(
        ("mon", "tue", "wed", "thu", "fri", "sat", "sun"), "", "Days on which the hours begin."
    )
    below: Severity = setting("high", "", "Alerts of this severity or a higher one are sent all the same.")

    @field_validator("begin", "end")
    @classmethod
    def _time(cls, value: str) -> str:
        try:
            clock_time(value)
        except ValueError:
            raise _wrong('must be a time of day in quotes, like "22:00"') from None
        return value

    @field_validator("zone")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise _wrong("must be a time zone that this machine knows, like Europe/Berlin or UTC") from None
        return value

    def hours(self) -> QuietHours:
        begin, end = clock_time(self.begin), clock_time(self.end)
        return QuietHours(begin, end, ZoneInfo(self.zone), frozenset(self.days))


class Flood(Section):
    """How much is too much; the rest is held back and told of in one message."""

    most: Count = setting(60, "alerts", "Sent within within_s; retractions always are, and do not count.")
    within_s: Seconds = setting(600.0, "s", "The span that most is counted over.")


class _Sink(Section):
    """What every sink has."""

    only: Only = Only()
    quiet: Quiet | None = setting(None, "", "Hours in which weaker alerts are held back; null: none.")
    flood: Flood = Flood()
    give_up_s: Seconds = setting(
        DAY_S, "s", "An alert that could not be delivered for this long is dropped, counted."
    )


class Webhook(_Sink):
    """POSTs each alert to an address, signed as Standard Webhooks are."""

    type: Literal["webhook"]
    url: str = Field(description="https://..., or env:NAME or file:/PATH if the address is itself a secret.")
    secrets: tuple[str, ...] = Field(
        min_length=1,
        max_length=4,
        description="Where the signing secrets (whsec_...) stand: env:NAME or file:/PATH. Each signs; while "
        "one is exchanged for another, name both.",
    )
    headers: dict[str, str] = setting(
        {}, "", "More headers, their values by reference: {Authorization: env:HOOK_TOKEN}."
    )
    timeout_s: float = setting(
        15.0, "s", "Longest time from name lookup to the status of the answer.", gt=0, le=MAX_ATTEMPT_S
    )
    allow_private: bool = setting(
        False, "", "Whether loopback and private addresses, and http without TLS, are allowed."
    )
    ca_file: str = setting(
        "", "PEM file", "Authorities that the receiver's certificate is checked with; empty: the system's."
    )

    @field_validator("url")
    @classmethod
    def _address(cls, value: str) -> str:
        if is_reference(value):
            return value
        check_url(value)
        if redact(value) != value:
            raise _wrong("holds what looks like a secret; put the address where env:NAME or file:/PATH says")
        return value

    @field_validator("secrets")
    @classmethod
    def _referred(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(is_reference, value)):
            raise _wrong(f"must name {SECRET_RIGHT}, never the secret itself")
        return value

    @field_validator("headers")
    @classmethod
    def _headers(cls, value: dict[str, str]) -> dict[str, str]:
        if not all(HEADER.fullmatch(name) for name in value):
            raise _wrong("must be names of letters, digits and -")
        if any(name.lower().startswith(("webhook-", "content-")) or name.lower() == "host" for name in value):
            raise _wrong("must leave Host, Content-* and Webhook-* to Unmask")
        if not all(map(is_reference, value.values())):
            raise _wrong(f"must give each value as {SECRET_RIGHT}")
        return value

    @model_validator(mode="after")
    def _encrypted(self) -> Self:
        if not self.allow_private and not is_reference(self.url) and urlsplit(self.url).scheme != "https":
            raise _wrong("url must be https://; http is for receivers of your own, with allow_private: true")
        return self


class File(_Sink):
    """Appends each alert as one line of JSON to a file, on disk before it counts."""

    type: Literal["file"]
    path: str = Field(description="The file; its folder is made if missing. Nobody else may write to it.")
    rotate_bytes: Bytes = setting(
        100 * 1024 * 1024,
        "bytes",
        "A file that would grow beyond this becomes path.1, that path.2, and so on.",
    )
    keep: Count = setting(10, "files", "Older files kept; the oldest beyond them is deleted.")

    @field_validator("path")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if not PurePath(value).is_absolute() and not value.startswith("~"):
            raise _wrong("must be absolute: a service's working folder is anybody's guess")
        return value


class Stdout(_Sink):
    """Prints each alert as one line of JSON on standard output."""

    type: Literal["stdout"]


class Command(_Sink):
    """Starts a program for each alert, which reads it as JSON from standard input."""

    type: Literal["command"]
    argv: tuple[str, ...] = Field(
        min_length=1, description="The program, by its path or name, and its arguments; there is no shell."
    )
    timeout_s: float = setting(
        10.0, "s", "Then it is killed with all that it started.", gt=0, le=MAX_ATTEMPT_S
    )
    env: tuple[str, ...] = setting(
        (), "", "Environment variables that it gets beside PATH, HOME, LANG and UNMASK_*: [SLACK_URL]."
    )

    @field_validator("env")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(VARIABLE.fullmatch, value)):
            raise _wrong("must be names of environment variables, without values")
        return value


class KafkaTopic(_Sink):
    """Writes each alert to a topic, as it stands on the alerts topic."""

    type: Literal["kafka"]
    topic: str = Field(pattern=r"^[A-Za-z0-9._-]{1,249}$", description="It must exist.")
    cluster: Kafka | None = setting(
        None, "", "Settings as under `kafka` in config.yaml; null: the cluster that alerts come from."
    )

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if self.cluster is not None and not self.cluster.bootstrap_servers:
            raise _wrong("cluster.bootstrap_servers is empty; it must name brokers, or leave cluster out")
        return self


Sink = Webhook | File | Stdout | Command | KafkaTopic

KINDS: Mapping[str, type[_Sink]] = {
    "webhook": Webhook,
    "kafka": KafkaTopic,
    "file": File,
    "stdout": Stdout,
    "command": Command,
}


class SinksFile(Section):
    """The whole file."""

    sinks: dict[str, Annotated[Sink, Field(discriminator="type")]]

    @field_validator("sinks")
    @classmethod
    def _names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not SINK_NAME.fullmatch(name):
                raise _wrong(f"has a sink {name[:80]!r}; names are 1 to 32 of a-z 0-9 -, not - first")
        if sum(isinstance(sink, Stdout) for sink in value.values()) > 1:
            raise _wrong("has several sinks of type stdout; there is one standard output")
        return value


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{message}", {"message": message})


def load_sinks(config: Config) -> dict[str, Sink]:
    """Return the sinks by name, none without `sinks.file`.

    Raises `UnmaskError` (CONFIG) naming file, sink, field and what would be right.
    """
    given = config.sinks.file
    if not given:
        return {}
    path = Path(given).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise _bad(f"sinks.file {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise _bad(f"sinks.file {path} is not UTF-8 text") from None
    sinks = parse_sinks(text, path.name)
    for name, sink in sinks.items():
        _check_topic(config, path.name, name, sink)
    return sinks


def parse_sinks(text: str, where: str) -> dict[str, Sink]:
    """Return the sinks that YAML text describes; `where` is what errors call it."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _refuse_doubles(root, where)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise _bad(f"{where}{line} is not YAML: {getattr(error, 'problem', error)}") from None
    try:
        # JSON, because a list is then a tuple's equal although types are strict.
        return SinksFile.model_validate_json(json.dumps(tree, default=str)).sinks
    except ValidationError as error:
        said = dict.fromkeys(_sentence(where, item["loc"], item["msg"]) for item in error.errors())
        raise _bad("; ".join(said)) from None


def _refuse_doubles(node: yaml.Node, where: str) -> None:
    """Raise for a key that comes twice: YAML would keep the last and lose a sink without a word."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_doubles(item, where)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if str(key.value) in seen:
            raise _bad(
                f"{where} line {key.start_mark.line + 1}: {key.value} is set twice; once would be right"
            )
        seen.add(str(key.value))
        _refuse_doubles(value, where)


def _sentence(where: str, loc: Sequence[int | str], message: str) -> str:
    """Return an error in one sentence. Values are left out: one may be a secret in the wrong place."""
    parts = [str(part) for part in _without_tag(loc)]
    place = ".".join(parts) or "the file"
    words = message[:1].lower() + message[1:]
    if "Extra inputs" in message:
        return f"{where}: {place} is no setting; docs/sinks.md lists them"
    return f"{where}: {place}: {words}"


def _without_tag(loc: Sequence[int | str]) -> Iterator[int | str]:
    """Leave out the type of a sink, which pydantic puts behind its name."""
    for index, part in enumerate(loc):
        if not (index == 2 and loc[0] == "sinks" and part in KINDS):
            yield part


def _check_topic(config: Config, where: str, name: str, sink: Sink) -> None:
    if not isinstance(sink, KafkaTopic):
        return
    if sink.cluster is None and not config.kafka.bootstrap_servers:
        raise _bad(
            f"{where}: sinks.{name}: there is no cluster; set kafka.bootstrap_servers in config.yaml, or "
            "cluster.bootstrap_servers here"
        )
    if sink.topic in {topic_name(config, topic) for topic in Topic}:
        raise _bad(f"{where}: sinks.{name}.topic is {sink.topic}, a topic of Unmask's own; name another")


def check_url(url: str) -> None:
    """Raise `PydanticCustomError` unless `url` is an http(s) address of a host."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or re.search(r"[\s\x00-\x1f\x7f]", url) or not url.isascii():
        raise _wrong("must be an address like https://HOST/PATH")


def shown(sink: Sink) -> str:
    """Return where a sink sends to, without secrets, for people."""
    match sink:
        case Webhook():
            return redact(sink.url)
        case File():
            return sink.path
        case Command():
            return redact(" ".join(sink.argv))
        case KafkaTopic():
            return sink.topic if sink.cluster is None else f"{sink.topic} at {sink.cluster.bootstrap_servers}"
        case Stdout():
            return "standard output"


def fingerprint(address: str) -> str:
    """Return what tells one address from another without telling the address."""
    return hashlib.sha256(address.encode()).hexdigest()[:16]


def _bad(sentence: str) -> UnmaskError:
    return UnmaskError(Code.CONFIG, redact(sentence))
