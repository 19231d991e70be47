"""Eager PyTorch: on the CPU in fp32 the reference every other engine is measured by."""

import copy
import threading
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.hardware import Device

if TYPE_CHECKING:
    from engines.engine import Precision

DTYPES: "dict[Precision, torch.dtype]" = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class EagerEngine:
    """The network as PyTorch runs it. In fp32 on a GPU, PyTorch's convolutions may round to TF32.

    Threads: one call at a time; others wait at a lock. `threads` >= 1 is set for PyTorch in the WHOLE
    process, face detection included: PyTorch knows no other scope.
    """

    name = "eager"

    def __init__(
        self, module: nn.Module, precision: "Precision", threads: int, device: Device = "cpu"
    ) -> None:
        self.precision: Precision = precision
        self._dtype, self._device = DTYPES[precision], device
        # a copy, since the caller's module must stay fp32; channels_last halves the time on CPUs
        own = copy.deepcopy(module).eval().requires_grad_(False).to(device=device, dtype=self._dtype)
        self._module = own.to(memory_format=torch.channels_last)
        self._lock = threading.Lock()
        torch.set_num_threads(threads)

    def __call__(self, faces: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return logits (N,) and attention (N, h, w) of float32 (N, 3, S, S)."""
        with self._lock, torch.inference_mode():
            pixels = faces.to(self._device, self._dtype, memory_format=torch.channels_last)
            logits, attention = self._module(pixels)
            return logits.float().cpu().numpy(), attention.float().contiguous().cpu().numpy()
