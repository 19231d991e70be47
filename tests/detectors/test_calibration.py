"""Probabilities, intervals that never shrink below tau, and files that are refused."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detectors.calibration import Calibration, CalibrationError, CalibrationKind, Scale

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
        ({"schema": 9}, "schema 9, expected 1"),
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
