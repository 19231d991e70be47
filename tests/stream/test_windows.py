"""Windows in media time: order, eviction, weights, and how much a mean is worth."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detectors.readings import Reason
from stream.windows import Sample, Window, effective_samples, estimate, pooled_sample, sample_of
from tests.stream.story import face

SECOND = 1_000_000


def sample(seconds: float, logit: float, weight: float = 1.0, *reasons: Reason) -> Sample:
    return Sample(round(seconds * SECOND), logit, {"m": logit}, weight, reasons)


def drawn_sample(tick: int, logit: float, weight: float) -> Sample:
    return sample(tick / 2, logit, weight, *([Reason.BLUR] if weight < 0.5 else []))


samples = st.lists(
    st.builds(drawn_sample, st.integers(0, 40), st.floats(-8, 8), st.sampled_from([0.1, 0.5, 1.0])),
    max_size=30,
).map(lambda made: sorted(made, key=lambda one: one.media_us))


def test_a_window_slides_over_media_time() -> None:
    #            0 s   1     2     3     4     5     6
    #   samples  A     B     C           D           E      window of 3 s
    #   at 4 s         .     [---------- D]                 (1 s, 4 s]: B is just too old
    #   at 6 s                     .     [---------- E]
    window = Window(3 * SECOND)
    for seconds in (0, 1, 2, 4):
        window.add(sample(seconds, float(seconds)))
    assert [one.media_us // SECOND for one in window.samples()] == [2, 4]
    window.add(sample(6, 6.0))
    assert [one.media_us // SECOND for one in window.samples()] == [4, 6]
    window.evict(9 * SECOND - 1)
    assert len(window) == 1
    window.evict(9 * SECOND)
    assert window.estimate() is None


def test_the_mean_is_weighted_by_quality_and_leaves_out_what_is_not_good() -> None:
    found = estimate([sample(0, 4.0, 1.0), sample(1, 1.0, 0.5), sample(2, -9.0, 0.4, Reason.BLUR)])
    assert found is not None
    assert found.logit == pytest.approx((4.0 + 0.5) / 1.5)
    assert found.members == {"m": found.logit}
    assert (found.samples, found.good, found.reasons) == (3, 2, (Reason.BLUR,))
    assert (found.span_us, found.first_us, found.last_us) == (SECOND, 0, 2 * SECOND)


def test_logits_of_different_readers_are_never_averaged() -> None:
    #   ensemble: -4 -4 | half a face: 9 9 9 | and again the ensemble: -4 -4
    whole = [sample(seconds, -4.0) for seconds in (0, 1, 5, 6)]
    halves = [replace(sample(seconds, 9.0), half="upper") for seconds in (2, 3, 4)]
    found = estimate(sorted([*whole, *halves], key=lambda one: one.media_us))
    assert found is not None
    assert (found.logit, found.half, found.good, found.samples) == (-4.0, "", 4, 7)
    mostly = estimate([whole[0], *halves])
    assert mostly is not None
    assert (mostly.logit, mostly.half, mostly.good, mostly.span_us) == (9.0, "upper", 3, 2 * SECOND)
    even = estimate([*whole[:2], *halves[:2]])
    assert even is not None
    assert even.half == ""
    pooled = pooled_sample([whole[0], replace(halves[0], media_us=0), replace(halves[1], media_us=0)])
    assert (pooled.fused, pooled.half) == (9.0, "upper")


def test_who_read_a_face_survives_being_kept() -> None:
    window = Window(10 * SECOND)
    window.add(sample(0, -4.0))
    window.add(replace(sample(1, 2.0), half="upper"))
    rows = window.state()
    assert [len(row) for row in rows] == [5, 6]
    again = Window(10 * SECOND)
    again.restore(rows)
    assert again.samples() == window.samples()
    read = sample_of(replace(face(1.0), logits={"m": -3.0, "upper": 1.0}, half="upper"), 0)
    assert (read.half, read.members) == ("upper", {"upper": 1.0})


def test_looking_closer_does_not_count_more() -> None:
    #   every half second: -2 -2 -2 -2 | then eight a second for a second: 6 6 6 6 6 6 6 6 | -2 -2
    calm = [sample(index / 2, -2.0) for index in range(4)]
    burst = [sample(1.5 + index / 8, 6.0) for index in range(1, 9)]
    after = [sample(3.0, -2.0), sample(3.5, -2.0)]
    found = estimate([*calm, *burst, *after])
    assert found is not None
    # 1 s of 6 and 3 s of -2, however often each was looked at
    assert found.logit == pytest.approx((1.0 * 6.0 - 3.0 * 2.0) / 4.0)


def test_time_that_was_not_looked_at_counts_for_nobody() -> None:
    found = estimate([sample(0, -2.0), sample(0.5, -2.0), sample(9.0, 4.0)])
    assert found is not None
    assert found.logit == pytest.approx(0.0)


def test_bad_samples_alone_are_reported_but_count_as_none_good() -> None:
    found = estimate([sample(0, 2.0, 0.1, Reason.BLUR), sample(1, 4.0, 0.0, Reason.POSE, Reason.BLUR)])
    assert found is not None
    assert (found.logit, found.good, found.span_us) == (3.0, 0, 0)
    assert found.reasons == (Reason.BLUR, Reason.POSE)


def test_onset_is_the_first_good_sample_that_leans_to_manipulated() -> None:
    #   logit  -2   blurred 5   -1    3    4
    drawn = [sample(0, -2), sample(1, 5, 0.1, Reason.BLUR), sample(2, -1), sample(3, 3), sample(4, 4)]
    found = estimate(drawn)
    assert found is not None
    assert found.onset_us == 3 * SECOND
    calm = estimate(drawn[:3])
    assert calm is not None
    assert calm.onset_us is None


def test_effective_samples_is_the_published_formula_on_a_regular_grid() -> None:
    n, step_s, correlation_s = 20, 0.5, 1.0
    times = [round(index * step_s * SECOND) for index in range(n)]
    rho = [math.exp(-lag * step_s / correlation_s) for lag in range(n)]
    factor = 1 + 2 * sum((1 - lag / n) * rho[lag] for lag in range(1, n))
    assert effective_samples(times, [1.0] * n, correlation_s) == pytest.approx(n / factor)


def test_sampling_faster_hardly_counts_as_seeing_more() -> None:
    slow = effective_samples([index * SECOND // 2 for index in range(20)], [1.0] * 20, 1.0)
    fast = effective_samples([index * SECOND // 8 for index in range(80)], [1.0] * 80, 1.0)
    assert 4.5 < slow < fast < 1.1 * slow


def test_the_measured_correlation_is_used() -> None:
    short, long = Window(20 * SECOND, 0.2), Window(20 * SECOND, 3.0)
    for index in range(20):
        short.add(sample(index / 2, 1.0))
        long.add(sample(index / 2, 1.0))
    found, slower = short.estimate(), long.estimate()
    assert found is not None
    assert slower is not None
    assert found.n_eff > 15 > 4 > slower.n_eff
    assert effective_samples([0, SECOND, 2 * SECOND], [1.0, 1.0, 2.0], 0.0) == pytest.approx(16 / 6)


def test_members_that_read_some_samples_only_have_the_mean_of_those() -> None:
    light = Sample(0, 1.0, {"a": 1.0}, 1.0)
    deep = Sample(SECOND, 3.0, {"a": 2.0, "heavy": 4.0}, 1.0)
    later = Sample(2 * SECOND, 3.0, {"a": 3.0, "heavy": 6.0}, 1.0)
    found = estimate([light, deep, later])
    assert found is not None
    assert found.members == pytest.approx({"a": 2.0, "heavy": 5.0})
    same_frame = replace(light, media_us=deep.media_us)
    assert pooled_sample([deep, same_frame]).members == {"a": 1.5, "heavy": 4.0}


def test_samples_far_apart_count_each() -> None:
    times = [index * 100 * SECOND for index in range(4)]
    assert effective_samples(times, [1.0] * 4, 1.0) == pytest.approx(4.0)
    assert effective_samples(times, [1.0, 1e-6, 1e-6, 1e-6], 1.0) == pytest.approx(1.0, abs=1e-4)
    assert effective_samples([], [], 1.0) == 0.0


@given(samples)
def test_whatever_comes_the_window_holds_exactly_the_newest_in_order(made: list[Sample]) -> None:
    window = Window(5 * SECOND)
    for index, one in enumerate(made):
        window.add(one)
        newest = one.media_us
        assert window.samples() == tuple(
            kept for kept in made[: index + 1] if newest - 5 * SECOND < kept.media_us <= newest
        )


@given(samples.filter(bool), st.sampled_from([0.25, 0.5]))
def test_a_mean_lies_among_its_samples_and_scale_of_weights_changes_nothing(
    made: list[Sample], scale: float
) -> None:
    found = estimate(made)
    scaled = estimate([Sample(s.media_us, s.fused, s.members, s.weight * scale, s.reasons) for s in made])
    assert found is not None
    assert scaled is not None
    kept = [one for one in made if one.good] or made
    assert min(one.fused for one in kept) - 1e-9 <= found.logit <= max(one.fused for one in kept) + 1e-9
    assert scaled.logit == pytest.approx(found.logit)
    assert scaled.n_eff == pytest.approx(found.n_eff)
    assert 1.0 <= found.n_eff <= len(kept) + 1e-9


@given(samples)
def test_a_window_restores_exactly(made: list[Sample]) -> None:
    window, restored = Window(5 * SECOND), Window(5 * SECOND)
    for one in made:
        window.add(one)
    restored.restore(window.state())
    assert restored.samples() == window.samples()
    assert restored.estimate() == window.estimate()


def test_a_sample_from_the_past_is_refused() -> None:
    window = Window(SECOND)
    window.add(sample(5, 0.0))
    with pytest.raises(ValueError, match="older than the last"):
        window.add(sample(4, 0.0))


def test_a_frame_of_many_faces_counts_once_and_is_diluted_by_the_authentic() -> None:
    pooled = pooled_sample([sample(1, 6.0), sample(1, -6.0), sample(1, 6.0, 0.1, Reason.BLUR)])
    assert (pooled.media_us, pooled.fused, pooled.weight, pooled.reasons) == (SECOND, 0.0, 1.0, ())
    bad = pooled_sample([sample(1, 6.0, 0.1, Reason.BLUR), sample(1, 3.0, 0.1, Reason.BLUR, Reason.POSE)])
    assert bad.reasons == (Reason.BLUR, Reason.POSE)
    assert not bad.good


@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_no_number_decides_nothing(logit: float) -> None:
    found = sample_of(replace(face(1.0), fused=logit), 7)
    assert not found.good
    assert found.reasons == (Reason.ATYPICAL,)
    assert math.isfinite(found.fused)
