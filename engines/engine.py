"""What an engine is, and how one is chosen: the first in order that agrees with eager PyTorch (DESIGN 3.7).

Engines know networks and hardware; of faces, verdicts and streams they know nothing.
"""

import hashlib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines import hardware, kept
from engines.eager import EagerEngine
from engines.enduring import Enduring
from engines.hardware import Device

logger = logging.getLogger(__name__)

Name = Literal["tensorrt", "inductor", "openvino", "eager"]
Precision = Literal["fp32", "bf16", "fp16"]
Mode = Literal["latency", "throughput"]
Output = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Logits (N,) and attention maps (N, h, w), both float32."""

NAMES: tuple[Name, ...] = ("tensorrt", "inductor", "openvino", "eager")
ORDERS: Mapping[Device, tuple[Name, ...]] = MappingProxyType(
    # on a GPU OpenVINO comes last: on its CPU it is what serves best when nothing on the card does
    {"cpu": ("openvino", "eager"), "cuda": ("tensorrt", "inductor", "eager", "openvino")}
)
"""What is tried where nobody says. Inductor on a CPU takes a compiler and minutes: for who names it."""

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
    float32 (N,), > 0 manipulated, and attention float32 (N, h, w) in 0..1, arrays of the caller's own. More
    than the batch it was built for are taken in parts.

    Threads: calls may come from any thread at once. What one execution needs is used by one thread at a time:
    there is another for each call beside it (OpenVINO, TensorRT), or the call waits (eager, Inductor).
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


@dataclass(frozen=True, slots=True)
class Plan:
    """How networks are to run.

    `order`: engines to try; none: those of the device (`ORDERS`). `precision` is tried with each of them,
    then fp32; `auto` is fp16 on a GPU, fp32 on a CPU. `batch`: engines are built for 1 to so many inputs a
    call. `threads`: those of OpenVINO and, process-wide, of PyTorch; 0 chooses as `default_threads`. `mode`:
    `throughput` splits a batch over what OpenVINO runs side by side.
    """

    device: Device = "cpu"
    order: tuple[Name, ...] = ()
    precision: Precision | Literal["auto"] = "auto"
    batch: int = 16
    threads: int = 0
    mode: Mode = "latency"

    def candidates(self) -> tuple[tuple[Name, Precision], ...]:
        """Return every engine and precision to try, in order."""
        auto: Precision = "fp16" if self.device == "cuda" else "fp32"
        first = auto if self.precision == "auto" else self.precision
        precisions: tuple[Precision, ...] = (first,) if first == "fp32" else (first, "fp32")
        return tuple(
            (name, precision) for precision in precisions for name in self.order or ORDERS[self.device]
        )

    def settled_threads(self) -> int:
        return self.threads or hardware.default_threads()


@dataclass(frozen=True, slots=True)
class Refusal:
    """An engine that does not serve a network, and why."""

    network: str
    engine: Name
    precision: Precision
    reason: str


@dataclass(frozen=True, slots=True)
class Change:
    """How far two answers lie apart at most: in calibrated probability, in logits, in the attention map."""

    probability: float
    logit: float
    attention: float


def build(
    network: Network,
    plan: Plan,
    cache_dir: Path,
    reference: Tensor,
    to_probability: Callable[[float], float],
    rng: np.random.Generator | None = None,
    on_refused: Callable[[Refusal], None] = lambda refusal: None,
) -> Engine:
    """Return the first engine of the plan that agrees with eager fp32 PyTorch.

    `reference` holds the inputs to agree on, float32 (N, 3, S, S): real face crops, or agreement means
    little. They are given in batches of `rng`'s choosing, of 1 and of `plan.batch` among others.
    `to_probability` maps a logit to the member's calibrated probability.

    An engine that is missing, fails or disagrees is refused with one warning, and `on_refused` is told. Eager
    fp32 on the CPU is what the others are measured by and serves when all were refused. Its answers are kept
    in `cache_dir`, being the same each time; the others are compared with them at every start. One on a GPU
    that later runs out of memory is replaced by what serves on the CPU (`Enduring`). Raises `ValueError` for
    an unknown name, for a `reference` of another shape, and when the network itself gives numbers that are
    not finite.
    """
    check(plan, reference)

    def on_cpu(name: Name, precision: Precision) -> Engine:
        on_refused(Refusal(network.name, name, precision, "no memory left on the GPU"))
        own = replace(plan, device="cpu", order=(), precision="fp32")
        return build(network, own, cache_dir, reference, to_probability, rng, on_refused)

    # for the whole process, face detection included; eager fp32 would set it, and is not always needed
    torch.set_num_threads(plan.settled_threads())
    eager = partial(EagerEngine, network.module, "fp32", plan.settled_threads())
    expected: Output | None = None
    for name, precision in plan.candidates():
        if (name, precision, plan.device) == ("eager", "fp32", "cpu"):
            break
        if expected is None:
            expected = answers(network, reference, cache_dir, eager)
        try:
            engine = make(name, precision, network, plan, cache_dir, reference)
            problem = _problem(engine, expected, reference, plan.batch, to_probability, rng)
        except Exception as error:  # compilers of networks raise anything, and the next engine can serve
            problem = " ".join(str(error).split()) or type(error).__name__
        if problem is None and plan.device == "cpu":
            return engine
        if problem is None:
            return Enduring(engine, partial(on_cpu, name, precision))
        logger.warning("engine %s %s refused for %s: %s", name, precision, network.name, problem)
        on_refused(Refusal(network.name, name, precision, problem))
    else:
        tried = ", ".join(dict.fromkeys(name for name, _ in plan.candidates())) or "none"
        logger.warning("no engine of %s can serve %s: eager fp32 does", tried, network.name)
    served = eager()
    if expected is None:
        _checked(network, served(reference))
    return served


def make(
    name: Name, precision: Precision, network: Network, plan: Plan, cache_dir: Path, reference: Tensor
) -> Engine:
    """Return an engine, compared with nothing yet; `reference` gives the size of its inputs.

    Raises `EngineUnavailableError`, and whatever the compiler of networks behind it does.
    """
    if name == "eager":
        return EagerEngine(network.module, precision, plan.settled_threads(), plan.device)
    module, kind = {
        "openvino": ("engines.openvino", "OpenVinoEngine"),
        "inductor": ("engines.inductor", "InductorEngine"),
        "tensorrt": ("engines.tensorrt", "TensorRtEngine"),
    }[name]
    try:
        # only when asked for: the library may be missing, and takes a second to import
        found = importlib.import_module(module)
    except ImportError as error:
        raise EngineUnavailableError(f"not available: {error}") from error
    return cast(Engine, getattr(found, kind)(network, precision, plan, cache_dir, reference[:1]))


def check(plan: Plan, reference: Tensor) -> None:
    """Raise `ValueError` for an unknown engine, a batch of none, and inputs of another shape."""
    if reference.ndim != 4 or reference.shape[1] != 3 or len(reference) == 0:
        raise ValueError(f"reference has shape {tuple(reference.shape)}; it must be (N, 3, S, S) with N >= 1")
    for name in plan.order:
        if name not in NAMES:
            raise ValueError(f"engine {name!r} is unknown; it must be one of {', '.join(NAMES)}")
    if plan.batch < 1:
        raise ValueError(f"batch is {plan.batch}; it must be at least 1")


def batches(count: int, most: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield which of `count` inputs to take together: one batch of 1, one of a size between, one of `most`,
    then more of any size until each input was among them; in random order."""
    order = rng.permutation(count)
    sizes = [most, int(rng.integers(1, most + 1)), 1]
    seen = 0
    while sizes or seen < count:
        size = sizes.pop() if sizes else int(rng.integers(1, most + 1))
        yield order[np.arange(seen, seen + size) % count]
        seen += size


def disagreement(expected: Output, found: Output, to_probability: Callable[[float], float]) -> str | None:
    """Return in one sentence how an engine differs from the reference, None if it may serve."""
    logits, attention = expected
    if found[0].shape != logits.shape or found[1].shape != attention.shape:
        return f"shapes are {found[0].shape} and {found[1].shape}, not {logits.shape} and {attention.shape}"
    if not (np.isfinite(found[0]).all() and np.isfinite(found[1]).all()):
        return "it gives numbers that are not finite"
    change = changed(expected, found, to_probability)
    if change.probability > MAX_PROBABILITY_CHANGE:
        return f"probabilities differ by up to {change.probability:.4f}, more than {MAX_PROBABILITY_CHANGE}"
    flipped = int(((np.sign(logits) != np.sign(found[0])) & (np.abs(logits) > FLIP_MARGIN)).sum())
    if flipped:
        return f"{flipped} of {len(logits)} crops change sides"
    if change.attention > MAX_ATTENTION_CHANGE:
        return f"attention maps differ by up to {change.attention:.3f}, more than {MAX_ATTENTION_CHANGE}"
    return None


def changed(expected: Output, found: Output, to_probability: Callable[[float], float]) -> Change:
    """Return how far two answers of one shape lie apart."""
    pairs = zip(map(float, expected[0]), map(float, found[0]), strict=True)
    return Change(
        probability=max(abs(to_probability(a) - to_probability(b)) for a, b in pairs),
        logit=float(np.abs(expected[0] - found[0]).max()),
        attention=float(np.abs(expected[1] - found[1]).max()),
    )


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


def facts_of(network: Network, example: Tensor) -> dict[str, object]:
    """Return what anything built from this network depends on, whatever builds it."""
    return {
        "name": network.name,
        "weights": network.sha256,
        "graph": graph_hash(network.module),
        "shape": list(example.shape[1:]),
    }


def answers(network: Network, reference: Tensor, cache_dir: Path, eager: Callable[[], EagerEngine]) -> Output:
    """Return what eager fp32 says of the reference, from `cache_dir` if it was asked before.

    Raises `ValueError` for numbers that are not finite.
    """
    facts = facts_of(network, reference) | {
        "reference": hashlib.sha256(reference.contiguous().numpy().tobytes()).hexdigest(),
        "device": hardware.cpu(),
        "versions": kept.versions("torch"),
    }
    folder = kept.find(cache_dir, "reference", facts)
    if folder is not None:
        with np.load(folder / "answers.npz") as found:
            return found["logits"], found["attention"]
    said = _checked(network, eager()(reference))

    def write(fresh: Path) -> None:
        np.savez(fresh / "answers.npz", logits=said[0], attention=said[1])

    try:
        kept.keep(cache_dir, "reference", facts, write)
    except OSError as error:
        logger.warning("answers of the reference are not kept: %s", error)
    return said


def _checked(network: Network, said: Output) -> Output:
    if not (np.isfinite(said[0]).all() and np.isfinite(said[1]).all()):
        raise ValueError(f"network {network.name} gives numbers that are not finite on the reference crops")
    return said


def _problem(
    engine: Engine,
    expected: Output,
    reference: Tensor,
    most: int,
    to_probability: Callable[[float], float],
    rng: np.random.Generator | None,
) -> str | None:
    for chosen in batches(len(reference), most, rng or np.random.default_rng()):
        faces = reference[torch.from_numpy(chosen)]
        problem = disagreement((expected[0][chosen], expected[1][chosen]), engine(faces), to_probability)
        if problem is not None:
            return f"{problem} (batch of {len(chosen)})"
    return None
