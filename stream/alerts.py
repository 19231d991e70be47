"""Alerts as CloudEvents 1.0 (DESIGN 3.6).

Binary mode for the log, one structured JSON line for `watch --json`. The body is described by
`alert.schema.json`. Nothing is decided here; what is said was decided before.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from stream import config
from stream.clock import Clock
from stream.drift import Shift
from stream.feeds import DRIFT, FeedEvent
from stream.incidents import Crop, EventKind, IncidentEvent, Moment, Severity, TrackView
from stream.records import SCHEMA, OutRecord, Record, Topic, is_replay
from stream.scores import (
    DroppedRecord,
    ScoreRecord,
    VerdictRecord,
    box_json,
    cues_json,
    interval_json,
    numbers_json,
    reasons_json,
    rounded,
)
from stream.verdicts import Judgement, Verdict
from stream.windows import MICRO

if TYPE_CHECKING:
    from detectors.calibration import Calibration, Disagreement, FalseAlarms
    from detectors.members import Member

MAX_BODY = 20_000
"""Bytes of an event's body: well below what brokers, queues and webhook receivers take."""

MAX_SENTENCE = 500
"""Characters of a sentence from elsewhere: keeps the body below its bound."""

DATA_SCHEMA = f"urn:unmask:schema:alert:{SCHEMA}"
"""`$id` of alert.schema.json."""

ACTIONS = ("none", "review", "block")
"""Suggested actions, weakest first."""


@dataclass(frozen=True, slots=True)
class Model:
    """A member as records name it. `sha256` is that of its weights."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """What the scores come from: members, what they were tested on, and the calibration behind them.

    `calibration` is none, shipped or own; `prior` the share of manipulated material that its probabilities
    suppose, `cllr` the cost of its likelihood ratios on people it was not fitted on (bits: 0 perfect, 1
    worthless), `bound` what is claimed of its false alarms, `disagreement` how members may contradict each
    other. `shadows` are recorded, and what is said does not come from them.
    """

    models: tuple[Model, ...]
    tested_for: tuple[str, ...]
    not_tested_for: tuple[str, ...]
    calibration: str
    calibration_version: str
    prior: float
    shadows: tuple[Model, ...] = ()
    cllr: float | None = None
    bound: "FalseAlarms | None" = None
    disagreement: "Disagreement | None" = None

    @property
    def versions(self) -> dict[str, str]:
        """Name to version and the begin of the weights' hash, of the models behind what is said."""
        return _versions(self.models)

    @property
    def recorded(self) -> dict[str, str]:
        """The same with shadows, as score records carry it."""
        return _versions(self.models + self.shadows)

    def under(self, calibration: "Calibration") -> Self:
        """Return the same models with another calibration behind what they say: the user's own."""
        return replace(
            self,
            calibration=calibration.kind.value,
            calibration_version=calibration.sha256[:12],
            prior=calibration.prevalence,
            cllr=calibration.cllr,
            bound=calibration.bound,
            disagreement=calibration.disagreement,
        )


def _versions(models: Sequence[Model]) -> dict[str, str]:
    return {model.name: f"{model.version}+{model.sha256[:12]}" for model in models}


def provenance_of(
    members: Sequence["Member"], calibration: "Calibration", shadows: Sequence["Member"] = ()
) -> Provenance:
    """Return what events say of these members (at least one) under `calibration`.

    What was tested is what the calibration says, which knows how the members did together; one that does not
    say leaves it to the members, of which some must have been tested for it.
    """
    alone = (name for member in members for name in member.record.get("tested_for", ()))
    tested = dict.fromkeys(calibration.tested_for or alone)
    untested = dict.fromkeys(name for member in members for name in member.record.get("not_tested_for", ()))
    bare = Provenance(
        models=_models(members),
        tested_for=tuple(tested),
        not_tested_for=tuple(name for name in untested if name not in tested),
        calibration="",
        calibration_version="",
        prior=calibration.prevalence,
        shadows=_models(shadows),
    )
    return bare.under(calibration)


def _models(members: Sequence["Member"]) -> tuple[Model, ...]:
    return tuple(Model(member.name, member.version, member.sha256) for member in members)


@dataclass(frozen=True, slots=True)
class CloudEvent:
    """Context attributes (all text, extensions among them) and the body."""

    attributes: Mapping[str, str]
    data: Mapping[str, Any]

    def body(self) -> bytes:
        """Return the data as JSON."""
        return _json(self.data)

    def headers(self) -> dict[str, bytes]:
        """Return the attributes as the headers of the Kafka protocol binding's binary mode."""
        headers = {f"ce_{name}": text.encode() for name, text in self.attributes.items()}
        return {"schema": str(SCHEMA).encode(), "content-type": b"application/json", **headers}

    def structured(self) -> dict[str, Any]:
        """Return the event as one JSON object (`application/cloudevents+json`)."""
        return {**self.attributes, "datacontenttype": "application/json", "data": dict(self.data)}

    def line(self) -> str:
        """Return the event as one line of JSON, without a line end."""
        return _json(self.structured()).decode()


Telling = IncidentEvent | FeedEvent
Output = ScoreRecord | DroppedRecord | VerdictRecord | IncidentEvent | FeedEvent


class Publisher:
    """Turns what aggregates say into records for the `scores` and `alerts` topics."""

    def __init__(self, settings: config.Config, provenance: Provenance, clock: Clock) -> None:
        self._prefix = settings.prefix
        self._incidents = settings.incidents
        self._level = settings.verdict.level
        self._provenance = provenance
        self._clock = clock

    def record(self, output: Output, traceparent: str | None = None) -> OutRecord:
        """Return `output` as the record that tells it, keyed by stream."""
        if isinstance(output, IncidentEvent | FeedEvent):
            return self.alert(output.stream, self.event(output, traceparent))
        return OutRecord(
            topic=f"{self._prefix}.{Topic.SCORES.value}",
            key=output.stream,
            value=_json(output.as_json()),
            headers={"schema": str(SCHEMA).encode(), "content-type": b"application/json"},
            timestamp_us=self._clock.now_us(),
        )

    def alert(self, stream: str, event: CloudEvent) -> OutRecord:
        """Return an event as a record of the `alerts` topic."""
        return OutRecord(
            topic=f"{self._prefix}.{Topic.ALERTS.value}",
            key=stream,
            value=event.body(),
            headers=event.headers(),
            timestamp_us=self._clock.now_us(),
        )

    def event(self, output: Telling, traceparent: str | None = None) -> CloudEvent:
        """Return an incident's or feed's event as a CloudEvent; `traceparent` (W3C) when there is a trace."""
        if isinstance(output, IncidentEvent):
            return self._incident(output, traceparent)
        return self._feed(output, traceparent)

    def _incident(self, event: IncidentEvent, traceparent: str | None) -> CloudEvent:
        evidence = [*_pictures(event.crops), *_clip(event)]
        attributes = {
            **self._common(event.stream, event.moment, traceparent),
            "id": f"{event.incident}.{event.number}",
            "type": f"unmask.incident.{event.kind.value}.v1",
            "severity": event.severity.value,
            "sequence": _sequence(event.number),
        }
        dataref = event.clip or (evidence[0]["ref"] if evidence else None)
        if dataref:
            attributes["dataref"] = dataref
        return CloudEvent(attributes, shortened(self._incident_data(event, evidence)))

    def _incident_data(self, event: IncidentEvent, evidence: list[dict[str, Any]]) -> dict[str, Any]:
        judgement = event.judgement
        retracted = event.kind is EventKind.RETRACTED
        return {
            "schema": SCHEMA,
            "stream": event.stream,
            "incident": event.incident,
            "number": event.number,
            "event": event.kind.value,
            "replay": is_replay(event.stream),
            "verdict": (Verdict.INCONCLUSIVE if retracted else Verdict.MANIPULATED).value,
            "reasons": reasons_json(judgement.reasons),
            "probability": rounded(judgement.probability),
            "interval": interval_json(judgement),
            "level": self._level,
            "logit": rounded(judgement.logit),
            "llr": rounded(judgement.llr),
            "prior": self._provenance.prior,
            "prevalence": self._incidents.prevalence,
            "expected_precision": rounded(expected_precision(judgement.llr, self._incidents.prevalence)),
            "conformal_set": judgement.conformal.value if judgement.conformal else None,
            "cllr": rounded(self._provenance.cllr),
            "members": numbers_json(judgement.members or {}),
            "disagreement": self._disagreement(judgement),
            **cues_json(judgement.cues),
            "tested_for": list(self._provenance.tested_for),
            "not_tested_for": list(self._provenance.not_tested_for),
            "calibration": self._provenance.calibration,
            "calibration_version": self._provenance.calibration_version,
            "false_alarms": _bound(self._provenance.bound),
            "severity": event.severity.value,
            "suggested_action": "none" if retracted else self._action(event),
            "first_media_us": event.first_us,
            "last_media_us": event.last_us,
            "peak_media_us": event.peak_us,
            "first_media_time": iso(event.first_us),
            "last_media_time": iso(event.last_us),
            "latency_s": self._latency_s(event.moment),
            "samples": judgement.samples,
            "effective_samples": rounded(judgement.n_eff),
            "tracks": [_track(view) for view in event.tracks],
            "tracks_total": event.tracks_total,
            "models": [
                {"name": model.name, "version": model.version, "sha256": model.sha256}
                for model in self._provenance.models
            ],
            "engine": event.moment.engine,
            "precision": event.moment.precision,
            "evidence": evidence,
            **_told(event),
        }

    def _disagreement(self, judgement: Judgement) -> dict[str, Any] | None:
        limits = self._provenance.disagreement
        if limits is None or judgement.disagreement is None:
            return None
        return {
            "contradiction": rounded(judgement.disagreement),
            "limit": rounded(limits.limit),
            "log_odds": numbers_json(limits.scaled(judgement.members or {})),
        }

    def _feed(self, event: FeedEvent, traceparent: str | None) -> CloudEvent:
        attributes = {
            **self._common(event.stream, event.moment, traceparent),
            "id": f"{event.stream}.{event.moment.attachment}.{event.number}.{event.kind}",
            "type": f"unmask.feed.{event.kind}.v1",
            "severity": "low" if event.kind in ("up", DRIFT) else "medium",
            "sequence": _sequence(event.number),
        }
        data = {
            "schema": SCHEMA,
            "stream": event.stream,
            "event": event.kind,
            "media_us": event.moment.media_us,
            "media_time": iso(event.moment.media_us),
            "code": event.code,
            "sentence": event.sentence[:MAX_SENTENCE] if event.sentence else None,
            "latency_s": self._latency_s(event.moment),
        }
        if event.kind == DRIFT:
            data["shifts"] = [_shift(shift) for shift in event.shifts]
        return CloudEvent(attributes, data)

    def _common(self, stream: str, moment: Moment, traceparent: str | None) -> dict[str, str]:
        attributes = {
            "specversion": "1.0",
            "source": f"/unmask/{self._prefix}",
            "subject": stream,
            "time": iso(moment.media_us),
            "dataschema": DATA_SCHEMA,
            "partitionkey": stream,
        }
        return attributes | ({"traceparent": traceparent} if traceparent else {})

    def _action(self, event: IncidentEvent) -> str:
        # What is replayed is past: there is nothing left to block.
        grave = event.severity is Severity.HIGH and not is_replay(event.stream)
        wanted = "block" if grave else "review"
        cap = self._incidents.suggested_action
        return ACTIONS[min(ACTIONS.index(wanted), ACTIONS.index(cap))]

    def _latency_s(self, moment: Moment) -> float | None:
        if moment.capture_us is None:
            return None
        return round(max(0.0, (self._clock.now_us() - moment.capture_us) / MICRO), 3)


def expected_precision(llr: float | None, prevalence: float) -> float | None:
    """Return the share of such findings that are right where `prevalence` of all streams are manipulated.

    Bayes' rule in log odds: the calibrated likelihood ratio over the configured prior. Good where the
    calibration's data resemble the stream's, no further.
    """
    if llr is None:
        return None
    log_odds = llr + math.log(prevalence / (1.0 - prevalence))
    if log_odds < 0:
        return math.exp(log_odds) / (1.0 + math.exp(log_odds))
    return 1.0 / (1.0 + math.exp(-log_odds))


def iso(us: int) -> str:
    """Return UTC microseconds as RFC 3339 text."""
    return (
        datetime.fromtimestamp(us // MICRO, UTC)
        .replace(microsecond=us % MICRO)
        .strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    )


def _told(event: IncidentEvent) -> dict[str, Any]:
    """What only some kinds of event say."""
    if event.kind is EventKind.UPDATED:
        return {"changes": [change.value for change in event.changes]}
    if event.kind is EventKind.CLOSED:
        duration_s = round((event.last_us - event.first_us) / MICRO, 3)
        totals = {"duration_s": duration_s, "tracks": event.tracks_total, "events": event.number}
        return {"reason": event.reason, "totals": totals}
    if event.kind is EventKind.RETRACTED:
        return {"reason": event.reason}
    return {}


def _bound(bound: "FalseAlarms | None") -> dict[str, Any] | None:
    if bound is None:
        return None
    return {"per_hour": rounded(bound.per_hour), "hours": rounded(bound.hours), "people": bound.people}


def _shift(shift: Shift) -> dict[str, Any]:
    return {
        "part": shift.part,
        "psi": rounded(shift.psi),
        "median": rounded(shift.median),
        "reference_median": rounded(shift.reference_median),
    }


def _track(view: TrackView) -> dict[str, Any]:
    return {
        "attachment": view.attachment,
        "epoch": view.epoch,
        "track": view.track,
        "box": box_json(view.box),
        "first_media_us": view.first_us,
        "last_media_us": view.last_us,
        "probability": rounded(view.probability),
        "lower": rounded(view.lower),
        "samples": view.samples,
    }


def _pictures(crops: tuple[Crop, ...]) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "ref": ref, "media_us": crop.media_us, "track": crop.track}
        for crop in crops
        for kind, ref in (("crop", crop.crop), ("overlay", crop.overlay))
    ]


def _clip(event: IncidentEvent) -> list[dict[str, Any]]:
    if event.clip is None:
        return []
    return [{"kind": "clip", "ref": event.clip, "media_us": event.clip_begins_us, "track": None}]


def shortened(data: Mapping[str, Any], limit: int = MAX_BODY) -> dict[str, Any]:
    """Return an event's data with lists cut, the least important first, until it has below `limit` bytes.

    With the shipped settings nothing is ever cut; long lists in a member's metadata could make it so.
    """
    cut = dict(data)
    for name in ("tracks", "not_tested_for", "tested_for", "evidence"):
        while cut.get(name) and len(_json(cut)) >= limit:
            cut[name] = cut[name][1:] if name == "evidence" else cut[name][:-1]
    return cut


def event_of(record: Record) -> CloudEvent:
    """Return the event that a record of the `alerts` topic holds. Raises ValueError if it holds none."""
    attributes = {
        name.removeprefix("ce_"): value.decode()
        for name, value in record.headers.items()
        if name.startswith("ce_")
    }
    return CloudEvent(attributes, json.loads(record.value or b"null"))


def _sequence(number: int) -> str:
    """Return a number as text that sorts as the number does (CloudEvents' sequence extension)."""
    return f"{number:010d}"


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
