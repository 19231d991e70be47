"""`unmask coverage` reads the records of a data folder and adds them up."""

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from stream.assemble import open_log
from stream.clock import FakeClock
from stream.config import Config
from stream.errors import UnmaskError
from stream.log import TopicSpec
from stream.records import OutRecord
from stream.watched import run

START = 1_700_000_000_000_000


def frame(seconds: float, stream: str = "clip") -> dict[str, Any]:
    return {"type": "frame", "stream": stream, "media_us": START + round(seconds * 1e6), "faces": [{}]}


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    """A data folder in which the streams `clip` (ten seconds) and `other` were watched."""
    config = Config(data_dir=str(tmp_path / "data"))
    log = open_log(config, FakeClock())
    log.create_topics([TopicSpec("unmask.scores", 4)])
    verdict = {"type": "verdict", "stream": "clip", "media_us": START, "verdict": "authentic", "reasons": []}
    records = [
        verdict | {"incident": None},
        *(frame(index / 2) for index in range(12)),
        {
            "type": "dropped",
            "stream": "clip",
            "first_us": START + 7_500_000,
            "last_us": START + 10_000_000,
            "reason": "CORRUPT",
            "frames": 60,
        },
        frame(500, "other"),
    ]
    with log.producer("test") as producer:
        for record in records:
            value = json.dumps(record).encode()
            producer.send(OutRecord("unmask.scores", str(record["stream"]), value, {}, START))
        producer.flush(10)
    log.close()
    return config


def at(seconds: int) -> datetime:
    return datetime.fromtimestamp(START / 1e6 + seconds, UTC).replace(tzinfo=None)


def test_the_whole_of_a_stream(settings: Config) -> None:
    out = io.StringIO()
    assert run(settings, "clip", None, None, False, out) == 0
    assert out.getvalue().splitlines() == [
        "clip, 2023-11-14T22:13:20Z to 2023-11-14T22:13:30Z, 10.0 s",
        "  watched 7.5 s in 12 pictures with 12 faces",
        "  said: authentic 7.5 s",
        "  not watched: CORRUPT 2.5 s",
        "  incidents: none",
    ]


def test_a_period_is_in_utc(settings: Config) -> None:
    out = io.StringIO()
    assert run(settings, "clip", at(1), at(3), True, out) == 0
    told = json.loads(out.getvalue())
    assert (told["total_s"], told["watched_s"], told["frames"]) == (2.0, 2.0, 4)


def test_a_period_must_not_be_empty(settings: Config) -> None:
    with pytest.raises(UnmaskError, match=r"--to is 2023-11-14T22:13:21Z; it must be later than --from"):
        run(settings, "clip", at(3), at(1), False, io.StringIO())


def test_a_stream_that_nobody_watched(settings: Config) -> None:
    with pytest.raises(UnmaskError, match="nothing is recorded of stream 'nobody'"):
        run(settings, "nobody", None, None, False, io.StringIO())


def test_looking_makes_no_data_folder(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="nothing is recorded"):
        run(Config(data_dir=str(tmp_path / "none")), "clip", None, None, False, io.StringIO())
    assert not (tmp_path / "none").exists()
