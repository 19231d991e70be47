"""All of a chaos run: brokers, feeds, two ingest and three detect processes, and somebody who watches."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from tests.chaos import feeds
from tests.chaos.checker import Report, Rules, check
from tests.chaos.cluster import Cluster
from tests.chaos.fleet import REPOSITORY, UNMASK, Fleet, Part
from tests.chaos.observer import Observer
from tests.chaos.topics import read_topics
from tests.stream.servers import free_port, wait_for_port

PREFIX = "chaos"
COMMAND_S = 60.0
STEP_S = 0.2
DISK_BYTES = 16 * 1024 * 1024
"""Of the small disk that an ingest keeps its spool on."""

SLOTS = frozenset({"detect-1", "detect-2"})

SETTINGS: dict[str, dict[str, Any]] = {
    "members": {"names": ["marker"]},
    # Shorter than shipped, so that incidents come and go within a round of the plan.
    "verdict": {"window_s": 3.0, "open_hold_s": 1.0, "close_hold_s": 2.0},
    "incidents": {"epoch_grace_s": 8.0},
    "evidence": {"pre_roll_s": 1.0, "post_roll_s": 1.0, "clip_max_s": 5.0},
    "faces": {"track_lost_s": 2.0},
    "ingest": {"spool_max_bytes": 4 * 1024 * 1024},
}


@dataclass(frozen=True, slots=True)
class Setup:
    """The size of a run and what it is configured with."""

    nodes: int = 1
    live: int = 5
    files: int = 1
    file_rounds: int = 2
    partitions: int = 6
    ingests: int = 2
    detects: int = 3
    on_late: str = "score"
    max_staleness_s: float = 15.0
    session_s: float = 6.0


class World:
    """Everything running; leave it and nothing of it runs any more."""

    def __init__(self, directory: Path, setup: Setup) -> None:
        self.directory = directory
        self.setup = setup
        self.origin = time.time()
        self.live = frozenset(f"live-{number}" for number in range(setup.live))
        self.files = frozenset(f"file-{number}" for number in range(setup.files))
        self.disks: dict[str, Path] = {}
        """Parts whose data folder is a small disk of its own."""
        self.unapplied: dict[str, tuple[int | None, int]] = {}
        """After `finish`: partitions of media not applied to their end: position, newest record."""
        self.unended: list[str] = []
        """After `finish`: streams of which no `end` was written."""
        self.fleet = Fleet()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        # Parts first: without brokers they would only complain.
        try:
            self.fleet.end()
        finally:
            self._undo.close()

    def settings(self, zone: int, folder: Path, slot: str = "") -> Path:
        """Write a config file for clients of a zone and return it. `slot`: its lasting place in the group."""
        folder.mkdir(parents=True, exist_ok=True)
        setup = self.setup
        values: dict[str, Any] = {
            **SETTINGS,
            "prefix": PREFIX,
            "data_dir": str(folder / "data"),
            "media": {"partitions": setup.partitions},
            "freshness": {"on_late": setup.on_late, "max_staleness_s": setup.max_staleness_s},
            "kafka": {
                "bootstrap_servers": self.cluster.servers(zone),
                "replication": setup.nodes,
                "session_s": setup.session_s,
                "member_id": slot,
            },
        }
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def unmask(self, *arguments: str) -> str:
        """Run a command to its end and return what it printed; raises if it fails."""
        done = subprocess.run(
            [str(UNMASK), *arguments, "--config", str(self.settings(0, self.directory / "admin"))],
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )
        if done.returncode:
            raise RuntimeError(f"unmask {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def add(self, name: str, zone: int) -> Part:
        """Start a part: `ingest-N` or `detect-N`."""
        folder = self.directory / name
        command = name.partition("-")[0]
        # Of the detect workers some keep their place over restarts, as in a StatefulSet, and some do not.
        config = self.settings(zone, folder, name if name in SLOTS else "")
        part = Part(name, [str(UNMASK), command, "--config", str(config)], folder)
        self.fleet.add(part)
        return part

    def zone_of(self, name: str) -> int:
        """Return the zone of a part: ingest-1 and detect-1 share one, so do the second ones."""
        return int(name.partition("-")[2])

    def wait_scored(self, since: float, timeout: float, streams: frozenset[str] | None = None) -> None:
        """Return when of each live stream a picture shown after `since` was scored."""
        wanted = self.live if streams is None else streams

        def missing() -> list[str]:
            return [name for name in sorted(wanted) if self.observer.recovery(name, since) is None]

        self._wait(lambda: not missing(), timeout, lambda: f"no score since {since:.1f} of {missing()}")

    def finish(self, timeout: float) -> dict[str, int | None]:
        """Detach everything, wait until all is applied, stop all parts; return their exit codes.

        What is not applied in time is left to the judge, who finds it unaccounted for.
        """
        for stream in sorted(self.live | self.files):
            self.unmask("detach", stream)
        end = time.monotonic() + timeout
        streams = self.live | self.files
        with contextlib.suppress(TimeoutError):
            self._wait(lambda: streams <= self.observer.ended, timeout, lambda: "")
            self._wait(lambda: not self.behind(), end - time.monotonic(), lambda: "")
        self.unapplied = {str(number): place for number, place in self.behind().items()}
        self.unended = sorted(streams - self.observer.ended)
        return self.fleet.stop(30.0)

    def behind(self) -> dict[int, tuple[int | None, int]]:
        """Return the partitions of media that are not applied to their end: position and newest record."""
        with self.cluster.admin() as admin:
            offsets = admin.list_group_offsets(f"{PREFIX}-detect")
        group = offsets.get(f"{PREFIX}-detect", offsets)
        positions = {place.partition: entry.offset for place, entry in group.items()}
        return {
            number: (positions.get(number), newest)
            for number, newest in self.observer.newest.items()
            if (positions.get(number) or 0) <= newest
        }

    def judge(self, rules: Rules | None = None) -> Report:
        return check(read_topics(self.cluster.servers(), PREFIX), rules or Rules())

    def logs(self) -> str:
        """Return the ends of all logs, for a failure's report."""
        ends = [f"== {part.name}\n{_tail(part.log)}" for part in self.fleet.parts.values()]
        return "\n".join(ends)

    def _start(self) -> None:
        setup = self.setup
        clips = self.directory / "clips"
        feeds.write_clips(clips, setup.live)
        files = {
            name: feeds.write_clip(clips / f"{name}.mp4", 200 + number, setup.file_rounds)
            for number, name in enumerate(sorted(self.files))
        }
        self.cluster = Cluster(self.directory / "kafka", setup.nodes)
        self._undo.callback(self.cluster.stop)
        self.origin = time.time()
        first_port = self._feed(clips)
        self.unmask("topics", "create")
        self.observer = Observer(self.cluster.servers(), PREFIX, self.origin, self.live)
        self._undo.callback(self.observer.close)
        for number in range(1, setup.ingests + 1):
            self._mount(f"ingest-{number}")
            self.add(f"ingest-{number}", self.zone_of(f"ingest-{number}"))
        for number in range(1, setup.detects + 1):
            self.add(f"detect-{number}", self.zone_of(f"detect-{number}"))
        for number, stream in enumerate(sorted(self.live)):
            self.unmask("attach", f"tcp://127.0.0.1:{first_port + number}", "--id", stream)
        for name, path in files.items():
            self.unmask("attach", str(path), "--id", name)

    def _feed(self, clips: Path) -> int:
        # Below the ports that the system gives out to connections, and apart from those of the brokers.
        first_port = 10_000 + free_port() % 90 * 100
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.chaos.feeds",
                str(clips),
                str(first_port),
                str(self.setup.live),
                str(self.origin),
            ],
            cwd=REPOSITORY,
        )
        self._undo.callback(process.wait)
        self._undo.callback(process.kill)
        for number in range(self.setup.live):
            wait_for_port(first_port + number, process)
        return first_port

    def _mount(self, name: str) -> None:
        """Give a part's data folder a small disk of its own, where the system lets us."""
        folder = self.directory / name / "data"
        folder.mkdir(parents=True, exist_ok=True)
        if not mountable():
            return
        _run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder))
        self._undo.callback(_run, "umount", "-l", str(folder))
        self.disks[name] = folder

    def _wait(self, done: Callable[[], bool], timeout: float, what: Callable[[], str]) -> None:
        end = time.monotonic() + timeout
        while not done():
            if time.monotonic() > end:
                raise TimeoutError(f"after {timeout:.0f} s: {what()}")
            time.sleep(STEP_S)


def mountable() -> bool:
    """Return whether we may mount a small disk: root, and not in a container that forbids it."""
    if os.geteuid() != 0:
        return False
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _tail(path: Path, size: int = 3000) -> str:
    return path.read_text(errors="replace")[-size:] if path.exists() else ""


def write_json(path: Path, value: Any) -> None:
    """Write so that a stop at any instant leaves the old file or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)
