"""On an NVIDIA GPU: every engine for it is built, compared with eager fp32 and timed. `pytest -m gpu -s`.

Without a GPU all of it skips; what can be proved then is in test_tensorrt.py. Nothing here asserts a speed.
"""

import importlib.util
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from detectors.members import Member, list_members, load_member
from detectors.mtcnn import MtcnnDetector
from detectors.published import PAPER_CROP
from detectors.published import build as build_layout
from detectors.reference import reference_crops, reference_face
from engines import bench, hardware
from engines.eager import EagerEngine
from engines.engine import Engine, Name, Network, Output, Plan, Precision, make
from engines.graphs import Replayed
from tests.engines.networks import Small, inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, none is here"),
]

BATCH = 32
B4 = "random EfficientNetB4"
PACE = bench.Pace(5, 1.0)
ENGINES = [
    pytest.param(
        "tensorrt",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("tensorrt") is None
            or importlib.util.find_spec("torch_tensorrt") is None,
            reason="needs TensorRT (pip install 'unmask[tensorrt]'), not installed here",
        ),
    ),
    "inductor",
    "eager",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def subject(name: str) -> tuple[Network, torch.Tensor, Callable[[float], float]]:
    face = reference_face(MtcnnDetector())
    if name == B4:
        torch.manual_seed(4)
        module = build_layout("EfficientNetB4").eval().requires_grad_(False)
        return (
            Network(B4, module, "4" * 64),
            reference_crops(face, PAPER_CROP),
            lambda z: 1 / (1 + math.exp(-z)),
        )
    member: Member = load_member(name)
    network = Network(name, member.module, member.sha256)
    return network, reference_crops(face, member.policy), member.calibration.probability


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [*list_members(), B4])
def test_engines_agree_with_eager_fp32_and_are_timed(
    cache: Path, name: str, engine: Name, precision: Precision
) -> None:
    network, reference, to_probability = subject(name)
    plan = Plan(device="cuda", batch=BATCH)
    built = make(engine, precision, network, plan, cache, reference)
    expected: Output = EagerEngine(network.module, "fp32", hardware.default_threads())(reference)
    change, problem = bench.parity(
        built, expected, reference, BATCH, to_probability, np.random.default_rng(1)
    )
    work, limits = bench.work(network.module, reference[:1]), bench.limits("cuda", precision)
    for batch in (1, 8, BATCH):
        timing = bench.timed(built, reference[torch.arange(batch) % len(reference)], PACE)
        share = work.flops * timing.per_s / limits.flops
        print(
            f"\n{name} {engine} {precision} batch {batch}: {timing.per_s:.0f} faces/s "
            f"({timing.lowest:.0f} to {timing.highest:.0f}), p50 {1000 * timing.p50_s:.2f} ms, "
            f"{share:.1%} of the arithmetic limit, {change}",
            end="",
        )
    assert problem is None or precision == "bf16", problem


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_get_their_own_results(cache: Path, engine: Name) -> None:
    network = Network("small", Small().eval(), "5" * 64)
    built: Engine = make(engine, "fp32", network, Plan(device="cuda", batch=8), cache, inputs(1))
    several = [inputs(1 + k % 11, seed=k) for k in range(48)]
    alone = [built(faces)[0] for faces in several]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda faces: built(faces)[0], several))
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_built_is_loaded_again(cache: Path, engine: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network("small", Small().eval(), "6" * 64)
    plan = Plan(device="cuda", batch=8)
    first = make(engine, "fp16", network, plan, cache, inputs(1))(inputs(5))

    def never(*_: object) -> None:
        raise AssertionError("built again")

    for module in ("inductor._compile", "tensorrt._build"):
        monkeypatch.setattr(f"engines.{module}", never)
    again = make(engine, "fp16", network, plan, cache, inputs(1))(inputs(5))
    assert np.allclose(first[0], again[0], atol=1e-5)


def test_recorded_batches_are_the_networks_own_answers() -> None:
    module = Small().eval().requires_grad_(False).cuda()
    replayed = Replayed(lambda size: module, inputs(1), 6, torch.channels_last)
    with torch.inference_mode():
        for count in (1, 3, 6, 2, 13, 1):
            faces = inputs(count, seed=count)
            logits, attention = replayed(faces)
            expected = module(faces.cuda())
            assert torch.allclose(logits, expected[0].cpu(), atol=1e-4)
            assert torch.allclose(attention, expected[1].cpu(), atol=1e-4)
