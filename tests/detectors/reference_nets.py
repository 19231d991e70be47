"""The published networks once more, put together from `efficientnet-pytorch` and by hand, and checkpoints in
their layout: what the product's own networks are compared with."""

from collections.abc import Iterator

import torch
from efficientnet_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, batch_norm, conv2d, linear, max_pool2d, relu

SIDE = 224
ATTENTION_AFTER = 9


def randomise(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random weights, and random statistics, scales and shifts of norms."""
    drawn = torch.Generator().manual_seed(seed)
    return {name: _random(name, tensor, drawn) for name, tensor in tensors.items()}


def _random(name: str, tensor: Tensor, drawn: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return torch.full_like(tensor, 7)
    if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
        return torch.empty_like(tensor).uniform_(0.5, 1.5, generator=drawn)
    if tensor.ndim < 2:
        return torch.empty_like(tensor).uniform_(-0.3, 0.3, generator=drawn)
    return torch.empty_like(tensor).normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=drawn)


def settle(network: nn.Module, faces: Tensor, seed: int) -> None:
    """Sets the norms' statistics to those of `faces`, off by a random amount: with wholly random ones the
    signal dies on its way through 32 blocks, and any two networks agree."""
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    network.eval()
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        network(faces)
        drawn = torch.Generator().manual_seed(seed)
        for norm in norms:
            spread = norm.running_var.sqrt()
            norm.running_mean += spread * torch.empty_like(spread).uniform_(-0.1, 0.1, generator=drawn)
            norm.running_var *= torch.empty_like(spread).uniform_(0.8, 1.3, generator=drawn)
    network.eval()


class ReferenceB4(nn.Module):
    """B4 by `efficientnet-pytorch` made for 224 pixels, under the names of the published checkpoints."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.efficientnet = EfficientNet.from_name("efficientnet-b4", image_size=SIDE)
        del self.efficientnet._fc
        if attention:
            self.efficientnet.attconv = nn.Conv2d(56, 1, 1)
        self.classifier = nn.Linear(1792, 1)

    def read(self, faces: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pooled features [N, 1792] and the attention map [N, h, w], None without attention."""
        net = self.efficientnet
        x = net._swish(net._bn0(net._conv_stem(faces)))
        attention = None
        for number, block in enumerate(net._blocks):
            x = block(x)
            if number == ATTENTION_AFTER and hasattr(net, "attconv"):
                attention = torch.sigmoid(net.attconv(x))
                x = attention * x
        x = net._swish(net._bn1(net._conv_head(x)))
        return net._avg_pooling(x).flatten(1), None if attention is None else attention[:, 0]

    def forward(self, faces: Tensor) -> Tensor:
        return self.classifier(self.read(faces)[0])


class ReferenceB4ST(nn.Module):
    """The triplet-trained network with its unused classifier, and the head over it."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.feat_ext = ReferenceB4(attention)
        self.classifier = nn.Sequential(nn.BatchNorm1d(1792), nn.Linear(1792, 1))

    def read(self, faces: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.feat_ext.read(faces)

    def forward(self, faces: Tensor) -> Tensor:
        return self.classifier(self.read(faces)[0])


REFERENCES = {
    "EfficientNetB4": lambda: ReferenceB4(attention=False),
    "EfficientNetB4ST": lambda: ReferenceB4ST(attention=False),
    "EfficientNetAutoAttB4": lambda: ReferenceB4(attention=True),
    "EfficientNetAutoAttB4ST": lambda: ReferenceB4ST(attention=True),
}

_BLOCKS = {1: (64, 128, 2), 2: (128, 256, 2), 3: (256, 728, 2), 12: (728, 1024, 2)} | dict.fromkeys(
    range(4, 12), (728, 728, 1)
)
"""Channels in and out, and stride, of Xception's twelve blocks (Chollet, figure 5)."""


def xception_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published Xception, from the paper's figure and the Cadene naming."""
    return dict(_xception_shapes())


def _xception_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "xception.conv1.weight", (32, 3, 3, 3)
    yield from _norm("xception.bn1", 32)
    yield "xception.conv2.weight", (64, 32, 3, 3)
    yield from _norm("xception.bn2", 64)
    for n, (given, out, stride) in _BLOCKS.items():
        for at, before, after in _separables(n, given, out):
            yield from _separable(f"xception.block{n}.rep.{at}", before, after)
            yield from _norm(f"xception.block{n}.rep.{at + 1}", after)
        if stride > 1:
            yield f"xception.block{n}.skip.weight", (out, given, 1, 1)
            yield from _norm(f"xception.block{n}.skipbn", out)
    for n, given, out in ((3, 1024, 1536), (4, 1536, 2048)):
        yield from _separable(f"xception.conv{n}", given, out)
        yield from _norm(f"xception.bn{n}", out)
    yield "xception.last_linear.weight", (1, 2048)
    yield "xception.last_linear.bias", (1,)


def _separables(n: int, given: int, out: int) -> list[tuple[int, int, int]]:
    """Place in the block, channels in and out of its separable convolutions. The first block starts without a
    rectifier; strided blocks have two convolutions, the last of them grows late."""
    if n == 1:
        return [(0, given, out), (3, out, out)]
    if n == 12:
        return [(1, given, given), (4, given, out)]
    if n < 4:
        return [(1, given, out), (4, out, out)]
    return [(1, given, out), (4, out, out), (7, out, out)]


def _norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{leaf}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def _separable(name: str, given: int, out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.conv1.weight", (given, 1, 3, 3)
    yield f"{name}.pointwise.weight", (out, given, 1, 1)


class ReferenceXception:
    """Xception worked out from a checkpoint's tensors, without any module."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name.removeprefix("xception."): tensor for name, tensor in tensors.items()}

    def features(self, faces: Tensor) -> Tensor:
        """Pooled features [N, 2048]."""
        x = relu(self._bn("bn1", conv2d(faces, self.tensors["conv1.weight"], stride=2)))
        x = relu(self._bn("bn2", conv2d(x, self.tensors["conv2.weight"])))
        for n in range(1, 13):
            x = self._block(n, x)
        x = relu(self._bn("bn3", self._sep("conv3", x)))
        x = relu(self._bn("bn4", self._sep("conv4", x)))
        return adaptive_avg_pool2d(x, 1).flatten(1)

    def __call__(self, faces: Tensor) -> Tensor:
        head = self.tensors["last_linear.weight"], self.tensors["last_linear.bias"]
        return linear(self.features(faces), *head)[:, 0]

    def _block(self, n: int, x: Tensor) -> Tensor:
        given, out, stride = _BLOCKS[n]
        y = x
        for at, _, _ in _separables(n, given, out):
            if at:
                y = relu(y)
            y = self._bn(f"block{n}.rep.{at + 1}", self._sep(f"block{n}.rep.{at}", y))
        if stride == 1:
            return x + y
        skip = conv2d(x, self.tensors[f"block{n}.skip.weight"], stride=stride)
        return max_pool2d(y, 3, stride, 1) + self._bn(f"block{n}.skipbn", skip)

    def _sep(self, name: str, x: Tensor) -> Tensor:
        depthwise = self.tensors[f"{name}.conv1.weight"]
        x = conv2d(x, depthwise, padding=1, groups=len(depthwise))
        return conv2d(x, self.tensors[f"{name}.pointwise.weight"])

    def _bn(self, name: str, x: Tensor) -> Tensor:
        mean, variance, weight, bias = (
            self.tensors[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return batch_norm(x, mean, variance, weight, bias, eps=1e-5)


def checkpoint(layout: str, seed: int = 5) -> dict[str, Tensor]:
    """A state dict with every name and shape of a published checkpoint, and random numbers."""
    if layout == "Xception":
        empty = {
            name: torch.empty(shape, dtype=torch.float32 if shape or "tracked" not in name else torch.int64)
            for name, shape in xception_shapes().items()
        }
        return randomise(empty, seed)
    return randomise(REFERENCES[layout]().state_dict(), seed)
