"""Eager PyTorch: the network itself, untouched, from any thread."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from engines.eager import EagerEngine
from tests.engines.networks import Small, inputs


def test_gives_what_the_network_gives() -> None:
    module = Small().eval()
    with torch.inference_mode():
        logits, attention = module(inputs(5))
    found = EagerEngine(module, "fp32", 1)(inputs(5))
    assert np.allclose(found[0], logits.numpy(), atol=1e-5)
    assert np.allclose(found[1], attention.numpy(), atol=1e-5)
    assert found[0].dtype == found[1].dtype == np.float32


def test_bf16_is_close_and_leaves_the_callers_network_alone() -> None:
    module = Small().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    exact = EagerEngine(module, "fp32", 1)(inputs(8))
    rough = EagerEngine(module, "bf16", 1)(inputs(8))
    assert rough[0].dtype == np.float32
    assert np.abs(rough[0] - exact[0]).max() < 0.1
    assert not np.array_equal(rough[0], exact[0])
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_network_left_in_training_mode_is_run_in_evaluation() -> None:
    module = Small().train()
    engine = EagerEngine(module, "fp32", 1)
    alone = engine(inputs(4)[:1])[0]
    assert np.allclose(engine(inputs(4))[0][:1], alone, atol=1e-5)
    assert module.training


def test_threads_get_their_own_results() -> None:
    engine = EagerEngine(Small(), "fp32", 1)
    batches = [inputs(1 + k % 4, seed=k) for k in range(16)]
    alone = [engine(batch)[0] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: engine(batch)[0], batches))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_threads_setting_is_pytorchs() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            EagerEngine(Small(), "fp32", threads)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 7])
def test_results_outlive_the_next_call(count: int) -> None:
    engine = EagerEngine(Small(), "fp32", 1)
    first = engine(inputs(count))
    kept = first[0].copy(), first[1].copy()
    engine(inputs(count, seed=9))
    assert np.array_equal(first[0], kept[0])
    assert np.array_equal(first[1], kept[1])
