"""What goes wrong: each kind of fault, injected at seeded moments, with the proof that it really was."""

import contextlib
import errno
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import psutil

from tests.chaos.fleet import Part
from tests.chaos.proxy import Cut
from tests.chaos.world import PREFIX, World

STEP_S = 0.1
PREFERRED = 0
"""Kind of election, by its number in the protocol."""
FREEZE_SHORT_S = (1.0, 3.0)
"""Within a session: nobody else may notice."""
FREEZE_BEYOND_S = (2.0, 4.0)
"""Longer than the session by this: others take over, and the frozen one wakes up as a ghost."""
CUT_S = (4.0, 9.0)
BROKER_AWAY_S = (1.0, 4.0)
DISK_FULL_S = (5.0, 8.0)
CLOCK_OFF_S = (4.0, 8.0)
CLOCK_STEPS_S = (-3600.0, -45.0, 45.0, 3600.0)
TAKEOVER_S = 30.0
PAUSE_S = (0.5, 2.5)
"""Between the faults of a lane."""


class Kind(StrEnum):
    """What is done."""

    KILL_DETECT = "kill detect"
    KILL_INGEST = "kill ingest"
    KILL_DECODER = "kill decoder"
    KILL_SHARD = "kill shard"
    BURST = "burst of kills"
    FREEZE_SHORT = "freeze, within the session"
    FREEZE_LONG = "freeze, beyond the session"
    BROKER_KILL = "kill broker"
    LEADER_CHANGE = "leader change"
    CONTROLLER_CHANGE = "controller change"
    CUT_SILENT = "network cut, silent"
    CUT_RESET = "network cut, reset"
    DISK_FULL = "disk full for the spool"
    CLOCK_STEP = "clock step"


KILLS = (Kind.KILL_DETECT, Kind.KILL_INGEST, Kind.KILL_DECODER, Kind.KILL_SHARD, Kind.BURST)
OF_THREE_NODES = (Kind.LEADER_CHANGE, Kind.CONTROLLER_CHANGE)


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that was really there. Unix times; `kills` SIGKILLs to processes of ours."""

    kind: Kind
    target: str
    at: float
    over: float
    kills: int
    proof: str


@dataclass(slots=True)
class Faults:
    """Injects faults into a world; what could not be injected is counted apart."""

    world: World
    rng: random.Random
    done: list[Injected] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def inject(self, kind: Kind) -> None:
        """Inject one fault, and take it back; returns when it is over. Nothing happens without a target."""
        at = time.time()
        action: Callable[[], tuple[str, int, str] | None] = {
            Kind.KILL_DETECT: lambda: self._kill("detect"),
            Kind.KILL_INGEST: lambda: self._kill("ingest"),
            Kind.KILL_DECODER: lambda: self._kill_child("detect", "decoder", _is_decoder),
            Kind.KILL_SHARD: lambda: self._kill_child("ingest", "shard", _is_shard),
            Kind.BURST: self._burst,
            Kind.FREEZE_SHORT: lambda: self._freeze(self._between(FREEZE_SHORT_S)),
            Kind.FREEZE_LONG: lambda: self._freeze(
                self.world.setup.session_s + self._between(FREEZE_BEYOND_S)
            ),
            Kind.BROKER_KILL: self._kill_broker,
            Kind.LEADER_CHANGE: self._change_leader,
            Kind.CONTROLLER_CHANGE: self._change_controller,
            Kind.CUT_SILENT: lambda: self._cut(Cut.SILENT),
            Kind.CUT_RESET: lambda: self._cut(Cut.RESET),
            Kind.DISK_FULL: self._fill_disk,
            Kind.CLOCK_STEP: self._step_clock,
        }[kind]
        found = action()
        with self._lock:
            if found is None:
                self.failed[kind.value] += 1
                return
            self.done.append(Injected(kind, found[0], at, time.time(), found[1], found[2]))

    def run(self, lanes: Sequence[Sequence[Kind]], recover_s: float = 0.0) -> None:
        """Inject the faults of each lane one after the other, the lanes beside each other.

        `recover_s`: before the next fault, wait at most so long for every feed to be scored again.
        """
        errors: list[BaseException] = []

        def run(lane: Sequence[Kind]) -> None:
            try:
                for kind in lane:
                    time.sleep(self._between(PAUSE_S))
                    at = time.time()
                    self.inject(kind)
                    with contextlib.suppress(TimeoutError):
                        self.world.wait_scored(at, recover_s)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(lane,)) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    @property
    def kills(self) -> int:
        return sum(injected.kills for injected in self.done)

    def counts(self) -> dict[str, int]:
        """Return how often each kind was injected."""
        return dict(Counter(injected.kind.value for injected in self.done))

    def _between(self, bounds: tuple[float, float]) -> float:
        with self._lock:
            return self.rng.uniform(*bounds)

    def _part(self, prefix: str = "") -> Part:
        """Return a part that is running; just after a burst that may take a moment."""
        end = time.monotonic() + TAKEOVER_S
        while True:
            living = [part for part in self.world.fleet.named(prefix) if part.pid is not None]
            if living:
                with self._lock:
                    return self.rng.choice(living)
            if time.monotonic() > end:
                raise TimeoutError(f"no {prefix or 'part'} is running")
            time.sleep(STEP_S)

    def _kill(self, prefix: str) -> tuple[str, int, str] | None:
        part = self._part(prefix)
        pid = part.kill()
        return None if pid is None else (part.name, 1, _gone(pid))

    def _kill_child(self, prefix: str, word: str, fits: Callable[[int], bool]) -> tuple[str, int, str] | None:
        parts = self.world.fleet.named(prefix)
        found = [(part.name, pid) for part in parts for pid in part.children() if fits(pid)]
        if not found:
            return None
        with self._lock:
            name, pid = self.rng.choice(found)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return (f"{name}'s {word}", 1, _gone(pid))
        return None

    def _burst(self) -> tuple[str, int, str] | None:
        """Kill a random half or more of all parts within a second."""
        parts = list(self.world.fleet.parts.values())
        with self._lock:
            chosen = self.rng.sample(parts, self.rng.randint(len(parts) // 2 + 1, len(parts)))
        pids = []
        for part in chosen:
            pid = part.kill()
            if pid is not None:
                pids.append(pid)
            time.sleep(self._between((0.0, 0.3)))
        return (
            (", ".join(part.name for part in chosen), len(pids), "; ".join(map(_gone, pids)))
            if pids
            else None
        )

    def _freeze(self, seconds: float) -> tuple[str, int, str] | None:
        part = self._part()
        pids = part.freeze()
        try:
            time.sleep(STEP_S)
            stopped = [pid for pid in pids if _status(pid) == psutil.STATUS_STOPPED]
            time.sleep(seconds)
        finally:
            part.thaw(pids)
        return (part.name, 0, f"{len(stopped)} processes stopped for {seconds:.1f} s") if stopped else None

    def _kill_broker(self) -> tuple[str, int, str] | None:
        cluster = self.world.cluster
        with self._lock:
            node = self.rng.randint(1, cluster.nodes)

        def away() -> str:
            seconds = self._between(BROKER_AWAY_S)
            time.sleep(seconds)
            return f"away for {seconds:.1f} s"

        return self._without_node(node, away)

    def _change_leader(self) -> tuple[str, int, str] | None:
        cluster, topic = self.world.cluster, f"{PREFIX}.media"
        with self._lock:
            partition = self.rng.randrange(self.world.setup.partitions)
        before = cluster.leader(topic, partition)

        def taken_over() -> str:
            after = _until(lambda: cluster.leader(topic, partition), lambda node: node not in (before, -1))
            return f"leader of media/{partition} {before} -> {after}"

        found = self._without_node(before, taken_over)
        with cluster.admin() as admin:  # and back again, which this time nobody dies for
            admin.elect_leaders(PREFERRED, raise_errors=False)
        return found

    def _change_controller(self) -> tuple[str, int, str] | None:
        cluster = self.world.cluster
        before = cluster.controller()

        def taken_over() -> str:
            return (
                f"controller {before} -> {_until(cluster.controller, lambda node: node not in (before, -1))}"
            )

        return self._without_node(before, taken_over)

    def _without_node(self, node: int, meanwhile: Callable[[], str]) -> tuple[str, int, str]:
        cluster = self.world.cluster
        pid = cluster.pid(node)
        cluster.kill(node)
        try:
            gone = f"{_gone(pid)}. {meanwhile()}"
        finally:
            cluster.revive(node)
        cluster.wait_serving()
        return (f"broker {node}", 0, f"{gone} back as {cluster.pid(node)}")

    def _cut(self, how: Cut) -> tuple[str, int, str] | None:
        zones = self.world.cluster.zones
        with self._lock:
            number = self.rng.choice(sorted(zones))
        zone, seconds = zones[number], self._between(CUT_S)
        held = zone.held
        zone.cut(how)
        try:
            time.sleep(2 * STEP_S)  # what is in the middle of being carried
            carried = zone.carried
            time.sleep(seconds)
            passed = zone.carried - carried
        finally:
            zone.heal()
        proof = f"{passed} bytes passed in {seconds:.1f} s, {zone.held - held} tries were held up"
        return (f"zone {number}", 0, proof) if passed == 0 and zone.held > held else None

    def _fill_disk(self) -> tuple[str, int, str] | None:
        """Cut an ingest off, so that it must spool, and leave no room to do so."""
        disks = self.world.disks
        if not disks:
            return None
        with self._lock:
            name = self.rng.choice(sorted(disks))
        zone = self.world.cluster.zones[self.world.zone_of(name)]
        filler = disks[name] / "filler"
        zone.cut(Cut.SILENT)
        try:
            refused = _fill(filler)
            time.sleep(self._between(DISK_FULL_S))
            refused = refused and _fill(filler)
        finally:
            filler.unlink(missing_ok=True)
            zone.heal()
        return (name, 0, "no space left on device, at the beginning and at the end") if refused else None

    def _step_clock(self) -> tuple[str, int, str] | None:
        part = self._part()
        with self._lock:
            offset = self.rng.choice(CLOCK_STEPS_S)
        observer = self.world.observer
        before = observer.told_off
        part.step_clock(offset)
        try:
            time.sleep(self._between(CLOCK_OFF_S))
            end = time.monotonic() + TAKEOVER_S
            while observer.told_off == before and time.monotonic() < end:
                time.sleep(STEP_S)  # it may be dead, or without work
        finally:
            part.step_clock(0.0)
        off = observer.told_off - before
        return (part.name, 0, f"{offset:+g} s, {off} records told another time") if off else None


def _fill(path: Path) -> bool:
    """Fill the disk to its last byte; return whether the system said that it is full."""
    try:
        with path.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(64 * 1024))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    return os.statvfs(path.parent).f_bavail == 0


def _until(ask: Callable[[], int], good: Callable[[int], bool]) -> int:
    end = time.monotonic() + TAKEOVER_S
    while time.monotonic() < end:
        with contextlib.suppress(Exception):  # no leader, or a node that is away was asked
            found = ask()
            if good(found):
                return found
        time.sleep(STEP_S)
    raise TimeoutError(f"nobody took over in {TAKEOVER_S:g} s")


def _gone(pid: int) -> str:
    end = time.monotonic() + TAKEOVER_S
    while _status(pid) not in ("", psutil.STATUS_ZOMBIE):
        if time.monotonic() > end:
            raise TimeoutError(f"process {pid} survives SIGKILL")
        time.sleep(STEP_S / 10)
    return f"{pid} gone"


def _status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return ""


def _is_decoder(pid: int) -> bool:
    """Decoders are forked by Python's fork server."""
    return "forkserver" in _command(pid) and "forkserver" in _command(_parent(pid))


def _is_shard(pid: int) -> bool:
    return "shard_main" in _command(pid)


def _parent(pid: int) -> int:
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return -1


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline()) if pid > 0 else ""
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
