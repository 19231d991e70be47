"""Training of the cues over time, on series and pictures made up for the purpose."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from detectors.cues.burst import BLINK, EYES, MOTION, RATIOS
from detectors.cues.landmarks import LEFT_CORNERS, RIGHT_CORNERS, SIXTY_EIGHT, Mesh, normalised
from detectors.cues.motion import INPUTS, WINDOW, MotionModel
from detectors.cues.series import FaceLook, FaceSeries
from detectors.training import over_time
from detectors.training.bursts import LEFT_MOUTH, NOSE, RIGHT_MOUTH, BurstOf, _coded, face_of, swapped
from detectors.training.eigenfaces import Eigenfaces
from detectors.training.eyes import fit_eyes, fit_ratios, platt
from detectors.training.motion import MIRROR, fit_motion, logit_of, mirrored, write_motion

RNG = np.random.default_rng(3)


def separated(n: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows [2n, width] of two classes that differ in the first number, of four people."""
    y = np.repeat([0, 1], n)
    x = RNG.normal(0, 0.3, (2 * n, width))
    x[:, 0] += y
    return x, y, np.arange(2 * n) % 4


def test_the_machine_learns_what_differs_and_our_numbers_are_scikit_learn_s() -> None:
    svm = pytest.importorskip("sklearn.svm", reason="the extra train")
    x, y, person = separated(20, 5)
    made = fit_eyes(x, y, person)
    odds = np.array([made.log_odds(row) for row in x])
    assert odds[y == 1].min() > odds[y == 0].max() - 2
    assert (odds[y == 1] > 0).mean() > 0.8
    theirs = svm.SVC(C=1.0, gamma=0.2, class_weight="balanced").fit((x - made.mean) / made.spread, y)
    mine = [made.decision(row) for row in x]
    np.testing.assert_allclose(mine, theirs.decision_function((x - made.mean) / made.spread), atol=1e-9)


def test_a_machine_of_one_person_is_refused() -> None:
    x, y, _ = separated(4, 5)
    with pytest.raises(ValueError, match="two people"):
        fit_eyes(x, y, y)


def test_platt_s_sigmoid_is_steeper_for_what_separates_and_flat_for_what_is_reversed() -> None:
    y = np.repeat([0, 1], 30)
    good = platt(y + RNG.normal(0, 0.2, 60), y)
    poor = platt(y + RNG.normal(0, 2.0, 60), y)
    assert good[0] > poor[0] >= 0
    assert platt(-y + RNG.normal(0, 0.2, 60), y) == (0.0, 0.0)


def test_the_regression_finds_the_ratio_that_tells() -> None:
    x, y, _ = separated(40, 4)
    made = fit_ratios(x, y)
    assert made.weights[0] > 3 * max(map(abs, made.weights[1:]))
    assert made.log_odds(x[y == 1].mean(0)) > 1 > -1 > made.log_odds(x[y == 0].mean(0))


def test_the_mirror_is_one_and_knows_the_points() -> None:
    assert (MIRROR[MIRROR] == np.arange(68)).all()
    points = RNG.normal(0, 1, (468, 2)).astype(np.float32)
    for left, right in zip(SIXTY_EIGHT, np.array(SIXTY_EIGHT)[MIRROR], strict=True):
        points[right] = points[left] * (-1, 1) if left != right else points[left] * (0, 1)
    at = normalised(points)
    np.testing.assert_allclose(at[MIRROR] * (-1, 1), at, atol=1e-4)
    cut = RNG.normal(0, 1, (2, WINDOW, INPUTS)).astype(np.float32)
    np.testing.assert_array_equal(mirrored(mirrored(cut)), cut)


def test_motion_learns_a_tremble_and_is_read_as_written(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    y = np.arange(8) % 2
    cut = RNG.normal(0, 0.02, (8, WINDOW, INPUTS)).astype(np.float32)
    cut[y == 1, :, INPUTS // 2 :] *= 8
    losses: list[float] = []
    net, mean, spread = fit_motion(cut, y, epochs=8, told=lambda epoch, loss: losses.append(loss))
    assert losses[-1] < 0.9 * losses[0]
    odds = [logit_of(net, mean, spread, cut[k : k + 1]) for k in range(8)]
    assert min(odds[1::2]) > max(odds[::2])
    again, *_ = fit_motion(cut, y, epochs=8)
    assert logit_of(again, mean, spread, cut[:1]) == logit_of(net, mean, spread, cut[:1])
    with pytest.raises(ValueError, match="one class"):
        fit_motion(cut, np.zeros(8, np.int64))
    write_motion(tmp_path, net, mean, spread, {})
    times, points = np.arange(40) / 25, RNG.normal(0, 0.02, (40, 68, 2))
    assert np.isfinite(MotionModel(tmp_path).logit(times, points) or np.nan)


def mesh_at(x: float, y: float, size: float = 30.0) -> Mesh:
    points = np.random.default_rng(5).uniform(-1, 1, (468, 2)) * (0.8, 1.2)
    points[LEFT_CORNERS[0]], points[RIGHT_CORNERS[1]] = (-0.7, -0.4), (0.7, -0.4)
    points[NOSE], points[LEFT_MOUTH], points[RIGHT_MOUTH] = (0, 0.1), (-0.42, 0.65), (0.42, 0.65)
    irises = np.tile(np.array([[[-0.5, -0.4]], [[0.5, -0.4]]]), (1, 5, 1))
    contours = np.zeros((2, 16, 2))
    centre = np.array([x, y])
    placed = [(part * size + centre).astype(np.float32) for part in (points, contours, irises)]
    return Mesh(*placed)


def test_a_swap_through_time_keeps_its_draw_and_what_is_around_it() -> None:
    picture = np.asarray(np.random.default_rng(1).integers(0, 256, (160, 200, 3)), np.uint8)
    donor = [face_of(np.roll(picture, shift, 0), mesh_at(100, 80))[0] for shift in (0, 9)]
    faces = [face_of(np.roll(picture, k, 1), mesh_at(90 + k, 80))[0] for k in range(6)]
    eigenfaces = Eigenfaces.fitted(faces)
    still = [(k * 40_000, picture) for k in range(5)]
    meshes: list[Mesh | None] = [mesh_at(100, 80), mesh_at(100, 80), None, mesh_at(100, 80), mesh_at(100, 80)]
    made = [image for _, image in swapped(still, meshes, donor[:1], eigenfaces, seed=11)]
    assert (made[0] != picture).any()
    assert (made[0] == made[1]).all()
    assert (made[2] == picture).all()
    face, (x, y) = face_of(picture, mesh_at(100, 80))
    side = face.image.shape[0]
    outside = np.ones(picture.shape[:2], bool)
    outside[y : y + side, x : x + side] = False
    assert (made[0] == picture)[outside].all()
    other = [image for _, image in swapped(still[:1], meshes[:1], donor[:1], eigenfaces, seed=12)]
    assert (other[0] != made[0]).any()


def test_an_encoder_keeps_times_and_pictures_apart() -> None:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None].repeat(48, 0).repeat(3, 2)
    pictures = [(k * 33_000, np.roll(ramp, k, 1)) for k in range(5)]
    coded = _coded(pictures, 0, 0)
    assert [us for us, _ in coded] == [us for us, _ in pictures]
    assert all(image.shape == ramp.shape for _, image in coded)
    assert 0 < np.abs(coded[2][1].astype(int) - pictures[2][1]).mean() < 40


def burst(person: int, kind: str, trembling: float) -> BurstOf:
    rng = np.random.default_rng((person, len(kind)))
    series = FaceSeries()
    for k in range(60):
        numbers = rng.normal(np.array([0.25, 0.25, 0, 0, 0, 0, 0.1]), 0.005)
        numbers[2:6] *= 1 + 5 * trembling
        points = rng.normal(0, 0.01 + trembling / 50, (68, 2)).astype(np.float32)
        series.add(
            k * 40_000,
            FaceLook(numbers.astype(np.float32), points, (trembling,) * 4 if k % 12 == 0 else None),
        )
    return BurstOf(f"clip{person}", person, 0, kind, series, 0.0)


def test_cues_are_judged_on_people_that_they_were_not_fitted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="the extra train")
    monkeypatch.setattr(
        over_time, "motion_without", lambda bursts, held: pytest.fail("fitted though it is there")
    )
    bursts = [burst(p, "authentic", 0.0) for p in range(4)] + [burst(p, "simulated", 1.0) for p in range(4)]
    bursts.append(burst(9, "manipulated", 1.0))
    (tmp_path / "left-out-motion.json").write_text(json.dumps([0.0] * 8 + [None]))
    values = over_time.left_out(bursts, tmp_path)
    assert set(values) == {BLINK, EYES, MOTION, RATIOS}
    assert np.isnan(values[MOTION][-1])
    table = over_time.measured(bursts, values)
    assert table[RATIOS]["simulated"]["auc"] == 1.0
    assert table[RATIOS]["manipulated"]["people"] == 5
    assert table[MOTION]["simulated"]["auc"] == 0.5
    told = over_time.readings(bursts, values, {"ensemble": 10.0})
    assert len(told["looks"]) == 8
    assert told["looks"][0]["cues"][BLINK] == 0.0
