"""What people decide, as it is written and read."""

import json
from pathlib import Path

import pytest

from stream.clock import FakeClock
from stream.config import Config
from stream.decisions import (
    Choice,
    Decision,
    Mute,
    Said,
    Sample,
    Subject,
    check_reason,
    drawn,
    mutes,
    read,
    record_of,
    write,
)
from stream.errors import UnmaskError
from stream.records import OutRecord, Record
from stream.sqlite_log import SqliteLog
from stream.topics import topic_specs
from stream.web.precision import missed, precision, wilson

DECISION = Decision(
    "studio",
    Subject.INCIDENT,
    "i1",
    Choice.CONFIRMED,
    "seen",
    "ada",
    5,
    1.0,
    "high",
    2.5,
    {"m": 1.0},
    {"m": "1"},
)
MUTE = Mute("studio", 10, 20, "rehearsal", "ada", 10)
SAMPLE = Sample("studio", "ab", "0" * 16, 0, 3, 7, 8, 0.005, b"\xff\xd8", -2.0, {"m": -2.0}, {"m": "1"}, "c")


def stored(out: OutRecord) -> Record:
    return Record(out.topic, 0, 0, out.key, out.value, out.headers, out.timestamp_us)


@pytest.mark.parametrize("said", [DECISION, MUTE, SAMPLE])
def test_what_is_written_is_read(said: Said) -> None:
    assert read(stored(record_of(Config(), said))) == said


@pytest.mark.parametrize("said", [DECISION, MUTE, SAMPLE])
def test_fields_of_later_versions_are_passed_over(said: Said) -> None:
    record = record_of(Config(), said)
    value = json.dumps({**json.loads(record.value or b""), "new": 1}).encode()
    assert read(Record(record.topic, 0, 0, record.key, value, {}, 0)) == said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stream", "Not Right"),
        ("stream", "other"),
        ("choice", "perhaps"),
        ("probability", 0),
        ("probability", 1.5),
        ("logits", {"m": "high"}),
        ("reason", 3),
        ("time_us", "now"),
        ("type", "unknown"),
        ("type", None),
    ],
)
def test_what_is_not_right_is_not_read(name: str, value: object) -> None:
    record = record_of(Config(), DECISION)
    broken = json.dumps({**json.loads(record.value or b""), name: value}).encode()
    assert read(Record(record.topic, 0, 0, record.key, broken, {}, 0)) is None


def test_the_newest_mute_of_a_feed_holds(tmp_path: Path) -> None:
    config = Config()
    log = SqliteLog(tmp_path, config.log, FakeClock())
    log.create_topics(topic_specs(config))
    write(config, log, MUTE, DECISION, Mute("studio", 10, 15, "ended", "bob", 15))
    assert mutes(config, log)["studio"].author == "bob"
    assert mutes(config, log)["studio"].holds(14)
    assert not mutes(config, log)["studio"].holds(15)
    log.close()


def test_a_reason_is_one_line_of_bounded_length() -> None:
    assert check_reason(" a\n b ") == "a b"
    assert len(check_reason("x" * 5000)) == 500
    with pytest.raises(UnmaskError, match="reason is empty"):
        check_reason(" \n")


def test_faces_are_drawn_at_the_rate_and_by_everybody_alike() -> None:
    names = [drawn("studio", f"{number:016x}", 0, 0, 0.05) for number in range(20_000)]
    count = sum(name is not None for name in names)
    assert 850 < count < 1150  # five standard deviations about 1000
    assert names == [drawn("studio", f"{number:016x}", 0, 0, 0.05) for number in range(20_000)]
    assert drawn("studio", "0", 0, 0, 0.0) is None
    assert drawn("studio", "0", 0, 0, 1.0) is not None


def decided(subject: Subject, choice: Choice, probability: float = 1.0, **logits: float) -> Decision:
    return Decision("studio", subject, "x", choice, "", "ada", 1, probability, logits=logits)


def test_precision_is_per_feed_and_per_network_that_spoke() -> None:
    told = precision(
        [
            decided(Subject.INCIDENT, Choice.CONFIRMED, a=1.0, b=-1.0),
            decided(Subject.INCIDENT, Choice.DISMISSED, a=1.0, b=1.0),
            decided(Subject.INCIDENT, Choice.INCONCLUSIVE, a=1.0),
            decided(Subject.SAMPLE, Choice.CONFIRMED, a=1.0),
        ]
    )
    assert (told["all"]["precision"], told["all"]["inconclusive"]) == (0.5, 1)
    assert (told["models"]["a"]["precision"], told["models"]["b"]["precision"]) == (0.5, 0.0)
    assert told["feeds"]["studio"]["interval"] == [0.0945, 0.9055]


def test_decisions_of_the_sample_weigh_as_the_inverse_of_their_probability() -> None:
    told = missed(
        [
            decided(Subject.SAMPLE, Choice.CONFIRMED, 0.01),
            decided(Subject.SAMPLE, Choice.DISMISSED, 0.001),
            decided(Subject.SAMPLE, Choice.INCONCLUSIVE, 0.0001),
            decided(Subject.INCIDENT, Choice.CONFIRMED),
        ]
    )
    assert told == {"reviewed": 2, "found": 1, "faces": 1100, "share": pytest.approx(100 / 1100, abs=1e-6)}
    assert missed([])["share"] is None


def test_wilson_s_interval() -> None:
    assert wilson(0, 0) is None
    assert wilson(0, 10) == [0.0, 0.2775]  # as Wilson's formula gives by hand
    assert wilson(10, 10) == [0.7225, 1.0]
