"""What the pages show, folded out of the topics into bounded memory (DESIGN 3.4 to 3.6).

One thread applies records and ticks; any thread reads. Nothing here asks the log.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from stream.clock import Clock
from stream.config import Config
from stream.decisions import Choice, Decision, Mute, Sample, Subject, drawn, read
from stream.errors import UnmaskError
from stream.glimpses import Glimpse, jpeg, read_glimpse
from stream.ingest_service import source_of
from stream.log import TopicPartition
from stream.records import Record, fields_of, is_canary, is_replay
from stream.web.incidents import Incident, Wanted
from stream.web.ledger import Ledger
from stream.web.precision import missed, precision
from stream.web.rows import FeedRow, Told

MAX_FEEDS = 2048
"""Feeds on the wall, ten times what it is made for; beyond, more are counted and not shown."""

MAX_INCIDENTS = 50_000
"""A month at 50 an hour and room; beyond, the oldest are forgotten here (their records stay)."""

MAX_DECISIONS = 50_000
MAX_SAMPLES = 2_000
"""Faces drawn, each with a crop of some kB; beyond, the oldest are forgotten."""

MAX_WAITING = 200
"""Faces that wait for review; while there are so many, none is drawn: more would only fill the topic, and
push decisions out of it."""

MAX_GONE = 1_000
"""Feeds remembered as gone, for pages that missed it."""

GONE_US = 600_000_000
"""A feed that was taken out of the list stays on the wall for so long after its last picture."""

NOTED_TRACKS = 20_000
"""Faces for which it is known whether they were drawn, and faces that incidents accuse."""

MARGIN = 0.4
"""Of a face's box, shown around it in the crop of a sample: enough to know a face by."""

CROP_WIDTH = 192
"""Pixels of that crop at most."""


class View:
    """Everything that was read, as far as pages need it."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._rows: dict[str, FeedRow] = {}
        self._shown: dict[str, tuple[int, dict[str, Any]]] = {}
        """Of each feed, the version in which its card last changed, and the card."""
        self._gone: OrderedDict[str, int] = OrderedDict()
        self._incidents: OrderedDict[str, Incident] = OrderedDict()
        self._open: dict[str, str] = {}
        self._decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self._decided: OrderedDict[str, Decision] = OrderedDict()
        self._samples: OrderedDict[str, Sample] = OrderedDict()
        self._mutes: dict[str, Mute] = {}
        self._noted: OrderedDict[tuple[str, str, int, int], None] = OrderedDict()
        self._accused: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._waiting = 0
        self._to_withdraw: set[str] = set()
        self.ledger = Ledger()
        self.ledger_lock = threading.Lock()
        self.version = 0
        self.refused_feeds = 0
        """Feeds that there was no room for."""
        self.unreadable = 0
        """Records that could not be read: strangers', later versions'."""
        self.away: str | None = None
        """Why the log does not answer, None while it does."""
        self.ready = False
        """Whether all that the log held at the start was read."""
        self.ledger_share = 0.0
        """How much of the scores the coverage has read, 0..1."""

    # Taking records

    def on_source(self, record: Record, partitions: int) -> None:
        """Take an entry of `sources`, `partitions` of which there are."""
        with self._lock:
            if record.value is None:
                row = self._rows.get(record.key)
                if row is not None:
                    row.listed = False
                return
            try:
                source = source_of(record, partitions)
            except UnmaskError as error:
                row = self._row(record.key[:80])
                if row is not None:
                    row.refused, row.listed = str(error), True
                return
            row = self._row(source.id)
            if row is None:
                return
            if not row.listed or row.refused is not None or row.source != source.shown:
                row.listed_us, row.told, row.seen_us = self._clock.now_us(), None, None
            row.listed, row.refused = True, None
            row.kind, row.source = source.kind.value, source.shown
            row.labels, row.fps = dict(source.labels), source.fps

    def on_alert(self, record: Record) -> None:
        """Take an event of `alerts`."""
        data = fields_of(record.value)
        try:
            with self._lock:
                if "incident" in data:
                    self._on_incident(record, data)
                else:
                    self._on_feed(data)
        except (KeyError, TypeError, ValueError, AttributeError):
            self.unreadable += 1

    def on_score(self, record: Record) -> Mapping[str, Any]:
        """Take a record of `scores`; return its value."""
        score = fields_of(record.value)
        stream = record.key
        if is_canary(stream) or is_replay(stream):
            return score
        try:
            with self._lock:
                self._on_score(stream, score, record.timestamp_us)
        except (KeyError, TypeError, ValueError, AttributeError):
            self.unreadable += 1
        return score

    def on_picture(self, record: Record) -> list[Sample]:
        """Take a record of `pictures`; return the faces of it that are drawn for review."""
        glimpse = read_glimpse(record)
        if glimpse is None:
            self.unreadable += 1
            return []
        if is_canary(glimpse.stream) or is_replay(glimpse.stream):
            return []
        try:
            with self._lock:
                row = self._rows.get(glimpse.stream)
                if row is None:
                    return []
                row.glimpse = glimpse
                row.boxes()  # what cannot be drawn must not be kept
                return list(self._draw(row, glimpse))
        except (KeyError, TypeError, ValueError, AttributeError):
            self.unreadable += 1
            with self._lock:
                self._rows[glimpse.stream].glimpse = None
            return []

    def on_decision(self, record: Record) -> None:
        """Take a record of `decisions`."""
        said = read(record)
        with self._lock:
            if isinstance(said, Decision):
                self._on_decision(said)
            elif isinstance(said, Mute):
                self._mutes[said.stream] = said
            elif isinstance(said, Sample):
                self._samples[said.id] = said
                self._waiting += said.id not in self._decided
                if len(self._samples) > MAX_SAMPLES:
                    self._samples.popitem(last=False)
            else:
                self.unreadable += 1

    def tick(self) -> None:
        """Draw the cards anew that may look different now; every second or so."""
        now_us = self._clock.now_us()
        with self._lock:
            version = self.version + 1
            changed = False
            for stream, row in list(self._rows.items()):
                if not row.listed and now_us - (row.seen_us or row.listed_us) > GONE_US:
                    self._forget(stream, version)
                    changed = True
                    continue
                card = self._card(row, now_us)
                before = self._shown.get(stream)
                if before is None or before[1] != card:
                    self._shown[stream] = (version, card)
                    changed = True
            self.version += changed
            self._waiting = sum(1 for _ in self._pending())

    # Reading

    def changes(self, since: int) -> dict[str, Any]:
        """Return the cards that changed after version `since` (0: all), the feeds that went, and sums."""
        with self._lock:
            if since > self.version or since < 0:
                since = 0
            feeds = [card for version, card in self._shown.values() if version > since]
            gone = [stream for stream, version in self._gone.items() if version > since]
            return {
                "version": self.version,
                "now_us": self._clock.now_us(),
                "whole": since == 0,
                "feeds": feeds,
                "gone": gone,
                "open": [self._incidents[name].as_json() for name in self._open.values()][:100],
                "open_total": len(self._open),
                "samples": self._waiting,
                "left_out": self.refused_feeds,
                "unreadable": self.unreadable,
                "away": self.away,
                "ready": self.ready,
            }

    def card(self, stream: str) -> dict[str, Any] | None:
        with self._lock:
            row = self._rows.get(stream)
            return None if row is None else self._card(row, self._clock.now_us())

    def feeds(self) -> list[dict[str, Any]]:
        """Return the feeds of the list, by id, with what their entries say."""
        now_us = self._clock.now_us()
        with self._lock:
            rows = [row for _, row in sorted(self._rows.items()) if row.listed]
            return [{**self._entry(row), **self._standing(row, now_us)} for row in rows]

    def listed(self, stream: str) -> FeedRow | None:
        """Return the row of a listed feed."""
        with self._lock:
            row = self._rows.get(stream)
            return row if row is not None and row.listed else None

    def live(self) -> frozenset[str]:
        """Return the feeds that should be watched all the time."""
        with self._lock:
            return frozenset(
                row.stream for row in self._rows.values() if row.listed and row.kind == "live" and row.seen_us
            )

    def glimpse(self, stream: str) -> Glimpse | None:
        with self._lock:
            row = self._rows.get(stream)
            return None if row is None else row.glimpse

    def incident(self, name: str) -> Incident | None:
        with self._lock:
            return self._incidents.get(name)

    def incidents(self, wanted: Wanted, limit: int, before: str = "") -> tuple[list[dict[str, Any]], int]:
        """Return the newest `limit` incidents wanted, older than the incident `before`, and how many there
        are in all. Ids sort by media time of opening."""
        with self._lock:
            known = list(self._incidents.values())
        found = [incident for incident in known if wanted.has(incident)]
        found.sort(key=lambda incident: incident.id, reverse=True)
        older = [incident for incident in found if not before or incident.id < before]
        return [incident.as_json() for incident in older[:limit]], len(found)

    def dismissed(self) -> list[tuple[Incident, str]]:
        """Return incidents that were dismissed and are not withdrawn yet, with the reason."""
        with self._lock:
            found = [self._incidents.get(name) for name in self._to_withdraw]
            pairs = [(one, one.decision.reason) for one in found if one and one.decision and _owed(one)]
            self._to_withdraw = {incident.id for incident, _ in pairs}
            return pairs

    def decisions(self, about: str) -> list[Decision]:
        """Return all that was decided about an incident or sample, in order."""
        with self._lock:
            return [decision for decision in self._decisions if decision.about == about]

    def sample(self, name: str) -> Sample | None:
        with self._lock:
            return self._samples.get(name)

    def samples(self) -> list[Sample]:
        """Return what waits for review, the oldest first."""
        with self._lock:
            return list(self._pending())

    def mute(self, stream: str) -> Mute | None:
        """Return the mute that holds now."""
        with self._lock:
            return self._mute(stream, self._clock.now_us())

    def record_of_decisions(self) -> dict[str, Any]:
        """Return how right alerts have been."""
        with self._lock:
            newest = list(self._decided.values())
        return {**precision(newest), "missed": missed(newest)}

    # Folding

    def _row(self, stream: str) -> FeedRow | None:
        row = self._rows.get(stream)
        if row is not None:
            return row
        if len(self._rows) >= MAX_FEEDS:
            self.refused_feeds += 1
            return None
        row = self._rows[stream] = FeedRow(stream, self._clock.now_us())
        self._gone.pop(stream, None)
        incident = self._open.get(stream)
        if incident is not None:
            self._accuse(row, self._incidents[incident])
        return row

    def _forget(self, stream: str, version: int) -> None:
        del self._rows[stream]
        self._shown.pop(stream, None)
        self._gone[stream] = version
        if len(self._gone) > MAX_GONE:
            self._gone.popitem(last=False)

    def _on_incident(self, record: Record, data: Mapping[str, Any]) -> None:
        name, stream = str(data["incident"]), str(data["stream"])
        incident = self._incidents.get(name)
        if incident is None:
            incident = Incident(name, stream, record.timestamp_us)
            incident.decision = self._decided.get(name)
            if _owed(incident):
                self._to_withdraw.add(name)
        incident.apply(
            data, (TopicPartition(record.topic, record.partition), record.offset), record.timestamp_us
        )
        self._incidents[name] = incident
        for track in incident.tracks:
            self._accused[(stream, track)] = None
            if len(self._accused) > NOTED_TRACKS:
                self._accused.popitem(last=False)
        if len(self._incidents) > MAX_INCIDENTS:
            oldest, _ = self._incidents.popitem(last=False)
            self._open = {one: held for one, held in self._open.items() if held != oldest}
        row = self._rows.get(stream)
        if incident.status == "open":
            self._open[stream] = name
            if row is not None:
                self._accuse(row, incident)
        elif self._open.get(stream) == name:
            del self._open[stream]
            if row is not None:
                row.incident, row.severity, row.accused = None, None, frozenset()

    @staticmethod
    def _accuse(row: FeedRow, incident: Incident) -> None:
        row.incident, row.severity, row.accused = incident.id, incident.severity, incident.tracks

    def _on_feed(self, data: Mapping[str, Any]) -> None:
        row = self._rows.get(str(data["stream"]))
        if row is None:
            return
        if data["event"] == "drift":
            row.drift = str(data["code"])
        else:
            row.told = Told(str(data["event"]), int(data["media_us"]), data["code"], data["sentence"])

    def _on_score(self, stream: str, score: Mapping[str, Any], written_us: int) -> None:
        row = self._rows.get(stream)
        if row is None:
            return  # unlisted: nothing that anybody asked to watch
        match score["type"]:
            case "frame":
                row.on_frame(score, written_us)
            case "verdict":
                row.on_verdict(score)
            case "dropped":
                row.on_dropped(score, written_us)

    def _on_decision(self, decision: Decision) -> None:
        self._decisions.append(decision)
        self._decided[decision.about] = decision
        if len(self._decided) > MAX_DECISIONS:
            self._decided.popitem(last=False)
        incident = self._incidents.get(decision.about)
        if decision.subject is Subject.INCIDENT and incident is not None:
            incident.decision = decision
            if _owed(incident):
                self._to_withdraw.add(incident.id)

    def _draw(self, row: FeedRow, glimpse: Glimpse) -> Iterator[Sample]:
        """Yield the faces of a picture that are drawn, each once."""
        rate, facts = self._config.web.audit_rate, glimpse.facts
        for face in facts["faces"]:
            if self._waiting >= MAX_WAITING:
                return
            key = (row.stream, str(facts["attachment"]), int(facts["epoch"]), int(face["track"]))
            if face.get("fused") is None or key in self._noted:
                continue
            self._noted[key] = None
            if len(self._noted) > NOTED_TRACKS:
                self._noted.popitem(last=False)
            name = drawn(*key, rate)
            if name is None or name in self._samples or name in self._decided:
                continue
            self._waiting += 1
            yield Sample(
                row.stream,
                name,
                *key[1:],
                media_us=int(facts["media_us"]),
                time_us=self._clock.now_us(),
                probability=rate,
                crop=_crop(glimpse, face["box"]),
                fused=face["fused"],
                logits={name: value for name, value in face["logits"].items() if value is not None},
                models=dict(facts.get("models") or {}),
                calibration=str(facts.get("calibration") or ""),
            )

    def _pending(self) -> Iterator[Sample]:
        """Yield samples that nobody decided yet and no incident accuses: those have an alert of their own."""
        for sample in self._samples.values():
            track = f"{sample.attachment}/{sample.epoch}/{sample.track}"
            if sample.id not in self._decided and (sample.stream, track) not in self._accused:
                yield sample

    def _mute(self, stream: str, now_us: int) -> Mute | None:
        mute = self._mutes.get(stream)
        return mute if mute is not None and mute.holds(now_us) else None

    # Showing

    def _card(self, row: FeedRow, now_us: int) -> dict[str, Any]:
        return {
            **self._standing(row, now_us),
            "verdict": row.verdict,
            "reasons": list(row.reasons),
            "probability": row.probability,
            "interval": row.interval,
            "lag_s": None if row.lag_s is None else round(row.lag_s, 1),
            "fps": row.sampled_fps(now_us),
            "faces": row.faces,
            "spark": row.sparkline(),
            "picture_us": row.glimpse.facts.get("media_us") if row.glimpse else None,
            "boxes": row.boxes(),
        }

    def _standing(self, row: FeedRow, now_us: int) -> dict[str, Any]:
        state, why = row.state(now_us, self._config)
        mute = self._mute(row.stream, now_us)
        return {
            "id": row.stream,
            "kind": row.kind,
            "labels": dict(row.labels),
            "state": state.value,
            "why": why,
            "rank": row.rank(state, mute is not None),
            "incident": row.incident,
            "severity": row.severity,
            "muted_until_us": mute.until_us if mute else None,
            "muted_by": mute.author if mute else None,
            "muted_why": mute.reason if mute else None,
        }

    @staticmethod
    def _entry(row: FeedRow) -> dict[str, Any]:
        return {"source": row.source, "wanted_fps": row.fps, "refused": row.refused}


def _owed(incident: Incident) -> bool:
    """Whether an incident was dismissed, and those who were told of it do not know yet."""
    decision = incident.decision
    return decision is not None and decision.choice is Choice.DISMISSED and incident.status != "retracted"


def _crop(glimpse: Glimpse, box: Sequence[float]) -> bytes:
    """Return the face at `box` (pixels of the whole picture) out of a picture, as JPEG. Raises ValueError."""
    image = cv2.imdecode(np.frombuffer(glimpse.data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("a picture cannot be decoded")
    scale = image.shape[1] / (glimpse.facts.get("width") or image.shape[1])
    x0, y0, x1, y1 = (edge * scale for edge in box)
    wide, high = MARGIN * (x1 - x0), MARGIN * (y1 - y0)
    left, top = max(0, round(x0 - wide)), max(0, round(y0 - high))
    cut = image[top : max(top + 1, round(y1 + high)), left : max(left + 1, round(x1 + wide))]
    if cut.size == 0:
        raise ValueError("a face lies outside of its picture")
    return jpeg(cv2.cvtColor(cut, cv2.COLOR_BGR2RGB), CROP_WIDTH)
