"""What an engine is, and how one is chosen: the first in order that agrees with eager PyTorch (DESIGN 3.7).

Engines know networks and hardware; of faces, verdicts and streams they know nothing.
"""

import hashlib
import importlib
import inspect
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.eager import EagerEngine

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
Output = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Logits (N,) and attention maps (N, h, w), both float32."""

MAX_PROBABILITY_CHANGE = 0.01
"""Largest difference in calibrated probability that passes for the same member (DESIGN 3.7)."""
FLIP_MARGIN = 0.1
"""Logit beyond which a change of sign is a changed verdict, whatever the calibration makes of it; nearer to 0
neither sign means anything."""
MAX_ATTENTION_CHANGE = 0.1
"""Largest difference in the attention map (0..1): half a step of the eight that an overlay lets one see."""


class EngineUnavailableError(Exception):
    """This engine cannot run this network here; the message says why."""


class Engine(Protocol):
    """A network as a callable on this hardware.

    Takes float32 (N, 3, S, S), any N >= 1 and the S it was built for, normalised, on the CPU; returns logits
    float32 (N,), > 0 manipulated, and attention float32 (N, h, w) in 0..1, arrays of the caller's own.

    Threads: calls may come from any thread at once. Each implementation keeps what one execution needs to
    itself, per thread (OpenVINO) or under a lock (eager).
    """

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> Precision: ...

    def __call__(self, faces: Tensor) -> Output: ...


@dataclass(frozen=True, slots=True)
class Network:
    """What an engine is built from.

    `module` is in evaluation mode, float32, on the CPU: (N, 3, S, S) in, (logit (N,), attention (N, h, w))
    out. `sha256` is that of its weights and goes into cache keys.
    """

    name: str
    module: nn.Module
    sha256: str


def build(
    network: Network,
    order: Sequence[str],
    precision: Precision,
    threads: int,
    cache_dir: Path,
    reference: Tensor,
    to_probability: Callable[[float], float],
) -> Engine:
    """Return the first engine of `order` ("openvino", "eager") that agrees with eager fp32 PyTorch.

    `reference` holds the inputs to agree on, float32 (N, 3, S, S): real face crops, or agreement means
    little. `to_probability` maps a logit to the member's calibrated probability. `threads` is for OpenVINO
    and, process-wide, for PyTorch; 0 chooses as `default_threads`.

    An engine that is missing, fails or disagrees is refused with one warning. Eager fp32 is what the others
    are measured by and serves when all were refused. Its answers are kept in `cache_dir`, being the same each
    time; the others are compared with them at every start. Raises `ValueError` for an unknown name, for a
    `reference` of another shape, and when the network itself gives numbers that are not finite.
    """
    if reference.ndim != 4 or reference.shape[1] != 3 or len(reference) == 0:
        raise ValueError(f"reference has shape {tuple(reference.shape)}; it must be (N, 3, S, S) with N >= 1")
    for name in order:
        if name not in ("openvino", "eager"):
            raise ValueError(f"engine {name!r} is unknown; it must be openvino or eager")
    threads = threads or default_threads()
    # for the whole process, face detection included; eager fp32 would set it, and is not always needed
    torch.set_num_threads(threads)
    eager = partial(EagerEngine, network.module, "fp32", threads)
    expected: Output | None = None
    for name in order:
        if name == "eager" and precision == "fp32":
            break
        if expected is None:
            expected = _answers(network, reference, cache_dir / "reference", eager)
        try:
            engine = _make(name, network, precision, threads, cache_dir, reference)
            problem = disagreement(expected, engine(reference), to_probability)
        except Exception as error:  # compilers of networks raise anything, and the next engine can serve
            problem = " ".join(str(error).split())
        if problem is None:
            return engine
        logger.warning("engine %s %s refused for %s: %s", name, precision, network.name, problem)
    else:
        tried = ", ".join(order) or "none"
        logger.warning("no engine of %s can serve %s: eager fp32 does", tried, network.name)
    served = eager()
    if expected is None:
        _checked(network, served(reference))
    return served


def default_threads() -> int:
    """Return half the cores this process may use, at least one: the other half decodes.

    PyTorch's threads wait for each other spinning. On two cores with something else running, two threads took
    160 ms for the faces of a picture that one thread reads in 21 ms.
    """
    return max(1, len(os.sched_getaffinity(0)) // 2)


def disagreement(expected: Output, found: Output, to_probability: Callable[[float], float]) -> str | None:
    """Return in one sentence how an engine differs from the reference, None if it may serve."""
    logits, attention = expected
    if found[0].shape != logits.shape or found[1].shape != attention.shape:
        return f"shapes are {found[0].shape} and {found[1].shape}, not {logits.shape} and {attention.shape}"
    if not (np.isfinite(found[0]).all() and np.isfinite(found[1]).all()):
        return "it gives numbers that are not finite"
    change = max(
        abs(to_probability(float(a)) - to_probability(float(b)))
        for a, b in zip(logits, found[0], strict=True)
    )
    if change > MAX_PROBABILITY_CHANGE:
        return f"probabilities differ by up to {change:.4f}, more than {MAX_PROBABILITY_CHANGE}"
    flipped = int(((np.sign(logits) != np.sign(found[0])) & (np.abs(logits) > FLIP_MARGIN)).sum())
    if flipped:
        return f"{flipped} of {len(logits)} crops change sides"
    apart = float(np.abs(attention - found[1]).max())
    if apart > MAX_ATTENTION_CHANGE:
        return f"attention maps differ by up to {apart:.3f}, more than {MAX_ATTENTION_CHANGE}"
    return None


def graph_hash(module: nn.Module) -> str:
    """Return a hash of the layers and of the source of their classes: what a network computes, whatever its
    weights. Tracing anew would cost the seconds that caches are to save."""
    digest = hashlib.sha256(repr(module).encode())
    for kind in sorted({type(part) for part in module.modules()}, key=lambda kind: kind.__qualname__):
        digest.update(_source(kind))  # type: ignore[arg-type]  # a class hashes, whatever its instances do
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _source(kind: type) -> bytes:
    try:
        return inspect.getsource(kind).encode()
    except (OSError, TypeError):  # made at run time: the repr of its module is all there is
        return b""


def _answers(network: Network, reference: Tensor, folder: Path, eager: Callable[[], EagerEngine]) -> Output:
    """Return what eager fp32 says of the reference, from `folder` if it was asked before."""
    facts = {
        "weights": network.sha256,
        "graph": graph_hash(network.module),
        "reference": hashlib.sha256(reference.contiguous().numpy().tobytes()).hexdigest(),
        "torch": torch.__version__,
    }
    path = folder / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}.npz"
    try:
        with np.load(path) as kept:
            return kept["logits"], kept["attention"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        answers = _checked(network, eager()(reference))
    _keep(path, answers)
    return answers


def _checked(network: Network, answers: Output) -> Output:
    if not (np.isfinite(answers[0]).all() and np.isfinite(answers[1]).all()):
        raise ValueError(f"network {network.name} gives numbers that are not finite on the reference crops")
    return answers


def _keep(path: Path, answers: Output) -> None:
    """Write the reference's answers so that no other process ever sees half of them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            np.savez(file, logits=answers[0], attention=answers[1])
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("answers of the reference are not kept: %s", error)


def _make(
    name: str, network: Network, precision: Precision, threads: int, cache_dir: Path, reference: Tensor
) -> Engine:
    if name == "eager":
        return EagerEngine(network.module, precision, threads)
    try:
        # only when asked for: the library may be missing, and takes a second to import
        openvino = importlib.import_module("engines.openvino")
    except ImportError as error:
        raise EngineUnavailableError(f"not available: {error}") from error
    engine: Engine = openvino.OpenVinoEngine(network, precision, threads, cache_dir, reference[:1])
    return engine
