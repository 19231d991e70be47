"""Sharpness-aware minimisation: the gradient is taken at the worst point nearby.

Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", algorithm 1.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def at_the_worst_nearby(parameters: Iterable[nn.Parameter], rho: float) -> Iterator[None]:
    """Moves the parameters `rho` along their gradients, lets the caller take new ones there, and moves back.

    The gradients of the place they come from are dropped. A gradient that is not finite (a half precision
    scale too large) moves nothing. The way back is exact, to the bit.
    """
    moved = [p for p in parameters if p.grad is not None]
    origin = [p.detach().clone() for p in moved]
    gradients = [p.grad.float() for p in moved if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    step = torch.where(torch.isfinite(norm) & (norm > 0), rho / norm, torch.zeros_like(norm))
    with torch.no_grad():
        for parameter, gradient in zip(moved, gradients, strict=True):
            parameter.add_(torch.nan_to_num(gradient, 0, 0, 0) * step)
            parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(moved, origin, strict=True):
                parameter.copy_(before)


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Keeps batch norms from counting the same batch a second time; they still normalise by it."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    kept: list[tuple[float | None, Tensor | None]] = []
    for norm in norms:
        counted = norm.num_batches_tracked
        kept.append((norm.momentum, None if counted is None else counted.clone()))
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and counted is not None:
                norm.num_batches_tracked.copy_(counted)
