"""The order of settings, and that choosing among them keeps its promise."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.config import Verdict
from stream.ladder import LOOSER, STRICTER, Choice, choose, ladder, limits
from stream.poisson import upper_limit

probabilities = st.floats(0.2, 0.999)


def test_the_settings_in_effect_are_a_rung() -> None:
    verdict = Verdict(open_probability=0.95, open_hold_s=2.5)
    rungs = ladder(verdict)
    assert len(rungs) == LOOSER + 1 + STRICTER
    assert rungs[LOOSER].applied(verdict) == verdict


@settings(max_examples=40, deadline=None)
@given(probabilities, st.floats(0.1, 20), st.floats(0.1, 30), st.floats(0.5, 60))
def test_every_rung_is_at_least_as_strict_as_the_one_before_and_valid(
    opens: float, hold: float, track: float, window: float
) -> None:
    verdict = Verdict(
        open_probability=opens,
        close_probability=opens / 2,
        open_hold_s=hold,
        min_track_s=track,
        window_s=window,
    )
    rungs = ladder(verdict)
    for rung in rungs:
        assert Verdict.model_validate(rung.applied(verdict).model_dump()).window_s == window
    for looser, stricter in pairwise(rungs):
        assert stricter.open_probability >= looser.open_probability - 1e-4
        assert stricter.open_hold_s >= looser.open_hold_s - 0.01
        assert stricter.min_track_s >= looser.min_track_s - 0.01
    assert rungs[-1].min_track_s <= max(track, 0.75 * window) + 0.01


def test_a_threshold_that_nothing_reaches_is_left_alone() -> None:
    rungs = ladder(Verdict(open_probability=1.0))
    assert all(rung.open_probability == 1.0 for rung in rungs[LOOSER:])


def test_with_footage_enough_nothing_changes() -> None:
    assert choose(limits([0] * 17, 100), 0.05, None) == Choice(LOOSER, True)


def test_alarms_make_it_stricter() -> None:
    alarms = [9, 9, 9, 9, 5, 3, 1, *[0] * 10]
    assert choose(limits(alarms, 60), 0.05, None) == Choice(7, True)
    assert choose(limits(alarms, 100), 0.05, None) == Choice(6, True)


def test_a_failure_among_stricter_settings_is_the_end() -> None:
    """The order promises no quieter rung: what lies beyond a failure is not looked at."""
    alarms = [0] * 17
    alarms[10] = 7
    assert choose(limits(alarms, 60), 0.05, None) == Choice(11, True)


def test_what_finds_more_is_taken_while_it_is_allowed() -> None:
    recall = [1.0, 0.9, 0.9, 0.6, 0.5, *[0.2] * 12]
    alarms = [4, *[0] * 16]
    assert choose(limits(alarms, 60), 0.05, recall) == Choice(2, True)
    assert choose(limits([0] * 17, 60), 0.05, [0.5] * 17) == Choice(LOOSER, True)


@pytest.mark.parametrize(
    ("alarms", "rung"), [([0] * 17, LOOSER), ([3] * 6 + [1] * 4 + [0] * 7, 10), ([2] * 17, 4)]
)
def test_with_too_little_footage_the_lowest_limit_is_taken(alarms: list[int], rung: int) -> None:
    bounds = limits(alarms, 1)
    assert choose(bounds, 0.05, [1.0] * 17) == Choice(rung, False)
    assert bounds[rung] == upper_limit(min(alarms[LOOSER:]))


def test_trying_many_settings_does_not_break_the_promise() -> None:
    """Every rung truly worse than wanted: at most one calibration in twenty may say otherwise. A free search
    would say so far more often."""
    rng = np.random.default_rng(7)
    hours, target = 150.0, 0.05
    counts = rng.poisson(1.001 * target * hours, (2000, 17))
    wrong = [choose(limits(row.tolist(), hours), target, None).reached for row in counts]
    free = [min(limits(row.tolist(), hours)) <= target for row in counts]
    assert np.mean(wrong) <= 0.06
    assert np.mean(free) > 0.2
