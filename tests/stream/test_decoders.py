"""The pool of decoder children: same frames as in-process, in order, whatever happens to a child."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
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
from stream.frames import DecoderEvent, ResumePoint, SampledFrame
from stream.records import Control, Record
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


def drive(pool: DecoderPool, records: Sequence[Record]) -> list[DecoderEvent]:
    """Submit all records as there is room; return the events until the last is done."""
    last = records[-1].offset
    waiting = list(records)
    events: list[DecoderEvent] = []
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        while waiting and pool.submit(waiting[0]):
            waiting.pop(0)
        events += [copied(event) for event in pool.poll(0.05)]
        if events and not isinstance(events[-1], SampledFrame) and events[-1].offset >= last:
            return events
    raise AssertionError(f"record {last} was not done in {PATIENCE_S} s; have {len(events)} events")


def test_gives_what_a_decoder_in_process_gives(pool: DecoderPool, clip: Path) -> None:
    chunks = chunked(clip)
    expected = run(chunks, decoder(detect_width=640))
    pool.open("cam", ResumePoint(), EVERY)
    events = drive(pool, as_records(chunks))
    assert [shown(frame) for frame in frames(events)] == [shown(frame) for frame in frames(expected)]
    assert all(
        np.array_equal(a.small, b.small) for a, b in zip(frames(events), frames(expected), strict=True)
    )
    assert [e for e in events if not isinstance(e, SampledFrame)] == [
        e for e in expected if not isinstance(e, SampledFrame)
    ]
    stats = pool.stats()
    assert (stats.started, stats.died, stats.failed, stats.queued) == (1, 0, 0, 0)
    assert stats.decode.decoded == 80
    assert stats.decode.sampled == len(frames(expected))


def test_resumes_where_a_worker_left_off(pool: DecoderPool, clip: Path) -> None:
    chunks = chunked(clip)
    whole = run(chunks, decoder(fps=6.0))
    resume, decode_from = resume_after(whole, 8)
    pool.open("cam", resume, 6.0)
    events = drive(pool, as_records(chunks)[decode_from:])
    later = [shown(frame) for frame in frames(whole) if frame.media_us > (resume.last_sample_us or 0)]
    assert [shown(frame) for frame in frames(events)] == later


def test_streams_keep_their_own_order(pool: DecoderPool, clip: Path) -> None:
    names = ["one", "two", "three"]
    for name in names:
        pool.open(name, ResumePoint(), EVERY)
    waiting = {name: as_records(chunked(clip, stream=name)) for name in names}
    last = {name: records[-1].offset for name, records in waiting.items()}
    done: dict[str, list[int]] = {name: [] for name in names}
    seen: dict[str, list[int]] = {name: [] for name in names}
    end = time.monotonic() + PATIENCE_S
    while any(done[name][-1:] != [last[name]] for name in names) and time.monotonic() < end:
        for records in waiting.values():
            while records and pool.submit(records[0]):
                records.pop(0)
        for event in pool.poll(0.05):
            assert event.meta is not None
            if isinstance(event, SampledFrame):
                seen[event.meta.stream].append(event.pts)
                event.release()
            else:
                done[event.meta.stream].append(event.offset)
    for name in names:
        assert done[name] == list(range(last[name] + 1))
        assert seen[name] == sorted(seen[name])
        assert len(seen[name]) == 80


def poisoned(chunks: Any, offset: int, poison_: bytes) -> list[Record]:
    records = as_records(chunks)
    records[offset] = as_records([(chunks[offset][0], chunks[offset][1] + poison_)], offset)[0]
    return records


@pytest.mark.parametrize(
    ("kind", "code"), [(poison.KILL, Code.DECODER_DIED), (poison.HANG, Code.DECODER_STALLED)]
)
def test_a_chunk_that_kills_twice_is_given_up_and_the_stream_goes_on(
    clip: Path, monkeypatch: pytest.MonkeyPatch, kind: bytes, code: Code
) -> None:
    monkeypatch.setattr(decoder_child, "main", poison.main)
    chunks = chunked(clip)
    bad = next(n for n, (meta, _) in enumerate(chunks) if meta.starts_on_keyframe and n > 4) + 1
    expected = run(chunks)
    pool = DecoderPool(Decode(stall_s=3.0), SystemClock())
    try:
        pool.open("cam", ResumePoint(), EVERY)
        events = drive(pool, poisoned(chunks, bad, kind))
    finally:
        pool.shutdown(Deadline(10, SystemClock()))
    [failure] = failed(events)
    before = [event for event in applied(expected) if event.offset == bad - 1]
    assert (failure.offset, failure.code, failure.meta) == (bad, code, chunks[bad][0])
    assert failure.decode_from == before[0].decode_from
    assert [event.offset for event in events if not isinstance(event, SampledFrame)] == list(
        range(len(chunks))
    )
    key = next(meta.pts for meta, _ in chunks[bad + 1 :] if meta.starts_on_keyframe)
    got = [shown(frame) for frame in frames(events)]
    early = [shown(frame) for frame in frames(expected) if frame.pts < (chunks[bad][0].pts or 0)]
    late = [shown(frame) for frame in frames(expected) if frame.pts > key]
    # Up to the poison: all but what its decoder still held back for reordering. From the keyframe on: all.
    assert got[: len(early) - 3] == early[: len(early) - 3]
    assert got[-len(late) :] == late
    assert {drop.reason for event in applied(events) for drop in event.dropped} == {"CORRUPT"}
    stats = pool.stats()
    assert (stats.retried, stats.failed, stats.started) == (1, 1, 3)
    assert stats.died + stats.stalled == 2


def test_a_control_record_is_applied_whatever_becomes_of_its_decoder(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_child, "main", poison.main)
    media = chunked(clip)
    last = media[-1][0]
    end = replace(
        last,
        sequence=last.sequence + 1,
        control=Control.END,
        pts=None,
        starts_on_keyframe=False,
        content_hash="",
    )
    pool = DecoderPool(Decode(), SystemClock())
    try:
        pool.open("cam", ResumePoint(), EVERY)
        events = drive(pool, poisoned([*media, (end, b"{}")], len(media), poison.KILL))
    finally:
        pool.shutdown(Deadline(10, SystemClock()))
    assert not failed(events)
    assert applied(events)[-1].meta.control is Control.END
    assert applied(events)[-1].control_body.startswith(b"{}")


@pytest.mark.parametrize("kind", [poison.KILL_ONCE, poison.KILL_LATE])
@pytest.mark.parametrize("bad", [1, 6, 13])
def test_a_death_costs_nothing_if_the_second_try_works(
    pool: DecoderPool, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: bytes, bad: int
) -> None:
    monkeypatch.setattr(decoder_child, "main", poison.main)
    chunks = chunked(clip)
    expected = run(chunks, decoder(fps=12.0))
    pool.open("cam", ResumePoint(), 12.0)
    events = drive(pool, poisoned(chunks, bad, kind + os.fsencode(tmp_path / "once")))
    assert [shown(frame) for frame in frames(events)] == [shown(frame) for frame in frames(expected)]
    assert not failed(events)
    assert [(e.offset, e.last_pts, e.decode_from, e.sampled) for e in applied(events)] == [
        (e.offset, e.last_pts, e.decode_from, e.sampled) for e in applied(expected)
    ]
    assert (pool.stats().died, pool.stats().retried, pool.stats().failed) == (1, 1, 0)


def test_a_death_without_work_is_no_record_s_fault(pool: DecoderPool, clip: Path) -> None:
    chunks = chunked(clip)
    records = as_records(chunks)
    expected = run(chunks)
    pool.open("cam", ResumePoint(), EVERY)
    events = drive(pool, records[:7])
    child_of(pool).kill()
    end = time.monotonic() + PATIENCE_S
    while pool.stats().children and time.monotonic() < end:
        assert not pool.poll(0.05)
    events += drive(pool, records[7:])
    assert [shown(frame) for frame in frames(events)] == [shown(frame) for frame in frames(expected)]
    assert (pool.stats().died, pool.stats().retried, pool.stats().failed) == (1, 0, 0)


def child_of(pool: DecoderPool, stream: str = "cam") -> psutil.Process:
    child = pool._streams[stream].child
    assert child is not None
    return psutil.Process(child.process.pid)


def test_what_is_not_kept_is_not_decoded_again(
    pool: DecoderPool, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_child, "main", poison.main)
    monkeypatch.setattr(decoders, "KEPT_BYTES", 100)
    chunks = chunked(clip)
    bad = next(n for n, (meta, _) in enumerate(chunks) if meta.starts_on_keyframe and n > 4) + 1
    pool.open("cam", ResumePoint(), EVERY)
    events = drive(pool, poisoned(chunks, bad, poison.KILL_ONCE + os.fsencode(tmp_path / "once")))
    assert not failed(events)
    assert pool.stats().forgotten > 0
    dropped = [drop for event in applied(events) for drop in event.dropped]
    assert {drop.reason for drop in dropped} == {"CORRUPT"}
    counts = pool.stats().decode
    assert counts.decoded + sum(drop.frames or 0 for drop in dropped) >= 80 - 3


def test_a_child_out_of_memory_fails_its_record_only(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_child, "main", poison.swelling_main)
    pool = DecoderPool(Decode(memory_limit_bytes=512 * 1024**2), SystemClock())
    try:
        pool.open("cam", ResumePoint(), EVERY)
        events = drive(pool, as_records(chunked(clip))[:3])
    finally:
        pool.shutdown(Deadline(10, SystemClock()))
    assert [failure.code for failure in failed(events)] == [Code.DECODE_FAILED] * 2
    assert "MemoryError" in failed(events)[0].sentence
    assert pool.stats().died == 0


def test_headers_that_cannot_be_read_fail_in_order(pool: DecoderPool, clip: Path) -> None:
    records = as_records(chunked(clip))
    bad = Record("media", 0, 3, "cam", b"x", {"schema": b"1", "epoch": b"?"}, 0)
    pool.open("cam", ResumePoint(), EVERY)
    events = drive(pool, [*records[:3], bad, *records[4:]])
    [failure] = failed(events)
    assert (failure.offset, failure.code, failure.meta) == (3, Code.CHUNK_INVALID, None)
    ends = [event.offset for event in events if not isinstance(event, SampledFrame)]
    assert ends == list(range(len(records)))


def test_frames_that_are_held_stop_the_stream_not_the_pool(pool: DecoderPool, clip: Path) -> None:
    records = as_records(chunked(clip, chunk_ms=120))
    pool.open("cam", ResumePoint(), EVERY)
    held: list[SampledFrame] = []
    waiting = list(records)
    quiet = time.monotonic()
    while time.monotonic() - quiet < 1.5:
        while waiting and pool.submit(waiting[0]):
            waiting.pop(0)
        for event in pool.poll(0.05):
            quiet = time.monotonic()
            if isinstance(event, SampledFrame):
                held.append(event)
    assert len(held) == 4
    assert waiting
    assert pool.stats().queued == 8
    assert not pool.submit(waiting[0])
    pictures = [frame.image.copy() for frame in held]
    assert all(not np.array_equal(a, b) for a, b in pairwise(pictures))
    for frame in held:
        frame.release()
        frame.release()  # a second time changes nothing
    rest = drive(pool, waiting)
    assert len(held) + len(frames(rest)) == 80
    assert pool.stats().stalled == 0


def test_waiting_for_a_slot_is_not_stalling(clip: Path) -> None:
    pool = DecoderPool(Decode(stall_s=1.0, slots=2), SystemClock())
    try:
        pool.open("cam", ResumePoint(), EVERY)
        records = as_records(chunked(clip))
        for record in records[:3]:
            assert pool.submit(record)
        held = [event for event in wait_for(pool, 2) if isinstance(event, SampledFrame)]
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            assert not pool.poll(0.1)
        assert pool.stats().stalled == 0
        for frame in held:
            frame.release()
        drive(pool, records[3:])
    finally:
        pool.shutdown(Deadline(10, SystemClock()))


def wait_for(pool: DecoderPool, count: int) -> list[DecoderEvent]:
    """Poll until `count` frames are out; they are not released."""
    events: list[DecoderEvent] = []
    end = time.monotonic() + PATIENCE_S
    while len(frames(events)) < count and time.monotonic() < end:
        events += pool.poll(0.05)
    return events


def test_frames_outlive_their_child(pool: DecoderPool, clip: Path) -> None:
    pool.open("cam", ResumePoint(), EVERY)
    for record in as_records(chunked(clip))[:4]:
        assert pool.submit(record)
    held = frames(wait_for(pool, 3))
    pictures = [frame.image.copy() for frame in held]
    pool.close("cam")
    assert all(np.array_equal(frame.image, copy) for frame, copy in zip(held, pictures, strict=True))
    for frame in held:
        frame.release()
    pool.open("cam", ResumePoint(), EVERY)
    assert len(frames(drive(pool, as_records(chunked(clip))))) == 80


def test_a_new_rate_holds_from_the_next_frame(pool: DecoderPool, clip: Path) -> None:
    records = as_records(chunked(clip))
    pool.open("cam", ResumePoint(), 2.0)
    slow = frames(drive(pool, records[:9]))
    pool.set_fps("cam", EVERY)
    fast = frames(drive(pool, records[9:]))
    assert len(slow) <= 4
    assert [b.pts - a.pts for a, b in pairwise(fast)] == [512] * (len(fast) - 1)


def test_slots_grow_with_the_picture(pool: DecoderPool, tmp_path: Path) -> None:
    sizes = [(96, 64), (320, 240), (160, 96), (480, 270)]
    paths = [
        make_clip(tmp_path / f"{n}.flv", seconds=0.8, size=size, audio=None) for n, size in enumerate(sizes)
    ]
    chunks = [
        chunk
        for n, path in enumerate(paths)
        for chunk in chunked(path, attachment=f"{n + 1:016x}", end=False)
    ]
    expected = frames(run(chunks, decoder(detect_width=160)))
    pool = DecoderPool(Decode(detect_width=160), SystemClock())
    try:
        pool.open("cam", ResumePoint(), EVERY)
        events = drive(pool, as_records(chunks))
    finally:
        pool.shutdown(Deadline(10, SystemClock()))
    assert [shown(frame) for frame in frames(events)] == [shown(frame) for frame in expected]
    assert {frame.image.shape[:2] for frame in frames(events)} == {(h, w) for w, h in sizes}
    assert max(frame.small.shape[1] for frame in frames(events)) == 160


def test_children_carry_no_torch(pool: DecoderPool, clip: Path) -> None:
    pool.open("cam", ResumePoint(), EVERY)
    drive(pool, as_records(chunked(clip))[:3])
    libraries = {os.path.basename(area.path) for area in child_of(pool).memory_maps()}
    assert any(name.startswith("libavcodec") for name in libraries)
    assert not [name for name in libraries if "torch" in name or "pydantic" in name]


def test_shutdown_ends_even_a_stopped_child(pool: DecoderPool, clip: Path) -> None:
    pool.open("cam", ResumePoint(), EVERY)
    drive(pool, as_records(chunked(clip))[:3])
    process = child_of(pool)
    process.send_signal(signal.SIGSTOP)
    pool.shutdown(Deadline(10, SystemClock()))
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    assert pool.stats().streams == 0


def test_a_stopped_child_blocks_nobody(clip: Path) -> None:
    """A child that does not read its socket: submit and poll return, and it is replaced."""
    pool = DecoderPool(Decode(stall_s=1.0), SystemClock())
    try:
        pool.open("cam", ResumePoint(), EVERY)
        chunks = chunked(clip)
        events = drive(pool, as_records(chunks)[:3])
        child_of(pool).send_signal(signal.SIGSTOP)
        events += drive(pool, as_records(chunks)[3:])
        assert pool.stats().stalled == 1
        assert len(frames(events)) == 80
    finally:
        pool.shutdown(Deadline(10, SystemClock()))


ORPHAN = """
import sys, time
from pathlib import Path
from stream.clock import SystemClock
from stream.config import Decode
from stream.decoders import DecoderPool
from stream.frames import ResumePoint
from tests.stream.decoding import as_records, chunked
pool = DecoderPool(Decode(), SystemClock())
pool.open("cam", ResumePoint(), 2.0)
for record in as_records(chunked(Path(sys.argv[1])))[:2]:
    pool.submit(record)
while not pool.poll(0.1):
    pass
print(pool._streams["cam"].child.process.pid, flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_children_die_with_their_parent(clip: Path) -> None:
    root = str(Path(__file__).parents[2])
    with psutil.Popen(
        [sys.executable, "-c", ORPHAN, str(clip), "3600"], stdout=subprocess.PIPE, cwd=root, text=True
    ) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
        child.wait(timeout=PATIENCE_S)
    assert not child.is_running()


def test_a_pool_that_nobody_shut_down_does_not_keep_its_process(clip: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, str(clip), "0"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert not psutil.pid_exists(int(done.stdout))


def test_wrong_use_is_refused(pool: DecoderPool, clip: Path) -> None:
    records = as_records(chunked(clip))
    with pytest.raises(ValueError, match="cam is not open"):
        pool.submit(records[0])
    pool.open("cam", ResumePoint(), 2.0)
    with pytest.raises(ValueError, match="open already"):
        pool.open("cam", ResumePoint(), 2.0)
    assert pool.submit(records[3])
    with pytest.raises(ValueError, match="record 2 comes after record 3"):
        pool.submit(records[2])
    pool.close("cam")
    pool.close("cam")


def test_closed_is_the_end_of_every_state() -> None:
    assert all(ChildState.CLOSED in LEGAL[state] for state in ChildState if state is not ChildState.CLOSED)
    assert LEGAL[ChildState.CLOSED] == frozenset()
