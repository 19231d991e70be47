"""The server as a part of a process: it takes its port, follows the log, tells live, and stops in time."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from stream.clock import SystemClock
from stream.config import Config, Web
from stream.errors import Code, UnmaskError
from stream.serving import web_beside, web_server
from stream.web.access import Role, add_token, tokens_path
from stream.web.server import WebServer
from tests.stream.servers import free_port
from tests.stream.services import UNMASK, Service
from tests.stream.web.world import AUTHENTIC, World


class Running:
    """A world and a server of its own."""

    def __init__(self, folder: Path, **web: Any) -> None:
        self.world = World(folder, web=Web(**{"listen": "127.0.0.1:0", **web}))
        self.server = WebServer(self.world.config, self.world.log, self.world.clock)
        self.server.start()
        self.url = f"http://127.0.0.1:{self.server.port}"

    def until(self, path: str, reached: Callable[[Any], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while True:
            found = httpx.get(self.url + path, timeout=30)
            told = found.json() if found.headers["content-type"] == "application/json" else found.text
            if found.status_code == 200 and reached(told):
                return
            assert time.monotonic() < end, f"{path} says {found.status_code} {found.text[:300]}"
            time.sleep(0.2)

    def close(self) -> None:
        assert self.server.stop(30)
        self.world.close()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path)
    yield made
    made.close()


def test_it_is_ready_once_it_has_read_everything_and_follows_from_there(running: Running) -> None:
    running.until("/readyz", lambda told: told == "ok\n")
    running.world.list_source("studio")
    running.world.tell(AUTHENTIC)
    running.until("/api/wall", lambda told: [one["verdict"] for one in told["feeds"]] == ["authentic"])
    running.until("/api/coverage", lambda told: [row["stream"] for row in told["rows"]] == ["studio"])


def test_changes_are_told_live_and_a_stop_ends_listeners(tmp_path: Path) -> None:
    running = Running(tmp_path)
    heard: list[dict[str, Any]] = []
    ended = threading.Event()

    def listen() -> None:
        with httpx.stream("GET", f"{running.url}/api/events", timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            told = (line.removeprefix("data: ") for line in answer.iter_lines() if line[:6] == "data: ")
            heard.extend(json.loads(text) for text in told if text != "{}")
        ended.set()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    running.world.list_source("studio")
    running.world.tell(AUTHENTIC)
    _until(lambda: any(card["verdict"] == "authentic" for told in heard for card in told["feeds"]))
    assert heard[0]["whole"]
    running.world.list_source("other")
    _until(lambda: "other" in [card["id"] for card in heard[-1]["feeds"]])
    assert not heard[-1]["whole"]
    running.close()
    assert ended.wait(30)
    assert not running.server.alive()


def _until(reached: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_port_that_is_taken_is_said(running: Running) -> None:
    config = Config(
        data_dir=running.world.config.data_dir, web=Web(listen=f"127.0.0.1:{running.server.port}")
    )
    with pytest.raises(UnmaskError, match="name a free port of this machine, or off"):
        web_server(config, running.world.log, SystemClock())
    with pytest.raises(UnmaskError, match="name a free port"):
        web_beside(config, running.world.log, SystemClock())


def test_watch_goes_on_without_where_only_the_default_port_is_taken(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def taken(*_: object) -> None:
        raise UnmaskError(Code.CONFIG, "the port is taken")

    monkeypatch.setattr("stream.serving.web_server", taken)
    assert web_beside(Config(), running.world.log, SystemClock()) is None
    assert "no web interface: the port is taken" in caplog.text
    assert web_beside(Config(web=Web(listen="off")), running.world.log, SystemClock()) is None


def test_watch_goes_on_without_the_extra_and_serve_says_what_is_missing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "stream.web.server", None)
    assert web_beside(Config(), world.log, SystemClock()) is None
    with pytest.raises(UnmaskError, match=r"pip install 'unmask\[serve\]'") as caught:
        web_server(world.config, world.log, SystemClock())
    assert caught.value.code is Code.PROGRAM_MISSING


def test_beyond_loopback_nobody_is_let_in_without_a_token(world: World) -> None:
    config = world.config.model_copy(update={"web": Web(listen="0.0.0.0:0")})
    with pytest.raises(UnmaskError, match="nobody has a token; make one with unmask tokens add"):
        WebServer(config, world.log, world.clock)
    token = add_token(tokens_path(config), "ada", Role.VIEWER)
    server = WebServer(config, world.log, world.clock)
    server.start()
    try:
        url = f"http://127.0.0.1:{server.port}/api/wall"
        assert httpx.get(url, timeout=30).status_code == 401
        assert httpx.get(url, headers={"authorization": f"Bearer {token}"}, timeout=30).status_code == 200
    finally:
        assert server.stop(30)


def test_a_port_beyond_the_last_is_refused(world: World) -> None:
    config = world.config.model_copy(update={"web": Web(listen="127.0.0.1:70000")})
    with pytest.raises(UnmaskError, match="its port must be at most 65535"):
        WebServer(config, world.log, world.clock)


def test_serve_as_a_process_beside_the_data_folder(tmp_path: Path) -> None:
    folder = f"data_dir={tmp_path / 'serve' / 'data'}"
    made = subprocess.run(
        [UNMASK, "tokens", "add", "ada", "--role", "operator", "--set", folder],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    port = free_port()
    settings = {"web.listen": f"127.0.0.1:{port}", "web.auth": "always"}
    service = Service(tmp_path / "serve", settings, "serve")
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 100
        while True:
            assert time.monotonic() < end, service.said()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/readyz", timeout=10).status_code == 200:
                    break
            time.sleep(0.2)
        assert httpx.get(f"{url}/api/wall", timeout=30).status_code == 401
        bearer = {"authorization": f"Bearer {made.stdout.strip()}"}
        assert httpx.get(f"{url}/api/wall", headers=bearer, timeout=30).json()["feeds"] == []
        assert made.stdout.strip() not in service.said()
        service.signal(signal.SIGTERM)
        assert service.wait() == 0, service.said()
        assert f"the web interface is at {url}" in service.said()
    finally:
        service.end()
