"""Decoding chunks: exact, restartable at every record, and never a smeared picture."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stream import decode
from stream.chunks import ChunkPackets, read_chunk, split_parts
from stream.decode import LEGAL, Phase
from stream.errors import Code
from stream.frames import SampledFrame
from stream.records import ChunkMeta, Control
from tests.stream.decoding import (
    Chunk,
    applied,
    chunked,
    decoder,
    failed,
    frames,
    resume_after,
    run,
    shown,
    source_pictures,
    with_bytes,
)
from tests.stream.media import Image, has_encoder, join_flv, make_clip, read_number
from tests.stream.test_shots import SIZE, scene, view

KINDS = [
    ("h264", ".flv", False, 2),
    ("h264", ".mp4", True, 3),
    ("hevc", ".mp4", False, 2),
    ("hevc", ".mp4", True, 3),
    ("mpeg2", ".ts", False, 2),
    ("vp9", ".mkv", False, 0),
    ("vp8", ".mkv", False, 0),
    ("av1", ".mkv", False, 0),
]


OPEN_GOPS = [
    {"gop": 25, "bframes": 3},  # no picture leads the keyframe
    {"gop": 25, "bframes": 5, "x264": ":b-pyramid=strict:ref=4"},
    {"gop": 13, "bframes": 2, "x264": ":b-pyramid=none:ref=4:b-adapt=1"},
    {"gop": 13, "bframes": 3, "x264": ":b-pyramid=strict:ref=6:weightp=2"},
    {"gop": 25, "bframes": 8, "x264": ":b-pyramid=normal:ref=6:b-adapt=2"},
    {"gop": 12, "bframes": 3, "x264": ":b-pyramid=normal:ref=2:slices=4"},
    {"gop": 25, "bframes": 3, "x264": ":b-pyramid=normal:ref=4:tff=1"},
    {"gop": 25, "bframes": 3, "suffix": ".ts"},
]
"""H.264 whose keyframes are recovery points, as broadcasters send it."""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make a clip once for each way of asking."""
    made: dict[Any, Path] = {}
    folder = tmp_path_factory.mktemp("clips")

    def get(codec: str = "h264", suffix: str = ".flv", **options: Any) -> Path:
        key = (codec, suffix, repr(sorted(options.items())))
        if not has_encoder(codec):
            pytest.skip(f"this PyAV has no encoder for {codec}")
        if key not in made:
            defaults = {"seconds": 2.4, "gop": 12, "size": (96, 64), "audio": None}
            made[key] = make_clip(folder / f"{len(made)}{suffix}", codec=codec, **(defaults | options))
        return made[key]

    return get


@pytest.mark.parametrize(("codec", "suffix", "open_gop", "bframes"), KINDS)
@pytest.mark.parametrize("chunk_ms", [50, 500])
def test_chunks_give_exactly_the_frames_of_the_source(
    clips: Any, codec: str, suffix: str, open_gop: bool, bframes: int, chunk_ms: int
) -> None:
    path = clips(codec, suffix, open_gop=open_gop, bframes=bframes)
    events = run(chunked(path, chunk_ms))
    got = frames(events)
    expected = source_pictures(path)
    assert len(expected) == 60
    assert [frame.pts for frame in got] == [pts for pts, _ in expected]
    assert all(np.array_equal(frame.image, image) for frame, (_, image) in zip(got, expected, strict=True))
    assert sum(event.decoded for event in applied(events)) == 60
    assert not any(event.dropped for event in applied(events))


@pytest.mark.parametrize(("codec", "suffix", "open_gop", "bframes"), KINDS)
@pytest.mark.parametrize("fps", [1000.0, 6.0])
def test_any_restart_point_gives_the_same_frames_after_it(
    clips: Any, codec: str, suffix: str, open_gop: bool, bframes: int, fps: float
) -> None:
    chunks = chunked(clips(codec, suffix, open_gop=open_gop, bframes=bframes), 160)
    whole = run(chunks, decoder(fps=fps))
    for offset in range(len(chunks)):
        resume, decode_from = resume_after(whole, offset)
        place = next(n for n, event in enumerate(whole) if _ends(event, offset))
        again = run(chunks, decoder(resume, fps=fps), decode_from)
        assert [shown(frame) for frame in frames(again)] == [shown(f) for f in frames(whole[place:])]
        tail = [event for event in applied(again) if event.offset > offset]
        assert [(e.decode_from, e.last_pts, e.dropped) for e in tail] == [
            (e.decode_from, e.last_pts, e.dropped) for e in applied(whole) if e.offset > offset
        ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fps", [1000.0, 6.0])
def test_any_restart_point_finds_the_same_cuts(tmp_path: Path, seed: int, fps: float) -> None:
    rng = np.random.default_rng(seed)
    scenes = [scene(seed), scene(seed + 50)]
    shots: list[Image] = []
    while len(shots) < 100:
        shot, speed = scenes[int(rng.integers(2))], float(rng.uniform(0, 12))
        shots += [view(shot, speed * n) for n in range(int(rng.choice((1, 2, 5, 15))))]

    def picture(index: int) -> Image:
        return np.repeat(shots[index][:, :, None], 3, axis=2)

    path = make_clip(
        tmp_path / "shots.mp4", seconds=4.0, gop=10, size=SIZE, audio=None, picture=picture, crf=20
    )
    chunks = chunked(path, 120)
    whole = run(chunks, decoder(fps=fps))
    assert sum(frame.cut for frame in frames(whole)) > 3
    for offset in range(len(chunks)):
        resume, decode_from = resume_after(whole, offset)
        place = next(n for n, event in enumerate(whole) if _ends(event, offset))
        again = run(chunks, decoder(resume, fps=fps), decode_from)
        assert [(f.pts, f.cut) for f in frames(again)] == [(f.pts, f.cut) for f in frames(whole[place:])]


def _ends(event: Any, offset: int) -> bool:
    return not isinstance(event, SampledFrame) and event.offset == offset


def test_decode_from_follows_the_keyframes(clips: Any) -> None:
    chunks = chunked(clips("h264", ".mp4", open_gop=True, bframes=3, seconds=6.0), 160)
    events = run(chunks, decoder(fps=6.0))
    starts = [offset for offset, (meta, _) in enumerate(chunks) if meta.starts_on_keyframe]
    for event in applied(events):
        if event.offset == len(chunks) - 1:
            continue
        behind = [start for start in starts if event.decode_from <= start <= event.offset]
        # The GOP of 480 ms it lies in, the one before (a cut decision looks back), and one of reordering.
        assert len(behind) <= 3


def test_frames_carry_the_record_of_their_packet(clips: Any) -> None:
    chunks = chunked(clips("h264", ".mp4", bframes=3), 160)
    for frame in frames(run(chunks)):
        meta, _ = chunks[frame.offset]
        assert frame.meta == meta
        assert meta.pts is not None
        assert meta.pts <= frame.pts <= meta.pts + 6 * 512 * 2


def test_resume_at_a_new_epoch_emits_all_of_it(clips: Any) -> None:
    first, second = clips(seconds=1.0), clips(seconds=1.0, first_number=40)
    chunks = [*chunked(first, end=False), *chunked(second, attachment=f"{2:016x}")]
    whole = run(chunks)
    begin = next(n for n, (meta, _) in enumerate(chunks) if meta.attachment != chunks[0][0].attachment)
    resume, decode_from = resume_after(whole, begin)
    assert (resume.attachment, resume.epoch, resume.last_pts) == (f"{2:016x}", 0, None)
    assert decode_from == begin
    assert len(frames(run(chunks, decoder(resume), decode_from))) == 25


def test_a_new_epoch_flushes_the_old_one_under_its_own_name(clips: Any, tmp_path: Path) -> None:
    path = join_flv(tmp_path / "twice.flv", [clips(seconds=1.0), clips(seconds=1.2, size=(128, 96))])
    chunks = chunked(path)
    events = run(chunks)
    got = frames(events)
    assert [frame.meta.epoch for frame in got] == [0] * 25 + [1] * 30
    assert [frame.image.shape for frame in got] == [(64, 96, 3)] * 25 + [(96, 128, 3)] * 30
    assert [frame.media_us for frame in got] == sorted(frame.media_us for frame in got)
    assert not got[25].cut
    [first] = [event for event in applied(events) if event.meta.epoch == 1][:1]
    assert events.index(first) > events.index(got[24])


def test_controls_pass_through_in_order(clips: Any) -> None:
    chunks = chunked(clips())
    events = run(chunks)
    assert [event.offset for event in applied(events)] == list(range(len(chunks)))
    told = [event for event in applied(events) if event.meta.control is not None]
    assert [(event.offset, event.meta.control) for event in told] == [
        (0, Control.START),
        (len(chunks) - 1, Control.END),
    ]
    assert told[0].control_body == b"{}"
    assert told[0].last_pts is None
    assert told[1].decode_from == len(chunks) - 1


def test_what_is_not_newer_is_dropped_and_changes_nothing(clips: Any) -> None:
    chunks = chunked(clips())
    expected = frames(run(chunks))
    older = chunked(clips(), attachment=f"{0:016x}")
    repeated = [*chunks[:5], chunks[3], chunks[4], older[0], older[1], *chunks[5:], chunks[-1]]
    into = decoder()
    events = run(repeated, into)
    assert [shown(frame) for frame in frames(events)] == [shown(frame) for frame in expected]
    assert into.counts.stale == 5
    assert into.counts.gaps == 0
    [late] = [event for event in applied(events) if event.offset == 7]
    assert late.meta.attachment == chunks[0][0].attachment
    assert late.meta.control is None
    assert late.meta.pts is None
    assert not late.meta.starts_on_keyframe
    assert sum(event.meta.control is Control.END for event in applied(events)) == 1


def test_parts_are_joined_and_a_lost_part_is_a_gap(clips: Any) -> None:
    chunks = chunked(clips())
    expected = [shown(frame) for frame in frames(run(chunks))]
    parts = [part for meta, value in chunks for part in split_parts(meta, value, 400)]
    assert len(parts) > 2 * len(chunks)
    whole = run(parts)
    assert [shown(frame) for frame in frames(whole)] == expected
    for offset in range(len(parts)):
        resume, decode_from = resume_after(whole, offset)
        place = next(n for n, event in enumerate(whole) if _ends(event, offset))
        again = run(parts, decoder(resume), decode_from)
        assert [shown(frame) for frame in frames(again)] == [shown(frame) for frame in frames(whole[place:])]
    lost = next(n for n, (meta, _) in enumerate(parts) if n > 20 and meta.part == 1)
    into = decoder()
    events = run([*parts[:lost], *parts[lost + 1 :]], into)
    assert into.counts.gaps == 1
    assert {drop.reason for event in applied(events) for drop in event.dropped} == {"CORRUPT"}
    pictures = {frame.picture for frame in expected}
    assert {shown(frame).picture for frame in frames(events)} < pictures


# --- starts at a recovery point ---


def opened(clips: Any, options: dict[str, Any]) -> list[Chunk]:
    return chunked(clips(**{"suffix": ".mp4", "seconds": 3.2, "open_gop": True} | options), 160)


def keyframes(chunks: list[Chunk]) -> list[int]:
    return [offset for offset, (meta, _) in enumerate(chunks) if meta.starts_on_keyframe]


@pytest.mark.parametrize("options", OPEN_GOPS, ids=str)
def test_joining_at_any_recovery_point_loses_nothing_after_it(clips: Any, options: dict[str, Any]) -> None:
    chunks = opened(clips, options)
    truth = frames(run(chunks))
    assert len(truth) == 80
    for offset in keyframes(chunks)[1:]:
        into = decoder()
        events = run(chunks[offset:], into)
        key = key_pts(*chunks[offset])
        assert [(f.pts, shown(f).picture) for f in frames(events)] == [
            (f.pts, shown(f).picture) for f in truth if f.pts >= key
        ]
        assert (into.counts.errors, into.counts.hidden, into.counts.lenient) == (0, 0, 0)


@pytest.mark.parametrize("options", OPEN_GOPS, ids=str)
def test_any_restart_point_in_open_gops_gives_the_same_frames(clips: Any, options: dict[str, Any]) -> None:
    chunks = opened(clips, options)
    whole = run(chunks)
    for offset in range(len(chunks)):
        resume, decode_from = resume_after(whole, offset)
        place = next(n for n, event in enumerate(whole) if _ends(event, offset))
        again = frames(run(chunks, decoder(resume), decode_from))
        assert [shown(frame) for frame in again] == [shown(frame) for frame in frames(whole[place:])]


@pytest.mark.parametrize("options", OPEN_GOPS, ids=str)
def test_a_gap_in_open_gops_lasts_until_the_next_keyframe(clips: Any, options: dict[str, Any]) -> None:
    chunks = opened(clips, options)
    truth = frames(run(chunks))
    lost = keyframes(chunks)[1] + 1
    key = key_pts(*chunks[next(offset for offset in keyframes(chunks) if offset > lost)])
    got = frames(run([*chunks[:lost], *chunks[lost + 1 :]]))
    assert [(f.pts, shown(f).picture) for f in got] == [
        (f.pts, shown(f).picture) for f in truth if f.offset < lost or f.pts >= key
    ]


@pytest.mark.parametrize("place", [1, 2, 4, 7, 20])
@pytest.mark.parametrize(
    "options", OPEN_GOPS[:-1], ids=str
)  # of MPEG-TS none may be seen: no unit has a length
def test_damage_behind_a_recovery_point_is_seen(clips: Any, options: dict[str, Any], place: int) -> None:
    sound = opened(clips, options)
    truth = pictures_by_pts(sound)
    start = keyframes(sound)[1]
    key = key_pts(*sound[start])
    order = [packet.pts for meta, value in sound[1:-1] for packet in read_chunk(meta, value).video]
    hit = order.index(key) + place

    def cut_short(index: int, packet: Any) -> Any:
        return with_bytes(packet, bytes(packet)[: packet.size // 2]) if index == hit else packet

    path = clips(**{"suffix": ".mp4", "seconds": 3.2, "open_gop": True} | options)
    into = decoder()
    got = frames(run(chunked(path, 160, change=cut_short)[start:], into))
    assert all(truth[frame.pts] == shown(frame).picture for frame in got)
    assert into.counts.errors == 1 or order[hit] < key
    assert got[-1].pts == max(truth)


@pytest.mark.parametrize("bframes", [0, 2])
def test_an_intra_refresh_shows_nothing_until_it_is_complete(clips: Any, bframes: int) -> None:
    chunks = chunked(
        clips(suffix=".mp4", seconds=4.0, gop=25, bframes=bframes, x264=":intra-refresh=1:b-pyramid=none")
    )
    whole = run(chunks)
    truth = {frame.pts: shown(frame).picture for frame in frames(whole)}
    assert len(truth) == 100
    for offset in keyframes(chunks)[1:3]:
        into = decoder()
        events = run(chunks[offset:], into)
        got = {frame.pts: shown(frame).picture for frame in frames(events)}
        assert got.items() <= truth.items()
        assert key_pts(*chunks[offset]) < min(got) <= key_pts(*chunks[offset]) + 25 * 512
        assert max(got) == max(truth)
        missed = into.counts.waited + into.counts.corrupt
        assert missed == sum(drop.frames or 0 for event in applied(events) for drop in event.dropped) > 0
        assert len(got) + missed == sum(frame.offset >= offset for frame in frames(whole))


def test_a_recovery_point_that_ffmpeg_cannot_recover_from_is_no_start(clips: Any) -> None:
    """Frame numbers begin anew at every keyframe, so FFmpeg makes no stand-in for what was never decoded,
    and leaves out refreshed columns with the rest of the slice."""
    chunks = chunked(
        clips(suffix=".mp4", seconds=4.8, gop=16, bframes=0, x264=":intra-refresh=1:b-pyramid=none")
    )
    truth = pictures_by_pts(chunks)
    into = decoder()
    got = frames(run(chunks[keyframes(chunks)[1] :], into))
    assert all(truth[frame.pts] == shown(frame).picture for frame in got)
    assert into.counts.lenient == 0
    assert into.counts.errors > 3


# --- damage ---


def pictures_by_pts(chunks: Any) -> dict[int, str]:
    return {frame.pts: shown(frame).picture for frame in frames(run(chunks))}


@pytest.mark.parametrize("codec", ["h264", "hevc"])
@pytest.mark.parametrize("lost", range(2, 13, 3))
def test_a_lost_chunk_silences_the_stream_until_the_next_keyframe(clips: Any, codec: str, lost: int) -> None:
    chunks = chunked(clips(codec, ".mp4", bframes=3, open_gop=codec == "hevc"), 160)
    truth = frames(run(chunks))
    into = decoder()
    events = run([*chunks[:lost], *chunks[lost + 1 :]], into)
    got = frames(events)
    key = next(key_pts(*chunk) for chunk in chunks[lost + 1 :] if chunk[0].starts_on_keyframe)
    sound = [frame for frame in truth if frame.offset < lost or frame.pts >= key]
    assert into.counts.gaps == 1
    assert [(f.pts, shown(f).picture) for f in got] == [(f.pts, shown(f).picture) for f in sound]
    assert next(frame for frame in got if frame.pts >= key).cut
    dropped = [drop for event in applied(events) for drop in event.dropped]
    assert {drop.reason for drop in dropped} == {"CORRUPT"}
    missing = [frame.media_us for frame in truth if frame not in sound]
    # Pictures that were decoded already may come after one that was lost: at most the reordering of 4 frames.
    assert min(drop.first_us for drop in dropped) <= min(missing) + 160_000
    assert max(drop.last_us for drop in dropped) >= max(missing)
    assert all(event.decode_from <= event.offset for event in applied(events))


def key_pts(meta: ChunkMeta, value: bytes) -> int:
    """Return the pts of the keyframe that a chunk starts with; in an open GOP not its smallest."""
    return int(read_chunk(meta, value).video[0].pts)


def test_a_gap_record_is_a_gap(clips: Any) -> None:
    chunks = chunked(clips(seconds=4.0, gop=25), 160)
    meta = chunks[5][0]
    gap = replace(meta, control=Control.GAP, pts=None, codec=None, content_type="application/json")
    into = decoder()
    events = run([*chunks[:5], (gap, b'{"reason":"spool"}'), *chunks[6:]], into)
    assert into.counts.gaps == 1
    told = next(event for event in applied(events) if event.meta.control is Control.GAP)
    assert told.control_body == b'{"reason":"spool"}'
    assert into.counts.corrupt > 0
    assert frames(events)[-1].pts == frames(run(chunks))[-1].pts


@pytest.mark.parametrize("codec", ["h264", "hevc", "mpeg2", "vp9", "av1"])
def test_a_truncated_packet_never_shows(clips: Any, codec: str) -> None:
    suffix = {"mpeg2": ".ts", "vp9": ".mkv", "av1": ".mkv"}.get(codec, ".mp4")
    path = clips(codec, suffix)
    truth = pictures_by_pts(chunked(path))

    def cut_short(index: int, packet: Any) -> Any:
        data = bytes(packet)
        return with_bytes(packet, data[: len(data) // 3]) if index == 16 else packet

    chunks = chunked(path, change=cut_short)
    into = decoder()
    events = run(chunks, into)
    assert into.counts.errors >= 1
    assert all(truth[frame.pts] == shown(frame).picture for frame in frames(events))
    assert frames(events)[-1].pts == max(truth)
    assert {failure.code for failure in failed(events)} <= {Code.DECODE_FAILED}


def test_damage_that_the_source_saw_is_believed(clips: Any) -> None:
    path = clips("h264", ".mp4")
    truth = pictures_by_pts(chunked(path))

    def damage(index: int, packet: Any) -> Any:
        packet.is_corrupt = index == 14
        return packet

    into = decoder()
    events = run(chunked(path, change=damage), into)
    got = [frame.pts for frame in frames(events)]
    assert into.counts.errors == 1
    assert not failed(events)
    assert 0 < into.counts.corrupt <= 24
    assert got[-1] == max(truth)
    assert len(got) + into.counts.corrupt == 60


def test_a_chunk_that_is_none_fails_alone(clips: Any) -> None:
    chunks = chunked(clips())
    meta, value = chunks[6]
    truth = pictures_by_pts(chunks)
    for bad in (b"", b"garbage", value[:-20], value[20:]):
        into = decoder()
        events = run([*chunks[:6], (meta, bad), *chunks[7:]], into)
        [failure] = failed(events)
        assert (failure.offset, failure.code) == (6, Code.CHUNK_INVALID)
        assert failure.decode_from <= 6
        assert into.counts.invalid == 1
        assert all(truth[frame.pts] == shown(frame).picture for frame in frames(events))
        assert frames(events)[-1].pts == max(truth)
        assert sum(drop.frames or 1 for event in applied(events) for drop in event.dropped) > 0


def test_an_unknown_codec_is_named(clips: Any) -> None:
    chunks = chunked(clips())
    meta, value = chunks[1]
    assert meta.codec is not None
    events = list(decoder().feed(0, replace(meta, codec=replace(meta.codec, name="nosuch")), value))
    [failure] = failed(events)
    assert failure.code is Code.DECODE_FAILED
    assert "'nosuch'" in failure.sentence


def test_joining_in_the_middle_waits_for_a_keyframe(clips: Any) -> None:
    chunks = chunked(clips("h264", ".mp4", open_gop=True, bframes=3), 160)
    first = next(n for n, (meta, _) in enumerate(chunks) if n > 1 and not meta.starts_on_keyframe)
    key = next(key_pts(*chunk) for chunk in chunks[first:] if chunk[0].starts_on_keyframe)
    truth = [frame for frame in frames(run(chunks)) if frame.offset >= first]
    into = decoder()
    events = run(chunks[first:], into)
    sound = [(frame.pts, shown(frame).picture) for frame in truth if frame.pts >= key]
    assert [(frame.pts, shown(frame).picture) for frame in frames(events)] == sound
    assert {drop.reason for event in applied(events) for drop in event.dropped} == {"WARMUP"}
    assert into.counts.waited == len(truth) - len(sound)


def test_warmup_is_bounded(clips: Any) -> None:
    chunks = chunked(clips(seconds=4.0, gop=50), 160)
    whole = run(chunks)
    offset = max(n for n, (meta, _) in enumerate(chunks) if meta.starts_on_keyframe) - 1
    resume, decode_from = resume_after(whole, offset)
    short = decoder(resume, max_warmup_us=500_000)
    events = run(chunks, short, decode_from)
    assert frames(events)[0].pts == (chunks[offset + 1][0].pts or 0)
    assert short.counts.warmup > 0
    assert short.counts.decoded == 50
    assert len(frames(run(chunks, decoder(resume), decode_from))) > 50


def test_pictures_before_an_edit_list_are_hidden(clips: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunked(clips("h264", ".mp4"))
    truth = pictures_by_pts(chunks)
    first = sorted(truth)[:5]

    def edited(meta: ChunkMeta, value: bytes) -> ChunkPackets:
        chunk = read_chunk(meta, value)
        for packet in chunk.video:
            packet.pts = None if packet.pts in first else packet.pts
        return chunk

    monkeypatch.setattr(decode, "read_chunk", edited)
    into = decoder()
    got = frames(run(chunks, into))
    assert into.counts.hidden == 5
    assert [(frame.pts, shown(frame).picture) for frame in got] == sorted(truth.items())[5:]


def test_an_encoder_that_breaks_its_standard_is_not_left_unwatched(clips: Any) -> None:
    """Every keyframe carries an SEI message longer than its NAL unit, as cheap cameras send them."""
    path = clips("h264", ".mp4", seconds=4.0)

    def spoil(index: int, packet: Any) -> Any:
        sei = bytes([6, 5, 200]) + b"short" + b"\x80"
        if not packet.is_keyframe:
            return packet
        return with_bytes(packet, len(sei).to_bytes(4, "big") + sei + bytes(packet))

    chunks = chunked(path, change=spoil)
    into = decoder()
    events = run(chunks, into)
    assert into.counts.lenient == 1
    assert len(frames(events)) == 100 - 3 * 12
    truth = pictures_by_pts(chunked(path))
    assert all(truth[frame.pts] == shown(frame).picture for frame in frames(events))


def test_every_phase_can_end_in_a_new_epoch() -> None:
    assert all(Phase.WARMUP in LEGAL[phase] for phase in Phase)
    assert Phase.REPLAY not in LEGAL[Phase.DECODING]


def test_the_frame_numbers_are_what_was_drawn(clips: Any) -> None:
    got = frames(run(chunked(clips(size=(160, 120), crf=20))))
    assert [read_number(frame.image) for frame in got] == list(range(60))


@pytest.mark.parametrize(("chunk_ms", "fps"), [(50, 6.0), (130, 6.0), (1000, 6.0), (70, 2.0), (5000, 2.0)])
def test_any_chunking_gives_the_same_samples(clips: Any, chunk_ms: int, fps: float) -> None:
    path = clips(seconds=4.0, bframes=3, suffix=".mp4")
    whole = [shown(frame) for frame in frames(run(chunked(path, 400), decoder(fps=fps)))]
    assert [shown(frame) for frame in frames(run(chunked(path, chunk_ms), decoder(fps=fps)))] == whole
    assert 4.0 * fps <= len(whole) + 1 <= 4.0 * fps + 2


def test_encoders_that_do_not_say_how_far_they_reorder(clips: Any) -> None:
    chunks = [
        (
            replace(
                meta, codec=meta.codec and replace(meta.codec, extradata=without_vui(meta.codec.extradata))
            ),
            value,
        )
        for meta, value in chunked(clips("h264", ".mp4", bframes=3), 160)
    ]
    whole = run(chunks)
    assert [frame.pts for frame in frames(whole)] == [512 * n for n in range(60)]
    for offset in range(len(chunks)):
        resume, decode_from = resume_after(whole, offset)
        place = next(n for n, event in enumerate(whole) if _ends(event, offset))
        again = frames(run(chunks, decoder(resume), decode_from))
        assert [shown(frame) for frame in again] == [shown(frame) for frame in frames(whole[place:])]


def without_vui(avcc: bytes) -> bytes:
    """Return an avcC whose SPS (High profile, as x264 writes it) ends before its VUI (H.264, 7.3.2.1.1)."""
    length = int.from_bytes(avcc[6:8], "big")
    sps = avcc[8 : 8 + length].replace(b"\0\0\3", b"\0\0")
    bits = "".join(f"{byte:08b}" for byte in sps)
    place = 32

    def golomb() -> int:
        nonlocal place
        zeros = bits.index("1", place) - place
        value = int(bits[place + zeros : place + 2 * zeros + 1], 2) - 1
        place += 2 * zeros + 1
        return value

    assert [golomb(), golomb(), golomb(), golomb()] == [0, 1, 0, 0]  # id, 4:2:0, 8 bits, 8 bits
    place += 2
    golomb()  # frame number
    assert golomb() == 0  # order of output given by numbers
    golomb()
    golomb()  # reference frames
    place += 1
    golomb(), golomb()  # size
    assert bits[place] == "1"  # frames only
    place += 2
    place += 1
    if bits[place - 1] == "1":
        golomb(), golomb(), golomb(), golomb()  # cropping
    assert bits[place] == "1"  # there is a VUI
    short = bits[:place] + "01"
    short += "0" * (-len(short) % 8)
    plain = bytes(int(short[at : at + 8], 2) for at in range(0, len(short), 8))
    return avcc[:6] + len(plain).to_bytes(2, "big") + plain + avcc[8 + length :]
