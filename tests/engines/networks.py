"""A small network of the shape members have."""

import torch
from torch import Tensor, nn

SIDE = 32


class Small(nn.Module):
    """Convolutions, a gate, one logit: (N, 3, S, S) in, (N,) and (N, S/4, S/4) out."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 16, 3, 2, 1), nn.SiLU()
        )
        self.gate = nn.Conv2d(16, 1, 1)
        self.head = nn.Linear(16, 1)
        nn.init.normal_(self.head.weight, std=2.0)

    def forward(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        features = self.stem(faces)
        gate = torch.sigmoid(self.gate(features))
        return self.head((features * gate).mean(dim=(2, 3))).squeeze(1), gate.squeeze(1)


def inputs(count: int, seed: int = 1) -> Tensor:
    made = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return made.contiguous(memory_format=torch.channels_last)
