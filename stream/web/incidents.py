"""Incidents as their events told of them, folded into one line each (DESIGN 3.5, 3.6)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stream.decisions import Choice, Decision, Subject
from stream.log import TopicPartition
from stream.windows import MICRO

OVER = ("closed", "retracted")


@dataclass(slots=True)
class Incident:
    """One incident. `places` are where its events lie in the alerts topic; `from_us`, `to_us` when the first
    and the newest of them were written (UTC microseconds), other times are media time."""

    id: str
    stream: str
    from_us: int
    to_us: int = 0
    number: int = 0
    places: list[tuple[TopicPartition, int]] = field(default_factory=list)
    status: str = "open"
    reason: str | None = None
    severity: str = "low"
    verdict: str = "manipulated"
    probability: float | None = None
    interval: tuple[float, float] | None = None
    first_us: int = 0
    last_us: int = 0
    peak_us: int = 0
    suggested_action: str = "none"
    replay: bool = False
    tracks_total: int = 0
    tracks: frozenset[str] = frozenset()
    picture: str | None = None
    """Reference of the best crop."""
    members: Mapping[str, float] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    calibration: str = ""
    llr: float | None = None
    decision: Decision | None = None
    """The newest one; earlier ones stand in the topic."""

    def apply(self, data: Mapping[str, Any], place: tuple[TopicPartition, int], written_us: int) -> None:
        """Take one of its events. Those that came already are passed over."""
        if data["number"] <= self.number:
            return
        self.number, self.to_us = data["number"], written_us
        self.places.append(place)
        event = data["event"]
        self.status = event if event in OVER else "open"
        self.reason = data.get("reason", self.reason)
        self.severity, self.verdict = data["severity"], data["verdict"]
        self.probability = data["probability"]
        self.interval = tuple(data["interval"]) if data["interval"] else None
        self.first_us, self.last_us = data["first_media_us"], data["last_media_us"]
        self.peak_us = data["peak_media_us"]
        self.suggested_action, self.replay = data["suggested_action"], data["replay"]
        self.tracks_total = data["tracks_total"]
        self.tracks = frozenset(
            f"{one['attachment']}/{one['epoch']}/{one['track']}" for one in data["tracks"]
        )
        crops = [item["ref"] for item in data["evidence"] if item["kind"] == "crop"]
        self.picture = crops[0] if crops else self.picture
        self.members = {name: value for name, value in data["members"].items() if value is not None}
        self.models = {one["name"]: f"{one['version']}+{one['sha256'][:12]}" for one in data["models"]}
        self.calibration, self.llr = data["calibration_version"], data["llr"]

    def as_json(self) -> dict[str, Any]:
        """Return the incident as a line of the history."""
        decision = self.decision
        return {
            "id": self.id,
            "stream": self.stream,
            "status": self.status,
            "severity": self.severity,
            "verdict": self.verdict,
            "probability": self.probability,
            "interval": self.interval,
            "first_us": self.first_us,
            "last_us": self.last_us,
            "peak_us": self.peak_us,
            "duration_s": round((self.last_us - self.first_us) / MICRO, 3),
            "suggested_action": self.suggested_action,
            "reason": self.reason,
            "replay": self.replay,
            "tracks_total": self.tracks_total,
            "picture": self.picture.removeprefix("evidence://") if self.picture else None,
            "models": dict(self.models),
            "calibration": self.calibration,
            "decision": decision.choice.value if decision else None,
            "decision_reason": decision.reason if decision else None,
            "decided_by": decision.author if decision else None,
            "decided_us": decision.time_us if decision else None,
        }

    def text(self) -> str:
        """Return what a search looks through."""
        decision = self.decision
        parts = [self.id, self.stream, self.status, self.severity, self.verdict, self.reason, *self.models]
        parts += [decision.choice, decision.reason, decision.author] if decision else []
        return " ".join(part for part in parts if part).lower()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to list; None means all. Times are UTC microseconds of media time."""

    stream: str | None = None
    status: str | None = None
    severity: str | None = None
    verdict: str | None = None
    decision: str | None = None
    """One of `Choice`, or `none`: nobody has decided yet."""
    from_us: int | None = None
    to_us: int | None = None
    text: str = ""

    def has(self, incident: Incident) -> bool:
        decided = incident.decision.choice.value if incident.decision else "none"
        pairs = (
            (self.stream, incident.stream),
            (self.status, incident.status),
            (self.severity, incident.severity),
            (self.verdict, incident.verdict),
            (self.decision, decided),
        )
        if any(wanted is not None and wanted != found for wanted, found in pairs):
            return False
        if self.from_us is not None and incident.last_us < self.from_us:
            return False
        if self.to_us is not None and incident.first_us >= self.to_us:
            return False
        return all(word in incident.text() for word in self.text.lower().split())


def decision_of(incident: Incident, choice: Choice, reason: str, author: str, now_us: int) -> Decision:
    """Return the decision of a person, with what the networks had said."""
    return Decision(
        incident.stream,
        Subject.INCIDENT,
        incident.id,
        choice,
        reason,
        author,
        now_us,
        severity=incident.severity,
        llr=incident.llr,
        logits=dict(incident.members),
        models=dict(incident.models),
        calibration=incident.calibration,
    )


FIELDS: Sequence[str] = (
    "id",
    "stream",
    "status",
    "severity",
    "verdict",
    "probability",
    "first_us",
    "last_us",
    "peak_us",
    "duration_s",
    "suggested_action",
    "reason",
    "replay",
    "tracks_total",
    "calibration",
    "decision",
    "decision_reason",
    "decided_by",
    "decided_us",
)
"""Columns of the CSV."""
