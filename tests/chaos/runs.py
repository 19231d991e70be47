"""One chaos run from start to verdict, for the tests and for the benchmark."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.chaos.checker import Report
from tests.chaos.faults import Faults, Injected, Kind
from tests.chaos.world import World

START_S = 120.0
RECOVER_S = 90.0
FINISH_S = 120.0
CALM_S = 6.0
"""Undisturbed time at the end: incidents that are open may close by themselves."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """How long after a fault pictures shown after it were scored: the slowest live feed, and each (s)."""

    kind: Kind
    lasted_s: float
    worst_s: float | None
    feeds_s: dict[str, float | None]


@dataclass(slots=True)
class Outcome:
    """What a run found."""

    seed: int
    lasted_s: float = 0.0
    injected: list[Injected] = field(default_factory=list)
    not_injected: dict[str, int] = field(default_factory=dict)
    recoveries: list[Recovery] = field(default_factory=list)
    exit_codes: dict[str, int | None] = field(default_factory=dict)
    unasked: list[dict[str, Any]] = field(default_factory=list)
    """Processes that ended by themselves while nobody had asked them to."""
    orphans: dict[str, list[int]] = field(default_factory=dict)
    """Processes that outlived the part that had started them."""
    unapplied: dict[str, Any] = field(default_factory=dict)
    """Partitions of media that were not applied to their end: position and newest record."""
    unended: list[str] = field(default_factory=list)
    """Streams that were detached and of which no `end` was written."""
    report: Report | None = None

    @property
    def kills(self) -> int:
        return sum(injected.kills for injected in self.injected)

    def problems(self) -> dict[str, Any]:
        """Return what must not be; empty if all is well."""
        assert self.report is not None
        found: dict[str, Any] = dict(self.report.problems())
        never = [asdict(item) for item in self.recoveries if item.worst_s is None]
        badly = {name: code for name, code in self.exit_codes.items() if code != 0}
        if never:
            found["never recovered"] = never
        if badly:
            found["exit codes"] = badly
        if self.unapplied:
            found["not applied"] = self.unapplied
        if self.unended:
            found["not ended"] = self.unended
        if any(self.orphans.values()):
            found["orphans"] = self.orphans
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "lasted_s": round(self.lasted_s, 1),
            "kills": self.kills,
            "faults": counts(self.injected),
            "not_injected": self.not_injected,
            "recovery_s": recovery_table(self.recoveries),
            "exit_codes": self.exit_codes,
            "unapplied": self.unapplied,
            "unended": self.unended,
            "unasked_exits": self.unasked,
            "orphans": self.orphans,
            "report": None if self.report is None else self.report.as_json(),
            "injected": [asdict(item) for item in self.injected],
            "recoveries": [asdict(item) for item in self.recoveries],
        }


def ready(world: World) -> None:
    """Return when every live feed is being scored."""
    world.wait_scored(time.time(), START_S)


def settle(world: World, faults: Faults, outcome: Outcome, began: float, calm_s: float = CALM_S) -> None:
    """After the last fault: wait for everybody, end everything in order, and let the judge judge."""
    world.wait_scored(time.time(), RECOVER_S)
    time.sleep(calm_s)
    note(world, faults, outcome)
    outcome.unasked = [asdict(end) for end in world.fleet.unasked()]
    outcome.exit_codes = world.finish(FINISH_S)
    outcome.unapplied, outcome.unended = world.unapplied, world.unended
    outcome.lasted_s = time.time() - began
    outcome.report = world.judge()


def note(world: World, faults: Faults, outcome: Outcome) -> None:
    """Bring the outcome up to date with what was injected so far."""
    outcome.injected = list(faults.done)
    outcome.not_injected = dict(faults.failed)
    outcome.recoveries = [recovered(world, injected) for injected in outcome.injected]
    outcome.orphans = {name: strays(world, name) for name in world.fleet.parts}


def strays(world: World, name: str) -> list[int]:
    """Return processes of a part that belong to none of its living ones."""
    part = world.fleet.parts[name]
    return sorted(set(part.left()) - {part.pid, *part.children()})


def recovered(world: World, injected: Injected) -> Recovery:
    feeds = {name: world.observer.recovery(name, injected.at) for name in sorted(world.live)}
    times = list(feeds.values())
    known = [value for value in times if value is not None]
    worst = max(known) if len(known) == len(times) else None
    return Recovery(injected.kind, injected.over - injected.at, worst, feeds)


def counts(injected: Sequence[Injected]) -> dict[str, int]:
    """Return how often each kind was injected, every kind named."""
    return {kind.value: sum(item.kind is kind for item in injected) for kind in Kind}


def recovery_table(recoveries: Sequence[Recovery]) -> dict[str, dict[str, float]]:
    """Return per kind, and for all: count, p50 and p95 of the slowest feed, in seconds from the fault on."""
    table = {}
    for name in ["all", *Kind]:
        times = [
            item.worst_s for item in recoveries if name in ("all", item.kind) and item.worst_s is not None
        ]
        if times:
            table[str(name)] = {
                "count": len(times),
                "p50": round(statistics.median(times), 2),
                "p95": round(quantile(times, 0.95), 2),
            }
    return table


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of all are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
