"""`unmask watch` as a process: files to their end, live feeds to Ctrl-C, and killed at the worst moment."""

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import psutil
import pytest

import stream
from stream import attachments
from stream.clock import SystemClock
from stream.config import Config
from stream.errors import UnmaskError
from stream.log import everything
from stream.marker import write_clip
from stream.records import Topic
from stream.sqlite_log import SqliteLog
from stream.topics import topic_name
from stream.watch import Session, structured
from tests.conftest import requires
from tests.stream.detecting import kinds
from tests.stream.live import live_feed, make_feed
from tests.stream.servers import Publisher, RtmpServer, running

SCHEMA = json.loads((Path(stream.__file__).parent / "alert.schema.json").read_text())
PATIENCE_S = 60.0
"""What a busy machine may need for what takes a quiet one a few seconds."""


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Watch:
    """A running `watch --json` whose lines are collected in a file."""

    def __init__(self, folder: Path, *sources: str) -> None:
        self.folder = folder
        self._out = folder / "out.jsonl"
        self._err = folder / "err.log"
        settings = [f"data_dir={folder / 'data'}", 'members.names=["marker"]']
        arguments = ["watch", *sources, "--json", *(part for text in settings for part in ("--set", text))]
        with self._out.open("ab") as out, self._err.open("ab") as err:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("unmask"), *arguments],
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                # A test run in the background ignores Ctrl-C, and would hand that on.
                preexec_fn=_heed_ctrl_c,
            )

    def events(self) -> list[dict[str, Any]]:
        lines = self._out.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def errors(self) -> str:
        return self._err.read_text()

    def until(self, reached: Callable[["Watch"], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not reached(self):
            assert time.monotonic() < end, self.errors()[-2000:]
            assert self.process.poll() is None, self.errors()[-2000:]
            time.sleep(0.05)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def watching(folder: Path, *sources: str) -> Iterator[Watch]:
    folder.mkdir(exist_ok=True)
    watch = Watch(folder, *sources)
    try:
        yield watch
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(watch.process.pid, signal.SIGKILL)
        watch.process.wait()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "planted.mp4", 24, [(4, 18)])


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manipulated all along: published over and over, its incident never closes by itself."""
    return write_clip(tmp_path_factory.mktemp("clips") / "red.mp4", 60, [(0, 60)])


def alerts(folder: Path) -> list[dict[str, Any]]:
    """Return what stands in the alerts topic of a data folder."""
    log = SqliteLog(folder / "data" / "log", Config().log, SystemClock())
    try:
        return [structured(record) for record in everything(log, topic_name(Config(), Topic.ALERTS))]
    finally:
        log.close()


def test_a_file_to_its_end(tmp_path: Path, planted: Path) -> None:
    with watching(tmp_path, str(planted)) as watch:
        assert watch.wait() == 0, watch.errors()
        events = watch.events()
    assert kinds(events)[0] == "incident.opened"
    assert kinds(events).count("incident.closed") == 1
    for event in events:
        jsonschema.validate(event, SCHEMA)
    assert events == alerts(tmp_path)


def test_the_same_file_again_is_a_new_story(tmp_path: Path, planted: Path) -> None:
    for number in (1, 2):
        with watching(tmp_path, str(planted)) as watch:
            assert watch.wait() == 0, watch.errors()
            assert kinds(watch.events()).count("incident.opened") == number


def test_after_a_kill_the_time_of_the_same_file_goes_on_behind_what_was_read_ahead(
    tmp_path: Path, planted: Path
) -> None:
    with watching(tmp_path, str(planted)) as watch:
        watch.until(lambda w: "incident.opened" in kinds(w.events()))
        watch.process.kill()
        watch.process.wait()
    with watching(tmp_path, str(planted)) as watch:
        assert watch.wait() == 0, watch.errors()
    log = SqliteLog(tmp_path / "data" / "log", Config().log, SystemClock())
    try:
        scores = [json.loads(r.value or b"") for r in everything(log, topic_name(Config(), Topic.SCORES))]
    finally:
        log.close()
    frames = [score for score in scores if score["type"] == "frame"]
    assert len({frame["attachment"] for frame in frames}) == 2
    times = [frame["media_us"] for frame in frames]
    assert all(later > earlier for earlier, later in itertools.pairwise(times))


def test_ctrl_c_ends_in_order_and_closes_the_incident(tmp_path: Path, red: Path) -> None:
    requires("nginx-rtmp", "ffmpeg")
    server = RtmpServer(tmp_path / "server")
    with running(server), running(Publisher(red, server.url())), watching(tmp_path, server.url()) as watch:
        watch.until(lambda w: "incident.opened" in kinds(w.events()))
        os.killpg(watch.process.pid, signal.SIGINT)
        assert watch.wait() == 0, watch.errors()
        said = kinds(watch.events())
    assert said.count("incident.opened") == said.count("incident.closed") == 1
    assert "Traceback" not in watch.errors()


def test_killed_and_started_again_the_incident_is_the_same(tmp_path: Path, red: Path) -> None:
    requires("nginx-rtmp", "ffmpeg")
    server = RtmpServer(tmp_path / "server")
    with running(server), running(Publisher(red, server.url())):
        with watching(tmp_path, server.url()) as watch:
            watch.until(lambda w: "incident.opened" in kinds(w.events()))
            children = psutil.Process(watch.process.pid).children(recursive=True)
            watch.process.kill()
            watch.process.wait()
            gone, alive = psutil.wait_procs(children, timeout=20)
            assert gone
            assert not alive
        known = len(alerts(tmp_path))
        with watching(tmp_path, server.url()) as watch:
            watch.until(lambda w: len(alerts(tmp_path)) > known)
            os.killpg(watch.process.pid, signal.SIGTERM)
            assert watch.wait() == 0, watch.errors()
    story = [event for event in alerts(tmp_path) if event["type"].startswith("unmask.incident.")]
    assert kinds(story).count("incident.opened") == 1
    assert kinds(story).count("incident.closed") == 1
    numbers = [int(event["id"].rpartition(".")[2]) for event in story]
    assert numbers == list(range(1, len(story) + 1))
    assert len({event["id"].rpartition(".")[0] for event in story}) == 1


def test_a_running_watch_follows_attach_and_detach(tmp_path: Path, planted: Path) -> None:
    settings = Config(data_dir=str(tmp_path / "data"))
    feed_file = make_feed(tmp_path)
    with live_feed(feed_file) as feed, watching(tmp_path, f"first={feed.address}") as watch:
        watch.until(lambda w: feed.readers == 1)
        attachments.attach(settings, str(planted), "second", None, [], io.StringIO())
        watch.until(lambda w: "incident.closed" in kinds(w.events()))
        assert feed.connections == 1
        attachments.detach(settings, "first", io.StringIO())
        # Only files are left, and they are over.
        assert watch.wait() == 0, watch.errors()
    opened = [event["subject"] for event in alerts(tmp_path) if event["type"].endswith("opened.v1")]
    assert opened == ["second"]


def test_a_second_watch_on_the_same_folder_says_who_is_there(tmp_path: Path, red: Path) -> None:
    requires("nginx-rtmp", "ffmpeg")
    server = RtmpServer(tmp_path / "server")
    with running(server), running(Publisher(red, server.url())), watching(tmp_path, server.url()) as first:
        first.until(lambda w: "incident.opened" in kinds(w.events()))
        second = Watch(tmp_path, str(red))
        assert second.wait() == 2
        assert "another unmask is at work" in first.errors()
        assert first.process.poll() is None


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("missing.mp4", "missing.mp4"),
        ("gopher://example", "gopher"),
    ],
)
def test_a_wrong_source_is_one_sentence_and_code_2(tmp_path: Path, source: str, sentence: str) -> None:
    with watching(tmp_path, source) as watch:
        assert watch.wait() == 2
        lines = watch.errors().splitlines()
    assert sentence in lines[-1]
    assert "Traceback" not in watch.errors()
    assert watch.events() == []


def test_a_file_that_is_no_video_is_code_2(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.mp4"
    garbage.write_bytes(b"no video" * 1000)
    with watching(tmp_path, str(garbage)) as watch:
        assert watch.wait() == 2
        assert "garbage" in watch.errors().splitlines()[-1]


def test_no_secret_of_a_source_is_ever_printed(tmp_path: Path) -> None:
    source = "cam=rtmp://operator:hunter22@127.0.0.1:9/live/x?token=sesame99"
    with watching(tmp_path, source) as watch:
        watch.until(lambda w: "refused" in w.errors() or "down" in " ".join(kinds(w.events())))
        watch.process.send_signal(signal.SIGINT)
        assert watch.wait() == 0
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hunter22" not in written
    assert b"sesame99" not in written


def test_a_detect_that_hangs_ends_the_watch() -> None:
    session = Session.__new__(Session)
    session._config = Config()
    worker = SimpleNamespace(error=None, healthy=lambda: False)
    worker.fail = lambda error: setattr(worker, "error", error)
    session._worker = worker  # type: ignore[assignment]
    assert session._over()
    with pytest.raises(UnmaskError, match="detect has done nothing"):
        session._outcome()
