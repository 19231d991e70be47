"""The limit on a rate after so few events: against known values and against the distribution itself."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.poisson import below, upper_limit


@pytest.mark.parametrize(
    ("events", "limit"),
    [(0, 2.9957), (1, 4.7439), (2, 6.2958), (3, 7.7537), (5, 10.5130), (10, 16.9622), (100, 118.0793)],
)
def test_known_limits_at_95_percent(events: int, limit: float) -> None:
    """Tables of Garwood (1936), one-sided: half the chi-square's .95 quantile with 2k + 2 degrees."""
    assert upper_limit(events) == pytest.approx(limit, abs=1e-4)


def test_no_event_is_the_rule_of_three() -> None:
    assert upper_limit(0) == pytest.approx(-math.log(0.05), rel=1e-12)
    assert upper_limit(0, 0.99) == pytest.approx(-math.log(0.01), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3000), st.floats(0.5, 0.999))
def test_at_the_limit_so_few_events_are_as_rare_as_promised(events: int, confidence: float) -> None:
    limit = upper_limit(events, confidence)
    at_most = math.fsum(math.exp(k * math.log(limit) - limit - math.lgamma(k + 1)) for k in range(events + 1))
    assert at_most == pytest.approx(1 - confidence, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1000), st.floats(0.001, 10), st.floats(0.5, 0.998))
def test_more_events_and_more_confidence_raise_it(events: float, more: float, confidence: float) -> None:
    limit = upper_limit(events, confidence)
    assert limit > events
    assert upper_limit(events + more, confidence) > limit
    assert upper_limit(events, confidence + 0.001) > limit


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 500), st.floats(0, 2000))
def test_a_share_is_one(shape: float, x: float) -> None:
    assert -1e-12 <= below(x, shape) <= 1 + 1e-12
    assert below(x + 1, shape) >= below(x, shape) - 1e-12


@pytest.mark.parametrize(
    ("events", "confidence", "sentence"),
    [
        (-1, 0.95, "events: -1"),
        (math.nan, 0.95, "events: nan"),
        (0, 1.0, "confidence: 1.0"),
        (0, 0, "confid"),
    ],
)
def test_what_is_no_count_is_refused(events: float, confidence: float, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        upper_limit(events, confidence)
