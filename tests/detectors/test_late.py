"""Late fusion: bounded, missing is neutral, nothing enabled changes nothing."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detectors.cues import NAMES, Cue, missing
from detectors.late import MOST, MOST_TOTAL, Late, LateError, Share, Weighed, load_late, shift_of

MEASURED = {"gain": {"low": 0.01}}


def weighed(name: str = "blink", **changed: Any) -> Weighed:
    fields = {"slope": 2.0, "bias": 0.5, "weight": 0.5, "limit": 0.6, "measured": MEASURED} | changed
    return Weighed(name, **fields)


VALUES = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(VALUES, VALUES, st.floats(1e-3, 1e3)), max_size=len(NAMES)))
def test_no_cues_together_move_more_than_their_bounds(cues: list[tuple[float, float, float]]) -> None:
    pairs = list(zip(NAMES, cues, strict=False))
    late = Late(tuple(weighed(n, slope=slope, weight=weight, limit=MOST) for n, (_, slope, weight) in pairs))
    shares = late.shares([Cue(name, value) for name, (value, _, _) in pairs])
    assert abs(shift_of(shares)) <= MOST_TOTAL + 1e-9
    assert all(share.shift is not None and abs(share.shift) <= MOST for share in shares)


def test_a_cue_shifts_by_its_platt_scaling_and_is_cut() -> None:
    late = Late((weighed(),))
    assert late.shares([Cue("blink", 0.1)])[0].shift == pytest.approx(0.5 * (2.0 * 0.1 + 0.5))
    assert late.shares([Cue("blink", 9.0)])[0].shift == 0.6
    assert late.shares([Cue("blink", -9.0)])[0].shift == -0.6


def test_what_is_cut_of_the_total_is_cut_of_all_alike() -> None:
    late = Late((weighed("blink", limit=MOST), weighed("lips", limit=MOST / 2)), limit_total=0.5)
    blink, lips = late.shares([Cue("blink", 9.0), Cue("lips", 9.0)])
    assert blink.shift is not None
    assert lips.shift is not None
    assert blink.shift + lips.shift == pytest.approx(0.5)
    assert blink.shift == pytest.approx(2 * lips.shift)


def test_a_missing_cue_is_neutral_and_says_why() -> None:
    late = Late((weighed(),))
    shares = late.shares([missing("blink", "no burst yet")])
    assert shift_of(shares) == 0.0
    assert shares[0].to_json() == {"reason": "no burst yet", "shift": 0.0}
    other = late.shares([missing("blink", "no burst yet"), Cue("lips", 3.0)])
    assert shift_of(other) == 0.0  # recorded without a say
    assert other[1].to_json() == {"value": 3.0}


def test_shares_survive_json() -> None:
    share = Share("lips", 0.25, None, 0.1)
    from dataclasses import asdict

    assert Share.from_json(json.loads(json.dumps(asdict(share)))) == share


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"name": "gait"}, "gait is unknown"),
        ({"limit": 0.7}, "has limit 0.7"),
        ({"weight": 0.0}, "has weight 0.0"),
        ({"slope": math.nan}, "has slope nan"),
        ({"measured": {}}, "a cue enters by a measurement only"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, changed: dict[str, Any], sentence: str) -> None:
    cue = {"name": "lips", "slope": 1.0, "bias": 0.0, "weight": 1.0, "limit": 0.5, "measured": MEASURED}
    path = tmp_path / "late.json"
    path.write_text(json.dumps({"schema": 1, "limit_total": 1.0, "cues": [cue | changed], "left_out": []}))
    with pytest.raises(LateError, match=f"{path}.*{sentence}"):
        load_late(path)


def test_bounds_are_not_for_a_file_to_widen(tmp_path: Path) -> None:
    path = tmp_path / "late.json"
    path.write_text(json.dumps({"schema": 1, "limit_total": 2.0, "cues": [], "left_out": []}))
    with pytest.raises(LateError, match=r"limit_total: 2\.0, expected 0 to 1\.0986"):
        load_late(path)
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": 0}))
    with pytest.raises(LateError, match="expected an object with schema 1"):
        load_late(path)


def test_the_shipped_file_can_be_read() -> None:
    assert set(load_late().names) <= set(NAMES)


@pytest.mark.parametrize(("value", "reason"), [(None, None), (1.0, "both"), (math.nan, None)])
def test_a_reading_is_a_number_or_a_reason(value: float | None, reason: str | None) -> None:
    with pytest.raises(ValueError, match="cue lips"):
        Cue("lips", value, reason)
