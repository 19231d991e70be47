"""The thread that owns the device: order, and what a picture that cannot be read costs."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from detectors.readings import FaceReading, Image
from stream.canary import canary_id
from stream.cascade import Cascade
from stream.clock import Deadline, FakeClock, SystemClock
from stream.device import MAX_UNREADABLE, QUEUE_ITEMS, Device, Result, Skipped
from stream.frames import SampledFrame, ScoredFrame
from stream.records import ChunkMeta, Kind
from tests.stream.story import face

BAD = 255
"""Grey level of a picture on which the reader fails."""


class Reader:
    engine = "none"
    precision = "none"

    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        if any(image.max() == BAD for image, _ in frames):
            raise RuntimeError("out of memory")
        return [() for _ in frames]


META = ChunkMeta("cam", "0" * 16, 0, 0, Kind.LIVE, 0, 0, Fraction(1, 25), 0, 0, True, None, "", "")


def frame(pts: int, grey: int = 0) -> SampledFrame:
    image = np.full((4, 4, 3), grey, np.uint8)
    return SampledFrame(0, META, pts, pts * 40_000, image, image, False, lambda: None)


class Noting:
    """Heavy members that note what they are shown."""

    def __init__(self, clock: FakeClock | None = None) -> None:
        self.seen: list[int] = []
        self._clock = clock

    def deepen(self, image: Image, faces: Sequence[FaceReading]) -> tuple[FaceReading, ...]:
        self.seen.append(int(image[0, 0, 0]))
        if self._clock is not None:
            self._clock.advance(5.0)
        return tuple(replace(one, fused=9.0) for one in faces)


class Faces(Reader):
    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        return [(face(1.0),) for _ in frames]


def test_only_suspect_frames_are_read_more_deeply_and_never_the_canary_s() -> None:
    heavy, clock = Noting(), SystemClock()
    made: Device[None] = Device(Faces(), 4, clock, Cascade(heavy, 1.0, clock))
    for pts in range(6):
        made.offer(frame(pts, pts), False, None, suspect=pts % 2 == 1)
    nobody = np.zeros((180, 320, 3), np.uint8)
    canary = replace(frame(7), meta=replace(META, stream=canary_id(0)), image=nobody, small=nobody)
    made.offer(canary, False, None, suspect=True)
    made.start()
    found = results(made, 7)
    made.stop(5)
    assert set(heavy.seen) <= {1, 3, 5}
    assert heavy.seen[0] == 1
    fused = [[one.fused for one in result.faces] for result in found if isinstance(result, ScoredFrame)]
    assert fused[:2] == [[1.0], [9.0]]
    assert fused[-1] == []


def test_heavy_time_is_not_that_of_bursts() -> None:
    clock = FakeClock()
    made: Device[None] = Device(Faces(), 4, clock, Cascade(Noting(clock), 1.0, clock))
    made.offer(frame(0), False, None, suspect=True)
    made.start()
    deadline = Deadline(10, SystemClock())
    while made.pending() and not made.take() and not deadline.passed():
        SystemClock().sleep(0.005)
    made.stop(5)
    assert made.seconds_per_frame < 0.001


@pytest.fixture
def device() -> Iterator[Device[None]]:
    made: Device[None] = Device(Reader(), 4, SystemClock())
    yield made
    made.stop(5)


def results(device: Device[None], count: int) -> list[Result]:
    deadline, found = Deadline(10, SystemClock()), list[Result]()
    while len(found) < count and device.error is None and not deadline.passed():
        found += [result for _, result in device.take()]
        SystemClock().sleep(0.005)
    return found


def test_a_picture_that_cannot_be_read_costs_only_itself(device: Device[None]) -> None:
    for pts in range(8):
        device.offer(frame(pts, BAD if pts == 2 else 0), False, None)
    device.start()
    found = results(device, 8)
    assert [type(result) for result in found] == [Skipped if pts == 2 else ScoredFrame for pts in range(8)]
    assert [result.dropped.reason for result in found if isinstance(result, Skipped)] == ["UNREADABLE"]
    assert device.error is None


def test_a_reader_that_reads_nothing_is_an_error(device: Device[None]) -> None:
    for pts in range(MAX_UNREADABLE):
        device.offer(frame(pts, BAD), False, None)
    device.start()
    results(device, MAX_UNREADABLE)
    assert isinstance(device.error, RuntimeError)


def test_room_is_room_for_one_more(device: Device[None]) -> None:
    for pts in range(QUEUE_ITEMS):
        assert device.room()
        device.offer(frame(pts), False, None)
    assert not device.room()
    device.start()
    assert len(results(device, QUEUE_ITEMS)) == QUEUE_ITEMS
