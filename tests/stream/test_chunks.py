"""Chunks: exact over every codec, container and GOP structure; nothing but typed errors on bad input."""

import copy
import functools
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream import chunks as chunks_module
from stream.chunks import Chunk, Chunker, content_hash, join_parts, read_chunk, split_parts
from stream.clock import FakeClock
from stream.errors import Code, UnmaskError
from stream.records import ChunkMeta, Control, Kind, decode_headers, encode_headers
from tests.stream import media

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Case:
    """One source: file suffix, how it is encoded, with which options it is opened."""

    name: str
    suffix: str
    clip: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)


CASES = [
    Case("h264-mp4", ".mp4"),
    Case("h264-flv", ".flv"),
    Case("h264-ts", ".ts"),
    Case("h264-mkv", ".mkv"),
    Case("h264-open-gop-ts", ".ts", {"open_gop": True, "gop": 23, "bframes": 3}),
    Case("h264-open-gop-mp4", ".mp4", {"open_gop": True, "gop": 23, "bframes": 3}),
    Case("h264-no-bframes-flv", ".flv", {"bframes": 0, "gop": 7}),
    Case("h264-variable-rate-mkv", ".mkv", {"times_ms": media.uneven_times(50)}),
    Case("h264-variable-rate-ts", ".ts", {"times_ms": media.uneven_times(50), "open_gop": True, "gop": 23}),
    Case("h264-starts-late-ts", ".ts", {"start_s": 3600.0}),
    Case("h264-wraps-at-once-ts", ".ts", {"start_s": 2**33 / 90_000 - 1}),
    Case("h264-wraps-raw-ts", ".ts", {"start_s": 2**33 / 90_000 - 1}, {"correct_ts_overflow": "0"}),
    Case(
        "h264-hidden-pictures-mp4",
        ".mp4",
        {"start_s": -0.52, "mux_options": {"avoid_negative_ts": "disabled"}},
    ),
    Case("hevc-mp4", ".mp4", {"codec": "hevc"}),
    Case("hevc-open-gop-ts", ".ts", {"codec": "hevc", "open_gop": True, "gop": 23, "bframes": 3}),
    Case("hevc-open-gop-mp4", ".mp4", {"codec": "hevc", "open_gop": True, "gop": 23, "bframes": 3}),
    Case("vp8-webm", ".webm", {"codec": "vp8", "audio": "libopus", "seconds": 1.2}),
    Case("vp9-webm", ".webm", {"codec": "vp9", "audio": "libopus"}),
    Case("av1-mp4", ".mp4", {"codec": "av1"}),
    Case("mpeg2-ts", ".ts", {"codec": "mpeg2", "gop": 12}),
]


FOLDER = tempfile.TemporaryDirectory()
"""Clips made once for the whole module: hypothesis and a test's own folder do not go together."""


@functools.cache
def clip(name: str) -> Path:
    case = next(case for case in CASES if case.name == name)
    if not media.has_encoder(case.clip.get("codec", "h264")):
        pytest.skip(f"this PyAV has no encoder for {case.clip['codec']}")
    return media.make_clip(Path(FOLDER.name) / f"{name}{case.suffix}", **case.clip)


@functools.cache
def source_frames(name: str) -> tuple[media.Seen, ...]:
    case = next(case for case in CASES if case.name == name)
    return tuple(media.decode_source(clip(name), case.options))


def media_times(chunks: Sequence[Chunk]) -> list[int]:
    """Return the media time of every video packet, in decode order."""
    return [meta.media_us(pts) for meta, value in chunks for pts in read_chunk(meta, value).video_pts]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decoding_chunks_gives_the_frames_of_the_source(case: Case) -> None:
    chunks = media.chunk_file(clip(case.name), options=case.options)
    expected = [frame.md5 for frame in source_frames(case.name)]
    frames = media.decode_chunks(chunks)
    assert [frame.md5 for frame in frames] == expected
    # Where FFmpeg lets the wrap through, its pts start again from 0 and ours go on.
    modulus = 2**33 if "raw" in case.name else 2**64
    pts = [frame.pts % modulus for frame in source_frames(case.name)]
    assert [frame.pts % modulus for frame in frames] == pts
    assert {meta.epoch for meta, _ in chunks} == {0}


def test_the_cases_are_what_they_say() -> None:
    """Guard against an encoder that quietly ignores an option: each hard case really occurs."""
    for case in CASES:
        if case.clip.get("open_gop"):
            container, packets = media.demux(clip(case.name))
            with container:
                video = [packet for packet in packets if packet.stream.type == "video"]
            second = [index for index, packet in enumerate(video) if packet.is_keyframe][1]
            assert any(later.pts < video[second].pts for later in video[second:]), case.name
    assert source_frames("h264-wraps-at-once-ts")[0].pts < 0
    container, packets = media.demux(clip("h264-wraps-raw-ts"), {"correct_ts_overflow": "0"})
    with container:
        stamps = [packet.pts for packet in packets if packet.stream.type == "video"]
    assert max(stamps) - min(stamps) > 2**32
    container, packets = media.demux(clip("h264-hidden-pictures-mp4"))
    with container:
        assert any(packet.is_discard for packet in packets if packet.stream.type == "video")


@settings(UNHURRIED, max_examples=25)
@given(
    chunk_ms=st.integers(1, 5000),
    name=st.sampled_from(["h264-open-gop-ts", "hevc-open-gop-mp4", "h264-variable-rate-mkv", "h264-flv"]),
)
def test_any_chunk_length_gives_the_same_frames_and_media_times(chunk_ms: int, name: str) -> None:
    chunks = media.chunk_file(clip(name), chunk_ms=chunk_ms)
    assert media.decode_chunks(chunks) == list(source_frames(name))
    assert media_times(chunks) == media_times(media.chunk_file(clip(name), chunk_ms=500))
    assert [meta.sequence for meta, _ in chunks] == list(range(len(chunks)))
    for meta, value in chunks:
        packets = read_chunk(meta, value)
        assert not any(packet.is_keyframe for packet in packets.video[1:])
        assert meta.starts_on_keyframe == bool(packets.video and packets.video[0].is_keyframe)
        span = (max(packets.video_pts) - min(packets.video_pts)) * meta.time_base if packets.video else 0
        # Reordering may widen the span in pts by what B-frames move: four frames of at most 120 ms.
        assert span <= Fraction(chunk_ms, 1000) + Fraction(480, 1000)


@pytest.mark.parametrize("name", ["h264-ts", "h264-flv", "h264-mp4", "vp9-webm"])
def test_audio_is_carried_along(name: str) -> None:
    container, packets = media.demux(clip(name))
    with container:
        sound = [packet for packet in packets if packet.stream.type == "audio"]
        chunks = media.chunk_file(clip(name))
        heard = [packet for meta, value in chunks for packet in read_chunk(meta, value).audio]
        assert [bytes(packet) for packet in heard] == [bytes(packet) for packet in sound]
        for got, source in zip(heard, sound, strict=True):
            drift = abs(got.pts * got.time_base - source.pts * source.time_base)
            assert drift <= max(got.time_base, source.time_base)


def test_the_callers_packets_are_left_as_they_were() -> None:
    container, packets = media.demux(clip("h264-ts"))
    with container:
        chunker = Chunker("s", "0" * 16, Kind.FILE, 500, FakeClock())

        def facts() -> list[Any]:
            return [(p.pts, p.dts, p.time_base, p.is_keyframe, p.stream_index, bytes(p)) for p in packets]

        before = facts()
        for packet in packets:
            chunker.push(packet)
        chunker.flush()
        assert facts() == before


def test_headers_carry_the_chunk_through_the_log() -> None:
    for meta, value in media.chunk_file(clip("h264-ts")):
        assert decode_headers("s", encode_headers(meta)) == meta
        assert meta.content_hash == content_hash(value)
        assert meta.codec is not None
        assert (meta.codec.width, meta.codec.height) == (160, 120)


def test_a_publisher_that_restarts_starts_a_new_epoch(tmp_path: Path) -> None:
    parts = [
        media.make_clip(tmp_path / "a.flv", seconds=2),
        media.make_clip(tmp_path / "b.flv", seconds=1, size=(128, 96), first_number=500),
        media.make_clip(tmp_path / "c.flv", seconds=3, size=(128, 96), first_number=900),
    ]
    path = media.join_flv(tmp_path / "joined.flv", parts)
    chunks = media.chunk_file(path)
    assert media.decode_chunks(chunks) == media.decode_source(path)
    sizes = {meta.epoch: (meta.codec.width, meta.codec.height) for meta, _ in chunks if meta.codec}
    assert sizes == {0: (160, 120), 1: (128, 96), 2: (128, 96)}
    assert [meta.sequence for meta, _ in chunks] == list(range(len(chunks)))


def test_a_change_of_size_inside_a_transport_stream_starts_a_new_epoch(tmp_path: Path) -> None:
    first = media.make_clip(tmp_path / "a.ts", seconds=1.2, audio=None)
    second = media.make_clip(tmp_path / "b.ts", seconds=1, size=(192, 128), start_s=1.2, audio=None)
    path = media.join_ts(tmp_path / "joined.ts", [first, second])
    chunks = media.chunk_file(path)
    assert media.decode_chunks(chunks) == media.decode_source(path)
    sizes = {meta.epoch: (meta.codec.width, meta.codec.height) for meta, _ in chunks if meta.codec}
    assert sizes == {0: (160, 120), 1: (192, 128)}


@pytest.mark.parametrize(("codec", "gop"), [("hevc", 25), ("mpeg2", 12)])
def test_other_codecs_change_size_too(tmp_path: Path, codec: str, gop: int) -> None:
    first = media.make_clip(tmp_path / "a.ts", codec=codec, seconds=1, audio=None, gop=gop)
    second = media.make_clip(
        tmp_path / "b.ts", codec=codec, seconds=1, size=(192, 128), start_s=1.0, audio=None, gop=gop
    )
    chunks = media.chunk_file(media.join_ts(tmp_path / "joined.ts", [first, second]))
    # Not the joined source: one decoder for both parts loses MPEG-2's last picture before the change.
    assert media.decode_chunks(chunks) == media.decode_source(first) + media.decode_source(second)
    sizes = {meta.epoch: (meta.codec.width, meta.codec.height) for meta, _ in chunks if meta.codec}
    assert sizes == {0: (160, 120), 1: (192, 128)}


def test_timestamps_that_jump_start_a_new_epoch(tmp_path: Path) -> None:
    starts = [0.0, 5000.0, 100.0]
    parts = [
        media.make_clip(tmp_path / f"{start}.ts", seconds=1, start_s=start, first_number=round(start))
        for start in starts
    ]
    path = media.join_ts(tmp_path / "joined.ts", parts)
    chunks = media.chunk_file(path)
    assert media.decode_chunks(chunks) == media.decode_source(path)
    assert sorted({meta.epoch for meta, _ in chunks}) == [0, 1, 2]
    times = sorted(media_times(chunks))
    assert times[-1] - times[0] < 3_500_000, "a file's media time must close the holes"
    for meta, _ in chunks:
        assert meta.pts is None or meta.media_us(meta.pts) >= chunks[0][0].epoch_anchor_us


def test_live_media_time_follows_the_capture_clock() -> None:
    clock = FakeClock()
    chunker = Chunker("s", "0" * 16, Kind.LIVE, 500, clock)
    container, packets = media.demux(clip("h264-flv"))
    chunks: list[Chunk] = []
    start = clock.now_us()
    with container:
        for packet in packets:
            chunks += chunker.push(packet)
            clock.advance(0.014)
    chunks += chunker.flush()
    assert chunks[0][0].epoch_anchor_us == start
    captured = [meta.capture_us for meta, _ in chunks]
    assert captured[0] == start
    assert captured == sorted(set(captured))


def test_a_later_attachment_never_lies_before_the_end_of_the_one_before() -> None:
    clock = FakeClock()
    first = Chunker("s", f"{1:016x}", Kind.LIVE, 500, clock)
    container, packets = media.demux(clip("h264-flv"))
    with container:
        for packet in packets:
            first.push(packet)
        second = Chunker("s", f"{2:016x}", Kind.LIVE, 500, clock, not_before_us=first.media_end_us)
        again = [chunk for packet in packets for chunk in second.push(packet)]
    assert min(media_times(again)) >= first.media_end_us > clock.now_us()


def test_a_waiting_chunk_is_due_after_its_length_of_wall_time() -> None:
    clock = FakeClock()
    chunker = Chunker("s", "0" * 16, Kind.LIVE, 500, clock)
    container, packets = media.demux(clip("h264-flv"))
    with container:
        for packet in packets[:5]:
            assert chunker.push(packet) == []
    assert chunker.flush_due() == []
    clock.advance(0.49)
    assert chunker.flush_due() == []
    clock.advance(0.02)
    [(meta, value)] = chunker.flush_due()
    assert len(read_chunk(meta, value).video) + len(read_chunk(meta, value).audio) == 5
    assert chunker.flush_due() == chunker.flush() == []


def test_control_records_share_the_sequence() -> None:
    clock = FakeClock()
    chunker = Chunker("s", "0" * 16, Kind.LIVE, 500, clock)
    start, body = chunker.control(Control.START, {"source": "file"})
    assert (start.sequence, start.epoch, start.control, body) == (0, 0, Control.START, b'{"source":"file"}')
    assert start.epoch_anchor_us == clock.now_us()
    container, packets = media.demux(clip("h264-flv"))
    with container:
        chunks = [chunk for packet in packets for chunk in chunker.push(packet)]
    tick, _ = chunker.control(Control.TICK, {})
    assert tick.sequence == len(chunks) + 1
    assert (tick.epoch_anchor_us, tick.first_pts) == (chunks[0][0].epoch_anchor_us, chunks[0][0].first_pts)
    assert decode_headers("s", encode_headers(tick)) == tick
    with pytest.raises(UnmaskError, match="control record") as caught:
        read_chunk(tick, b"{}")
    assert caught.value.code is Code.CHUNK_INVALID


def test_audio_goes_on_without_video_and_early_audio_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "MAX_EARLY_AUDIO", 3)
    container, packets = media.demux(clip("h264-ts"))
    with container:
        sound = [packet for packet in packets if packet.stream.type == "audio"]
        picture = next(packet for packet in packets if packet.stream.type == "video")
        chunker = Chunker("s", "0" * 16, Kind.LIVE, 500, FakeClock())
        for packet in sound[:5]:
            assert chunker.push(packet) == []
        assert chunker.dropped_audio == 2
        chunks = chunker.push(picture)
        for packet in sound[5:]:
            chunks += chunker.push(packet)
        chunks += chunker.flush()
    assert len(chunks) > 2
    assert chunks[0][0].pts == picture.pts
    assert all(meta.pts is None and not meta.starts_on_keyframe for meta, _ in chunks[1:])
    heard = [bytes(packet) for meta, value in chunks for packet in read_chunk(meta, value).audio]
    assert heard == [bytes(packet) for packet in sound[2:]]


def test_audio_that_the_container_cannot_carry_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = media.make_clip(tmp_path / "alac.mp4", audio="alac", seconds=1)
    container, packets = media.demux(path)
    with container, caplog.at_level(logging.WARNING):
        sounds = sum(packet.stream.type == "audio" for packet in packets)
        chunker = Chunker("s", "0" * 16, Kind.FILE, 300, FakeClock())
        chunks = [chunk for packet in packets for chunk in chunker.push(packet)] + chunker.flush()
    assert chunker.dropped_audio == sounds
    assert caplog.text.count("alac") == 1
    assert media.decode_chunks(chunks) == media.decode_source(path)


def test_streams_that_the_attach_did_not_analyse_are_read() -> None:
    options = {"probesize": "32", "analyzeduration": "1"}
    chunks = media.chunk_file(clip("h264-ts"), options=options)
    assert media.decode_chunks(chunks) == list(source_frames("h264-ts"))
    container, packets = media.demux(clip("mpeg2-ts"), options)
    with container:
        assert container.streams.video[0].codec_context.width == 0, "this case is to begin without a size"
        rest = [packet for packet in packets if packet.stream.type == "video"][1:]
        chunker = Chunker("s", "0" * 16, Kind.LIVE, 200, FakeClock())
        chunks = [chunk for packet in rest for chunk in chunker.push(packet)]
    assert not chunks[0][0].starts_on_keyframe
    sizes = [meta.codec.width for meta, value in chunks if meta.codec and read_chunk(meta, value).video]
    assert (sizes[0], sizes[-1]) == (0, 160)


def test_a_video_codec_that_cannot_be_carried_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("prores_ks", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv422p10le"
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame(64, 64, "yuv422p10le")))
        out.mux(stream.encode(None))
    with pytest.raises(UnmaskError, match="prores") as caught:
        media.chunk_file(path)
    assert caught.value.code is Code.SOURCE_INVALID


def test_corrupt_packets_keep_their_mark() -> None:
    container, packets = media.demux(clip("h264-ts"))
    with container:
        video = [packet for packet in packets if packet.stream.type == "video"]
        video[3].is_corrupt = True
        chunker = Chunker("s", "0" * 16, Kind.FILE, 5000, FakeClock())
        chunks = [chunk for packet in video for chunk in chunker.push(packet)] + chunker.flush()
    marks = [packet.is_corrupt for meta, value in chunks for packet in read_chunk(meta, value).video]
    assert [index for index, marked in enumerate(marks) if marked] == [3]


@functools.cache
def one_chunk(name: str = "h264-ts") -> Chunk:
    return media.chunk_file(clip(name))[0]


def outcome(meta: ChunkMeta, value: bytes) -> Code | None:
    """Return the code of the error that reading gives, None if it gives packets."""
    try:
        read_chunk(meta, value)
    except UnmaskError as error:
        return error.code
    return None


def rehashed(meta: ChunkMeta, value: bytes) -> ChunkMeta:
    return replace(meta, content_hash=content_hash(value))


def test_an_altered_value_does_not_match_its_hash() -> None:
    meta, value = one_chunk()
    with pytest.raises(UnmaskError, match="content_hash"):
        read_chunk(meta, value[:-1] + bytes([value[-1] ^ 1]))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"content_type": "text/plain"}, "content-type 'text/plain'"),
        ({"parts": 2}, "part 0 of 2"),
        ({"pts": 1}, "begins at pts"),
        ({"codec": None}, "no header codec"),
        ({"time_base": Fraction(1, 30)}, "cannot be read"),
    ],
)
def test_headers_that_do_not_fit_the_value_are_refused(change: dict[str, Any], what: str) -> None:
    meta, value = one_chunk()
    with pytest.raises(UnmaskError, match=what) as caught:
        read_chunk(replace(meta, **change), value)
    assert caught.value.code is Code.CHUNK_INVALID


@settings(UNHURRIED, max_examples=40)
@given(st.data())
def test_a_truncated_value_is_refused(data: st.DataObject) -> None:
    meta, value = one_chunk()
    cut = value[: data.draw(st.integers(0, len(value) - 1))]
    with pytest.raises(UnmaskError) as caught:
        read_chunk(rehashed(meta, cut), cut)
    assert caught.value.code is Code.CHUNK_INVALID


@settings(UNHURRIED, max_examples=300)
@given(
    name=st.sampled_from(["h264-ts", "hevc-mp4", "vp9-webm"]),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.binary(max_size=12), st.integers(0, 12)), min_size=1, max_size=6
    ),
)
def test_mutated_values_raise_a_typed_error_or_are_read(
    name: str, edits: list[tuple[float, bytes, int]]
) -> None:
    meta, value = one_chunk(name)
    changed = bytearray(value)
    for where, put, cut in edits:
        at = int(where * len(changed))
        changed[at : at + cut] = put
    meta = rehashed(meta, bytes(changed))
    assert outcome(meta, bytes(changed)) in (Code.CHUNK_INVALID, None)


@settings(UNHURRIED, max_examples=100)
@given(value=st.binary(max_size=4000), kind=st.sampled_from(sorted(chunks_module.FORMATS)))
def test_garbage_raises_a_typed_error(value: bytes, kind: str) -> None:
    meta = replace(rehashed(one_chunk()[0], value), content_type=kind)
    with pytest.raises(UnmaskError) as caught:
        read_chunk(meta, value)
    assert caught.value.code is Code.CHUNK_INVALID


@pytest.mark.parametrize(
    ("name", "content_type"),
    [("h264-ts", "video/mp2t"), ("h264-mp4", "video/mp4"), ("h264-mkv", "video/x-matroska")],
)
def test_segments_of_other_producers_are_read(name: str, content_type: str) -> None:
    value = clip(name).read_bytes()
    meta = replace(one_chunk(name)[0], content_type=content_type, content_hash="", codec=None)
    packets = read_chunk(meta, value)
    decoder = media.open_decoder(packets.codec)
    frames = [frame for packet in packets.video for frame in decoder.decode(packet)] + decoder.decode(None)
    assert [media.seen(frame, meta.time_base) for frame in frames] == list(source_frames(name))
    assert packets.audio
    assert (packets.codec.width, packets.codec.height) == (160, 120)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_travels_with_the_codec(tmp_path: Path, degrees: int) -> None:
    path = media.rotated(clip("h264-mp4"), tmp_path / "turned.mp4", degrees)
    with av.open(str(path)) as container:
        shown = next(container.decode(video=0)).rotation
    meta, _ = media.chunk_file(path)[0]
    assert meta.codec is not None
    # FFmpeg counts anticlockwise.
    assert meta.codec.rotation == degrees == -shown % 360


@given(value=st.binary(min_size=0, max_size=400), limit=st.integers(1, 150), data=st.data())
def test_parts_join_to_the_whole_in_any_order(value: bytes, limit: int, data: st.DataObject) -> None:
    whole = (rehashed(_plain_meta(), value), value)
    parts = split_parts(*whole, limit)
    assert all(len(part) <= limit for _, part in parts)
    assert [meta.order() for meta, _ in parts] == sorted(meta.order() for meta, _ in parts)
    shuffled = data.draw(st.permutations(parts))
    assert join_parts(shuffled) == whole


@pytest.mark.parametrize("spoil", ["missing", "doubled", "foreign", "altered"])
def test_parts_that_do_not_belong_together_are_refused(spoil: str) -> None:
    value = bytes(range(200))
    parts = split_parts(rehashed(_plain_meta(), value), value, 60)
    assert len(parts) == 4
    bad = copy.copy(parts)
    if spoil == "missing":
        del bad[1]
    elif spoil == "doubled":
        bad[1] = bad[0]
    elif spoil == "foreign":
        bad[1] = (replace(bad[1][0], sequence=99), bad[1][1])
    else:
        bad[1] = (bad[1][0], b"x" * 60)
    with pytest.raises(UnmaskError) as caught:
        join_parts(bad)
    assert caught.value.code is Code.CHUNK_INVALID


def test_no_parts_cannot_be_joined() -> None:
    with pytest.raises(UnmaskError, match="no parts"):
        join_parts([])


def _plain_meta() -> ChunkMeta:
    return ChunkMeta(
        stream="s",
        attachment="0" * 16,
        epoch=0,
        sequence=3,
        kind=Kind.LIVE,
        capture_us=1,
        epoch_anchor_us=1,
        time_base=Fraction(1, 1000),
        first_pts=0,
        pts=0,
        starts_on_keyframe=True,
        codec=None,
        content_type="application/x-nut",
        content_hash="",
    )
