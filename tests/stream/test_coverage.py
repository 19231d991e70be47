"""Coverage adds up to the period, and claims nothing that no sampled frame proves."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.coverage import Coverage, cover

SECOND = 1_000_000


def frame(seconds: float, faces: int = 1, stream: str = "studio") -> dict[str, Any]:
    return {"type": "frame", "stream": stream, "media_us": round(seconds * SECOND), "faces": [{}] * faces}


def verdict(seconds: float, said: str, *reasons: str, incident: str | None = None) -> dict[str, Any]:
    return {
        "type": "verdict",
        "stream": "studio",
        "media_us": round(seconds * SECOND),
        "verdict": said,
        "reasons": list(reasons),
        "incident": incident,
    }


def dropped(first: float, last: float, reason: str) -> dict[str, Any]:
    return {
        "type": "dropped",
        "stream": "studio",
        "first_us": round(first * SECOND),
        "last_us": round(last * SECOND),
        "reason": reason,
    }


def frames(first: float, last: float) -> list[dict[str, Any]]:
    """Two frames a second in [first, last)."""
    return [frame(first + index / 2) for index in range(round((last - first) * 2))]


def covered(records: list[dict[str, Any]], first: float, last: float) -> Coverage:
    return cover("studio", records, round(first * SECOND), round(last * SECOND))


def test_a_period_in_all_its_parts() -> None:
    #   seconds   0    2         10        16   18        24       30
    #   frames    |||||||||||||||||||||||||      (corrupt) ||||||||
    #   verdict   SHORT authentic manipulated              authentic
    records = [
        *frames(0, 16),
        verdict(0, "inconclusive", "SHORT_TRACK", "BLUR"),
        verdict(2, "authentic"),
        verdict(10, "manipulated", incident="i1"),
        dropped(18, 21, "CORRUPT"),
        *frames(24, 30),
        verdict(24, "authentic", "SHORT_TRACK"),
    ]
    found = covered(records, 0, 30)
    # the frame at 15.5 s stands for two seconds: until 17.5 s
    assert found.decided_s == {"authentic": 14.0, "manipulated": 7.5}
    assert found.inconclusive_s == {"SHORT_TRACK": 2.0}
    assert found.unwatched_s == {"CORRUPT": 3.0, "no_record": 3.5}
    assert (found.frames, found.faces, found.incidents) == (44, 44, ("i1",))
    assert (found.watched_s, found.total_s) == (23.5, 30.0)
    assert found.as_json()["watched_s"] == 23.5


def test_nothing_is_unwatched() -> None:
    found = covered([], 0, 60)
    assert found.unwatched_s == {"no_record": 60.0}
    assert found.watched_s == 0


def test_verdict_and_frames_from_before_the_period_reach_into_it() -> None:
    found = covered([verdict(3, "authentic"), frame(9.5), *frames(10.5, 20)], 10, 20)
    assert found.decided_s == {"authentic": 10.0}
    assert found.frames == 19


def test_looking_without_a_verdict_is_inconclusive() -> None:
    found = covered([*frames(0, 10), verdict(4, "authentic")], 0, 10)
    assert found.inconclusive_s == {"no_record": 4.0}


def test_other_streams_and_other_times_are_passed_over() -> None:
    records = [frame(1, stream="other"), frame(50), dropped(40, 50, "CORRUPT"), verdict(50, "authentic")]
    assert covered(records, 0, 10).unwatched_s == {"no_record": 10.0}


def test_a_period_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match="must end after it begins"):
        covered([], 10, 10)


timelines = st.lists(
    st.one_of(
        st.integers(-20, 160).map(lambda tick: frame(tick / 4)),
        st.tuples(st.integers(-20, 160), st.integers(0, 40)).map(
            lambda pair: dropped(pair[0] / 4, (pair[0] + pair[1]) / 4, "CORRUPT")
        ),
        st.tuples(st.integers(-20, 160), st.sampled_from(["authentic", "manipulated"])).map(
            lambda pair: verdict(pair[0] / 4, pair[1])
        ),
        st.integers(-20, 160).map(lambda tick: verdict(tick / 4, "inconclusive", "BLUR")),
    ),
    max_size=60,
)


@given(timelines)
def test_the_parts_add_up_to_the_period_in_any_order(records: list[dict[str, Any]]) -> None:
    found = covered(records, 0, 30)
    assert found.watched_s + sum(found.unwatched_s.values()) == pytest.approx(30.0)
    parts = [*found.decided_s.values(), *found.inconclusive_s.values(), *found.unwatched_s.values()]
    assert all(part > 0 for part in parts)
    times = [record.get("media_us") for record in records if record["type"] == "verdict"]
    if len(times) == len(set(times)):
        mixed = records[:]
        random.Random(1).shuffle(mixed)
        again = covered(mixed, 0, 30)
        assert (again.decided_s, again.inconclusive_s, again.unwatched_s) == (
            found.decided_s,
            found.inconclusive_s,
            found.unwatched_s,
        )


@given(timelines, st.integers(1, 119))
def test_two_halves_are_the_whole(records: list[dict[str, Any]], at: int) -> None:
    whole, left, right = covered(records, 0, 30), covered(records, 0, at / 4), covered(records, at / 4, 30)
    assert left.watched_s + right.watched_s == pytest.approx(whole.watched_s)
    assert left.frames + right.frames == whole.frames
