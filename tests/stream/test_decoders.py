"""The pool of decoder children: same frames as in-process, in order, whatever happens to a child."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from stream import decoder_child, decoders
from stream.clock import Deadline, SystemClock
from stream.config import Decode
from stream.decoders import LEGAL, ChildState, DecoderPool
from stream.errors import Code
from stream.frames import Applied, DecoderEvent, Failed, ResumePoint, SampledFrame
from stream.records import Record
from tests.stream import poison
from tests.stream.decoding import (
    EVERY,
    applied,
    as_records,
    chunked,
    decoder,
    failed,
    frames,
    resume_after,
    run,
    shown,
)
from tests.stream.media import make_clip

PATIENCE_S = 60.0
"""No test waits longer for what must come; the machine may be busy."""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    return make_clip(path, seconds=3.2, gop=20, size=(96, 64), audio=None)


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    with_pool = DecoderPool(Decode(slots=4), SystemClock())
    yield with_pool
    with_pool.shutdown(Deadline(10, SystemClock()))


def copied(event: DecoderEvent) -> DecoderEvent:
    """Return a frame as if it were in-process, and give its slot back."""
    if not isinstance(event, SampledFrame):
        return event
    own = SampledFrame(
        event.offset,
        event.meta,
        event.pts,
        event.media_us,
        event.image.copy(),
        event.small.copy(),
        event.cut,
        lambda: None,
    )
    event.release()
    return own


def drive(
    pool: DecoderPool, records: Sequence[Record], stop: int | None = None, patience_s: float = PATIENCE_S
) -> list[DecoderEvent]:
    """Submit all records as there is room and return events until record `stop` (default: the last) is done."""
    last = records[-1].offset if stop is None else stop
    waiting = list(records)
    events: list[DecoderEvent] = []
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        while waiting and pool.submit(waiting[0]):
            waiting.pop(0)
        events += [copied(event) for event in pool.poll(0.05)]
        if events and not isinstance(events[-1], SampledFrame) and events[-1].offset >= last:
            return events
    raise AssertionError(f"record {last} was not done in {patience_s} s; have {len(events)} events")


def test_gives_what_a_decoder_in_process_gives(pool: DecoderPool, clip: Path) -> None:
    chunks = chunked(clip)
    expected = run(chunks, decoder(detect_width=640))
    pool.open("cam", ResumePoint(), EVERY)
    events = drive(pool, as_records(chunks))
    assert [shown(frame) for frame in frames(events)] == [shown(frame) for frame in frames(expected)]
    assert all(np.array_equal(a.small, b.small) for a, b in zip(frames(events), frames(expected), strict=True))
    assert [e for e in events if not isinstance(e, SampledFrame)] == [
        e for e in expected if not isinstance(e, SampledFrame)
    ]
    stats = pool.stats()
    assert (stats.started, stats.died, stats.failed, stats.queued) == (1, 0, 0, 0)
    assert stats.decode.decoded == 80
    assert stats.decode.sampled == len(frames(expected))
