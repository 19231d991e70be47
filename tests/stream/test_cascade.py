"""Heavy members: their share of the device's time, on a fake clock, and what their failure costs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from detectors.readings import FaceReading, Image, Reason
from stream.cascade import PAUSE_S, Cascade, Outcome
from stream.clock import FakeClock
from tests.stream.story import face

PICTURE = np.zeros((4, 4, 3), np.uint8)
FACES = (face(3.0),)
BLURRED = (face(3.0, reasons=(Reason.BLUR,)),)


class Heavy:
    """Takes so many seconds a picture, and adds a logit."""

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        self.clock = clock
        self.seconds = seconds
        self.broken = False
        self.calls = 0

    def deepen(self, image: Image, faces: Sequence[FaceReading]) -> tuple[FaceReading, ...]:
        self.calls += 1
        self.clock.advance(self.seconds)
        if self.broken:
            raise RuntimeError("out of memory")
        return tuple(replace(one, logits=one.logits | {"heavy": 5.0}) for one in faces)


@pytest.fixture
def heavy() -> Heavy:
    return Heavy(FakeClock(), 0.1)


@pytest.mark.parametrize("share", [0.05, 0.25, 1.0])
def test_heavy_members_take_their_share_evenly_spread(heavy: Heavy, share: float) -> None:
    clock = heavy.clock
    cascade, begun, times = Cascade(heavy, share, clock), clock.monotonic(), []
    while clock.monotonic() - begun < 60:
        before = heavy.calls
        cascade.deepen("a", PICTURE, FACES, live=True)
        if heavy.calls > before:
            times.append(clock.monotonic() - begun - heavy.seconds)
        clock.advance(0.01)
    spent = heavy.calls * heavy.seconds
    assert spent == pytest.approx(cascade.seconds)
    assert 0.85 * share * 60 <= spent <= share * 60 + heavy.seconds
    gaps = np.diff(times)
    assert gaps.max() - gaps.min() < 0.03
    assert cascade.pictures[Outcome.READ] == heavy.calls
    assert (cascade.pictures[Outcome.REFUSED] > 0) is (share < 1)


def test_what_is_read_more_deeply_says_so_and_what_is_refused_stays(heavy: Heavy) -> None:
    cascade = Cascade(heavy, 0.1, heavy.clock)
    assert cascade.deepen("a", PICTURE, FACES, live=True)[0].logits == {"m": 3.0, "heavy": 5.0}
    assert cascade.deepen("a", PICTURE, FACES, live=True) is FACES
    assert cascade.pictures == Counter({Outcome.READ: 1, Outcome.REFUSED: 1})


def test_files_wait_for_nobody(heavy: Heavy) -> None:
    cascade = Cascade(heavy, 0.01, heavy.clock)
    for _ in range(10):
        cascade.deepen("a", PICTURE, FACES, live=False)
    assert cascade.pictures == Counter({Outcome.READ: 10})


def test_nothing_is_spent_where_nothing_can_be_decided(heavy: Heavy) -> None:
    cascade = Cascade(heavy, 0.5, heavy.clock)
    assert cascade.deepen("a", PICTURE, BLURRED, live=True) is BLURRED
    assert cascade.deepen("a", PICTURE, (), live=True) == ()
    assert (heavy.calls, cascade.pictures) == (0, Counter())


def test_a_failure_costs_itself_and_is_tried_again_later(heavy: Heavy) -> None:
    heavy.broken = True
    cascade = Cascade(heavy, 1.0, heavy.clock)
    assert cascade.deepen("a", PICTURE, FACES, live=True) is FACES
    assert cascade.deepen("a", PICTURE, FACES, live=False) is FACES
    assert cascade.pictures == Counter({Outcome.FAILED: 1, Outcome.REFUSED: 1})
    assert heavy.calls == 1
    heavy.broken = False
    heavy.clock.advance(PAUSE_S)
    assert "heavy" in cascade.deepen("a", PICTURE, FACES, live=True)[0].logits
