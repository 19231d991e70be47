"""When a window accuses, when it acquits, when it says that it cannot tell."""

import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detectors.calibration import Autocorrelation, Calibration, ConformalSet, Disagreement, Sets
from detectors.readings import Reason
from stream.config import Verdict as Settings
from stream.verdicts import (
    TRANSITIONS,
    Hysteresis,
    Judgement,
    Phase,
    Sampled,
    Verdict,
    correlation_s,
    judge,
    worst,
)
from stream.windows import CORRELATION_S, Estimate
from tests.stream.story import CALIBRATION

SETTINGS = Settings()
SECOND = 1_000_000


def looked(
    logit: float, good: int = 20, samples: int | None = None, seconds: float = 9.5, **more: object
) -> Estimate:
    found = Estimate(
        logit=logit,
        members={"m": logit},
        n_eff=5.0,
        spread=0.5,
        samples=good if samples is None else samples,
        good=good,
        span_us=round(seconds * SECOND),
        first_us=0,
        last_us=round(seconds * SECOND),
        onset_us=None,
        reasons=(),
    )
    return replace(found, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("logit", "verdict", "reasons"),
    [
        (6.0, Verdict.MANIPULATED, ()),
        (2.3, Verdict.MANIPULATED, ()),
        (2.1, Verdict.INCONCLUSIVE, (Reason.AMBIGUOUS,)),
        (0.0, Verdict.INCONCLUSIVE, (Reason.AMBIGUOUS,)),
        (-1.0, Verdict.INCONCLUSIVE, (Reason.AMBIGUOUS,)),
        (-6.0, Verdict.AUTHENTIC, ()),
    ],
)
def test_three_ways(logit: float, verdict: Verdict, reasons: tuple[Reason, ...]) -> None:
    judgement = judge(looked(logit), CALIBRATION, SETTINGS)
    assert (judgement.verdict, judgement.reasons, judgement.sufficient) == (verdict, reasons, True)
    assert judgement.probability == pytest.approx(1 / (1 + math.exp(-logit)))


def test_half_a_face_is_judged_by_the_calibration_of_who_read_it() -> None:
    own = replace(CALIBRATION, scales=(replace(CALIBRATION.scales[0], temperature=3.0),))
    with_half = replace(CALIBRATION, halves={"upper": own})
    assert judge(looked(6.0), with_half, SETTINGS) == judge(looked(6.0), CALIBRATION, SETTINGS)
    covered = judge(looked(6.0, half="upper"), with_half, SETTINGS)
    assert covered == judge(looked(6.0), own, SETTINGS)
    assert covered.verdict is Verdict.INCONCLUSIVE
    assert "halves" not in with_half.to_json()


def test_a_strong_score_that_is_not_well_founded_accuses_nobody() -> None:
    wide = replace(CALIBRATION, tau=2.0)
    judgement = judge(looked(3.0), wide, SETTINGS)
    assert judgement.probability is not None
    assert judgement.probability > SETTINGS.open_probability
    assert judgement.lower < 0.5
    assert judgement.reasons == (Reason.AMBIGUOUS,)


def test_an_interval_never_shrinks_below_the_spread_between_people() -> None:
    for_ever = judge(looked(2.0, n_eff=1e9), CALIBRATION, SETTINGS)
    assert for_ever.interval is not None
    low, high = (math.log(end / (1 - end)) for end in for_ever.interval)
    assert SETTINGS.level == 0.9
    assert (high - low) / 2 == pytest.approx(1.645 * CALIBRATION.tau, rel=1e-3)


def test_scores_that_jump_about_are_worth_fewer_looks() -> None:
    steady = judge(looked(3.0, spread=1.0), CALIBRATION, SETTINGS)
    jumping = judge(looked(3.0, spread=4.0), CALIBRATION, SETTINGS)
    assert (steady.n_eff, jumping.n_eff) == (5.0, 1.25)
    assert jumping.lower < steady.lower


@pytest.mark.parametrize(
    ("found", "sampled", "reason"),
    [
        (None, Sampled(), Reason.NO_FACE),
        (None, Sampled(0.2), Reason.STALE),
        (None, Sampled(0.2, corrupt=True), Reason.CORRUPT),
        (looked(6.0, good=4), Sampled(), Reason.SHORT_TRACK),
        (looked(6.0, good=30, seconds=1.9), Sampled(), Reason.SHORT_TRACK),
        (looked(6.0), Sampled(0.49), Reason.STALE),
        (looked(-6.0), Sampled(0.49), Reason.STALE),
        (looked(6.0), Sampled(0.49, corrupt=True), Reason.CORRUPT),
        (looked(6.0, good=9, samples=20, reasons=(Reason.BLUR, Reason.POSE)), Sampled(), Reason.BLUR),
        (looked(-6.0, good=0, samples=20, reasons=(Reason.LOW_LIGHT,)), Sampled(), Reason.LOW_LIGHT),
    ],
)
def test_without_evidence_enough_nothing_is_decided(
    found: Estimate | None, sampled: Sampled, reason: Reason
) -> None:
    judgement = judge(found, CALIBRATION, SETTINGS, sampled)
    assert (judgement.verdict, judgement.reasons) == (Verdict.INCONCLUSIVE, (reason,))
    assert not judgement.sufficient
    assert (judgement.probability is None) == (found is None)


def test_the_edges_of_the_evidence_are_enough() -> None:
    edge = looked(6.0, good=5, samples=10, seconds=2.0, reasons=(Reason.BLUR,))
    assert judge(edge, CALIBRATION, SETTINGS, Sampled(0.5)).verdict is Verdict.MANIPULATED


SETS = Sets(
    0.02,
    0.1,
    104,
    104,
    authentic=tuple(-3.0 + 0.05 * k for k in range(99)),  # .98 at 1.85
    manipulated=tuple(-1.0 + 0.05 * k for k in range(99)),  # .10 at -0.55
)
WITH_SETS = replace(CALIBRATION, sets=SETS)


@pytest.mark.parametrize(
    ("logit", "verdict", "reasons"),
    [
        (9.0, Verdict.MANIPULATED, ()),
        (2.3, Verdict.MANIPULATED, ()),  # its interval reaches below even, and does not decide
        (2.1, Verdict.INCONCLUSIVE, (Reason.AMBIGUOUS,)),  # none of the authentic, and below .9
        (1.8, Verdict.INCONCLUSIVE, (Reason.AMBIGUOUS,)),
        (-0.5, Verdict.INCONCLUSIVE, (Reason.AMBIGUOUS,)),
        (-0.6, Verdict.AUTHENTIC, ()),
        (-9.0, Verdict.AUTHENTIC, ()),
    ],
)
def test_sets_decide_where_there_are_any(logit: float, verdict: Verdict, reasons: tuple[Reason, ...]) -> None:
    wide = replace(WITH_SETS, tau=2.0)
    judgement = judge(looked(logit), wide, SETTINGS)
    assert (judgement.verdict, judgement.reasons, judgement.sufficient) == (verdict, reasons, True)
    assert judgement.conformal is SETS.of(logit)


def test_what_belongs_to_neither_class_is_atypical() -> None:
    apart = replace(SETS, manipulated=tuple(6.0 + 0.05 * k for k in range(99)))
    judgement = judge(looked(4.0), replace(CALIBRATION, sets=apart), SETTINGS)
    assert (judgement.verdict, judgement.reasons) == (Verdict.INCONCLUSIVE, (Reason.ATYPICAL,))


def test_no_set_makes_a_face_authentic_that_leans_the_other_way() -> None:
    careless = replace(SETS, manipulated=tuple(5.0 + 0.05 * k for k in range(99)))
    judgement = judge(looked(1.0), replace(CALIBRATION, sets=careless), SETTINGS)
    assert judgement.conformal is ConformalSet.AUTHENTIC
    assert (judgement.verdict, judgement.reasons) == (Verdict.INCONCLUSIVE, (Reason.AMBIGUOUS,))


def test_an_alarm_takes_more_than_one_persons_face_explains() -> None:
    wide = replace(WITH_SETS, tau=2.0)
    verdict = judge(looked(3.0), wide, SETTINGS)
    assert verdict.verdict is Verdict.MANIPULATED
    assert not verdict.alarming
    assert verdict.watched().verdict is Verdict.INCONCLUSIVE
    assert verdict.watched().reasons == (Reason.AMBIGUOUS,)
    hysteresis = Hysteresis(SETTINGS)
    for step in range(20):
        hysteresis.step(step * SECOND, verdict)
    assert not hysteresis.accused
    alarm = judge(looked(3.0), WITH_SETS, SETTINGS)
    assert alarm.alarming
    assert alarm.watched() is alarm
    for step in range(20, 40):
        hysteresis.step(step * SECOND, alarm)
    assert hysteresis.accused


AGREEMENT = Disagreement(1.5, {"m": (1.0, 0.0), "n": (2.0, 0.0)})


@pytest.mark.parametrize(
    ("members", "between", "reasons"),
    [
        ({"m": 6.0, "n": 0.2}, 0.0, ()),
        ({"m": 6.0, "n": -2.8}, 1.4, ()),
        ({"m": 6.0, "n": -3.2}, 1.6, (Reason.DISAGREEMENT,)),
        ({"m": 6.0, "shadow": -9.0}, None, ()),
    ],
)
def test_members_that_contradict_each_other_decide_nothing(
    members: dict[str, float], between: float | None, reasons: tuple[Reason, ...]
) -> None:
    for logit in (6.0, -6.0):
        judgement = judge(
            looked(logit, members=members), replace(WITH_SETS, disagreement=AGREEMENT), SETTINGS
        )
        assert judgement.reasons == reasons
        assert judgement.disagreement == (None if between is None else pytest.approx(between))
        assert judgement.sufficient


def test_errors_fade_as_measured_else_as_a_prudent_default_says() -> None:
    assert correlation_s(CALIBRATION) == CORRELATION_S
    measured = replace(CALIBRATION, rho=Autocorrelation(0.25, (0.5, 0.25), 30))
    assert correlation_s(measured) == pytest.approx(0.25 / math.log1p(1 / 0.75))


@pytest.mark.parametrize("logit", [-9.0, 9.0])
def test_uncalibrated_nothing_is_decided_but_the_score_is_told(logit: float) -> None:
    judgement = judge(looked(logit), Calibration.identity(), SETTINGS)
    assert (judgement.verdict, judgement.reasons) == (Verdict.INCONCLUSIVE, (Reason.UNCALIBRATED,))
    assert not judgement.sufficient
    assert judgement.probability == pytest.approx(1 / (1 + math.exp(-logit)))


@given(st.floats(-20, 20), st.integers(0, 40), st.integers(0, 40), st.floats(0, 12), st.floats(0, 1))
def test_no_accusation_without_everything_that_it_needs(
    logit: float, good: int, bad: int, seconds: float, share: float
) -> None:
    found = looked(
        logit, good=good, samples=good + bad, seconds=seconds, reasons=(Reason.BLUR,) if bad else ()
    )
    judgement = judge(found, CALIBRATION, SETTINGS, Sampled(share))
    if judgement.verdict is Verdict.INCONCLUSIVE:
        assert judgement.reasons
        return
    assert good >= 5
    assert good >= bad
    assert seconds >= 2.0
    assert share >= 0.5
    assert judgement.interval is not None
    low, high = judgement.interval
    assert low > 0.5 or high < 0.5


def phases(drawn: str, step_s: float = 0.5) -> str:
    """Draw the phases that follow the judgements: M manipulated, a authentic, ? ambiguous, u unusable."""
    readings = {
        "M": judge(looked(6.0), CALIBRATION, SETTINGS),
        "a": judge(looked(-6.0), CALIBRATION, SETTINGS),
        "?": judge(looked(1.0), CALIBRATION, SETTINGS),
        "u": judge(looked(6.0, good=1), CALIBRATION, SETTINGS),
    }
    hysteresis = Hysteresis(SETTINGS)
    signs = {Phase.CALM: ".", Phase.RISING: "/", Phase.OPEN: "#", Phase.FALLING: "\\"}
    return "".join(
        signs[hysteresis.step(round(index * step_s * SECOND), readings[sign])]
        for index, sign in enumerate(drawn)
    )


def test_hysteresis_opens_after_its_hold_and_closes_after_its_own() -> None:
    # half a second a sign; open_hold_s 1.5, close_hold_s 8
    assert phases("aaMMMMMMaaaaaaaaaaaaaaaaaaa") == r"..///###\\\\\\\\\\\\\\\\..."


def test_any_doubt_before_the_accusation_begins_the_hold_anew() -> None:
    assert phases("MMM?MMMMM") == "///.///##"
    assert phases("MMMuMMMMM") == "///.///##"


def test_bad_pictures_neither_clear_nor_hold_an_accusation() -> None:
    assert phases("MMMM" + "u" * 30) == "///" + "#" * 31
    assert phases("MMMMa" + "u" * 30 + "a") == "///#" + "\\" * 31 + "."


def test_ambiguous_scores_in_between_keep_it_open() -> None:
    # 1.0 is a probability of .73: below open_probability, above close_probability
    assert phases("MMMMaaaa????aa") == r"///#\\\\####\\"


@given(st.text("Ma?u", max_size=60))
def test_transitions_are_legal_and_accusations_held(drawn: str) -> None:
    found = phases(drawn)
    signs = {".": Phase.CALM, "/": Phase.RISING, "#": Phase.OPEN, "\\": Phase.FALLING}
    before = Phase.CALM
    for sign in found:
        after = signs[sign]
        assert after is before or after in TRANSITIONS[before]
        before = after
    first_open = found.find("#")
    if first_open >= 0:
        assert drawn[first_open - 3 : first_open + 1] == "MMMM"


def test_what_is_held_back_reads_as_ambiguous_and_what_is_open_as_manipulated() -> None:
    hysteresis = Hysteresis(SETTINGS)
    strong, calm = judge(looked(6.0), CALIBRATION, SETTINGS), judge(looked(-6.0), CALIBRATION, SETTINGS)
    hysteresis.step(0, strong)
    assert hysteresis.apply(strong).reasons == (Reason.AMBIGUOUS,)
    hysteresis.step(2 * SECOND, strong)
    hysteresis.step(3 * SECOND, calm)
    assert hysteresis.phase is Phase.FALLING
    assert hysteresis.apply(calm).verdict is Verdict.MANIPULATED
    restored = Hysteresis(SETTINGS)
    restored.restore(hysteresis.state())
    assert (restored.phase, restored.since_us) == (Phase.FALLING, 3 * SECOND)


def test_a_stream_is_its_worst_face_that_could_be_decided() -> None:
    manipulated = judge(looked(6.0), CALIBRATION, SETTINGS)
    authentic = judge(looked(-6.0), CALIBRATION, SETTINGS)
    ambiguous = judge(looked(0.0), CALIBRATION, SETTINGS)
    short = judge(looked(6.0, good=1), CALIBRATION, SETTINGS)
    assert worst([authentic, manipulated, short]) == manipulated
    assert worst([authentic, short]).verdict is Verdict.AUTHENTIC
    assert worst([authentic, short]).reasons == (Reason.SHORT_TRACK,)
    assert worst([authentic, ambiguous]).verdict is Verdict.INCONCLUSIVE
    assert worst([short]).reasons == (Reason.SHORT_TRACK,)


def test_a_judgement_survives_json() -> None:
    judgement = judge(looked(6.0), CALIBRATION, SETTINGS)
    assert Judgement.from_json(asdict(judgement)) == judgement
    nothing = judge(None, CALIBRATION, SETTINGS)
    assert Judgement.from_json(asdict(nothing)) == nothing
