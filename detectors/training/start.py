"""The weights a training starts from."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from detectors.backbones import FaceNetwork
from detectors.members import load_member
from detectors.training.imagenet import load_imagenet

IMAGENET = "imagenet"
HEADS = ("net.classifier.", "head.", "attention.")
"""Tensors that a start may lack, and that then keep their first draw; it may have the first two in excess."""


class StartError(ValueError):
    """Weights that a training cannot start from; names the file and the first tensor that does not fit."""


def begin(network: FaceNetwork, start: str) -> None:
    """Fills `network` with ImageNet's weights (`imagenet`), with those in a file, or with a member's.

    A member is named as elsewhere, by its name or directory. A file is one that a training left, or a
    checkpoint of timm's own for the same backbone, whose classifier is left out. Raises StartError, OSError,
    and what `load_imagenet` and `load_member` raise.
    """
    if start == IMAGENET:
        load_imagenet(network)
        return
    path = Path(start)
    found = read_weights(path) if path.is_file() else load_member(start).module.state_dict()
    if not any(name.startswith("net.") for name in found):
        found = {
            f"net.{name}": tensor for name, tensor in found.items() if not name.startswith("classifier.")
        }
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in found and not name.startswith(HEADS)]
    extra = [name for name in found if name not in wanted and not name.startswith(HEADS[:2])]
    if missing or extra:
        what = f"{missing[0]}: missing" if missing else f"{extra[0]}: not in the network"
        raise StartError(f"start: {start}: {what}; expected weights of {network.backbone}")
    usable = {name: tensor for name, tensor in found.items() if name in wanted}
    for name, tensor in usable.items():
        if tensor.shape != wanted[name].shape:
            raise StartError(
                f"start: {start}: {name}: {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}"
            )
    network.load_state_dict(usable, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A bare state dict from a `.safetensors` file or one that torch wrote; StartError for anything else."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise StartError(f"start: {path}: not a safetensors file: {error}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch and pickle raise for a foreign file has no common type
        raise StartError(f"start: {path}: not a file of weights: {type(error).__name__}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise StartError(f"start: {path}: expected a bare state dict of tensors")
    return found
