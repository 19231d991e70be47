"""`unmask engines`: builds, lists, compares and measures what the settings name; no test looks at a speed."""

import json
import math
import signal
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from detectors.mtcnn import MtcnnDetector
from detectors.reference import reference_face
from engines import hardware, kept
from engines.bench import Pace
from engines.eager import EagerEngine
from engines.engine import Engine, Name, Network, Output, Plan, Precision
from stream import engine_bench, engine_commands, networks
from stream.cli import app
from stream.config import Config, Engines, Members
from stream.engine_bench import BenchOptions, advice, examine
from stream.errors import UnmaskError
from stream.metrics import Metrics
from tests.stream.test_assemble import make

BRIEF = Pace(2, 0.01)


@pytest.fixture(autouse=True)
def _no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)


def settings(folder: Path, *members: Path, **engines: Any) -> Config:
    own = {"cache_dir": str(folder / "cache"), "threads": 1, "batch": 3, "order": ("eager",)} | engines
    return Config(
        data_dir=str(folder), members=Members(names=tuple(map(str, members))), engines=Engines(**own)
    )


class Wrong:
    """An engine that says the contrary."""

    name, precision = "inductor", "fp32"

    def __init__(self, network: Network) -> None:
        self._right = EagerEngine(network.module, "fp32", 1)

    def __call__(self, faces: torch.Tensor) -> Output:
        logits, attention = self._right(faces)
        return 5 - logits, attention


def making(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `inductor` be wrong and `openvino` kept without being there; eager is itself."""

    def make_one(
        name: Name, precision: Precision, network: Network, plan: Plan, cache: Path, reference: torch.Tensor
    ) -> Engine:
        if name == "inductor":
            return Wrong(network)  # type: ignore[return-value]
        return EagerEngine(network.module, precision, 1)

    monkeypatch.setattr(engine_commands, "make", make_one)
    monkeypatch.setattr("engines.engine.make", make_one)


def test_build_says_what_serves_and_what_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    making(monkeypatch)
    one = make(tmp_path, "one")
    out = StringIO()
    assert engine_commands.build_engines(settings(tmp_path, one), [], out) == 0
    assert out.getvalue().startswith("one: eager fp32, ")
    out = StringIO()
    config = settings(tmp_path, one, order=("inductor", "eager"))
    assert engine_commands.build_engines(config, [str(one)], out) == 1
    first, second = out.getvalue().splitlines()
    assert first.startswith("one: eager fp32, ")
    assert second.startswith("  refused inductor fp32: ")


def test_verify_tells_how_far_apart_engines_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    making(monkeypatch)
    one = make(tmp_path, "one")
    out = StringIO()
    config = settings(tmp_path, one, order=("eager", "inductor", "tensorrt"))
    monkeypatch.setattr(engine_commands, "make", _without_tensorrt(engine_commands.make))
    assert engine_commands.verify_engines(config, [], True, out) == 1
    eager, inductor, tensorrt = map(json.loads, out.getvalue().splitlines())
    assert (eager["network"], eager["state"]) == ("one", "agrees")
    assert eager["probability"] < 1e-6
    assert inductor["state"] == "DIFFERS"
    assert inductor["logit"] > 1
    assert inductor["reason"]
    assert (tensorrt["state"], tensorrt["reason"]) == ("absent", "needs an NVIDIA GPU")
    out = StringIO()
    assert engine_commands.verify_engines(settings(tmp_path, one), [], False, out) == 0
    assert out.getvalue().startswith("agrees  one")


def _without_tensorrt(made: Any) -> Any:
    from engines.engine import EngineUnavailableError

    def make_one(name: Name, *rest: Any) -> Engine:
        if name == "tensorrt":
            raise EngineUnavailableError("needs an NVIDIA GPU")
        return made(name, *rest)

    return make_one


def test_list_tells_what_is_kept_and_what_no_longer_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = StringIO(), settings(tmp_path)
    assert engine_commands.list_engines(config, False, out) == 0
    assert "nothing is kept" in out.getvalue()
    facts = {"name": "one", "precision": "fp32", "shape": [3, 32, 32], "versions": kept.versions("torch")}
    current = [
        facts | {"device": {"kind": "cpu"}},
        facts | {"device": hardware.cpu(), "batch": 16},
    ]
    stale = [
        facts | {"device": {"kind": "cpu"}, "versions": {"torch": "0.1"}},
        facts | {"device": hardware.cpu() | {"model": "another"}},
        facts | {"device": {"kind": "cuda", "model": "Card"}},
    ]
    monkeypatch.setattr(hardware, "find_device", lambda: "cpu")
    for one in current + stale:
        kept.keep(tmp_path / "cache", "openvino", one, lambda folder: None)
    out = StringIO()
    assert engine_commands.list_engines(config, True, out) == 0
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert sorted(row["state"] for row in rows) == ["current"] * 2 + ["stale"] * 3
    assert {row["network"] for row in rows} == {"one"}
    out = StringIO()
    engine_commands.list_engines(config, False, out)
    assert out.getvalue().count("stale") == 3
    assert "batch to 16" in out.getvalue()
    assert "any batch" in out.getvalue()


def test_a_layout_with_random_weights_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_commands, "ARCHITECTURES", {"Tiny": None})
    monkeypatch.setattr(engine_commands, "build_layout", lambda _: torch.nn.Conv2d(3, 2, 3))
    face = (100.0, 100.0, 200.0, 220.0)
    first, again = (engine_commands.load_subject("random:Tiny", Config(), face) for _ in range(2))
    assert first.network.sha256 == again.network.sha256
    assert first.network.name == "random:Tiny"
    assert first.reference.shape[1:] == (3, 224, 224)
    assert first.to_probability(0.0) == 0.5
    with pytest.raises(UnmaskError, match="'random:Huge' is no layout; there are: random:Tiny"):
        engine_commands.load_subject("random:Huge", Config(), face)


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="no-such-member"):
        engine_commands.load_subject("no-such-member", settings(tmp_path), (0.0, 0.0, 1.0, 1.0))


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "find_device", lambda: "cpu")
    with pytest.raises(UnmaskError, match=r"engines\.device is cuda and PyTorch finds no GPU here"):
        networks.plan_of(settings(tmp_path, device="cuda"))
    assert networks.plan_of(settings(tmp_path)).device == "cpu"
    monkeypatch.setattr(networks, "find_device", lambda: "cuda")
    assert networks.plan_of(settings(tmp_path)).device == "cuda"
    assert networks.plan_of(settings(tmp_path, device="cpu")).device == "cpu"
    assert networks.plan_of(settings(tmp_path)).batch == 3
    alone = settings(tmp_path).model_copy(update={"deterministic": True})
    assert networks.plan_of(alone).batch == 1


def test_refused_engines_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stream.assemble import build_reader

    making(monkeypatch)
    one, two = make(tmp_path, "one"), make(tmp_path, "two", seed=3)
    assembly = build_reader(settings(tmp_path, one, two, order=("inductor", "eager")))
    assert [refusal.network for refusal in assembly.refusals] == ["one", "two"]
    registry = Metrics(assembly.usage, assembly.refusals).registry
    labels = {"engine": "inductor", "precision": "fp32"}
    assert registry.get_sample_value("unmask_engines_refused_total", labels) == 2


def task(folder: Path, member: Path, engine: Name = "eager", precision: Precision = "fp32") -> Any:
    config = settings(folder, member)
    plan = replace(networks.plan_of(config), precision=precision)
    face = reference_face(MtcnnDetector())
    return engine_bench.Task(config, face, str(member), engine, plan, (1, 3), BRIEF)


def test_an_engine_is_timed_compared_and_set_against_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr("engines.bench.MATRIX", {"cpu": 64})
    monkeypatch.setattr("engines.bench.COPIED", {"cpu": 2**16})
    rows = examine(task(tmp_path, make(tmp_path, "one")))
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert (row["network"], row["engine"], row["agrees"]) == ("one", "eager", True)
        assert row["parity"]["probability"] < 1e-6
        assert row["calls"] >= BRIEF.repeats
        assert row["lowest"] <= row["per_s"] <= row["highest"]
        assert row["memory_bytes"] >= 0
        flops = row["work"]["flops"] * row["per_s"] / row["limits"]["flops"]
        assert math.isclose(row["arithmetic_share"], flops)
        assert row["bandwidth_share"] > 0
    json.dumps(rows)


def test_an_engine_that_cannot_run_is_a_row_with_the_reason(tmp_path: Path, one_thread: None) -> None:
    (row,) = examine(task(tmp_path, make(tmp_path, "one"), "tensorrt", "fp16"))
    assert (row["agrees"], row["refused"]) == (False, "needs an NVIDIA GPU")


def test_the_advice_is_the_fastest_that_agrees_at_the_largest_batch() -> None:
    def row(engine: str, batch: int, per_s: float, agrees: bool = True) -> dict[str, Any]:
        found = {"network": "one", "engine": engine, "precision": "bf16", "mode": "latency", "device": "cpu"}
        return found | {"batch": batch, "per_s": per_s, "agrees": agrees}

    rows = [
        row("openvino", 1, 90.0),
        row("openvino", 16, 40.0),
        row("eager", 16, 20.0),
        row("inductor", 16, 80.0, False),
    ]
    (line,) = advice(rows)
    assert line.startswith("one: fastest at 16: ")
    assert "engines.order='[\"openvino\"]' --set engines.precision=bf16" in line
    refused = {"network": "two", "engine": "eager", "agrees": False, "refused": "no memory"}
    assert list(advice([refused])) == ["two: no engine agrees; eager fp32 serves it"]


def test_every_engine_precision_and_mode_of_the_device_is_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make(tmp_path, "one")
    monkeypatch.setattr(networks, "find_device", lambda: "cpu")

    def asked(options: BenchOptions, **engines: Any) -> list[tuple[str, str, str, str]]:
        tasks = engine_bench._tasks(settings(tmp_path, one, **engines), options)
        return [(each.engine, each.precision, each.plan.mode, each.plan.device) for each in tasks]

    assert asked(BenchOptions()) == [
        ("openvino", "fp32", "latency", "cpu"),
        ("openvino", "bf16", "latency", "cpu"),
        ("eager", "fp32", "latency", "cpu"),
        ("eager", "bf16", "latency", "cpu"),
    ]
    assert asked(BenchOptions(engines=("openvino",), precisions=("bf16",)), threads=2) == [
        ("openvino", "bf16", "latency", "cpu"),
        ("openvino", "bf16", "throughput", "cpu"),
    ]
    monkeypatch.setattr(networks, "find_device", lambda: "cuda")
    on_gpu = asked(BenchOptions(precisions=("fp16",)))
    assert on_gpu[0] == ("tensorrt", "fp16", "latency", "cuda")
    assert on_gpu[-1] == ("openvino", "fp16", "latency", "cpu")


def test_batches_beyond_the_settings_are_built_for(tmp_path: Path) -> None:
    one = make(tmp_path, "one")
    (first, *_) = engine_bench._tasks(settings(tmp_path, one), BenchOptions(batches=(32, 1, 32)))
    assert first.batches == (1, 32)
    assert first.plan.batch == 32


def dies(task: Any) -> list[dict[str, Any]]:
    import os

    os._exit(9)


@pytest.mark.slow
def test_a_process_that_dies_costs_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_bench, "examine", dies)
    (row,) = engine_bench._examined(task(tmp_path, make(tmp_path, "one")))
    assert (row["agrees"], row["refused"]) == (False, "its process died")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_whole_bench_by_the_command(tmp_path: Path) -> None:
    """In processes of its own, with the limits as they are measured: a second each on a machine at rest."""
    one = make(tmp_path, "one")
    out = tmp_path / "figures.json"
    options = ["--quick", "--engine", "eager", "--precision", "fp32", "--batch", "2", "--out", str(out)]
    given = ["--set", f"engines.cache_dir={tmp_path / 'cache'}", "--set", "engines.threads=1"]
    done = CliRunner().invoke(app, ["engines", "bench", str(one), *options, *given])
    assert done.exit_code == 0, done.output
    assert "fastest at 2" in done.output
    figures = json.loads(out.read_text())
    (row,) = figures["rows"]
    assert (row["network"], row["batch"], row["agrees"]) == ("one", 2, True)
    assert row["limits"]["flops"] > 0
    assert figures["machine"]["cores"] >= 1
    assert np.isfinite(row["per_s"])


def test_the_command_names_what_it_does_not_know(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["engines", "build", "random:Huge"])
    assert done.exit_code == 2
    assert "is no layout" in done.output
    done = CliRunner().invoke(app, ["engines", "bench", "--engine", "cuda"])
    assert done.exit_code == 2
    assert "--engine is 'cuda'; it must be one of tensorrt, inductor, openvino, eager" in done.output
