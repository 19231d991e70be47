"""Every name of the public package stands for one of timm's, of the same shape, in every EfficientNet."""

import pytest
import timm
import torch
from efficientnet_pytorch import EfficientNet

from detectors.naming import backbone_names


@pytest.mark.parametrize("size", range(8))
def test_all_tensors_of_both_are_paired(size: int) -> None:
    with torch.device("meta"):
        theirs = EfficientNet.from_name(f"efficientnet-b{size}").state_dict()
        net = timm.create_model(f"tf_efficientnet_b{size}")
    ours = net.state_dict()
    names = backbone_names(net)
    assert set(names) == {name for name in theirs if not name.startswith("_fc.")}
    assert sorted(names.values()) == sorted(name for name in ours if not name.startswith("classifier."))
    assert {name: theirs[name].shape for name in names} == {name: ours[names[name]].shape for name in names}
    assert net.bn1.eps == 1e-3
