"""The thread that owns the device: order, and what a picture that cannot be read costs."""

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import pytest

from detectors.readings import FaceReading, Image
from stream.clock import Deadline, SystemClock
from stream.device import MAX_UNREADABLE, QUEUE_ITEMS, Device, Result, Skipped
from stream.frames import SampledFrame, ScoredFrame
from stream.records import ChunkMeta, Kind

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
