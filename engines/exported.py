"""Networks as graphs that compilers take: float32 in and out, whatever they compute in, and any batch."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import max_pool2d, pad

from engines.eager import DTYPES
from engines.engine import Precision
from engines.hardware import Device

TRACED = 2
"""Inputs in the batch that is traced: of 0 or 1, `torch.export` would think that it is always so many."""


class _PaddedPool(nn.Module):
    """Max pooling that rounds its output up, as padding and pooling that rounds down; for sizes known when it
    is traced. torch-tensorrt 2.14 has no converter for rounding up, as MTCNN pools."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        assert isinstance(pool.kernel_size, int)
        assert isinstance(pool.stride, int)
        self.kernel, self.stride = pool.kernel_size, pool.stride

    def forward(self, values: Tensor) -> Tensor:
        """(N, C, h, w) in, (N, C, h', w') out, as the pooling's."""
        below, right = self._lacking(values.shape[2]), self._lacking(values.shape[3])
        padded = pad(values, (0, right, 0, below), value=-math.inf) if below or right else values
        return max_pool2d(padded, self.kernel, self.stride)

    def _lacking(self, size: int) -> int:
        """How much the last window reaches over the edge; one that would begin behind it is none."""
        windows = -(-(size - self.kernel) // self.stride) + 1
        if (windows - 1) * self.stride >= size:
            windows -= 1
        return max(0, (windows - 1) * self.stride + self.kernel - size)


def without_ceil(module: nn.Module) -> nn.Module:
    """Replace in place, and return, what cannot be converted by what computes the same: see `_PaddedPool`."""
    for name, part in module.named_children():
        plain = isinstance(part, nn.MaxPool2d) and (part.padding, part.dilation) == (0, 1)
        if isinstance(part, nn.MaxPool2d) and plain and part.ceil_mode:
            setattr(module, name, _PaddedPool(part))
        else:
            without_ceil(part)
    return module


class InPrecision(nn.Module):
    """A copy of a network in a precision, layout and on a device, without gradients."""

    def __init__(
        self, module: nn.Module, precision: Precision, device: Device, layout: torch.memory_format
    ) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        own = without_ceil(copy.deepcopy(module).eval().requires_grad_(False))
        self.module = own.to(dtype=self.dtype, device=device).to(memory_format=layout)

    def forward(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        """As the network's; converting is part of the graph: compilers join it to what is next to it."""
        logits, attention = self.module(faces.to(self.dtype))
        return logits.float(), attention.float()


def exported(
    module: nn.Module,
    precision: Precision,
    device: Device,
    batch: int,
    example: Tensor,
    layout: torch.memory_format,
) -> ExportedProgram:
    """Return the network's graph for batches of 1 to `batch`; `example` is one input (1, 3, S, S).

    Compilers bind what they make to the `layout` of inputs. TensorRT chooses layouts itself, and of channels
    last `torch.export` makes `as_strided`, for which there is no converter. Raises what `torch.export` raises
    for a network that cannot be traced.
    """
    count = TRACED if batch > 1 else 1
    traced = example[:1].expand(count, -1, -1, -1).to(device).clone(memory_format=layout)
    sizes = ({0: Dim("batch", min=1, max=batch)},) if batch > 1 else None
    with torch.no_grad():
        return torch.export.export(
            InPrecision(module, precision, device, layout).eval(), (traced,), dynamic_shapes=sizes
        )


def powers(batch: int) -> list[int]:
    """Return 1, 2, 4 ... and `batch`: what batches are filled up to where each size costs memory."""
    return [size for k in range(batch.bit_length()) if (size := 1 << k) < batch] + [batch]
