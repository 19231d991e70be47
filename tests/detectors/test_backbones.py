"""The network: shapes, export, and that wrong architectures are refused."""

import pytest
import torch

from detectors.backbones import Architecture, ArchitectureError, FaceNetwork, SiameseHead

LITE0 = Architecture("tf_efficientnet_lite0", attention_block=4)
VARIANTS = [
    Architecture("tf_efficientnet_lite0", block, siamese=siamese)
    for block in (None, 4)
    for siamese in (False, True)
]

BACKBONES = {
    "tf_efficientnet_b0": 1280,
    "tf_efficientnet_b1": 1280,
    "tf_efficientnet_b2": 1408,
    "tf_efficientnet_b3": 1536,
    "tf_efficientnet_b4": 1792,
    "tf_efficientnet_b5": 2048,
    "tf_efficientnet_b6": 2304,
    "tf_efficientnet_b7": 2560,
} | {f"tf_efficientnet_lite{n}": 1280 for n in range(5)}
"""Channels of the pooled features."""


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
    with pytest.raises(ArchitectureError, match=rf"attention_block {block} .* expected 0 to 15"):
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


@pytest.mark.parametrize(("backbone", "features"), BACKBONES.items())
def test_any_efficientnet_takes_a_gate_and_a_siamese_head(backbone: str, features: int) -> None:
    with torch.device("meta"):  # shapes alone: B7 has 64 million parameters
        faces = torch.zeros(2, 3, 96, 96)
        network = FaceNetwork(Architecture(backbone, attention_block=3, siamese=True)).eval()
        logit, heat = network(faces)
        assert logit.shape == (2,)
        assert heat.shape[1] == heat.shape[2] >= 12
        assert network.features(faces).shape == (2, features)


@pytest.mark.parametrize(
    ("backbone", "said"),
    [("resnet18", r"is a ResNet: expected an EfficientNet, .*lite4"), ("nobody", r"Unknown model")],
)
def test_what_is_no_efficientnet_is_refused_by_name(backbone: str, said: str) -> None:
    with pytest.raises(ArchitectureError, match=rf"backbone '{backbone}'.*{said}"):
        FaceNetwork(Architecture(backbone, None))


@pytest.mark.parametrize("architecture", VARIANTS, ids=str)
def test_the_head_has_its_own_names_and_reads_the_features(architecture: Architecture) -> None:
    torch.manual_seed(1)
    network = FaceNetwork(architecture).eval()
    outer = {name.rsplit(".", 1)[0] for name in network.state_dict() if not name.startswith("net.")}
    assert outer == ({"head.0", "head.1"} if architecture.siamese else set()) | (
        {"attention.conv"} if architecture.attention_block else set()
    )
    assert ("net.classifier.weight" in network.state_dict()) is not architecture.siamese
    faces = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        head = network.net.classifier if network.head is None else network.head
        torch.testing.assert_close(network(faces)[0], head(network.features(faces))[:, 0])


@pytest.mark.parametrize("siamese", [False, True])
def test_without_a_gate_the_map_says_where_the_logit_comes_from(siamese: bool) -> None:
    torch.manual_seed(1)
    network = FaceNetwork(Architecture("tf_efficientnet_lite0", None, siamese=siamese)).eval()
    if network.head is not None:
        for tensor in (network.head[0].running_mean, network.head[0].running_var, network.head[0].bias):
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    with torch.no_grad():
        logits, heat = network(torch.randn(2, 3, 96, 96))
    assert heat.shape == (2, 3, 3)
    assert logits.abs().min() > 1e-3
    torch.testing.assert_close(torch.logit(heat.double()).mean((1, 2)).float(), logits, atol=1e-4, rtol=1e-4)


def test_the_siamese_head_folds_into_one_linear_function() -> None:
    torch.manual_seed(1)
    head = SiameseHead(7)
    head(torch.randn(50, 7) * 3 + 2)  # in training: the running statistics move
    head.eval()
    pooled = torch.randn(5, 7)
    torch.testing.assert_close(torch.nn.functional.linear(pooled, *head.folded()), head(pooled))


def test_reading_the_map_in_training_leaves_the_siamese_statistics_to_the_logit() -> None:
    torch.manual_seed(1)
    network = FaceNetwork(Architecture("tf_efficientnet_lite0", None, siamese=True)).train()
    network(torch.randn(4, 3, 64, 64))
    assert network.head is not None
    assert network.head[0].num_batches_tracked == 1


def test_features_are_of_the_face_as_it_is() -> None:
    torch.manual_seed(1)
    plain = FaceNetwork(LITE0).eval()
    mirrored = FaceNetwork(Architecture("tf_efficientnet_lite0", 4, mirrored=True)).eval()
    mirrored.load_state_dict(plain.state_dict())
    faces = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(mirrored.features(faces), plain.features(faces))


def test_a_record_from_before_the_siamese_head_is_read_as_it_was_meant() -> None:
    record = {"backbone": "tf_efficientnet_lite0", "attention_block": 4, "dropout": 0.2, "mirrored": True}
    assert Architecture(**record) == Architecture("tf_efficientnet_lite0", 4, 0.2, True, siamese=False)
    assert Architecture(**Architecture("b", None, siamese=True).to_json()).siamese
