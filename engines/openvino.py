"""OpenVINO on the CPU: several times as fast as eager PyTorch on small networks."""

import hashlib
import json
import logging
import shutil
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# OpenVINO reports its use to its makers as soon as it is imported, unless the package that does so is
# missing. A program that watches other people's video tells nobody.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino as ov  # noqa: E402

from engines.engine import EngineUnavailableError, Network, Output, Precision, graph_hash  # noqa: E402

logger = logging.getLogger(__name__)

DEVICE = "CPU"
HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine:
    """One compiled network with a dynamic batch.

    Threads: the compiled network is shared, each calling thread gets an infer request of its own, for as long
    as it lives. All requests share OpenVINO's own pool of `threads` >= 1 threads.
    """

    name = "openvino"

    def __init__(
        self, network: Network, precision: Precision, threads: int, cache_dir: Path, example: Tensor
    ) -> None:
        """Convert, or take from `cache_dir`, and compile; `example` is one input (1, 3, S, S) float32.

        Raises `EngineUnavailableError` when this CPU lacks the precision or OpenVINO the means.
        """
        self.precision: Precision = precision
        core = ov.Core()
        if precision == "bf16" and "BF16" not in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"):
            raise EngineUnavailableError("this CPU has no bf16")
        settings: dict[str, Any] = {
            # throughput mode was slower on two cores, and batches are formed before they come here
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
        }
        folder = cache_dir.expanduser() / "openvino" / cache_key(network, precision, example)
        try:
            model = _cached(core, folder) or _converted(network, example, folder)
            self._compiled = core.compile_model(model, DEVICE, settings)
        except RuntimeError as error:
            raise EngineUnavailableError(" ".join(str(error).split())) from error
        self._own = threading.local()

    def __call__(self, faces: Tensor) -> Output:
        """Return logits (N,) and attention (N, h, w) of float32 (N, 3, S, S)."""
        request = getattr(self._own, "request", None)
        if request is None:
            request = self._own.request = self._compiled.create_infer_request()
        # shared with OpenVINO for the time of the call: its own input buffer cannot grow with the batch
        pixels = faces.contiguous().numpy()
        result = request.infer([pixels], share_inputs=True)
        return np.asarray(result[0], np.float32), np.asarray(result[1], np.float32)


def cache_key(network: Network, precision: Precision, example: Tensor) -> str:
    """Return 64 hex digits that change with anything the converted network depends on (DESIGN 3.7)."""
    facts = {
        "weights": network.sha256,
        "graph": graph_hash(network.module),
        "shape": list(example.shape[1:]),
        "precision": precision,
        "device": DEVICE,
        "openvino": ov.__version__,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _cached(core: ov.Core, folder: Path) -> "ov.Model | None":
    """Return the network converted earlier, None if there is none that can be read."""
    path = folder / "network.xml"
    if not path.exists():
        return None
    try:
        return core.read_model(path)
    except RuntimeError:
        logger.warning("cached network %s cannot be read and is made anew", folder.name[:12])
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _converted(network: Network, example: Tensor, folder: Path) -> "ov.Model":
    with warnings.catch_warnings(), torch.inference_mode():
        # the tracer warns of every Python number it fixes; parity on real crops is the check that counts
        warnings.simplefilter("ignore")
        shape = ov.PartialShape([-1, *example.shape[1:]])
        model = ov.convert_model(network.module, example_input=example, input=shape)
    _keep(model, folder)
    return model


def _keep(model: "ov.Model", folder: Path) -> None:
    """Write the converted network so that no other process ever sees half of it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError as error:
        logger.warning("converted network is not kept: %s", error)
        return
    try:
        ov.save_model(model, fresh / "network.xml", compress_to_fp16=False)
        fresh.rename(folder)
    except (OSError, RuntimeError):
        # another process was first, or the disk is full: this one has the network in memory
        shutil.rmtree(fresh, ignore_errors=True)
