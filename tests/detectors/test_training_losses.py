"""Losses, triplets, the walk to the worst point nearby, teachers, the mask head, the plateau."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from detectors.backbones import Architecture, FaceNetwork
from detectors.calibration import Calibration
from detectors.crops import CropKind, CropPolicy
from detectors.members import Member
from detectors.training import distil
from detectors.training.distil import TeacherError, Teachers, distillation_loss, load_teachers
from detectors.training.heads import MaskHead
from detectors.training.losses import (
    ARCFACE_MARGIN,
    RECOGNITION_SCALE,
    am_softmax,
    arcface,
    batch_hard,
    cross_entropy,
    mask_loss,
    triplets,
)
from detectors.training.sam import at_the_worst_nearby, frozen_statistics
from detectors.training.schedule import PLATEAU_PATIENCE, Plateau
from detectors.training.triplets import random_triplets, separation

LABELS = torch.tensor([0.0, 1.0])


def logit_of(cosine: float, label: float) -> torch.Tensor:
    return torch.tensor([2 * RECOGNITION_SCALE * cosine * (1 if label else -1)])


def test_smoothing_draws_labels_towards_a_half() -> None:
    logits = torch.tensor([-2.0, 2.0])
    expected = -(0.95 * math.log(1 / (1 + math.exp(-2))) + 0.05 * math.log(1 / (1 + math.exp(2))))
    assert float(cross_entropy(logits, LABELS, 0.1)) == pytest.approx(expected)


# -- recognition losses


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_am_softmax_is_the_two_class_softmax_with_a_margin(label: float) -> None:
    s, m, cosine = RECOGNITION_SCALE, 0.35, 0.4
    right, wrong = math.exp(s * (cosine - m)), math.exp(-s * cosine)
    loss = am_softmax(logit_of(cosine, label), torch.tensor([label]))
    assert float(loss) == pytest.approx(-math.log(right / (right + wrong)), rel=1e-5)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_arcface_is_the_two_class_softmax_with_a_margin_on_the_angle(label: float) -> None:
    s, cosine = RECOGNITION_SCALE, 0.4
    right = math.exp(s * math.cos(math.acos(cosine) + ARCFACE_MARGIN))
    loss = arcface(logit_of(cosine, label), torch.tensor([label]))
    assert float(loss) == pytest.approx(-math.log(right / (right + math.exp(-s * cosine))), rel=1e-4)


def test_arcface_always_pulls_towards_the_right_class() -> None:
    cosines = torch.linspace(-1, 1, 201)
    losses = torch.stack([arcface(logit_of(float(c), 1.0), torch.ones(1)) for c in cosines])
    assert bool((losses.diff() <= 1e-6).all())
    logits = torch.tensor([2 * RECOGNITION_SCALE, -2 * RECOGNITION_SCALE], requires_grad=True)
    arcface(logits, torch.ones(2)).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


# -- triplets


def test_every_crop_is_in_one_triplet_of_its_kind() -> None:
    index = random_triplets(6, np.random.default_rng(1))
    assert sorted(index.ravel()) == list(range(12))
    fake = index >= 6
    assert fake[0::2].tolist() == [[True, True, False]] * 2
    assert fake[1::2].tolist() == [[False, False, True]] * 2
    with pytest.raises(ValueError, match="4 pairs: expected a multiple of 3"):
        random_triplets(4, np.random.default_rng(1))


def test_the_triplet_hinge_is_euclidean_and_not_normalised() -> None:
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 5.5]])
    loss = triplets(features, torch.tensor([[0, 1, 2]]), margin=1.0)
    assert float(loss) == pytest.approx(5 - 5.5 + 1, abs=1e-4)


def test_batch_hard_takes_the_farthest_companion_and_the_nearest_stranger() -> None:
    features = torch.tensor([[0.0], [3.0], [1.0], [10.0]], requires_grad=True)
    loss = batch_hard(features, torch.tensor([0, 0, 1, 1]), margin=1.0)
    assert float(loss.detach()) == pytest.approx(((3 - 1 + 1) + (3 - 2 + 1) + (9 - 1 + 1) + (9 - 7 + 1)) / 4)
    loss.backward()  # type: ignore[no-untyped-call]
    assert bool(torch.isfinite(features.grad).all())  # type: ignore[arg-type]


def test_batch_hard_survives_equal_features() -> None:
    features = torch.zeros(4, 3, requires_grad=True)
    batch_hard(features, torch.tensor([0, 0, 1, 1]), margin=1.0).backward()  # type: ignore[no-untyped-call]
    assert bool(torch.isfinite(features.grad).all())  # type: ignore[arg-type]


def test_separation_is_measured_on_other_people() -> None:
    rng = np.random.default_rng(2)
    identity = np.repeat(np.arange(40), 2)
    labels = np.tile([0, 1], 40)
    noise = rng.normal(size=(80, 200))
    assert separation(noise + labels[:, None] * 0.5, labels, identity) > 0.95
    assert 0.3 < separation(noise, labels, identity) < 0.7
    assert math.isnan(separation(noise, labels, np.zeros(80, np.int64)))


# -- sharpness-aware minimisation


def test_the_worst_point_nearby_is_up_the_gradient_and_the_way_back_exact() -> None:
    weight = nn.Parameter(torch.tensor([0.3, -0.7]))
    loss = (weight**2).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    before, gradient = weight.detach().clone(), 2 * weight.detach()
    with at_the_worst_nearby([weight], rho=0.05):
        torch.testing.assert_close(weight.detach(), before + 0.05 * gradient / gradient.norm())
        assert weight.grad is None
    assert torch.equal(weight.detach(), before)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([math.inf, 1.0])
    with at_the_worst_nearby([weight], rho=0.05):
        assert torch.equal(weight.detach(), torch.ones(2))


def test_a_batch_is_counted_once_by_the_norms() -> None:
    norm = nn.BatchNorm1d(3)
    x = torch.randn(8, 3) + 5
    norm(x)
    mean = norm.running_mean.clone()  # type: ignore[union-attr]
    with frozen_statistics(norm):
        norm(x)
    assert torch.equal(norm.running_mean, mean)  # type: ignore[arg-type]
    assert int(norm.num_batches_tracked) == 1  # type: ignore[arg-type]
    norm(x)
    assert not torch.equal(norm.running_mean, mean)  # type: ignore[arg-type]


# -- teachers


class Brightness(nn.Module):
    """A teacher that answers with the mean of its input times `gain`."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gain * x.mean((1, 2, 3)), x[:, 0]


POLICY = CropPolicy(CropKind.TIGHT, size=32, side=0.81, shift=0.06)


def teacher(gain: float, policy: CropPolicy) -> Member:
    module = Brightness(gain).eval()
    return Member("bright", "1", policy, module, Calibration.identity(), "", "Apache-2.0", {})


def test_teachers_of_any_size_are_averaged_over_the_same_crops() -> None:
    images = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (40, 200)])
    alone = Teachers((teacher(1.0, POLICY),), torch.device("cpu")).logits(images)
    both = Teachers((teacher(1.0, POLICY), teacher(3.0, POLICY.at_size(64))), torch.device("cpu"))
    torch.testing.assert_close(both.logits(images), 2 * alone)


def test_a_teacher_of_another_framing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"loose": replace(POLICY, side=1.3), "larger": POLICY.at_size(48)}
    monkeypatch.setattr(distil, "load_member", lambda name: teacher(1.0, known[name]))
    assert load_teachers(["larger"], POLICY, torch.device("cpu")).members[0].policy.size == 48
    with pytest.raises(TeacherError, match=r"teachers: bright: its crops are .*side=1\.3"):
        load_teachers(["larger", "loose"], POLICY, torch.device("cpu"))


def test_a_student_that_agrees_loses_nothing() -> None:
    taught = torch.tensor([-3.0, 0.5, 8.0])
    assert float(distillation_loss(taught, taught, 4.0)) == pytest.approx(0, abs=1e-5)
    student = taught.clone().requires_grad_()
    distillation_loss(student + 1, taught, 4.0).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert bool((student.grad > 0).all())


# -- the mask head


def test_the_mask_head_reads_what_the_network_saw_last() -> None:
    network = FaceNetwork(Architecture("tf_efficientnet_lite0", attention_block=4))
    head = MaskHead(network)
    with pytest.raises(RuntimeError, match="read no batch"):
        head()
    network.train()
    network(torch.randn(2, 3, 64, 64))
    cells = head()
    assert cells.shape == (2, 4, 4)
    cells.sum().backward()
    assert network.net.conv_stem.weight.grad is not None
    assert not any(name.startswith("conv.") for name in network.state_dict())


def test_an_unknown_mask_counts_nothing() -> None:
    predicted = torch.zeros(3, 20, 20)
    masks = torch.stack([torch.ones(10, 10), torch.zeros(10, 10), torch.full((10, 10), math.nan)])
    assert float(mask_loss(predicted, masks)) == pytest.approx(math.log(2))
    predicted[2] = 100
    assert float(mask_loss(predicted, masks)) == pytest.approx(math.log(2))
    assert float(mask_loss(predicted, masks[2:].expand(3, -1, -1))) == 0
    predicted[0], predicted[1] = 20, -20
    assert float(mask_loss(predicted, masks)) == pytest.approx(0, abs=1e-6)
    predicted.requires_grad_()
    mask_loss(predicted, masks).backward()  # type: ignore[no-untyped-call]
    assert predicted.grad is not None
    assert bool(torch.isfinite(predicted.grad).all())


# -- the plateau


def test_the_rate_falls_when_the_loss_has_not_for_long_enough() -> None:
    plateau = Plateau(1e-5)
    assert plateau.validated(0.7)
    for _ in range(PLATEAU_PATIENCE):
        assert not plateau.validated(0.7)
    assert plateau.rate == 1e-5
    plateau.validated(math.nan)
    assert plateau.rate == pytest.approx(1e-6)
    assert plateau.stale == PLATEAU_PATIENCE + 1
    assert plateau.validated(0.6)


def test_the_training_ends_at_the_lowest_rate() -> None:
    plateau = Plateau(1e-5)
    validations = 0
    while not plateau.exhausted and validations < 100:
        plateau.validated(1.0)
        validations += 1
    assert validations == 1 + 5 * (PLATEAU_PATIENCE + 1)
