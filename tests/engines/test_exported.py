"""Networks as graphs: the same numbers, any batch, and nothing in them that has no converter."""

import copy
from itertools import pairwise

import pytest
import torch
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from torch import Tensor, nn

from engines.engine import Precision
from engines.exported import exported, powers, without_ceil
from tests.engines.networks import Small, inputs


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-5), ("bf16", 0.1)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_graph_takes_any_batch_in_float32_and_gives_float32(
    precision: Precision, apart: float, layout: torch.memory_format
) -> None:
    module = Small().eval()
    graph = exported(module, precision, "cpu", 16, inputs(1), layout).module()
    for count in (1, 2, 5, 16):
        faces = inputs(count)
        with torch.inference_mode():
            logits, attention = graph(faces.contiguous(memory_format=layout))
            expected = module(faces)
        assert logits.dtype == attention.dtype == torch.float32
        assert (logits - expected[0]).abs().max() < apart
        assert (attention - expected[1]).abs().max() < apart
    assert all(value.dtype == torch.float32 for value in module.parameters())


def test_a_graph_for_one_takes_one() -> None:
    graph = exported(Small().eval(), "fp32", "cpu", 1, inputs(4), torch.channels_last).module()
    with torch.inference_mode():
        assert graph(inputs(1))[0].shape == (1,)


@pytest.mark.parametrize("batch", [1, 2, 3, 16, 20])
def test_batches_are_filled_up_to_less_than_twice_their_size(batch: int) -> None:
    sizes = powers(batch)
    assert sizes[0] == 1
    assert sizes[-1] == batch
    assert all(b <= 2 * a for a, b in pairwise(sizes))


@pytest.mark.parametrize("kind", [PNet, RNet, ONet])
@pytest.mark.parametrize("side", [0, 1])
def test_pooling_that_rounds_up_becomes_padding(kind: type[nn.Module], side: int) -> None:
    """Bit for bit, on random values and on negative ones, which padding with zeros would outshine."""
    net = kind().eval()
    shape = {PNet: (3, 37 + side, 52 + side), RNet: (3, 24, 24), ONet: (3, 48, 48)}[kind]
    pixels = torch.randn(3, *shape, generator=torch.Generator().manual_seed(5)) - 2
    changed = without_ceil(copy.deepcopy(net))
    assert not any(isinstance(part, nn.MaxPool2d) and part.ceil_mode for part in changed.modules())
    with torch.inference_mode():
        for expected, found in zip(net(pixels), changed(pixels), strict=True):
            assert torch.equal(expected, found)


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (2, 3), (3, 3)])
def test_every_size_is_pooled_alike(kernel: int, stride: int) -> None:
    pool = nn.MaxPool2d(kernel, stride, ceil_mode=True)
    padded = without_ceil(nn.Sequential(pool))
    for size in range(kernel, kernel + 12):
        values = torch.randn(1, 2, size, size + 1, generator=torch.Generator().manual_seed(size)) - 3
        expected: Tensor = pool(values)
        assert torch.equal(expected, padded(values)), size


def test_other_pooling_is_left_alone() -> None:
    kept = [nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)]
    changed = without_ceil(nn.Sequential(*kept))
    assert list(changed.children()) == kept
