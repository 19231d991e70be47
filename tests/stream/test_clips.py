"""Clips: the frames of the source in the range, outward to keyframes, in files that players take."""

import functools
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest

from stream.chunks import Chunk, Chunker, split_parts
from stream.clips import MATROSKA, MP4, SUFFIXES, WEBM, Clip, cut_clip
from stream.clock import FakeClock
from stream.errors import Code, UnmaskError
from stream.records import Control, Kind
from tests.conftest import requires
from tests.stream import media

FOLDER = tempfile.TemporaryDirectory()

CLIPS: dict[str, tuple[str, dict[str, Any], str]] = {
    "h264-mp4": (".mp4", {}, MP4),
    "h264-flv": (".flv", {}, MP4),
    "h264-ts": (".ts", {}, MP4),
    "h264-mkv-variable-rate": (".mkv", {"times_ms": media.uneven_times(75)}, MP4),
    "h264-open-gop-ts": (".ts", {"open_gop": True, "gop": 23, "bframes": 3}, MP4),
    "h264-wraps-ts": (".ts", {"start_s": 2**33 / 90_000 - 1}, MP4),
    "hevc-open-gop-ts": (".ts", {"codec": "hevc", "open_gop": True, "gop": 23, "bframes": 3}, MP4),
    "hevc-mp4": (".mp4", {"codec": "hevc"}, MP4),
    "av1-mp4": (".mp4", {"codec": "av1"}, MP4),
    "mpeg2-ts": (".ts", {"codec": "mpeg2"}, MP4),
    "vp9-webm": (".webm", {"codec": "vp9", "audio": "libopus"}, WEBM),
    "vp8-mkv-aac": (".mkv", {"codec": "vp8"}, MATROSKA),
}


@functools.cache
def source(name: str) -> Path:
    suffix, options, _ = CLIPS[name]
    if not media.has_encoder(options.get("codec", "h264")):
        pytest.skip(f"this PyAV has no encoder for {options['codec']}")
    return media.make_clip(Path(FOLDER.name) / f"{name}{suffix}", **({"seconds": 3.0} | options))


@functools.cache
def chunks_of(name: str) -> tuple[Chunk, ...]:
    return tuple(media.chunk_file(source(name)))


def at(chunks: tuple[Chunk, ...] | list[Chunk], pts: int) -> int:
    return chunks[0][0].media_us(pts)


def decoded(clip: Clip, folder: Path) -> list[media.Seen]:
    path = folder / f"clip{SUFFIXES[clip.content_type]}"
    path.write_bytes(clip.value)
    return media.decode_source(path)


def complaints(clip: Clip, folder: Path) -> str:
    """Return what ffmpeg has to say when it decodes every stream of the clip."""
    path = folder / f"clip{SUFFIXES[clip.content_type]}"
    path.write_bytes(clip.value)
    command = ["ffmpeg", "-v", "error", "-xerror", "-i", str(path), "-enc_time_base", "-1", "-f", "null", "-"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stderr


def keyframes(name: str) -> list[int]:
    container, packets = media.demux(source(name))
    with container:
        return [p.pts for p in packets if p.stream.type == "video" and p.is_keyframe]


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_shows_the_frames_of_its_range(name: str, tmp_path: Path) -> None:
    frames = media.decode_source(source(name))
    chunks = chunks_of(name)
    first, last = frames[len(frames) * 2 // 5], frames[len(frames) // 2]
    clip = cut_clip(chunks, at(chunks, first.pts), at(chunks, last.pts))
    keys = keyframes(name)
    start = max(key for key in keys if key <= first.pts)
    following = [key for key in keys if key > last.pts]
    shown = decoded(clip, tmp_path)
    expected = [frame for frame in frames if frame.pts >= start][: len(shown)]
    assert [frame.md5 for frame in shown] == [frame.md5 for frame in expected]
    assert expected[-1].pts >= last.pts
    # Of an open GOP the pictures leading the next keyframe are left to it.
    reach = following[0] if following else frames[-1].pts + 1
    assert expected[-1].pts < reach
    assert len(expected) >= sum(start <= frame.pts < reach for frame in frames) - 3
    assert (clip.first_us, clip.last_us) == (at(chunks, start), at(chunks, expected[-1].pts))
    gaps = zip(shown, expected, strict=True)
    assert all(abs((s.time - shown[0].time) - (e.time - expected[0].time)) < 0.0011 for s, e in gaps)
    assert clip.content_type == CLIPS[name][2]


@pytest.mark.parametrize("name", CLIPS)
def test_ffmpeg_decodes_a_clip_without_complaint(name: str, tmp_path: Path) -> None:
    requires("ffmpeg")
    chunks = chunks_of(name)
    middle = at(chunks, media.decode_source(source(name))[30].pts)
    assert complaints(cut_clip(chunks, middle, middle), tmp_path) == ""


@pytest.mark.parametrize("name", ["h264-open-gop-ts", "hevc-open-gop-ts"])
def test_every_wanted_picture_around_an_open_keyframe_is_there(name: str, tmp_path: Path) -> None:
    frames = media.decode_source(source(name))
    chunks = chunks_of(name)
    key = keyframes(name)[1]
    for wanted in [frame for frame in frames if key - 20_000 < frame.pts < key + 20_000]:
        clip = cut_clip(chunks, at(chunks, wanted.pts), at(chunks, wanted.pts))
        assert wanted.md5 in [frame.md5 for frame in decoded(clip, tmp_path)]


@pytest.mark.parametrize("name", ["h264-ts", "h264-mp4", "vp9-webm", "vp8-mkv-aac"])
def test_audio_comes_along(name: str, tmp_path: Path) -> None:
    chunks = chunks_of(name)
    clip = cut_clip(chunks, chunks[0][0].epoch_anchor_us, chunks[0][0].epoch_anchor_us + 10_000_000)
    path = tmp_path / f"clip{SUFFIXES[clip.content_type]}"
    path.write_bytes(clip.value)
    seconds = float(media.decode_source(path)[-1].time)
    with av.open(str(path)) as container:
        samples = [frame.samples for frame in container.decode(audio=0)]
    assert sum(samples) / media.AUDIO_RATE == pytest.approx(seconds, abs=0.15)


def test_the_index_of_an_mp4_comes_first() -> None:
    chunks = chunks_of("h264-mp4")
    value = cut_clip(chunks, chunks[0][0].epoch_anchor_us, chunks[0][0].epoch_anchor_us).value
    assert value.index(b"moov") < value.index(b"mdat")


def test_hevc_is_labelled_as_apples_players_want_it() -> None:
    chunks = chunks_of("hevc-open-gop-ts")
    assert b"hvc1" in cut_clip(chunks, chunks[0][0].epoch_anchor_us, chunks[0][0].epoch_anchor_us).value


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_kept(degrees: int, tmp_path: Path) -> None:
    path = media.rotated(source("h264-mp4"), tmp_path / "turned.mp4", degrees)
    chunks = media.chunk_file(path)
    clip = cut_clip(chunks, chunks[0][0].epoch_anchor_us, chunks[0][0].epoch_anchor_us)
    (tmp_path / "clip.mp4").write_bytes(clip.value)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert -next(container.decode(video=0)).rotation % 360 == degrees


def test_of_several_epochs_the_one_with_the_peak_is_cut(tmp_path: Path) -> None:
    parts = [
        media.make_clip(tmp_path / "a.flv", seconds=2),
        media.make_clip(tmp_path / "b.flv", seconds=2, size=(128, 96), first_number=500),
    ]
    chunks = media.chunk_file(media.join_flv(tmp_path / "joined.flv", parts))
    later = next(meta for meta, _ in chunks if meta.epoch == 1)
    start, end = chunks[0][0].epoch_anchor_us, later.epoch_anchor_us + 2_000_000
    whole = cut_clip(chunks, start, end, peak_us=later.epoch_anchor_us + 1_000_000)
    assert [f.md5 for f in decoded(whole, tmp_path)] == [f.md5 for f in media.decode_source(parts[1])]
    whole = cut_clip(chunks, start, end, peak_us=start + 1_000_000)
    assert [f.md5 for f in decoded(whole, tmp_path)] == [f.md5 for f in media.decode_source(parts[0])]


def test_records_may_come_in_parts_in_any_order_and_with_controls() -> None:
    chunks = chunks_of("h264-ts")
    control = Chunker("s", f"{1:016x}", Kind.FILE, 500, FakeClock()).control(Control.TICK, {})
    parts = [part for meta, value in chunks for part in split_parts(meta, value, 3000)]
    assert len(parts) > len(chunks)
    start = chunks[0][0].epoch_anchor_us
    clip = cut_clip([control, *reversed(parts), parts[0]], start, start + 1)
    assert clip == cut_clip(chunks, start, start + 1)


def test_chunks_that_hold_no_keyframe_make_no_clip() -> None:
    chunks = [chunk for chunk in chunks_of("h264-ts") if not chunk[0].starts_on_keyframe]
    with pytest.raises(UnmaskError, match="no keyframe") as caught:
        cut_clip(chunks, chunks[0][0].epoch_anchor_us, chunks[0][0].epoch_anchor_us + 3_000_000)
    assert caught.value.code is Code.CHUNK_INVALID
    with pytest.raises(UnmaskError, match="no video"):
        cut_clip([], 0, 1)


@pytest.mark.parametrize("lacks_part", [False, True])
def test_around_what_is_damaged_the_side_of_the_peak_is_cut(tmp_path: Path, lacks_part: bool) -> None:
    """Keyframes are 1 s apart, chunks half a second: of what follows the damage half a second is lost too."""
    chunks = list(chunks_of("h264-ts"))
    frames = media.decode_source(source("h264-ts"))
    start, end = chunks[0][0].epoch_anchor_us, chunks[0][0].epoch_anchor_us + 3_000_000
    bad = next(index for index, (meta, _) in enumerate(chunks) if index and meta.starts_on_keyframe)
    meta, value = chunks[bad]
    chunks[bad] = split_parts(meta, value, len(value) // 2)[0] if lacks_part else (meta, value[:-9])
    assert meta.pts is not None
    before = decoded(cut_clip(chunks, start, end, start), tmp_path)
    assert [frame.md5 for frame in before] == [frame.md5 for frame in frames if frame.pts < meta.pts]
    after = decoded(cut_clip(chunks, start, end, end), tmp_path)
    key = next(key for key in keyframes("h264-ts") if key > meta.pts)
    assert [frame.md5 for frame in after] == [frame.md5 for frame in frames if frame.pts >= key]


def test_who_wants_all_gets_no_less() -> None:
    chunks = list(chunks_of("h264-ts"))
    meta, value = chunks[-1]
    chunks[-1] = (meta, value[:-9])
    start = meta.epoch_anchor_us
    assert cut_clip(chunks, start, start + 3_000_000).first_us == start
    with pytest.raises(UnmaskError, match="content_hash"):
        cut_clip(chunks, start, start + 3_000_000, whole=True)


def test_a_damaged_chunk_is_named() -> None:
    meta, value = chunks_of("h264-ts")[0]
    with pytest.raises(UnmaskError, match="s 0000000000000001/0/0") as caught:
        cut_clip([(replace(meta), value[:-9])], meta.epoch_anchor_us, meta.epoch_anchor_us)
    assert caught.value.code is Code.CHUNK_INVALID
