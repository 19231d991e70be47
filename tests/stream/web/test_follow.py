"""Following the log: through retention, through outages, at any length; and finding a place in it by time."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stream.clock import SystemClock
from stream.config import Web
from stream.errors import Code, UnmaskError
from stream.log import PositionError, TopicPartition
from stream.records import OutRecord, Record, Topic
from stream.web import follow, history
from stream.web.follow import Cursor, Follower
from stream.web.incidents import Wanted
from stream.web.server import WebServer
from stream.web.view import View
from tests.stream.web.world import AUTHENTIC, MANIPULATED, World

PLACE = TopicPartition("t", 0)


class Forgetful:
    """A log of one partition, of which the first records are gone."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end

    def partitions(self, topic: str) -> int:
        return 1

    def begin_offset(self, partition: TopicPartition) -> int:
        return self.begin

    def end_offset(self, partition: TopicPartition) -> int:
        return self.end

    def read(self, partition: TopicPartition, start: int, stop: int | None = None) -> Iterator[Record]:
        if start < self.begin:
            raise PositionError(Code.LOG_POSITION, "gone", partition, self.begin)
        upto = self.end if stop is None else min(stop, self.end)
        return iter([Record("t", 0, at, "a", b"{}", {}, 1000 * at) for at in range(start, upto)])


def offsets(cursor: Cursor, at_most: int | None = None) -> list[int]:
    return [record.offset for record in cursor.new(at_most)]


def test_a_cursor_reads_each_record_once_and_goes_on_behind_what_is_gone() -> None:
    log = Forgetful(0, 5)
    cursor = Cursor(log, "t")  # type: ignore[arg-type]
    assert offsets(cursor, 3) == [0, 1, 2]
    assert cursor.share() == pytest.approx(0.6)
    assert offsets(cursor) == [3, 4]
    assert (offsets(cursor), cursor.share()) == ([], 1.0)
    log.begin, log.end = 10, 12
    assert offsets(cursor) == []
    assert cursor.skipped == 1
    assert offsets(cursor) == [10, 11]
    assert offsets(Cursor(log, "t", tail=1)) == [11]  # type: ignore[arg-type]


def test_a_place_is_found_by_time() -> None:
    log = Forgetful(3, 40)
    for time_us, offset in ((0, 3), (3000, 3), (3001, 4), (20_000, 20), (39_000, 39), (99_000, 40)):
        assert history.offset_at(log, PLACE, time_us) == offset  # type: ignore[arg-type]


def test_an_incident_among_many_feeds_is_found_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "BACK_RECORDS", 7)
    world.list_source("studio")
    world.tell(AUTHENTIC * 2)
    world.tell(MANIPULATED + "." * 80 + AUTHENTIC)
    world.look()
    name = world.view.incidents(Wanted(), 1)[0][0]["id"]
    incident = world.view.incident(name)
    assert incident is not None
    found, whole = history.scores(world.log, world.topic(Topic.SCORES), incident)
    stamps = [score["media_us"] for score in found if score["type"] == "frame"]
    assert whole
    assert stamps[0] == pytest.approx(incident.first_us - history.LEAD_US, abs=500_000)
    assert stamps[-1] == pytest.approx(incident.last_us + history.LEAD_US, abs=500_000)
    monkeypatch.setattr(history, "MAX_SCORES", 10)
    found, whole = history.scores(world.log, world.topic(Topic.SCORES), incident)
    assert (len(found), whole) == (10, False)


def test_an_outage_of_the_log_is_said_and_survived(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(follow, "LOOK_S", 0.05)
    monkeypatch.setattr(follow, "AWAY_S", 0.05)
    view = View(world.config, SystemClock())
    follower = Follower(world.config, world.log, SystemClock(), view)
    follower.start()
    _until(lambda: view.ready)
    with monkeypatch.context() as outage:

        def away(*_: object) -> int:
            raise UnmaskError(Code.LOG_AWAY, "the cluster does not answer")

        outage.setattr(world.log, "end_offset", away)
        _until(lambda: view.away == "the cluster does not answer")
        assert view.changes(0)["away"] == "the cluster does not answer"
    world.list_source("studio")
    _until(lambda: view.away is None and view.card("studio") is not None)
    assert follower.stop(30)
    assert "cannot read the log, trying again" in caplog.text


def test_what_fails_otherwise_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(follow, "LOOK_S", 0.05)
    monkeypatch.setattr(follow, "AWAY_S", 0.05)
    view = View(world.config, SystemClock())
    calls: list[int] = []

    def tick() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("nobody thought of this")
        View.tick(view)

    monkeypatch.setattr(view, "tick", tick)
    follower = Follower(world.config, world.log, SystemClock(), view)
    follower.start()
    _until(lambda: view.ready)
    assert follower.stop(30)
    assert "nobody thought of this" in caplog.text


def test_a_server_that_never_started_stops(tmp_path: Path) -> None:
    world = World(tmp_path, web=Web(listen="127.0.0.1:0"))
    assert WebServer(world.config, world.log, world.clock).stop(5)
    world.close()


def test_scores_that_nobody_can_read_are_counted(world: World) -> None:
    record = OutRecord(world.topic(Topic.SCORES), "studio", json.dumps([1]).encode(), {}, 1)
    world.send(record)
    world.follower.add_up()
    assert world.view.unreadable == 1


def _until(reached: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)
