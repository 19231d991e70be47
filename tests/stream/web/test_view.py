"""The read model: what the topics say becomes cards and incidents, bounded, and whose absence is noticed."""

import json
from pathlib import Path

import pytest

from stream.clock import FakeClock
from stream.config import Config, Web
from stream.controls import Retract
from stream.decisions import Choice, Decision, Mute, Subject, record_of
from stream.records import Control, OutRecord, Record, Topic
from stream.web import view as view_module
from stream.web.incidents import Wanted, decision_of
from stream.web.rows import SPARK_POINTS
from stream.web.view import View
from tests.stream.web.world import AUTHENTIC, MANIPULATED, World


def test_a_feed_is_connecting_until_something_is_seen_and_unwatched_if_nothing_ever_is(world: World) -> None:
    world.list_source("studio")
    world.look()
    assert (world.card()["state"], world.card()["rank"]) == ("connecting", 6)
    world.clock.advance(31)
    assert world.card()["state"] == "unwatched"
    assert "are ingest and detect up?" in world.card()["why"]


def test_a_live_feed_has_verdict_rate_lag_and_sparkline(world: World) -> None:
    world.list_source("studio", labels={"region": "north"}, fps=4)
    world.tell(AUTHENTIC)
    world.look()
    card = world.card()
    assert (card["state"], card["verdict"], card["reasons"]) == ("live", "authentic", [])
    assert card["fps"] == pytest.approx(2.0, abs=0.4)
    assert card["lag_s"] == 0.0
    assert card["labels"] == {"region": "north"}
    assert len(card["spark"]) == SPARK_POINTS
    assert card["spark"][-1] == -6.0
    assert card["spark"][0] is None


def test_detect_that_dies_is_noticed_without_any_record(world: World) -> None:
    world.list_source("studio")
    world.tell(AUTHENTIC)
    world.look()
    world.clock.advance(11)
    assert world.card()["state"] == "silent"
    world.clock.advance(20)
    assert world.card()["state"] == "unwatched"
    assert world.card()["rank"] < 4


def test_a_feed_that_says_it_is_down_is_silent_and_then_back(world: World) -> None:
    world.list_source("studio")
    world.tell(AUTHENTIC + "-" * 6)
    world.look()
    assert (world.card()["state"], world.card()["why"]) == ("silent", "no picture for 10 s")
    world.tell("a" * 6)
    world.tick()
    world.look()
    assert world.card()["state"] == "degraded"  # some of it was not watched, only just
    world.tell("a" * 62)
    world.look()
    assert world.card()["state"] == "live"


def test_a_feed_that_ends_has_ended_and_begins_again_when_attached(world: World) -> None:
    world.list_source("studio")
    world.tell(AUTHENTIC)
    world.end()
    world.look()
    assert (world.card()["state"], world.card()["rank"]) == ("ended", 10)
    world.unlist("studio")
    world.look()
    assert world.view.feeds() == []
    world.list_source("studio", url="tcp://192.0.2.8:9000")
    world.look()
    assert world.card()["state"] == "connecting"


def test_dropped_pictures_make_a_feed_degraded_for_a_while(world: World) -> None:
    world.list_source("studio")
    world.tell(AUTHENTIC + "xxa")
    world.look()
    assert world.card()["state"] == "degraded"
    assert "CORRUPT" in world.card()["why"]
    world.tell("a" * 62)
    world.look()
    assert world.card()["state"] == "live"


def test_an_entry_that_cannot_be_attached_says_why(world: World) -> None:
    world.list_source("studio", url="tcp://user:secret@192.0.2.7:9000")
    world.look()
    card = world.card()
    assert card["state"] == "unwatched"
    assert "holds a credential" in card["why"]
    assert "secret" not in json.dumps([card, world.view.feeds()])


def test_an_incident_opens_on_the_card_and_in_the_history_and_closes(world: World) -> None:
    world.list_source("studio")
    world.tell(AUTHENTIC[:8] + MANIPULATED, picture_every=4)
    world.look()
    card = world.card()
    assert card["rank"] < 3
    assert card["severity"] in ("medium", "high")
    (found,), total = world.view.incidents(Wanted(), 10)
    assert (found["id"], found["status"], total) == (card["incident"], "open", 1)
    assert found["picture"] is not None
    assert [box["verdict"] for box in card["boxes"]] == ["manipulated"]
    assert card["boxes"][0]["box"] == pytest.approx([100 / 640, 100 / 360, 200 / 640, 200 / 360], abs=1e-4)
    world.tell("." * 80)
    world.look()
    assert world.card()["incident"] is None
    assert world.view.incidents(Wanted(status="closed"), 10)[1] == 1


def test_history_is_searched_by_each_field_and_by_words(world: World) -> None:
    world.list_source("studio")
    world.tell(MANIPULATED)
    world.look()
    (found,), _ = world.view.incidents(Wanted(), 10)
    first, last = found["first_us"], found["last_us"]

    def count(**wanted: object) -> int:
        return world.view.incidents(Wanted(**wanted), 10)[1]  # type: ignore[arg-type]

    assert count(stream="studio", status="open", severity=found["severity"], verdict="manipulated") == 1
    assert count(decision="none") == count(text="STUDIO open") == count(from_us=last, to_us=first + 1) == 1
    assert count(stream="other") == count(severity="low") == count(decision="confirmed") == 0
    assert count(from_us=last + 1) == count(to_us=first) == count(text="studio nobody") == 0


def test_a_decision_belongs_to_its_incident_and_the_newest_holds(world: World) -> None:
    world.list_source("studio")
    world.tell(MANIPULATED)
    world.look()
    name = world.card()["incident"]
    incident = world.view.incident(name)
    assert incident is not None
    for choice in (Choice.INCONCLUSIVE, Choice.CONFIRMED):
        world.send(record_of(world.config, decision_of(incident, choice, "why", "ada", world.clock.now_us())))
    world.look()
    (found,), _ = world.view.incidents(Wanted(decision="confirmed"), 10)
    assert (found["decided_by"], found["decision_reason"]) == ("ada", "why")
    assert [one.choice for one in world.view.decisions(name)] == [Choice.INCONCLUSIVE, Choice.CONFIRMED]
    told = world.view.record_of_decisions()
    assert told["all"]["precision"] == 1.0
    assert list(told["models"]) == ["m 1+aaaaaaaaaaaa"]


def test_a_dismissed_incident_is_withdrawn_open_or_closed(world: World) -> None:
    world.list_source("studio")
    world.tell(MANIPULATED)
    world.look()
    name = world.card()["incident"]
    incident = world.view.incident(name)
    assert incident is not None
    world.send(record_of(world.config, decision_of(incident, Choice.DISMISSED, "a poster", "ada", 1)))
    world.look()
    asked = [record for place in world.places(Topic.MEDIA) for record in world.log.read(place, 0)]
    assert [record.headers["control"] for record in asked] == [Control.RETRACT.value.encode()]
    assert json.loads(asked[0].value or b"") == {"incident": name, "reason": "a poster"}
    assert Retract(**json.loads(asked[0].value or b""))
    world.tell("." * 80)  # detect never came to it, and the incident closes
    world.look()
    world.clock.advance(31)
    world.look()
    world.look()
    (found,), _ = world.view.incidents(Wanted(), 10)
    assert (found["status"], found["reason"], found["verdict"]) == ("retracted", "a poster", "inconclusive")
    assert world.view.dismissed() == []


def test_a_mute_holds_until_its_end_and_hides_no_incident(world: World) -> None:
    world.list_source("studio")
    world.tell(MANIPULATED)
    now = world.clock.now_us()
    world.send(record_of(world.config, Mute("studio", now, now + 60_000_000, "rehearsal", "ada", now)))
    world.look()
    card = world.card()
    assert (card["rank"], card["muted_why"], card["muted_by"]) == (9, "rehearsal", "ada")
    assert card["incident"] is not None
    world.clock.advance(61)
    assert world.card()["muted_until_us"] is None


def test_only_what_changed_is_told_again(world: World) -> None:
    world.list_source("studio")
    names = world.copies(5, "aaaa")
    world.look()
    whole = world.view.changes(0)
    assert {card["id"] for card in whole["feeds"]} == {*names, "studio"}
    assert world.view.changes(whole["version"])["feeds"] == []
    world.clock.advance(0.1)
    world.view.tick()
    assert world.view.changes(whole["version"])["feeds"] == []
    world.unlist(names[0])
    world.look()
    (card,) = world.view.changes(whole["version"])["feeds"]
    assert (card["id"], card["state"]) == (names[0], "ended")
    world.clock.advance(1000)
    world.look()
    assert world.view.changes(whole["version"])["gone"] == [names[0]]


def test_a_page_from_before_a_restart_gets_everything(world: World) -> None:
    world.list_source("studio")
    world.look()
    assert world.view.changes(10**6)["whole"]
    assert len(world.view.changes(10**6)["feeds"]) == 1


def test_feeds_and_incidents_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "MAX_FEEDS", 2)
    monkeypatch.setattr(view_module, "MAX_INCIDENTS", 1)
    for name in ("studio", "b", "c"):
        world.list_source(name)
    world.tell(MANIPULATED + "." * 80 + MANIPULATED)
    world.look()
    assert len(world.view.changes(0)["feeds"]) == 2
    assert world.view.changes(0)["left_out"] == 1
    (found,), total = world.view.incidents(Wanted(), 10)
    assert (total, found["status"]) == (1, "open")


@pytest.mark.parametrize(
    "topic", [Topic.ALERTS, Topic.SCORES, Topic.DECISIONS, Topic.PICTURES, Topic.SOURCES]
)
@pytest.mark.parametrize(
    "value", [b"", b"nonsense", b"[1]", b'{"type": "frame"}', b'{"incident": 1, "event": 2}']
)
def test_what_cannot_be_read_stops_nothing(world: World, topic: str, value: bytes) -> None:
    world.list_source("studio")
    world.send(
        OutRecord(world.topic(Topic(topic)), "studio", value, {"glimpse": value}, world.clock.now_us())
    )
    world.tell("aaaa")
    world.look()
    assert world.view.ready


def test_canaries_and_replays_are_not_on_the_wall() -> None:
    config, clock = Config(), FakeClock()
    view = View(config, clock)
    for stream in ("canary~0", "studio~replay", "unlisted"):
        value = json.dumps({"type": "frame", "media_us": 1, "faces": []}).encode()
        view.on_score(Record("unmask.scores", 0, 0, stream, value, {}, 1))
    view.tick()
    assert view.changes(0)["feeds"] == []


def test_a_decision_of_a_stranger_must_be_whole(world: World) -> None:
    good = Decision("studio", Subject.SAMPLE, "x", Choice.CONFIRMED, "", "ada", 1, 0.5)
    record = record_of(world.config, good)
    broken = {**json.loads(record.value or b""), "probability": 0}
    world.send(OutRecord(record.topic, "studio", json.dumps(broken).encode(), {}, 1))
    world.look()
    assert world.view.unreadable == 1
    assert world.view.record_of_decisions()["missed"]["reviewed"] == 0


def test_no_more_faces_are_drawn_than_are_reviewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "MAX_WAITING", 2)
    world = World(tmp_path, web=Web(audit_rate=1.0))
    world.list_source("studio")
    world.tell("aaaa E" * 5, picture_every=1)
    world.look()
    world.look()
    first, second = world.view.samples()
    assert (first.probability, first.stream, len(first.crop) > 100) == (1.0, "studio", True)
    assert second.epoch == first.epoch + 1
    decided = Decision("studio", Subject.SAMPLE, first.id, Choice.DISMISSED, "", "ada", 1, 1.0)
    world.send(record_of(world.config, decided))
    world.look()
    assert [one.id for one in world.view.samples()] == [second.id]
    world.tell("aaaa E aaaa", picture_every=1)
    world.look()
    world.look()
    assert len(world.view.samples()) == 2
    world.close()
