"""Incidents: at most one open per stream, an id made once, numbered events (DESIGN 3.5).

Pure state over media time. What is accused is decided in `stream.verdicts`; here it becomes the story that is
told to the outside: opened, updated, closed, retracted.
"""

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Self

from detectors.readings import Box
from stream import config
from stream.evidence import clip_window
from stream.verdicts import Judgement
from stream.windows import MICRO

MAX_TRACKS = 8
"""Tracks described in an event (DESIGN 3.6); the rest are a count."""

MAX_KNOWN = 256
"""Track keys remembered per incident to count each once; beyond, one that clears and returns counts again."""

MAX_REASON = 500
"""Characters of a reason given by a person: an event stays below 20 kB."""

BETTER = 0.02
"""The lower end of the interval must rise by this to be worth telling again as better evidence."""

IdSource = Callable[[str, int], str]
"""Makes an incident id from the stream and the media time of opening."""


def random_id(stream: str, media_us: int) -> str:
    """Return an id that sorts by time and never comes twice: 14 hex digits of media time, 10 at random."""
    return f"{max(media_us, 0):014x}{secrets.token_hex(5)}"


def derived_id(stream: str, media_us: int) -> str:
    """Return the id that the same stream always gets at the same media time (`--deterministic`)."""
    digest = hashlib.blake2b(f"{stream}\n{media_us}".encode(), digest_size=5).hexdigest()
    return f"{max(media_us, 0):014x}{digest}"


class Status(StrEnum):
    """Life of an incident. CLOSING is over but still waits for its clip."""

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"
    RETRACTED = "retracted"


TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    Status.OPEN: frozenset({Status.CLOSING, Status.CLOSED, Status.RETRACTED}),
    Status.CLOSING: frozenset({Status.CLOSED, Status.RETRACTED}),
    Status.CLOSED: frozenset({Status.RETRACTED}),
    Status.RETRACTED: frozenset(),
}


class EventKind(StrEnum):
    """What is told of an incident."""

    OPENED = "opened"
    UPDATED = "updated"
    CLOSED = "closed"
    RETRACTED = "retracted"


class Change(StrEnum):
    """Why an `updated` was sent."""

    ESCALATION = "escalation"
    TRACK = "track"
    EVIDENCE = "evidence"
    CLIP = "clip"


class Severity(StrEnum):
    """How much speaks for the incident; it only rises.

    LOW: only the faces of the stream taken together look manipulated, none long enough by itself.
    MEDIUM: a face by itself does. HIGH: even the lower end of its interval reaches `open_probability`.
    """

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


class CloseReason(StrEnum):
    """Why an incident is over. The stop of a worker is none of them."""

    CLEARED = "cleared"
    ABSENT = "absent"
    ENDED = "ended"
    STOPPED = "stopped"


class Clip(StrEnum):
    """Where the clip of an incident stands."""

    WAITING = "waiting"
    ASKED = "asked"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Moment:
    """When and where in the stream something is said.

    `capture_us` is the receipt (UTC) of what led to it, None where latency means nothing (files).
    """

    media_us: int
    attachment: str
    epoch: int
    capture_us: int | None
    engine: str = ""
    precision: str = ""


@dataclass(frozen=True, slots=True)
class TrackView:
    """A track as an event tells of it; `box` is its last, in pixels of the full picture."""

    attachment: str
    epoch: int
    track: int
    box: Box
    first_us: int
    last_us: int
    probability: float | None
    lower: float
    samples: int

    @property
    def key(self) -> str:
        return f"{self.attachment}/{self.epoch}/{self.track}"


@dataclass(frozen=True, slots=True)
class Crop:
    """A face picture kept as evidence, and the same with the attention map over it. `score` ranks them."""

    track: str
    media_us: int
    score: float
    crop: str
    overlay: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What is accused at a moment.

    `judgement` is that of the worst accused face (None: nothing is accused), `tracks` the accused ones (empty
    when only the stream as a whole is). `fresh`: this moment brought evidence for it, rather than none
    against it. `lost`: an accused face has just gone, without having been cleared.
    """

    judgement: Judgement | None = None
    tracks: tuple[TrackView, ...] = ()
    fresh: bool = False
    lost: bool = False
    onset_us: int | None = None
    crops: tuple[Crop, ...] = ()


@dataclass(frozen=True, slots=True)
class IncidentEvent:
    """One event of an incident; `<incident>.<number>` is its id, numbers begin at 1 and have no gaps."""

    stream: str
    incident: str
    number: int
    kind: EventKind
    moment: Moment
    severity: Severity
    judgement: Judgement
    first_us: int
    last_us: int
    peak_us: int
    tracks: tuple[TrackView, ...]
    tracks_total: int
    crops: tuple[Crop, ...]
    clip: str | None
    changes: tuple[Change, ...] = ()
    reason: str | None = None
    clip_begins_us: int | None = None
    """Media time of the clip's first picture, where a player stands at 0."""


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """Asks the worker for the clip [first_us, last_us] of one epoch, to be answered with `on_clip`.

    The media lies in records `from_offset` (None: nothing is known to be there) up to `to_offset`, exclusive,
    of the stream's partition; the first of them begins at media time `from_us`.
    """

    stream: str
    incident: str
    attachment: str
    epoch: int
    first_us: int
    last_us: int
    peak_us: int
    from_offset: int | None = None
    from_us: int | None = None
    to_offset: int = 0


Told = IncidentEvent | ClipRequest


@dataclass(slots=True)
class _Incident:
    """Everything known of the newest incident of a stream. Serialisable whole."""

    id: str
    status: Status
    number: int
    opened_us: int
    first_us: int
    last_us: int
    peak_us: int
    attachment: str
    epoch: int
    severity: Severity
    judgement: Judgement
    told_us: int
    told_lower: float
    tracks: dict[str, TrackView] = field(default_factory=dict)
    known: list[str] = field(default_factory=list)
    tracks_total: int = 0
    crops: list[Crop] = field(default_factory=list)
    clip: Clip = Clip.WAITING
    clip_ref: str | None = None
    clip_first_us: int = 0
    clip_last_us: int = 0
    absent_us: int | None = None
    pending: list[Change] = field(default_factory=list)
    close_reason: CloseReason | None = None

    def go(self, status: Status) -> None:
        if status not in TRANSITIONS[self.status]:
            raise AssertionError(f"incident {self.id} cannot go from {self.status} to {status}")
        self.status = status

    def note(self, change: Change) -> None:
        if change not in self.pending:
            self.pending.append(change)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        reason = fields["close_reason"]
        return cls(
            **{
                **fields,
                "status": Status(fields["status"]),
                "severity": Severity(fields["severity"]),
                "judgement": Judgement.from_json(fields["judgement"]),
                "tracks": {key: view_from_json(view) for key, view in fields["tracks"].items()},
                "known": list(fields["known"]),
                "crops": [Crop(**crop) for crop in fields["crops"]],
                "clip": Clip(fields["clip"]),
                "pending": [Change(change) for change in fields["pending"]],
                "close_reason": CloseReason(reason) if reason else None,
            }
        )


class Incidents:
    """The incidents of one stream, of which only the newest is remembered."""

    def __init__(
        self,
        stream: str,
        verdict: config.Verdict,
        incidents: config.Incidents,
        evidence: config.Evidence,
        new_id: IdSource,
    ) -> None:
        self._stream = stream
        self._open_probability = verdict.open_probability
        self._grace_us = round(incidents.epoch_grace_s * MICRO)
        self._update_us = round(incidents.update_every_s * MICRO)
        self._post_roll_us = round(evidence.post_roll_s * MICRO)
        self._evidence = evidence
        self._new_id = new_id
        self._newest: _Incident | None = None

    @property
    def open(self) -> str | None:
        """The id of the incident that is not over, None if there is none."""
        incident = self._live()
        return incident.id if incident else None

    @property
    def ongoing(self) -> bool:
        """Whether there is an incident that has not come to its end."""
        return self._newest is not None and self._newest.status is Status.OPEN

    @property
    def severity(self) -> Severity | None:
        """How severe the open incident is."""
        incident = self._live()
        return incident.severity if incident else None

    def references(self) -> frozenset[str]:
        """Return the evidence that the open incident names, to be pinned: that of others may expire."""
        incident = self._live()
        if incident is None:
            return frozenset()
        refs = {ref for crop in incident.crops for ref in (crop.crop, crop.overlay)}
        return frozenset(refs | ({incident.clip_ref} if incident.clip_ref else set()))

    def observe(self, moment: Moment, finding: Finding) -> list[Told]:
        """Apply what is accused at `moment` and return what is to be told, in order.

        A request for the clip comes last: its answer may be an event, and numbers must not be overtaken.
        """
        incident = self._live()
        if incident is None:
            return self._open(moment, finding) if finding.judgement and finding.fresh else []
        if incident.status is Status.CLOSING:
            return []
        if finding.lost:
            incident.absent_us = incident.last_us
        if finding.judgement and finding.fresh:
            self._support(incident, moment, finding, finding.judgement)
        reason = self._over(incident, moment, finding)
        if reason:
            return self._close(incident, moment, reason)
        return [*self._flush(incident, moment), *self._ask_clip(incident, moment)]

    def close(self, moment: Moment, reason: CloseReason) -> list[Told]:
        """Close the open incident, if any: the feed ended, or `watch` stops."""
        incident = self._live()
        if incident is None or incident.status is Status.CLOSING:
            return []
        return self._close(incident, moment, reason)

    def on_clip(
        self, moment: Moment, incident_id: str, ref: str | None, begins_us: int | None = None
    ) -> list[Told]:
        """Take the answer to a `ClipRequest`: a reference, or None if nothing could be cut; `begins_us`:
        media time of its first picture.

        An answer for another incident than the one that asked is ignored.
        """
        incident = self._newest
        if incident is None or incident.id != incident_id or incident.clip is not Clip.ASKED:
            return []
        incident.clip = Clip.DONE if ref else Clip.FAILED
        incident.clip_ref = ref
        incident.clip_first_us = incident.clip_first_us if begins_us is None else begins_us
        told: list[Told] = []
        if ref and incident.status in (Status.OPEN, Status.CLOSING):
            incident.note(Change.CLIP)
            told += self._flush(incident, moment)
        if incident.status is Status.CLOSING:
            told.append(self._closed(incident, moment))
        return told

    def retract(self, moment: Moment, incident_id: str, reason: str) -> list[Told]:
        """Withdraw the newest incident, open or closed; another id, or twice, changes nothing.

        Raises `ValueError` if `reason` is empty: whoever was told of it is owed one.
        """
        if not reason.strip():
            raise ValueError("reason is empty; say in a sentence why the incident is withdrawn")
        incident = self._newest
        if incident is None or incident.id != incident_id or incident.status is Status.RETRACTED:
            return []
        incident.go(Status.RETRACTED)
        return [self._event(incident, moment, EventKind.RETRACTED, reason=reason[:MAX_REASON])]

    def due_clip(self) -> ClipRequest | None:
        """Return the request that is asked and not answered yet, to be asked again after a restart."""
        incident = self._newest
        if incident is None or incident.clip is not Clip.ASKED:
            return None
        return ClipRequest(
            self._stream,
            incident.id,
            incident.attachment,
            incident.epoch,
            incident.clip_first_us,
            incident.clip_last_us,
            incident.peak_us,
        )

    def state(self) -> dict[str, Any] | None:
        return self._newest.as_json() if self._newest else None

    def restore(self, fields: Mapping[str, Any] | None) -> None:
        self._newest = _Incident.from_json(fields) if fields else None

    def _live(self) -> _Incident | None:
        if self._newest and self._newest.status in (Status.OPEN, Status.CLOSING):
            return self._newest
        return None

    def _open(self, moment: Moment, finding: Finding) -> list[Told]:
        assert finding.judgement is not None
        incident = _Incident(
            id=self._new_id(self._stream, moment.media_us),
            status=Status.OPEN,
            number=0,
            opened_us=moment.media_us,
            first_us=moment.media_us if finding.onset_us is None else finding.onset_us,
            last_us=moment.media_us,
            peak_us=moment.media_us,
            attachment=moment.attachment,
            epoch=moment.epoch,
            severity=self._severity(finding, finding.judgement),
            judgement=finding.judgement,
            told_us=moment.media_us,
            told_lower=finding.judgement.lower,
        )
        self._newest = incident
        self._merge(incident, finding)
        incident.pending.clear()
        return [self._event(incident, moment, EventKind.OPENED)]

    def _support(self, incident: _Incident, moment: Moment, finding: Finding, judgement: Judgement) -> None:
        incident.last_us = moment.media_us
        if judgement.lower > incident.judgement.lower:
            incident.judgement = judgement
            if incident.clip is Clip.WAITING:
                incident.peak_us = moment.media_us
                incident.attachment, incident.epoch = moment.attachment, moment.epoch
        if judgement.lower >= incident.told_lower + BETTER:
            incident.note(Change.EVIDENCE)
        severity = self._severity(finding, judgement)
        if list(Severity).index(severity) > list(Severity).index(incident.severity):
            incident.severity = severity
            incident.note(Change.ESCALATION)
        self._merge(incident, finding)

    def _merge(self, incident: _Incident, finding: Finding) -> None:
        for view in finding.tracks:
            if view.key not in incident.known:
                incident.known = [*incident.known[-MAX_KNOWN + 1 :], view.key]
                incident.tracks_total += 1
                incident.absent_us = None
                incident.note(Change.TRACK)
            incident.tracks[view.key] = view
        ranked = sorted(incident.tracks.values(), key=lambda view: view.lower, reverse=True)
        incident.tracks = {view.key: view for view in ranked[:MAX_TRACKS]}
        best = best_crops([*incident.crops, *finding.crops], self._evidence.crops)
        if best != incident.crops:
            incident.crops = best
            incident.note(Change.EVIDENCE)

    def _severity(self, finding: Finding, judgement: Judgement) -> Severity:
        if not finding.tracks:
            return Severity.LOW
        return Severity.HIGH if judgement.lower >= self._open_probability else Severity.MEDIUM

    def _over(self, incident: _Incident, moment: Moment, finding: Finding) -> CloseReason | None:
        quiet_us = moment.media_us - incident.last_us
        if finding.judgement or incident.absent_us is not None:
            return CloseReason.ABSENT if quiet_us >= self._grace_us else None
        return CloseReason.CLEARED

    def _close(self, incident: _Incident, moment: Moment, reason: CloseReason) -> list[Told]:
        incident.close_reason = reason
        asked = self._ask_clip(incident, moment, now=True)
        if incident.clip is Clip.ASKED:
            incident.go(Status.CLOSING)
            return asked
        return [self._closed(incident, moment)]

    def _closed(self, incident: _Incident, moment: Moment) -> IncidentEvent:
        incident.go(Status.CLOSED)
        assert incident.close_reason is not None
        return self._event(incident, moment, EventKind.CLOSED, reason=incident.close_reason.value)

    def _ask_clip(self, incident: _Incident, moment: Moment, now: bool = False) -> list[Told]:
        rolled = moment.media_us >= incident.opened_us + self._post_roll_us
        if incident.clip is not Clip.WAITING or not (rolled or now):
            return []
        incident.clip = Clip.ASKED
        incident.clip_first_us, incident.clip_last_us = clip_window(
            incident.first_us, incident.peak_us, moment.media_us, self._evidence
        )
        request = self.due_clip()
        return [request] if request else []

    def _flush(self, incident: _Incident, moment: Moment) -> list[Told]:
        urgent = Change.ESCALATION in incident.pending or Change.CLIP in incident.pending
        due = moment.media_us - incident.told_us >= self._update_us
        if not incident.pending or not (urgent or due):
            return []
        changes = tuple(change for change in Change if change in incident.pending)
        return [self._event(incident, moment, EventKind.UPDATED, changes=changes)]

    def _event(
        self,
        incident: _Incident,
        moment: Moment,
        kind: EventKind,
        changes: tuple[Change, ...] = (),
        reason: str | None = None,
    ) -> IncidentEvent:
        incident.number += 1
        incident.told_us = moment.media_us
        incident.told_lower = incident.judgement.lower
        incident.pending.clear()
        return IncidentEvent(
            stream=self._stream,
            incident=incident.id,
            number=incident.number,
            kind=kind,
            moment=moment,
            severity=incident.severity,
            judgement=incident.judgement,
            first_us=incident.first_us,
            last_us=incident.last_us,
            peak_us=incident.peak_us,
            tracks=tuple(incident.tracks.values()),
            tracks_total=incident.tracks_total,
            crops=tuple(incident.crops),
            clip=incident.clip_ref,
            changes=changes,
            reason=reason,
            clip_begins_us=incident.clip_first_us if incident.clip_ref else None,
        )


def best_crops(crops: Sequence[Crop], limit: int) -> list[Crop]:
    """Return the `limit` best different pictures, best first."""
    unique = {crop.crop: crop for crop in crops}
    return sorted(unique.values(), key=lambda crop: (-crop.score, crop.media_us))[:limit]


def view_from_json(fields: Mapping[str, Any]) -> TrackView:
    x0, y0, x1, y1 = fields["box"]
    return TrackView(**{**fields, "box": (x0, y0, x1, y1)})
