"""The watchdog on a clock that only tests move: every drawn time line leads to the phase it should."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.backoff import Backoff
from stream.clock import FakeClock
from stream.config import Ingest
from stream.controls import FeedPhase
from stream.errors import Code, UnmaskError
from stream.watchdog import LEGAL, OVER, Loss, Step, Watchdog

SETTINGS = Ingest(
    silence_s=10.0, first_frame_s=20.0, backoff_first_s=0.5, backoff_max_s=30.0, backoff_jitter=0.3
)
BROKEN = UnmaskError(Code.SOURCE_LOST, "source x broke off")


def watchdog(clock: FakeClock, loss: Loss = Loss.REATTACH) -> Watchdog:
    backoff = Backoff(
        SETTINGS.backoff_first_s, SETTINGS.backoff_max_s, SETTINGS.backoff_jitter, random.Random(1)
    )
    return Watchdog("x", SETTINGS, loss, backoff, clock)


def run(dog: Watchdog, clock: FakeClock, seconds: float, pictures: bool = False) -> list[Step]:
    """Let time pass in steps of 0.1 s; return the steps the watchdog asked for."""
    asked = []
    for _ in range(round(seconds * 10)):
        clock.advance(0.1)
        if pictures:
            dog.picture()
        asked.append(dog.check())
    return [step for step in asked if step is not Step.NOTHING]


def test_pictures_keep_a_feed_live() -> None:
    clock = FakeClock()
    dog = watchdog(clock)
    assert run(dog, clock, 5) == []
    assert dog.phase is FeedPhase.CONNECTING
    assert run(dog, clock, 100, pictures=True) == []
    assert (dog.phase, dog.alive, dog.error) == (FeedPhase.LIVE, True, None)


def test_silence_is_noticed_within_silence_s_and_attached_again() -> None:
    clock = FakeClock()
    dog = watchdog(clock)
    dog.picture()
    assert run(dog, clock, 8.9) == []
    assert run(dog, clock, 1.0) == [Step.ABANDON, Step.ATTACH]
    assert dog.error is not None
    assert dog.error.code is Code.SOURCE_SILENT
    assert str(dog.error) == "source x sends no video for 9.0 s"
    dog.picture()
    assert (dog.phase, dog.error) == (FeedPhase.LIVE, None)


def test_a_feed_that_never_shows_a_picture_is_abandoned_again_and_again() -> None:
    clock = FakeClock()
    dog = watchdog(clock)
    assert run(dog, clock, 19.9) == []
    assert run(dog, clock, 0.2) == [Step.ABANDON]
    assert dog.error is not None
    assert dog.error.code is Code.SOURCE_TIMEOUT
    asked = run(dog, clock, 300)
    assert asked[:4] == [Step.ATTACH, Step.ABANDON] * 2
    assert len(asked) >= 12


def test_errors_back_off_ever_longer_but_never_give_up() -> None:
    clock = FakeClock()
    dog = watchdog(clock)
    waits = []
    for _ in range(12):
        dog.lost(BROKEN)
        before = clock.monotonic()
        while dog.check() is not Step.ATTACH:
            clock.advance(0.05)
        waits.append(clock.monotonic() - before)
    assert waits[0] <= 0.55
    assert 20 < waits[-1] <= 30.05
    assert waits[5] > waits[1] > waits[0]


@pytest.mark.parametrize(("live_s", "longest"), [(11.0, 0.55), (2.0, 30.05)])
def test_only_a_feed_that_stayed_live_starts_over_with_short_waits(live_s: float, longest: float) -> None:
    clock = FakeClock()
    dog = watchdog(clock)
    for _ in range(10):
        dog.lost(BROKEN)
        while dog.check() is not Step.ATTACH:
            clock.advance(0.05)
    run(dog, clock, live_s, pictures=True)
    dog.lost(BROKEN)
    before = clock.monotonic()
    while dog.check() is not Step.ATTACH:
        clock.advance(0.05)
    waited = clock.monotonic() - before
    assert waited <= longest
    assert (waited > 1.0) == (longest > 1.0)


def test_a_feed_that_dies_of_silence_after_long_life_starts_over_with_short_waits() -> None:
    clock = FakeClock()
    dog = watchdog(clock)
    for _ in range(10):
        dog.lost(BROKEN)
        while dog.check() is not Step.ATTACH:
            clock.advance(0.05)
    run(dog, clock, 60, pictures=True)
    assert run(dog, clock, 9.8) == [Step.ABANDON, Step.ATTACH]


def test_stdin_is_silent_but_kept() -> None:
    clock = FakeClock()
    dog = watchdog(clock, Loss.WAIT)
    dog.picture()
    assert run(dog, clock, 100) == []
    assert dog.phase is FeedPhase.SILENT
    assert dog.error is not None
    dog.picture()
    assert dog.phase is FeedPhase.LIVE
    dog.finished()
    assert dog.phase is FeedPhase.ENDED


def test_a_file_that_hangs_or_breaks_ends() -> None:
    clock = FakeClock()
    hanging, broken = watchdog(clock, Loss.END), watchdog(clock, Loss.END)
    hanging.picture()
    assert run(hanging, clock, 10) == [Step.ABANDON]
    broken.lost(BROKEN)
    for dog in (hanging, broken):
        assert dog.phase is FeedPhase.ENDED
        assert dog.error is not None
        assert run(dog, clock, 100) == []


def test_what_is_our_own_fault_is_not_held_against_the_source() -> None:
    clock = FakeClock()
    dog = watchdog(clock)
    for _ in range(300):
        clock.advance(0.1)
        dog.excuse()
        assert dog.check() is Step.NOTHING
    dog.picture()
    for _ in range(300):
        clock.advance(0.1)
        dog.excuse()
        assert dog.check() is Step.NOTHING
    assert run(dog, clock, 9.5)[0] is Step.ABANDON


def test_stopping_is_final() -> None:
    clock = FakeClock()
    dog = watchdog(clock)
    dog.stop()
    dog.stop()
    assert dog.phase is FeedPhase.STOPPED
    with pytest.raises(ValueError, match="stopped does not lead to live"):
        dog.picture()


def test_every_phase_can_be_left_or_is_over() -> None:
    assert set(LEGAL) == set(FeedPhase)
    for phase, following in LEGAL.items():
        assert bool(following) != (phase in OVER)


EVENTS = st.lists(
    st.one_of(
        st.floats(0.01, 40.0).map(lambda seconds: ("wait", seconds)),
        st.sampled_from([("picture", 0.0), ("lost", 0.0), ("excuse", 0.0)]),
    ),
    max_size=60,
)


@given(events=EVENTS, loss=st.sampled_from(Loss))
def test_any_time_line_is_legal_and_no_dead_feed_passes_for_live(
    events: list[tuple[str, float]], loss: Loss
) -> None:
    """Silence beyond `silence_s` is never `alive` after a check, whatever happened before."""
    clock = FakeClock()
    dog = watchdog(clock, loss)
    seen: float | None = None
    for name, seconds in events:
        if dog.phase in OVER:
            break
        reading = dog.phase is not FeedPhase.BACKOFF
        if name == "wait":
            clock.advance(seconds)
        elif name == "picture" and reading:
            dog.picture()
            seen = clock.monotonic()
        elif name == "lost" and reading:
            dog.lost(BROKEN)
        elif name == "excuse":
            dog.excuse()
            seen = clock.monotonic() if seen is not None else None
        dog.check()
        if dog.alive:
            assert seen is not None
            assert clock.monotonic() - seen < SETTINGS.silence_s
        if loss is Loss.REATTACH:
            assert dog.phase not in OVER


@given(
    first=st.floats(0.01, 10), longest=st.floats(0.01, 100), jitter=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_waits_stay_within_bounds(first: float, longest: float, jitter: float, seed: int) -> None:
    backoff = Backoff(first, longest, jitter, random.Random(seed))
    waits = [backoff.wait_s() for _ in range(20)]
    assert all(0 <= wait <= longest for wait in waits)
    assert waits[0] >= min(first, longest) * (1 - jitter) - 1e-9
    backoff.reset()
    assert backoff.wait_s() <= first
