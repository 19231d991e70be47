"""Chaos, long: real brokers, two ingest and three detect processes, every kind of fault, and a judge.

    python benchmarks/chaos.py --segments 6 --minutes 5 --json chaos.json
    python benchmarks/chaos.py --rebalance 10 --json rebalance.json

A segment is a world of its own (brokers, feeds, parts), judged at its end; they alternate between the setups
named below. The figures so far are in the JSON file each minute; a run that was stopped goes on with the
segment that it was in. Needs Java and Maven; root for the fault "disk full".
Exit code 1 if anything was lost, doubled, out of order or unaccounted for, or a fault never happened.
"""

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.pop(0)  # this folder, whose kafka.py would be taken for the library
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.chaos.checker import WRONG
from tests.chaos.faults import KILLS, OF_THREE_NODES, Faults, Kind
from tests.chaos.runs import Outcome, Recovery, note, quantile, ready, recovery_table, settle
from tests.chaos.world import Setup, World, mountable, write_json

SETUPS: Mapping[str, Setup] = {
    "one broker": Setup(live=6),
    "three brokers": Setup(nodes=3, live=6),
    "one broker, skip": Setup(live=6, files=0, on_late="skip", max_staleness_s=3.0),
}
APART, TOGETHER = "one at a time", "two at a time, whatever is still to recover"
ORDER = (
    ("one broker", TOGETHER),
    ("three brokers", TOGETHER),
    ("one broker", APART),
    ("one broker, skip", TOGETHER),
    ("three brokers", APART),
    ("one broker", TOGETHER),
)
RECOVER_S = 60.0
"""Longest wait between faults that come one at a time."""
REBALANCE_S = 15.0
"""Between adding and removing a worker: a rebalance and quiet thereafter."""
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--segments", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=5.0, help="of faults in a segment")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--rebalance", type=int, default=0, help="add and remove a worker so often, no faults"
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--keep", type=Path, help="folder for the logs of segments that found something")
    arguments = parser.parse_args()
    return rebalances(arguments) if arguments.rebalance else chaos(arguments)


def chaos(arguments: argparse.Namespace) -> int:
    summary = _begun(arguments.json)
    while len(summary["segments"]) < arguments.segments:
        number = len(summary["segments"])
        name, pace = ORDER[number % len(ORDER)]
        console.print(f"segment {number + 1} of {arguments.segments}: {name}, {pace}")
        outcome = segment(SETUPS[name], pace, arguments, arguments.seed + number, summary)
        summary["segments"].append(
            {"setup": name, "pace": pace, "problems": outcome.problems(), **outcome.as_json()}
        )
        summary.pop("running", None)
        write_json(arguments.json, summary)
    show(summary)
    write_json(arguments.json, summary)
    return 1 if summary["totals"]["wrong"] or summary["totals"]["never_injected"] else 0


def segment(
    setup: Setup, pace: str, arguments: argparse.Namespace, seed: int, summary: dict[str, Any]
) -> Outcome:
    """Run one world for `minutes` of faults, then judge it."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    rng, outcome, began = random.Random(seed), Outcome(seed), time.time()
    found: Any = "stopped before its end"
    try:
        with World(folder, setup) as world:
            ready(world)
            faults = Faults(world, rng)
            end = time.monotonic() + 60 * arguments.minutes
            while time.monotonic() < end:
                lanes = _minute(setup, rng)
                if pace == APART:
                    everything = [kind for lane in lanes for kind in lane]
                    rng.shuffle(everything)
                    faults.run([everything[:8]], RECOVER_S)
                else:
                    faults.run(lanes)
                note(world, faults, outcome)
                summary["running"] = outcome.as_json()
                write_json(arguments.json, summary)
                console.print(f"  {outcome.kills} kills, {len(outcome.injected)} faults, {faults.failed}")
            settle(world, faults, outcome, began)
        found = outcome.problems()
        console.print(f"  {found or 'nothing wrong'}")
        return outcome
    finally:
        if found and arguments.keep:
            shutil.copytree(folder, arguments.keep / folder.name, ignore=_no_data, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _minute(setup: Setup, rng: random.Random) -> list[list[Kind]]:
    """Return about a minute of faults: kills in one lane, everything else in the other."""
    killing = [rng.choice(KILLS[:-1]) for _ in range(10)] + [Kind.BURST]
    rng.shuffle(killing)
    others = [kind for kind in Kind if kind not in KILLS]
    if setup.nodes < 3:
        others = [kind for kind in others if kind not in OF_THREE_NODES]
    if not mountable():
        others.remove(Kind.DISK_FULL)
    rng.shuffle(others)
    return [killing, others]


def _no_data(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in ("data", "clips", "kafka")}


def _begun(path: Path) -> dict[str, Any]:
    """Return what an earlier run has found, or a new summary."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        console.print(f"goes on after {len(found['segments'])} segments")
        return found
    return {"machine": {"cores": os.cpu_count(), "system": platform.platform()}, "segments": []}


def show(summary: dict[str, Any]) -> None:
    """Add the totals to the summary and print them."""
    segments = summary["segments"]
    faults: Counter[str] = Counter()
    for part in segments:
        faults.update(part["faults"])
    wrong = {kind: sum(part["report"][kind] for part in segments) for kind in WRONG}
    excused: Counter[str] = Counter()
    for part in segments:
        excused.update(part["report"]["excused"])
    names = (
        "frames",
        "scored",
        "planted",
        "incidents",
        "events",
        "attachments",
        "stale_records",
        "dead_letters",
    )
    totals: dict[str, Any] = {name: sum(part["report"][name] for part in segments) for name in names}
    totals |= {
        "unread_s": round(sum(part["report"]["unread_s"] for part in segments), 1),
        "minutes": round(sum(part["lasted_s"] for part in segments) / 60, 1),
        "kills": sum(part["kills"] for part in segments),
        "faults": dict(faults),
        "never_injected": [kind.value for kind in Kind if not faults[kind.value]],
        "excused": dict(excused),
        "recovery_s": {pace: _recoveries(segments, pace) for pace in (APART, TOGETHER)},
        "wrong": {
            **{kind: count for kind, count in wrong.items() if count},
            **{
                kind: found
                for part in segments
                for kind, found in part["problems"].items()
                if kind not in wrong
            },
        },
    }
    summary["totals"] = totals
    for pace, recoveries in totals["recovery_s"].items():
        table = Table("fault", "times", "recovery p50 s", "p95 s", title=f"{totals['kills']} kills; {pace}")
        for name, found in recoveries.items():
            table.add_row(name, *(str(found[column]) for column in ("count", "p50", "p95")))
        console.print(table)
    for kind, count in wrong.items():
        console.print(f"{kind.replace('_', ' ')}: {count}")
    console.print({name: totals[name] for name in (*names, "unread_s", "excused", "never_injected")})


def _recoveries(segments: list[dict[str, Any]], pace: str) -> dict[str, dict[str, float]]:
    """Return per kind of fault, and for all, how long the slowest feed took to be scored again."""
    found = [item for part in segments if part["pace"] == pace for item in part["recoveries"]]
    return recovery_table([Recovery(**item | {"kind": Kind(item["kind"])}) for item in found])


# Adding and removing a worker


def rebalances(arguments: argparse.Namespace) -> int:
    """Measure how long each feed's scores pause when a worker comes and when one goes, in order."""
    folder = Path(tempfile.mkdtemp(prefix="rebalance-"))
    began, outcome = time.time(), Outcome(arguments.seed)
    pauses: dict[str, list[float]] = {"undisturbed": [], "added": [], "removed": []}
    try:
        with World(folder, Setup(live=8, detects=2)) as world:
            ready(world)
            for _ in range(arguments.rebalance):
                pauses["undisturbed"] += _pauses(world)
                world.add("detect-3", zone=3)
                pauses["added"] += _pauses(world)
                code = world.fleet.remove("detect-3", REBALANCE_S)
                outcome.exit_codes[f"detect-3 removed at {time.time() - began:.0f} s"] = code
                pauses["removed"] += _pauses(world)
            codes = dict(outcome.exit_codes)
            settle(world, Faults(world, random.Random(arguments.seed)), outcome, began)
            outcome.exit_codes |= codes
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {
        name: {
            "feeds": len(found),
            "p50": round(quantile(found, 0.5), 2),
            "p95": round(quantile(found, 0.95), 2),
            "longest": round(max(found), 2),
        }
        for name, found in pauses.items()
    }
    table = Table("worker", "pauses", "p50 s", "p95 s", "longest s", title="pause per feed")
    for name, figure in figures.items():
        table.add_row(name, *(str(figure[column]) for column in ("feeds", "p50", "p95", "longest")))
    console.print(table)
    problems = outcome.problems()
    console.print(problems or "nothing wrong")
    write_json(arguments.json, {"pauses_s": figures, "problems": problems, **outcome.as_json()})
    return 1 if problems else 0


def _pauses(world: World) -> list[float]:
    """Return, for each live feed, the longest time between scores that become visible from now on."""
    since = time.time()
    time.sleep(REBALANCE_S)
    return [max(_gaps(world, stream, since)) for stream in sorted(world.live)]


def _gaps(world: World, stream: str, since: float) -> Iterator[float]:
    at = since
    for arrival in world.observer.arrivals(stream):
        if arrival.at >= since:
            yield arrival.at - at
            at = arrival.at
    yield time.time() - at


if __name__ == "__main__":
    sys.exit(main())
