"""TensorRT, as far as it can be proved without its libraries or a GPU; test_gpu.py runs it on one.

Read from torch-tensorrt's own sources, by running them: every network of ours is exported with a dynamic
batch, lowered by torch-tensorrt, and each operator of what is left has a converter that takes it, so that
nothing falls back to PyTorch; every keyword we pass is one it knows.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from detectors.members import list_halves, list_members
from engines import hardware, kept
from engines import tensorrt as engine_module
from engines.engine import EngineUnavailableError, Network, Plan
from engines.tensorrt import TensorRtEngine, facts, timing_cache
from tests.conftest import unavailable
from tests.engines.networks import Small, inputs

REPOSITORY = Path(__file__).resolve().parents[2]
CARD = {"kind": "cuda", "model": "Card", "driver": ["580.65.06", 13000]}


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with torch-tensorrt's Python sources and none of its libraries."""
    found = importlib.util.find_spec("torch_tensorrt")
    if found is None or not found.submodule_search_locations:
        unavailable("torch-tensorrt (pip install --no-deps torch-tensorrt)")
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(
        found.submodule_search_locations[0],
        folder / "torch_tensorrt",
        ignore=shutil.ignore_patterns("*.so", "lib", "bin", "include", "__pycache__"),
    )
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", ["members", "published", "mtcnn"])
def test_nothing_of_our_networks_falls_back_to_pytorch(sources: Path, part: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engines.lowered", str(sources), part],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    names = {network["network"] for network in found}
    assert (
        names
        >= {
            "members": {*list_members(), *list_halves(), "mirrored", "half", "cosine", "siamese"},
            "published": {"EfficientNetAutoAttB4ST", "Xception"},
            "mtcnn": {"PNet", "RNet", "ONet"},
        }[part]
    )
    for network in found:
        assert network["engine"] == "engine"
        assert any("conv" in operator for operator in network["operators"]), network
        assert network["unconverted"] == [], network
        assert network["unknown_keywords"] == [], network
        ((smallest, best, largest),) = network["profile"]
        assert smallest[0] == 1 < best[0] == largest[0]
        assert smallest[1:] == largest[1:]
        if part != "mtcnn":
            assert (network["inputs"], network["outputs"]) == (["faces"], ["logits", "attention"])


def test_what_we_call_of_tensorrt_is_what_torch_tensorrt_calls(sources: Path) -> None:
    """TensorRT's own API is not here; torch-tensorrt's runtime for Python is, and calls the same names."""
    runtime = (sources / "torch_tensorrt/dynamo/runtime/_TRTEngine.py").read_text()
    own = Path(engine_module.__file__).read_text()
    called = set(re.findall(r"(?:context|self\._engine|self\._runtime)\.(\w+)\(", own))
    assert called == {
        "create_execution_context",
        "deserialize_cuda_engine",
        "execute_async_v3",
        "get_tensor_shape",
        "set_input_shape",
        "set_tensor_address",
    }
    config = (sources / "torch_tensorrt/runtime/_runtime_config.py").read_text()
    for name in called:
        assert f".{name}(" in runtime + config, name


def plan(**changes: Any) -> Plan:
    return Plan(**{"device": "cuda", "order": ("tensorrt",), "precision": "fp16", "batch": 8, **changes})


def network(sha256: str = "0" * 64) -> Network:
    return Network("small", Small().eval(), sha256)


def test_an_engine_is_built_anew_when_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "1", "torch-tensorrt": "1", "tensorrt-cu13": "1", "tensorrt": ""}
    monkeypatch.setattr(hardware, "gpu", lambda: CARD)
    monkeypatch.setattr(kept, "versions", lambda *names: {name: versions[name] for name in names})
    found = [
        facts(network(), "fp16", plan(), inputs(1)),
        facts(network("1" * 64), "fp16", plan(), inputs(1)),
        facts(network(), "fp32", plan(), inputs(1)),
        facts(network(), "fp16", plan(batch=9), inputs(1)),
        facts(network(), "fp16", plan(), torch.zeros(1, 3, 64, 64)),
    ]
    for package in ("torch", "torch-tensorrt", "tensorrt-cu13"):
        versions[package] = "2"
        found.append(facts(network(), "fp16", plan(), inputs(1)))
    for other in ({"model": "Other"}, {"driver": ["590.1", 13000]}):
        monkeypatch.setattr(hardware, "gpu", lambda other=other: CARD | other)
        found.append(facts(network(), "fp16", plan(), inputs(1)))
    assert len({kept.digest(one) for one in found}) == len(found)


def test_timings_are_shared_by_networks_and_not_by_cards_or_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "gpu", lambda: CARD)
    one = timing_cache(tmp_path, facts(network(), "fp16", plan(), inputs(1)))
    other = timing_cache(tmp_path, facts(network("1" * 64), "fp32", plan(batch=3), inputs(1)))
    assert one == other
    monkeypatch.setattr(hardware, "gpu", lambda: CARD | {"model": "Other"})
    assert timing_cache(tmp_path, facts(network(), "fp16", plan(), inputs(1))) != one


class Runtime:
    """In place of TensorRT's: loads nothing that is `broken`."""

    broken = b""

    def __init__(self, logger: object) -> None:
        pass

    def deserialize_cuda_engine(self, content: bytes) -> object | None:
        return None if content == self.broken else SimpleNamespace(content=content)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A TensorRT that builds and loads nothing; returns the timing caches that builds were given."""
    library = ModuleType("tensorrt")
    library.Runtime = Runtime  # type: ignore[attr-defined]
    library.Logger = lambda level: None  # type: ignore[attr-defined]
    library.Logger.WARNING = 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr(hardware, "gpu", lambda: CARD)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(engine_module, "exported", lambda *_: "graph")
    given: list[Path] = []

    def serialised(graph: Any, batch: int, example: Any, timings: Path, device: Any) -> bytes:
        given.append(timings)
        timings.write_bytes((timings.read_bytes() if timings.exists() else b"") + b"t")
        return b"engine of %d" % batch

    monkeypatch.setattr(engine_module, "serialised", serialised)
    return given


def made(tmp_path: Path, **changes: Any) -> TensorRtEngine:
    return TensorRtEngine(network(), "fp16", plan(**changes), tmp_path, inputs(1))


def test_an_engine_is_kept_and_loaded_again(tmp_path: Path, tensorrt: list[Path]) -> None:
    assert made(tmp_path)._engine.content == b"engine of 8"
    assert made(tmp_path)._engine.content == b"engine of 8"
    assert len(tensorrt) == 1
    assert made(tmp_path, batch=3)._engine.content == b"engine of 3"
    assert len(tensorrt) == 2


def test_timings_are_carried_on_and_never_written_where_others_read(
    tmp_path: Path, tensorrt: list[Path]
) -> None:
    made(tmp_path)
    (timings,) = (tmp_path / "timings").iterdir()
    assert timings.read_bytes() == b"t"
    made(tmp_path, batch=3)
    assert timings.read_bytes() == b"tt"
    assert timings not in tensorrt


def test_what_cannot_be_loaded_is_built_anew_the_next_time(
    tmp_path: Path, tensorrt: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path)
    monkeypatch.setattr(Runtime, "broken", b"engine of 8")
    with pytest.raises(EngineUnavailableError, match="cannot load the engine it built"):
        made(tmp_path)
    monkeypatch.setattr(Runtime, "broken", b"")
    made(tmp_path)
    assert len(tensorrt) == 2


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineUnavailableError, match="needs an NVIDIA GPU"):
        made(tmp_path, device="cpu")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineUnavailableError, match=r"not available: .*tensorrt"):
        made(tmp_path)
