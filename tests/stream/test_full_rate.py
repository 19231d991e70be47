"""Bursts at full rate: beside the ordinary sampling, which is the same with and without them."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from detectors.cues.burst import BLINK, LIPS, NAMES, BurstCues
from detectors.cues.series import FaceLook
from detectors.cues.voice import Window
from detectors.readings import Detection, FaceReading, Image
from stream import bursts
from stream.bursts import AWAITED_US, FIXED, LONGEST_US, REST_US, SHORTEST_US, FullRate
from stream.clock import Deadline, SystemClock
from stream.config import Config, Cues, Decode, Verdict
from stream.decode import NO_BURST, Burst, DecodeSettings, StreamDecoder
from stream.decoders import DecoderPool
from stream.device import Device, Result
from stream.frames import (
    DecoderEvent,
    FollowedFrame,
    HeardSound,
    ResumePoint,
    SampledFrame,
    ScoredFrame,
    Sound,
    Use,
)
from stream.marker import write_clip
from stream.sound import RATE_HZ
from tests.stream.decoding import as_records, chunked, frames, run, shown, with_bytes
from tests.stream.detecting import Detect
from tests.stream.detecting import chunked as filed
from tests.stream.media import make_clip
from tests.stream.story import START_US, Story
from tests.stream.story import face as read_face
from tests.stream.test_device import frame as sampled

MICRO = 1_000_000
FPS = 25
EVERYTHING = Burst(60.0, sound=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", seconds=3.2, gop=20, size=(96, 64))


def decoder(burst: Callable[[], Burst], resume: ResumePoint | None = None, fps: float = 2.0) -> StreamDecoder:
    return StreamDecoder(DecodeSettings(), resume or ResumePoint(), lambda: fps, burst=burst)


# The decoder


def test_a_burst_adds_pictures_and_leaves_the_ordinary_ones_as_they_are(clip: Path) -> None:
    chunks = chunked(clip)
    plain = frames(run(chunks, decoder(lambda: NO_BURST)))
    events = run(chunks, decoder(lambda: EVERYTHING))
    dense = frames(events)
    assert len(dense) == 80
    ordinary = [frame for frame in dense if frame.use is Use.BOTH]
    assert [shown(frame) for frame in ordinary] == [shown(frame) for frame in plain]
    assert {frame.use for frame in plain} == {Use.JUDGED}
    assert {frame.use for frame in dense} == {Use.BOTH, Use.FOLLOWED}
    ends = [event for event in events if not isinstance(event, SampledFrame | Sound)]
    assert sum(event.sampled for event in ends if hasattr(event, "sampled")) == len(plain)


def test_a_burst_holds_from_one_frame_on_to_another(clip: Path) -> None:
    wanted = [NO_BURST]
    made = decoder(lambda: wanted[0])
    events: list[DecoderEvent] = []
    for offset, chunk in enumerate(chunked(clip)):
        wanted[0] = Burst(60.0) if 5 <= offset < 10 else NO_BURST
        events += made.feed(offset, *chunk)
    between = [frame.offset for frame in frames(events) if frame.use is Use.FOLLOWED]
    assert between
    assert min(between) >= 4
    assert max(between) < 10
    assert made.counts.followed == len(between)
    assert not [event for event in events if isinstance(event, Sound)]


def test_a_restart_in_a_burst_goes_on_with_the_next_picture(clip: Path) -> None:
    chunks = chunked(clip)
    whole = frames(run(chunks, decoder(lambda: EVERYTHING)))
    last = whole[30]
    assert last.use is Use.FOLLOWED
    sample_us = max(frame.media_us for frame in whole[:30] if frame.use is Use.BOTH)
    point = ResumePoint(last.meta.attachment, last.meta.epoch, last.pts, sample_us)
    again = frames(run(chunks, decoder(lambda: EVERYTHING, point)))
    assert [(frame.pts, frame.use) for frame in again] == [(frame.pts, frame.use) for frame in whole[31:]]


def test_sound_comes_with_its_place_in_time(clip: Path) -> None:
    heard = [event for event in run(chunked(clip), decoder(lambda: EVERYTHING)) if isinstance(event, Sound)]
    assert heard
    total_s = sum(len(sound.samples) for sound in heard) / RATE_HZ
    assert total_s == pytest.approx(3.2, abs=0.15)
    for before, after in pairwise(heard):
        ends_us = before.media_us + len(before.samples) / RATE_HZ * MICRO
        assert after.media_us == pytest.approx(ends_us, abs=3000)
    loud = np.concatenate([sound.samples for sound in heard])
    assert np.abs(loud[RATE_HZ // 2 : -RATE_HZ // 2]).max() > 1000


def test_no_sound_is_no_error(tmp_path: Path) -> None:
    silent = make_clip(tmp_path / "silent.mp4", seconds=0.6, size=(96, 64), audio=None)
    made = decoder(lambda: EVERYTHING)
    events = run(chunked(silent), made)
    assert not [event for event in events if isinstance(event, Sound)]
    assert len(frames(events)) == 15
    assert made.counts.unheard == 0


def test_sound_that_is_damaged_costs_no_picture(clip: Path) -> None:
    def damaged(index: int, packet: Any) -> Any:
        if packet.stream.type != "audio" or index % 3:
            return packet
        return with_bytes(packet, bytes(255 - byte for byte in bytes(packet)))

    made = decoder(lambda: EVERYTHING)
    events = run(chunked(clip, change=damaged), made)
    assert len(frames(events)) == 80
    assert made.counts.unheard > 0
    assert made.counts.errors == 0


def test_a_child_hands_out_the_same(clip: Path) -> None:
    chunks = chunked(clip)
    wanted = run(chunks, decoder(lambda: EVERYTHING))
    pool = DecoderPool(Decode(), SystemClock())
    found: list[DecoderEvent] = []
    try:
        pool.open("cam", ResumePoint(), 2.0)
        pool.set_burst("cam", EVERYTHING)
        waiting, deadline = as_records(chunks), Deadline(60, SystemClock())
        while len(found) < len(wanted) and not deadline.passed():
            while waiting and pool.submit(waiting[0]):
                waiting.pop(0)
            for event in pool.poll(0.05):
                if isinstance(event, SampledFrame):
                    event.release()
                found.append(event)
    finally:
        pool.shutdown(Deadline(10, SystemClock()))
    assert [type(event) for event in found] == [type(event) for event in wanted]
    assert [frame.use for frame in frames(found)] == [frame.use for frame in frames(wanted)]
    mine, theirs = (
        [(sound.media_us, sound.samples.tolist()) for sound in events if isinstance(sound, Sound)]
        for events in (found, wanted)
    )
    assert mine == theirs


# The device


def look(open_eyes: float = 0.25) -> FaceLook:
    return FaceLook(np.array([open_eyes, open_eyes, 0, 0, 0, 0, 0.1], np.float32), None)


class Following:
    """Follows without looking; notes what it was asked."""

    hears = True

    def __init__(self, broken: bool = False) -> None:
        self.asked: list[str] = []
        self.broken = broken

    def seed(self, stream: str, image: Image, faces: Sequence[Detection]) -> tuple[FaceLook | None, ...]:
        self.asked.append("seed")
        if self.broken:
            raise RuntimeError("no face mesh today")
        return tuple(look() for _ in faces)

    def follow(self, stream: str, image: Image) -> tuple[FaceLook | None, ...]:
        self.asked.append("follow")
        return (look(),)

    def hear(self, stream: str, media_us: int, samples: NDArray[np.int16]) -> list[Window]:
        return [Window(media_us, 0.9, -20.0)]

    def drop(self, stream: str) -> None:
        self.asked.append("drop")


class OneFace:
    engine = "none"
    precision = "none"

    def __init__(self) -> None:
        self.pictures = 0

    def read(self, pictures: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        self.pictures += len(pictures)
        return [(read_face(1.0),) for _ in pictures]


def worked(reader: OneFace, follower: Any, work: Sequence[Any]) -> list[Result]:
    made: Device[None] = Device(reader, 4, SystemClock(), follower=follower)
    for item in work:
        made.offer(item, False, None)
    made.start()
    deadline, found = Deadline(20, SystemClock()), list[Result]()
    while made.pending() and not deadline.passed():
        found += [result for _, result in made.take()]
        SystemClock().sleep(0.005)
    assert made.error is None
    made.stop(5)
    return found + [result for _, result in made.take()]


def between(pts: int, cut: bool = False) -> SampledFrame:
    return replace(sampled(pts), use=Use.FOLLOWED, cut=cut)


def test_members_see_no_picture_of_a_burst_but_the_ordinary_ones() -> None:
    reader, follower = OneFace(), Following()
    work = [replace(sampled(0), use=Use.BOTH), between(1), between(2), sampled(3), between(4, cut=True)]
    found = worked(reader, follower, work)
    kinds = [
        (type(result), result.pts) for result in found if isinstance(result, ScoredFrame | FollowedFrame)
    ]
    assert kinds == [
        (ScoredFrame, 0),
        (FollowedFrame, 0),
        (FollowedFrame, 1),
        (FollowedFrame, 2),
        (ScoredFrame, 3),
        (FollowedFrame, 4),
    ]
    assert reader.pictures == 2
    assert follower.asked == ["seed", "follow", "follow", "drop", "drop"]
    assert [len(result.looks) for result in found if isinstance(result, FollowedFrame)] == [1, 1, 1, 0]


def test_cues_that_fail_cost_no_reading() -> None:
    work = [replace(sampled(0), use=Use.BOTH), sampled(1)]
    found = worked(OneFace(), Following(broken=True), work)
    assert [type(result) for result in found] == [ScoredFrame, FollowedFrame, ScoredFrame]
    assert found[1].looks == ()  # type: ignore[union-attr]


def test_sound_is_heard_in_its_turn() -> None:
    meta = sampled(0).meta
    work = [sampled(0), Sound(0, meta, 5, np.zeros(8, np.int16)), sampled(1)]
    found = worked(OneFace(), Following(), work)
    assert [type(result) for result in found] == [ScoredFrame, HeardSound, ScoredFrame]
    assert found[1].windows[0].media_us == 5  # type: ignore[union-attr]


# The state machine


def burst_of(tmp_path: Path, *names: str) -> FullRate:
    return FullRate(BurstCues(names or (BLINK,), trained=tmp_path))


def watch(burst: FullRate, begin_us: int, seconds: float, ids: Sequence[int] = (7,)) -> None:
    for index in range(round(seconds * FPS)):
        shut = index % 50 in range(10, 15)
        burst.look(begin_us + index * MICRO // FPS, ids, [look(0.04 if shut else 0.25) for _ in ids])


def test_a_burst_opens_on_suspicion_lasts_and_rests(tmp_path: Path) -> None:
    burst = burst_of(tmp_path)
    assert burst.step(0, suspect=False, allowed=True) == {}
    assert not burst.open
    burst.step(0, suspect=True, allowed=False)
    assert not burst.open
    burst.step(0, suspect=True, allowed=True)
    assert burst.open
    watch(burst, 0, 4)
    assert burst.step(LONGEST_US - 1, suspect=False, allowed=True) == {}
    assert set(burst.step(LONGEST_US, suspect=True, allowed=True)) == {7}
    assert not burst.open
    burst.step(LONGEST_US + REST_US - 1, suspect=True, allowed=True)
    assert not burst.open
    burst.step(LONGEST_US + REST_US, suspect=True, allowed=True)
    assert burst.open


def test_a_spent_budget_ends_a_burst_once_it_is_worth_something(tmp_path: Path) -> None:
    burst = burst_of(tmp_path)
    burst.step(0, suspect=True, allowed=True)
    watch(burst, 0, 1)
    burst.step(SHORTEST_US - 1, suspect=True, allowed=False)
    assert burst.open
    burst.step(SHORTEST_US, suspect=True, allowed=False)
    assert not burst.open


def test_what_a_burst_saw_survives_a_restart_at_any_picture(tmp_path: Path) -> None:
    def told(restart: bool) -> dict[int, Any]:
        burst, read = burst_of(tmp_path, BLINK, LIPS), {}
        now_us = 0
        for _ in range(3):
            burst.step(now_us, suspect=True, allowed=True)
            for part in range(8):
                watch(burst, now_us + part * MICRO // 2, 0.52)
                burst.hear([Window(now_us + part * MICRO // 2, 0.9, -30.0 + part)])
                if restart:
                    state = json.loads(json.dumps(burst.state()))
                    burst = burst_of(tmp_path, BLINK, LIPS)
                    burst.restore(state)
            read = burst.step(now_us + LONGEST_US, suspect=True, allowed=True)
            now_us += LONGEST_US + REST_US
            burst.step(now_us - 1, suspect=False, allowed=True)
        return read

    assert told(restart=True) == told(restart=False)
    assert told(restart=True)[7][0].value == pytest.approx(105, abs=5)


def test_a_burst_counts_from_its_first_picture_and_gives_up_without(tmp_path: Path) -> None:
    burst = burst_of(tmp_path)
    burst.step(0, suspect=True, allowed=True)
    burst.step(LONGEST_US + 1, suspect=True, allowed=True)
    assert burst.open
    watch(burst, LONGEST_US, 0.1)
    burst.step(2 * LONGEST_US - 1, suspect=True, allowed=True)
    assert burst.open
    burst.step(2 * LONGEST_US, suspect=True, allowed=True)
    assert not burst.open
    lonely = burst_of(tmp_path)
    lonely.step(0, suspect=True, allowed=True)
    assert lonely.step(AWAITED_US, suspect=True, allowed=True) == {}
    assert not lonely.open


def test_tracks_that_end_are_forgotten_and_strangers_counted(tmp_path: Path) -> None:
    burst = burst_of(tmp_path)
    burst.step(0, suspect=True, allowed=True)
    watch(burst, 0, 4, ids=(7, 8))
    burst.look(5 * MICRO, (7,), [look(), look()])
    assert burst.passed_over == 1
    burst.forget([8])
    assert set(burst.step(5 * MICRO, suspect=False, allowed=True)) == {7}


# The aggregate


def on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str, against: str = "") -> Config:
    monkeypatch.setattr(bursts, "why_no_landmarks", lambda folder: against)
    bursts._cues.cache_clear()
    return Config(data_dir=str(tmp_path), verdict=Verdict(window_s=10.0), cues=Cues(record=names))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    bursts._cues.cache_clear()


def test_without_such_cues_nothing_is_kept_and_nothing_is_said(tmp_path: Path) -> None:
    story = Story(tmp_path).tell("MMMMMMMM")
    assert not story.aggregate.step_burst(allowed=True)
    assert "burst" not in story.aggregate.state()
    assert "cues" not in json.dumps([output.as_json() for output in story.said if hasattr(output, "as_json")])


def test_cues_tell_why_they_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = on(tmp_path, monkeypatch, BLINK, against="landmarks: not pulled")
    story = Story(tmp_path, settings=settings).tell("MMMM")
    assert not story.aggregate.step_burst(allowed=True)
    assert "landmarks: not pulled" in json.dumps(story.aggregate.state())
    fixed = settings.model_copy(update={"deterministic": True})
    story = Story(tmp_path, settings=fixed).tell("MMMM")
    assert not story.aggregate.step_burst(allowed=True)
    assert FIXED in json.dumps(story.aggregate.state())


def followed(story: Story, pts: int, media_us: int, seeded: bool = False) -> FollowedFrame:
    teller = story.teller
    place = f"{teller.attachment:016x}", teller.epoch
    return FollowedFrame("studio", *place, pts, media_us, False, seeded, (look(),), 0.0)


def test_pictures_of_a_burst_move_the_place_and_not_the_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(tmp_path, settings=on(tmp_path, monkeypatch, BLINK)).tell("MMMM")
    aggregate, said = story.aggregate, len(story.said)
    assert aggregate.step_burst(allowed=True)
    before = aggregate.resume
    assert before.last_pts is not None
    aggregate.on_followed(followed(story, before.last_pts, story.teller.media_us, seeded=True))
    assert aggregate.resume == before
    aggregate.on_followed(followed(story, before.last_pts + 1, story.teller.media_us + 40_000))
    assert aggregate.resume == replace(before, last_pts=before.last_pts + 1)
    ignored = aggregate.ignored
    aggregate.on_followed(followed(story, before.last_pts + 1, story.teller.media_us + 40_000))
    assert aggregate.ignored == ignored + 1
    stranger = replace(
        followed(story, before.last_pts + 2, story.teller.media_us + 80_000), looks=(look(), look())
    )
    aggregate.on_followed(stranger)
    assert aggregate.looks_passed_over == 1
    assert len(story.said) == said
    again = story.fresh().restore(json.loads(json.dumps(aggregate.state())))
    assert again.state() == aggregate.state()
    assert again.step_burst(allowed=True)


# The worker


def test_a_suspect_feed_is_watched_at_full_rate_and_the_scores_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write_clip(tmp_path / "red.mp4", 12, [(1, 12)])
    made = Detect(tmp_path)
    settings = on(tmp_path, monkeypatch, BLINK)
    made.config = made.config.model_copy(update={"deterministic": False, "cues": settings.cues})
    follower = Following()
    made.follower = follower  # type: ignore[assignment]
    made.list_source("a")
    made.write(filed(clip, "a", START_US))
    made.run()
    assert follower.asked.count("follow") > 20
    scores = made.frames("a")
    assert len(scores) < 12 * 10
    told = [score["faces"][0]["cues"][BLINK] for score in scores]
    assert "no burst" in told[0]["reason"]
    assert "watched for" in told[-1]["reason"] or "value" in told[-1]
    ticks = {score["media_us"] for score in scores}
    assert len(ticks) == len(scores)


def test_names_of_burst_cues_are_names_of_cues() -> None:
    Cues(record=NAMES)
