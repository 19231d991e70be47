"""The judge itself: a sound run passes, and each kind of wrong is found."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from stream.clock import FakeClock
from stream.records import Control, Kind, encode_headers
from tests.chaos.checker import Report, Rules, check
from tests.chaos.feeds import write_clip
from tests.chaos.pictures import FPS, PLAN, Face
from tests.chaos.topics import Row, Topics
from tests.stream.media import chunk_file

STREAM = "s"
STEP_US = 1_000_000 // FPS
DUE = FPS // 2
"""Pictures of an interval of the sampling grid."""
RULES = Rules()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Topics:
    """One feed, two rounds of the plan: all scored, two incidents told."""
    clip = write_clip(tmp_path_factory.mktemp("clip") / "clip.ts", feed=5, rounds=2)
    chunks = chunk_file(clip, kind=Kind.LIVE, clock=FakeClock(start_us=1_700_000_000_000_000))
    media = [
        Row(1, offset, STREAM, value, {k: v.decode() for k, v in encode_headers(meta).items()})
        for offset, (meta, value) in enumerate(chunks)
    ]
    first = chunks[0][0]
    scores, alerts = [], []
    last_tick = -1
    for number in range(2 * PLAN.loop):
        pts = first.first_pts + round(number / FPS / first.time_base)
        tick = first.media_us(pts) * RULES.idle_fps // 1_000_000
        if tick != last_tick:
            last_tick = tick
            sequence = next(
                meta.sequence for meta, _ in reversed(chunks) if meta.pts is not None and meta.pts <= pts
            )
            scores.append(_score(first.media_us(pts), pts, first.attachment, sequence, PLAN.face(number)))
    red = [number for number in range(2 * PLAN.loop) if PLAN.face(number) is Face.RED]
    half = len(red) // 2
    for incident, numbers in (("one", red[:half]), ("two", red[half:])):
        begin, end = (
            first.media_us(first.first_pts + round(n / FPS / first.time_base))
            for n in (numbers[0], numbers[-1])
        )
        alerts += _story(incident, begin, end, ["opened", "updated", "closed"])
    return Topics(media, _rows(scores), _rows(alerts), [])


def _score(media_us: int, pts: int, attachment: str, sequence: int, face: Face) -> dict[str, Any]:
    faces = [] if face is Face.NONE else [{"fused": 6.0 if face is Face.RED else -6.0}]
    return {
        "type": "frame",
        "attachment": attachment,
        "epoch": 0,
        "sequence": sequence,
        "pts": pts,
        "media_us": media_us,
        "faces": faces,
    }


def _story(incident: str, begin: int, end: int, kinds: list[str]) -> list[dict[str, Any]]:
    return [
        {"incident": incident, "number": number, "event": kind, "first_media_us": begin, "last_media_us": end}
        for number, kind in enumerate(kinds, 1)
    ]


def _rows(bodies: list[dict[str, Any]]) -> list[Row]:
    return [_row(offset, body) for offset, body in enumerate(bodies)]


def _row(offset: int, body: dict[str, Any]) -> Row:
    headers = {}
    if "incident" in body:
        headers = {
            "ce_id": f"{body['incident']}.{body['number']}",
            "ce_type": f"unmask.incident.{body['event']}.v1",
        }
    return Row(1, offset, STREAM, json.dumps(body).encode(), headers)


def _copy(topics: Topics) -> Topics:
    return Topics(list(topics.media), list(topics.scores), list(topics.alerts), [])


def _changed(row: Row, **fields: Any) -> Row:
    return _row(row.offset, json.loads(row.value) | fields)


def test_a_sound_run_passes(sound: Topics) -> None:
    report = check(sound, RULES)
    assert report.problems() == {}
    assert (report.planted, report.incidents, report.frames) == (2, 2, 2 * PLAN.loop)
    assert report.scored == len(sound.scores)
    assert report.excused == {}


def lost_incident(topics: Topics) -> None:
    topics.alerts = topics.alerts[3:]


def doubled_incident(topics: Topics) -> None:
    twin = [_changed(row, incident="three") for row in topics.alerts[:3]]
    topics.alerts = topics.alerts[:3] + twin + topics.alerts[3:]


def incident_within_another(topics: Topics) -> None:
    first, second = topics.alerts[:3], topics.alerts[3:]
    topics.alerts = [first[0], second[0], *first[1:], *second[1:]]


def incident_of_nothing(topics: Topics) -> None:
    body = json.loads(topics.alerts[-1].value)
    begin = body["last_media_us"] + 5_000_000
    topics.alerts += _rows(_story("three", begin, begin + 1_000_000, ["opened", "closed"]))


def incident_without_end(topics: Topics) -> None:
    del topics.alerts[-1]


def event_twice(topics: Topics) -> None:
    topics.alerts.insert(2, topics.alerts[1])


def event_missing(topics: Topics) -> None:
    del topics.alerts[1]


def events_swapped(topics: Topics) -> None:
    topics.alerts[0], topics.alerts[1] = topics.alerts[1], topics.alerts[0]


def event_after_the_end(topics: Topics) -> None:
    topics.alerts.insert(3, _changed(topics.alerts[1], number=4))


def score_missing(topics: Topics) -> None:
    del topics.scores[20]


def score_twice(topics: Topics) -> None:
    topics.scores.append(topics.scores[20])


def score_of_no_picture(topics: Topics) -> None:
    topics.scores.append(_changed(topics.scores[20], pts=7))


def score_of_another_face(topics: Topics) -> None:
    topics.scores[0] = _changed(topics.scores[0], faces=[{"fused": 6.0}])


def score_at_another_time(topics: Topics) -> None:
    body = json.loads(topics.scores[0].value)
    topics.scores[0] = _changed(topics.scores[0], media_us=body["media_us"] + STEP_US)


def chunk_missing(topics: Topics) -> None:
    gone = json.loads(topics.scores[20].value)["sequence"]
    topics.media = [row for row in topics.media if row.headers["sequence"] != str(gone)]


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (lost_incident, {"incidents_lost"}),
        (doubled_incident, {"incidents_doubled"}),
        (incident_within_another, {"incidents_doubled"}),
        (incident_of_nothing, {"incidents_false"}),
        (incident_without_end, {"incidents_unclosed"}),
        (event_twice, {"events_doubled"}),
        (event_missing, {"events_out_of_order"}),
        (events_swapped, {"events_out_of_order"}),
        (event_after_the_end, {"events_out_of_order"}),
        (score_missing, {"frames_unaccounted"}),
        (score_twice, {"scores_doubled"}),
        (score_of_no_picture, {"scores_phantom"}),
        (score_of_another_face, {"scores_contradicted"}),
        (score_at_another_time, {"scores_contradicted"}),
        # The pictures after it, up to a keyframe, can no more be decoded; that one was scored is no wonder.
        (chunk_missing, {"media_untold", "scores_phantom"}),
    ],
)
def test_each_wrong_is_found(sound: Topics, harm: Callable[[Topics], None], found: set[str]) -> None:
    topics = _copy(sound)
    harm(topics)
    assert found <= set(check(topics, RULES).problems()), check(topics, RULES).problems()


def test_media_of_another_place_is_found(sound: Topics) -> None:
    topics = _copy(sound)
    # A chunk holds what another chunk of the feed holds.
    topics.media[3] = replace(topics.media[3], value=topics.media[40].value)
    assert {"media_crossed", "scores_phantom"} <= set(check(topics, RULES).problems())


def test_what_is_told_as_dropped_is_excused_and_counted(sound: Topics) -> None:
    topics = _copy(sound)
    gone = topics.scores.pop(20)
    media_us = json.loads(gone.value)["media_us"]
    dropped = {"type": "dropped", "first_us": media_us, "last_us": media_us, "reason": "STALE", "frames": 1}
    topics.scores.append(_row(99, dropped))
    report = check(topics, RULES)
    assert report.problems() == {}
    assert report.excused == {"STALE": 1}


def test_a_stretch_that_was_dropped_need_not_be_told(sound: Topics) -> None:
    topics = _copy(sound)
    lost_incident(topics)
    begin = json.loads(sound.alerts[0].value)["first_media_us"] + 4_000_000
    dropped = {
        "type": "dropped",
        "first_us": begin,
        "last_us": begin + 900_000,
        "reason": "STALE",
        "frames": 2,
    }
    topics.scores.append(_row(99, dropped))
    assert "incidents_lost" not in check(topics, RULES).problems()


def test_a_record_sent_again_is_counted_and_no_more(sound: Topics) -> None:
    topics = _copy(sound)
    topics.media.insert(11, topics.media[10])
    report = check(topics, RULES)
    assert report.problems() == {}
    assert report.stale_records == 1


def test_a_hole_that_a_gap_tells_is_no_wrong(sound: Topics) -> None:
    topics = _copy(sound)
    gap = topics.media[30]
    topics.media[30] = replace(gap, value=b"{}", headers=gap.headers | {"control": Control.GAP.value})
    del topics.media[29]
    report = check(topics, RULES)
    assert report.holes_told == 1
    assert report.media_untold == 0


def test_reserved_streams_are_not_judged(sound: Topics) -> None:
    topics = _copy(sound)
    topics.scores.append(replace(topics.scores[3], key="canary~1"))
    assert check(topics, RULES).problems() == {}


def test_report_counts_every_stream(sound: Topics) -> None:
    def other(rows: list[Row]) -> list[Row]:
        return [*rows, *(replace(row, key="t", partition=2) for row in rows)]

    topics = Topics(other(sound.media), other(sound.scores), other(sound.alerts), [])
    report: Report = check(topics, RULES)
    assert report.problems() == {}
    assert (report.streams, report.incidents) == (2, 4)
