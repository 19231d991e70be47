"""How much of what was shown was looked at."""

import json

import pytest

from stream.frames import Dropped
from stream.looked import Looked

SECOND = 1_000_000
HERE, THERE = ("a1", 0), ("a1", 1)


def looked(*seconds: float, place: tuple[str, int] = HERE) -> Looked:
    made = Looked(60 * SECOND, 2.0)
    for second in seconds:
        made.frame(round(second * SECOND), place)
    return made


def hole(first: float, last: float, reason: str = "STALE") -> Dropped:
    return Dropped(round(first * SECOND), round(last * SECOND), reason, None)


def test_every_due_frame_sampled_is_all() -> None:
    assert looked(0, 0.5, 1.0, 1.5, 2.0).since(0, 2 * SECOND).share == 1.0


def test_sampling_below_the_least_rate_is_a_share() -> None:
    #   due      | . | . | . | . |      looked at  |       |       |
    assert looked(0, 1.0, 2.0).since(0, 2 * SECOND).share == pytest.approx(3 / 5)
    assert looked(0, 4.0).since(0, 4 * SECOND).share == pytest.approx(2 / 9)


def test_time_dropped_is_not_looked_at() -> None:
    #   0 s   |.|.|          xxxxxxxxxxx          |.|.|   4 s
    made = looked(0, 0.5, 1.0, 3.0, 3.5, 4.0)
    made.drop(hole(1.0, 3.0, "CORRUPT"))
    found = made.since(0, 4 * SECOND)
    assert found.share == pytest.approx(0.5)
    assert found.corrupt


def test_a_hole_after_the_last_frame_counts_too() -> None:
    made = looked(0, 0.5, 1.0)
    made.drop(hole(1.0, 5.0))
    found = made.since(0, 5 * SECOND)
    assert found.share == pytest.approx(0.2)
    assert not found.corrupt


def test_time_between_epochs_was_not_shown() -> None:
    made = looked(0, 0.5, 1.0)
    for second in (20.0, 20.5, 21.0):
        made.frame(round(second * SECOND), THERE)
    assert made.since(0, 21 * SECOND).share == 1.0


def test_nothing_at_all_is_nothing() -> None:
    assert looked().since(0, SECOND).share == 0.0
    assert looked(0).since(5 * SECOND, 6 * SECOND).share == 0.0
    assert looked(3).since(0, 3 * SECOND).share == 1.0


def test_it_is_bounded_and_restores_exactly() -> None:
    made = looked(*(index / 2 for index in range(1000)))
    made.drop(hole(490, 495))
    state = json.loads(json.dumps(made.state()))
    assert len(state["marks"]) <= 2 * 60 + 1
    restored = Looked(60 * SECOND, 2.0)
    restored.restore(state)
    assert restored.since(470 * SECOND, 500 * SECOND) == made.since(470 * SECOND, 500 * SECOND)
    restored.frame(500 * SECOND, HERE)
    made.frame(500 * SECOND, HERE)
    assert restored.state() == made.state()
