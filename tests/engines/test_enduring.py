"""A GPU without memory costs time, then the engine, never the process."""

import logging

import numpy as np
import pytest
import torch

from engines.eager import EagerEngine
from engines.enduring import Enduring
from engines.engine import Output, Precision
from tests.engines.networks import Small, inputs


class Cramped:
    """Has room for `room` inputs at once."""

    name = "tensorrt"
    precision: Precision = "fp16"

    def __init__(self, room: int) -> None:
        self.room = room
        self.sizes: list[int] = []
        self._right = EagerEngine(Small(), "fp32", 1)

    def __call__(self, faces: torch.Tensor) -> Output:
        if len(faces) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        self.sizes.append(len(faces))
        return self._right(faces)


def never() -> EagerEngine:
    raise AssertionError("another engine was asked for")


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_batches_are_halved_until_they_fit(count: int) -> None:
    engine = Cramped(3)
    found = Enduring(engine, never)(inputs(count))
    expected = EagerEngine(Small(), "fp32", 1)(inputs(count))
    assert np.allclose(found[0], expected[0], atol=1e-5)
    assert np.allclose(found[1], expected[1], atol=1e-5)
    assert sum(engine.sizes) == count
    assert max(engine.sizes) <= 3


def test_with_no_memory_at_all_another_serves_for_good(caplog: pytest.LogCaptureFixture) -> None:
    engine, made = Cramped(0), []

    def instead() -> EagerEngine:
        made.append(EagerEngine(Small(), "fp32", 1))
        return made[0]

    enduring = Enduring(engine, instead)
    assert (enduring.name, enduring.precision) == ("tensorrt", "fp16")
    with caplog.at_level(logging.ERROR):
        logits, _ = enduring(inputs(5))
    assert np.allclose(logits, EagerEngine(Small(), "fp32", 1)(inputs(5))[0], atol=1e-5)
    assert len(made) == 1
    assert (enduring.name, enduring.precision) == ("eager", "fp32")
    assert len(caplog.records) == 1
    assert "\n" not in caplog.records[0].getMessage()
    engine.room = 16  # memory that comes back changes nothing: windows would begin anew each time
    enduring(inputs(2))
    assert engine.sizes == []


def test_other_errors_are_the_callers() -> None:
    def broken(faces: torch.Tensor) -> Output:
        raise RuntimeError("wrong shape")

    broken.name, broken.precision = "inductor", "fp16"  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="wrong shape"):
        Enduring(broken, never)(inputs(4))  # type: ignore[arg-type]
