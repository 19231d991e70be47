"""Decoding chunks: exact, restartable at every record, and never a smeared picture."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from stream.chunks import split_parts
from stream.decode import LEGAL, Phase
from stream.errors import Code
from stream.frames import Applied, ResumePoint, SampledFrame
from stream.records import ChunkMeta, Control
from tests.stream.decoding import (
    applied,
    chunked,
    decoder,
    failed,
    frames,
    resume_after,
    run,
    shown,
    source_pictures,
)
from tests.stream.media import has_encoder, join_flv, make_clip, read_number

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
