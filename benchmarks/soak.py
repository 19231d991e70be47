"""Full load for as long as you like: does anything grow? Memory and file descriptors of every process, lag.

    python benchmarks/soak.py --minutes 120 --feeds 24 --json soak.json

Real brokers and parts as in benchmarks/chaos.py, no faults. Every 10 s: private memory and descriptors of
each process, how many records of `media` wait, and how old the newest visible score is. After the warm-up a
straight line is laid through each series; `growth` is its rise from there to the end, in percent of its
height. The figures so far are in the JSON file every minute.
Exit code 1 if memory or descriptors of a part, or the lag, grew by more than 2 %, or something was wrong.
"""

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

sys.path.pop(0)  # this folder, whose kafka.py would be taken for the library
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.chaos.faults import Faults
from tests.chaos.fleet import Part
from tests.chaos.runs import Outcome, ready, settle
from tests.chaos.world import Setup, World, write_json

SAMPLE_S = 10.0
WARM_UP = 0.25
"""Of the run: caches fill, the first incidents are told, glibc finds its arenas."""
GROWTH_PERCENT = 2.0
LAG_RECORDS = 50
"""A lag below this is none: a turn of the workers, with commits twice a second."""
AGE_S = 5.0
"""Nor is a newest score younger than this old."""
console = Console()

Series = dict[str, list[tuple[float, float]]]
"""Name to (seconds since the start, value)."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--feeds", type=int, default=24)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    began, outcome, series = time.time(), Outcome(0), Series()
    busy: list[float] = []
    try:
        with World(folder, Setup(live=arguments.feeds, files=0, partitions=8)) as world:
            ready(world)
            _soak(world, arguments, series, busy)
            settle(world, Faults(world, random.Random(0)), outcome, began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = summary(series, busy, arguments) | {"problems": outcome.problems(), **outcome.as_json()}
    write_json(arguments.json, result)
    show(result)
    return 1 if result["grew"] or result["problems"] else 0


def _soak(world: World, arguments: argparse.Namespace, series: Series, busy: list[float]) -> None:
    start = time.monotonic()
    psutil.cpu_percent()
    taken = 0
    while time.monotonic() - start < 60 * arguments.minutes:
        time.sleep(max(0.0, start + (taken + 1) * SAMPLE_S - time.monotonic()))
        taken += 1
        at = time.monotonic() - start
        busy.append(psutil.cpu_percent())
        for name, value in sample(world).items():
            series.setdefault(name, []).append((at, value))
        if taken % 6 == 0:
            write_json(arguments.json, summary(series, busy, arguments))
            console.print(
                f"{at / 60:.0f} min, CPU {busy[-1]:.0f} %, lag {series['lag records'][-1][1]:.0f} records"
            )


def sample(world: World) -> dict[str, float]:
    """Return what is measured: MiB and descriptors per part and kind of process, the lag."""
    found: dict[str, float] = {}
    for part in world.fleet.parts.values():
        for kind, pids in _kinds(part).items():
            found |= _measure(f"{part.name} {kind}", pids)
    for node in range(1, world.setup.nodes + 1):
        found |= _measure(f"broker {node}", [world.cluster.pid(node)])
    behind = world.behind()
    found["lag records"] = float(sum(newest + 1 - (position or 0) for position, newest in behind.values()))
    found["age of newest score s"] = _age(world)
    return found


def _kinds(part: Part) -> dict[str, list[int]]:
    pid = part.pid
    kinds = {"service": [] if pid is None else [pid], "children": part.children()}
    return {kind: pids for kind, pids in kinds.items() if pids}


def _measure(name: str, pids: Sequence[int]) -> dict[str, float]:
    memory = descriptors = 0.0
    for pid in pids:
        try:
            process = psutil.Process(pid)
            memory += process.memory_full_info().uss / 2**20
            descriptors += process.num_fds()
        except psutil.NoSuchProcess:
            continue
    return {f"{name} MiB": memory, f"{name} descriptors": descriptors, f"{name} processes": float(len(pids))}


def _age(world: World) -> float:
    """Return how long ago the picture of the newest visible score was shown, of the slowest feed."""
    newest = [max(arrival.shown for arrival in world.observer.arrivals(stream)) for stream in world.live]
    return time.time() - min(newest)


def summary(series: Series, busy: Sequence[float], arguments: argparse.Namespace) -> dict[str, Any]:
    lines = {name: _line(points) for name, points in series.items() if len(points) >= 8}
    grew = {name: line["growth_percent"] for name, line in lines.items() if _grew(name, line)}
    return {
        "feeds": arguments.feeds,
        "minutes": round(max((at for points in series.values() for at, _ in points), default=0.0) / 60, 1),
        "cpu_percent": round(statistics.mean(busy), 1) if busy else None,
        "series": lines,
        "grew": grew,
        "samples": {
            name: [(round(at), round(value, 2)) for at, value in points] for name, points in series.items()
        },
    }


def _grew(name: str, line: dict[str, float]) -> bool:
    """Return whether something of ours grew; a broker's memory is Java's business."""
    bounds = {"lag records": LAG_RECORDS, "age of newest score s": AGE_S}
    if name.startswith("broker") or line["end"] < bounds.get(name, 0.0):
        return False
    return line["growth_percent"] > GROWTH_PERCENT


def _line(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the straight line after the warm-up: its ends, and its rise in percent."""
    warm = points[int(len(points) * WARM_UP) :]
    times, values = [at for at, _ in warm], [value for _, value in warm]
    slope, intercept = statistics.linear_regression(times, values)
    begin, end = intercept + slope * times[0], intercept + slope * times[-1]
    rise = 100 * (end - begin) / begin if begin > 0 else 0.0
    return {
        "begin": round(begin, 2),
        "end": round(end, 2),
        "growth_percent": round(rise, 2),
        "highest": round(max(values), 2),
    }


def show(result: dict[str, Any]) -> None:
    title = f"{result['feeds']} feeds, {result['minutes']} min, CPU {result['cpu_percent']} %"
    table = Table("what", "after warm-up", "at the end", "growth %", "highest", title=title)
    for name, line in sorted(result["series"].items()):
        table.add_row(name, *(str(line[column]) for column in ("begin", "end", "growth_percent", "highest")))
    console.print(table)
    console.print(f"grew: {result['grew'] or 'nothing'}")
    console.print(f"judge: {result['problems'] or 'nothing wrong'}")


if __name__ == "__main__":
    sys.exit(main())
