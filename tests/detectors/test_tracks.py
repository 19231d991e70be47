"""Tracks over drawn time lines: boxes that move, pass, vanish, come back and are cut."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detectors.readings import Box
from detectors.tracks import Tracker


def box(x: float, y: float = 100.0, side: float = 80.0) -> Box:
    return x - side / 2, y - side / 2, x + side / 2, y + side / 2


def us(seconds: float) -> int:
    return round(seconds * 1e6)


def test_a_resting_face_keeps_its_id_through_jitter() -> None:
    tracker = Tracker()
    ids = [tracker.update(us(k / 2), [box(100 + 3 * (-1) ** k, side=80 + k % 3)], False) for k in range(20)]
    assert ids == [[0]] * 20


def test_a_fast_face_is_found_by_its_motion() -> None:
    """A whole face width between samples at 2 fps: it no longer overlaps, but it was on its way."""
    tracker = Tracker()
    places = [100.0, 130.0, 180.0, 250.0, 330.0, 410.0, 490.0]
    assert [tracker.update(us(k / 2), [box(x)], False)[0] for k, x in enumerate(places)] == [0] * 7


def test_a_face_that_stops_suddenly_is_not_lost_to_its_prediction() -> None:
    tracker = Tracker()
    for k in range(6):
        tracker.update(us(k / 2), [box(100 + 45 * k)], False)
    assert tracker.update(us(3), [box(325)], False) == [0]


def test_two_faces_side_by_side_do_not_swap_when_the_order_does() -> None:
    tracker = Tracker()
    assert tracker.update(0, [box(100), box(220)], False) == [0, 1]
    assert tracker.update(us(0.5), [box(222), box(101)], False) == [1, 0]


def test_two_faces_that_pass_each_other_keep_their_ids() -> None:
    tracker = Tracker()
    for k in range(17):
        t = k / 8
        left, right = box(100 + 200 * t, 100), box(500 - 200 * t, 150)
        assert tracker.update(us(t), [left, right], False) == [0, 1]


def test_a_cut_ends_all_and_ids_go_on() -> None:
    tracker = Tracker()
    tracker.update(0, [box(100), box(300)], False)
    assert tracker.update(us(0.5), [box(100), box(300)], True) == [2, 3]
    assert tracker.ended == [0, 1]
    tracker.update(us(1), [], False)
    assert tracker.ended == []


def test_a_face_comes_back_within_lost_s_and_not_after() -> None:
    tracker = Tracker(lost_s=2.0)
    tracker.update(0, [box(100)], False)
    tracker.update(us(1), [], False)
    assert tracker.update(us(2), [box(105)], False) == [0]
    assert tracker.update(us(4.1), [box(105)], False) == [1]
    assert tracker.ended == [0]


def test_a_face_is_ended_by_time_even_without_faces() -> None:
    tracker = Tracker(lost_s=2.0)
    tracker.update(0, [box(100)], False)
    tracker.update(us(2), [], False)
    assert (tracker.active, tracker.ended) == ((0,), [])
    tracker.update(us(2.5), [], False)
    assert (tracker.active, tracker.ended) == ((), [0])


def test_another_size_or_another_place_is_another_face() -> None:
    tracker = Tracker()
    tracker.update(0, [box(100)], False)
    assert tracker.update(us(0.5), [box(100, side=200)], False) == [1]
    assert tracker.update(us(1), [box(400)], False) == [2]


def test_the_nearer_of_two_takes_the_track() -> None:
    tracker = Tracker()
    tracker.update(0, [box(100)], False)
    assert tracker.update(us(0.5), [box(140), box(105)], False) == [1, 0]


def test_overlap_comes_before_nearness() -> None:
    tracker = Tracker(min_iou=0.3)
    tracker.update(0, [box(100), box(160)], False)
    assert tracker.update(us(0.5), [box(130)], False) in ([0], [1])
    assert tracker.active == (0, 1)


def test_end_all() -> None:
    tracker = Tracker()
    tracker.update(0, [box(100), box(300)], False)
    assert tracker.end_all() == [0, 1]
    assert tracker.active == ()
    assert tracker.update(us(1), [box(100)], False) == [2]


def test_time_must_not_step_back() -> None:
    tracker = Tracker()
    tracker.update(us(2), [box(100)], False)
    assert tracker.update(us(2), [box(101)], False) == [0]
    with pytest.raises(ValueError, match="must not step back"):
        tracker.update(us(1), [box(100)], False)


steps = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.125, 0.5, 1.0, 3.0]),
        st.lists(
            st.tuples(st.integers(0, 12), st.integers(0, 3), st.sampled_from([60, 80, 140])), max_size=5
        ),
        st.booleans(),
    ),
    max_size=25,
)


def drawn(
    timeline: list[tuple[float, list[tuple[int, int, int]], bool]],
) -> list[tuple[int, list[Box], bool]]:
    now = 0.0
    out = []
    for dt, faces, cut in timeline:
        now += dt
        out.append((us(now), [box(40.0 * x, 60.0 * y, side) for x, y, side in faces], cut and dt > 0.9))
    return out


@given(steps)
def test_whatever_is_drawn(timeline: list[tuple[float, list[tuple[int, int, int]], bool]]) -> None:
    """One id per box, none twice in a picture, none given again after it ended, each ended once, in order."""
    tracker = Tracker(lost_s=2.0)
    over: set[int] = set()
    newest = -1
    last_seen: dict[int, int] = {}
    for media_us, boxes, cut in drawn(timeline):
        ids = tracker.update(media_us, boxes, cut)
        assert len(ids) == len(set(ids)) == len(boxes)
        assert tracker.ended == sorted(tracker.ended)
        assert not over & set(tracker.ended)
        over |= set(tracker.ended)
        assert not over & set(ids)
        fresh = sorted(track for track in ids if track not in last_seen)
        assert fresh == list(range(newest + 1, newest + 1 + len(fresh)))
        newest += len(fresh)
        last_seen |= dict.fromkeys(ids, media_us)
        assert all(media_us - last_seen[track] <= us(2) for track in tracker.active)
        assert set(tracker.active) | over == set(last_seen)
        if cut:
            assert set(tracker.active) == set(ids) == set(fresh)


@given(steps, st.integers(0, 25))
def test_a_restart_anywhere_changes_nothing(
    timeline: list[tuple[float, list[tuple[int, int, int]], bool]], at: int
) -> None:
    straight, broken = Tracker(), Tracker()
    for k, (media_us, boxes, cut) in enumerate(drawn(timeline)):
        if k == at:
            state = json.loads(json.dumps(broken.state(), allow_nan=False))
            broken = Tracker()
            broken.restore(state)
        assert straight.update(media_us, boxes, cut) == broken.update(media_us, boxes, cut)
        assert straight.ended == broken.ended
    assert straight.state() == broken.state()


@given(st.floats(2, 8), st.floats(0, 40), st.floats(0, 2 * math.pi))
def test_steady_motion_at_any_rate_is_one_track(fps: float, speed: float, direction: float) -> None:
    """Up to half a face width a second in any direction, sampled at any rate in use."""
    tracker = Tracker()
    for k in range(12):
        t = k / fps
        place = box(300 + speed * t * math.cos(direction), 300 + speed * t * math.sin(direction))
        assert tracker.update(us(t), [place], False) == [0]
