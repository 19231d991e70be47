"""OpenVINO on the CPU: several times as fast as eager PyTorch on small networks."""

import logging
import sys
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

from engines import kept  # noqa: E402
from engines.engine import (  # noqa: E402
    EngineUnavailableError,
    Mode,
    Network,
    Output,
    Plan,
    Precision,
    facts_of,
)
from engines.pool import Pool  # noqa: E402

logger = logging.getLogger(__name__)

DEVICE = "CPU"
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
NEEDED = {"bf16": "BF16", "fp16": "FP16"}
"""What the CPU must be able to do, in OpenVINO's words."""
MODES: dict[Mode, str] = {"latency": "LATENCY", "throughput": "THROUGHPUT"}
FILE = "network.xml"


class OpenVinoEngine:
    """One compiled network with a dynamic batch, of any size.

    Threads: the compiled network is shared, each call has infer requests of its own: one, or in throughput
    mode as many as OpenVINO runs side by side, over which a batch is split. All requests share OpenVINO's own
    pool of threads.
    """

    name = "openvino"

    def __init__(
        self, network: Network, precision: Precision, plan: Plan, cache_dir: Path, example: Tensor
    ) -> None:
        """Convert, or take from `cache_dir`, and compile; `example` is one input (1, 3, S, S) float32.

        Raises `EngineUnavailableError` when this CPU lacks the precision or OpenVINO the means.
        """
        self.precision: Precision = precision
        core = ov.Core()
        if precision in NEEDED and NEEDED[precision] not in core.get_property(
            DEVICE, "OPTIMIZATION_CAPABILITIES"
        ):
            raise EngineUnavailableError(f"this CPU has no {precision}")
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": MODES[plan.mode],
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": plan.settled_threads(),
        }
        try:
            model = _model(core, network, precision, cache_dir, example)
            self._compiled = core.compile_model(model, DEVICE, settings)
        except RuntimeError as error:
            raise EngineUnavailableError(" ".join(str(error).split())) from error
        self._requests = Pool(
            lambda: [self._compiled.create_infer_request() for _ in range(self.side_by_side)]
        )

    @property
    def side_by_side(self) -> int:
        """How many requests a batch is split over."""
        return int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))

    def __call__(self, faces: Tensor) -> Output:
        """Return logits (N,) and attention (N, h, w) of float32 (N, 3, S, S)."""
        pixels = faces.contiguous().numpy()
        with self._requests.one() as requests:
            running = requests[: len(pixels)]
            for request, part in zip(running, np.array_split(pixels, len(running)), strict=True):
                # shared with OpenVINO for the time of the call: its own buffer cannot grow with the batch
                request.start_async([part], share_inputs=True)
            for request in running:
                request.wait()
            logits, attention = (
                np.concatenate([request.get_output_tensor(k).data for request in running]) for k in (0, 1)
            )
        return logits.astype(np.float32, copy=False), attention.astype(np.float32, copy=False)


def facts(network: Network, precision: Precision, example: Tensor) -> kept.Facts:
    """Return what the converted network depends on (DESIGN 3.7). It serves every CPU and batch: OpenVINO
    compiles it for this one at each start."""
    own = {"precision": precision, "device": {"kind": "cpu"}, "versions": kept.versions("openvino", "torch")}
    return facts_of(network, example) | own


def _model(
    core: ov.Core, network: Network, precision: Precision, cache_dir: Path, example: Tensor
) -> "ov.Model":
    known = facts(network, precision, example)
    folder = kept.find(cache_dir, OpenVinoEngine.name, known)
    if folder is not None:
        return core.read_model(folder / FILE)
    with warnings.catch_warnings(), torch.inference_mode():
        # the tracer warns of every Python number it fixes; parity on real crops is the check that counts
        warnings.simplefilter("ignore")
        shape = ov.PartialShape([-1, *example.shape[1:]])
        model = ov.convert_model(network.module, example_input=example, input=shape)
    try:
        kept.keep(
            cache_dir,
            OpenVinoEngine.name,
            known,
            lambda fresh: ov.save_model(model, fresh / FILE, compress_to_fp16=False),
        )
    except (OSError, RuntimeError) as error:
        # the disk is full: this process has the network in memory
        logger.warning("converted network is not kept: %s", error)
    return model
