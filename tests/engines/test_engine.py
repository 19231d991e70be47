"""Choosing an engine: what agrees serves, what does not is refused loudly, something always serves."""

import logging
import math
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engines import engine as engines
from engines.eager import EagerEngine
from engines.engine import (
    Engine,
    EngineUnavailableError,
    Name,
    Network,
    Output,
    Plan,
    Refusal,
    batches,
    build,
    disagreement,
)
from tests.engines.networks import Small, inputs


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def network(module: nn.Module | None = None) -> Network:
    return Network("small", (module or Small()).eval(), "0" * 64)


def built(tmp_path: Path, order: tuple[Name, ...], precision: engines.Precision = "fp32") -> Engine:
    return build(network(), Plan(order=order, precision=precision), tmp_path, inputs(6), sigmoid)


class Broken:
    """An engine whose output is the reference's, spoiled."""

    name = "openvino"
    precision: engines.Precision = "fp32"

    def __init__(self, spoil: Callable[[Output], Output]) -> None:
        self._right = EagerEngine(Small(), "fp32", 1)
        self._spoil = spoil

    def __call__(self, faces: torch.Tensor) -> Output:
        return self._spoil(self._right(faces))


def fail(_: Output) -> Output:
    raise RuntimeError("the device\nis on fire")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda out: (out[0] + 0.2, out[1]), "probabilities differ by up to"),
        (lambda out: (out[0] * np.nan, out[1]), "not finite"),
        (lambda out: (out[0][:3], out[1]), "shapes are"),
        (lambda out: (out[0], out[1] + 0.2), "attention maps differ"),
        (fail, "the device is on fire"),
    ],
)
def test_what_disagrees_is_refused_and_the_next_serves(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Output], Output],
    why: str,
) -> None:
    monkeypatch.setattr(engines, "make", lambda *_: Broken(spoil))
    told: list[Refusal] = []
    with caplog.at_level(logging.WARNING):
        chosen = build(
            network(),
            Plan(order=("openvino", "eager"), precision="fp32"),
            tmp_path,
            inputs(6),
            sigmoid,
            on_refused=told.append,
        )
    assert chosen.name == "eager"
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith("engine openvino fp32 refused for small: ")
    assert why in message
    assert "\n" not in message
    ((member, engine, precision, reason),) = [astuple(refusal) for refusal in told]
    assert (member, engine, precision) == ("small", "openvino", "fp32")
    assert message.endswith(reason)


def test_what_agrees_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Broken(lambda out: (out[0] + 1e-4, out[1]))
    monkeypatch.setattr(engines, "make", lambda *_: right)
    assert built(tmp_path, ("openvino", "eager")) is right


def test_the_reference_is_asked_once_and_the_others_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Asked(EagerEngine):
        def __call__(self, faces: torch.Tensor) -> Output:
            asked.append(len(faces))
            return super().__call__(faces)

    monkeypatch.setattr(engines, "EagerEngine", Asked)
    right = Broken(lambda out: out)
    monkeypatch.setattr(engines, "make", lambda *_: right)
    for _ in range(3):
        assert built(tmp_path, ("openvino", "eager")) is right
    assert asked == [6]
    monkeypatch.setattr(engines, "make", lambda *_: Broken(lambda out: (out[0] + 0.2, out[1])))
    assert built(tmp_path, ("openvino", "eager")).name == "eager"
    assert asked == [6]
    (kept,) = (tmp_path / "reference").rglob("answers.npz")
    kept.write_bytes(kept.read_bytes()[:-30])
    monkeypatch.setattr(engines, "make", lambda *_: right)
    assert built(tmp_path, ("openvino", "eager")) is right
    assert asked == [6, 6]
    other = build(network(), Plan(order=("openvino",)), tmp_path, inputs(4), sigmoid)
    assert (other, asked) == (right, [6, 6, 4])


def test_answers_that_cannot_be_kept_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reference").write_text("in the way")
    right = Broken(lambda out: out)
    monkeypatch.setattr(engines, "make", lambda *_: right)
    assert built(tmp_path, ("openvino",)) is right


def test_a_calibration_that_flattens_does_not_hide_a_change_of_sides() -> None:
    """At temperature 1000 no probability moves by .01, but a verdict has flipped."""
    maps = np.zeros((2, 1, 1), np.float32)
    expected = (np.array([1.5, -2.0], np.float32), maps)
    found = (np.array([-1.5, -2.0], np.float32), maps)
    assert disagreement(expected, found, lambda z: sigmoid(z / 1000)) == "1 of 2 crops change sides"
    near = (np.array([-0.01, -2.0], np.float32), maps)
    assert disagreement((np.array([0.01, -2.0], np.float32), maps), near, sigmoid) is None


def test_the_reference_serves_when_all_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object) -> Engine:
        raise EngineUnavailableError("not available: no module")

    monkeypatch.setattr(engines, "make", missing)
    with caplog.at_level(logging.WARNING):
        chosen = built(tmp_path, ("openvino",))
    assert (chosen.name, chosen.precision) == ("eager", "fp32")
    assert caplog.records[-1].getMessage() == "no engine of openvino can serve small: eager fp32 does"


def test_a_missing_library_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> object:
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr("importlib.import_module", no_library)
    assert built(tmp_path, ("openvino", "eager")).name == "eager"


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="engine 'tensorflow' is unknown; it must be one of tensorrt, "):
        built(tmp_path, ("tensorflow",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reference has shape \(0, 3, 32, 32\)"):
        build(network(), Plan(), tmp_path, inputs(1)[:0], sigmoid)
    with pytest.raises(ValueError, match="batch is 0; it must be at least 1"):
        build(network(), Plan(batch=0), tmp_path, inputs(1), sigmoid)


def test_a_network_of_nonsense_is_refused_whole(tmp_path: Path) -> None:
    module = Small()
    nn.init.constant_(module.head.bias, math.nan)
    with pytest.raises(ValueError, match="network small gives numbers that are not finite"):
        build(network(module), Plan(order=("eager",)), tmp_path, inputs(2), sigmoid)


class Batched(Broken):
    """Remembers how many inputs came together; wrong when they are `worst`."""

    def __init__(self, worst: int = 0) -> None:
        super().__init__(lambda out: out)
        self.sizes: list[int] = []
        self._worst = worst

    def __call__(self, faces: torch.Tensor) -> Output:
        self.sizes.append(len(faces))
        logits, attention = super().__call__(faces)
        return (-logits if len(faces) == self._worst else logits), attention


@pytest.mark.parametrize("most", [1, 2, 5, 16])
def test_engines_are_compared_at_one_the_most_and_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    engine = Batched()
    monkeypatch.setattr(engines, "make", lambda *_: engine)
    plan = Plan(order=("openvino",), batch=most)
    assert build(network(), plan, tmp_path, inputs(6), sigmoid) is engine
    assert {1, most} <= set(engine.sizes)
    assert max(engine.sizes) == most
    assert sum(engine.sizes) >= 6
    wrong = Batched(worst=most)
    monkeypatch.setattr(engines, "make", lambda *_: wrong)
    assert build(network(), plan, tmp_path, inputs(6), sigmoid).name == "eager"


@pytest.mark.parametrize(("count", "most"), [(1, 1), (12, 1), (12, 16), (12, 5), (3, 64)])
def test_every_input_is_in_some_batch(count: int, most: int) -> None:
    found = list(batches(count, most, np.random.default_rng(3)))
    assert set(np.concatenate(found)) == set(range(count))
    sizes = [len(chosen) for chosen in found]
    assert sizes[0] == 1
    assert sizes[2] == most
    assert 1 <= sizes[1] <= most


def test_sizes_and_order_are_drawn_anew() -> None:
    drawn = {
        tuple(tuple(chosen) for chosen in batches(12, 16, np.random.default_rng(seed))) for seed in range(8)
    }
    assert len(drawn) == 8


def test_what_is_tried_follows_device_and_precision() -> None:
    assert Plan().candidates() == (("openvino", "fp32"), ("eager", "fp32"))
    assert Plan(order=("openvino",), precision="bf16").candidates() == (
        ("openvino", "bf16"),
        ("openvino", "fp32"),
    )
    on_gpu = Plan(device="cuda").candidates()
    assert on_gpu[:2] == (("tensorrt", "fp16"), ("inductor", "fp16"))
    assert on_gpu[-1] == ("openvino", "fp32")


def test_a_precision_that_is_refused_is_followed_by_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def make(name: Name, precision: engines.Precision, *_: object) -> Engine:
        found = Broken(fail if precision == "bf16" else lambda out: out)
        found.precision = precision
        return found

    monkeypatch.setattr(engines, "make", make)
    with caplog.at_level(logging.WARNING):
        chosen = built(tmp_path, ("openvino",), "bf16")
    assert (chosen.name, chosen.precision) == ("openvino", "fp32")
    assert len(caplog.records) == 1


def test_tensorrt_says_what_it_needs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert built(tmp_path, ("tensorrt", "eager")).name == "eager"
    assert caplog.records[0].getMessage().endswith("refused for small: needs an NVIDIA GPU")


def test_a_gpu_that_runs_out_of_memory_later_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine agrees at start, then finds no memory for one input."""
    room = [True]

    class Cramped(Broken):
        def __call__(self, faces: torch.Tensor) -> Output:
            if not room[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(faces)

    def make(name: Name, *_: object) -> Engine:
        if name == "tensorrt":
            return Cramped(lambda out: out)
        raise EngineUnavailableError("not here")

    monkeypatch.setattr(engines, "make", make)
    told: list[Refusal] = []
    plan = Plan(device="cuda", precision="fp32")
    chosen = build(network(), plan, tmp_path, inputs(6), sigmoid, on_refused=told.append)
    assert told == []
    room[0] = False
    expected = EagerEngine(Small(), "fp32", 1)(inputs(3))
    assert np.allclose(chosen(inputs(3))[0], expected[0], atol=1e-5)
    assert (chosen.name, chosen.precision) == ("eager", "fp32")
    assert [(refusal.engine, refusal.reason) for refusal in told] == [
        ("tensorrt", "no memory left on the GPU"),
        ("openvino", "not here"),
    ]
