"""Whole stories of a stream, drawn: see `tests.stream.story` for the signs; half a second each."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import stream
from detectors.calibration import Calibration
from stream.aggregate import Output
from stream.alerts import Publisher
from stream.clock import FakeClock
from stream.config import Config, Sampling, Verdict
from stream.coverage import cover
from stream.errors import Code, UnmaskError
from stream.evidence import EvidenceStore, png
from stream.feeds import Feed, FeedEvent
from stream.frames import Dropped, Failed, SampledFrame, ScoredFrame
from stream.incidents import ClipRequest, IncidentEvent, Severity
from stream.overlay import overlay
from stream.records import Control, Kind
from stream.scores import DroppedRecord, ScoreRecord, VerdictRecord
from tests.stream.story import FACES, PROVENANCE, START_US, STEP_US, Story, Teller, tick

FOLDER = Path(stream.__file__).parent
SCORES, ALERT = (
    Draft202012Validator(json.loads((FOLDER / f"{name}.schema.json").read_text()))
    for name in ("scores", "alert")
)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def seconds(us: int) -> float:
    return (us - START_US) / 1e6


# Incidents


def test_a_manipulated_stretch_within_an_authentic_one(story: Story) -> None:
    #        0         5 s                      19 s                         32 s
    story.tell("aaaaaaaaaa MMMMMMMMMMMMMMMMMMMMMMMMMMMM aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
    assert story.told() == [
        ("opened", 13.5, ""),
        ("updated", 14.0, "escalation evidence"),
        ("updated", 18.5, "evidence clip"),
        ("closed", 32.0, "cleared"),
    ]
    closed = story.incidents()[-1]
    assert seconds(closed.first_us) == 5.5
    assert story.verdicts() == [
        (0.5, "inconclusive", "SHORT_TRACK"),
        (2.5, "authentic", ""),
        (7.5, "inconclusive", "AMBIGUOUS"),
        (13.5, "manipulated", ""),
        (32.0, "authentic", ""),
    ]


def test_nothing_opens_before_evidence_and_hold(story: Story) -> None:
    # five samples over two seconds: 2.5 s; held for 1.5 s: 4 s
    story.tell("MMMMMMM")
    assert story.told() == []
    story.tell("M")
    assert story.told() == [("opened", 4.0, "")]


@pytest.mark.parametrize(
    "drawn", ["?" * 60, "b" * 60, "." * 60, "MMM|" + "a" * 40, "MMM|aaa|" * 5, "M." * 2 + "a" * 40]
)
def test_nobody_is_accused_on_doubtful_evidence(story: Story, drawn: str) -> None:
    story.tell(drawn)
    assert story.told() == []


def test_nobody_is_accused_for_the_face_that_was_there_before(story: Story) -> None:
    story.tell("M" * 14 + "|" + "a" * 20)
    by_time = {at: said for at, said, _ in story.verdicts()}
    assert [said for at, said in by_time.items() if at > 7.0] == ["inconclusive", "authentic"]


def test_a_looping_publisher_buys_no_amnesty(story: Story) -> None:
    # a second and a half of picture, then three of nothing, over and over, each time a new attachment
    story.tell("RMMM------" * 8)
    assert [kind for kind, _, _ in story.told()][:2] == ["opened", "updated"]
    opened = story.incidents()[0]
    assert (opened.severity, opened.tracks_total) == (Severity.LOW, 0)
    assert opened.crops
    assert not [kind for kind, _, _ in story.told() if kind == "closed"]


def test_epochs_within_an_attachment_buy_none_either(story: Story) -> None:
    story.tell("EMMM" * 8)
    assert story.told()[0] == ("opened", 4.0, "")


def test_a_looping_authentic_publisher_is_left_alone(story: Story) -> None:
    story.tell("Raaa------" * 8)
    assert story.told() == []


def test_a_new_epoch_ends_tracks_but_not_the_incident(story: Story) -> None:
    story.tell("M" * 12 + "R" + "M" * 12)
    assert [kind for kind, _, _ in story.told()] == ["opened", "updated"]
    story.tell("M" * 60)
    assert story.incidents()[-1].tracks_total == 2


def test_an_incident_outlives_its_face_by_the_grace_only(story: Story) -> None:
    story.tell("M" * 14 + "." * 80)
    assert story.told()[-1] == ("closed", 37.0, "absent")
    assert story.verdicts()[-1] == (9.5, "inconclusive", "NO_FACE")


def test_silence_closes_by_ticks(story: Story) -> None:
    story.tell("M" * 14 + "-" * 80)
    assert story.told()[-1] == ("closed", 37.0, "absent")
    assert story.feeds() == ["up", "down"]
    assert story.verdicts()[-1] == (9.5, "inconclusive", "STALE")


def test_hiding_the_face_is_no_acquittal_but_dries_out(story: Story) -> None:
    story.tell("M" * 18 + "b" * 75)
    assert story.told()[-1] == ("closed", 44.0, "absent")
    assert story.verdicts()[-1] == (44.0, "inconclusive", "BLUR")


def test_a_second_face_on_screen_is_not_accused(story: Story) -> None:
    story.tell("2" * 20)
    opened = story.incidents()[0]
    assert [view.box[0] for view in opened.tracks] == [100.0]
    assert "authentic" not in {said for _, said, _ in story.verdicts()}


def test_a_later_incident_is_another(story: Story) -> None:
    story.tell("M" * 20 + "a" * 60 + "M" * 40)
    assert [event.incident for event in story.incidents() if event.number == 1] == ["i4000000", "i48500000"]


def test_smeared_pictures_accuse_nobody_and_hide_nothing(story: Story) -> None:
    story.tell("aaaaaa" + "x" * 20 + "a" * 20)
    assert story.verdicts() == [
        (0.5, "inconclusive", "SHORT_TRACK"),
        (2.5, "authentic", ""),
        (5.5, "inconclusive", "CORRUPT"),
        (13.5, "inconclusive", "SHORT_TRACK"),
        (15.5, "authentic", ""),
    ]


def test_too_few_samples_are_stale_never_authentic(tmp_path: Path) -> None:
    # wanted 8 a second, sampled 2
    busy = Story(tmp_path, Config(sampling=Sampling(idle_fps=8.0), verdict=Verdict(window_s=10.0)))
    busy.tell("a" * 30)
    assert busy.verdicts() == [(0.5, "inconclusive", "SHORT_TRACK"), (1.0, "inconclusive", "STALE")]


def test_the_uncalibrated_say_so(tmp_path: Path) -> None:
    story = Story(tmp_path, calibration=Calibration.identity()).tell("M" * 40)
    assert story.told() == []
    assert story.verdicts() == [(0.5, "inconclusive", "UNCALIBRATED")]
    assert not list(tmp_path.glob("*/*"))


def test_a_retracted_face_accuses_no_more_while_it_stays(story: Story) -> None:
    story.tell("M" * 10)
    story.take(story.aggregate.retract("i4000000", "a poster in the background"))
    story.tell("M" * 40)
    assert [kind for kind, _, _ in story.told()] == ["opened", "retracted"]
    story.tell("|" + "M" * 10)
    assert story.told()[-1][0] == "opened"


# The end


def test_the_end_of_a_file_closes_with_the_clip_first(tmp_path: Path) -> None:
    story = Story(tmp_path, teller=Teller(kind=Kind.FILE)).tell("MMMMMMMMMM$")
    assert story.told() == [("opened", 4.0, ""), ("updated", 5.0, "evidence clip"), ("closed", 5.0, "ended")]
    assert story.feeds() == []
    assert story.aggregate.over
    assert all(event.moment.capture_us is None for event in story.incidents())


def test_the_end_of_a_live_feed_is_told_as_unwatched(story: Story) -> None:
    story.tell("aaaa$")
    assert story.feeds() == ["up", "unwatched"]
    assert story.aggregate.on_orphan() == []
    story.tell("Raa")
    assert (story.feeds(), story.aggregate.over) == (["up", "unwatched", "up"], False)


def test_connecting_again_is_no_news_of_a_feed_that_was_not_up(story: Story) -> None:
    story.tell("aaaa$R")
    connecting = (Control.TICK, tick(False, None))
    assert controls(story, connecting, connecting) == ["up", "unwatched"]
    assert controls(story, (Control.TICK, tick(False))) == ["up", "unwatched", "down"]


def test_the_stop_of_watch_closes_and_a_restart_of_the_worker_does_not(story: Story) -> None:
    story.tell("M" * 10)
    story.aggregate = story.fresh().restore(json.loads(json.dumps(story.aggregate.state())))
    assert story.aggregate.open_incident == "i4000000"
    story.take(story.aggregate.stop())
    assert story.told()[-1][2] == "stopped"
    assert story.aggregate.open_incident is None


def test_a_clip_that_cannot_be_cut_keeps_nothing_open(tmp_path: Path) -> None:
    story = Story(tmp_path, clip=None).tell("MMMMMMMMMM$")
    assert story.told() == [("opened", 4.0, ""), ("closed", 5.0, "ended")]
    assert story.incidents()[-1].clip is None


# Feeds


def controls(story: Story, *bodies: tuple[Control, dict[str, Any]]) -> list[str]:
    for control, body in bodies:
        story.apply(story.teller.applied(control, body))
    return story.feeds()


def test_a_feed_goes_down_and_up_by_what_ticks_say(story: Story) -> None:
    silent, alive = (Control.TICK, tick(False)), (Control.TICK, tick(True))
    assert controls(story, (Control.TICK, tick(False, None)), (Control.TICK, tick(False, None))) == []
    assert controls(story, alive, alive) == ["up"]
    assert controls(story, silent, silent) == ["up", "down"]
    story.tell("aa")
    assert story.feeds() == ["up", "down"]
    assert controls(story, alive) == ["up", "down", "up"]


def test_a_feed_whose_packets_cannot_be_decoded_is_down_until_a_picture_comes(story: Story) -> None:
    start = {"source": "x", "scheme": "rtmp", "kind": "live"}
    alive = (Control.TICK, tick(True))
    assert controls(story, (Control.START, start), alive) == ["up"]
    for _ in range(22):  # eleven seconds of packets without a picture
        story.teller.media_us += STEP_US
        story.apply(replace(story.teller.applied(), decoded=0))
    dark = replace(story.teller.applied(*alive), decoded=0)
    story.apply(dark)
    assert story.feeds() == ["up", "down"]
    assert [said.code for said in story.said if isinstance(said, FeedEvent)] == [None, "decode_failed"]
    story.tell("a")
    assert controls(story, alive) == ["up", "down", "up"]


def test_no_record_at_all_is_unwatched_once_and_incidents_stay_open(story: Story) -> None:
    story.tell("M" * 10)
    story.take(story.aggregate.on_orphan())
    story.take(story.aggregate.on_orphan())
    assert story.feeds() == ["up", "unwatched"]
    assert story.aggregate.feed is Feed.UNWATCHED
    assert story.aggregate.open_incident == "i4000000"
    story.tell("M")
    assert story.feeds() == ["up", "unwatched", "up"]


def test_ticks_of_a_feed_that_is_alive_move_no_time(story: Story) -> None:
    # HLS delivers seconds at once: receipt goes on while the next pictures continue where the last ended
    story.tell("MMMMMMMM")
    before = story.aggregate.media_us
    story.teller.media_us += 10_000_000
    controls(story, (Control.TICK, tick(True)))
    assert story.aggregate.media_us == before


def test_a_control_record_that_cannot_be_read_is_counted(story: Story) -> None:
    story.tell("aa")
    story.apply(replace(story.teller.applied(Control.TICK), control_body=b"not json"))
    assert story.aggregate.ignored == 1


def test_what_was_missed_is_recorded_when_pictures_come_back(story: Story) -> None:
    story.tell("aaaa" + "-" * 20 + "Raaaa")
    gaps = [output for output in story.said if isinstance(output, DroppedRecord)]
    assert [
        (seconds(gap.dropped.first_us), seconds(gap.dropped.last_us), gap.dropped.reason) for gap in gaps
    ] == [(2.0, 12.5, "source_silent")]


# Sampling, evidence, clips


def test_sampling_follows_suspicion(story: Story) -> None:
    idle, burst = 2.0, 8.0
    story.tell("aaaa")
    assert story.aggregate.wanted_fps() == idle
    story.tell("MMMMMM")
    assert story.aggregate.wanted_fps() == burst
    story.tell("." * 6)
    assert story.aggregate.wanted_fps() == idle


def test_deterministic_sampling_is_fixed(tmp_path: Path) -> None:
    story = Story(tmp_path, Config(deterministic=True, verdict=Verdict(window_s=10.0))).tell("M" * 10)
    assert story.aggregate.wanted_fps() == 2.0


def test_pictures_of_suspicious_faces_are_on_disk_before_they_are_named(story: Story) -> None:
    story.tell("aaaa")
    assert not list(story.folder.glob("*/*"))
    story.tell("|MMMMMMMM")
    opened = story.incidents()[0]
    assert opened.crops
    face = FACES["M"][0]
    shown = png(overlay(face.crop, {"m": face.attention, "second": face.attention[::-1]}))
    for crop in opened.crops:
        assert story.store.path(crop.crop).read_bytes() == png(face.crop)
        assert story.store.path(crop.overlay).read_bytes() == shown
        assert {crop.crop, crop.overlay} <= story.aggregate.references()


def test_a_full_disk_costs_the_pictures_not_the_watching(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(data: bytes, suffix: str) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(story.store, "put", full)
    story.tell("M" * 10)
    assert story.told()[0][0] == "opened"
    assert story.incidents()[0].crops == ()
    assert story.aggregate.pictures_failed > 0


def test_the_clip_is_asked_for_where_its_chunks_lie(story: Story) -> None:
    story.tell("a" * 20 + "M" * 30)
    request = next(output for output in story.said if isinstance(output, ClipRequest))
    opened = story.incidents()[0]
    # asked for when five seconds have passed since the opening: the clip ends with what there is by then
    asked_us = opened.moment.media_us + 5_000_000
    assert opened.moment.media_us < request.peak_us < asked_us
    assert (request.first_us, request.last_us) == (opened.first_us - 5_000_000, asked_us)
    assert request.from_offset is not None
    # one record per half second, each a keyframe; offset 0 is shown at 0.5 s
    assert START_US + (request.from_offset + 1) * STEP_US == request.first_us
    assert START_US + request.to_offset * STEP_US >= request.last_us


# Order and restart


def test_what_was_applied_before_is_passed_over_and_counted(story: Story) -> None:
    story.tell("aaaa")
    frame, applied = list(Teller(media_us=START_US, offset=0).tell("M"))
    assert isinstance(frame, ScoredFrame)
    assert story.aggregate.on_frame(frame) == []
    assert story.aggregate.on_applied(applied) == []  # type: ignore[arg-type]
    assert story.aggregate.ignored == 2
    assert (story.aggregate.resume.last_pts, story.aggregate.applied) == (4, 3)
    assert story.aggregate.resume.last_sample_us == START_US + 4 * STEP_US


def test_an_older_attachment_is_passed_over(story: Story) -> None:
    story.tell("aaRaa")
    late = replace(story.teller, attachment=1, epoch=5, pts=90)
    for event in late.tell("M"):
        said = (
            story.aggregate.on_frame(event)
            if isinstance(event, ScoredFrame)
            else story.aggregate.on_applied(event)
        )
        assert said == []
    assert story.aggregate.resume.attachment == f"{2:016x}"
    assert story.aggregate.ignored == 2


def test_a_clock_that_steps_back_stops_nothing(story: Story) -> None:
    story.tell("aaaa")
    story.teller.media_us -= 60_000_000
    story.tell("aaaa")
    assert story.aggregate.media_us == START_US + 4 * STEP_US
    assert len([output for output in story.said if isinstance(output, ScoreRecord)]) == 8


def test_a_skipped_frame_is_dropped_with_its_reason_and_its_cut_still_ends_tracks(story: Story) -> None:
    story.tell("M" * 7)
    late = story.teller
    late.media_us, late.pts = late.media_us + STEP_US, late.pts + 1
    picture = FACES["M"][0].crop
    frame = SampledFrame(
        late.offset, late.meta(), late.pts, late.media_us, picture, picture, cut=True, release=lambda: None
    )
    said = story.aggregate.on_skipped(frame, Dropped(late.media_us, late.media_us, "STALE", 1))
    assert isinstance(said[0], DroppedRecord)
    assert story.aggregate.on_skipped(frame, Dropped(0, 0, "STALE", 1)) == []
    story.tell("MM")
    assert story.told() == []


def test_a_record_that_cannot_be_decoded_is_a_drop(story: Story) -> None:
    story.tell("aa")
    meta = replace(story.teller.meta(), pts=9, first_pts=2)
    failed = Failed(story.teller.offset, meta, 0, Code.DECODE_FAILED, "no frame in it")
    said = story.aggregate.on_failed(failed)
    assert isinstance(said[0], DroppedRecord)
    assert said[0].dropped.reason == "CORRUPT"
    assert (story.aggregate.applied, story.aggregate.decode_from) == (2, 3)
    assert story.aggregate.on_failed(failed) == []


def test_another_engine_begins_new_windows(story: Story) -> None:
    story.tell("aaaaaaaa")
    for event in story.teller.tell("a"):
        story.apply(replace(event, engine="openvino") if isinstance(event, ScoredFrame) else event)
    assert story.verdicts()[-1] == (4.5, "inconclusive", "SHORT_TRACK")


story_signs = st.text("MMMMMaa?b.2x-|ER$", max_size=70)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=story_signs, restarts=st.sets(st.integers(1, 140)))
def test_restarting_anywhere_changes_nothing(tmp_path: Path, drawn: str, restarts: set[int]) -> None:
    straight = Story(tmp_path).tell(drawn)
    broken = Story(tmp_path, restart=lambda index: index in restarts).tell(drawn)
    assert [compared(output) for output in broken.said] == [compared(output) for output in straight.said]
    assert broken.fps == straight.fps
    assert json.dumps(broken.aggregate.state()) == json.dumps(straight.aggregate.state())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=story_signs)
def test_whatever_happens_is_recorded_by_the_schemas(tmp_path: Path, drawn: str) -> None:
    story = Story(tmp_path).tell(drawn)
    publisher = Publisher(Config(), PROVENANCE, FakeClock(START_US))
    values = records(story.said, publisher)
    for value in values:
        SCORES.validate(value)
    ids: list[str] = []
    for event in story.incidents():
        told = publisher.event(event)
        ALERT.validate(told.structured())
        ids.append(told.attributes["id"])
    assert len(ids) == len(set(ids))
    assert sum(value["type"] == "frame" for value in values) == sum(sign in FACES for sign in drawn)
    found = cover("studio", values, START_US, story.teller.media_us + 1)
    assert found.watched_s + sum(found.unwatched_s.values()) == pytest.approx(found.total_s)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.text("aab?.|ERx-", max_size=120))
def test_without_a_good_manipulated_picture_there_is_no_incident(tmp_path: Path, drawn: str) -> None:
    assert Story(tmp_path).tell(drawn).told() == []


def test_the_state_of_another_version_is_refused_by_name(story: Story) -> None:
    with pytest.raises(UnmaskError, match="schema 9; this version of Unmask reads schema 1") as refused:
        story.fresh().restore(story.aggregate.state() | {"schema": 9})
    assert refused.value.code is Code.SCHEMA


def test_state_is_small_and_bounded(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.tell("2" * 100)
    early = len(json.dumps(story.aggregate.state()))
    story.tell("2" * 300)
    assert len(json.dumps(story.aggregate.state())) < 1.1 * early
    assert early < 100_000


def test_verdicts_are_recorded_at_least_every_ten_seconds(story: Story) -> None:
    story.tell("a" * 100)
    times = [seconds(output.media_us) for output in story.said if isinstance(output, VerdictRecord)]
    assert times == [0.5, 2.5, 12.5, 22.5, 32.5, 42.5]
    last = [output for output in story.said if isinstance(output, VerdictRecord)][-1]
    assert (last.sampled, last.dropped, last.tracks) == (20, 0, 1)


def compared(output: Output) -> Any:
    """What an output says; frames hold arrays, which have no plain equality."""
    if isinstance(output, ScoreRecord):
        return output.as_json()
    return output


def records(said: Sequence[Output], publisher: Publisher) -> list[dict[str, Any]]:
    """The values of the scores topic."""
    values = []
    for output in said:
        if isinstance(output, ScoreRecord | DroppedRecord | VerdictRecord):
            record = publisher.record(output)
            assert (record.topic, record.key) == ("unmask.scores", "studio")
            values.append(json.loads(record.value or b""))
    return values


def test_evidence_put_twice_by_a_replay_is_the_same(tmp_path: Path) -> None:
    first = Story(tmp_path).tell("M" * 10)
    files = sorted(tmp_path.glob("*/*"))
    second = Story(tmp_path).tell("M" * 10)
    assert sorted(tmp_path.glob("*/*")) == files
    assert isinstance(first.store, EvidenceStore)
    assert [event.crops for event in first.incidents()] == [event.crops for event in second.incidents()]
    assert all(isinstance(event, IncidentEvent) for event in first.incidents())


def test_an_incident_of_a_replay_that_broke_off_is_closed_when_the_next_begins(story: Story) -> None:
    story.aggregate.stream = "studio~replay"
    story.tell("M" * 10 + "Raaaa")
    assert [event.kind.value for event in story.incidents()] == ["opened", "closed"]
