"""The network: shapes, export, and that wrong architectures are refused."""

import pytest
import torch

from detectors.backbones import Architecture, FaceNetwork

LITE0 = Architecture("tf_efficientnet_lite0", attention_block=4)


@pytest.fixture(scope="module")
def network() -> FaceNetwork:
    torch.manual_seed(1)
    return FaceNetwork(LITE0).eval()


def test_one_logit_and_a_map_of_stride_eight(network: FaceNetwork) -> None:
    logit, attention = network(torch.randn(3, 3, 160, 160))
    assert logit.shape == (3,)
    assert attention.shape == (3, 20, 20)
    assert ((attention > 0) & (attention < 1)).all()


def test_the_attention_gate_costs_one_parameter_a_channel_and_a_bias(network: FaceNetwork) -> None:
    assert sum(p.numel() for p in network.attention.parameters()) == 40 + 1


def test_the_logit_depends_on_the_attention(network: FaceNetwork) -> None:
    faces = torch.randn(2, 3, 64, 64)
    before, _ = network(faces)
    bias = network.attention.conv.bias
    assert bias is not None
    with torch.no_grad():
        bias.sub_(8.0)
    after, attention = network(faces)
    with torch.no_grad():
        bias.add_(8.0)
    assert attention.max() < 0.1
    assert not torch.allclose(before, after, atol=1e-4)


def test_starts_undecided(network: FaceNetwork) -> None:
    logit, _ = network(torch.randn(4, 3, 64, 64))
    assert logit.abs().max() < 2


@pytest.mark.parametrize("block", [-1, 16])
def test_a_block_that_is_not_there_is_refused_by_number(block: int) -> None:
    with pytest.raises(ValueError, match=rf"attention_block {block} .* expected 0 to 15"):
        FaceNetwork(Architecture("tf_efficientnet_lite0", attention_block=block))


def test_paper_block_of_b4_has_56_channels_and_stride_eight() -> None:
    network = FaceNetwork(Architecture("tf_efficientnet_b4", attention_block=9)).eval()
    assert network.attention.conv.in_channels == 56
    _, attention = network(torch.zeros(1, 3, 224, 224))
    assert attention.shape == (1, 28, 28)


def test_exports_with_a_dynamic_batch_and_agrees(network: FaceNetwork) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(network, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    faces = torch.randn(5, 3, 64, 64)
    for ours, theirs in zip(network(faces), exported.module()(faces), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_mirrored_network_says_the_same_of_a_face_and_its_mirror_image() -> None:
    network = FaceNetwork(Architecture("tf_efficientnet_lite0", attention_block=4, mirrored=True)).eval()
    faces = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, attention = network(faces)
        mirrored_logits, mirrored_attention = network(faces.flip(3))
    assert logits.shape == (3,)
    torch.testing.assert_close(logits, mirrored_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(attention, mirrored_attention.flip(2), atol=1e-5, rtol=0)


def test_training_reads_each_face_once() -> None:
    plain = FaceNetwork(Architecture("tf_efficientnet_lite0", attention_block=4))
    network = FaceNetwork(Architecture("tf_efficientnet_lite0", attention_block=4, mirrored=True))
    network.load_state_dict(plain.state_dict())
    faces = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network.train()(faces)[0], plain.train()(faces)[0])
