"""Inductor on the CPU: right numbers for every batch, kept, and nothing of it left lying about."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from engines import hardware, inductor, kept
from engines.eager import EagerEngine
from engines.engine import EngineUnavailableError, Network, Plan
from engines.inductor import InductorEngine, facts
from tests.conftest import requires
from tests.engines.networks import Small, inputs

BATCH = 5


def network(sha256: str = "0" * 64) -> Network:
    return Network("small", Small().eval(), sha256)


def made(cache: Path) -> InductorEngine:
    return InductorEngine(network(), "fp32", Plan(batch=BATCH, threads=1), cache, inputs(1))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache in which the network is compiled: a compiler is slow, and one run of it enough."""
    requires("g++")
    folder = tmp_path_factory.mktemp("cache")
    before = torch.get_num_threads()
    made(folder)
    yield folder
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_agrees_with_eager_at_every_batch_size_and_above(cache: Path) -> None:
    engine, eager = made(cache), EagerEngine(Small(), "fp32", 1)
    for count in (3, 1, BATCH, 2, BATCH + 2):
        found, expected = engine(inputs(count)), eager(inputs(count))
        assert np.allclose(found[0], expected[0], atol=1e-4)
        assert np.allclose(found[1], expected[1], atol=1e-4)
        assert found[0].dtype == found[1].dtype == np.float32


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_inputs_of_another_layout_are_right_too(cache: Path) -> None:
    engine, faces = made(cache), inputs(3)
    assert np.array_equal(engine(faces)[0], engine(faces.contiguous())[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_threads_get_their_own_results(cache: Path) -> None:
    engine = made(cache)
    several = [inputs(1 + k % 4, seed=k) for k in range(24)]
    alone = [engine(faces)[0] for faces in several]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda faces: engine(faces)[0], several))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_was_compiled_is_loaded_and_nothing_else_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(inductor, "_compile", never)
    first, again = made(cache), made(cache)
    outputs = first(inputs(2))
    assert np.array_equal(outputs[0], again(inputs(2))[0])
    (folder,) = (cache / "inductor").iterdir()
    assert {path.name for path in folder.iterdir()} == {inductor.FILE, kept.FACTS}
    engine_says = outputs[0].copy()
    first(inputs(2, seed=9))
    assert np.array_equal(outputs[0], engine_says)


def test_what_is_compiled_depends_on_the_cpu_the_batch_and_the_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Plan(batch=BATCH)
    found = [
        facts(network(), "fp32", plan, inputs(1)),
        facts(network(), "bf16", plan, inputs(1)),
        facts(network(), "fp32", Plan(batch=BATCH + 1), inputs(1)),
        facts(network("1" * 64), "fp32", plan, inputs(1)),
    ]
    monkeypatch.setattr(hardware, "cpu", lambda: {"kind": "cpu", "model": "other"})
    found.append(facts(network(), "fp32", plan, inputs(1)))
    assert len({kept.digest(one) for one in found}) == len(found)
    assert facts(network(), "fp32", plan, inputs(3)) == found[-1]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineUnavailableError, match="fp16 is for GPUs"):
        InductorEngine(network(), "fp16", Plan(), tmp_path, inputs(1))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setitem(os.environ, "CXX", "some-compiler")
    before = torch.get_num_threads()
    with pytest.raises(
        EngineUnavailableError, match=r"needs a C\+\+ compiler; some-compiler is not installed"
    ):
        InductorEngine(network(), "fp32", Plan(threads=1), tmp_path, inputs(1))
    torch.set_num_threads(before)
