"""The committed position is the next record to apply, whatever finishes first."""

from hypothesis import given
from hypothesis import strategies as st

from stream.log import TopicPartition
from stream.positions import Positions

P0 = TopicPartition("unmask.media", 0)


def test_position_waits_for_the_slowest_stream() -> None:
    positions = Positions()
    positions.assign(P0, 10)
    for offset in (10, 11, 12):
        positions.taken(P0, offset)
    positions.applied(P0, 11)
    positions.applied(P0, 12)
    assert positions.movable() == {}
    positions.applied(P0, 10)
    assert positions.movable() == {P0: 13}


def test_warm_up_below_the_committed_position_never_moves_it_back() -> None:
    positions = Positions()
    positions.assign(P0, 10)
    positions.taken(P0, 4)
    assert positions.movable() == {}
    positions.applied(P0, 4)
    assert positions.movable() == {}
    positions.taken(P0, 10)
    positions.applied(P0, 10)
    assert positions.movable() == {P0: 11}
    positions.committed({P0: 11})
    assert positions.movable() == {}


def test_a_record_that_finishes_after_revocation_is_ignored() -> None:
    positions = Positions()
    positions.assign(P0, 0)
    positions.taken(P0, 0)
    positions.forget(P0)
    positions.applied(P0, 0)
    assert positions.movable() == {}
    assert positions.in_hand() == 0


def test_what_is_in_hand_holds_the_position_when_reading_skips_ahead() -> None:
    positions = Positions()
    positions.assign(P0, 0)
    positions.taken(P0, 0)
    positions.skip(P0, 5)
    positions.taken(P0, 5)
    positions.applied(P0, 5)
    assert positions.movable() == {}
    positions.applied(P0, 0)
    assert positions.movable() == {P0: 6}


@given(st.permutations(range(12)), st.integers(0, 12))
def test_everything_below_the_position_is_applied(order: list[int], finished: int) -> None:
    positions = Positions()
    positions.assign(P0, 0)
    for offset in range(12):
        positions.taken(P0, offset)
    done = set(order[:finished])
    for offset in done:
        positions.applied(P0, offset)
    position = positions.movable().get(P0, 0)
    assert all(offset in done for offset in range(position))
    assert position == 12 or position not in done
