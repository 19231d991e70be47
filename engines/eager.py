"""Eager PyTorch on the CPU: the reference every other engine is measured by."""

import copy
import threading
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class EagerEngine:
    """The network as PyTorch runs it, in fp32 or bf16.

    Threads: one call at a time; others wait at a lock. `threads` >= 1 is set for PyTorch in the WHOLE
    process, face detection included: PyTorch knows no other scope.
    """

    name = "eager"

    def __init__(self, module: nn.Module, precision: Literal["fp32", "bf16"], threads: int) -> None:
        self.precision: Literal["fp32", "bf16"] = precision
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # a copy, since the caller's module must stay fp32; channels_last halves the time on CPUs
        own = copy.deepcopy(module).eval().requires_grad_(False)
        self._module = own.to(dtype=self._dtype).to(memory_format=torch.channels_last)
        self._lock = threading.Lock()
        torch.set_num_threads(threads)

    def __call__(self, faces: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return logits (N,) and attention (N, h, w) of float32 (N, 3, S, S)."""
        with self._lock, torch.inference_mode():
            logits, attention = self._module(faces.to(dtype=self._dtype, memory_format=torch.channels_last))
            return logits.float().numpy(), attention.float().contiguous().numpy()
