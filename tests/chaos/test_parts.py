"""What the chaos runs stand on: feeds that go on, cuts that cut, clocks that step, a supervisor."""

import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest

from tests.chaos.feeds import clip_of, number_of, shown_at, write_clips
from tests.chaos.fleet import REPOSITORY, Fleet, Part
from tests.chaos.pictures import PLAN, Face, read
from tests.chaos.proxy import Cut, Zone
from tests.stream.servers import free_port

PATIENCE_S = 20.0


def until(done: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if done():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def echo() -> Iterator[int]:
    """A port where what is sent comes back."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        while data := connection.recv(1024):
            connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.close()


@pytest.fixture
def zone(echo: int) -> Iterator[tuple[Zone, int]]:
    here = free_port()
    zone = Zone([(here, echo)])
    yield zone, here
    zone.close()


def test_a_zone_carries_both_ways(zone: tuple[Zone, int]) -> None:
    with socket.create_connection(("127.0.0.1", zone[1]), PATIENCE_S) as client:
        client.sendall(b"hello")
        assert client.recv(16) == b"hello"
    assert until(lambda: zone[0].carried == 10)


def test_a_silent_cut_holds_everything_until_it_heals(zone: tuple[Zone, int]) -> None:
    with socket.create_connection(("127.0.0.1", zone[1]), PATIENCE_S) as client:
        client.sendall(b"a")
        assert client.recv(1) == b"a"
        zone[0].cut(Cut.SILENT)
        client.sendall(b"b")
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert zone[0].held > 0
        zone[0].heal()
        client.settimeout(PATIENCE_S)
        assert client.recv(1) == b"b"


def test_a_reset_breaks_connections_and_refuses_new_ones(zone: tuple[Zone, int]) -> None:
    with socket.create_connection(("127.0.0.1", zone[1]), PATIENCE_S) as client:
        client.sendall(b"a")
        assert client.recv(1) == b"a"
        zone[0].cut(Cut.RESET)
        client.settimeout(PATIENCE_S)
        assert client.recv(1) == b""
    with socket.create_connection(("127.0.0.1", zone[1]), PATIENCE_S) as again:
        again.settimeout(PATIENCE_S)
        assert again.recv(1) == b""


def test_a_feed_goes_on_while_nobody_watches_and_says_what_it_shows(tmp_path: Path) -> None:
    write_clips(tmp_path, 1)
    port, origin = free_port(), time.time() - 1000.0
    command = [sys.executable, "-m", "tests.chaos.feeds", str(tmp_path), str(port), "1", str(origin)]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    try:
        assert until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        for _ in range(2):
            with av.open(f"tcp://127.0.0.1:{port}", format="mpegts", options={"fpsprobesize": "0"}) as feed:
                frames = [frame for _, frame in zip(range(30), feed.decode(video=0), strict=False)]
            seen = [read(frame) for frame in frames]
            assert [item.number for item in seen] == [number_of(frame.pts) for frame in frames]
            assert {item.feed for item in seen} == {0}
            assert [item.face for item in seen] == [PLAN.face(item.number) for item in seen]
            assert [b.pts - a.pts for a, b in itertools.pairwise(frames)] == [3600] * 29
            # A second late at the latest: whoever comes does not get what was shown long ago.
            assert -1.0 < time.time() - shown_at(frames[-1].pts, origin) < PATIENCE_S
    finally:
        process.kill()
        process.wait()


def test_every_face_of_the_plan_can_be_read_back(tmp_path: Path) -> None:
    write_clips(tmp_path, 1)
    with av.open(str(clip_of(tmp_path, 0))) as clip:
        faces = [read(frame).face for frame in clip.decode(video=0)]
    assert faces == [PLAN.face(number) for number in range(PLAN.loop)]
    assert set(faces) == set(Face)


CLOCK = """
import time
while True:
    print(time.time(), time.time_ns(), time.monotonic(), flush=True)
    time.sleep(0.05)
"""


def test_a_parts_wall_clock_steps_and_its_monotonic_one_does_not(tmp_path: Path) -> None:
    part = Part("clock", [sys.executable, "-P", "-c", CLOCK], tmp_path)
    part.start()

    def newest() -> list[float]:
        lines = part.log.read_text().splitlines()
        return [float(value) for value in lines[-2].split()] if len(lines) > 2 else [0.0, 0.0, 0.0]

    try:
        assert until(lambda: abs(newest()[0] - time.time()) < 5)
        part.step_clock(-500.0)
        assert until(lambda: abs(newest()[0] - time.time() + 500) < 5)
        assert abs(newest()[1] / 1e9 - time.time() + 500) < 5
        assert abs(newest()[2] - time.monotonic()) < 5
    finally:
        part.end()


def test_the_supervisor_starts_again_what_ends_and_nothing_survives_it(tmp_path: Path) -> None:
    nested = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    fleet = Fleet()
    try:
        part = Part("sleeper", [sys.executable, "-c", nested], tmp_path)
        fleet.add(part)
        assert until(lambda: len(part.children()) == 1)
        first = part.kill()
        assert until(lambda: part.starts == 2 and part.pid is not None and len(part.children()) == 1)
        assert part.pid != first
        assert [end.code for end in part.exits] == [-9]
        assert fleet.unasked() == []
        assert len(part.left()) == 3
    finally:
        fleet.end()
    assert part.left() == []
