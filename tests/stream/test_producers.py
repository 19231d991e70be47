"""Detect on what other producers write: the whole way from segments to incidents, whoever takes over when."""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stream import decoder_child
from stream.config import Freshness, Incidents, LogSettings
from stream.evidence import EvidenceStore
from stream.marker import write_clip
from stream.records import OutRecord, Record, Topic
from stream.topics import media_partition
from tests.stream import poison
from tests.stream.detecting import Detect, kinds
from tests.stream.segments import START_US, Sent, as_records, ended, headers, segments
from tests.stream.test_worker import told

TS, FMP4 = "video/mp2t", "video/mp4"
SECOND = 1_000_000
SCORE = Freshness(on_late="score")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 s in groups of 2 s: manipulated from 4 to 12 s."""
    return write_clip(tmp_path_factory.mktemp("clips") / "planted.mp4", 18, [(4, 12)])


def detect(folder: Path, commit_ms: int = 500, **settings: Any) -> Detect:
    made = Detect(folder, log=LogSettings(commit_ms=commit_ms), freshness=SCORE, **settings)
    made.list_source("cam")
    return made


def publish(made: Detect, records: Sequence[Record], partition: int | None = None) -> None:
    """Write records into `media` as their producer would."""
    topic, partitions = made.topic(Topic.MEDIA), made.config.media.partitions
    with made.log.producer("another") as producer:
        for record in records:
            place = media_partition(record.key, partitions) if partition is None else partition
            producer.send(OutRecord(topic, record.key, record.value, record.headers, 0, place))
        producer.flush(10)


def sent_as(sent: Sequence[Sent], content_type: str = TS) -> list[Record]:
    records = as_records(sent, content_type)
    return [*records, ended(records)]


@pytest.mark.parametrize("content_type", [TS, FMP4])
def test_a_pushed_stream_gets_incidents_evidence_and_an_end(
    tmp_path: Path, planted: Path, content_type: str
) -> None:
    made = detect(tmp_path)
    publish(made, sent_as(segments(planted, content_type, shift_s=100), content_type))
    made.run()
    alerts = made.alerts()
    assert kinds(alerts)[:2] == ["feed.up", "incident.opened"]
    assert kinds(alerts).count("incident.opened") == kinds(alerts).count("incident.closed") == 1
    assert kinds(alerts)[-1] == "feed.unwatched"  # its producer said that it is over
    opened = next(alert["data"] for alert in alerts if alert["type"].endswith("opened.v1"))
    assert START_US + 4 * SECOND <= opened["first_media_us"] <= START_US + 7 * SECOND
    clips = [e for a in alerts for e in a["data"].get("evidence", ()) if e["kind"] == "clip"]
    assert clips
    assert pictures(made.evidence, clips[0]["ref"]) >= 25 * 10
    times = [frame["media_us"] - START_US for frame in made.frames("cam")]
    assert times == [40_000 * -(-n * 25 // 2) for n in range(36)]
    assert made.dead() == []


def pictures(evidence: EvidenceStore, ref: str) -> int:
    import av

    with av.open(str(evidence.path(ref))) as container:
        return sum(1 for _ in container.decode(video=0))


def test_whoever_takes_over_goes_on_exactly_where_the_one_before_stopped(
    tmp_path: Path, planted: Path
) -> None:
    """Killed at random commits, over a wrap, a lost segment and a jump."""
    first = segments(planted, TS, shift_s=(1 << 33) / 90_000 - 7)
    again = segments(planted, TS, START_US + 20 * SECOND, shift_s=3)
    records = sent_as([*first[:5], *first[6:], *again])
    whole = detect(tmp_path / "whole")
    publish(whole, records)
    whole.run()
    broken = detect(tmp_path / "broken", commit_ms=20)
    publish(broken, records)
    rng = random.Random(7)
    killed = sum(broken.run_killed(after_commits=rng.randrange(0, 4)) for _ in range(8))
    broken.run()
    assert killed >= 4
    assert len(whole.frames("cam")) > 60
    assert {frame["epoch"] for frame in whole.frames("cam")} == {0, 1}
    assert broken.frames("cam") == whole.frames("cam")
    assert [told(alert) for alert in broken.alerts()] == [told(alert) for alert in whole.alerts()]


def test_a_segment_that_kills_its_reader_costs_itself_only(
    tmp_path: Path, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_child, "main", poison.main)
    sent = segments(planted, TS)
    lacking = detect(tmp_path / "lacking")
    publish(lacking, sent_as([*sent[:3], *sent[4:]]))
    lacking.run()
    made = detect(tmp_path / "poisoned")
    publish(made, sent_as([*sent[:3], Sent(sent[3].value + poison.KILL, sent[3].capture_us), *sent[4:]]))
    made.run()
    assert [letter.headers["dead_code"] for letter in made.dead()][-1] == b"decoder_died"
    assert made.dead()[-1].value == sent[3].value + poison.KILL
    # What the dead child still held back for reordering went with it.
    times = {frame["media_us"] for frame in lacking.frames("cam")}
    assert len(times - {frame["media_us"] for frame in made.frames("cam")}) <= 1
    assert {frame["media_us"] for frame in made.frames("cam")} <= times
    assert {frame["epoch"] for frame in made.frames("cam")} == {0}


def test_a_stop_in_order_is_no_break_either(tmp_path: Path, planted: Path) -> None:
    sent = segments(planted, TS)
    whole = detect(tmp_path / "whole")
    publish(whole, sent_as(sent))
    whole.run()
    made = detect(tmp_path / "stopped")
    records = sent_as(sent)
    for first, last in ((0, 2), (2, 5), (5, len(records))):
        publish(made, records[first:last])
        made.run()
    assert made.frames("cam") == whole.frames("cam")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"capture_time": None}, "header capture_time is missing; it must be microseconds since 1970"),
        ({"content-type": None}, "header content-type is missing; it must be one of"),
        ({"content-type": b"image/png"}, "header content-type is 'image/png'; it must be one of"),
    ],
)
def test_a_record_that_lacks_what_it_takes_is_dead_lettered_by_name(
    tmp_path: Path, planted: Path, change: dict[str, bytes | None], said: str
) -> None:
    made = detect(tmp_path)
    sent = segments(planted, TS)[:3]
    wrong = {k: v for k, v in {**headers(sent[1], TS), **change}.items() if v is not None}
    records = sent_as(sent)
    records[1] = Record("media", 0, 1, "cam", sent[1].value, wrong, 0)
    publish(made, records)
    made.run()
    assert [said in letter.headers["dead_reason"].decode() for letter in made.dead()] == [True]
    assert made.dead()[0].value == sent[1].value
    assert {frame["media_us"] for frame in made.frames("cam")} >= {START_US, START_US + 4 * SECOND}


def test_a_stream_has_one_partition_and_needs_to_be_listed(tmp_path: Path, planted: Path) -> None:
    made = detect(tmp_path)
    sent = segments(planted, TS)[:1]
    wrong = (media_partition("cam", made.config.media.partitions) + 1) % made.config.media.partitions
    publish(made, as_records(sent, TS), wrong)
    publish(made, as_records(sent, TS, "stranger"))
    publish(made, as_records(sent, TS, "Not An Id"))
    made.run()
    reasons = {letter.key: letter.headers["dead_reason"].decode() for letter in made.dead()}
    assert "the CRC-32 of the key modulo 8" in reasons["cam"]
    assert "not in sources" in reasons["stranger"]
    assert "stream id 'Not An Id' is not allowed" in reasons["Not An Id"]
    assert made.values(Topic.SCORES) == []


def test_a_producer_that_falls_silent_is_noticed_and_welcome_back(tmp_path: Path, planted: Path) -> None:
    made = detect(tmp_path, incidents=Incidents(orphan_s=0.5))
    now_us = time.time_ns() // 1000
    first, second, *_ = segments(planted, TS, now_us)
    publish(made, as_records([first], TS))
    made.run(until=lambda d: len(d.alerts()) == 2)
    publish(made, as_records([second], TS))
    made.run(until=lambda d: len(d.alerts()) >= 3)
    assert kinds(made.alerts())[:3] == ["feed.up", "feed.unwatched", "feed.up"]
    assert made.alerts()[1]["data"]["code"] == "orphan"
