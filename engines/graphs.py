"""CUDA graphs: a network's hundreds of launches recorded once for some batch sizes and replayed as one.

Not run on a GPU by this project yet (docs/engines.md).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engines.exported import powers

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A network on the GPU: float32 (N, 3, S, S) there in, logits and attention there out."""

WARM_UPS = 3
"""Runs before recording: libraries choose and load kernels in the first ones, which cannot be recorded."""


class Replayed:
    """A network recorded for batches of 1, 2, 4 ... and `batch`; others are filled up to the next of these.

    `make` gives what runs a batch of a size, asked once for each, on inputs of that `layout`. Belongs to one
    thread at a time.
    """

    def __init__(
        self, make: Callable[[int], Run], example: Tensor, batch: int, layout: torch.memory_format
    ) -> None:
        self._batch = batch
        self._recorded = {}
        pool = torch.cuda.graph_pool_handle()
        # the largest first: the smaller ones then find their memory in its
        for size in reversed(powers(batch)):
            pixels = example[:1].expand(size, -1, -1, -1).cuda().clone(memory_format=layout)
            self._recorded[size] = _Recorded(make(size), pixels, pool)

    def __call__(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and attention, on the CPU, of float32 (N, 3, S, S); over `batch`, in parts."""
        parts = [self._part(part) for part in torch.split(faces, self._batch)]
        logits, attention = zip(*parts, strict=True)
        return torch.cat(logits), torch.cat(attention)

    def _part(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        size = min(size for size in self._recorded if size >= len(faces))
        return self._recorded[size](faces)


class _Recorded:
    """One size: `pixels` is what the graph reads, `found` what it writes, both in place at each replay."""

    def __init__(self, run: Run, pixels: Tensor, pool: Any) -> None:
        self.run = run  # kept: the graph uses its memory
        self.pixels = pixels
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run(pixels)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # other threads may use the card meanwhile
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.found = run(pixels)

    def __call__(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        count = len(faces)
        self.pixels[:count].copy_(faces, non_blocking=True)
        self.graph.replay()
        logits, attention = self.found
        # copying to the CPU waits for the graph
        return logits[:count].cpu(), attention[:count].cpu()
