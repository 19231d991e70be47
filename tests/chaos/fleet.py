"""Real processes under a supervisor that restarts what ends, as systemd would."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

RESTART_S = 0.5
"""systemd's RestartSec is 0.1 s by default; a little more keeps a crash loop from taking a core."""
LOOK_S = 0.05
END_S = 5.0
"""SIGKILL takes effect sooner, even on a busy machine."""
UNMASK = Path(sys.executable).parent / "unmask"
REPOSITORY = Path(__file__).resolve().parents[2]
"""The tree that is tested: a copy of it may be, while another is installed and worked on."""
CLOCK = Path(__file__).resolve().parent / "clock"
"""On PYTHONPATH it gives a part a wall clock of its own."""


@dataclass(frozen=True, slots=True)
class Exit:
    """A process that ended by itself or was killed; `code` as Popen's. `at`: Unix time."""

    part: str
    at: float
    code: int
    asked: bool
    """Whether we killed or stopped it."""


class Part:
    """One service: its process, and all that it starts, are a session of their own."""

    def __init__(self, name: str, arguments: list[str], directory: Path) -> None:
        self.name = name
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.log = directory / "log.txt"
        self._clock = directory / "clock"
        self.step_clock(0.0)
        self._arguments = arguments
        self._env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(CLOCK), str(REPOSITORY)]),
            "CHAOS_CLOCK": str(self._clock),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._sessions: list[int] = []
        self._wanted = False
        self._asked = False
        self._ended_at = 0.0
        self.exits: list[Exit] = []
        self.starts = 0

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def start(self) -> None:
        self._wanted = True
        self._spawn()

    def look(self) -> None:
        """Note an end, and start again what is wanted."""
        process = self._process
        if process is not None and process.poll() is not None:
            self.exits.append(Exit(self.name, time.time(), process.returncode, self._asked))
            self._asked = False
            self._process, self._ended_at = None, time.monotonic()
        if self._process is None and self._wanted and time.monotonic() - self._ended_at >= RESTART_S:
            self._spawn()

    def kill(self) -> int | None:
        """SIGKILL the service's own process, not what it started; return its pid, None if none ran."""
        pid = self.pid
        if pid is None:
            return None
        self._asked = True
        os.kill(pid, signal.SIGKILL)
        return pid

    def freeze(self) -> list[int]:
        """SIGSTOP everything of the part, as a suspended machine; return the pids."""
        pids = self._all()
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        return pids

    def thaw(self, pids: list[int]) -> None:
        for pid in pids:
            _signal(pid, signal.SIGCONT)

    def children(self) -> list[int]:
        """Return the processes that the service has started: shards, decoders."""
        pid = self.pid
        if pid is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child.pid for child in psutil.Process(pid).children(recursive=True)]
        return []

    def step_clock(self, seconds: float) -> None:
        """Set the part's wall clock off by so much from now on."""
        part = self._clock.with_suffix(".part")
        part.write_text(f"{seconds:g}")
        part.replace(self._clock)

    def ask_to_stop(self) -> None:
        self._wanted = False
        pid = self.pid
        if pid is not None:
            self._asked = True
            os.kill(pid, signal.SIGTERM)

    def wait(self, timeout: float) -> int | None:
        """Return the exit code of a process that was asked to stop, None if it did not."""
        process = self._process
        if process is None:
            return self.exits[-1].code if self.exits else None
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def left(self) -> list[int]:
        """Return what is alive of all sessions that this part ever was."""
        return [pid for pid in psutil.pids() if _session(pid) in self._sessions and _alive(pid)]

    def end(self) -> None:
        """Take away whatever is left."""
        self._wanted = False
        end = time.monotonic() + END_S
        while (left := self.left()) and time.monotonic() < end:
            for pid in left:
                _signal(pid, signal.SIGKILL)
            time.sleep(LOOK_S)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)

    def _spawn(self) -> None:
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd=self.directory,
                env=self._env,
            )
        self._sessions.append(self._process.pid)
        self.starts += 1

    def _all(self) -> list[int]:
        pid = self.pid
        return [] if pid is None else [pid, *self.children()]


class Fleet:
    """Parts under one supervisor."""

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    def add(self, part: Part) -> None:
        with self._lock:
            self.parts[part.name] = part
            part.start()

    def remove(self, name: str, timeout: float) -> int | None:
        """Stop a part in order; return its exit code, None if it had to be killed."""
        with self._lock:
            part = self.parts[name]
            part.ask_to_stop()
        code = part.wait(timeout)
        with self._lock:
            part.look()
            part.end()
            del self.parts[name]
        return code

    def stop(self, timeout: float) -> dict[str, int | None]:
        """Stop everything in order; return exit codes, None for what had to be killed."""
        with self._lock:
            for part in self.parts.values():
                part.ask_to_stop()
        end = time.monotonic() + timeout
        codes = {name: part.wait(max(0.1, end - time.monotonic())) for name, part in list(self.parts.items())}
        self._close()
        return codes

    def end(self) -> None:
        """Take everything away at once."""
        self._close()

    def named(self, prefix: str) -> list[Part]:
        return [part for name, part in sorted(self.parts.items()) if name.startswith(prefix)]

    def unasked(self) -> list[Exit]:
        """Return the ends that nobody asked for."""
        return [end for part in self.parts.values() for end in part.exits if not end.asked]

    def _close(self) -> None:
        self._stopped.set()
        self._thread.join()
        for part in self.parts.values():
            part.end()

    def _supervise(self) -> None:
        while not self._stopped.wait(LOOK_S):
            with self._lock:
                for part in self.parts.values():
                    part.look()


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
