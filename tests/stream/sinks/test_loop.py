"""A sink delivers at least once, in order, through every outage, and says what it did not deliver."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import stream
from stream.decisions import Mute, write
from stream.errors import Code, UnmaskError
from stream.records import OutRecord, Topic
from stream.sinks.delivery import DELIVERED, Outcome, Result
from stream.sinks.loop import AWAY_MAX_S, JITTER, MAX_WAITING, REFUSED_S, RETRY_AFTER_MAX_S
from stream.sinks.service import MUTES_S
from stream.sinks.settings import Flood, Only, Quiet
from stream.topics import topic_name
from tests.stream.detecting import Away, fencing
from tests.stream.sinks.world import (
    AWAY,
    GONE,
    REFUSED,
    FakeTarget,
    World,
    die,
    end,
    feed,
    incident,
    settle,
)

ALERT = Draft202012Validator(json.loads((Path(stream.__file__).parent / "alert.schema.json").read_text()))
DAY_S = 86400.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_new_sink_begins_with_what_is_written_from_then_on(world: World) -> None:
    world.write(incident("old"))
    target = FakeTarget()
    loop = world.start(target)
    world.write(incident("new"), feed(1))
    settle(loop)
    assert target.got == ["new.1", "studio.0000000000000001.1.down"]
    assert world.counted("unmask_sink_delivered_total") == 2


def test_what_is_written_while_a_sink_is_down_is_delivered_when_it_is_back(world: World) -> None:
    first = world.start(FakeTarget())
    end(first)
    world.write(incident("i1"), incident("i2", stream="lobby"))
    target = FakeTarget()
    settle(world.loop(target))
    assert sorted(target.got) == ["i1.1", "i2.1"]


def test_a_double_is_sent_once_also_after_a_restart(world: World) -> None:
    target = FakeTarget()
    loop = world.start(target)
    world.write(incident(), feed(1), incident(), feed(1))
    settle(loop)
    end(loop)
    world.write(incident(), feed(1))
    settle(world.loop(target))
    assert target.got == ["i1.1", "studio.0000000000000001.1.down"]
    assert world.dropped("duplicate") == 4


def test_death_between_sending_and_commit_sends_again_under_the_same_id(world: World) -> None:
    target = FakeTarget()
    loop = world.start(target)
    world.write(incident("i1"), incident("i1", 2, "updated"))

    def gone() -> None:
        raise UnmaskError(Code.LOG_AWAY, "died here")

    loop._commit = gone  # type: ignore[method-assign]
    with pytest.raises(UnmaskError):
        settle(loop)
    die(loop)
    settle(world.loop(target))
    assert target.got == ["i1.1", "i1.1", "i1.2"]


def test_a_receiver_that_is_away_gets_everything_in_order_when_it_is_back(world: World) -> None:
    target = FakeTarget()
    target.always = AWAY
    loop = world.start(target)
    events = [incident("i1"), incident("i1", 2, "updated"), feed(1), incident("i1", 3, "closed")]
    world.write(*events)
    settle(loop)
    assert target.tried == ["i1.1"], "one attempt is enough to know"
    assert world.counted("unmask_sink_up") == 0
    target.always = None
    world.clock.advance(AWAY_MAX_S)
    settle(loop)
    assert target.got == [event.attributes["id"] for event in events]
    assert world.counted("unmask_sink_up") == 1
    assert world.states().keys() == {"s#position", "s!i1"}


def planned_s(world: World) -> float:
    """Seconds until the only alert that waits is tried again, as the log has it."""
    waiting = json.loads(world.states()["s/i1.1"].value or b"")
    return float(waiting["next_us"] / 1e6 - world.clock.monotonic())


def test_waits_double_with_jitter_up_to_five_minutes_and_end_after_a_day(world: World) -> None:
    target = FakeTarget()
    target.always = AWAY
    loop = world.start(target)
    world.write(incident())
    settle(loop)
    begun = world.clock.monotonic()
    waits, planned = [], 1.0
    while len(waits) < 40:
        waits.append(planned_s(world))
        assert planned * (1 - JITTER) <= waits[-1] <= planned
        planned = min(2 * planned, AWAY_MAX_S)
        world.clock.advance(waits[-1] - 0.01)
        assert not loop.step()
        world.clock.advance(0.01)
        assert loop.step()
    assert len({round(wait / AWAY_MAX_S, 3) for wait in waits[10:]}) > 5, "chance spreads them"
    world.clock.advance(begun + DAY_S - world.clock.monotonic())
    settle(loop)
    assert world.dropped("expired") == 0
    world.clock.advance(1)
    settle(loop)
    world.clock.advance(1)
    settle(loop)
    assert world.dropped("expired") == 1
    assert "s/i1.1" not in world.states()


def test_the_schedule_of_a_refused_alert_outlives_restarts_and_ends_after_a_day(world: World) -> None:
    target = FakeTarget()
    target.always = REFUSED
    loop = world.start(target)
    world.write(incident())
    settle(loop)
    begun, gaps = world.clock.monotonic(), []
    while world.dropped("expired") == 0:
        (die if len(gaps) % 2 else end)(loop)
        loop = world.loop(target)
        settle(loop)
        assert len(target.tried) == len(gaps) + 1, "a restart tries nothing early"
        gaps.append(planned_s(world))
        world.clock.advance(gaps[-1])
        settle(loop)
    assert len(target.tried) >= len(REFUSED_S)
    for gap, planned in zip(gaps, REFUSED_S, strict=False):
        assert planned * (1 - JITTER) <= gap <= planned * (1 + JITTER)
    assert DAY_S < world.clock.monotonic() - begun < DAY_S + 1.2 * REFUSED_S[-1]


def test_one_refused_alert_holds_up_its_own_incident_only(world: World) -> None:
    target = FakeTarget()
    loop = world.start(target)
    target.answers.append(REFUSED)
    world.write(incident("bad"), incident("bad", 2, "updated"), incident("good"), feed(1))
    settle(loop)
    assert target.got == ["good.1", "studio.0000000000000001.1.down"]
    world.clock.advance(2 * REFUSED_S[0])
    settle(loop)
    assert target.got[2:] == ["bad.1", "bad.2"]


def test_a_receiver_may_ask_for_patience_within_bounds(world: World) -> None:
    target = FakeTarget()
    loop = world.start(target)
    target.answers += [Result(Outcome.AWAY, "busy", "", 120.0), Result(Outcome.AWAY, "busy", "", 1e9)]
    world.write(incident())
    settle(loop)
    world.clock.advance(119)
    settle(loop)
    assert len(target.tried) == 1
    world.clock.advance(1)
    settle(loop)
    assert len(target.tried) == 2
    world.clock.advance(RETRY_AFTER_MAX_S)
    settle(loop)
    assert target.got == ["i1.1"]


def test_a_wait_that_was_asked_for_outlives_a_restart(world: World) -> None:
    target = FakeTarget()
    loop = world.start(target)
    target.answers.append(Result(Outcome.AWAY, "busy", "", 600.0))
    world.write(incident("i1"), incident("i2"))
    settle(loop)
    end(loop)
    loop = world.loop(target)
    settle(loop)
    assert len(target.tried) == 1
    world.clock.advance(600)
    settle(loop)
    assert target.got == ["i1.1", "i2.1"]


def test_a_clock_that_is_set_back_silences_nobody(world: World) -> None:
    target = FakeTarget()
    target.answers.append(AWAY)
    loop = world.start(target)
    world.write(incident("i1"))
    settle(loop)
    world.clock.advance(-30 * DAY_S)
    world.write(incident("i2", stream="lobby"))
    settle(loop)
    assert target.got[0] == "i2.1"


def test_a_bug_in_a_target_is_an_outage_and_no_end(world: World, caplog: pytest.LogCaptureFixture) -> None:
    target = FakeTarget()
    loop = world.start(target)
    target.answers.append(RuntimeError("a bug"))
    world.write(incident())
    settle(loop)
    assert world.counted("unmask_sink_failed_attempts_total", reason="error") == 1
    world.clock.advance(2)
    settle(loop)
    assert target.got == ["i1.1"]


def test_no_more_than_so_many_wait_and_the_rest_stays_in_the_log(world: World) -> None:
    target = FakeTarget()
    target.always = REFUSED
    loop = world.start(target, flood=Flood(most=10**6))
    count = MAX_WAITING + 5
    world.write(*(incident(f"i{n}", stream="a") for n in range(count)))
    loop._commit = lambda: None  # type: ignore[method-assign]  # a thousand transactions are not the point
    settle(loop)
    assert len(target.tried) == MAX_WAITING
    assert world.counted("unmask_sink_waiting") == MAX_WAITING


# Gone


def test_a_receiver_that_is_gone_gets_nothing_more_until_it_is_enabled(world: World) -> None:
    target = FakeTarget()
    loop = world.start(target)
    target.answers.append(GONE)
    world.write(incident("i1"))
    settle(loop)
    world.write(incident("i2"))
    world.clock.advance(3600)
    settle(loop)
    assert target.tried == ["i1.1"]
    assert world.counted("unmask_sink_disabled") == 1
    end(loop)
    loop = world.loop(target)
    settle(loop)
    assert target.tried == ["i1.1"], "a restart does not ask again"
    topic = topic_name(world.config, Topic.DELIVERIES)
    world.send(
        [OutRecord(topic, "s#disabled", None, {"schema": b"1"}, 0, partition=number) for number in range(2)]
    )
    world.clock.advance(6)
    settle(loop)
    assert target.got == ["i1.1", "i2.1"]
    assert world.counted("unmask_sink_disabled") == 0


def test_another_address_is_another_receiver(world: World) -> None:
    target = FakeTarget("old")
    loop = world.start(target)
    target.answers.append(GONE)
    world.write(incident("i1"))
    settle(loop)
    end(loop)
    other = FakeTarget("new")
    settle(world.loop(other))
    assert other.got == ["i1.1"]


# Retraction


def test_a_retraction_follows_whoever_was_told(world: World) -> None:
    everyone, grave = FakeTarget(), FakeTarget()
    loops = [
        world.start(everyone, name="all"),
        world.start(grave, name="grave", only=Only(severity="high", verdicts=("manipulated",))),
    ]
    world.write(
        incident("weak", severity="low"),
        incident("strong", severity="high"),
        incident("weak", 2, "retracted", "low"),
        incident("strong", 2, "retracted", "high"),
    )
    for loop in loops:
        settle(loop)
    assert everyone.got == ["weak.1", "strong.1", "weak.2", "strong.2"]
    assert grave.got == ["strong.1", "strong.2"]
    assert world.dropped("not_told") == 1
    assert not any("!" in key for key in world.states())


def test_a_retraction_reaches_a_receiver_that_lied_and_goes_first(world: World) -> None:
    """It may have taken what it answered 500 to."""
    target = FakeTarget()
    loop = world.start(target)
    target.answers += [REFUSED]
    world.write(incident("i1"), incident("i1", 2, "updated"))
    settle(loop)
    end(loop)
    world.write(incident("i1", 3, "retracted"))
    loop = world.loop(target)
    settle(loop)
    assert target.tried == ["i1.1", "i1.3"]
    assert world.dropped("superseded") == 2
    world.clock.advance(3600)
    settle(loop)
    assert target.tried == ["i1.1", "i1.3"]


def test_who_was_told_of_an_incident_is_told_the_rest_though_the_feed_is_detached(world: World) -> None:
    world.labels["studio"] = {"site": "berlin"}
    target = FakeTarget()
    loop = world.start(target, only=Only(labels={"site": "berlin"}))
    world.write(incident("i1"))
    settle(loop)
    world.labels.clear()
    world.write(incident("i1", 2, "closed"), incident("i2"))
    settle(loop)
    assert target.got == ["i1.1", "i1.2"]
    assert world.dropped("filtered") == 1


def test_nobody_is_told_of_a_muted_feed_but_who_was_told_before(world: World) -> None:
    """
    told    i1 ------------- closed
    muted       [---------------]
    i2              dropped
    i3                            told
    """
    target = FakeTarget()
    loop = world.start(target)
    world.write(incident("i1"))
    settle(loop)
    now = world.clock.now_us()
    write(world.config, world.log, Mute("studio", now, now + 60_000_000, "rehearsal", "ada", now))
    world.clock.advance(MUTES_S)
    world.write(incident("i2"), incident("i1", 2, "closed"))
    settle(loop)
    world.clock.advance(60)
    world.write(incident("i3"))
    settle(loop)
    assert target.got == ["i1.1", "i1.2", "i3.1"]
    assert world.dropped("muted") == 1


def test_what_the_log_forgot_is_never_withdrawn(world: World) -> None:
    loop = world.start(FakeTarget())
    world.write(incident("i1"))
    settle(loop)
    end(loop)
    world.clock.advance(world.config.log.records_retention_s + 1)
    loop = world.loop(FakeTarget())
    settle(loop)
    world.clock.advance(2)
    settle(loop)
    assert "s!i1" not in world.states()


# Held back


NIGHT = Quiet(begin="22:00", end="07:00", zone="UTC")


def at(world: World, hours: float) -> None:
    """Move the clock to the next such hour of a day, UTC."""
    now_s = world.clock.monotonic()
    world.clock.advance((hours * 3600 - now_s % 86400) % 86400)


def test_at_night_only_the_gravest_is_sent_and_the_rest_told_in_the_morning(world: World) -> None:
    at(world, 23)
    target = FakeTarget()
    loop = world.start(target, quiet=NIGHT)
    world.write(incident("weak"), incident("grave", severity="high"), feed(1), incident("weak", 2, "closed"))
    settle(loop)
    assert target.got == ["grave.1"]
    end(loop)
    at(world, 6.9)
    loop = world.loop(target, quiet=NIGHT)
    settle(loop)
    assert target.got == ["grave.1"]
    at(world, 7)
    settle(loop)
    told = target.events[-1].structured()
    ALERT.validate(told)
    assert (told["type"], told["subject"]) == ("unmask.sink.held_back.v1", "s")
    data = told["data"]
    assert (data["count"], data["reasons"]) == (3, {"quiet": 3})
    assert data["incidents"] == [
        {"incident": "weak", "stream": "studio", "severity": "medium", "event": "closed"}
    ]
    assert world.counted("unmask_sink_held_back_total", reason="quiet") == 3
    world.write(incident("weak", 3, "retracted"))
    settle(loop)
    assert target.got[-1] == "weak.3", "it was told of it by that message"


def test_an_incident_withdrawn_in_the_night_is_told_as_withdrawn(world: World) -> None:
    at(world, 23)
    target = FakeTarget()
    loop = world.start(target, quiet=NIGHT)
    world.write(incident("i1"), incident("i1", 2, "retracted"))
    settle(loop)
    at(world, 7)
    settle(loop)
    assert [told["event"] for told in target.events[-1].data["incidents"]] == ["retracted"]
    assert len(target.got) == 1


def test_a_withdrawal_waits_for_no_morning(world: World) -> None:
    target = FakeTarget()
    at(world, 21)
    loop = world.start(target, quiet=NIGHT)
    world.write(incident("i1"))
    settle(loop)
    at(world, 23)
    world.write(incident("i1", 2, "retracted"))
    settle(loop)
    assert target.got == ["i1.1", "i1.2"]


def test_a_flood_is_cut_and_told_over_all_partitions_in_one_message(world: World) -> None:
    target = FakeTarget()
    loop = world.start(target, flood=Flood(most=3, within_s=600))
    world.write(*(incident(f"i{n}", stream=f"cam{n}", severity="high") for n in range(60)))
    settle(loop)
    assert len(target.got) == 3
    sent = {event.data["incident"] for event in target.events}
    world.write(incident("i59", 2, "retracted", stream="cam59"))
    settle(loop)
    world.clock.advance(601)
    settle(loop)
    assert len(target.got) == 4
    told = target.events[-1].structured()
    ALERT.validate(told)
    assert (told["data"]["count"], told["data"]["reasons"]) == (58, {"flood": 58})
    assert len(target.events[-1].body()) < 20_000
    named = {each["incident"] for each in told["data"]["incidents"]}
    assert len(named) == 40
    assert not named & sent
    for number in range(57, 60):
        world.write(incident(f"i{number}", 3, "retracted", stream=f"cam{number}"))
    settle(loop)
    withdrawn = {event.data["incident"] for event in target.events[4:]}
    assert withdrawn == {f"i{number}" for number in range(57, 60)} & (named | sent)


def test_what_was_held_back_is_told_although_the_receiver_was_away_and_the_process_died(
    world: World,
) -> None:
    target = FakeTarget()
    limits = Flood(most=1, within_s=60)
    loop = world.start(target, flood=limits)
    world.write(*(incident(f"i{n}") for n in range(3)))
    settle(loop)
    world.clock.advance(61)
    target.always = AWAY
    settle(loop)
    die(loop)
    target.always = None
    world.clock.advance(AWAY_MAX_S)
    settle(world.loop(target, flood=limits))
    assert [event.data.get("count") for event in target.events] == [None, 2]
    assert len(set(target.tried)) == 2, "the same id at every attempt"


# What comes from the log


def test_what_cannot_be_read_is_counted_and_stops_nothing(world: World) -> None:
    target = FakeTarget()
    loop = world.start(target)
    topic = topic_name(world.config, Topic.ALERTS)
    good = incident()
    bad: list[tuple[bytes, dict[str, bytes]]] = [
        (b"no json", dict(good.headers())),
        (b"null", dict(good.headers())),
        (b"{}", dict(good.headers())),
        (b'{"stream": "a/b"}', dict(good.headers())),
        (b'{"stream": 5}', dict(good.headers())),
        (b'{"stream": "a", "incident": ["i"]}', dict(good.headers())),
        (good.body(), {**good.headers(), "schema": b"9"}),
        (good.body(), {**good.headers(), "ce_severity": b"dire"}),
        (good.body(), {**good.headers(), "ce_id": b"\xff"}),
        (good.body(), {"schema": b"1"}),
    ]
    world.send([OutRecord(topic, "studio", value, headers, 0) for value, headers in bad])
    world.write(good)
    settle(loop)
    assert target.got == ["i1.1"]
    assert world.dropped("unreadable") == len(bad)


def test_a_bug_over_one_alert_is_counted_and_stops_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = FakeTarget()
    loop = world.start(target)
    attempt = loop._attempt

    def broken(*arguments: Any) -> None:
        if arguments[2].id == "i1.1":
            raise RuntimeError("a bug")
        attempt(*arguments)

    monkeypatch.setattr(loop, "_attempt", broken)
    world.write(incident("i1"), incident("i2"))
    settle(loop)
    assert target.got == ["i2.1"]
    assert world.dropped("unreadable") == 1


def test_what_is_older_than_a_day_when_it_is_first_seen_is_not_sent(world: World) -> None:
    target = FakeTarget()
    end(world.start(target))
    world.write(incident("stale"))
    world.clock.advance(DAY_S + 1)
    world.write(incident("new"))
    settle(world.loop(target))
    assert target.got == ["new.1"]
    assert world.dropped("expired") == 1


def test_an_outage_of_the_log_while_labels_are_asked_for_loses_nothing(world: World) -> None:
    target = FakeTarget()
    loop = world.start(target, only=Only(labels={"a": "b"}))
    world.write(incident())

    def away(stream: str) -> dict[str, str]:
        raise UnmaskError(Code.LOG_AWAY, "no answer")

    loop._labels = away
    for _ in range(3):
        with pytest.raises(UnmaskError):
            settle(loop)
    loop._labels = lambda stream: {"a": "b"}
    settle(loop)
    assert target.got == ["i1.1"]


def test_a_member_that_was_fenced_goes_on_with_what_is_really_written(world: World) -> None:
    target = FakeTarget()
    log = fencing(world.log, at=(3,))
    loop = world.loop(target, log=log)
    settle(loop)
    world.write(*(incident(f"i{n}") for n in range(4)))
    with pytest.raises(UnmaskError) as caught:
        settle(loop)
    assert caught.value.code is Code.LOG_FENCED
    settle(loop)
    assert list(dict.fromkeys(target.got)) == [f"i{n}.1" for n in range(4)]
    assert len(target.got) == 5, "the one whose commit was refused came twice"


def test_a_log_that_is_away_for_a_while_costs_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    log = Away(world.log)
    target = FakeTarget()
    loop = world.loop(target, log=log)
    settle(loop)
    log.away = True
    world.write(incident())
    with caplog.at_level(logging.WARNING):
        assert loop._turn() > 0
    log.away = False
    settle(loop)
    assert target.got == ["i1.1"]


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_whatever_happens_each_alert_is_delivered_or_counted(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Restarts, deaths and every answer, in any order: ids are lost by none, order within incidents holds."""
    chance = random.Random(seed)
    world = World(tmp_path_factory.mktemp("world"))
    target = FakeTarget()
    loop = world.start(target)
    written: list[str] = []
    for turn in range(30):
        kind = chance.randrange(6)
        if kind <= 2:
            name, number = f"i{chance.randrange(3)}", turn + 1
            world.write(incident(name, number, "updated", stream=chance.choice("ab") * 1 + name))
            written.append(f"{name}.{number}")
        elif kind == 3:
            target.answers += chance.choices([AWAY, REFUSED, DELIVERED], k=chance.randrange(4))
        elif kind == 4:
            (die if chance.random() < 0.5 else end)(loop)
            loop = world.loop(target)
        world.clock.advance(chance.choice([0.1, 5, 400]))
        settle(loop)
    target.answers.clear()
    for _ in range(20):
        world.clock.advance(3600)
        settle(loop)
    assert set(target.got) == set(written)
    for stream_id in {event.data["stream"] for event in target.events}:
        numbers = [event.data["number"] for event in target.events if event.data["stream"] == stream_id]
        firsts = list(dict.fromkeys(numbers))
        assert firsts == sorted(firsts)
    end(loop)
    world.log.close()
