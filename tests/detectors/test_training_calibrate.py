"""Sets, intervals and fusions hold what they claim, on people made up with a known truth."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from detectors.calibration import Calibration, CalibrationKind, ConformalSet, Scale
from detectors.ensemble import Rule
from detectors.training.calibrate import (
    EnsembleFit,
    Looks,
    Panel,
    fit_calibration,
    fit_ensemble,
    operating_point,
)
from detectors.training.conformal import fit_sets, high_table, place
from detectors.training.fusion import Fusion, choose, member_scales
from detectors.training.people import even_weights, share
from detectors.training.scaling import Track, llr_cost, scales_by_length
from detectors.training.spread import (
    autocorrelation,
    between_tracks,
    centres,
    covered,
    interval_coverage,
)

TAU, SIGMA, APART = 1.0, 0.7, 3.0
"""Of the people made up: between people, within a track, between the classes' means."""


def population(people: int, looks: int, seed: int, apart: float = APART, shift: float = 0.0) -> Looks:
    """`looks` authentic and as many manipulated looks at each person."""
    rng = np.random.default_rng(seed)
    identity = np.repeat(np.arange(people), 2 * looks)
    labels = np.tile(np.repeat([0, 1], looks), people)
    person = rng.normal(0, TAU, (people, 2))[identity, labels]
    noise = rng.normal(0, SIGMA, len(identity))
    return Looks(apart * (labels - 0.5) + person + noise + shift, labels, identity)


def tracks(count: int, seed: int, phi: float = 0.5, length: int = 60) -> list[NDArray[np.float64]]:
    """Tracks whose noise follows itself from one sample to the next."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        noise = np.empty(length)
        noise[0] = rng.normal(0, SIGMA)
        for k in range(1, length):
            noise[k] = phi * noise[k - 1] + rng.normal(0, SIGMA * math.sqrt(1 - phi**2))
        made.append(noise + rng.normal(0, TAU))
    return made


def calibration_of(looks: Looks, **more: Any) -> Calibration:
    return Calibration(
        CalibrationKind.SHIPPED,
        (Scale(1, 1.0, 0.0),),
        between_tracks(looks, SIGMA),
        SIGMA,
        sets=fit_sets(looks, **more),
    )


# -- sets


def test_a_table_is_the_average_over_draws_of_one_look_at_each_person() -> None:
    rng = np.random.default_rng(1)
    identity = np.repeat(np.arange(30), rng.integers(1, 9, 30))
    logits = rng.normal(0, 1, 30)[identity] + rng.normal(0, 1, len(identity))
    table = high_table(logits, identity)
    people = [logits[identity == person] for person in range(30)]
    drawn = np.array([[rng.choice(looks) for looks in people] for _ in range(1000)])
    for level, x in ((0.75, table[24]), (0.5, table[49]), (0.25, table[74])):
        averaged = ((1 + (drawn >= x + 1e-9).sum(axis=1)) / 31).mean()
        assert averaged == pytest.approx(level, abs=0.04)
    assert (np.diff(table) >= 0).all()


def test_sets_keep_their_class_among_people_not_fitted_on() -> None:
    others = population(4000, 1, seed=99)
    kept = []
    for seed in range(12):
        sets = fit_sets(population(150, 4, seed), alpha_authentic=0.05, alpha_manipulated=0.1)
        placed = place(sets, others.logits)
        not_authentic, not_manipulated = placed.excluded(sets)
        real = others.labels == 0
        kept.append((1 - not_authentic[real].mean(), 1 - not_manipulated[~real].mean()))
    authentic, manipulated = np.mean(kept, axis=0)
    assert authentic == pytest.approx(0.95, abs=0.012)
    assert manipulated == pytest.approx(0.9, abs=0.015)


def test_people_with_many_looks_count_once() -> None:
    looks = population(60, 3, seed=2)
    crowd = Looks(
        np.concatenate([looks.logits, np.full(900, 9.0)]),
        np.concatenate([looks.labels, np.zeros(900, np.int64)]),
        np.concatenate([looks.identity, np.full(900, 7)]),
    )
    plain, crowded = fit_sets(looks), fit_sets(crowd)
    for x in (-2.0, -1.0, 0.0):
        assert crowded.p_authentic(x) == pytest.approx(plain.p_authentic(x), abs=0.03)


def test_the_rate_of_false_accusations_is_kept_in_every_source() -> None:
    looks, studio = population(150, 3, seed=3), population(150, 1, seed=4, shift=1.0)
    authentic = studio.of(studio.labels == 0)
    alone = fit_sets(looks, alpha_authentic=0.05)
    both = fit_sets(looks, [authentic], alpha_authentic=0.05)
    others = population(3000, 1, seed=5, shift=1.0)
    real = others.logits[others.labels == 0]
    assert np.mean([alone.p_authentic(x) <= 0.05 for x in real]) > 0.1
    assert np.mean([both.p_authentic(x) <= 0.05 for x in real]) < 0.07


def test_few_people_carry_no_small_alpha() -> None:
    sets = fit_sets(population(30, 4, seed=6))
    assert sets.alpha_authentic == pytest.approx(1 / 31)
    assert sets.alpha_manipulated == 0.1


def test_far_apart_classes_leave_a_gap_that_belongs_to_neither() -> None:
    sets = fit_sets(population(120, 2, seed=7, apart=14.0))
    found = [sets.of(x) for x in (-7.0, 0.0, 7.0)]
    assert found == [ConformalSet.AUTHENTIC, ConformalSet.NEITHER, ConformalSet.MANIPULATED]
    assert fit_sets(population(120, 2, seed=7, apart=1.0)).of(0.0) is ConformalSet.BOTH


# -- spreads


def test_the_interval_covers_what_it_says_among_people_not_fitted_on() -> None:
    others = population(4000, 1, seed=98)
    for level in (0.8, 0.9, 0.95):
        covers = []
        for seed in range(6):
            looks = population(150, 4, seed)
            inside = covered(calibration_of(looks), centres(looks), others, level)
            covers.append([inside[others.labels == label].mean() for label in (0, 1)])
        assert np.mean(covers, axis=0) == pytest.approx([level, level], abs=0.02)


def test_looking_for_longer_leaves_the_spread_between_people() -> None:
    looks = population(400, 4, seed=8)
    calibration = calibration_of(looks)
    rng = np.random.default_rng(9)
    averaged = Looks(
        rng.normal(-APART / 2, TAU, 2000) + rng.normal(0, SIGMA / 4, 2000),
        np.zeros(2000, np.int64),
        np.arange(2000),
    )
    found = interval_coverage(calibration, centres(looks), averaged, 0.9, n_eff=16.0)
    assert found["authentic"]["share"] == pytest.approx(0.9, abs=0.02)
    assert "manipulated" not in found


def test_one_persons_videos_differ_too() -> None:
    rng = np.random.default_rng(10)
    identity = np.repeat(np.arange(300), 6)
    video = rng.normal(0, 0.5, 300)[identity] + rng.normal(0, 1.2, 1800) + rng.normal(0, SIGMA, 1800)
    looks = Looks(video, np.zeros(1800, np.int64), identity)
    assert between_tracks(looks, SIGMA) == pytest.approx(math.hypot(0.5, 1.2), rel=0.1)


def test_the_autocorrelation_is_found_again_and_cut() -> None:
    found = autocorrelation(tracks(60, seed=11), step_s=0.25)
    assert found is not None
    assert found.values[:3] == pytest.approx((0.5, 0.25, 0.125), abs=0.06)
    assert all(value > 0 for value in found.values)
    assert found.tracks == 60
    # phi .5 every quarter of a second: exp(-.25/s) = .5
    assert found.correlation_s == pytest.approx(0.25 / math.log(2), rel=0.15)


def test_few_tracks_say_nothing_of_the_next_second() -> None:
    assert autocorrelation(tracks(19, seed=12), 0.25) is None
    assert autocorrelation([*tracks(19, seed=12), np.zeros(7)], 0.25) is None


# -- scales


def test_a_score_sharpens_with_length_only_if_a_hundred_people_on_video_say_so() -> None:
    looks = population(200, 3, seed=13)
    on_video = [
        Track(values + (APART if label else 0.0) - APART / 2, label, number)
        for number, values in enumerate(tracks(120, seed=14, phi=0.0))
        for label in (number % 2,)
    ]
    assert len({scale.temperature for scale in scales_by_length(looks, on_video[:99], 1.0)}) == 1
    sharper = scales_by_length(looks, on_video, 1.0)
    assert sharper[0].temperature > sharper[-1].temperature
    one_class = [replace(track, label=0) for track in on_video]
    assert len({scale.temperature for scale in scales_by_length(looks, one_class, 1.0)}) == 1


def test_the_cost_of_likelihood_ratios() -> None:
    labels = np.array([0, 1, 1, 1])
    assert llr_cost(np.zeros(4), labels) == pytest.approx(1.0)
    assert llr_cost(np.where(labels == 1, 30.0, -30.0), labels) == pytest.approx(0.0, abs=1e-9)
    assert llr_cost(np.where(labels == 1, -3.0, 3.0), labels) > 1
    doubled = llr_cost(np.array([-1.0, 1.0, 1.0, 1.0]), labels)
    assert doubled == pytest.approx(math.log2(1 + math.exp(-1)))


def test_a_share_counts_people_and_claims_no_more_than_they_can_say() -> None:
    identity = np.array([0, 0, 0, 1])
    assert even_weights(identity) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])
    assert share(np.array([True, True, True, False]), identity)["share"] == pytest.approx(0.5)
    none = share(np.zeros(100, bool), np.arange(100))
    assert (none["share"], none["high"]) == (0.0, 0.0)
    assert none["upper"] == pytest.approx(1 - 0.05 ** (1 / 100))


# -- all of it


@pytest.fixture(scope="module")
def fitted() -> Any:
    looks = population(120, 3, seed=20, apart=3.6)
    studio = population(150, 1, seed=21)
    return fit_calibration(
        looks.logits, looks.labels, looks.identity, tracks(25, seed=22), "made up", further={"studio": studio}
    )


def test_a_fitted_calibration_has_everything_and_survives_its_file(fitted: Any) -> None:
    calibration = fitted.calibration
    again = Calibration.from_json(json.loads(json.dumps(calibration.to_json())), "")
    assert again == calibration
    assert calibration.rho.tracks == 25
    assert calibration.cllr == fitted.report["cllr_cross_fitted"]
    assert 0.1 < calibration.cllr < 0.6
    assert json.dumps(fitted.report)


def test_its_figures_come_from_people_not_fitted_on_and_are_about_what_is_claimed(fitted: Any) -> None:
    kept = fitted.report["sets_cross_fitted"]
    assert kept["authentic"]["share"] == pytest.approx(0.98, abs=0.02)
    assert kept["manipulated"]["share"] == pytest.approx(0.9, abs=0.04)
    assert kept["studio"]["people"] == 150
    covers = fitted.report["interval"]["covers_cross_fitted"]
    for name in ("authentic", "manipulated"):
        assert covers[name]["low"] <= fitted.report["interval"]["level"] + 0.04
        assert covers[name]["share"] == pytest.approx(fitted.report["interval"]["level"], abs=0.06)


def test_the_operating_point_decides_enough_and_accuses_few(fitted: Any) -> None:
    calibration, report = operating_point(fitted.calibration, fitted.held_out)
    chosen = report["chosen"]
    assert report["met"]
    assert chosen["worst_false"] <= 0.02
    assert chosen["decided"] >= 0.8
    assert calibration.sets is not None
    assert calibration.sets.alpha_manipulated == chosen["alpha_manipulated"]
    assert chosen["alarms"]["false"]["share"] <= chosen["false_accusations"]["val"]["share"]
    assert set(chosen["false_accusations"]) == {"val", "studio"}
    assert chosen["false_accusations"]["val"]["upper"] > 0


def test_the_operating_point_says_when_it_cannot_be_had() -> None:
    looks = population(110, 2, seed=23, apart=1.2)
    weak = fit_calibration(looks.logits, looks.labels, looks.identity, tracks(4, seed=24), "made up")
    assert weak.calibration.rho is None
    calibration, report = operating_point(weak.calibration, weak.held_out)
    assert not report["met"]
    assert report["chosen"]["missed"]["share"] <= 0.3
    assert calibration.sets is not None
    assert calibration.sets.alpha_manipulated <= 0.25
    with pytest.raises(ValueError, match="no conformal sets"):
        operating_point(Calibration.identity(), weak.held_out)


# -- fusion


def panel(people: int, seed: int, strength: dict[str, float], looks: int = 2) -> Panel:
    """Members with errors of their own about the same faces, on their own scales; `strength` is how far apart
    they see the classes."""
    rng = np.random.default_rng(seed)
    base = population(people, looks, seed, apart=0.0)
    logits = {
        name: (index + 1.0)
        * (apart * (base.labels - 0.5) + 0.3 * base.logits + rng.normal(0, 1, len(base.labels)))
        + index
        for index, (name, apart) in enumerate(strength.items())
    }
    return Panel(logits, base.labels, base.identity)


def test_fusing_many_faces_is_fusing_each() -> None:
    val = panel(40, 30, {"a": 2.0, "b": 1.5, "c": 1.0})
    scales = member_scales(val)
    for rule in Rule:
        fusion = Fusion(rule, {"a": 0.5, "b": 0.3, "c": 0.2})
        made = ensemble_of(fusion, scales)
        expected = [made.fuse({name: float(val.logits[name][k]) for name in "abc"}) for k in range(20)]
        assert fusion.fused(val.logits, scales)[:20] == pytest.approx(expected)


def ensemble_of(fusion: Fusion, scales: Any) -> Any:
    from detectors.ensemble import Ensemble, Part

    parts = tuple(
        Part(name, "1", name * 64, weight, 1 / scales[name][0], scales[name][1])
        for name, weight in fusion.weights.items()
    )
    return Ensemble(fusion.rule, parts, Calibration.identity())


def test_without_proof_the_even_mean_stands() -> None:
    val = panel(80, 31, {"a": 2.0, "b": 2.0})
    fusion, report = choose(val, {"swap": panel(60, 32, {"a": 2.0, "b": 2.0})})
    assert fusion == Fusion(Rule.MEAN, {"a": 0.5, "b": 0.5})
    assert report["ensemble"]["val_auc"] > max(one["val_auc"] for one in report["members"].values())
    compared = report["against_best_member"]["swap"]
    assert compared["interval"][0] <= compared["difference"] <= compared["interval"][1]
    assert choose(val, {})[0] == fusion


def test_a_cascade_that_follows_every_suspicion_up_comes_near_the_ensemble() -> None:
    val = panel(80, 42, {"a": 2.5, "b": 2.0})
    _, report = choose(val, {"swap": panel(60, 43, {"a": 2.0, "b": 2.0})})
    cascade, alone = report["cascade"], report["members"]
    assert cascade["always"] == max(alone, key=lambda name: alone[name]["val_auc"])
    rare, *_, often = cascade["rows"]
    assert rare["read_by_all"]["val"] < often["read_by_all"]["val"] < 1
    assert often["auc"]["swap"] > alone[cascade["always"]]["family_auc"]["swap"]
    assert often["auc"]["swap"] == pytest.approx(report["ensemble"]["family_auc"]["swap"], abs=0.05)


def test_a_rule_that_is_better_on_strangers_beyond_chance_is_taken() -> None:
    # "a" sees one family, "b" the other, and each is blind to what is not its own
    val = panel(80, 33, {"a": 2.0, "b": 2.0})
    strangers = {"swap": panel(300, 34, {"a": 5.0, "b": 0.0}), "lips": panel(300, 35, {"a": 4.0, "b": 0.2})}
    fusion, report = choose(val, strangers)
    assert fusion != Fusion(Rule.MEAN, {"a": 0.5, "b": 0.5})
    assert report["gain_of_the_best_tried_on_the_worst_family"][0] > 0
    assert min(fusion.weights.values()) >= 0.2
    assert report["ensemble"]["val_auc"] >= report["val_auc_allowed_from"]


@pytest.mark.parametrize("names", ["a", "abcdef"])
def test_one_member_and_six_are_no_ensemble(names: str) -> None:
    with pytest.raises(ValueError, match="expected two to 5"):
        choose(panel(20, 36, dict.fromkeys(names, 2.0)), {})


def test_a_family_without_authentic_faces_is_refused() -> None:
    whole = panel(20, 37, {"a": 2.0, "b": 2.0})
    with pytest.raises(ValueError, match="family swap"):
        choose(whole, {"swap": whole.of(whole.labels == 1)})


def test_an_ensemble_fitted_whole() -> None:
    strength = {"a": 3.0, "b": 3.0, "c": 2.0}
    val = panel(104, 38, strength)
    clips = [(dict.fromkeys(strength, track), 0, number) for number, track in enumerate(tracks(21, 39))]
    fit: EnsembleFit = fit_ensemble(
        {name: ("1", name * 64) for name in strength},
        val,
        {"swap": panel(50, 40, strength)},
        clips,
        "made up",
        further={"studio": panel(60, 41, strength)},
        tested_for=("swaps",),
    )
    calibration = fit.ensemble.calibration
    assert calibration.made_for == fit.ensemble.digest
    assert calibration.tested_for == ("swaps",)
    assert calibration.disagreement is not None
    fused = np.array(
        [
            fit.ensemble.fuse({name: float(val.logits[name][k]) for name in strength})
            for k in range(len(val.labels))
        ]
    )
    probability = np.array([calibration.probability(x) for x in fused])
    assert probability[val.labels == 1].mean() > 0.8 > 0.2 > probability[val.labels == 0].mean()
    between = [
        calibration.disagreement.between({name: float(val.logits[name][k]) for name in strength}) or 0.0
        for k in range(len(val.labels))
    ]
    assert np.mean(np.array(between) > calibration.disagreement.limit) <= 0.03
    assert fit.report["fusion"]["against_best_member"]["val"]["difference"] > 0
