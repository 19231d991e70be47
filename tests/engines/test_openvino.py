"""OpenVINO: right numbers for every batch and thread, a cache that is never wrong, no calls home."""

import logging
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("engines.openvino", reason="needs openvino, not installed here", exc_type=ImportError)

from engines.eager import EagerEngine
from engines.engine import EngineUnavailableError, Mode, Network, Plan, Precision, build
from engines.kept import digest
from engines.openvino import OpenVinoEngine, facts, ov
from tests.engines.networks import Small, inputs


def network(module: nn.Module | None = None, sha256: str = "0" * 64) -> Network:
    return Network("small", (module or Small()).eval(), sha256)


def made(
    tmp_path: Path, precision: Precision = "fp32", mode: Mode = "latency", threads: int = 1
) -> OpenVinoEngine:
    return OpenVinoEngine(network(), precision, Plan(threads=threads, mode=mode), tmp_path, inputs(1))


def test_agrees_with_eager_at_every_batch_size(tmp_path: Path) -> None:
    engine, eager = made(tmp_path), EagerEngine(Small(), "fp32", 1)
    for count in (3, 1, 8, 2):
        found, expected = engine(inputs(count)), eager(inputs(count))
        assert np.allclose(found[0], expected[0], atol=1e-4)
        assert np.allclose(found[1], expected[1], atol=1e-4)
        assert found[0].dtype == found[1].dtype == np.float32


def test_is_chosen_when_it_agrees(tmp_path: Path) -> None:
    chosen = build(network(), Plan(threads=1), tmp_path, inputs(4), lambda z: 1 / (1 + math.exp(-z)))
    assert (chosen.name, chosen.precision) == ("openvino", "fp32")


def test_bf16_runs_or_says_it_cannot(tmp_path: Path) -> None:
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(EngineUnavailableError, match="no bf16"):
            made(tmp_path, "bf16")
        return
    expected = EagerEngine(Small(), "fp32", 1)(inputs(4))
    assert np.abs(made(tmp_path, "bf16")(inputs(4))[0] - expected[0]).max() < 0.1


def test_threads_get_their_own_results(tmp_path: Path) -> None:
    engine = made(tmp_path)
    batches = [inputs(1 + k % 4, seed=k) for k in range(24)]
    alone = [engine(batch)[0] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: engine(batch)[0], batches))
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(alone, together, strict=True))


def test_results_outlive_the_next_call(tmp_path: Path) -> None:
    engine = made(tmp_path)
    first = engine(inputs(2))
    kept = first[0].copy(), first[1].copy()
    engine(inputs(2, seed=9))
    assert np.array_equal(first[0], kept[0])
    assert np.array_equal(first[1], kept[1])


def test_the_cache_is_used_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(tmp_path)(inputs(3))

    def never(*_: object, **__: object) -> object:
        raise AssertionError("converted again")

    monkeypatch.setattr("engines.openvino.ov.convert_model", never)
    again = made(tmp_path)(inputs(3))
    assert np.array_equal(first[0], again[0])
    assert len(list((tmp_path / "openvino").iterdir())) == 1


def test_throughput_mode_splits_a_batch_and_gives_the_same(tmp_path: Path) -> None:
    engine, eager = made(tmp_path, mode="throughput", threads=2), EagerEngine(Small(), "fp32", 1)
    assert engine.side_by_side >= 1
    for count in (1, 7, 2, 16):
        found, expected = engine(inputs(count)), eager(inputs(count))
        assert np.allclose(found[0], expected[0], atol=1e-4)
        assert np.allclose(found[1], expected[1], atol=1e-4)


def test_a_spoiled_cache_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = made(tmp_path)(inputs(3))
    path = next((tmp_path / "openvino").rglob("network.xml"))
    path.write_text("<net>half a fi")
    with caplog.at_level(logging.WARNING):
        again = made(tmp_path)(inputs(3))
    assert np.array_equal(first[0], again[0])
    assert "made anew" in caplog.text
    assert "half a fi" not in path.read_text()


def test_a_cache_that_cannot_be_written_does_not_stop_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    engine = OpenVinoEngine(network(), "fp32", Plan(threads=1), blocked, inputs(1))
    assert engine(inputs(2))[0].shape == (2,)
    assert "not kept" in caplog.text


class Other(Small):
    """The same layers, put together differently: only the source tells."""

    def forward(self, faces: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, gate = super().forward(faces)
        return -logits, gate


def test_the_cache_key_changes_with_everything_that_matters() -> None:
    wide = torch.zeros(1, 3, 64, 64)
    facts_of_each = [
        facts(network(), "fp32", inputs(1)),
        facts(network(sha256="1" * 64), "fp32", inputs(1)),
        facts(network(), "bf16", inputs(1)),
        facts(network(), "fp32", wide),
        facts(network(Other()), "fp32", inputs(1)),
    ]
    keys = [digest(found) for found in facts_of_each]
    assert len(set(keys)) == len(keys)
    assert digest(facts(network(), "fp32", inputs(5))) == keys[0]
    assert set(facts_of_each[0]["versions"]) == {"openvino", "torch"}


def test_nothing_is_reported_to_openvinos_makers(tmp_path: Path) -> None:
    """Its telemetry writes a client id into the home directory before it sends anything."""
    script = (
        "import sys; from pathlib import Path;"
        "from engines.openvino import OpenVinoEngine; from engines.engine import Network, Plan;"
        "from tests.engines.networks import Small, inputs;"
        "network = Network('small', Small().eval(), '0');"
        f"OpenVinoEngine(network, 'fp32', Plan(threads=1), Path({str(tmp_path / 'cache')!r}), inputs(1));"
        "print([name for name, m in sys.modules.items() if 'openvino_telemetry' in name and m is not None])"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home)}
    environment.pop("CI", None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert done.stdout.strip() == "[]"
    assert not (home / "intel").exists()
