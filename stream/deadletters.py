"""`unmask deadletter list`, `show`, `replay`: what could not be applied, looked at, tried again (DESIGN 3.9).

A replay is an attachment of its own, under the stream id `<stream>~replay` and of kind `file`: what is found
in it is marked and never mixed with what is live. A letter that fails again is dead-lettered again, under
that id.
"""

import base64
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from stream.alerts import iso
from stream.assemble import log_folder, open_log
from stream.chunks import JSON, content_hash
from stream.clip_child import clip_job, cut_apart
from stream.clips import Clip
from stream.clock import Clock, Deadline, SystemClock
from stream.config import Config
from stream.console import clean
from stream.controls import End, EndReason, Start, to_body
from stream.deadletter import CODE, CULPRIT, CUT, LEFT_OUT, MAX_RECORDS, ORIGIN, REASON, TIME
from stream.errors import Code, UnmaskError
from stream.foreign import Segment, read_headers
from stream.listed import Listed
from stream.log import Log, TopicPartition, partitions_of
from stream.records import (
    REPLAY,
    ChunkMeta,
    Control,
    Kind,
    OutRecord,
    Record,
    Topic,
    encode_headers,
    new_attachment,
    split_stream_id,
)
from stream.redact import redact
from stream.topics import media_partition, topic_name

OK, FAILED = 0, 1

REMUX_S = 60.0
"""What a letter's remux may take: it is cut from at most `deadletter.MAX_BYTES`."""

WRITE_S = 30.0
"""What the log gets to take a replay."""

WAIT_S = 60.0
"""Detect must move on within this while an outcome is waited for: a poison chunk holds it up for twice
`decode.stall_s`."""

POLL_S = 0.2

SHOWN_VALUE = 200
"""Characters of a header shown."""

RUN = "replay_run"
"""Header that marks the records of one replay."""


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter. `records` are the originals, as far as they were kept, the last being at fault."""

    id: str
    stream: str
    code: str
    reason: str
    time_us: int
    left_out: int
    cut: str
    records: tuple[Record, ...]

    @property
    def size(self) -> int:
        """Bytes of media in it."""
        return sum(len(record.value or b"") for record in self.records)

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "time": iso(self.time_us),
            "stream": self.stream,
            "code": self.code,
            "reason": redact(self.reason),
            "records": len(self.records),
            "bytes": self.size,
            "left_out": self.left_out,
        }

    def line(self) -> str:
        when = iso(self.time_us)[:19]
        return clean(f"{self.id:<16} {when}Z  {self.stream:<20.80} {self.code:<16} {redact(self.reason)}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which letters to list; None means all."""

    stream: str | None = None
    code: str | None = None
    since: datetime | None = None

    def has(self, letter: Letter) -> bool:
        if self.stream is not None and letter.stream != self.stream:
            return False
        if self.code is not None and letter.code != self.code:
            return False
        return self.since is None or letter.time_us >= _us(self.since)


def list_letters(config: Config, wanted: Wanted, as_json: bool, out: TextIO) -> int:
    """Write a line per letter, oldest first; return the exit code."""
    with recorded(config) as log:
        found = [_without_media(letter) for letter in letters(config, log) if wanted.has(letter)]
    for letter, facts in sorted(found, key=lambda pair: (pair[0].time_us, pair[0].id)):
        out.write(f"{json.dumps(facts) if as_json else letter.line()}\n")
    if not found and not as_json:
        out.write("no dead letter\n")
    return OK


def show(config: Config, name: str, target: Path | None, as_json: bool, out: TextIO) -> int:
    """Write all that is known of a letter; its media goes to `target`, playable if that is possible."""
    with recorded(config) as log:
        letter = _find(config, log, name)
    if as_json:
        rows = [_row(record) for record in letter.records]
        out.write(json.dumps({**letter.as_json(), "headers": _headers(letter), "chunks": rows}) + "\n")
    else:
        out.write("\n".join(clean(line) for line in _lines(letter)) + "\n")
    if target is not None:
        out.write(f"{_write_media(config, letter, target)}\n")
    return OK


def replay(config: Config, name: str, wait: bool, as_json: bool, out: TextIO) -> int:
    """Write a letter's chunks into `media` again; with `wait` also what became of them.

    Exit code 1 if something of it was dead-lettered again. Raises `UnmaskError` for what cannot be replayed,
    and (STAGE_WEDGED) if detect does not come to it.
    """
    clock = SystemClock()
    with recorded(config) as log:
        letter = _find(config, log, name)
        _check_listed(config, log, letter, clock)
        records = replayed(config, letter, clock.now_us())
        marks = Marks(config, log)
        with log.producer(f"replay-{letter.id}") as producer:
            for record in records:
                producer.send(record)
            producer.flush(WRITE_S)
        stream = records[0].key
        if not as_json or not wait:
            told = {"replay": letter.id, "stream": stream, "records": len(records)}
            sentence = f"{letter.id}: {len(records)} records written as {stream}"
            out.write(f"{json.dumps(told) if as_json else sentence}\n")
            out.flush()
        if not wait:
            return OK
        marks.wait(log, records[-1], clock)
        outcome = marks.outcome(log, stream)
    out.write(f"{json.dumps({'replay': letter.id, **outcome.as_json()}) if as_json else outcome.text()}\n")
    return FAILED if outcome.letters else OK


def letters(config: Config, log: Log) -> Iterator[Letter]:
    """Yield every dead letter, partition by partition."""
    for partition in _partitions(config, log, Topic.DEADLETTER):
        open_letters: dict[str, list[Record]] = {}
        for record in log.read(partition, log.begin_offset(partition)):
            own = open_letters.setdefault(record.key, [])
            own.append(record)
            del own[:-MAX_RECORDS]
            if record.headers.get(CULPRIT, b"1") == b"1":
                yield _letter(open_letters.pop(record.key))


def _letter(records: Sequence[Record]) -> Letter:
    last = records[-1]
    return Letter(
        id=_id_of(last),
        stream=last.key,
        code=_text(last, CODE) or "unknown",
        reason=_text(last, REASON),
        time_us=_number(_text(last, TIME)) or last.timestamp_us,
        left_out=_number(_text(last, LEFT_OUT)) or 0,
        cut=_text(last, CUT),
        records=tuple(_original(record) for record in records),
    )


def _id_of(record: Record) -> str:
    topic, partition, offset = _origin(record)
    return f"{topic.rpartition('.')[2]}.{partition}.{offset}"


def _origin(record: Record) -> tuple[str, int, int]:
    """Return whence a dead letter came; a stranger's, which does not say, came from where it lies."""
    topic, _, rest = _text(record, ORIGIN).rpartition("/")[0].rpartition("/")
    offset = _number(_text(record, ORIGIN).rpartition("/")[2])
    partition = _number(rest)
    if topic and partition is not None and offset is not None:
        return topic, partition, offset
    return record.topic, record.partition, record.offset


def _original(record: Record) -> Record:
    topic, partition, offset = _origin(record)
    own = {name: value for name, value in record.headers.items() if not name.startswith("dead_")}
    return replace(record, topic=topic, partition=partition, offset=offset, headers=own)


def _text(record: Record, name: str) -> str:
    return record.headers.get(name, b"").decode("utf-8", "replace")


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def _without_media(letter: Letter) -> tuple[Letter, dict[str, Any]]:
    """Return the letter to be sorted and told of; a thousand of them need not fit into memory whole."""
    return replace(letter, records=()), letter.as_json()


def _find(config: Config, log: Log, name: str) -> Letter:
    for letter in letters(config, log):
        if letter.id == name:
            return letter
    raise UnmaskError(
        Code.SOURCE_NOT_FOUND,
        f"no dead letter {name!r}; unmask deadletter list shows those that are kept (for "
        f"{config.log.records_retention_s / 86400:g} days)",
    )


@contextmanager
def recorded(config: Config) -> Iterator[Log]:
    """Open the log that others write, for as long as the block runs. Raises `UnmaskError` (SOURCE_NOT_FOUND)
    where nothing was ever recorded."""
    if not config.kafka.bootstrap_servers and not log_folder(config).is_dir():
        raise UnmaskError(
            Code.SOURCE_NOT_FOUND,
            f"nothing was ever recorded in {log_folder(config)}; name the folder with --set data_dir=...",
        )
    log = open_log(config, SystemClock())
    try:
        yield log
    finally:
        log.close()


# What is shown


def _headers(letter: Letter) -> dict[str, str]:
    """Return the headers of the record at fault, redacted."""
    found = letter.records[-1].headers
    return {name: redact(value.decode("utf-8", "replace"))[:SHOWN_VALUE] for name, value in found.items()}


def _lines(letter: Letter) -> Iterator[str]:
    yield f"{letter.id}  {iso(letter.time_us)}  stream {letter.stream}"
    yield f"{letter.code}: {redact(letter.reason)}"
    if letter.cut:
        yield f"too large to be kept whole: {letter.cut} left out"
    if letter.left_out:
        yield f"{letter.left_out} records before these were left out"
    yield "headers of the record at fault:"
    for name, value in _headers(letter).items():
        yield f"  {name}: {value}"
    yield f"{len(letter.records)} records, {letter.size} bytes, the last at fault:"
    for record in letter.records:
        row = _row(record)
        said = " ".join(f"{name}={value}" for name, value in row.items() if name not in ("origin", "bytes"))
        yield f"  {row['origin']}  {row['bytes']} bytes  {said}"


def _row(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {
        "origin": f"{record.topic}/{record.partition}/{record.offset}",
        "bytes": len(record.value or b""),
    }
    try:
        read = read_headers(record.key, record.headers)
    except UnmaskError as error:
        return row | {"unreadable": redact(str(error))}
    if isinstance(read, Segment):
        return row | {"content-type": read.content_type, "capture": iso(read.capture_us)}
    row |= {"attachment": read.attachment, "epoch": read.epoch, "sequence": read.sequence}
    if read.parts > 1:
        row["part"] = f"{read.part + 1}/{read.parts}"
    if read.control is not None:
        return row | {"control": read.control.value}
    pts = {} if read.pts is None else {"pts": read.pts, "media": iso(read.media_us(read.pts))}
    return row | pts | {"keyframe": read.starts_on_keyframe}


def _write_media(config: Config, letter: Letter, target: Path) -> str:
    """Write the letter's media to a file; return the sentence that says what it is."""
    if not _is_media(config, letter):
        raise UnmaskError(Code.CHUNK_INVALID, f"{letter.id} holds no media, but an entry of another topic")
    reason = ""
    for records, what in ((letter.records, "all of it"), (letter.records[:-1], "all before the last record")):
        try:
            clip = _remuxed(config, letter.stream, records)
        except UnmaskError as error:
            reason = reason or redact(str(error))
            continue
        _write(target, clip.value)
        return clean(f"{target}: {clip.content_type}, {what}")
    rows = [
        {
            **_row(record),
            "headers": {name: value.decode("utf-8", "replace") for name, value in record.headers.items()},
            "value": base64.b64encode(record.value or b"").decode(),
        }
        for record in letter.records
    ]
    _write(target, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return clean(f"{target}: not playable ({reason}); its records as JSON lines, values in base64")


def _remuxed(config: Config, stream: str, records: Sequence[Record]) -> Clip:
    return cut_apart(clip_job(stream, records), config.decode.memory_limit_bytes, REMUX_S)


def _write(target: Path, value: bytes) -> None:
    try:
        target.write_bytes(value)
    except OSError as error:
        raise UnmaskError(
            Code.CONFIG, f"--out {target} cannot be written: {error.strerror or error}"
        ) from error


# Replay


def _is_media(config: Config, letter: Letter) -> bool:
    return letter.records[-1].topic == topic_name(config, Topic.MEDIA)


def _check_listed(config: Config, log: Log, letter: Letter, clock: Clock) -> None:
    if not _is_media(config, letter):
        raise UnmaskError(
            Code.CHUNK_INVALID,
            f"{letter.id} is no media: put the entry of {clean(letter.stream)[:80]} right with unmask attach",
        )
    base, _ = split_stream_id(letter.stream)
    listed = Listed(log, topic_name(config, Topic.SOURCES), clock)
    if not config.media.accept_unlisted and not listed.look_for(base):
        raise UnmaskError(
            Code.SOURCE_NOT_FOUND,
            f"{letter.id} is of stream {base}, which is not listed, so detect would refuse it again; list it "
            "with unmask attach",
        )


def replayed(config: Config, letter: Letter, now_us: int) -> list[OutRecord]:
    """Return the letter's media as records of `<stream>~replay`: a new attachment, from its start to its end.

    Media times and order stay, holes too; what cannot even be told apart by its headers is left out. Raises
    `UnmaskError` (CHUNK_INVALID) if nothing is left.
    """
    base, _ = split_stream_id(letter.stream)
    stream = f"{base}~{REPLAY}"
    own: list[tuple[ChunkMeta, bytes]] = []
    segments: list[tuple[Segment, bytes]] = []
    reason = "it holds control records only"
    for record in letter.records:
        try:
            read = read_headers(record.key, record.headers)
        except UnmaskError as error:
            reason = str(error)
            continue
        if isinstance(read, Segment):
            segments.append((read, record.value or b""))
        else:
            own.append((read, record.value or b""))
    if any(meta.control is None for meta, _ in own):
        found = [(encode_headers(meta), value) for meta, value in _renumbered(letter, stream, own, now_us)]
    elif any(segment.control is None for segment, _ in segments):
        found = list(_resent(segments))
    else:
        raise UnmaskError(Code.CHUNK_INVALID, f"{letter.id} cannot be replayed: {redact(reason)}")
    run = f"{letter.id} {now_us}".encode()
    topic = topic_name(config, Topic.MEDIA)
    place = media_partition(stream, config.media.partitions)
    return [OutRecord(topic, stream, value, {**headers, RUN: run}, now_us, place) for headers, value in found]


def _renumbered(
    letter: Letter, stream: str, chunks: Sequence[tuple[ChunkMeta, bytes]], now_us: int
) -> Iterator[tuple[ChunkMeta, bytes]]:
    """Yield the chunks in one attachment of kind `file`, between a start and an end."""
    attachment = new_attachment(now_us)
    first = replace(chunks[0][0], stream=stream, attachment=attachment, kind=Kind.FILE, epoch=0, sequence=0)
    start = Start(f"dead letter {letter.id}", REPLAY, Kind.FILE.value)
    yield _control(first, Control.START, to_body(start))
    epochs: dict[tuple[str, int], int] = {}
    sequence, before = 0, None
    last = first
    for meta, value in chunks:
        follows = before is not None and before.attachment == meta.attachment
        step = meta.sequence - before.sequence if before is not None and follows else 1
        before = meta
        if meta.control in (Control.START, Control.END):
            continue
        sequence += max(0, step)
        epoch = epochs.setdefault((meta.attachment, meta.epoch), len(epochs))
        last = replace(
            meta, stream=stream, attachment=attachment, kind=Kind.FILE, epoch=epoch, sequence=sequence
        )
        yield last, value
    end = to_body(End(EndReason.FINISHED.value))
    yield _control(replace(last, sequence=sequence + 1), Control.END, end)


def _control(meta: ChunkMeta, control: Control, body: Mapping[str, Any]) -> tuple[ChunkMeta, bytes]:
    value = json.dumps(body, separators=(",", ":"), sort_keys=True).encode()
    made = replace(
        meta,
        pts=None,
        starts_on_keyframe=False,
        codec=None,
        content_type=JSON,
        content_hash=content_hash(value),
        control=control,
        part=0,
        parts=1,
    )
    return made, value


def _resent(segments: Sequence[tuple[Segment, bytes]]) -> Iterator[tuple[dict[str, bytes], bytes]]:
    """Yield segments of another producer as it would send a file, and their end."""
    capture = b""
    for segment, value in segments:
        capture = str(segment.capture_us).encode()
        if segment.control is None:
            own = {"content-type": segment.content_type.encode(), "capture_time": capture}
            yield {**own, "kind": Kind.FILE.value.encode()}, value
    yield (
        {
            "control": Control.END.value.encode(),
            "capture_time": capture,
            "kind": Kind.FILE.value.encode(),
        },
        b"",
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a replay. `dropped` counts pictures by reason; `incidents` are ids with severity."""

    stream: str
    frames: int
    faces: int
    dropped: Mapping[str, int]
    incidents: Mapping[str, str]
    letters: Sequence[Letter]

    def as_json(self) -> dict[str, Any]:
        return {
            "stream": self.stream,
            "frames": self.frames,
            "faces": self.faces,
            "dropped": dict(self.dropped),
            "incidents": dict(self.incidents),
            "dead_letters": [letter.as_json() for letter in self.letters],
        }

    def text(self) -> str:
        lines = [f"{self.stream}: {self.frames} pictures scored, {self.faces} faces in them"]
        lines += [f"  dropped: {reason} {count}" for reason, count in self.dropped.items()]
        lines += [f"  incident {name}, severity {severity}" for name, severity in self.incidents.items()]
        lines += [f"  dead-lettered again: {letter.line()}" for letter in self.letters]
        return "\n".join(lines if len(lines) > 1 else [*lines, "  no incident"])


class Marks:
    """Where the topics ended before a replay was written: what comes behind may be of it."""

    def __init__(self, config: Config, log: Log) -> None:
        self._config = config
        self._ends = {
            partition: log.end_offset(partition)
            for topic in (Topic.MEDIA, Topic.SCORES, Topic.ALERTS, Topic.DEADLETTER)
            for partition in _partitions(config, log, topic)
        }

    def wait(self, log: Log, last: OutRecord, clock: Clock) -> None:
        """Return when detect has applied the replay's `last` record. Raises `UnmaskError` (STAGE_WEDGED)."""
        assert last.partition is not None
        partition = TopicPartition(last.topic, last.partition)
        group = f"{self._config.prefix}-detect"
        reached, patience = log.group_position(group, partition) or 0, Deadline(WAIT_S, clock)
        written: int | None = None
        while True:
            written = self._written(log, partition, last) if written is None else written
            if written is not None and reached > written:
                return
            if patience.passed():
                raise UnmaskError(
                    Code.STAGE_WEDGED,
                    f"detect has not moved on for {WAIT_S:g} s; the replay waits in {partition.topic}/"
                    f"{partition.partition}: is unmask detect running?",
                )
            clock.sleep(POLL_S)
            position = log.group_position(group, partition) or 0
            if position > reached:
                reached, patience = position, Deadline(WAIT_S, clock)

    def _written(self, log: Log, partition: TopicPartition, last: OutRecord) -> int | None:
        """Return the offset that the log gave the replay's last record; None if it does not show it yet."""
        for record in log.read(partition, max(self._ends[partition], log.begin_offset(partition))):
            if record.headers.get(RUN) == last.headers[RUN] and record.headers.get("control") == b"end":
                return record.offset
        return None

    def outcome(self, log: Log, stream: str) -> Outcome:
        """Return what was written about the stream since."""
        values = [json.loads(record.value or b"null") for record in self._since(log, Topic.SCORES, stream)]
        frames = [value for value in values if value["type"] == "frame"]
        dropped: Counter[str] = Counter()
        for value in values:
            if value["type"] == "dropped":
                dropped[value["reason"]] += value["frames"] or 1
        alerts = [json.loads(record.value or b"null") for record in self._since(log, Topic.ALERTS, stream)]
        incidents = {alert["incident"]: alert["severity"] for alert in alerts if "incident" in alert}
        dead, again = [], list[Letter]()
        for record in self._since(log, Topic.DEADLETTER, stream):
            dead.append(record)
            if record.headers.get(CULPRIT, b"1") == b"1":
                again.append(_letter(dead))
                dead = []
        faces = sum(len(value["faces"]) for value in frames)
        return Outcome(stream, len(frames), faces, dropped, incidents, again)

    def _since(self, log: Log, topic: Topic, stream: str) -> Iterator[Record]:
        for partition in _partitions(self._config, log, topic):
            start = max(self._ends[partition], log.begin_offset(partition))
            yield from (record for record in log.read(partition, start) if record.key == stream)


def _partitions(config: Config, log: Log, topic: Topic) -> list[TopicPartition]:
    return partitions_of(log, topic_name(config, topic))


def _us(moment: datetime) -> int:
    zoned = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return round(zoned.timestamp() * 1_000_000)
