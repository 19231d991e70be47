"""Readings through the stream's own logic: the same verdicts as watching, at the rate the stream asks for."""

from pathlib import Path

import pytest

from detectors.readings import FaceReading
from stream.config import Config
from stream.kept import Look
from stream.marker import CALIBRATION, GREEN, PROVENANCE, RED, MarkerReader, draw, write_clip
from stream.replay import Follower, Seen, parts, seen
from stream.score import Scorer

SETTINGS = Config()


def faces(colour: tuple[int, int, int] | None) -> tuple[FaceReading, ...]:
    picture = draw(0, colour)
    return MarkerReader().read([(picture, picture)])[0]


CALM, WRONG, EMPTY = faces(GREEN), faces(RED), faces(None)


def looks(*parts: tuple[float, tuple[FaceReading, ...]], fps: float = 8.0) -> list[Look]:
    """Return looks at `fps` over stretches of (seconds, faces)."""
    found = [face for seconds, face in parts for face in [face] * round(seconds * fps)]
    return [Look(round(index * 1e6 / fps), 320, 180, False, face) for index, face in enumerate(found)]


def followed(settings: Config, *parts: tuple[float, tuple[FaceReading, ...]]) -> Follower:
    follower = Follower(settings, CALIBRATION, PROVENANCE, "marker", "exact")
    for look in looks(*parts):
        follower.add(look)
    return follower


def test_a_calm_stream_is_sampled_slowly_and_a_suspect_one_fast() -> None:
    calm, wrong = followed(SETTINGS, (10, CALM)), followed(SETTINGS, (10, WRONG))
    assert len(calm.taken) == 20
    assert len(wrong.taken) > 50
    assert wrong.wanted_fps() == SETTINGS.sampling.burst_fps


def test_deterministic_settings_know_no_bursts() -> None:
    assert len(followed(Config(deterministic=True), (10, WRONG)).taken) == 20


def test_what_was_said_is_counted() -> None:
    outcome = followed(SETTINGS, (5, CALM), (12, WRONG), (30, CALM), (12, WRONG), (3, CALM)).outcome()
    assert outcome.alarms == 2
    assert outcome.accused == 1
    assert outcome.first_us is not None
    assert 5e6 < outcome.first_us < 17e6
    assert any(value > 0.9 for value in outcome.probabilities)
    quiet = followed(SETTINGS, (20, CALM)).outcome()
    assert (quiet.alarms, quiet.accused, quiet.first_us) == (0, 0, None)
    assert max(quiet.probabilities) < 0.1


def test_a_cut_in_a_look_that_was_passed_over_still_ends_the_track() -> None:
    follower = Follower(SETTINGS, CALIBRATION, PROVENANCE, "marker", "exact")
    for index, look in enumerate(looks((4, CALM))):
        cut = index == 9  # between two that are taken
        follower.add(Look(look.media_us, 320, 180, cut, look.faces))
    assert {track for tracks in follower.tracks for track in tracks} == {0, 1}


def test_the_verdicts_are_those_of_watching(tmp_path: Path) -> None:
    """A clip judged by `unmask score` and its readings replayed open the same incidents."""
    settings = Config(deterministic=True)
    path = write_clip(tmp_path / "a.mp4", 10, planted=[(2, 10)])
    scorer = Scorer(settings, MarkerReader(), CALIBRATION, PROVENANCE, tmp_path / "scratch")
    (result,) = scorer.score([path], crops=False)
    assert result["verdict"] == "manipulated"
    assert followed(settings, (2, CALM), (8, WRONG)).outcome().alarms == 1
    assert followed(settings, (6, CALM), (2, WRONG)).outcome().alarms == 0


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (((10, CALM),), Seen(9.5, 9.5, 9.5, 1)),
        (((4, CALM), (6, EMPTY)), Seen(9.5, 4.0, 4.0, 1)),
        (((10, EMPTY),), Seen(9.5, 0.0, 0.0, 0)),
        (((1.5, CALM), (3, EMPTY), (1.5, CALM)), Seen(5.5, 2.5, 2.5, 0)),
    ],
)
def test_what_there_was_to_judge(
    parts: tuple[tuple[float, tuple[FaceReading, ...]], ...], expected: Seen
) -> None:
    follower = followed(SETTINGS, *parts)
    assert seen(follower.taken, follower.tracks, SETTINGS) == expected


def test_what_drift_looks_at_is_each_face_once_in_ten_seconds() -> None:
    follower = followed(SETTINGS, (21, CALM), (3, EMPTY), (1, WRONG))
    found = parts(follower.taken, follower.tracks)
    assert found == {"score": [-6.0] * 3 + [6.0], "face_px": [64.0] * 4}


def test_time_that_nobody_looked_at_does_not_count() -> None:
    taken = [Look(0, 320, 180, False, CALM), Look(60_000_000, 320, 180, False, CALM)]
    assert seen(taken, [(0,), (1,)], SETTINGS) == Seen(0.5, 0.5, 0.5, 0)
