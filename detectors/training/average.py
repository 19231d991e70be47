"""Averages of weights: over the steps of one training, and over several trainings from one start."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from detectors.training.start import read_weights


class AverageError(ValueError):
    """Weights that cannot be averaged; names the file and the first tensor that differs."""


class Average:
    """Exponential moving average of every floating-point tensor of a network, norms' statistics included.

    Decay 0 is the network itself.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    def update(self, network: nn.Module, step: int) -> None:
        """Early on the average is short (Polyak warm-up), so that the starting weights are forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor.detach(), 1 - decay)
            else:
                self.tensors[name].copy_(tensor)


def average_of(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Mean of the weights in files as a training leaves them, or of a member's, all counted alike.

    After Wortsman et al., "Model soups". The runs must have one start, or their mean is noise. Counters are
    the first file's. Raises AverageError for other names or shapes than the first file's, StartError for no
    weights, OSError.
    """
    first, *others = ((path, read_weights(path)) for path in paths)
    total = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in first[1].items()
    }
    for path, tensors in others:
        if different := set(total) ^ set(tensors):
            raise AverageError(f"average: {path}: {min(different)}: not in both this and {first[0]}")
        for name, tensor in tensors.items():
            if tensor.shape != total[name].shape:
                raise AverageError(
                    f"average: {path}: {name}: {tuple(tensor.shape)}, expected {tuple(total[name].shape)}"
                )
            if tensor.is_floating_point():
                total[name] += tensor.double()
    return {
        name: (tensor / len(paths)).float() if tensor.is_floating_point() else tensor
        for name, tensor in total.items()
    }
