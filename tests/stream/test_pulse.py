"""A loop is alive while it works or waits for the log, each within its bound."""

from stream.clock import FakeClock
from stream.pulse import LOG_CALL_S, Pulse


def test_what_the_log_takes_is_no_stall_up_to_a_bound() -> None:
    clock = FakeClock()
    pulse = Pulse(clock)
    clock.advance(31)
    assert pulse.still(30)
    pulse.beat()
    assert not pulse.still(30)
    with pulse.log():
        clock.advance(LOG_CALL_S - 1)
        assert not pulse.still(30)
        clock.advance(2)
        assert pulse.still(30)
    assert not pulse.still(30)


def test_what_is_called_back_is_work_again() -> None:
    clock = FakeClock()
    pulse = Pulse(clock)
    with pulse.log():
        with pulse.work():
            clock.advance(31)
            assert pulse.still(30)
        assert not pulse.still(30)
        clock.advance(31)
        assert not pulse.still(30)
    clock.advance(31)
    assert pulse.still(30)
