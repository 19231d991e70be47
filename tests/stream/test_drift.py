"""When a feed is told to have drifted from its calibration, and when not."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from detectors.calibration import Histogram
from detectors.drift import reference_histograms
from detectors.readings import FaceReading, Reason
from stream.drift import DRIFTED, EVERY_US, HALF_LIFE_US, QUIET_US, STEADY, Drift, Standing, Turn
from stream.feeds import FeedEvent
from stream.records import Control, Kind
from stream.windows import MICRO, sample_of
from tests.stream.story import CALIBRATION, START_US, Story, Teller, face

RNG = np.random.default_rng(7)
REFERENCE = reference_histograms({"score": RNG.normal(-2, 1, 4000), "sharpness": RNG.gamma(4, 30, 4000)})
LOW = reference_histograms({"score": RNG.normal(-6, 1, 1000)})
STEP_US = 2 * MICRO
"""Between faces, each another person's: several thousand looks an hour."""


def reading(score: float, sharpness: float, reasons: tuple[Reason, ...] = ()) -> FaceReading:
    made = replace(face(0.0, reasons=reasons), logits={"m": score}, fused=score)
    return replace(made, quality=replace(made.quality, parts={"sharpness": sharpness, "yaw": 3.0}))


class Feed:
    """Shows new faces to a drift, for so many seconds of media time."""

    def __init__(self, reference: dict[str, Histogram] = REFERENCE) -> None:
        self.random = random.Random(3)
        self.reference = reference
        self.drift = Drift(reference, "v1")
        self.now_us = START_US
        self.turns: list[tuple[float, Turn]] = []

    def show(self, seconds: float, score: float = -2.0, blur: float = 1.0, new: bool = True) -> "Feed":
        end_us = self.now_us + seconds * MICRO
        while self.now_us < end_us:
            self.now_us += STEP_US
            found = reading(self.random.gauss(score, 1), self.random.gammavariate(4, 30) * blur)
            turn = self.drift.look(found, sample_of(found, self.now_us), new)
            if turn is not None:
                self.turns.append(((self.now_us - START_US) / MICRO, turn))
        return self

    def again(self) -> "Feed":
        state = json.loads(json.dumps(self.drift.state()))
        self.drift = Drift(self.reference, "v1")
        self.drift.restore(state)
        return self


def test_faces_like_those_of_the_calibration_are_no_news() -> None:
    feed = Feed().show(4 * 3600)
    assert feed.turns == []
    assert set(feed.drift.psi) == {"score", "sharpness"}
    assert max(feed.drift.psi.values()) < STEADY


def test_a_feed_that_moved_away_is_told_once_and_once_more_when_it_is_back() -> None:
    feed = Feed().show(1800).show(3 * 3600, score=-0.5)
    assert [turn.standing for _, turn in feed.turns] == [Standing.DRIFTED]
    at, turn = feed.turns[0]
    assert 1800 < at < 1800 + 3600
    (shift,) = turn.shifts
    assert shift.part == "score"
    assert shift.psi >= DRIFTED
    assert shift.median > shift.reference_median == pytest.approx(-2, abs=0.1)
    assert "score about" in turn.sentence
    feed.show(8 * 3600)
    assert [turn.standing for _, turn in feed.turns] == [Standing.DRIFTED, Standing.STEADY]
    assert feed.turns[1][1].shifts == ()


def test_the_farthest_part_is_named_first() -> None:
    feed = Feed().show(3600, score=-1.2, blur=0.2)
    assert [shift.part for shift in feed.turns[0][1].shifts] == ["sharpness", "score"]


def test_a_feed_that_goes_to_and_fro_is_told_of_at_a_bounded_rate() -> None:
    feed = Feed()
    for _ in range(12):
        feed.show(900, score=3.0).show(900)
    times = [at for at, _ in feed.turns]
    assert all(b - a >= QUIET_US / MICRO for a, b in pairwise(times))
    standings = [turn.standing for _, turn in feed.turns]
    assert all(a is not b for a, b in pairwise(standings))


def test_one_person_all_day_is_measured_and_never_told_of() -> None:
    feed = Feed().show(STEP_US / MICRO, score=1.0).show(4 * 3600, score=1.0, new=False)
    assert feed.drift.psi["score"] > DRIFTED
    assert feed.turns == []


def test_few_looks_say_nothing() -> None:
    assert Feed().show(60, score=6.0).drift.psi == {}


def test_faces_that_decide_nothing_count_for_quality_alone() -> None:
    drift = Drift(REFERENCE, "v1")
    for index in range(80):
        found = reading(6.0, 40.0, (Reason.BLUR,))
        drift.look(found, sample_of(found, START_US + index * STEP_US), True)
    assert set(drift.psi) == {"sharpness"}


def test_what_is_no_number_is_passed_over() -> None:
    drift = Drift(REFERENCE, "v1")
    for index in range(80):
        found = reading(float("nan"), float("nan"))
        drift.look(found, sample_of(found, START_US + index * STEP_US), True)
    assert drift.psi == {}


def test_looks_are_forgotten_by_half_in_a_half_life() -> None:
    feed = Feed().show(3600)
    whole = sum(feed.drift.state()["counts"]["score"])
    found = reading(-2.0, 100.0)
    feed.drift.look(found, sample_of(found, feed.now_us + HALF_LIFE_US), False)
    assert sum(feed.drift.state()["counts"]["score"]) == pytest.approx(whole / 2 + 1, rel=0.03)


@pytest.mark.parametrize("every", [1, 7])
def test_a_restart_changes_nothing(every: int) -> None:
    whole, broken = Feed(), Feed()
    for index in range(60):
        score = -0.5 if index > 10 else -2.0
        whole.show(120, score)
        broken.show(120, score)
        if index % every == 0:
            before = broken.drift.psi
            broken.again()
            assert broken.drift.psi == before
    assert broken.drift.state() == whole.drift.state()
    assert broken.turns == whole.turns
    assert whole.turns


def test_counts_against_another_calibration_are_left_behind() -> None:
    state = Feed().show(3600).drift.state()
    other = Drift(REFERENCE, "v2")
    other.restore(state)
    assert sum(other.state()["counts"]["score"]) == 0


def test_without_a_reference_nothing_is_done() -> None:
    drift = Drift({}, "v1")
    assert not drift.due(None, START_US)
    assert drift.state() == {}
    drift.restore({})


def test_a_face_is_looked_at_now_and_then() -> None:
    drift = Drift(REFERENCE, "v1")
    assert drift.due(None, START_US)
    assert not drift.due(START_US, START_US + EVERY_US - 1)
    assert drift.due(START_US, START_US + EVERY_US)


# In a stream


def live(tmp_path: Path, **more: Callable[[int], bool]) -> Story:
    calibrated = replace(CALIBRATION, reference=LOW)
    return Story(tmp_path, calibration=calibrated, teller=Teller(), **more)  # type: ignore[arg-type]


def test_a_drifted_feed_is_an_event_on_the_alerts_topic(tmp_path: Path) -> None:
    story = live(tmp_path)
    # a new face every three seconds, none of which anybody could tell
    story.tell("??|" * 150)
    drifts = [said for said in story.said if isinstance(said, FeedEvent) and said.kind == "drift"]
    assert [(said.code, [shift.part for shift in said.shifts]) for said in drifts] == [("drifted", ["score"])]
    assert story.aggregate.drift["score"] > DRIFTED
    numbers = [said.number for said in story.said if isinstance(said, FeedEvent)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_restart_at_any_point_tells_the_same(tmp_path: Path) -> None:
    drawn = "??|" * 100
    whole = live(tmp_path / "whole").tell(drawn)
    broken = live(tmp_path / "broken", restart=lambda index: index % 3 == 0).tell(drawn)
    assert broken.said == whole.said
    assert "drift" in whole.feeds()


def test_a_file_has_no_feed_to_drift(tmp_path: Path) -> None:
    story = live(tmp_path)
    story.teller.kind = Kind.FILE
    story.apply(story.teller.applied(Control.START))
    story.tell("??|" * 150)
    assert story.feeds() == []
    assert story.aggregate.drift == {}
