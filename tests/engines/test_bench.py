"""What the bench counts is what is there; no test here looks at a speed."""

from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engines import bench
from engines.bench import Pace
from engines.eager import EagerEngine
from engines.engine import Output, Precision
from tests.engines.networks import Small, inputs


class Ticking:
    """An engine that takes as long as it is told, by a clock of its own."""

    name = "ticking"
    precision: Precision = "fp32"

    def __init__(self, *seconds: float) -> None:
        self.now = 0.0
        self._seconds = seconds
        self._calls = count()

    def clock(self) -> float:
        return self.now

    def __call__(self, faces: torch.Tensor) -> Output:
        self.now += self._seconds[next(self._calls) % len(self._seconds)]
        return np.zeros(len(faces), np.float32), np.zeros((len(faces), 1, 1), np.float32)


def test_rates_and_percentiles_are_those_of_the_calls() -> None:
    engine = Ticking(0.1)
    timing = bench.timed(engine, inputs(4), Pace(3, 1.0), engine.clock)
    assert timing.batch == 4
    assert timing.calls in (30, 33)  # sums of tenths
    for rate in (timing.per_s, timing.lowest, timing.highest):
        assert rate == pytest.approx(40)
    assert timing.p50_s == pytest.approx(0.1)
    assert timing.p95_s == pytest.approx(0.1)


def test_slow_calls_show_in_the_tail_and_slow_repeats_in_the_spread() -> None:
    engine = Ticking(*[0.1] * 9, 1.1)
    timing = bench.timed(engine, inputs(1), Pace(4, 0.5), engine.clock)
    assert timing.p50_s == pytest.approx(0.1)
    assert timing.p95_s > 0.5
    assert timing.lowest < timing.per_s <= timing.highest


def test_a_repeat_is_one_call_at_least() -> None:
    engine = Ticking(5.0)
    assert bench.timed(engine, inputs(2), Pace(2, 0.1), engine.clock).calls == 2


def test_work_is_counted_by_hand() -> None:
    """A convolution 3 to 8, 3x3, stride 2 on 32x32; a depthwise one; a linear layer 8 to 1."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, 2, 1)
            self.depth = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
            self.head = nn.Linear(8, 1)

        def forward(self, faces: torch.Tensor) -> torch.Tensor:
            return self.head(self.depth(self.conv(faces)).mean((2, 3)))

    work = bench.work(Net(), inputs(3))
    assert work.flops == 2 * (8 * 16 * 16 * 27 + 8 * 16 * 16 * 9 + 8)
    assert work.values == (3 * 32 * 32 + 8 * 16 * 16) + 2 * 8 * 16 * 16 + (8 + 1)
    assert work.weights == 8 * 27 + 8 * 9 + 8
    assert work.bytes("fp32", 1) == 4 * (work.values + work.weights)
    assert work.bytes("fp16", 4) == 2 * (work.values + work.weights / 4)


def test_counting_leaves_the_network_as_it_was() -> None:
    module = Small().eval()
    bench.work(module, inputs(1))
    assert all(not part._forward_hooks for part in module.modules())


def test_parity_is_the_largest_change_in_any_batch() -> None:
    right = EagerEngine(Small(), "fp32", 1)
    reference = inputs(6)

    class Off:
        """Wrong by a logit of .05 when given the most at once."""

        name, precision = "off", "fp32"

        def __call__(self, faces: torch.Tensor) -> Output:
            logits, attention = right(faces)
            return logits + (0.05 if len(faces) == 9 else 0.0), attention

    found, problem = bench.parity(
        Off(), right(reference), reference, 9, lambda z: z / 100, np.random.default_rng(0)
    )
    assert found.logit == pytest.approx(0.05, abs=1e-4)
    assert found.probability == pytest.approx(0.0005, abs=1e-5)
    assert found.attention < 1e-5
    assert problem is None
    _, problem = bench.parity(Off(), right(reference), reference, 9, lambda z: z, np.random.default_rng(0))
    assert problem is not None
    assert "probabilities differ" in problem


def test_limits_are_measured_on_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MATRIX", {"cpu": 16})
    monkeypatch.setattr(bench, "COPIED", {"cpu": 1024})
    moments = count(0, 2)
    found = bench.limits("cpu", "bf16", lambda: float(next(moments)))
    assert found.flops == 2 * 16**3 / 2
    assert found.bandwidth == 2 * 1024 / 2


def test_memory_is_what_the_system_says(tmp_path: Path) -> None:
    before = bench.taken("cpu")
    held = np.ones(64 * 2**20, np.uint8)
    assert bench.taken("cpu") - before > 32 * 2**20
    del held
