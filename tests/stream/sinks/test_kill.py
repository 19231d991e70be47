"""kill -9 at the worst moments: nothing is lost, and what comes twice has the same id."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stream.clock import SystemClock
from stream.config import Config, LogSettings, Media
from stream.sinks.service import SinkService
from stream.sinks.settings import File, Webhook
from stream.sqlite_log import SqliteLog
from tests.stream.sinks.receivers import Receiver, receiver
from tests.stream.sinks.world import World, incident

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
ALERTS = 12
KILL_AT = (3, 7, 10)
"""Requests of which the sender dies: it has sent, the receiver has it, nothing is committed."""
PATIENCE_S = 90.0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_between_sending_and_commit(tmp_path: Path) -> None:
    world = World(tmp_path)
    with receiver() as there:
        child = start(tmp_path, there)
        wait(lambda: {"hook#position", "file#position"} <= world.states().keys())
        world.clock = SystemClock()  # type: ignore[assignment]
        killed = 0
        for number in range(ALERTS):
            world.write(incident(f"i{number % 3}", number + 1, "updated"))
        for at in KILL_AT:
            wait(lambda at=at: len(there.requests) >= at)  # type: ignore[misc]
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            killed += child.returncode == -signal.SIGKILL
            child = start(tmp_path, there)
        wait(lambda: len(set(delivered(there))) == ALERTS)
        wait(lambda: len(set(written(tmp_path))) == ALERTS)
        child.kill()
        child.wait()
    wanted = [f"i{number % 3}.{number + 1}" for number in range(ALERTS)]
    assert killed == len(KILL_AT)
    for found in (delivered(there), written(tmp_path)):
        assert list(dict.fromkeys(found)) == wanted
        assert len(found) <= ALERTS + len(KILL_AT), "each death sends one again at most"
    by_event: dict[str, set[str]] = {}
    for request in there.requests:
        by_event.setdefault(json.loads(request.body)["id"], set()).add(request.headers["webhook-id"])
    assert all(len(ids) == 1 for ids in by_event.values())
    world.log.close()


def delivered(there: Receiver) -> list[str]:
    return [json.loads(request.body)["id"] for request in there.requests]


def written(folder: Path) -> list[str]:
    whole = (folder / "alerts").read_bytes().rpartition(b"\n")[0]
    return [json.loads(line)["id"] for line in whole.splitlines()]


def wait(reached: object) -> None:
    end = time.monotonic() + PATIENCE_S
    while not reached():  # type: ignore[operator]
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


def start(folder: Path, there: Receiver) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(folder), there.url],
        env={**os.environ, "HOOK_SECRET": SECRET},
        stdin=subprocess.DEVNULL,
    )


def serve(folder: Path, url: str) -> None:
    """A process with two sinks, slow enough to be caught between sending and commit."""
    config = Config(data_dir=str(folder), media=Media(partitions=2), log=LogSettings(lease_s=1.0))
    log = SqliteLog(folder / "log", config.log, SystemClock())
    sinks = {
        "hook": Webhook(type="webhook", url=url, secrets=("env:HOOK_SECRET",), allow_private=True),
        "file": File(type="file", path=str(folder / "alerts")),
    }
    service = SinkService(config, sinks, log, SystemClock(), random.Random())
    for loop in service._loops:
        commit = loop._commit

        def late(commit: object = commit, loop: object = loop) -> None:
            if getattr(loop, "_sent", False):
                time.sleep(0.2)
            commit()  # type: ignore[operator]

        loop._commit = late  # type: ignore[method-assign]
    service.start()
    threading.Event().wait()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
