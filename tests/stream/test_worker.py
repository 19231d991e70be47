"""Detect from chunks to incidents, over the embedded log, with a member that knows the truth."""

import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from detectors.readings import FaceReading, Image
from stream.clock import Deadline
from stream.config import Incidents, LogSettings, Media
from stream.config import Worker as Settings
from stream.errors import Code, UnmaskError
from stream.log import Consumer, Listener, TopicPartition
from stream.marker import write_clip
from stream.records import Kind, OutRecord, Record, Topic
from stream.states import POSITION_KEY, read_states
from stream.worker import Worker
from tests.stream.detecting import Away, Detect, Faulty, chunked, fencing, kinds, unknown

START_US = 1_700_000_000_000_000
SECOND = 1_000_000


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 s: authentic, manipulated from 6 to 14 s, authentic, nobody from 20 to 22 s, authentic."""
    return write_clip(tmp_path_factory.mktemp("clips") / "planted.mp4", 24, [(6, 14)], [(20, 22)])


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "calm.mp4", 10)


def detect(folder: Path, *clips: tuple[str, Path], commit_ms: int = 500) -> Detect:
    """Return a data folder with the clips in its media topic."""
    made = Detect(folder, log=LogSettings(commit_ms=commit_ms))
    for number, (stream, clip) in enumerate(clips):
        made.list_source(stream)
        made.write(chunked(clip, stream, START_US), partition=number % 2)
    return made


def test_a_planted_stretch_becomes_one_incident_with_evidence(tmp_path: Path, planted: Path) -> None:
    made = detect(tmp_path, ("a", planted))
    made.run()
    alerts = made.alerts()
    assert kinds(alerts)[0] == "incident.opened"
    assert kinds(alerts).count("incident.opened") == kinds(alerts).count("incident.closed") == 1
    assert [alert["id"].rpartition(".")[2] for alert in alerts] == [str(n) for n in range(1, len(alerts) + 1)]
    opened = alerts[0]["data"]
    assert START_US + 6 * SECOND <= opened["first_media_us"] <= START_US + 9 * SECOND
    assert any(item["ref"].startswith("evidence://") for item in opened["evidence"])
    clips = [item for alert in alerts for item in alert["data"]["evidence"] if item["kind"] == "clip"]
    assert clips
    assert made.evidence.path(clips[0]["ref"]).suffix == ".mp4"


def test_every_sampled_frame_is_accounted_for(tmp_path: Path, calm: Path) -> None:
    made = detect(tmp_path, ("a", calm))
    made.run()
    times = [frame["media_us"] for frame in made.frames("a")]
    assert times == [START_US + frame * SECOND // 25 for n in range(20) for frame in [-(-n * 25 // 2)]]
    assert made.alerts() == []


def test_streams_of_one_partition_and_of_others_do_not_disturb_each_other(
    tmp_path: Path, calm: Path, planted: Path
) -> None:
    alone = detect(tmp_path / "alone", ("b", planted))
    alone.run()
    together = detect(tmp_path / "together", ("a", calm), ("b", planted), ("c", calm), ("d", calm))
    together.run()
    assert together.frames("b") == alone.frames("b")
    assert [alert["subject"] for alert in together.alerts()] == ["b"] * len(alone.alerts())


def test_any_restart_point_gives_the_same_scores_and_incidents(tmp_path: Path, planted: Path) -> None:
    whole = detect(tmp_path / "whole", ("a", planted))
    whole.run()
    expected = whole.alerts()
    rng = random.Random(41)
    broken = detect(tmp_path / "broken", ("a", planted), commit_ms=20)
    killed = 0
    for _ in range(12):
        killed += broken.run_killed(after_commits=rng.randrange(0, 3))
    broken.run()
    assert killed >= 6
    assert broken.frames("a") == whole.frames("a")
    assert [told(alert) for alert in broken.alerts()] == [told(alert) for alert in expected]


def told(alert: dict[str, object]) -> str:
    """Return what an alert says, without when it was said and what the clock read."""
    data = {key: value for key, value in dict(alert["data"]).items() if "latency" not in key}  # type: ignore[call-overload]
    return json.dumps({"id": alert["id"], "type": alert["type"], "data": data}, sort_keys=True)


def test_an_incident_left_open_by_a_stopped_worker_is_closed_by_the_next(
    tmp_path: Path, planted: Path
) -> None:
    made = detect(tmp_path, ("a", planted))
    made.run(until=lambda d: "incident.opened" in kinds(d.alerts()))
    first = kinds(made.alerts())
    made.run()
    assert kinds(made.alerts()).count("incident.opened") == 1
    assert kinds(made.alerts())[-1] != "incident.opened"
    assert first[0] == "incident.opened"
    assert len({alert["id"].rpartition(".")[0] for alert in made.alerts()}) == 1


class Deeper:
    """Heavy members that notes which pictures it was asked for, by their shade."""

    def __init__(self) -> None:
        self.pictures = 0

    def deepen(self, image: Image, faces: Sequence[FaceReading]) -> tuple[FaceReading, ...]:
        self.pictures += 1
        return tuple(replace(face, logits=face.logits | {"heavy": 7.0}, fused=6.5) for face in faces)


def test_heavy_members_read_what_is_suspect_and_nothing_else(
    tmp_path: Path, planted: Path, calm: Path
) -> None:
    made = detect(tmp_path, ("a", planted), ("b", calm))
    made.heavy = heavy = Deeper()
    made.run()
    deep = [frame for frame in made.frames("a") if any("heavy" in face["logits"] for face in frame["faces"])]
    assert heavy.pictures == len(deep) > 0
    assert all(face["fused"] == 6.5 for frame in deep for face in frame["faces"])
    assert min(frame["media_us"] for frame in deep) > START_US + 6 * SECOND
    assert not any("heavy" in face["logits"] for frame in made.frames("b") for face in frame["faces"])
    exported = generate_latest(made.metrics.registry).decode()
    assert f'unmask_heavy_pictures_total{{outcome="read"}} {heavy.pictures}.0' in exported
    opened = made.alerts()[0]["data"]
    assert opened["event"] == "opened"


def test_a_stream_nobody_listed_is_dead_lettered(tmp_path: Path, calm: Path) -> None:
    made = Detect(tmp_path)
    made.write(chunked(calm, "stranger", START_US)[:3])
    made.run()
    assert [record.headers["dead_code"] for record in made.dead()] == [b"chunk_invalid"] * 3
    assert made.frames("stranger") == []


def test_a_damaged_chunk_is_dead_lettered_and_the_rest_goes_on(tmp_path: Path, planted: Path) -> None:
    made = Detect(tmp_path)
    made.list_source("a")
    chunks = chunked(planted, "a", START_US)
    meta, value = chunks[5]
    chunks[5] = (meta, b"\0" * len(value))
    made.write(chunks)
    made.run()
    assert made.dead()[-1].headers["dead_culprit"] == b"1"
    assert made.dead()[-1].headers["sequence"] == b"5"
    assert "incident.opened" in kinds(made.alerts())
    values = made.values(Topic.SCORES)
    assert any(value["type"] == "dropped" and value["reason"] == "CORRUPT" for value in values)


def test_what_is_too_old_is_skipped_and_counted(tmp_path: Path, calm: Path) -> None:
    made = Detect(tmp_path)
    made.list_source("a")
    live = [(replace(meta, kind=Kind.LIVE), value) for meta, value in chunked(calm, "a", START_US)]
    made.write(live)
    made.run()
    dropped = [value for value in made.values(Topic.SCORES) if value["type"] == "dropped"]
    assert made.frames("a") == []
    assert sum(value["frames"] for value in dropped if value["reason"] == "STALE") == 20


def test_a_worker_that_was_fenced_goes_on_when_it_gets_its_partitions_back(
    tmp_path: Path, planted: Path
) -> None:
    whole = detect(tmp_path / "whole", ("a", planted))
    whole.run()
    fenced = detect(tmp_path / "fenced", ("a", planted), commit_ms=20)
    fenced.run(log=fencing(fenced.log, (2, 5)))
    assert fenced.frames("a") == whole.frames("a")
    assert [told(alert) for alert in fenced.alerts()] == [told(alert) for alert in whole.alerts()]


def test_a_log_that_takes_nothing_for_a_while_costs_nothing(tmp_path: Path, planted: Path) -> None:
    whole = detect(tmp_path / "whole", ("a", planted))
    whole.run()
    full = detect(tmp_path / "full", ("a", planted), commit_ms=20)

    def fail(commit: int, consumer: Consumer) -> None:
        if commit in (1, 2, 6):
            raise UnmaskError(Code.LOG_FULL, "no space left")

    full.run(log=Faulty(full.log, fail))
    assert full.frames("a") == whole.frames("a")
    assert [told(alert) for alert in full.alerts()] == [told(alert) for alert in whole.alerts()]


def test_a_log_that_takes_nothing_any_more_is_an_error(tmp_path: Path, calm: Path) -> None:
    made = Detect(tmp_path, worker=Settings(stall_s=0.2))
    made.list_source("a")
    made.write(chunked(calm, "a", START_US))

    def fail(commit: int, consumer: Consumer) -> None:
        raise UnmaskError(Code.LOG_FULL, "no space left")

    worker = made.worker(Faulty(made.log, fail))
    with pytest.raises(UnmaskError, match="no space left"):
        worker.run()
    assert isinstance(worker.error, UnmaskError)


def test_a_worker_that_cannot_join_says_so(tmp_path: Path) -> None:
    class Shut:
        def consumer(self, *args: object) -> Consumer:
            raise UnmaskError(Code.LOG_UNUSABLE, "the disk hangs")

    worker = Detect(tmp_path).worker(Shut())
    with pytest.raises(UnmaskError, match="the disk hangs"):
        worker.run()
    assert worker.error is not None
    assert not worker.healthy()


def test_what_was_written_before_the_drain_is_read_before_the_end(tmp_path: Path, calm: Path) -> None:
    made = detect(tmp_path, ("a", calm))
    worker = made.worker()
    worker.drain(Deadline(30, made.clock), close_incidents=True)
    worker.run()
    assert made.all_applied()
    assert len(made.frames("a")) == 20


def test_a_stream_in_two_partitions_is_read_from_its_own(tmp_path: Path, calm: Path) -> None:
    made = detect(tmp_path, ("a", calm))
    made.run()
    made.write(chunked(calm, "a", START_US)[:4], partition=3)
    made.run()
    assert len(made.frames("a")) == 20
    assert len(made.dead()) == 4


def test_a_time_that_is_no_date_is_dead_lettered(tmp_path: Path, calm: Path) -> None:
    made = detect(tmp_path, ("good", calm))
    made.list_source("bad")
    chunks = [
        (replace(meta, kind=Kind.LIVE, epoch_anchor_us=10**18), value)
        for meta, value in chunked(calm, "bad", START_US)
    ]
    made.write(chunks, partition=2)
    made.run()
    assert len(made.dead()) == len(chunks)
    assert len(made.frames("good")) == 20


def up(made: Detect, stream: str) -> float | None:
    return made.metrics.registry.get_sample_value("unmask_stream_up", {"stream": stream})


def test_a_feed_whose_records_stop_is_unwatched_and_not_up(tmp_path: Path, calm: Path) -> None:
    made = Detect(tmp_path, incidents=Incidents(orphan_s=0.5))
    made.list_source("a")
    made.write([(replace(meta, kind=Kind.LIVE), value) for meta, value in chunked(calm, "a", START_US)[:4]])
    made.run(until=lambda d: "feed.unwatched" in kinds(d.alerts()) and up(d, "a") == 0)
    assert kinds(made.alerts()) == ["feed.up", "feed.unwatched"]
    assert up(made, "a") is None  # another worker's to say


def test_a_listed_feed_of_which_no_record_ever_comes_is_unwatched(tmp_path: Path) -> None:
    made = Detect(tmp_path, incidents=Incidents(orphan_s=0.5))
    made.list_source("a")
    made.run(until=lambda d: bool(d.alerts()) and up(d, "a") == 0)
    assert kinds(made.alerts()) == ["feed.unwatched"]
    assert up(made, "a") is None
    assert states(made) == set()


def test_records_that_cannot_be_read_do_not_count_as_watching(tmp_path: Path, calm: Path) -> None:
    made = Detect(tmp_path, incidents=Incidents(orphan_s=0.5))
    made.list_source("a")
    made.write(
        [(replace(meta, epoch_anchor_us=10**18), value) for meta, value in chunked(calm, "a", START_US)]
    )
    made.run(until=lambda d: bool(d.alerts()))
    assert kinds(made.alerts()) == ["feed.unwatched"]


def test_a_stream_that_ended_is_forgotten_when_its_media_is(tmp_path: Path, calm: Path) -> None:
    made = Detect(tmp_path, media=Media(retention_s=0.001))
    made.list_source("a")
    made.write(chunked(calm, "a", START_US))
    made.run()
    made.log.maintain()
    assert states(made) == {"a"}
    made.run(until=lambda d: "a" in states(d))
    made.unlist_source("a")
    made.run(until=lambda d: not states(d))


def states(made: Detect) -> set[str]:
    topic = made.topic(Topic.STATE)
    partitions = [TopicPartition(topic, number) for number in range(made.log.partitions(topic))]
    return {stream for partition in partitions for stream in read_states(made.log, partition)}


def test_losing_one_partition_costs_the_others_nothing(tmp_path: Path, calm: Path) -> None:
    made = detect(tmp_path, ("a", calm), ("b", calm))
    worker = made.worker(Revoking(made))
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    deadline = Deadline(30, made.clock)
    while len(made.frames("a")) < 20 and not deadline.passed() and worker.error is None:
        made.clock.sleep(0.02)
    worker.drain(Deadline(5, made.clock))
    thread.join(10)
    assert worker.error is None
    assert len(made.frames("a")) == 20
    partition = TopicPartition(made.topic(Topic.MEDIA), 0)
    assert made.log.group_position("unmask-detect", partition) == made.log.end_offset(partition)


class Revoking:
    """A log whose consumer loses the second partition once the first records are on their way."""

    def __init__(self, made: Detect) -> None:
        self._made = made
        self._polls = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._made.log, name)

    def consumer(self, group: str, topics: Sequence[str], listener: Listener, member: str) -> object:
        consumer = self._made.log.consumer(group, topics, listener, member)
        poll, gone = consumer.poll, TopicPartition(topics[0], 1)

        def polled(max_records: int, timeout: float) -> Sequence[Record]:
            self._polls += 1
            if self._polls == 12:
                consumer.pause([gone])
                listener.lost([gone])
            found = poll(max_records, timeout)
            return [record for record in found if self._polls < 12 or record.partition != 1]

        consumer.poll = polled  # type: ignore[method-assign]
        return consumer


def test_a_log_that_is_away_is_borne_for_longer_than_any_stage_may_hang(
    tmp_path: Path, planted: Path
) -> None:
    whole = detect(tmp_path / "whole", ("a", planted))
    whole.run()
    made = Detect(tmp_path / "away", worker=Settings(stall_s=2.0), log=LogSettings(commit_ms=20))
    made.list_source("a")
    made.write(chunked(planted, "a", START_US))
    log = Away(made.log)
    worker = made.worker(log)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    for _ in range(2):
        made.clock.sleep(0.3)
        log.away = True
        made.clock.sleep(3.0)
        assert worker.healthy()
        assert not worker.ready()
        log.away = False
    while kinds(made.alerts())[-1:] != ["incident.closed"] and worker.error is None:
        made.clock.sleep(0.05)
    finish(made, worker, thread)
    assert made.frames("a") == whole.frames("a")
    # A clip that had to wait comes later, and says what was known by then.
    assert [alert["id"] for alert in made.alerts()] == [alert["id"] for alert in whole.alerts()]
    assert kinds(made.alerts()) == kinds(whole.alerts())
    assert (made.metrics.registry.get_sample_value("unmask_log_away_total") or 0) > 3


def finish(made: Detect, worker: Worker, thread: threading.Thread) -> None:
    deadline = Deadline(30, made.clock)
    while not made.all_applied() and not deadline.passed() and worker.error is None:
        made.clock.sleep(0.02)
    worker.drain(Deadline(5, made.clock))
    thread.join(10)
    assert worker.error is None
    assert made.all_applied()


def test_what_is_not_heard_while_the_log_is_away_is_no_silence(tmp_path: Path, calm: Path) -> None:
    made = Detect(tmp_path, incidents=Incidents(orphan_s=1.5), log=LogSettings(commit_ms=20))
    made.list_source("a")
    made.list_source("never")
    chunks = [(replace(meta, kind=Kind.LIVE), value) for meta, value in chunked(calm, "a", START_US)]
    made.write(chunks[:4])
    log = Away(made.log)
    worker = made.worker(log)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    made.clock.sleep(0.5)
    log.away = True
    made.clock.sleep(2.0)
    log.away = False
    deadline = Deadline(20, made.clock)
    while not worker.ready():
        assert not deadline.passed()
        made.clock.sleep(0.02)
    assert "feed.unwatched" not in kinds(made.alerts())
    while kinds(made.alerts()).count("feed.unwatched") < 2:
        assert not deadline.passed()
        made.clock.sleep(0.02)
    finish(made, worker, thread)


def test_a_new_stream_is_no_stranger_because_the_list_cannot_be_read(tmp_path: Path, calm: Path) -> None:
    made = Detect(tmp_path)
    log = Away(made.log)
    worker = made.worker(log)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    worker.assigned_once.wait(10)
    read, fails = log._log.read, [True] * 3

    def failing(partition: TopicPartition, *args: int) -> Iterator[Record]:
        if partition.topic.endswith("sources") and fails:
            fails.pop()
            raise UnmaskError(Code.LOG_AWAY, "no answer in 20 s")
        return read(partition, *args)

    log._log.read = failing  # type: ignore[method-assign]
    made.list_source("a")
    made.write(chunked(calm, "a", START_US))
    finish(made, worker, thread)
    assert not fails
    assert made.dead() == []
    assert len(made.frames("a")) == 20


@pytest.mark.parametrize("damaged", [True, False])
def test_letters_and_clips_wait_for_a_log_that_is_away(tmp_path: Path, planted: Path, damaged: bool) -> None:
    made = Detect(tmp_path, log=LogSettings(commit_ms=20))
    made.list_source("a")
    chunks = chunked(planted, "a", START_US)
    if damaged:
        meta, value = chunks[5]
        chunks[5] = (meta, b"\0" * len(value))
    made.write(chunks)
    fails = [True] * 3

    class Shy(Away):
        def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
            def guarded(*args: Any) -> Any:
                if call.__name__ == "read" and args[0].topic.endswith("media") and fails:
                    fails.pop()
                    raise UnmaskError(Code.LOG_AWAY, "no answer in 20 s")
                return call(*args)

            return guarded

    made.run(log=Shy(made.log), until=lambda d: d.all_applied() and not fails and (damaged or clips(d)))
    assert [record.headers["sequence"] for record in made.dead()][-1:] == ([b"5"] if damaged else [])
    assert kinds(made.alerts()).count("incident.opened") == 1


def clips(made: Detect) -> bool:
    return any(item["kind"] == "clip" for alert in made.alerts() for item in alert["data"]["evidence"])


def test_a_commit_of_unknown_outcome_is_neither_doubled_nor_lost(tmp_path: Path, planted: Path) -> None:
    whole = detect(tmp_path / "whole", ("a", planted))
    whole.run()
    made = detect(tmp_path / "mute", ("a", planted), commit_ms=20)
    made.run(log=unknown(made.log, range(1, 12, 2)))
    assert made.frames("a") == whole.frames("a")
    assert [told(alert) for alert in made.alerts()] == [told(alert) for alert in whole.alerts()]


def test_states_written_at_another_position_are_refused_by_name(
    tmp_path: Path, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.states.AGREE_S", 0.2)
    made = detect(tmp_path, ("a", calm))
    made.run()
    state = made.topic(Topic.STATE)
    made._send([OutRecord(state, POSITION_KEY, b"3", {"schema": b"1"}, 0, partition=0)])
    worker = made.worker()
    with pytest.raises(UnmaskError, match=r"partition 0 is \d+ and its states were written at 3") as caught:
        worker.run()
    assert caught.value.code is Code.LOG_POSITION
    assert made.metrics.registry.get_sample_value("unmask_position_errors_total") == 1


def test_what_others_keep_beside_the_states_is_passed_over(tmp_path: Path, calm: Path) -> None:
    made = detect(tmp_path, ("a", calm))
    made._send([OutRecord(made.topic(Topic.STATE), "#ingest:a", b"not ours", {}, 0, partition=0)])
    made.run()
    assert len(made.frames("a")) == 20
    assert states(made) == {"a"}


def test_a_stream_is_looked_at_as_often_as_its_entry_asks(tmp_path: Path, calm: Path) -> None:
    made = detect(tmp_path, ("often", calm), ("odd", calm))
    made.list_source("often", fps=5)
    made.list_source("odd", fps="many")
    made.run()
    assert len(made.frames("often")) == 50
    assert len(made.frames("odd")) == 20
