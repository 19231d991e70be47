"""TensorRT through torch-tensorrt: whole networks as engines for this card, with nothing left to PyTorch.

torch-tensorrt converts and builds, TensorRT's own runtime runs: contexts can then be each thread's own, and
what is kept is the engine itself under our key (torch-tensorrt's cache has ignored changes of shape and its
modules share a context: pytorch/TensorRT #618, #3148, #4226).

Not run on a GPU by this project yet: docs/engines.md says what is proved without one.
"""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from engines import hardware, kept
from engines.engine import EngineUnavailableError, Network, Output, Plan, Precision, facts_of
from engines.exported import exported
from engines.graphs import Replayed, Run
from engines.pool import Pool

logger = logging.getLogger(__name__)

FILE = "network.engine"
LAYOUT = torch.contiguous_format
INPUT, LOGITS, ATTENTION = "faces", "logits", "attention"
"""What the engine's input and outputs are called."""

SETTINGS: dict[str, Any] = {
    "require_full_compilation": True,
    # smaller and faster; a network with other weights is another engine
    "immutable_weights": True,
}
"""How engines are built, beside input, names, device and timing cache. They are strongly typed: each layer
computes in the type that the exported graph has."""


class TensorRtEngine:
    """One engine for batches of 1 to the plan's, larger ones in parts.

    Threads: the engine is shared, each call has execution contexts of its own and CUDA graphs of them; calls
    from several threads share the card.
    """

    name = "tensorrt"

    def __init__(
        self, network: Network, precision: Precision, plan: Plan, cache_dir: Path, example: Tensor
    ) -> None:
        """Build, or take from `cache_dir`, and load; `example` is one input (1, 3, S, S) float32.

        Raises `EngineUnavailableError` without a GPU or TensorRT's libraries, and when an engine cannot be
        loaded; what torch-tensorrt raises when it cannot be built.
        """
        self.precision: Precision = precision
        if plan.device != "cuda":
            raise EngineUnavailableError("needs an NVIDIA GPU")
        try:
            import tensorrt
        except ImportError as error:
            raise EngineUnavailableError(f"not available: {error}") from error
        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        self._engine = self._loaded(network, plan, cache_dir, example)
        self._replayed = Pool(lambda: Replayed(self._context, example, plan.batch, LAYOUT))

    def __call__(self, faces: Tensor) -> Output:
        """Return logits (N,) and attention (N, h, w) of float32 (N, 3, S, S)."""
        with torch.inference_mode(), self._replayed.one() as replayed:
            logits, attention = replayed(faces)
            return logits.numpy(), attention.numpy()

    def _loaded(self, network: Network, plan: Plan, cache_dir: Path, example: Tensor) -> Any:
        known = facts(network, self.precision, plan, example)
        folder = kept.find(cache_dir, self.name, known)
        if folder is None:
            timings = timing_cache(cache_dir, known)
            folder = kept.keep(
                cache_dir,
                self.name,
                known,
                lambda fresh: _build(network, self.precision, plan, example, timings, fresh),
            )
        engine = self._runtime.deserialize_cuda_engine((folder / FILE).read_bytes())
        if engine is None:
            kept.discard(folder)
            raise EngineUnavailableError(
                "TensorRT cannot load the engine it built; it is built anew next time"
            )
        return engine

    def _context(self, size: int) -> Run:
        """Return what runs batches of `size`, in a context that runs nothing else.

        One for each size: a CUDA graph is bound to the state its context had when it was recorded.
        """
        context = self._engine.create_execution_context()
        if context is None:
            raise torch.OutOfMemoryError("TensorRT has no memory for another execution context")

        def run(faces: Tensor) -> tuple[Tensor, Tensor]:
            context.set_input_shape(INPUT, tuple(faces.shape))
            found = [
                torch.empty(tuple(context.get_tensor_shape(name)), device=faces.device)
                for name in (LOGITS, ATTENTION)
            ]
            for name, tensor in zip((INPUT, LOGITS, ATTENTION), (faces, *found), strict=True):
                context.set_tensor_address(name, tensor.data_ptr())
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise RuntimeError(f"TensorRT did not run a batch of {len(faces)}")
            return found[0], found[1]

        return run


def facts(network: Network, precision: Precision, plan: Plan, example: Tensor) -> kept.Facts:
    """Return what an engine depends on (DESIGN 3.7)."""
    return facts_of(network, example) | {
        "precision": precision,
        "batch": plan.batch,
        "settings": SETTINGS,
        "device": hardware.gpu(),
        "versions": kept.versions("torch", "torch-tensorrt", "tensorrt-cu13", "tensorrt"),
    }


def timing_cache(cache_dir: Path, known: kept.Facts) -> Path:
    """Return the file of what TensorRT measured of its kernels, on this card and with these versions.

    It saves minutes when a second network is built, or the same for another batch.
    """
    depends = {key: known[key] for key in ("device", "versions")}
    return cache_dir.expanduser() / "timings" / f"{kept.digest(depends)}.bin"


def serialised(graph: ExportedProgram, batch: int, example: Tensor, timings: Path, device: Any) -> bytes:
    """Return the engine of an exported network: batches from 1 to `batch`, and best at `batch`.

    `timings` is read if it is there, and written. Raises what torch-tensorrt raises: for an operator that it
    has no converter for, among others.
    """
    import torch_tensorrt

    shape = tuple(example.shape[1:])
    sizes = {"min_shape": (1, *shape), "opt_shape": (batch, *shape), "max_shape": (batch, *shape)}
    made: bytes = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
        graph,
        arg_inputs=[torch_tensorrt.Input(dtype=torch.float32, name=INPUT, **sizes)],
        arg_input_binding_names=(INPUT,),
        output_binding_names=(LOGITS, ATTENTION),
        device=device,
        timing_cache_path=str(timings),
        **SETTINGS,
    )
    return made


def _build(
    network: Network, precision: Precision, plan: Plan, example: Tensor, timings: Path, folder: Path
) -> None:
    graph = exported(network.module, precision, plan.device, plan.batch, example, LAYOUT)
    device = torch.device("cuda", torch.cuda.current_device())
    with tempfile.TemporaryDirectory(prefix="unmask-tensorrt-") as own:
        # a copy, put in place whole: torch-tensorrt writes it in place, and others may read it meanwhile
        copied = Path(own) / timings.name
        if timings.exists():
            shutil.copyfile(timings, copied)
        (folder / FILE).write_bytes(serialised(graph, plan.batch, example, copied, device))
        _put(copied, timings)


def _put(copied: Path, timings: Path) -> None:
    try:
        timings.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=timings.parent, delete=False) as file:
            file.write(copied.read_bytes())
        Path(file.name).replace(timings)
    except OSError as error:
        logger.warning("TensorRT's timing cache is not kept: %s", error)
