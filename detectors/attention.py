"""The attention map that both steers the network and explains it.

Source: Bonettini et al., "Video Face Manipulation Detection through Ensemble of CNNs", section on the
attention mechanism: one 1x1 convolution, a sigmoid, a product; learned from the classification loss alone.
"""

import torch
from torch import Tensor, nn

INITIAL_BIAS = 1.0
"""sigmoid(1) = .73: the gate starts nearly open, so that pretrained features survive the first steps."""


class AttentionGate(nn.Module):
    """Weighs every position of a feature map by one learned number between 0 and 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, kernel_size=1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.constant_(self.conv.bias, INITIAL_BIAS)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """float [N, C, h, w] in; the gated features of that shape and the map [N, h, w] in (0, 1) out."""
        gate = torch.sigmoid(self.conv(features))
        return features * gate, gate.squeeze(1)
