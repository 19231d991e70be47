"""The population stability index: its value, its bins, and what chance makes of it."""

import math

import numpy as np
import pytest

from detectors.calibration import Calibration, Histogram
from detectors.drift import BINS, bin_of, chance, median, reference_histograms, stability

RNG = np.random.default_rng(5)


def test_bins_hold_equal_shares_of_the_reference() -> None:
    values = RNG.normal(size=5000)
    (found,) = reference_histograms({"score": values}).values()
    assert len(found.shares) == BINS
    assert all(share == pytest.approx(1 / BINS, abs=0.005) for share in found.shares)
    counts = np.zeros(BINS)
    for value in values:
        counts[bin_of(found, float(value))] += 1
    assert counts / len(values) == pytest.approx(np.array(found.shares))


def test_repeated_values_make_fewer_bins_and_nothing_makes_none() -> None:
    found = reference_histograms(
        {
            "steps": [1.0] * 50 + [2.0] * 30 + [3.0] * 20,
            "one": [4.0] * 100,
            "few": [1.0, 2.0],
            "none": [math.nan] * 100,
            "some": [math.nan, math.inf, *range(100)],
        }
    )
    assert set(found) == {"steps", "some"}
    assert found["steps"] == Histogram((1.5, 2.2), (0.5, 0.3, 0.2))
    assert math.fsum(found["some"].shares) == pytest.approx(1)


def test_the_index_is_what_the_formula_says() -> None:
    reference = Histogram((0.0,), (0.5, 0.5))
    assert stability(reference, [5.0, 5.0]) == 0
    assert stability(reference, [8.0, 2.0]) == pytest.approx(0.3 * math.log(0.8 / 0.2))
    assert stability(reference, [8.0, 0.0]) < 4  # an empty bin is not infinitely far


def test_chance_bounds_what_nothing_gives() -> None:
    reference = reference_histograms({"score": RNG.normal(size=20000)})["score"]
    looks, above = 100, 0
    for _ in range(400):
        counts = [0.0] * BINS
        for value in RNG.normal(size=looks):
            counts[bin_of(reference, float(value))] += 1
        above += stability(reference, counts) > chance(reference, looks)
    assert above <= 8
    assert chance(reference, 10) == pytest.approx(10 * chance(reference, 100))


def test_the_middle_is_told_by_the_bin_that_holds_it() -> None:
    reference = Histogram((1.0, 2.0, 3.0), (0.25, 0.25, 0.25, 0.25))
    assert median(reference, reference.shares) == 2.0
    assert median(reference, [0, 0, 0, 5]) == 3.0
    assert median(reference, [9, 1, 0, 0]) == 1.0


def test_a_reference_travels_with_its_calibration() -> None:
    found = reference_histograms({"score": RNG.normal(size=500), "sharpness": RNG.gamma(2, 30, size=500)})
    record = {**Calibration.identity().to_json(), "reference": {k: _json(v) for k, v in found.items()}}
    assert Calibration.from_json(record, "").reference == found


def _json(histogram: Histogram) -> dict[str, list[float]]:
    return {"edges": list(histogram.edges), "shares": list(histogram.shares)}
