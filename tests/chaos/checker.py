"""The independent judge of a run: what is in the topics, against what was planted, frame by frame.

It shares no code with what it judges. What should have been seen is computed from the chunks that really are
in `media`: decoded here, each picture says its own number and face.

- Every picture due by the sampling rule (the first of each interval of the idle rate's grid in media time)
  has one score, or lies in a `dropped` range, which is counted by its reason. No picture has two, none is
  made up, and none says another face than the picture shows.
- Every planted stretch that was long enough and undisturbed is in one incident and no more; no incident is
  anywhere else. Events are numbered from 1 without gaps, in order, each once, one incident at a time.
- Nothing is missing in `media` within an attachment unless a `gap` tells.
"""

import io
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import av

from tests.chaos.pictures import FPS, PLAN, Face, Seen, read
from tests.chaos.topics import Row, Topics

MICRO = 1_000_000
EXAMPLES = 8
"""Of each kind of problem so many are described."""
NEAR_US = MICRO
"""An incident may begin and end this far from a red picture: samples are half a second apart."""
TOLD_WITHIN = 2
"""Records around a hole among which a `gap` must be."""

Place = tuple[str, int, int]
"""Attachment, epoch, pts: what names a picture of a stream."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the run was configured with."""

    idle_fps: int = 2
    solid_s: float = 7.0
    """A planted stretch this long must open an incident: window, hold, and room for the samples' grid."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture that is in `media`; `seen` None if nothing decodes it (a hole before it)."""

    attachment: str
    epoch: int
    sequence: int
    pts: int
    media_us: int
    seen: Seen | None

    @property
    def place(self) -> Place:
        return (self.attachment, self.epoch, self.pts)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Red pictures one after the other, in media time; `solid`: nothing disturbed any of them."""

    first_us: int
    last_us: int


@dataclass(slots=True)
class Report:
    """Counts; those in `WRONG` must be 0. `examples` describe some of each."""

    streams: int = 0
    records: int = 0
    frames: int = 0
    scored: int = 0
    incidents: int = 0
    events: int = 0
    planted: int = 0
    """Stretches that must be in an incident."""
    attachments: int = 0
    stale_records: int = 0
    """In `media` but not newer than what came before: sent again, or by a reader that was replaced."""
    holes_told: int = 0
    dead_letters: int = 0
    excused: dict[str, int] = field(default_factory=dict)
    """Pictures that were due and not scored, by the reason that was told."""
    unread_s: float = 0.0
    """Of live feeds: time between their first and their last picture that nobody brought into `media`."""
    feed_events: dict[str, int] = field(default_factory=dict)

    incidents_lost: int = 0
    incidents_doubled: int = 0
    incidents_false: int = 0
    incidents_unclosed: int = 0
    events_doubled: int = 0
    events_out_of_order: int = 0
    """Numbers with a gap or not rising, events before `opened` or after `closed`."""
    frames_unaccounted: int = 0
    scores_doubled: int = 0
    scores_phantom: int = 0
    """Scores of pictures that are not in `media`, or of an attachment that was over."""
    scores_contradicted: int = 0
    """Scores that say another face than the picture shows."""
    media_untold: int = 0
    """Records or pictures missing within an attachment with no `gap` to tell."""
    media_crossed: int = 0
    """Pictures of another feed, or that show another face than planned."""

    examples: dict[str, list[str]] = field(default_factory=dict)

    def wrong(self, kind: str, what: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        described = self.examples.setdefault(kind, [])
        if len(described) < EXAMPLES:
            described.append(what)

    def problems(self) -> dict[str, list[str]]:
        """Return what must not be, with examples; empty if all is well."""
        return {kind: self.examples.get(kind, []) for kind in WRONG if getattr(self, kind)}

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"unread_s": round(self.unread_s, 1)}


WRONG = (
    "incidents_lost",
    "incidents_doubled",
    "incidents_false",
    "incidents_unclosed",
    "events_doubled",
    "events_out_of_order",
    "frames_unaccounted",
    "scores_doubled",
    "scores_phantom",
    "scores_contradicted",
    "media_untold",
    "media_crossed",
)


def check(topics: Topics, rules: Rules) -> Report:
    """Judge a run whose feeds have all ended and whose records are all applied."""
    report = Report()
    media, scores = _by_stream(topics.media), _by_stream(topics.scores)
    alerts, letters = _by_stream(topics.alerts), _by_stream(topics.deadletter)
    report.dead_letters = sum(map(len, letters.values()))
    for stream in sorted(media | scores | alerts):
        report.streams += 1
        story = _Story(stream, report)
        for row in media.get(stream, ()):
            story.take(row)
        frames = story.finish()
        drops = _Drops(scores.get(stream, ()))
        _check_scores(
            stream, frames, scores.get(stream, ()), drops, _sequences(letters.get(stream, ())), rules, report
        )
        _check_incidents(stream, frames, alerts.get(stream, ()), drops, rules, report)
    return report


def _by_stream(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return rows by stream; reserved ones (`canary~3`, `x~replay`) are not of the run."""
    streams: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if "~" not in row.key:
            streams[row.key].append(row)
    return dict(streams)


def _sequences(letters: Iterable[Row]) -> set[tuple[str, str]]:
    """Return attachment and sequence of what was dead-lettered, where its headers tell."""
    return {(row.headers.get("attachment", ""), row.headers.get("sequence", "")) for row in letters}


# What is in media


@dataclass(frozen=True, slots=True)
class _Chunk:
    attachment: str
    epoch: int
    sequence: int
    part: int
    parts: int
    control: str
    headers: Any
    value: bytes

    @property
    def order(self) -> tuple[str, int, int, int]:
        return (self.attachment, self.epoch, self.sequence, self.part)


class _Story:
    """Reads one stream's records in order, as the design says a reader must."""

    def __init__(self, stream: str, report: Report) -> None:
        self._stream = stream
        self._report = report
        self._last: _Chunk | None = None
        self._partition: int | None = None
        self._recent: list[_Chunk] = []
        self._holes: list[tuple[_Chunk, _Chunk]] = []
        self._gaps: set[tuple[str, int]] = set()
        self._parts: list[_Chunk] = []
        self._frames: list[Frame] = []
        self._order: list[tuple[str, int]] = []
        """Epochs as they came."""
        self._sequence_of: dict[Place, int] = {}
        self._us_of: dict[Place, int] = {}
        self._seen: dict[Place, Seen] = {}
        self._live = False
        self._unit = 0.0
        """Seconds in a tick of pts."""
        self._newest: tuple[str, int] | None = None
        self._ends: set[tuple[str, int]] = set()
        """Chunks that nothing joins: pictures between their last ones may not have come any more."""
        self._decoder: Any = None
        self._key: tuple[str, int] | None = None

    def take(self, row: Row) -> None:
        self._report.records += 1
        chunk = _chunk(row)
        if self._last is not None and chunk.order <= self._last.order:
            self._report.stale_records += 1
            return
        if self._partition not in (None, row.partition):
            self._report.wrong("media_crossed", f"{self._stream}: records in two partitions of media")
        self._partition = row.partition
        self._follow(chunk)
        if chunk.control == "gap":
            self._gaps.add((chunk.attachment, chunk.sequence))
            self._flush()
        elif not chunk.control:
            self._newest = (chunk.attachment, chunk.sequence)
            self._join(chunk)
        self._last = chunk

    def finish(self) -> list[Frame]:
        """Return the pictures in order of epoch and time."""
        self._flush()
        for before, after in self._holes:
            self._judge_hole(before, after)
        frames = [
            Frame(place[0], place[1], sequence, place[2], self._us_of[place], self._seen.get(place))
            for place, sequence in self._sequence_of.items()
        ]
        rank = {key: number for number, key in enumerate(self._order)}
        frames.sort(key=lambda frame: (rank[frame.attachment, frame.epoch], frame.pts))
        self._report.frames += len(frames)
        if self._live and frames:
            pts = {frame.pts for frame in frames}
            self._report.unread_s += (max(pts) - min(pts)) * self._unit - (len(pts) - 1) / FPS
        self._check_pictures(frames)
        return frames

    def _follow(self, chunk: _Chunk) -> None:
        """Note new epochs and holes in the sequence."""
        last = self._last
        if last is None or chunk.attachment != last.attachment:
            self._report.attachments += 1
            first = None if chunk.sequence == 0 else chunk
            if first is not None:
                self._holes.append((chunk, chunk))
        elif chunk.sequence > last.sequence + 1:
            self._holes.append((last, chunk))
            self._flush()
        if self._key != (chunk.attachment, chunk.epoch):
            self._flush()
            self._key = (chunk.attachment, chunk.epoch)
            self._order.append(self._key)

    def _judge_hole(self, before: _Chunk, after: _Chunk) -> None:
        near = range(before.sequence - TOLD_WITHIN, before.sequence + 1)
        near_after = range(after.sequence, after.sequence + TOLD_WITHIN + 1)
        told = any((after.attachment, number) in self._gaps for number in [*near, *near_after])
        if told:
            self._report.holes_told += 1
            return
        self._report.wrong(
            "media_untold",
            f"{self._stream} {after.attachment}: sequence {before.sequence} is followed by {after.sequence}",
        )

    def _join(self, chunk: _Chunk) -> None:
        if chunk.part == 0:
            self._parts = []
        self._parts.append(chunk)
        if len(self._parts) < chunk.parts or chunk.part != chunk.parts - 1:
            return
        self._decode(chunk, b"".join(part.value for part in self._parts))

    def _decode(self, chunk: _Chunk, value: bytes) -> None:
        numerator, _, denominator = chunk.headers["time_base"].partition("/")
        base = Fraction(int(numerator), int(denominator))
        self._live, self._unit = chunk.headers["kind"] == "live", float(base)
        anchor, first = int(chunk.headers["epoch_anchor"]), int(chunk.headers["first_pts"])
        options = {"fflags": "nofillin+noparse", "codec_whitelist": "none"}
        with av.open(io.BytesIO(value), format="nut", options=options) as container:
            shift = int(container.metadata["unmask_base"])
            packets: list[Any] = [packet for packet in container.demux(video=0) if packet.size]
            for packet in packets:
                pts = int(packet.pts * packet.time_base / base) + shift
                place = (chunk.attachment, chunk.epoch, pts)
                if place in self._sequence_of:
                    self._report.wrong("media_crossed", f"{self._stream} {place} comes twice")
                self._sequence_of[place] = chunk.sequence
                self._us_of[place] = anchor + int((pts - first) * base * MICRO)
                self._feed(packet, pts, chunk.headers)

    def _feed(self, packet: Any, pts: int, headers: Any) -> None:
        if self._decoder is None:
            if not packet.is_keyframe:
                return
            codec = json.loads(headers["codec"])
            self._decoder = av.CodecContext.create(codec["name"], "r")
            self._decoder.thread_count = 1
            if codec.get("extradata"):
                self._decoder.extradata = bytes.fromhex(codec["extradata"])
        copy = av.Packet(bytes(packet))
        copy.pts = copy.dts = pts
        copy.is_keyframe = packet.is_keyframe
        self._note(self._decoder.decode(copy))

    def _flush(self) -> None:
        if self._newest is not None:
            self._ends.add(self._newest)
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            self._note(decoder.decode(None))

    def _note(self, frames: Iterable[Any]) -> None:
        assert self._key is not None
        for frame in frames:
            self._seen[(*self._key, frame.pts)] = read(frame)

    def _check_pictures(self, frames: Sequence[Frame]) -> None:
        """Pictures follow each other without one missing, show what was planned, and are one feed's."""
        feed = next((frame.seen.feed for frame in frames if frame.seen), None)
        for before, frame in zip([None, *frames], frames, strict=False):
            if frame.seen is None:
                continue
            number = frame.seen.number
            where = f"{self._stream} {frame.attachment}/{frame.epoch}/{frame.sequence} picture {number}"
            if frame.seen.feed != feed or frame.seen.face is not PLAN.face(number):
                self._report.wrong(
                    "media_crossed", f"{where} is of feed {frame.seen.feed}, {frame.seen.face}"
                )
            if before is None or before.seen is None or before.attachment != frame.attachment:
                continue
            joined = (number - before.seen.number) % PLAN.loop == 1
            if joined or (frame.attachment, frame.sequence) in self._ends:
                continue
            if not self._gap_between(before, frame):
                self._report.wrong("media_untold", f"{where} follows picture {before.seen.number}")

    def _gap_between(self, before: Frame, after: Frame) -> bool:
        numbers = range(before.sequence, after.sequence + 1 + TOLD_WITHIN)
        return any((after.attachment, number) in self._gaps for number in numbers)


def _chunk(row: Row) -> _Chunk:
    headers = row.headers
    return _Chunk(
        headers["attachment"],
        int(headers["epoch"]),
        int(headers["sequence"]),
        int(headers["part"]),
        int(headers["parts"]),
        headers.get("control", ""),
        headers,
        row.value,
    )


# Scores


class _Drops:
    """The `dropped` ranges of a stream."""

    def __init__(self, scores: Iterable[Row]) -> None:
        found = [json.loads(row.value) for row in scores]
        ranges = sorted(
            (item["first_us"], item["last_us"], item["reason"]) for item in found if item["type"] == "dropped"
        )
        self._first = [first for first, _, _ in ranges]
        self._ranges = ranges
        self._reach: list[int] = []
        """The largest end among the ranges up to each."""
        for _, last, _ in ranges:
            self._reach.append(max(last, self._reach[-1] if self._reach else last))

    def reason(self, media_us: int) -> str | None:
        """Return why a picture at this time was not looked at, None if nothing was said."""
        for place in range(bisect_right(self._first, media_us) - 1, -1, -1):
            if self._reach[place] < media_us:
                return None
            if self._ranges[place][1] >= media_us:
                return str(self._ranges[place][2])
        return None


def _check_scores(
    stream: str,
    frames: Sequence[Frame],
    scores: Iterable[Row],
    drops: _Drops,
    letters: set[tuple[str, str]],
    rules: Rules,
    report: Report,
) -> None:
    scored: dict[Place, Any] = {}
    for row in scores:
        body = json.loads(row.value)
        if body["type"] != "frame":
            continue
        report.scored += 1
        place = (body["attachment"], body["epoch"], body["pts"])
        if place in scored:
            report.wrong("scores_doubled", f"{stream} {place}")
        scored[place] = body
    known = {frame.place for frame in frames}
    for place in scored.keys() - known:
        report.wrong("scores_phantom", f"{stream} {place}")
    excused: Counter[str] = Counter(report.excused)
    last_tick = excused_tick = -1
    for frame in frames:
        tick = frame.media_us * rules.idle_fps // MICRO
        if frame.place in scored:
            last_tick = tick
            _compare(stream, frame, scored[frame.place], report)
            continue
        reason = drops.reason(frame.media_us)
        if reason is None and (frame.attachment, str(frame.sequence)) in letters:
            reason = "DEADLETTER"
        if tick == last_tick:
            continue
        if reason is not None:
            excused[reason] += tick != excused_tick
            excused_tick = tick
            if reason == "STALE":  # it was taken as the interval's sample, and then not looked at
                last_tick = tick
            continue
        last_tick = tick
        where = (
            f"{stream} {frame.attachment}/{frame.epoch}/{frame.sequence} pts {frame.pts} at {frame.media_us}"
        )
        report.wrong("frames_unaccounted", where)
    report.excused = dict(excused)


def _compare(stream: str, frame: Frame, body: Any, report: Report) -> None:
    said = Face.NONE
    if body["faces"]:
        said = Face.RED if body["faces"][0]["fused"] > 0 else Face.GREEN
    if frame.seen is not None and said is not frame.seen.face:
        where = f"{stream} {frame.attachment}/{frame.epoch} pts {frame.pts}"
        report.wrong("scores_contradicted", f"{where} shows {frame.seen.face}, its score says {said}")
    if body["media_us"] != frame.media_us:
        report.wrong(
            "scores_contradicted",
            f"{stream} pts {frame.pts}: media time {body['media_us']}, not {frame.media_us}",
        )


# Incidents


@dataclass(slots=True)
class _Incident:
    id: str
    numbers: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    first_us: int = 0
    last_us: int = 0


def _check_incidents(
    stream: str,
    frames: Sequence[Frame],
    alerts: Sequence[Row],
    drops: _Drops,
    rules: Rules,
    report: Report,
) -> None:
    incidents = _incidents(stream, alerts, report)
    for incident in incidents.values():
        _check_events(stream, incident, report)
    report.incidents += len(incidents)
    red = [frame.media_us for frame in frames if frame.seen is not None and frame.seen.face is Face.RED]
    red.sort()
    for incident in incidents.values():
        place = bisect_right(red, incident.last_us + NEAR_US) - 1
        if place < 0 or red[place] < incident.first_us - NEAR_US:
            report.wrong(
                "incidents_false", f"{stream} {incident.id} at {incident.first_us}: nothing was planted"
            )
    for stretch in _solid(frames, drops, rules):
        report.planted += 1
        found = [
            incident.id
            for incident in incidents.values()
            if incident.first_us <= stretch.last_us and incident.last_us >= stretch.first_us
        ]
        where = f"{stream} planted {stretch.first_us} to {stretch.last_us}"
        if not found:
            report.wrong("incidents_lost", f"{where}: no incident")
        if len(found) > 1:
            report.wrong("incidents_doubled", f"{where}: {', '.join(found)}")


def _incidents(stream: str, alerts: Sequence[Row], report: Report) -> dict[str, _Incident]:
    incidents: dict[str, _Incident] = {}
    ids: set[str] = set()
    running: str | None = None
    partitions = {row.partition for row in alerts}
    if len(partitions) > 1:
        report.wrong("events_out_of_order", f"{stream}: alerts in partitions {partitions}")
    for row in alerts:
        kind = row.headers["ce_type"]
        if ".incident." not in kind:
            name = kind.split(".")[2]
            report.feed_events[name] = report.feed_events.get(name, 0) + 1
            continue
        report.events += 1
        if row.headers["ce_id"] in ids:
            report.wrong("events_doubled", f"{stream} {row.headers['ce_id']}")
            continue
        ids.add(row.headers["ce_id"])
        body = json.loads(row.value)
        incident = incidents.setdefault(body["incident"], _Incident(body["incident"]))
        incident.numbers.append(body["number"])
        incident.kinds.append(body["event"])
        incident.first_us, incident.last_us = body["first_media_us"], body["last_media_us"]
        if body["event"] == "opened" and running is not None:
            report.wrong("incidents_doubled", f"{stream}: {incident.id} opened while {running} was open")
        if body["event"] == "opened":
            running = incident.id
        elif body["event"] == "closed" and running == incident.id:
            running = None
    return incidents


def _check_events(stream: str, incident: _Incident, report: Report) -> None:
    where = f"{stream} {incident.id}: {list(zip(incident.numbers, incident.kinds, strict=True))}"
    closings = [place for place, kind in enumerate(incident.kinds) if kind in ("closed", "retracted")]
    ordered = (
        incident.numbers == list(range(1, len(incident.numbers) + 1))
        and incident.kinds[0] == "opened"
        and incident.kinds.count("opened") == 1
        and (not closings or "updated" not in incident.kinds[closings[0] :])
    )
    if not ordered:
        report.wrong("events_out_of_order", where)
    if not closings:
        report.wrong("incidents_unclosed", where)


def _solid(frames: Sequence[Frame], drops: _Drops, rules: Rules) -> Iterator[Stretch]:
    """Yield stretches of red pictures, long enough, of one epoch, all there and none of them dropped."""
    run: list[Frame] = []
    for frame in [*frames, None]:
        fits = (
            frame is not None
            and frame.seen is not None
            and frame.seen.face is Face.RED
            and drops.reason(frame.media_us) is None
        )
        if fits and run and _follows(run[-1], frame):
            run.append(frame)  # type: ignore[arg-type]
            continue
        if run and run[-1].media_us - run[0].media_us >= rules.solid_s * MICRO:
            yield Stretch(run[0].media_us, run[-1].media_us)
        run = [frame] if fits and frame is not None else []


def _follows(before: Frame, frame: Frame | None) -> bool:
    if frame is None or (before.attachment, before.epoch) != (frame.attachment, frame.epoch):
        return False
    return 0 < frame.media_us - before.media_us <= 2 * MICRO / FPS
