"""Inductor ahead of time: PyTorch's own compiler, kept as a library that loads in a moment.

`torch.compile` would compile at every start, once per batch size, and its CUDA graphs belong to the thread
that first ran them; a package of AOTInductor is compiled once for all sizes, and recording graphs of it is up
to us. On a CPU it needs a C++ compiler. On a GPU this was not run by this project yet (docs/engines.md).
"""

import os
import shutil
import threading
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engines import hardware, kept
from engines.engine import EngineUnavailableError, Network, Output, Plan, Precision, facts_of
from engines.exported import exported
from engines.graphs import Replayed, Run

FILE = "network.pt2"

LAYOUT = torch.channels_last
"""What convolutions of half precision are fastest in, on GPUs and CPUs; crops come so."""

OPTIONS = {
    # weights become constants: batch norm goes into convolutions, and convolutions get the layout they like
    "freezing": True,
    # threads as PyTorch has them when it runs, not as it had them when it compiled
    "cpp.dynamic_threads": True,
}


class InductorEngine:
    """One compiled network for every batch size; on a GPU, CUDA graphs of some.

    Threads: one call at a time; others wait at a lock.
    """

    name = "inductor"

    def __init__(
        self, network: Network, precision: Precision, plan: Plan, cache_dir: Path, example: Tensor
    ) -> None:
        """Compile, or take from `cache_dir`, and load; `example` is one input (1, 3, S, S) float32.

        Raises `EngineUnavailableError` without a compiler or for fp16 on a CPU, and what Inductor raises.
        """
        self.precision: Precision = precision
        self._lock = threading.Lock()
        if plan.device == "cpu" and precision == "fp16":
            raise EngineUnavailableError("fp16 is for GPUs; a CPU has bf16")
        torch.set_num_threads(plan.settled_threads())
        known = facts(network, precision, plan, example)
        folder = kept.find(cache_dir, self.name, known)
        if folder is None:
            if plan.device == "cpu":
                _check_compiler()
            folder = kept.keep(
                cache_dir, self.name, known, lambda fresh: _compile(network, precision, plan, example, fresh)
            )
        # single-threaded: the lock is ours, and what guards it otherwise cannot be recorded in a CUDA graph
        compiled = torch._inductor.aoti_load_package(str(folder / FILE), run_single_threaded=True)
        self._run: Run = (
            Replayed(lambda size: compiled, example, plan.batch, LAYOUT)
            if plan.device == "cuda"
            else partial(_in_parts, compiled, plan.batch)
        )

    def __call__(self, faces: Tensor) -> Output:
        """Return logits (N,) and attention (N, h, w) of float32 (N, 3, S, S)."""
        with self._lock, torch.inference_mode():
            logits, attention = self._run(faces)
            return logits.numpy(), attention.numpy()


def _in_parts(compiled: Run, batch: int, faces: Tensor) -> tuple[Tensor, Tensor]:
    # it is compiled for this layout and does not look whether it is given it
    parts = [compiled(part.contiguous(memory_format=LAYOUT)) for part in torch.split(faces, batch)]
    logits, attention = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(attention)


def facts(network: Network, precision: Precision, plan: Plan, example: Tensor) -> kept.Facts:
    """Return what the compiled network depends on (DESIGN 3.7)."""
    return facts_of(network, example) | {
        "precision": precision,
        "batch": plan.batch,
        "options": OPTIONS,
        "device": hardware.facts(plan.device),
        "versions": kept.versions("torch", "triton"),
    }


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise EngineUnavailableError(f"needs a C++ compiler; {compiler} is not installed")


def _compile(network: Network, precision: Precision, plan: Plan, example: Tensor, folder: Path) -> None:
    from torch._inductor.utils import fresh_cache

    graph = exported(network.module, precision, plan.device, plan.batch, example, LAYOUT)
    # what it writes on the way goes to a folder of its own, and away again
    with fresh_cache(dir=str(folder)), torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            graph, package_path=str(folder / FILE), inductor_configs=dict(OPTIONS)
        )
