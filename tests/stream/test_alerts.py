"""Every event that can be told fits the schema, and says no more than it knows."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import stream
from detectors.calibration import (
    Calibration,
    CalibrationKind,
    ConformalSet,
    Disagreement,
    FalseAlarms,
    Scale,
)
from detectors.readings import Reason
from stream.alerts import (
    MAX_BODY,
    CloudEvent,
    Model,
    Provenance,
    Publisher,
    expected_precision,
    iso,
    provenance_of,
)
from stream.clock import FakeClock
from stream.config import Config, Incidents
from stream.drift import Shift, Standing, Turn
from stream.feeds import FeedEvent, FeedState
from stream.incidents import Change, Crop, EventKind, IncidentEvent, Moment, Severity, TrackView
from stream.verdicts import Judgement, Verdict
from tests.stream.story import PROVENANCE

US = 1_700_000_000_000_000
FOLDER = Path(stream.__file__).parent
ALERT = Draft202012Validator(json.loads((FOLDER / "alert.schema.json").read_text()))
TRACE = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"


def publisher(provenance: Provenance = PROVENANCE, **incidents: Any) -> Publisher:
    return Publisher(Config(incidents=Incidents(**incidents)), provenance, FakeClock(US + 1_500_000))


def incident(kind: EventKind, number: int = 2, **more: Any) -> IncidentEvent:
    reason = {EventKind.CLOSED: "cleared", EventKind.RETRACTED: "a poster"}.get(kind)
    event = IncidentEvent(
        stream="studio",
        incident="0600a1b2c3d4e5f60718293a",
        number=1 if kind is EventKind.OPENED else number,
        kind=kind,
        moment=Moment(US, "0" * 15 + "1", 0, US, "eager", "fp32"),
        severity=Severity.MEDIUM,
        judgement=Judgement(
            Verdict.MANIPULATED, (), True, 0.97, (0.81, 0.999), 3.4, 3.4, {"m": 3.4}, 20, 20, 5.1
        ),
        first_us=US - 4_000_000,
        last_us=US,
        peak_us=US - 1_000_000,
        tracks=(
            TrackView("0" * 15 + "1", 0, 3, (1.0, 2.0, 33.333, 44.0), US - 4_000_000, US, 0.97, 0.81, 20),
        ),
        tracks_total=1,
        crops=(Crop("x/0/3", US, 5.0, "evidence://" + "a" * 64, "evidence://" + "b" * 64),),
        clip="evidence://" + "c" * 64 if kind is not EventKind.OPENED else None,
        changes=(Change.CLIP,) if kind is EventKind.UPDATED else (),
        reason=reason,
    )
    return replace(event, **more)


def feed(
    kind: str, code: str | None = "source_silent", sentence: str | None = "no picture for 10 s"
) -> FeedEvent:
    return FeedEvent("studio", kind, 7, Moment(US, "0" * 15 + "1", 0, US), code, sentence)


def checked(event: CloudEvent) -> dict[str, Any]:
    """The structured event, as a reader of the JSON line gets it."""
    read: dict[str, Any] = json.loads(event.line())
    ALERT.validate(read)
    return read


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(ALERT.schema)


@pytest.mark.parametrize("kind", list(EventKind))
def test_every_incident_event_fits_the_schema(kind: EventKind) -> None:
    event = checked(publisher().event(incident(kind), TRACE))
    number = 1 if kind is EventKind.OPENED else 2
    assert event["type"] == f"unmask.incident.{kind.value}.v1"
    assert event["id"] == f"0600a1b2c3d4e5f60718293a.{number}"
    assert event["source"] == "/unmask/unmask"
    assert (event["subject"], event["partitionkey"]) == ("studio", "studio")
    assert (event["sequence"], event["severity"]) == (f"{number:010d}", "medium")
    assert event["traceparent"] == TRACE
    assert event["data"]["latency_s"] == 1.5


@pytest.mark.parametrize("kind", ["up", "down", "unwatched"])
def test_every_feed_event_fits_the_schema(kind: str) -> None:
    event = checked(publisher().event(feed(kind)))
    assert event["type"] == f"unmask.feed.{kind}.v1"
    assert event["data"]["sentence"] == "no picture for 10 s"
    assert "traceparent" not in event
    long = checked(publisher().event(feed(kind, None, "x" * 4000)))
    assert len(long["data"]["sentence"]) == 500


@pytest.mark.parametrize(
    "shifts", [(), (Shift("score", 0.61, 1.25, -0.5), Shift("sharpness", 0.3, 12.0, 80.0))]
)
def test_a_drift_fits_the_schema(shifts: tuple[Shift, ...]) -> None:
    turn = Turn(Standing.DRIFTED if shifts else Standing.STEADY, shifts)
    event = checked(publisher().event(FeedState("studio").turned(Moment(US, "0" * 15 + "1", 0, US), turn)))
    assert (event["type"], event["severity"]) == ("unmask.feed.drift.v1", "low")
    assert event["data"]["code"] == turn.standing.value
    assert [shift["part"] for shift in event["data"]["shifts"]] == [shift.part for shift in shifts]
    assert all(shift.part in event["data"]["sentence"] for shift in shifts)
    del event["data"]["shifts"]
    assert not ALERT.is_valid(event)


def test_three_members_fit_with_every_track_and_picture() -> None:
    members = {f"lite{n}-attention-blends-distilled-{n}": -12.3456 for n in range(3)}
    judgement = replace(incident(EventKind.OPENED).judgement, members=members)
    models = tuple(Model(name, "12", "f" * 64) for name in members)
    track = incident(EventKind.OPENED).tracks[0]
    crop = incident(EventKind.OPENED).crops[0]
    event = incident(
        EventKind.UPDATED, judgement=judgement, tracks=(track,) * 8, tracks_total=90, crops=(crop,) * 4
    )
    told = publisher(replace(PROVENANCE, models=models)).event(event)
    assert len(told.body()) < MAX_BODY / 2
    data = checked(told)["data"]
    assert data["members"] == members
    assert [model["name"] for model in data["models"]] == list(members)
    assert len(data["tracks"]) == 8


def test_feed_events_have_ids_of_their_own() -> None:
    ids = {publisher().event(feed(kind)).attributes["id"] for kind in ("up", "down")}
    assert len(ids) == 2


def test_binary_mode_carries_the_attributes_in_headers_and_the_data_in_the_value() -> None:
    record = publisher().record(incident(EventKind.OPENED))
    line = checked(publisher().event(incident(EventKind.OPENED)))
    assert (record.topic, record.key, record.partition) == ("unmask.alerts", "studio", None)
    assert record.headers["schema"] == b"1"
    assert record.headers["content-type"] == b"application/json"
    assert json.loads(record.value or b"") == line["data"]
    carried = {
        name.removeprefix("ce_"): text.decode() for name, text in record.headers.items() if name[:3] == "ce_"
    }
    assert carried == {name: text for name, text in line.items() if name not in ("data", "datacontenttype")}


def test_a_line_is_one_line() -> None:
    assert "\n" not in publisher().event(feed("down", "x", "two\nlines")).line()


def test_dataref_is_the_clip_or_else_the_best_picture() -> None:
    opened, updated = (
        publisher().event(incident(kind)).attributes for kind in (EventKind.OPENED, EventKind.UPDATED)
    )
    assert opened["dataref"] == "evidence://" + "a" * 64
    assert updated["dataref"] == "evidence://" + "c" * 64
    assert "dataref" not in publisher().event(incident(EventKind.OPENED, crops=())).attributes


@pytest.mark.parametrize(
    ("policy", "severity", "action"),
    [
        ("none", Severity.HIGH, "none"),
        ("review", Severity.LOW, "review"),
        ("review", Severity.HIGH, "review"),
        ("block", Severity.MEDIUM, "review"),
        ("block", Severity.HIGH, "block"),
    ],
)
def test_the_suggested_action_is_never_stronger_than_the_policy(
    policy: str, severity: Severity, action: str
) -> None:
    event = checked(publisher(suggested_action=policy).event(incident(EventKind.OPENED, severity=severity)))
    assert event["data"]["suggested_action"] == action


def test_a_retraction_accuses_no_more() -> None:
    data = checked(publisher(suggested_action="block").event(incident(EventKind.RETRACTED)))["data"]
    assert (data["verdict"], data["suggested_action"], data["reason"]) == ("inconclusive", "none", "a poster")


def test_the_expected_precision_is_bayes_rule_at_the_configured_prevalence() -> None:
    data = checked(publisher(prevalence=0.01).event(incident(EventKind.OPENED)))["data"]
    odds = math.exp(3.4) * 0.01 / 0.99
    assert data["expected_precision"] == pytest.approx(odds / (1 + odds), abs=1e-4)
    assert data["expected_precision"] < data["probability"]
    assert expected_precision(None, 0.01) is None
    assert expected_precision(0.0, 0.3) == pytest.approx(0.3)
    assert expected_precision(900.0, 0.01) == 1.0
    assert expected_precision(-900.0, 0.01) == 0.0


def test_files_have_no_latency() -> None:
    moment = Moment(US, "1", 0, None)
    assert checked(publisher().event(incident(EventKind.OPENED, moment=moment)))["data"]["latency_s"] is None


def test_what_is_behind_the_score_is_told() -> None:
    data = checked(publisher().event(incident(EventKind.OPENED)))["data"]
    assert data["models"] == [{"name": "m", "version": "1", "sha256": "a" * 64}]
    assert (data["tested_for"], data["not_tested_for"]) == (["face swap"], ["lip sync"])
    assert (data["calibration"], data["prior"], data["level"]) == ("shipped", 0.5, 0.9)
    assert data["members"] == {"m": 3.4}
    assert data["tracks"][0]["box"] == [1.0, 2.0, 33.3, 44.0]


def test_the_calibration_behind_an_accusation_is_told() -> None:
    provenance = replace(
        PROVENANCE,
        cllr=0.4123456,
        bound=FalseAlarms(0.3, 10.0, 12),
        disagreement=Disagreement(1.5, {"m": (2.0, 0.5), "n": (1.0, 0.0)}),
    )
    judgement = replace(
        incident(EventKind.OPENED).judgement,
        members={"m": 3.0, "n": -1.0, "shadow": 9.0},
        disagreement=1.0,
        conformal=ConformalSet.MANIPULATED,
    )
    data = checked(publisher(provenance).event(incident(EventKind.OPENED, judgement=judgement)))["data"]
    assert data["disagreement"] == {"contradiction": 1.0, "limit": 1.5, "log_odds": {"m": 2.0, "n": -1.0}}
    assert data["conformal_set"] == "manipulated"
    assert data["cllr"] == 0.4123
    assert data["false_alarms"] == {"per_hour": 0.3, "hours": 10.0, "people": 12}


def test_another_calibration_brings_its_own_claims() -> None:
    own = Calibration(
        CalibrationKind.OWN,
        (Scale(1, 1.0, 0.0),),
        1.0,
        1.0,
        0.2,
        "x",
        "f" * 64,
        bound=FalseAlarms(1.0, 3.0, 2),
    )
    told = PROVENANCE.under(own)
    assert (told.calibration, told.calibration_version, told.prior) == ("own", "f" * 12, 0.2)
    assert told.bound == own.bound
    assert told.models == PROVENANCE.models


def test_what_the_calibration_was_tested_for_counts_before_what_members_say() -> None:
    member = SimpleNamespace(
        name="m",
        version="1",
        sha256="a" * 64,
        record={"tested_for": ["swaps"], "not_tested_for": ["retouching"]},
    )
    told = provenance_of([member], Calibration.identity())  # type: ignore[list-item]
    assert (told.tested_for, told.not_tested_for) == (("swaps",), ("retouching",))
    shown = replace(Calibration.identity(), tested_for=("retouching",))
    told = provenance_of([member], shown)  # type: ignore[list-item]
    assert (told.tested_for, told.not_tested_for) == (("retouching",), ())


def test_the_body_stays_below_its_bound_whatever_is_in_it() -> None:
    many = tuple(
        f"a manipulation with a long name, number {index}, of a family nobody knows" for index in range(400)
    )
    provenance = replace(PROVENANCE, tested_for=many, not_tested_for=many)
    view = incident(EventKind.OPENED).tracks[0]
    event = incident(EventKind.UPDATED, tracks=(view,) * 8, tracks_total=700, reason=None)
    cut = publisher(provenance).event(event)
    assert len(cut.body()) < MAX_BODY
    data = checked(cut)["data"]
    assert data["tracks_total"] == 700
    assert data["evidence"][-1]["kind"] == "clip"
    full = incident(
        EventKind.UPDATED,
        tracks=(view,) * 8,
        crops=incident(EventKind.OPENED).crops * 8,
        judgement=replace(event.judgement, members={f"member-{index}": 1.0 for index in range(20)}),
        changes=tuple(Change),
    )
    whole = publisher().event(full)
    assert len(whole.body()) < MAX_BODY / 2
    assert len(checked(whole)["data"]["tracks"]) == 8


def test_numbers_that_are_none_are_null() -> None:
    judgement = replace(incident(EventKind.OPENED).judgement, members={"m": math.nan, "n": math.inf})
    data = checked(publisher().event(incident(EventKind.OPENED, judgement=judgement)))["data"]
    assert data["members"] == {"m": None, "n": None}


@pytest.mark.parametrize(
    ("spoil", "value"),
    [
        ("probability", 1.5),
        ("verdict", "authentic"),
        ("tracks", [{}]),
        ("suggested_action", "delete"),
        ("more", 1),
    ],
)
def test_the_schema_refuses_what_is_wrong(spoil: str, value: Any) -> None:
    event = checked(publisher().event(incident(EventKind.OPENED)))
    event["data"][spoil] = value
    assert not ALERT.is_valid(event)


def test_the_schema_wants_changes_of_an_update_and_totals_of_a_close() -> None:
    for kind, name in (
        (EventKind.UPDATED, "changes"),
        (EventKind.CLOSED, "totals"),
        (EventKind.RETRACTED, "reason"),
    ):
        event = checked(publisher().event(incident(kind)))
        del event["data"][name]
        assert not ALERT.is_valid(event), kind


def test_the_schemas_know_every_reason() -> None:
    scores = json.loads((FOLDER / "scores.schema.json").read_text())
    for schema in (ALERT.schema, scores):
        assert schema["$defs"]["reason"]["enum"] == [reason.value for reason in Reason]


def test_time_is_written_to_the_microsecond() -> None:
    assert iso(1_700_000_000_000_001) == "2023-11-14T22:13:20.000001Z"


def test_the_examples_in_the_documentation_are_what_is_written_today() -> None:
    text = (FOLDER.parent / "docs" / "alerts.md").read_text()
    scores = Draft202012Validator(json.loads((FOLDER / "scores.schema.json").read_text()))
    examples = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    assert [example["type"] for example in examples] == [
        "unmask.incident.opened.v1",
        "unmask.feed.down.v1",
        "unmask.feed.drift.v1",
        "frame",
        "verdict",
    ]
    for example in examples:
        (scores if "schema" in example else ALERT).validate(example)
    written = publisher().event(incident(EventKind.OPENED)).structured()
    assert examples[0].keys() == written.keys()
    assert list(examples[0]["data"]) == list(written["data"])
