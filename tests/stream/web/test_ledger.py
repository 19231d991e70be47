"""Coverage added up slice by slice is what `stream.coverage` says of the whole."""

import random
from typing import Any

import pytest

from stream.coverage import cover
from stream.web import ledger as ledger_module
from stream.web.ledger import DAY_US, Ledger
from stream.windows import MICRO

START = 1_700_000_000_000_000 // DAY_US * DAY_US + 3600 * MICRO


def frame(at_s: float) -> dict[str, Any]:
    return {"type": "frame", "stream": "a", "media_us": START + round(at_s * MICRO), "faces": [{}]}


def verdict(at_s: float, word: str, *reasons: str) -> dict[str, Any]:
    at_us = START + round(at_s * MICRO)
    return {
        "type": "verdict",
        "stream": "a",
        "media_us": at_us,
        "verdict": word,
        "reasons": reasons,
        "incident": None,
    }


def dropped(first_s: float, last_s: float, reason: str) -> dict[str, Any]:
    first, last = (START + round(at * MICRO) for at in (first_s, last_s))
    return {
        "type": "dropped",
        "stream": "a",
        "first_us": first,
        "last_us": last,
        "reason": reason,
        "frames": 3,
    }


def story(seed: int, seconds: int) -> list[dict[str, Any]]:
    """Pictures twice a second with holes of every length, some of them explained, and verdicts between."""
    rng, at, found = random.Random(seed), 0.0, [frame(0.0), verdict(0.0, "authentic")]
    while at < seconds:
        step = rng.choice([0.5] * 30 + [3.0, 9.0, 40.0])
        if step > 2 and rng.random() < 0.5:
            found.append(dropped(at + 0.1, at + step - 0.1, rng.choice(["CORRUPT", "STALE"])))
        at += step
        found.append(frame(at))
        if rng.random() < 0.1:
            word = rng.choice(["authentic", "manipulated", "inconclusive"])
            found.append(verdict(at, word, *(["BLUR"] if word == "inconclusive" else [])))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_slices_add_up_to_the_whole(seed: int) -> None:
    records = story(seed, 900)
    ledger = Ledger()
    for record in records:
        ledger.add(record)
    end = max(record.get("media_us", record.get("last_us", 0)) for record in records)
    (row,) = ledger.rows(end, frozenset(), START - DAY_US, START + DAY_US)
    whole = cover("a", records, START, end).as_json()
    for part in ("decided_s", "inconclusive_s", "unwatched_s"):
        assert row[part] == pytest.approx(whole[part], abs=0.2)
    assert (row["frames"], row["faces"]) == (whole["frames"], whole["faces"])
    assert row["total_s"] == pytest.approx((end - START) / MICRO, abs=0.2)


def test_days_end_at_midnight() -> None:
    ledger = Ledger()
    for at in range(0, 24 * 3600, 600):
        ledger.add(frame(at))
    rows = ledger.rows(0, frozenset(), START - DAY_US, START + 2 * DAY_US)
    assert [row["total_s"] for row in rows] == [
        pytest.approx(3600 - 600, abs=1),
        pytest.approx(23 * 3600, abs=1),
    ]
    assert [row["day"] for row in rows] == ["2023-11-15", "2023-11-14"]


def test_a_live_feed_of_which_nothing_is_told_any_more_is_not_watched_up_to_now() -> None:
    ledger = Ledger()
    ledger.add(frame(0))
    ledger.add(verdict(0, "authentic"))
    now = START + 100 * MICRO
    (row,) = ledger.rows(now, frozenset({"a"}), START - DAY_US, START + DAY_US)
    assert row["unwatched_s"] == {"no_record": 98.0}
    assert ledger.rows(now, frozenset(), START - DAY_US, START + DAY_US) == []


def test_an_outage_that_is_explained_when_it_is_over_is_explained() -> None:
    ledger = Ledger()
    for at in range(100):
        ledger.add(frame(at))
    for at in range(100, 400, 10):
        ledger.add(verdict(at, "inconclusive", "NO_FACE"))
    ledger.add(dropped(101, 400, "source_silent"))
    ledger.add(frame(400))
    (row,) = ledger.rows(0, frozenset(), START - DAY_US, START + DAY_US)
    assert row["unwatched_s"] == {"source_silent": pytest.approx(299, abs=0.5)}


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_FEEDS", 2)
    monkeypatch.setattr(ledger_module, "MAX_SLICE", 4)
    monkeypatch.setattr(ledger_module, "MAX_SUMS", 3)
    ledger = Ledger()
    for number in range(6):
        for at in range(8):
            ledger.add({**frame(at / 10), "stream": f"feed-{number}"})
    assert len(ledger._open) == 2
    assert max(len(held.records) for held in ledger._open.values()) <= 5 * 4
    assert len(ledger._sums) <= 3


@pytest.mark.parametrize("record", [{}, {"type": "other", "stream": "a"}, {"type": "frame", "stream": "a"}])
def test_what_is_no_record_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises((KeyError, ValueError, TypeError)):
        Ledger().add(record)
