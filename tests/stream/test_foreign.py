"""Segments of other producers: placed by their timestamps alone, and the same wherever a decoder begins."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stream.decode import StreamDecoder
from stream.errors import Code, UnmaskError
from stream.foreign import Place, read_headers, read_segment
from stream.frames import Applied, DecoderEvent, ResumePoint, SampledFrame
from stream.records import Control, Kind, Record
from tests.stream.decoding import applied, decoder, failed, frames, resume_after, shown, source_pictures
from tests.stream.fuzz_chunks import mutate
from tests.stream.media import make_clip
from tests.stream.segments import MUXERS, START_US, Sent, as_records, ended, headers, segments

TS = "video/mp2t"
FRAMES_US = [40_000 * n for n in range(100)]
WRAP_S = (1 << 33) / 90_000


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 s in four groups of pictures, with sound."""
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", seconds=4, gop=25)


@pytest.fixture(scope="module")
def open_gop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "open.mp4"
    return make_clip(path, seconds=4, gop=25, bframes=3, open_gop=True, audio=None)


def run(
    records: Sequence[Record], into: StreamDecoder | None = None, resume: ResumePoint | None = None
) -> tuple[list[DecoderEvent], StreamDecoder]:
    target = into or decoder(resume)
    events: list[DecoderEvent] = []
    for record in records:
        events += target.feed(record.offset, read_headers(record.key, record.headers), record.value or b"")
    return events, target


def sent_as(sent: Sequence[Sent], content_type: str = TS) -> list[Record]:
    records = as_records(sent, content_type)
    return [*records, ended(records)]


@pytest.mark.parametrize("content_type", MUXERS)
def test_segments_give_exactly_the_frames_of_the_source(clip: Path, content_type: str) -> None:
    events, target = run(sent_as(segments(clip, content_type, shift_s=10), content_type))
    found = frames(events)
    want = source_pictures(clip)
    assert len(found) == len(want) == 100
    assert all((frame.image == picture).all() for frame, (_, picture) in zip(found, want, strict=True))
    assert [frame.media_us for frame in found] == [START_US + 40_000 * n for n in range(100)]
    assert {(frame.meta.attachment, frame.meta.epoch) for frame in found} == {(f"{START_US:016x}", 0)}
    assert (target.counts.gaps, target.counts.corrupt, target.counts.waited) == (0, 0, 0)


def test_a_whole_file_is_a_segment_too(clip: Path) -> None:
    whole = [Sent(clip.read_bytes(), START_US)]
    events, _ = run(sent_as(whole, "video/mp4"))
    assert len(frames(events)) == 100


@pytest.mark.parametrize("name", ["clip", "open_gop"])
def test_a_decoder_that_begins_anywhere_goes_on_exactly(name: str, request: pytest.FixtureRequest) -> None:
    """The place that goes with `decode_from` gives the same numbers, frames and cuts again."""
    source: Path = request.getfixturevalue(name)
    records = sent_as(segments(source, TS, shift_s=WRAP_S - 2.5))
    events, _ = run(records)
    whole = [shown(frame) for frame in frames(events)]
    assert len(whole) == 100
    for offset in range(len(records) - 1):
        point, decode_from = resume_after(events, offset)
        places = next(event.places for event in applied(events) if event.offset == offset)
        assert places is not None
        place = Place.restored(places.at.state()) if places.at else None
        later, _ = run(records[decode_from:], decoder(point, place=place))
        done = [shown(frame) for frame in frames(events[: _index(events, offset)])]
        assert done + [shown(frame) for frame in frames(later)] == whole
        metas = {event.offset: event.meta for event in applied(later)}
        assert metas == {e.offset: e.meta for e in applied(events) if e.offset >= decode_from}


def _index(events: Sequence[DecoderEvent], offset: int) -> int:
    ends = (n for n, e in enumerate(events) if not isinstance(e, SampledFrame) and e.offset == offset)
    return next(ends) + 1


def test_timestamps_that_wrap_keep_the_epoch(clip: Path) -> None:
    events, _ = run(sent_as(segments(clip, TS, shift_s=WRAP_S - 1.5)))
    assert {frame.meta.epoch for frame in frames(events)} == {0}
    assert [frame.media_us for frame in frames(events)][-1] == START_US + 3_960_000


def test_a_jump_begins_an_epoch_and_media_time_goes_on(clip: Path) -> None:
    first = segments(clip, TS, shift_s=500)
    second = segments(clip, TS, START_US + 4_000_000)
    events, _ = run(sent_as([*first, *second]))
    assert [frame.meta.epoch for frame in frames(events)] == [0] * 100 + [1] * 100
    times = [frame.media_us for frame in frames(events)]
    assert times == sorted(times)
    assert times[100] - times[99] < 200_000


def test_other_codec_parameters_begin_an_epoch(clip: Path, tmp_path: Path) -> None:
    other = make_clip(tmp_path / "other.ts", seconds=1, size=(192, 144), audio=None)
    later = segments(other, TS, START_US + 4_000_000, shift_s=4)
    events, _ = run(sent_as([*segments(clip, TS), *later]))
    assert [frame.meta.epoch for frame in frames(events)] == [0] * 100 + [1] * 25
    assert frames(events)[-1].image.shape == (144, 192, 3)


def test_a_lost_segment_is_a_gap(open_gop: Path) -> None:
    sent = segments(open_gop, TS, shift_s=10)
    records = as_records(sent, TS)
    events, target = run([records[0], *records[2:], ended(records)])
    assert target.counts.gaps == 1
    reasons = {dropped.reason for event in applied(events) for dropped in event.dropped}
    assert reasons == {"CORRUPT"}
    seen = {round((frame.media_us - START_US) / 40_000) for frame in frames(events)}
    assert not seen & set(range(27, 48))
    assert seen >= set(range(50, 100))


def test_a_segment_that_comes_twice_counts_once(clip: Path) -> None:
    first, *rest = segments(clip, TS)
    events, target = run(sent_as([first, first, *rest]))
    assert len(frames(events)) == 100
    assert target.counts.stale == 1
    assert target.counts.gaps == 0


def test_a_fragment_without_init_says_what_to_do(clip: Path) -> None:
    first, second, *rest = segments(clip, "video/mp4")
    bare = second.value[second.value.index(b"moof") - 4 :]
    events, _ = run(sent_as([first, replace(second, value=bare), *rest], "video/mp4"))
    assert [(event.offset, event.code) for event in failed(events)] == [(1, Code.CHUNK_INVALID)]
    assert "init segment" in failed(events)[0].sentence
    assert len(frames(events)) == 75


@pytest.mark.parametrize("value", [b"", b"garbage" * 400, b"\x47" + bytes(187)])
def test_what_is_no_segment_is_one_failure_and_no_more(clip: Path, value: bytes) -> None:
    first, second, *rest = segments(clip, TS)
    events, _ = run(sent_as([first, replace(second, value=value), *rest]))
    assert [event.offset for event in failed(events)] == [1]
    assert len(frames(events)) == 75


@pytest.mark.parametrize("content_type", MUXERS)
def test_damaged_segments_get_one_answer_each(clip: Path, content_type: str) -> None:
    """Whatever the bytes: no exception, and no picture that the source does not have in this place."""
    first, second, *rest = segments(clip, content_type, shift_s=10)
    rng = random.Random(11)
    right = {
        round(us / 1000): picture for us, (_, picture) in zip(FRAMES_US, source_pictures(clip), strict=True)
    }
    for _ in range(12):
        value = mutate(second.value, first.value, rng)
        events, _ = run(sent_as([first, replace(second, value=value), *rest], content_type))
        answers = [event.offset for event in events if not isinstance(event, SampledFrame)]
        assert answers == list(range(5))
        whole = [frame for frame in frames(events) if frame.offset != 1]
        assert all(frame.image.shape == (120, 160, 3) for frame in whole)
        assert (whole[0].image == right[0]).all()


def test_after_an_end_a_new_attachment_begins(clip: Path) -> None:
    sent = segments(clip, TS)
    records = sent_as(sent)
    again = as_records([replace(one, capture_us=one.capture_us + 60_000_000) for one in sent], TS)
    more = [replace(record, offset=record.offset + len(records)) for record in again]
    events, _ = run([*records, *more, ended(more)])
    assert len({frame.meta.attachment for frame in frames(events)}) == 2
    assert len(frames(events)) == 200
    end = next(event for event in applied(events) if event.meta.control is Control.END)
    assert end.places is not None
    assert end.places.now is not None
    assert end.places.now.ended


def test_our_own_attachments_may_come_between(clip: Path) -> None:
    """What follows them is newer than they are."""
    from tests.stream.decoding import chunked

    own = chunked(clip, attachment=f"{START_US + 1:016x}", start_us=START_US + 10_000_000)
    target = decoder()
    events, _ = run(as_records(segments(clip, TS), TS), target)
    for offset, (meta, value) in enumerate(own, 10):
        events += target.feed(offset, meta, value)
    later = segments(clip, TS, START_US + 20_000_000)
    events += run(as_records(later, TS, first_offset=1000), target)[0]
    attachments = [frame.meta.attachment for frame in frames(events)]
    assert attachments == sorted(attachments)
    assert len(set(attachments)) == 3
    times = [frame.media_us for frame in frames(events)]
    assert times == sorted(times)


def test_a_tick_says_that_there_is_nothing_to_see(clip: Path) -> None:
    records = as_records(segments(clip, TS), TS)
    tick = replace(ended(records), headers={**ended(records).headers, "control": b"tick"})
    events, _ = run([*records, tick])
    assert isinstance(events[-1], Applied)
    assert events[-1].meta.control is Control.TICK
    assert b'"video":false' in events[-1].control_body


GOOD = {"content-type": b"video/mp2t", "capture_time": b"1700000000000000"}


@pytest.mark.parametrize(
    "text",
    [
        b"1700000000000000",
        b"2023-11-14T22:13:20Z",
        b"2023-11-14t22:13:20.000000z",
        b"2023-11-14T23:13:20.000+01:00",
        b"2023-11-14 22:13:20.000000000Z",
    ],
)
def test_capture_time_has_two_forms(text: bytes) -> None:
    assert read_segment("cam", {**GOOD, "capture_time": text}).capture_us == START_US


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"capture_time": b"yesterday"}, "header capture_time is 'yesterday'; it must be microseconds"),
        ({"capture_time": b"1700000000"}, "header capture_time is '1700000000', not between"),
        ({"capture_time": b"9" * 5000}, "header capture_time is '999"),
        ({"capture_time": b"2023-11-14T22:13:20"}, "header capture_time is '2023-11-14T22:13:20'; it must"),
        ({"capture_time": b"2023-13-14T22:13:20Z"}, "header capture_time is '2023-13"),
        ({"capture_time": b"\xff"}, "header capture_time is"),
        (
            {"content-type": b"video/avi"},
            "header content-type is 'video/avi'; it must be one of application/x-nut",
        ),
        ({"kind": b"movie"}, "header kind is 'movie'; it must be live or file"),
        ({"control": b"start"}, "header control is 'start'; it must be tick or end"),
        ({"schema": b"7"}, "header schema is b'7'"),
    ],
)
def test_a_wrong_header_is_named_with_what_would_be_right(change: dict[str, bytes], said: str) -> None:
    with pytest.raises(UnmaskError) as found:
        read_headers("cam", GOOD | change)
    assert said in str(found.value)


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_header_is_named(name: str) -> None:
    with pytest.raises(UnmaskError, match=f"header {name} is missing; it must be"):
        read_headers("cam", {key: value for key, value in GOOD.items() if key != name})


def test_parameters_of_a_content_type_are_passed_over() -> None:
    read: Any = read_headers("cam", GOOD | {"content-type": b'Video/MP2T; codecs="avc1"', "kind": b"file"})
    assert (read.content_type, read.kind) == ("video/mp2t", Kind.FILE)


def test_headers_of_a_segment_are_what_the_tests_send(clip: Path) -> None:
    sent = segments(clip, TS)[0]
    assert read_segment("cam", headers(sent, TS)).capture_us == sent.capture_us
