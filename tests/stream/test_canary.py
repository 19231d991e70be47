"""The canary: seen by whoever watches, noticed when nobody does, and by moderation never."""

import contextlib
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from stream.canary import canary_id
from stream.marker import write_clip
from stream.records import Topic
from tests.stream.detecting import Detect, chunked, kinds
from tests.stream.hooked import HANG_CANARY
from tests.stream.servers import free_port
from tests.stream.services import PARTITIONS, Cluster, cluster, service, until

START_US = 1_700_000_000_000_000
QUICK = {"canary.every_s": "1", "canary.within_s": "4"}


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "red.mp4", 3, [(0, 3)], bframes=0)


def test_a_worker_answers_it_and_nothing_else_shows_it(tmp_path: Path, red: Path) -> None:
    made = Detect(tmp_path)
    made.write(chunked(red, canary_id(2), START_US), partition=2)
    made.run()
    (answer,) = made.values(Topic.CANARY)
    assert answer["stream"] == "canary~2"
    assert answer["attachment"] == f"{START_US:016x}"
    assert made.alerts() == []
    assert made.dead() == []
    assert made.values(Topic.SCORES) == []
    assert not list((tmp_path / "evidence").rglob("*.*"))
    assert {record.key for record in made.records(Topic.STATE)} == {"#position"}


def test_it_is_no_feed_of_any_other_partition(tmp_path: Path, red: Path) -> None:
    made = Detect(tmp_path)
    made.write(chunked(red, canary_id(2), START_US), partition=3)
    made.run()
    assert made.values(Topic.CANARY) == []
    assert {record.headers["dead_code"] for record in made.dead()} == {b"chunk_invalid"}


def test_it_is_answered_beside_feeds_that_are_not_disturbed(tmp_path: Path, red: Path) -> None:
    clip = write_clip(tmp_path / "calm.mp4", 6)
    made = Detect(tmp_path)
    made.list_source("a")
    mixed = [*chunked(clip, "a", START_US)[:5], *chunked(red, canary_id(0), START_US)]
    made.write([*mixed, *chunked(clip, "a", START_US)[5:]])
    made.write(chunked(red, canary_id(0), START_US + 60_000_000))
    made.run()
    assert len(made.values(Topic.CANARY)) == 2
    assert len(made.frames("a")) == 12
    assert kinds(made.alerts()) == []


@pytest.fixture
def made(servers: str) -> Iterator[Cluster]:
    with cluster(servers, f"t{uuid.uuid4().hex[:8]}") as found:
        yield found


def test_each_silent_stop_is_noticed(made: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = tmp_path / "hang"
    monkeypatch.setenv(HANG_CANARY, str(hang))
    port = free_port()
    settings = {**made.settings(), **QUICK, "worker.stall_s": "60"}
    with (
        service(tmp_path / "detect", settings, "detect", hooks=True) as detect,
        service(tmp_path / "canary", settings, "canary", **{"worker.metrics_port": str(port)}) as canary,
    ):
        well = [1.0] * PARTITIONS
        until(lambda: oks(port) == well, detect, canary)
        # Its heart beats on in a broker's eyes for as long as the session lasts.
        with stopped(detect.process.pid):
            until(lambda: oks(port) == [0.0] * PARTITIONS, canary)
        until(lambda: oks(port) == well, detect, canary)
        # No decoder starts any more.
        with contextlib.ExitStack() as stack:
            for child in psutil.Process(detect.process.pid).children(recursive=True):
                stack.enter_context(stopped(child.pid))
            until(lambda: oks(port) == [0.0] * PARTITIONS, detect, canary)
        until(lambda: oks(port) == well, detect, canary)
        hang.touch()  # the device
        until(lambda: oks(port) == [0.0] * PARTITIONS, detect, canary)
        assert detect.process.poll() is None
        hang.unlink()
        until(lambda: oks(port) == well, detect, canary)
        detect.end()  # nobody is there
        until(lambda: oks(port) == [0.0] * PARTITIONS, canary)
        assert "partition 0: MISSED, no answer in 4 s" in canary.said()
        canary.signal(signal.SIGTERM)
        assert canary.wait() == 1
    assert made.records(Topic.ALERTS) == []
    assert made.records(Topic.SCORES) == []
    assert made.records(Topic.DEADLETTER) == []


def test_one_round_tells_by_its_exit_code(made: Cluster, tmp_path: Path) -> None:
    settings = {**made.settings(), **QUICK, "canary.every_s": "0"}
    with service(tmp_path / "nobody", settings, "canary", "--once") as alone:
        assert alone.wait() == 1
        assert alone.said().count("MISSED") == PARTITIONS
    with service(tmp_path / "off", settings, "canary") as off:
        assert off.wait() == 2
        assert "canary.every_s is 0" in off.said()
    with service(tmp_path / "detect", settings, "detect") as detect:
        patient = {**settings, "canary.within_s": "40"}
        with service(tmp_path / "watched", patient, "canary", "--once") as watched:
            assert watched.wait() == 0, detect.said()
            assert watched.said().count("ok, answered in") == PARTITIONS


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def oks(port: int) -> list[float]:
    """Return what the canary process exports, by partition."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return []
    return [float(line.split()[1]) for line in lines if line.startswith("unmask_canary_ok{")]
