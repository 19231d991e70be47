"""Every figure against an example worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream import curves
from stream.curves import Confusion

TRUTH = np.array([False, False, True, True])
SCORES = np.array([0.1, 0.4, 0.35, 0.8])
"""Of the four pairs real-fake three are in order: (.1, .35), (.1, .8), (.4, .8)."""


def test_auc_is_the_share_of_pairs_in_order() -> None:
    assert curves.auc(TRUTH, SCORES) == pytest.approx(3 / 4)


def test_auc_counts_ties_half() -> None:
    assert curves.auc(np.array([False, True]), np.array([0.5, 0.5])) == pytest.approx(0.5)
    # Pairs: (.5, .5) half, (.5, .9) one, (.2, .5) one, (.2, .9) one.
    truth, scores = np.array([False, False, True, True]), np.array([0.5, 0.2, 0.5, 0.9])
    assert curves.auc(truth, scores) == pytest.approx(3.5 / 4)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30))
def test_auc_is_the_mann_whitney_statistic(pairs: list[tuple[bool, int]]) -> None:
    truth = np.array([label for label, _ in pairs])
    scores = np.array([score / 5 for _, score in pairs])
    if truth.all() or not truth.any():
        assert curves.auc(truth, scores) is None
        return
    over = scores[truth][:, None] - scores[~truth][None, :]
    assert curves.auc(truth, scores) == pytest.approx(float(np.mean((over > 0) + 0.5 * (over == 0))))


def test_roc_curve_has_a_point_per_distinct_score() -> None:
    false_rate, true_rate, thresholds = curves.roc_curve(TRUTH, SCORES)
    assert thresholds.tolist() == [np.inf, 0.8, 0.4, 0.35, 0.1]
    assert true_rate.tolist() == [0, 0.5, 0.5, 1, 1]
    assert false_rate.tolist() == [0, 0, 0.5, 0.5, 1]


def test_average_precision_sums_precision_where_recall_is_gained() -> None:
    # .8: precision 1, recall .5; .35: precision 2/3, recall 1.
    assert curves.average_precision(TRUTH, SCORES) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_average_precision_of_ties_is_the_share_of_fakes() -> None:
    assert curves.average_precision(np.array([True, False, False, False]), np.full(4, 0.5)) == pytest.approx(
        0.25
    )


def test_average_precision_without_fakes_is_unknown() -> None:
    assert curves.average_precision(np.array([False]), np.array([0.3])) is None


def test_log_loss() -> None:
    assert curves.log_loss(np.array([True, False]), np.array([0.5, 0.5])) == pytest.approx(np.log(2))
    assert curves.log_loss(np.array([True, False]), np.array([0.8, 0.4])) == pytest.approx(
        -(np.log(0.8) + np.log(0.6)) / 2
    )


def test_log_loss_of_a_certain_error_is_finite() -> None:
    assert curves.log_loss(np.array([True]), np.array([0.0])) == pytest.approx(-np.log(1e-15))


def test_equal_error_rate_where_the_curve_meets_the_diagonal() -> None:
    # At threshold .4 one of two reals alarms and one of two fakes is missed.
    assert curves.equal_error_rate(TRUTH, SCORES) == pytest.approx(0.5)
    assert curves.equal_error_rate(TRUTH, np.array([0.1, 0.2, 0.8, 0.9])) == pytest.approx(0)
    assert curves.equal_error_rate(TRUTH, np.array([0.8, 0.9, 0.1, 0.2])) == pytest.approx(1)


def test_equal_error_rate_between_two_points_of_the_curve() -> None:
    # Points (0, 0), (0, 2/3), (1, 1) after a tie of the last fake with both reals: FPR x = 1/3 (1 - x).
    truth = np.array([True, True, True, False, False])
    assert curves.equal_error_rate(truth, np.array([0.9, 0.8, 0.5, 0.5, 0.5])) == pytest.approx(0.25)


def test_confusion() -> None:
    truth, positive = np.array([True, True, False, False, False]), np.array([True, False, True, False, False])
    assert curves.confusion(truth, positive) == Confusion(1, 1, 2, 1)


def test_risk_coverage() -> None:
    # Surest first: .95 right, .1 wrong (it is a fake), .6 right.
    coverage, risk = curves.risk_coverage_curve(np.array([True, True, True]), np.array([0.95, 0.1, 0.6]))
    assert coverage.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3])
    assert curves.area_under_risk(np.array([True, True, True]), np.array([0.95, 0.1, 0.6])) == pytest.approx(
        (0 + 1 / 2 + 1 / 3) / 3
    )


def test_no_face_is_half_an_error_at_the_very_end() -> None:
    coverage, risk = curves.risk_coverage_curve(np.array([False, True, False]), np.array([0.5, 0.9, 0.5]))
    assert coverage.tolist() == pytest.approx([1 / 3, 1])
    assert risk.tolist() == pytest.approx([0, 1 / 3])


def test_bootstrap_draws_whole_groups() -> None:
    seen: set[tuple[int, ...]] = set()

    def figure(index: np.ndarray) -> float:
        seen.add(tuple(sorted(index.tolist())))
        return float(np.mean(index))

    interval = curves.bootstrap(figure, ["a", "a", "b"], np.random.default_rng(0))
    assert interval.value == pytest.approx(1.0)
    assert seen == {(0, 1, 2), (0, 0, 1, 1), (2, 2)}
    assert (interval.low, interval.high) == (0.5, 2.0)


def test_bootstrap_covers_the_mean_of_a_known_sample() -> None:
    values = np.random.default_rng(1).normal(size=400)
    groups = [str(index) for index in range(400)]
    interval = curves.bootstrap(lambda index: float(values[index].mean()), groups, np.random.default_rng(2))
    assert interval.low is not None
    assert interval.high is not None
    error = values.std() / 20
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=error / 4)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=error / 4)


def test_one_group_gives_no_interval() -> None:
    interval = curves.bootstrap(lambda index: 1.0, ["a", "a"], np.random.default_rng(0))
    assert (interval.value, interval.low, interval.high) == (1.0, None, None)


def test_too_many_draws_without_a_figure_give_no_interval() -> None:
    interval = curves.bootstrap(
        lambda index: 1.0 if len(set(index.tolist())) == 2 else None, ["a", "b"], np.random.default_rng(7)
    )
    assert interval.value == 1.0
    few = curves.bootstrap(
        lambda index: 1.0 if len(set(index.tolist())) == 4 else None, list("abcd"), np.random.default_rng(7)
    )
    assert (few.low, few.high) == (None, None)


def test_a_share_is_a_mean_over_what_counts() -> None:
    hit, among = np.array([True, True, False, True]), np.array([True, False, True, True])
    interval = curves.share(hit, among, list("abcd"), np.random.default_rng(0))
    assert interval.value == pytest.approx(2 / 3)
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low < 2 / 3 < interval.high


def test_none_of_n_people_claims_no_better_than_three_in_n() -> None:
    groups = [str(index // 2) for index in range(40)]
    among = np.arange(40) < 20
    none = curves.share(np.zeros(40, bool), among, groups, np.random.default_rng(0))
    assert (none.value, none.low, none.high) == (0.0, 0.0, pytest.approx(0.3))
    every = curves.share(np.ones(40, bool), among, groups, np.random.default_rng(0))
    assert (every.value, every.low, every.high) == (1.0, pytest.approx(0.7), 1.0)


def test_a_share_of_nothing_is_unknown() -> None:
    interval = curves.share(np.ones(2, bool), np.zeros(2, bool), ["a", "b"], np.random.default_rng(0))
    assert interval.value is None
