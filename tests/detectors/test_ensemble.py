"""One logit of many: the rules, members that are absent, and files that are refused."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detectors.calibration import Calibration, CalibrationError, CalibrationKind, Scale
from detectors.ensemble import Ensemble, EnsembleError, Part, Rule, load_ensemble, read_ensemble
from detectors.members import Member

CALIBRATION = Calibration(CalibrationKind.SHIPPED, (Scale(1, 1.3, 0.1),), 0.9, 0.7, data="made up")
PARTS = (
    Part("a", "1", "a" * 64, 0.5, 2.0, -0.5),
    Part("b", "1", "b" * 64, 0.3, 1.0, 0.0),
    Part("c", "2", "c" * 64, 0.2, 0.5, 0.25),
)
LOGITS = {"a": 3.0, "b": -1.0, "c": 1.0}  # scaled 1.0, -1.0, 2.25

logits = st.floats(-50, 50)


def member(name: str, temperature: float = 1.0, bias: float = 0.0) -> Member:
    calibration = replace(CALIBRATION, scales=(Scale(1, temperature, bias), Scale(4, 9.0, 9.0)))
    return Member(name, "1", cast(Any, None), cast(Any, None), calibration, name * 64, "Apache-2.0", {})


def row(number: int, **change: Any) -> dict[str, Any]:
    part = PARTS[number]
    return {name: getattr(part, name) for name in Part.__slots__} | change


def ensemble(rule: Rule = Rule.MEAN) -> Ensemble:
    return Ensemble(rule, PARTS, CALIBRATION)


def test_each_rule_on_the_members_own_scales() -> None:
    assert ensemble().scaled(LOGITS) == {"a": 1.0, "b": -1.0, "c": 2.25}
    assert ensemble(Rule.MEAN).fuse(LOGITS) == pytest.approx(0.5 - 0.3 + 0.45)
    assert ensemble(Rule.MAX).fuse(LOGITS) == 2.25
    odds = 0.5 * math.exp(1.0) + 0.3 * math.exp(-1.0) + 0.2 * math.exp(2.25)
    assert ensemble(Rule.LOGSUMEXP).fuse(LOGITS) == pytest.approx(math.log(odds))


def test_absent_members_leave_their_weight_to_the_others_and_strangers_have_none() -> None:
    assert ensemble().fuse({"a": 3.0, "c": 1.0, "shadow": 99.0}) == pytest.approx((0.5 + 0.45) / 0.7)
    assert ensemble(Rule.LOGSUMEXP).fuse({"b": -1.0}) == pytest.approx(-1.0)
    with pytest.raises(EnsembleError, match=r"shadow.*expected at least one of"):
        ensemble().fuse({"shadow": 99.0})


@pytest.mark.parametrize("rule", list(Rule))
@given(a=logits, b=logits, c=logits)
def test_the_fused_logit_lies_between_the_members(rule: Rule, a: float, b: float, c: float) -> None:
    found = ensemble(rule)
    scaled = found.scaled({"a": a, "b": b, "c": c}).values()
    assert min(scaled) - 1e-9 <= found.fuse({"a": a, "b": b, "c": c}) <= max(scaled) + 1e-9


@pytest.mark.parametrize("rule", list(Rule))
def test_a_logit_that_is_no_number_makes_none(rule: Rule) -> None:
    assert math.isnan(ensemble(rule).fuse({**LOGITS, "a": math.nan}))
    assert ensemble(rule).fuse({**LOGITS, "a": math.inf}) == math.inf


def test_a_member_alone_is_itself(tmp_path: Path) -> None:
    alone = load_ensemble([member("a", 2.0, 1.0)], tmp_path / "none.json")
    assert alone.fuse({"a": 3.25}) == 3.25
    assert alone.calibration.scales[0] == Scale(1, 2.0, 1.0)


def test_members_that_nobody_fitted_together_accuse_nobody(tmp_path: Path) -> None:
    together = load_ensemble([member("a", 2.0, 1.0), member("b")], tmp_path / "none.json")
    assert together.fuse({"a": 3.0, "b": 0.5}) == pytest.approx((2.5 + 0.5) / 2)
    assert together.calibration.kind is CalibrationKind.NONE


def written(tmp_path: Path, **change: Any) -> Path:
    path = tmp_path / "ensemble.json"
    path.write_text(json.dumps(ensemble().to_json() | change))
    return path


def test_the_file_serves_exactly_the_members_it_was_made_for(tmp_path: Path) -> None:
    path = written(tmp_path)
    found = load_ensemble([member("c"), member("b"), member("a")], path)
    assert found.parts == PARTS
    assert found.calibration.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_ensemble([member("a"), member("b")], path).calibration.kind is CalibrationKind.NONE
    assert load_ensemble([member("a")], path).names == ("a",)


def test_what_a_calibration_is_made_for_is_members_scales_weights_and_rule() -> None:
    digest = ensemble().digest
    assert replace(ensemble(), calibration=Calibration.identity()).digest == digest
    others = [ensemble(Rule.MAX), replace(ensemble(), parts=(replace(PARTS[0], bias=0.1), *PARTS[1:]))]
    assert len({digest, *(other.digest for other in others)}) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 7}, "schema 1"),
        ({"rule": "median"}, "median"),
        ({"parts": []}, "at least one member"),
        ({"parts": [{"name": "a"}]}, "'version' is missing"),
        ({"parts": [row(0, weight=0.9), row(1, weight=0.1)]}, r"weight of b is below 0\.2"),
        ({"parts": [row(0, weight=0.5), row(1, weight=0.4)]}, r"add up to 0\.9"),
        ({"parts": [row(0, weight=0.5), row(0, weight=0.5)]}, "each once"),
        ({"parts": [row(0, weight=1.0, temperature=0.0)]}, "temperature above 0"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = written(tmp_path, **change)
    with pytest.raises(EnsembleError, match=said):
        read_ensemble(path)


def test_a_broken_calibration_in_it_is_too(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"ensemble\.json: tau"):
        read_ensemble(written(tmp_path, calibration=CALIBRATION.to_json() | {"tau": -1}))


def test_no_file_and_no_json_are_said(tmp_path: Path) -> None:
    with pytest.raises(EnsembleError, match=r"none\.json"):
        read_ensemble(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(EnsembleError, match=r"broken\.json"):
        read_ensemble(tmp_path / "broken.json")
