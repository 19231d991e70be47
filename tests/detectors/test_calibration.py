"""Probabilities, intervals that never shrink below tau, and files that are refused."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detectors.calibration import (
    Autocorrelation,
    Calibration,
    CalibrationError,
    CalibrationKind,
    ConformalSet,
    Disagreement,
    FalseAlarms,
    Histogram,
    Scale,
    Sets,
)

SHIPPED = Calibration(
    kind=CalibrationKind.SHIPPED,
    scales=(Scale(1, 2.0, -0.5), Scale(4, 1.5, -0.25), Scale(16, 1.0, 0.0)),
    tau=0.8,
    sigma=1.2,
    prevalence=0.2,
    data="made up",
)


def test_temperature_and_bias_by_length() -> None:
    assert SHIPPED.calibrated(3.0, 1) == pytest.approx(1.0)
    assert SHIPPED.calibrated(3.0, 16) == pytest.approx(3.0)
    assert SHIPPED.calibrated(3.0, 1000) == pytest.approx(3.0)
    assert SHIPPED.calibrated(3.0, 2) == pytest.approx(
        3.0 / 1.75 - 0.375
    )  # halfway from 1 to 4 in the logarithm


def test_without_calibration_the_plain_sigmoid() -> None:
    plain = Calibration.identity()
    assert plain.kind is CalibrationKind.NONE
    assert plain.probability(0.0) == 0.5
    assert plain.probability(2.0, 9) == pytest.approx(1 / (1 + math.exp(-2)))
    assert plain.llr(2.0) == pytest.approx(2.0)


def test_the_likelihood_ratio_takes_the_prior_out() -> None:
    odds = SHIPPED.probability(1.3) / (1 - SHIPPED.probability(1.3))
    assert math.exp(SHIPPED.llr(1.3)) * 0.2 / 0.8 == pytest.approx(odds)


@given(st.floats(-30, 30), st.floats(1, 1e6))
def test_the_interval_holds_the_probability_and_never_shrinks_below_tau(logit: float, n_eff: float) -> None:
    low, high = SHIPPED.interval(logit, n_eff)
    assert 0 <= low <= SHIPPED.probability(logit, n_eff) <= high <= 1
    assert SHIPPED.variance(n_eff) >= SHIPPED.tau**2
    reach = 1.959964 * SHIPPED.tau
    assert low <= SHIPPED.probability(logit - reach, n_eff) + 1e-9
    assert high >= SHIPPED.probability(logit + reach, n_eff) - 1e-9


def test_more_samples_narrow_the_interval() -> None:
    def width(n_eff: float) -> float:
        low, high = Calibration.identity().interval(0.0, n_eff)
        return high - low

    assert width(1) > width(4) > width(64)


@given(st.floats(-1e4, 1e4))
def test_extreme_logits_do_not_overflow(logit: float) -> None:
    assert 0 <= SHIPPED.probability(logit) <= 1


TABLE = tuple(0.1 * k for k in range(99))
WHOLE = replace(
    SHIPPED,
    sets=Sets(0.02, 0.1, 104, 98, TABLE, TABLE),
    rho=Autocorrelation(0.25, (0.5, 0.2), 25),
    disagreement=Disagreement(1.5, {"a": (1.1, -0.2), "b": (0.9, 0.0)}),
    cllr=0.5,
    bound=FalseAlarms(0.05, 60.0, 40),
    tested_for=("face swaps",),
    operating_point={"open_probability": 0.93},
    reference={"score": Histogram((0.0, 1.0), (0.2, 0.3, 0.5))},
    made_for="c" * 64,
)


def test_everything_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(WHOLE.to_json()))
    assert replace(Calibration.load(path), sha256="") == WHOLE


def test_a_file_of_before_there_were_sets_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(SHIPPED.to_json() | {"schema": 1}))
    found = Calibration.load(path)
    assert (found.sets, found.rho, found.disagreement, found.bound, dict(found.reference)) == (
        None,
        None,
        None,
        None,
        {},
    )


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("sets", {"authentic": TABLE[:98]}, "sets.authentic: 98 logits, expected 99"),
        ("sets", {"manipulated": TABLE[::-1]}, "sets.manipulated"),
        ("sets", {"alpha_authentic": 0.005}, r"alpha_authentic: 0\.005, expected 0\.0100 to"),
        (
            "sets",
            {"people_manipulated": 8},
            r"alpha_manipulated: 0\.1, expected 0\.1111 to \.5 with 8 people",
        ),
        ("rho", {"values": [0.5, 0.0]}, "rho.values"),
        ("rho", {"step_s": 0}, "rho.step_s"),
        ("disagreement", {"limit": 0}, "disagreement.limit"),
        ("disagreement", {"scales": {"a": [0.0, 1.0]}}, "disagreement.scales: a has 0"),
        ("reference", {"score": {"edges": [1.0, 0.0], "shares": [0.2, 0.3, 0.5]}}, "rising edges"),
        ("reference", {"score": {"edges": [0.0], "shares": [0.2, 0.3]}}, "parts of 1"),
    ],
)
def test_what_is_wrong_within_is_named(tmp_path: Path, field: str, change: dict[str, Any], said: str) -> None:
    record = json.loads(json.dumps(WHOLE.to_json()))
    record[field] |= change
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(record))
    with pytest.raises(CalibrationError, match=said):
        Calibration.load(path)


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_the_higher_a_score_the_less_authentic_and_the_more_manipulated(a: float, b: float) -> None:
    assert WHOLE.sets is not None
    low, high = sorted((a, b))
    assert WHOLE.sets.p_authentic(low) >= WHOLE.sets.p_authentic(high)
    assert WHOLE.sets.p_manipulated(low) <= WHOLE.sets.p_manipulated(high)
    for p in (WHOLE.sets.p_authentic(a), WHOLE.sets.p_manipulated(a)):
        assert 0.01 - 1e-9 <= p <= 1


def test_p_values_at_and_between_the_levels_of_the_table() -> None:
    assert WHOLE.sets is not None
    for logit, level in ((0.0, 0.01), (4.9, 0.5), (4.95, 0.505), (9.8, 0.99), (99.0, 0.99), (-99.0, 0.0)):
        assert WHOLE.sets.p_authentic(logit) == pytest.approx(1 - level)
        assert WHOLE.sets.p_manipulated(logit) == pytest.approx(max(level, 0.01))


def test_of_a_score_neither_class_both_or_one() -> None:
    assert WHOLE.sets is not None
    found = [WHOLE.sets.of(logit) for logit in (0.5, 5.0, 9.75)]
    assert found == [ConformalSet.AUTHENTIC, ConformalSet.BOTH, ConformalSet.MANIPULATED]
    apart = replace(WHOLE.sets, manipulated=tuple(20 + x for x in TABLE))
    assert apart.of(15.0) is ConformalSet.NEITHER


def test_members_contradict_each_other_as_far_as_the_weaker_side_is_sure() -> None:
    agreement = Disagreement(1.0, {"a": (2.0, 0.0), "b": (1.0, 0.5), "c": (1.0, 0.0)})
    assert agreement.scaled({"a": 3.0, "b": -1.0, "other": 5.0}) == {"a": 1.5, "b": -0.5}
    assert agreement.between({"a": 3.0, "b": -1.0}) == pytest.approx(0.5)
    assert agreement.between({"a": 3.0, "b": -9.0, "c": 0.1}) == pytest.approx(1.5)
    assert agreement.between({"a": 8.0, "b": 0.1}) == 0.0
    assert agreement.between({"a": -8.0, "c": -0.1}) == 0.0
    assert agreement.between({"a": 8.0, "other": -9.0}) is None


def test_an_exponential_of_the_same_sum_stands_for_the_autocorrelation() -> None:
    fading = Autocorrelation(0.25, tuple(math.exp(-0.25 * k / 0.6) for k in range(1, 60)), 30)
    assert fading.correlation_s == pytest.approx(0.6, rel=1e-3)
    assert Autocorrelation(0.25, (), 30).correlation_s == 0.0


def test_survives_a_file_and_is_hashed(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(SHIPPED.to_json()))
    again = Calibration.load(path)
    assert again.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert again.scales == SHIPPED.scales
    assert (again.kind, again.tau, again.sigma) == (SHIPPED.kind, SHIPPED.tau, SHIPPED.sigma)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 9}, "schema 9, expected 2 or 1"),
        ({"kind": "borrowed"}, "borrowed"),
        ({"scales": []}, "scales: none given"),
        (
            {
                "scales": [
                    {"samples": 4, "temperature": 1, "bias": 0},
                    {"samples": 1, "temperature": 1, "bias": 0},
                ]
            },
            "rising",
        ),
        ({"scales": [{"samples": 1, "temperature": 0, "bias": 0}]}, "temperature above 0"),
        ({"tau": -1}, "tau: -1"),
        ({"sigma": float("nan")}, "sigma: nan"),
        ({"prevalence": 1}, "prevalence: 1"),
    ],
)
def test_a_broken_file_is_refused_by_field(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(SHIPPED.to_json() | change))
    with pytest.raises(CalibrationError, match=said) as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    record = SHIPPED.to_json()
    del record["tau"]
    path.write_text(json.dumps(record))
    with pytest.raises(CalibrationError, match="'tau' is missing"):
        Calibration.load(path)


def test_a_level_outside_of_0_to_1_is_refused() -> None:
    with pytest.raises(CalibrationError, match="level: 1"):
        SHIPPED.interval(0.0, 1, level=1.0)
