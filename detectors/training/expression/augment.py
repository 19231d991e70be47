"""Batches of expression faces: turned, shifted and partly wiped out, the same for the same seed and step."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

FLIP = 0.5
TURN = math.radians(15)
"""FER2013's faces are upright to about so much."""
SHIFT = 0.16
"""Of the half side (8 % of the side): detectors do not agree on a face's middle by more."""
SCALE = 0.15
"""Likewise on its size."""
CONTRAST = 0.25
"""Exponent of the grey levels, in natural logarithms: light and camera. Mean and deviation are evened out
later, the curve between is not."""
ERASE = 0.25
"""Share of the faces of which a patch is wiped out: hair, glasses, a finger."""
PATCH = (0.1, 0.35)
"""Its sides, shares of the face's."""


def batch_rows(count: int, size: int, seed: int, step: int) -> NDArray[np.int64]:
    """Which of `count` pictures are in batch `step`: every epoch takes each once, in an order of its own."""
    epoch, place = divmod(step, count // size)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[place * size : (place + 1) * size]


def augmented(faces: NDArray[np.uint8], size: int, rng: torch.Generator) -> Tensor:
    """uint8 [N, 48, 48] in, float32 [N, 1, size, size] in grey levels out; `rng` is a CPU generator.

    Turning, scaling, shifting, mirroring and enlarging are one bilinear sampling.
    """
    n = len(faces)
    grey = torch.from_numpy(np.ascontiguousarray(faces)).float().unsqueeze(1)
    grid = F.affine_grid(_affine(n, rng), [n, 1, size, size], align_corners=False)
    out = F.grid_sample(grey, grid, mode="bilinear", padding_mode="border", align_corners=False)
    exponent = torch.exp(_spread((n, 1, 1, 1), CONTRAST, rng))
    out = 255 * (out.clamp(0, 255) / 255) ** exponent
    return _erased(out, rng)


def _affine(n: int, rng: torch.Generator) -> Tensor:
    """float32 [n, 2, 3]: where each output place is taken from."""
    turn, scale = _spread((n,), TURN, rng), torch.exp(_spread((n,), SCALE, rng))
    mirror = torch.where(torch.rand(n, generator=rng) < FLIP, -1.0, 1.0)
    x, y = _spread((n,), SHIFT, rng), _spread((n,), SHIFT, rng)
    cosine, sine = torch.cos(turn) * scale, torch.sin(turn) * scale
    return torch.stack(
        [torch.stack([mirror * cosine, -sine, x], 1), torch.stack([mirror * sine, cosine, y], 1)], 1
    )


def _erased(faces: Tensor, rng: torch.Generator) -> Tensor:
    """Wipes a patch out of some, with one grey level of its own."""
    n, _, size, _ = faces.shape
    sides = PATCH[0] + (PATCH[1] - PATCH[0]) * torch.rand(n, 2, generator=rng)
    begin = torch.rand(n, 2, generator=rng) * (1 - sides)
    place = (torch.arange(size) + 0.5) / size
    inside = (place >= begin[..., None]) & (place < (begin + sides)[..., None])
    patch = inside[:, 0, :, None] & inside[:, 1, None, :]
    patch &= (torch.rand(n, generator=rng) < ERASE)[:, None, None]
    level = 255 * torch.rand(n, 1, 1, 1, generator=rng)
    return torch.where(patch[:, None], level, faces)


def _spread(shape: tuple[int, ...], most: float, rng: torch.Generator) -> Tensor:
    return most * (2 * torch.rand(shape, generator=rng) - 1)
