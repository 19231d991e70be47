"""Clips are cut beside the worker's loop: no stream waits for another's, and none is lost."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from stream import clip_child
from stream.clip_child import ClipJob
from stream.clipping import Clipper, readable
from stream.clips import MP4, Clip
from stream.clock import Deadline, FakeClock
from stream.config import Decode, Freshness, LogSettings
from stream.config import Worker as Settings
from stream.errors import Code, UnmaskError
from stream.incidents import ClipRequest
from stream.log import Consumer, PositionError, TopicPartition
from stream.marker import write_clip
from stream.pulse import LOG_CALL_S
from stream.records import Kind, Record
from stream.worker import Worker
from tests.stream.detecting import Detect, Faulty, chunked, kinds

START_US = 1_700_000_000_000_000
PARTITION = TopicPartition("media", 0)
PATIENCE_S = 30.0


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 s, manipulated from 3 to 10 s."""
    return write_clip(tmp_path_factory.mktemp("clips") / "planted.mp4", 16, [(3, 10)])


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "calm.mp4", 10)


class Cutter:
    """Cuts clips as ever, once it may."""

    def __init__(self) -> None:
        self.began, self.may = threading.Event(), threading.Event()
        self.jobs: list[ClipJob] = []

    def __call__(self, job: ClipJob, memory_limit_bytes: int, timeout: float) -> Clip:
        self.jobs.append(job)
        self.began.set()
        self.may.wait(PATIENCE_S)
        return clip_child.cut_apart(job, memory_limit_bytes, timeout)


@pytest.fixture
def cutter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cutter]:
    made = Cutter()
    monkeypatch.setattr("stream.clipping.cut_apart", made)
    yield made
    made.may.set()


class Working:
    """A worker in a thread of its own."""

    def __init__(self, made: Detect, log: object = None) -> None:
        self.made = made
        self.worker: Worker = made.worker(log)
        self._thread = threading.Thread(target=self.worker.run, daemon=True)
        self._thread.start()

    def until(self, reached: object) -> None:
        deadline = Deadline(PATIENCE_S, self.made.clock)
        while not reached():  # type: ignore[operator]
            assert not deadline.passed()
            assert self.worker.error is None
            self.made.clock.sleep(0.02)

    def stop(self, seconds: float = 10.0, close_incidents: bool = False) -> None:
        self.worker.drain(Deadline(seconds, self.made.clock), close_incidents)
        self._thread.join(seconds + 5)
        assert not self._thread.is_alive()
        assert self.worker.error is None


def detect(folder: Path, *clips: tuple[str, Path], deterministic: bool = True) -> Detect:
    """Return a data folder with the clips in one partition of its media topic."""
    made = Detect(folder, log=LogSettings(commit_ms=20), freshness=Freshness(on_late="score"))
    made.config = made.config.model_copy(update={"deterministic": deterministic})
    for stream, clip in clips:
        made.list_source(stream)
        made.write(chunked(clip, stream, START_US))
    return made


def clips(made: Detect) -> set[tuple[str, str]]:
    """Return stream and reference of every clip that an event names."""
    found = {
        (alert["subject"], item["ref"])
        for alert in made.alerts()
        for item in alert["data"].get("evidence", [])
        if item["kind"] == "clip"
    }
    assert all(made.evidence.path(reference).suffix == ".mp4" for _, reference in found)
    return found


def story(made: Detect) -> list[dict[str, object]]:
    """Return what was said, without when."""
    return [
        {"id": alert["id"], "type": alert["type"]}
        | {key: value for key, value in alert["data"].items() if "latency" not in key}
        for alert in made.alerts()
    ]


def metric(made: Detect, name: str) -> float | None:
    return made.metrics.registry.get_sample_value(name)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_clip_that_takes_long_holds_up_no_other_stream(
    tmp_path: Path, planted: Path, calm: Path, cutter: Cutter, deterministic: bool
) -> None:
    whole = detect(tmp_path / "whole", ("a", planted))
    cutter.may.set()
    whole.run()
    cutter.may.clear()
    cutter.began.clear()
    made = detect(tmp_path / "slow", ("a", planted), deterministic=deterministic)
    working = Working(made)
    working.until(cutter.began.is_set)
    made.list_source("b")
    made.write(chunked(calm, "b", START_US))
    working.until(lambda: len(made.frames("b")) == 20)
    assert kinds(made.alerts()) == ["incident.opened"]
    assert not made.all_applied()
    assert working.worker.healthy()
    cutter.may.set()
    working.until(made.all_applied)
    working.stop()
    assert kinds(made.alerts()) == kinds(whole.alerts())
    assert made.frames("a") == whole.frames("a") or not deterministic
    assert story(made) == story(whole) or not deterministic
    assert len(clips(made)) == 1
    assert len(cutter.jobs) == 2


def test_a_live_stream_does_not_wait_for_its_own_clip(tmp_path: Path, planted: Path, cutter: Cutter) -> None:
    made = detect(tmp_path, deterministic=False)
    made.list_source("a")
    chunks = chunked(planted, "a", START_US)[:-1]
    made.write([(replace(meta, kind=Kind.LIVE), value) for meta, value in chunks])
    working = Working(made)
    working.until(made.all_applied)
    assert cutter.began.is_set()
    assert not clips(made)
    cutter.may.set()
    working.until(lambda: len(clips(made)) == 1)
    working.stop()


def test_a_clip_under_way_when_the_worker_stops_is_cut_by_the_next(
    tmp_path: Path, planted: Path, cutter: Cutter
) -> None:
    cutter.may.set()
    whole = detect(tmp_path / "whole", ("a", planted))
    whole.run()
    cutter.may.clear()
    made = detect(tmp_path / "handed", ("a", planted))
    cutter.began.clear()
    first = Working(made)
    first.until(cutter.began.is_set)
    first.until(lambda: kinds(made.alerts()) == ["incident.opened"])
    first.stop(seconds=1.0)
    assert kinds(made.alerts()) == ["incident.opened"]
    cutter.may.set()
    made.run()
    assert story(made) == story(whole)
    assert made.frames("a") == whole.frames("a")


def test_a_clip_of_partitions_that_went_and_came_back_is_cut_anew(
    tmp_path: Path, planted: Path, calm: Path, cutter: Cutter
) -> None:
    cutter.may.set()
    whole = detect(tmp_path / "whole", ("a", planted))
    whole.run()
    cutter.may.clear()
    made = detect(tmp_path / "lost", ("a", planted))
    cutter.jobs.clear()
    fenced: list[int] = []

    def fence(commit: int, consumer: Consumer) -> None:
        if cutter.jobs and not fenced:
            fenced.append(commit)
            consumer._lease.release(consumer._database)  # type: ignore[attr-defined]

    working = Working(made, Faulty(made.log, fence))
    working.until(cutter.began.is_set)
    made.list_source("b")
    made.write(chunked(calm, "b", START_US))
    working.until(lambda: len(made.frames("b")) == 20)
    assert len(fenced) == len(cutter.jobs) == 1
    cutter.may.set()
    working.until(made.all_applied)
    working.stop()
    assert len(cutter.jobs) == 2
    assert story(made) == story(whole)
    assert made.frames("a") == whole.frames("a")


def test_a_worker_that_is_told_to_stop_waits_for_the_clip(
    tmp_path: Path, planted: Path, cutter: Cutter
) -> None:
    made = detect(tmp_path, ("a", planted))
    working = Working(made)
    working.until(cutter.began.is_set)
    threading.Timer(0.5, cutter.may.set).start()
    working.stop(seconds=PATIENCE_S)
    assert len(clips(made)) == 1


@pytest.mark.parametrize("hangs", [False, True])
def test_watch_ends_with_its_clips_cut_and_its_incidents_closed_in_any_case(
    tmp_path: Path, planted: Path, cutter: Cutter, hangs: bool
) -> None:
    made = Detect(tmp_path, worker=Settings(shutdown_s=3.0))
    made.list_source("a")
    made.write(chunked(planted, "a", START_US)[:30])  # up to the opening, before a clip is due
    working = Working(made)
    working.until(made.all_applied)
    assert kinds(made.alerts()) == ["incident.opened"]
    if not hangs:
        cutter.may.set()
    working.stop(seconds=3.0 if hangs else PATIENCE_S, close_incidents=True)
    assert kinds(made.alerts())[-1] == "incident.closed"
    assert len(clips(made)) == (0 if hangs else 1)
    assert metric(made, "unmask_clips_failed_total") == hangs


def test_clips_for_which_there_is_no_room_wait(
    tmp_path: Path, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.clipping.QUEUE_CLIPS", 1)
    streams = ["a", "b", "c"]
    made = detect(tmp_path, *((stream, planted) for stream in streams))
    made.run()
    assert {stream for stream, _ in clips(made)} == set(streams)
    assert kinds(made.alerts()).count("incident.closed") == 3
    assert metric(made, "unmask_clips_failed_total") == 0


def test_a_stream_that_ended_is_not_done_with_before_its_incident_is_closed(
    tmp_path: Path, cutter: Cutter
) -> None:
    short = write_clip(tmp_path / "short.mp4", 12, [(3, 12)])
    made = detect(tmp_path, ("a", short), deterministic=False)
    working = Working(made)
    working.until(cutter.began.is_set)
    working.until(lambda: metric(made, "unmask_clips_waiting") == 1)
    assert working.worker.statuses[0].in_hand
    assert not made.all_applied()
    cutter.may.set()
    working.until(made.all_applied)
    assert kinds(made.alerts())[-1] == "incident.closed"
    working.stop()


def record(offset: int, key: str = "a") -> Record:
    return Record("media", 0, offset, key, b"", {}, 0)


class Holey:
    """A log of `records` of which those at `damaged` cannot be read, and those before `begin` went."""

    def __init__(self, records: Sequence[Record], damaged: Sequence[int] = (), begin: int = 0) -> None:
        self._records = records
        self._damaged = damaged
        self._begin = begin

    def partitions(self, topic: str) -> int:
        return 1

    def begin_offset(self, partition: TopicPartition) -> int:
        return self._begin

    def end_offset(self, partition: TopicPartition) -> int:
        return len(self._records)

    def read(self, partition: TopicPartition, start: int, stop: int | None = None) -> Iterator[Record]:
        for found in self._records[start:stop]:
            if found.offset in self._damaged:
                raise PositionError(Code.LOG_UNUSABLE, "damaged", partition, found.offset + 1)
            yield found


def test_what_the_log_holds_undamaged_is_read() -> None:
    log = Holey([record(offset) for offset in range(10)], damaged=[4, 5, 9], begin=2)
    assert [found.offset for found in readable(log, PARTITION, 0, 10)] == [2, 3, 6, 7, 8]
    assert [found.offset for found in readable(log, PARTITION, 3, 5)] == [3]


REQUEST = ClipRequest("a", "i", f"{1:016x}", 0, 0, 1, 0, from_offset=0, from_us=0, to_offset=4)


def test_a_clipper_takes_so_much_reads_its_own_and_is_stuck_when_nothing_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs: list[ClipJob] = []
    may, began = threading.Event(), threading.Event()

    def cut(job: ClipJob, memory_limit_bytes: int, timeout: float) -> Clip:
        jobs.append(job)
        began.set()
        may.wait(PATIENCE_S)
        if len(jobs) == 1:
            raise UnmaskError(Code.CHUNK_INVALID, "no keyframe")
        return Clip(b"", MP4, 0, 1)

    monkeypatch.setattr("stream.clipping.cut_apart", cut)
    monkeypatch.setattr("stream.clipping.QUEUE_CLIPS", 2)
    clock, log = FakeClock(), Holey([record(0), record(1, "b"), record(2), record(3, "b")])
    clipper: Clipper[str] = Clipper(log, Decode(), clock)
    assert not clipper.busy()
    assert [clipper.ask(owner, PARTITION, REQUEST) for owner in "xyz"] == [True, True, False]
    assert began.wait(PATIENCE_S)
    assert not clipper.stuck()
    clock.advance(LOG_CALL_S + 60)
    assert clipper.stuck()
    clipper.forget([TopicPartition("media", 1)])
    may.set()
    while not clipper.ask("w", PARTITION, REQUEST):
        found = clipper.take()
        if found:
            assert [(cut.owner, str(cut.found)) for cut in found[:1]] == [("x", "no keyframe")]
            break
    clipper.forget([PARTITION])
    clipper.stop(PATIENCE_S)
    assert not clipper.stuck()
    assert [len(job.records) for job in jobs] == [2] * len(jobs)
