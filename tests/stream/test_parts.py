"""Chunks above the limit of a record: in parts from the log to the incident, whatever is lost on the way."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detectors.readings import Image
from stream.chunks import Chunk, split_parts
from stream.config import Freshness, LogSettings, Media
from stream.frames import DecoderEvent
from stream.marker import HEIGHT, LEFT, RED, SIDE, TOP, WIDTH
from stream.records import OutRecord, Topic, decode_headers, encode_headers
from stream.shard import HEADER_ROOM
from tests.stream import decoding
from tests.stream.clustered import Clustered
from tests.stream.decoding import START_US, applied, decoder, failed, frames, shown, source_pictures
from tests.stream.detecting import Detect, chunked, kinds
from tests.stream.media import make_clip
from tests.stream.test_deadletters import listed
from tests.stream.test_worker import told

SMALL = HEADER_ROOM + 16 * 1024
"""A record of 16 KiB: the pictures of these tests are larger."""

SECOND = 1_000_000


def noisy(index: int) -> Image:
    """Return a red square in noise: nothing that an encoder could make small."""
    grey = np.random.default_rng(index % 7).integers(60, 190, (HEIGHT, WIDTH, 1), dtype=np.uint8)
    picture = np.repeat(grey, 3, axis=2)
    picture[TOP : TOP + SIDE, LEFT : LEFT + SIDE] = RED
    return picture


@pytest.fixture(scope="session")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 s at 10 pictures a second, keyframes every second, each picture larger than a record."""
    path = tmp_path_factory.mktemp("clips") / "heavy.mp4"
    return make_clip(
        path, seconds=8, fps=10, size=(WIDTH, HEIGHT), gop=10, bframes=0, audio=None, picture=noisy, crf=20
    )


def parted(clip: Path, limit: int = 16 * 1024) -> list[Chunk]:
    return [part for chunk in chunked(clip, "a", START_US) for part in split_parts(*chunk, limit)]


def write(made: Detect, chunks: Sequence[Chunk]) -> None:
    made.list_source("a")
    made.write(chunks)


def detect(folder: Path, commit_ms: int = 500) -> Detect:
    return Detect(
        folder, log=LogSettings(commit_ms=commit_ms), media=Media(max_message_bytes=SMALL, partitions=2)
    )


def test_parts_make_no_difference_whoever_takes_over_in_the_middle_of_them(
    tmp_path: Path, heavy: Path
) -> None:
    parts = parted(heavy)
    assert max(meta.parts for meta, _ in parts) > 4
    whole = detect(tmp_path / "whole")
    write(whole, chunked(heavy, "a", START_US))
    whole.run()
    broken = detect(tmp_path / "broken", commit_ms=10)
    write(broken, parts)
    rng = random.Random(3)
    killed = sum(broken.run_killed(after_commits=rng.randrange(0, 3)) for _ in range(6))
    broken.run()
    assert killed >= 3
    assert len(whole.frames("a")) == 16
    assert broken.frames("a") == whole.frames("a")
    assert [told(alert) for alert in broken.alerts()] == [told(alert) for alert in whole.alerts()]
    clips = [e for a in broken.alerts() for e in a["data"]["evidence"] if e["kind"] == "clip"]
    assert clips
    assert broken.dead() == []


def test_a_lost_part_costs_its_group_of_pictures_and_is_told(tmp_path: Path, heavy: Path) -> None:
    parts = parted(heavy)
    lost = next(n for n, (meta, _) in enumerate(parts) if meta.sequence == 6 and meta.part == 1)
    made = detect(tmp_path)
    write(made, parts[:lost] + parts[lost + 1 :])
    made.run()
    times = [(frame["media_us"] - START_US) / SECOND for frame in made.frames("a")]
    assert [at for at in times if 2.5 <= at < 3] == []
    assert [at for at in times if at < 2.5] == [0, 0.5, 1, 1.5, 2]
    assert len(times) == 15
    assert made.dead() == []
    dropped = [value for value in made.values(Topic.SCORES) if value["type"] == "dropped"]
    ranges = [(d["reason"], d["first_us"] - START_US, d["last_us"] - START_US) for d in dropped]
    assert ranges == [("CORRUPT", 2_400_000, 3 * SECOND)]


def test_a_chunk_damaged_in_parts_is_dead_lettered_whole(tmp_path: Path, heavy: Path) -> None:
    """Sequence 6 begins in the middle of a group: the letter holds all parts since its keyframe."""
    parts = parted(heavy)
    bad = next(n for n, (meta, _) in enumerate(parts) if meta.sequence == 6 and meta.part == 1)
    meta, value = parts[bad]
    parts[bad] = (meta, bytes(len(value)))
    made = detect(tmp_path)
    write(made, parts)
    made.run()
    [letter] = listed(made)
    assert letter["code"] == "chunk_invalid"
    found = [decode_headers(record.key, record.headers) for record in made.dead()]
    assert (found[0].starts_on_keyframe, found[0].part) == (True, 0)
    whole = [(meta.sequence, meta.part) for meta, _ in parts]
    last = whole.index((6, parts[bad][0].parts - 1)) + 1
    assert [(meta.sequence, meta.part) for meta in found] == whole[last - len(found) : last]


def test_over_kafka_with_a_small_limit(tmp_path: Path, servers: str, heavy: Path) -> None:
    """The broker allows no record as large as these chunks; what arrives is as if it did."""
    limit = 128 * 1024
    big = [chunk for chunk in chunked(heavy, "a", START_US, chunk_ms=1000) if len(chunk[1]) > limit + 65_536]
    assert big
    whole = Detect(tmp_path / "whole", freshness=Freshness(on_late="score"))
    write(whole, chunked(heavy, "a", START_US, chunk_ms=1000))
    whole.run()
    made = Clustered(tmp_path / "kafka", servers, media=Media(max_message_bytes=limit, partitions=2))
    made.list_source("a")
    chunks = chunked(heavy, "a", START_US, chunk_ms=1000)
    records = [
        OutRecord(made.topic(Topic.MEDIA), "a", value, encode_headers(meta), meta.capture_us, 0)
        for chunk in chunks
        for meta, value in split_parts(*chunk, limit - HEADER_ROOM)
    ]
    assert len(records) > len(chunks)
    with made.log.producer("ingest") as producer:
        for record in records:
            producer.send(record)
        producer.flush(30)
    made.run()
    assert made.frames("a") == whole.frames("a")
    assert kinds(made.alerts()) == kinds(whole.alerts())
    assert kinds(made.alerts())[0] == "incident.opened"


@cache
def small_parts() -> tuple[Chunk, ...]:
    """Return 2.4 s in parts of at most 900 bytes, groups of 0.48 s."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        clip = make_clip(Path(folder) / "clip.mp4", seconds=2.4, gop=12, size=(96, 64), audio=None)
        chunks = decoding.chunked(clip, 120)
        PICTURES.extend(shown(frame) for frame in frames(decoding.run(chunks)))
        assert len(PICTURES) == len(source_pictures(clip)) == 60
        return tuple(part for chunk in chunks for part in split_parts(*chunk, 900))


PICTURES: list[Any] = []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_is_lost_or_comes_twice_nothing_wrong_is_shown(data: st.DataObject) -> None:
    """Every record has one answer; pictures are the source's own or missing, never others; order holds."""
    parts = small_parts()
    count = len(parts)
    lost = data.draw(st.sets(st.integers(0, count - 1), max_size=6), label="lost")
    twice = data.draw(st.sets(st.integers(0, count - 1), max_size=3), label="twice")
    swapped = data.draw(st.sets(st.integers(0, count - 2), max_size=2), label="swapped")
    order = [n for n in range(count) for _ in range((n not in lost) + (n in twice))]
    for place in swapped:
        if place + 1 < len(order):
            order[place], order[place + 1] = order[place + 1], order[place]
    target = decoder()
    events: list[DecoderEvent] = []
    for offset, number in enumerate(order):
        found = list(target.feed(offset, *parts[number]))
        assert [event.offset for event in found[-1:]] == [offset]
        assert len(applied(found)) + len(failed(found)) == 1
        assert target.counts.records == offset + 1
        events += found
    pictures = [shown(frame) for frame in frames(events)]
    assert [picture.pts for picture in pictures] == sorted({picture.pts for picture in pictures})
    right = {picture.pts: picture.picture for picture in PICTURES}
    assert all(picture.picture == right[picture.pts] for picture in pictures)
    if order == sorted(order) and not lost:
        assert len(pictures) == 60


def test_parts_without_end_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream.decode.MAX_PARTS_BYTES", 10_000)
    meta, value = next(chunk for chunk in small_parts() if chunk[0].parts > 1)
    target = decoder()
    events: list[DecoderEvent] = []
    for part in range(40):
        events += target.feed(part, replace(meta, part=part, parts=1000), value)
        assert target._parts_bytes <= 10_000 + len(value)
    assert len(failed(events)) == 1
    assert len(applied(events)) == 39
