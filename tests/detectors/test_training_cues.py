"""Which cues have a say: a made-up one that helps enters, chance, cost and few people keep one out."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from detectors.calibration import Calibration
from detectors.cues import Cue, missing
from detectors.ensemble import Ensemble, Part, Rule
from detectors.late import Late, load_late, shift_of
from detectors.readings import Image
from detectors.training import cues as training
from detectors.training.cues import Readings, crossed, decide, platt, to_file, told
from detectors.training.data import DataError
from detectors.training.strangers import StrangerFamily, Strangers

PEOPLE = 120


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests ask of an interval takes no thousand."""
    monkeypatch.setattr(training, "DRAWS", 100)


def looks(**cues: NDArray[np.float64]) -> Readings:
    """Two families; the ensemble tells a little."""
    labels = truth()
    rng = np.random.default_rng(1)
    return Readings(
        family=np.repeat(np.array(["cloned", "restored"]), len(labels) // 2),
        labels=labels,
        identity=np.tile(np.arange(PEOPLE), 4),
        fused=rng.normal(size=len(labels)) + 0.8 * labels,
        cues=cues,
        milliseconds={"ensemble": 20.0, **dict.fromkeys(cues, 1.0)},
    )


def truth() -> NDArray[np.int64]:
    return np.tile(np.repeat(np.array([0, 1]), PEOPLE), 2)


def helpful(seed: int = 2, strength: float = -60.0) -> NDArray[np.float64]:
    """A cue that is low for manipulated faces, on a scale of its own."""
    return 500 + 40 * np.random.default_rng(seed).normal(size=4 * PEOPLE) + strength * truth()


def test_platt_scaling_finds_the_sign_and_the_scale() -> None:
    labels, identity = truth(), np.tile(np.arange(PEOPLE), 4)
    slope, bias = platt(helpful(), labels, identity)
    # of two normal distributions 60 apart with spread 40: 60 / 40^2 a unit, even in the middle
    assert slope == pytest.approx(-60 / 40**2, rel=0.25)
    assert slope * 470 + bias == pytest.approx(0, abs=0.3)


def test_a_cue_that_helps_enters_with_its_measurement(tmp_path: Path) -> None:
    noise = np.random.default_rng(5).normal(size=4 * PEOPLE)
    fusion, rows = decide([looks(ratios=helpful(), blink=noise)])
    assert fusion.names == ("ratios",)
    by_name = {row.name: row for row in rows}
    assert by_name["ratios"].gain["mean"]["interval"][0] > 0
    assert by_name["ratios"].reason == ""
    assert "does not exclude 0" in by_name["blink"].reason
    path = tmp_path / "late.json"
    path.write_text(json.dumps(to_file(fusion, rows)))
    again = load_late(path)
    assert again.names == ("ratios",)
    assert again.shares([Cue("ratios", 400.0)])[0].shift == pytest.approx(
        fusion.shares([Cue("ratios", 400.0)])[0].shift
    )
    assert [row["name"] for row in json.loads(path.read_text())["left_out"]] == ["blink"]
    table = told(rows)
    assert "has a say" in table[2]
    assert "left out: the gain's interval" in table[3]


def test_missing_cues_leave_their_looks_alone() -> None:
    values = helpful()
    values[::3] = np.nan
    readings = looks(ratios=values)
    moved = crossed(["ratios"], readings)
    assert np.array_equal(moved[::3], readings.fused[::3])
    assert (np.delete(moved, np.s_[::3]) != np.delete(readings.fused, np.s_[::3])).all()
    _, (row,) = decide([readings])
    assert row.missing == pytest.approx(1 / 3, abs=0.01)


def test_nobody_is_judged_by_a_fit_on_himself() -> None:
    """A number that is random for everybody but one tells nothing of the others."""
    values = np.random.default_rng(3).normal(size=4 * PEOPLE)
    readings = looks(ratios=values)
    other = looks(ratios=np.where(readings.identity == 7, 100.0 * truth(), values))
    apart = readings.identity % 5 == 7 % 5
    assert np.allclose(crossed(["ratios"], readings)[apart & (readings.identity != 7)],
                       crossed(["ratios"], other)[apart & (readings.identity != 7)])  # fmt: skip


def test_few_people_and_dear_cues_stay_out() -> None:
    few = helpful()
    few[looks().identity >= 40] = np.nan
    _, (row,) = decide([looks(lips=few)])
    assert row.reason == "read 40 people, 50 are needed"
    readings = looks(ratios=helpful(), lips=helpful(9, -70.0))
    dear = Readings(**{**fields(readings), "milliseconds": {"ensemble": 20.0, "ratios": 3.0, "lips": 3.0}})
    fusion, rows = decide([dear])
    assert fusion.names == ("lips",)  # the one that brings more
    assert "costs 15% of the ensemble's time, 5% are left" in {row.name: row.reason for row in rows}["ratios"]


def fields(readings: Readings) -> dict[str, Any]:
    return {name: getattr(readings, name) for name in Readings.__slots__}


def test_readings_survive_their_file() -> None:
    values = helpful()
    values[3] = math.nan
    readings = looks(ratios=values)
    again = Readings.from_json(json.loads(json.dumps(readings.to_json())))
    for name in ("family", "labels", "identity", "fused"):
        assert np.array_equal(getattr(again, name), getattr(readings, name))
    assert np.array_equal(again.cues["ratios"], values, equal_nan=True)
    assert again.milliseconds == readings.milliseconds


def test_readings_that_cannot_be() -> None:
    with pytest.raises(DataError, match="cue gait is unknown"):
        looks(gait=helpful())
    with pytest.raises(DataError, match="expected one number of them"):
        looks(ratios=helpful()[:5])
    with pytest.raises(DataError, match="expected milliseconds and looks"):
        Readings.from_json({"looks": []})
    with pytest.raises(DataError, match="cue ratios comes from two files"):
        decide([looks(ratios=helpful()), looks(ratios=helpful())])


def test_no_cue_is_no_shift() -> None:
    fusion, rows = decide([looks()])
    assert (fusion.names, rows) == ((), [])
    assert shift_of(Late().shares([Cue("ratios", 1.0)])) == 0.0


def test_what_is_collected_keeps_its_order_and_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strangers(family: StrangerFamily, first: int, people: int) -> Strangers:
        pictures = np.zeros((people, 8, 8, 3), np.uint8)
        real, fake = pictures.copy(), pictures.copy()
        for k in range(people):
            real[k], fake[k] = first + k, first + k + 100
        return Strangers(family, real, fake, 1.0, np.arange(people) + first)

    pairs = [
        strangers(family, first, 3)
        for first in (0, 50)  # two sources
        for family in (StrangerFamily.CLONED, StrangerFamily.RESTORED)
    ]
    read = []

    def logits(member: Any, data: Path, cache: Path) -> dict[str, NDArray[np.float32]]:
        """As `ship.read_strangers` orders them: the logit is the picture's grey level."""
        read.append(member.name)
        found: dict[str, list[NDArray[np.float32]]] = {}
        for one in pairs:
            for crops in (one.real, one.fake):
                found.setdefault(one.family, []).append(crops[:, 0, 0, 0].astype(np.float32))
        return {family: np.concatenate(parts) for family, parts in found.items()}

    part = Part("m", "1", "a" * 64, 1.0, 1.0, 0.0)
    monkeypatch.setattr(training, "list_members", lambda: ("m",))
    monkeypatch.setattr(training, "load_member", lambda name: SimpleNamespace(name=name))
    ensemble = Ensemble(Rule.MEAN, (part,), Calibration.identity())
    monkeypatch.setattr(training, "load_ensemble", lambda _: ensemble)
    monkeypatch.setattr(training, "stranger_pairs", lambda *_, each: pairs)
    monkeypatch.setattr(training, "read_strangers", logits)
    monkeypatch.setattr(training, "_engine_ms", lambda *_: 10.0)

    def level(crop: Image) -> Cue:
        return Cue("ratios", float(crop[0, 0, 0])) if crop[0, 0, 0] else missing("ratios", "black")

    monkeypatch.setattr(training, "CROP_CUES", {"ratios": level})
    found = training.collect(tmp_path, tmp_path)
    assert np.array_equal(found.fused, found.identity + 100 * found.labels)
    black = found.fused == 0
    assert np.count_nonzero(black) == 2  # picture 0 of both families
    assert np.isnan(found.cues["ratios"][black]).all()
    assert np.array_equal(found.cues["ratios"][~black], found.fused[~black])
    assert np.bincount(found.labels).tolist() == [12, 12]
    again = training.collect(tmp_path, tmp_path)
    assert np.array_equal(again.fused, found.fused)
    assert read == ["m"]
