"""A stream's records, made by hand, add up to a summary and a picture."""

import struct
from pathlib import Path
from typing import Any

import pytest

from stream import config, timeline
from stream.timeline import Summary, Timeline, report

START = 1_700_000_000_000_000


def at(seconds: float) -> int:
    return START + round(seconds * 1e6)


def frame(seconds: float, *fused: float) -> dict[str, Any]:
    faces = [{"fused": value, "logits": {"m": value}} for value in fused]
    return {"type": "frame", "stream": "clip", "media_us": at(seconds), "faces": faces}


def verdict(seconds: float, said: str, *reasons: str, probability: float | None = None) -> dict[str, Any]:
    interval = None if probability is None else [max(0.0, probability - 0.1), min(1.0, probability + 0.1)]
    return {
        "type": "verdict",
        "stream": "clip",
        "media_us": at(seconds),
        "verdict": said,
        "reasons": list(reasons),
        "probability": probability,
        "interval": interval,
        "incident": None,
    }


def dropped(first: float, last: float, reason: str, frames: int | None) -> dict[str, Any]:
    times = {"first_us": at(first), "last_us": at(last)}
    return {"type": "dropped", "stream": "clip", "reason": reason, "frames": frames, **times}


def incident(event: str, last: float, stream: str = "clip", name: str = "0007") -> dict[str, Any]:
    return {
        "type": f"unmask.incident.{event}.v1",
        "subject": stream,
        "data": {
            "incident": name,
            "event": event,
            "first_media_us": at(4),
            "last_media_us": at(last),
            "severity": "medium",
            "probability": 0.95,
            "interval": [0.9, 0.98],
            "suggested_action": "review",
        },
    }


RECORDS = [
    *(frame(index / 2, -2.0) for index in range(8)),
    verdict(0, "inconclusive", "NO_FACE"),
    verdict(1, "authentic", probability=0.1),
    *(frame(4 + index / 2, 3.0, -1.0) for index in range(4)),
    verdict(4, "manipulated", probability=0.95),
    dropped(8, 12, "CORRUPT", 40),
    frame(12),
]


def summary(records: list[dict[str, Any]], *events: dict[str, Any], picture: Path | None = None) -> Summary:
    return report("clip", lambda: records, events, config.Verdict(), picture)


def test_seconds_add_up_to_the_length_of_the_stream() -> None:
    covered = summary(RECORDS).coverage
    assert (covered.from_us, covered.to_us) == (at(0), at(12))
    assert covered.inconclusive_s == {"NO_FACE": pytest.approx(1.0)}
    assert covered.decided_s["authentic"] == pytest.approx(3.0)
    assert covered.watched_s + sum(covered.unwatched_s.values()) == pytest.approx(12.0)
    assert covered.unwatched_s["CORRUPT"] == pytest.approx(4.0)


def test_what_was_dropped_is_counted_by_reason() -> None:
    records = [*RECORDS, dropped(12, 13, "CORRUPT", 2), dropped(13, 14, "STALE", None)]
    assert summary(records).dropped == {"CORRUPT": 42, "STALE": 1}


def test_an_incident_is_told_as_last_heard_of() -> None:
    found = summary(
        RECORDS,
        incident("opened", 5),
        incident("closed", 8),
        incident("opened", 6, stream="other", name="0008"),
        {"type": "unmask.feed.up.v1", "subject": "clip", "data": {}},
    )
    assert [(span.id, span.first_us, span.last_us) for span in found.incidents] == [("0007", at(4), at(8))]
    line = next(line for line in found.lines() if "incident" in line)
    assert line == (
        "  incident 0007: 4.0 s to 8.0 s, severity medium, probability 0.95 (0.90 to 0.98), suggested: review"
    )


def test_a_withdrawn_incident_says_so() -> None:
    lines = summary(RECORDS, incident("opened", 5), incident("retracted", 5)).lines()
    assert any(line.endswith("retracted") for line in lines)


def test_no_incident_is_said_too() -> None:
    assert "  no incident" in summary(RECORDS).lines()


def test_nothing_watched_at_all() -> None:
    assert summary([]).lines()[0] == "clip: 0.0 of 0.0 s watched in 0 pictures"


@pytest.mark.parametrize("records", [RECORDS, [], [frame(1)], [dropped(0, 3, "STALE", None)]])
def test_the_picture_is_drawn_whatever_there_is(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    path = tmp_path / "below" / "clip.png"
    found = summary(records, incident("opened", 5), picture=path)
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert (width, height) == (1200, 480)
    assert found.lines()[-1] == f"  timeline: {path}"


def test_several_members_are_drawn_below_and_shadows_named_so(tmp_path: Path) -> None:
    two = frame(5, 2.0, -1.0)
    two["faces"][0]["logits"] = {"a": 1.5, "b": None}
    two["faces"][0]["shadow"] = {"s": -3.0}
    line = Timeline("clip")
    for record in [*RECORDS, two]:
        line.add_score(record)
    assert list(line._members) == ["m", "a", "s (shadow)"]
    assert line._members["s (shadow)"] == [(at(5), -3.0)]
    assert line._members["m"][-1] == (at(5.5), 3.0)  # of the face that scored highest
    line.draw(tmp_path / "clip.png", config.Verdict())
    width, height = struct.unpack(">II", (tmp_path / "clip.png").read_bytes()[16:24])
    assert (width, height) == (1200, 720)


def test_curves_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_POINTS", 100)
    line = Timeline("clip")
    for index in range(1000):
        line.add_score(frame(index, 1.0))
        line.add_score(verdict(index, "authentic", probability=0.1))
        line.add_score(dropped(index, index + 1, "STALE", 1))
    assert max(len(line._looks), len(line._said), len(line._gaps), len(line._members["m"])) <= 100
    assert line._looks[0][0] == at(0)
    assert line._looks[-1][0] == at(999)
    assert line.dropped["STALE"] == 1000
