"""The gate weighs positions, nothing else."""

import torch

from detectors.attention import AttentionGate


def test_features_are_multiplied_by_the_map() -> None:
    gate = AttentionGate(5)
    features = torch.randn(2, 5, 4, 3)
    gated, attention = gate(features)
    assert attention.shape == (2, 4, 3)
    torch.testing.assert_close(gated, features * attention[:, None])


def test_starts_nearly_open() -> None:
    _, attention = AttentionGate(5)(torch.zeros(1, 5, 2, 2))
    assert attention.min() > 0.7


def test_a_closed_gate_lets_nothing_through() -> None:
    gate = AttentionGate(3)
    torch.nn.init.constant_(gate.conv.bias, -50.0)  # type: ignore[arg-type]
    gated, _ = gate(torch.ones(1, 3, 2, 2))
    assert gated.abs().max() < 1e-10
