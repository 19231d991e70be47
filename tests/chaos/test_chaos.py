"""Real processes, real brokers, every kind of fault: nothing lost, nothing twice, everything accounted for.

Short and seeded; `benchmarks/chaos.py` is the long run.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.chaos.faults import OF_THREE_NODES, Faults, Kind
from tests.chaos.pictures import FPS, PLAN
from tests.chaos.runs import CALM_S, Outcome, counts, ready, settle
from tests.chaos.world import Setup, World, mountable
from tests.conftest import requires

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


ROUND_S = PLAN.loop / FPS


def run(
    directory: Path, setup: Setup, lanes: Sequence[Sequence[Kind]], seed: int, calm_s: float = CALM_S
) -> Outcome:
    requires("java", "mvn")
    outcome, began = Outcome(seed), time.time()
    with World(directory, setup) as world:
        try:
            ready(world)
            faults = Faults(world, random.Random(seed))
            faults.run(lanes)
            settle(world, faults, outcome, began, calm_s)
        except BaseException:
            print(world.logs())
            raise
        print(outcome.as_json())
        if outcome.problems():
            print(world.logs())
    return outcome


def assert_injected(outcome: Outcome, lanes: Sequence[Sequence[Kind]]) -> None:
    """Each fault of the plan was really there, or the run proves nothing."""
    wanted = {kind for lane in lanes for kind in lane}
    done = counts(outcome.injected)
    assert [kind for kind in wanted if not done[kind.value]] == [], outcome.not_injected


def test_nothing_is_lost_or_doubled_whatever_fails(tmp_path: Path) -> None:
    """Every kind of fault on one broker, two at a time; every picture is scored, however late."""
    parts = [
        Kind.KILL_DETECT,
        Kind.KILL_SHARD,
        Kind.FREEZE_SHORT,
        Kind.KILL_DECODER,
        Kind.FREEZE_LONG,
        Kind.KILL_INGEST,
        Kind.BURST,
        Kind.KILL_DETECT,
    ]
    others = [Kind.CUT_SILENT, Kind.BROKER_KILL, Kind.CLOCK_STEP, Kind.CUT_RESET]
    if mountable():
        others.append(Kind.DISK_FULL)
    outcome = run(tmp_path, Setup(), [parts, others], seed=3)
    assert_injected(outcome, [parts, others])
    assert outcome.problems() == {}
    assert outcome.report is not None
    assert outcome.report.planted > 0


def test_late_pictures_may_be_skipped_and_are_counted(tmp_path: Path) -> None:
    """With `skip` only what counted drops cover may be missed."""
    lanes = [[Kind.KILL_DETECT, Kind.FREEZE_LONG, Kind.BURST], [Kind.BROKER_KILL, Kind.CUT_SILENT]]
    setup = Setup(on_late="skip", max_staleness_s=3.0, live=4, files=0)
    outcome = run(tmp_path, setup, lanes, seed=4, calm_s=ROUND_S)
    assert_injected(outcome, lanes)
    assert outcome.problems() == {}
    assert outcome.report is not None
    assert outcome.report.excused.get("STALE", 0) > 0
    assert outcome.report.planted > 0


def test_leaders_and_controllers_may_change(tmp_path: Path) -> None:
    """Three brokers, of which one at a time dies."""
    lanes = [[*OF_THREE_NODES, Kind.BROKER_KILL], [Kind.KILL_DETECT, Kind.KILL_INGEST, Kind.FREEZE_SHORT]]
    outcome = run(tmp_path, Setup(nodes=3, live=4, files=0), lanes, seed=5)
    assert_injected(outcome, lanes)
    assert outcome.problems() == {}
