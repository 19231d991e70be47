"""Choosing an engine: what agrees serves, what does not is refused loudly, something always serves."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engines import engine as engines
from engines.eager import EagerEngine
from engines.engine import Engine, EngineUnavailableError, Network, Output, build, disagreement
from tests.engines.networks import Small, inputs


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def network(module: nn.Module | None = None) -> Network:
    return Network("small", (module or Small()).eval(), "0" * 64)


def built(tmp_path: Path, order: tuple[str, ...], precision: engines.Precision = "fp32") -> Engine:
    return build(network(), order, precision, 0, tmp_path, inputs(6), sigmoid)


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
    monkeypatch.setattr(engines, "_make", lambda *_: Broken(spoil))
    with caplog.at_level(logging.WARNING):
        chosen = built(tmp_path, ("openvino", "eager"))
    assert chosen.name == "eager"
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith("engine openvino fp32 refused for small: ")
    assert why in message
    assert "\n" not in message


def test_what_agrees_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Broken(lambda out: (out[0] + 1e-4, out[1]))
    monkeypatch.setattr(engines, "_make", lambda *_: right)
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
    monkeypatch.setattr(engines, "_make", lambda *_: right)
    for _ in range(3):
        assert built(tmp_path, ("openvino", "eager")) is right
    assert asked == [6]
    monkeypatch.setattr(engines, "_make", lambda *_: Broken(lambda out: (out[0] + 0.2, out[1])))
    assert built(tmp_path, ("openvino", "eager")).name == "eager"
    assert asked == [6]
    (kept,) = (tmp_path / "reference").iterdir()
    kept.write_bytes(kept.read_bytes()[:-30])
    monkeypatch.setattr(engines, "_make", lambda *_: right)
    assert built(tmp_path, ("openvino", "eager")) is right
    assert asked == [6, 6]
    other = build(network(), ("openvino",), "fp32", 0, tmp_path, inputs(4), sigmoid)
    assert (other, asked) == (right, [6, 6, 4])


def test_answers_that_cannot_be_kept_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reference").write_text("in the way")
    right = Broken(lambda out: out)
    monkeypatch.setattr(engines, "_make", lambda *_: right)
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

    monkeypatch.setattr(engines, "_make", missing)
    with caplog.at_level(logging.WARNING):
        chosen = built(tmp_path, ("openvino",))
    assert (chosen.name, chosen.precision) == ("eager", "fp32")
    assert caplog.records[-1].getMessage() == "no engine of openvino can serve small: eager fp32 does"


def test_a_missing_library_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> object:
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr("importlib.import_module", no_library)
    assert built(tmp_path, ("openvino", "eager")).name == "eager"


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (16, 8)])
def test_half_the_cores_are_left_to_the_decoders(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert engines.default_threads() == threads


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="engine 'tensorflow' is unknown; it must be openvino or eager"):
        built(tmp_path, ("tensorflow",))
    with pytest.raises(ValueError, match=r"reference has shape \(0, 3, 32, 32\)"):
        build(network(), ("eager",), "fp32", 0, tmp_path, inputs(1)[:0], sigmoid)


def test_a_network_of_nonsense_is_refused_whole(tmp_path: Path) -> None:
    module = Small()
    nn.init.constant_(module.head.bias, math.nan)
    with pytest.raises(ValueError, match="network small gives numbers that are not finite"):
        build(network(module), ("eager",), "fp32", 0, tmp_path, inputs(2), sigmoid)
