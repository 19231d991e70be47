"""How fast engines are, how far from the reference, and what share of the device's own limits that is."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engines.eager import DTYPES
from engines.engine import Change, Engine, Output, Precision, batches, changed, disagreement
from engines.hardware import Device

BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}

MATRIX: dict[Device, int] = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices multiplied to learn the arithmetic limit: large enough to keep every unit busy,
small enough that a core does it in a second."""
COPIED: dict[Device, int] = {"cpu": 128 * 2**20, "cuda": 2**30}
"""Bytes copied to learn the bandwidth limit: several times any cache."""
TRIALS = 5
"""Of which the best counts: a limit is what the device can do, not what it did beside other work."""

ROUNDS = 4
"""Rounds of random batches that parity is taken over: each gives every reference input at least once."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a measurement takes: repeats, and seconds of each."""

    repeats: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Timing:
    """An engine at one batch size: inputs a second (median, lowest and highest of the repeats), seconds of
    one call (median and 95th percentile of all calls)."""

    batch: int
    calls: int
    per_s: float
    lowest: float
    highest: float
    p50_s: float
    p95_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What a network has to do at least: `flops` an input in convolutions and linear layers, a product and a
    sum each counted; `values` an input that these read and write; `weights` that they read once a call."""

    flops: float
    values: float
    weights: float

    def bytes(self, precision: Precision, batch: int) -> float:
        """Return the bytes an input that pass memory if no layer finds its input in a cache."""
        return BYTES[precision] * (self.values + self.weights / batch)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device did at best: floating point operations a second in a product of two square matrices of
    this precision, bytes a second in a copy (read and written)."""

    flops: float
    bandwidth: float


def timed(
    engine: Engine, faces: Tensor, pace: Pace, clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """Call the engine with these inputs over and over, first once unmeasured for each of its preparations."""
    for _ in range(2):
        engine(faces)
    rates, calls = [], []
    for _ in range(pace.repeats):
        moments = [clock()]
        while len(moments) == 1 or moments[-1] - moments[0] < pace.seconds:
            engine(faces)
            moments.append(clock())
        calls += [b - a for a, b in pairwise(moments)]
        rates.append(len(faces) * (len(moments) - 1) / (moments[-1] - moments[0]))
    p50, p95 = np.percentile(calls, [50, 95])
    return Timing(
        batch=len(faces),
        calls=len(calls),
        per_s=float(np.median(rates)),
        lowest=min(rates),
        highest=max(rates),
        p50_s=float(p50),
        p95_s=float(p95),
    )


def parity(
    engine: Engine,
    expected: Output,
    reference: Tensor,
    most: int,
    to_probability: Callable[[float], float],
    rng: np.random.Generator,
) -> tuple[Change, str | None]:
    """Return how far an engine lies from the reference at most, in batches of 1, `most` and between, and what
    refuses it; None: it may serve. Raises `ValueError` for answers of another shape."""
    largest = Change(0.0, 0.0, 0.0)
    problem: str | None = None
    for _ in range(ROUNDS):
        for chosen in batches(len(reference), most, rng):
            wanted = expected[0][chosen], expected[1][chosen]
            found = engine(reference[torch.from_numpy(chosen)])
            problem = problem or disagreement(wanted, found, to_probability)
            change = changed(wanted, found, to_probability)
            largest = Change(
                probability=max(largest.probability, change.probability),
                logit=max(largest.logit, change.logit),
                attention=max(largest.attention, change.attention),
            )
    return largest, problem


def work(module: nn.Module, example: Tensor) -> Work:
    """Count what a network does with `example`, float32 (1, 3, S, S)."""
    flops = values = weights = 0.0

    def count(layer: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> None:
        nonlocal flops, values, weights
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # one product and one sum for each weight that an output value is made of
        flops += 2.0 * found.numel() * weight[0].numel()
        values += given[0].numel() + found.numel()
        weights += weight.numel()

    hooks = [
        layer.register_forward_hook(count)
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    try:
        with torch.inference_mode():
            module(example[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return Work(flops, values, weights)


def limits(device: Device, precision: Precision, clock: Callable[[], float] = time.perf_counter) -> Limits:
    """Measure what the device can do with PyTorch's threads as they are set."""
    side = MATRIX[device]
    matrix = torch.ones(side, side, dtype=DTYPES[precision], device=device)
    whole = torch.zeros(COPIED[device], dtype=torch.uint8, device=device)
    product, copy = torch.empty_like(matrix), torch.empty_like(whole)
    with torch.inference_mode():
        multiplied = _best(lambda: torch.mm(matrix, matrix, out=product), device, clock)
        copied = _best(lambda: copy.copy_(whole), device, clock)
    return Limits(2.0 * side**3 / multiplied, 2.0 * COPIED[device] / copied)


def taken(device: Device) -> int:
    """Return the bytes that this process holds resident, or of a GPU all that is taken, whoever did."""
    if device == "cuda":
        free, whole = torch.cuda.mem_get_info()
        return int(whole - free)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _best(do: Callable[[], object], device: Device, clock: Callable[[], float]) -> float:
    do()
    spent = []
    for _ in range(TRIALS):
        _settle(device)
        begun = clock()
        do()
        _settle(device)
        spent.append(clock() - begun)
    return min(spent)


def _settle(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
