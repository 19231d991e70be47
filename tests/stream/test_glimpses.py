"""Small pictures of feeds: when one is due, what it tells, and that a worker writes it."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from stream.clock import FakeClock
from stream.config import Web
from stream.glimpses import WIDTH, Glimpses, jpeg, read_glimpse
from stream.marker import write_clip
from stream.records import Record, Topic
from tests.stream.detecting import Detect, chunked

IMAGE = np.zeros((360, 640, 3), np.uint8)
IMAGE[..., 0] = 200


def test_a_picture_is_small_and_keeps_its_colours() -> None:
    found = cv2.imdecode(np.frombuffer(jpeg(IMAGE), np.uint8), cv2.IMREAD_COLOR)
    assert found is not None
    assert found.shape == (216, WIDTH, 3)
    assert [int(part) for part in found[100, 100]] == pytest.approx([0, 0, 200], abs=6)  # BGR


def test_each_stream_has_its_own_pace_and_canaries_none() -> None:
    clock = FakeClock()
    glimpses = Glimpses(5.0, clock)
    assert glimpses.of("a", IMAGE) is not None
    clock.advance(4)
    assert glimpses.of("a", IMAGE) is None
    assert glimpses.of("b", IMAGE) is not None
    clock.advance(1)
    assert glimpses.of("a", IMAGE) is not None
    assert glimpses.of("canary~0", IMAGE) is None
    assert Glimpses(0.0, clock).of("a", IMAGE) is None


def test_what_cannot_be_encoded_is_counted_and_costs_nothing_else() -> None:
    glimpses = Glimpses(5.0, FakeClock())
    assert glimpses.of("a", np.zeros((0, 0, 3), np.uint8)) is None
    assert glimpses.failed == 1


@pytest.mark.parametrize("facts", [b"", b"null", b"{}", b'{"faces": 1}', b"[1]"])
def test_what_is_no_picture_is_none(facts: bytes) -> None:
    assert read_glimpse(Record("p", 0, 0, "a", b"x", {"glimpse": facts}, 0)) is None


@pytest.mark.parametrize(("every_s", "some"), [(0.001, True), (0.0, False)])
def test_a_worker_writes_pictures_with_the_faces_in_them(tmp_path: Path, every_s: float, some: bool) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 2, [(0, 2)])
    made = Detect(tmp_path / "data", web=Web(picture_every_s=every_s))
    made.list_source("a")
    made.write(chunked(clip, "a", 1_700_000_000_000_000))
    made.run()
    records = made.records(Topic.PICTURES)
    assert bool(records) is some
    for record in records:
        found = read_glimpse(record)
        assert found is not None
        assert (found.facts["width"], found.facts["height"]) == (320, 180)
        (face,) = found.facts["faces"]
        (score,) = [one for one in made.frames("a") if one["media_us"] == found.facts["media_us"]]
        assert (face["track"], face["box"]) == (score["faces"][0]["track"], score["faces"][0]["box"])
    assert json.loads(records[0].headers["glimpse"])["models"] if some else True
