"""Sampling by media time: the same frames whatever the chunks, restarts and first frame."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.sampling import Sampler, tick

START_US = 1_700_000_000_000_000
RATES = st.one_of(st.sampled_from([0.5, 2.0, 8.0, 29.97, 60.0]), st.floats(0.01, 60.0))
GAPS = st.lists(st.integers(1, 400_000), min_size=1, max_size=80)


def times(gaps: list[int]) -> list[int]:
    result = [START_US]
    for gap in gaps:
        result.append(result[-1] + gap)
    return result


def test_takes_the_first_frame_of_every_interval() -> None:
    sampler = Sampler()
    taken = [n for n in range(50) if sampler.take(START_US + n * 40_000, 2.0)]
    assert taken == [0, 13, 25, 38]


def test_media_time_of_today_is_exact() -> None:
    # 1.7e15 us * 60 Hz has no exact float: neighbours of a tick must still fall on their own sides.
    edge = START_US + 1_000_000 // 8
    assert tick(edge, 8.0) == tick(edge - 1, 8.0) + 1
    assert tick(START_US, 60.0) == tick(START_US - 1, 60.0) + 1


@given(GAPS, RATES, st.integers(0, 80))
def test_any_restart_takes_the_same_frames(gaps: list[int], fps: float, cut: int) -> None:
    media = times(gaps)
    whole = Sampler()
    expected = [us for us in media if whole.take(us, fps)]
    first = Sampler()
    got = [us for us in media[:cut] if first.take(us, fps)]
    second = Sampler(first.last_us)
    assert got + [us for us in media[cut:] if second.take(us, fps)] == expected


@given(GAPS, RATES)
def test_never_more_than_the_rate_and_never_a_needless_gap(gaps: list[int], fps: float) -> None:
    media = times(gaps)
    sampler = Sampler()
    taken = [us for us in media if sampler.take(us, fps)]
    assert len({tick(us, fps) for us in taken}) == len(taken)
    assert {tick(us, fps) for us in taken} == {tick(us, fps) for us in media}


def test_a_new_rate_holds_from_the_next_frame() -> None:
    sampler = Sampler()
    media = [START_US + n * 40_000 for n in range(50)]
    slow = [us for us in media[:25] if sampler.take(us, 2.0)]
    fast = [us for us in media[25:] if sampler.take(us, 25.0)]
    assert len(slow) == 2
    assert fast == media[25:]


@pytest.mark.parametrize("back_us", [1, 40_000, 3_600_000_000])
def test_media_time_that_steps_back_is_watched_at_once(back_us: int) -> None:
    sampler = Sampler(START_US)
    assert sampler.take(START_US - back_us, 2.0) or back_us < 500_000
    taken = sum(sampler.take(START_US - back_us + n * 40_000, 2.0) for n in range(25))
    assert taken >= 1
