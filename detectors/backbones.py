"""The networks: a timm EfficientNet, with or without an attention gate in its early middle, one logit."""

from dataclasses import asdict, dataclass
from typing import Any, cast

import timm
import torch
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn
from torch.nn.functional import conv2d, dropout, normalize, pad

from detectors.attention import AttentionGate
from detectors.readings import Visible

HALVES = (Visible.UPPER, Visible.LOWER)


class ArchitectureError(ValueError):
    """A network that cannot be built; names the field, its value and what would be right."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What has to be known to build a network before its weights are loaded.

    `backbone` is timm's name of an EfficientNet: `tf_efficientnet_b0` to `b7`, `tf_efficientnet_lite0` to
    `lite4`. `attention_block` counts the MBConv blocks from 0; the gate sits behind that block; None is a
    network without a gate. The paper puts it behind block 9 of B4, the last one of stride 8; the last one of
    stride 8 in Lite0 is block 4 (40 channels, 20x20 at 160 px). `mirrored`: outside of training a face is
    read as it is and mirrored, and both logits averaged; twice the work of a small network, for .004 to .005
    of validation AUC in the first member. `siamese`: the logit comes from BatchNorm1d and Linear over the
    pooled features, which were trained by triplets and then frozen, instead of from one Linear.
    `cosine_range`: the logit is this number times the cosine between the pooled features and one vector, as
    the recognition losses train it; None: a plain product. `half`: the network looks at that half of the
    crop alone, `upper` or `lower`, which is half the work; the other one may show anything.
    """

    backbone: str
    attention_block: int | None
    dropout: float = 0.0
    mirrored: bool = False
    siamese: bool = False
    cosine_range: float | None = None
    half: Visible | None = None

    def __post_init__(self) -> None:
        if self.half is not None and self.half not in HALVES:
            raise ArchitectureError(f"half {self.half}: expected {' or '.join(HALVES)}, or none")

    def to_json(self) -> dict[str, Any]:
        """What `Architecture(**...)` reads; `half` is left out of networks that see the whole face."""
        record = asdict(self)
        if self.half is None:
            del record["half"]
        return record


class SiameseHead(nn.Sequential):
    """BatchNorm1d and Linear over frozen pooled features: [N, C] in, [N, 1] out."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm1d(channels), nn.Linear(channels, 1))

    @property
    def linear(self) -> nn.Linear:
        return cast(nn.Linear, self[1])

    def folded(self) -> tuple[Tensor, Tensor]:
        """Both as one linear function by the running statistics: weight [1, C] and bias [1]."""
        norm, weight = cast(nn.BatchNorm1d, self[0]), self.linear.weight
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        scale = norm.weight * torch.rsqrt(variance + norm.eps)
        return weight * scale, self.linear.bias + weight @ (norm.bias - mean * scale)


class CosineHead(nn.Linear):
    """[N, C] in, `span` times the cosine to one vector, [N, 1], out."""

    def __init__(self, channels: int, span: float) -> None:
        super().__init__(channels, 1, bias=False)
        self.span = span

    def forward(self, features: Tensor) -> Tensor:
        return self.span * normalize(features) @ normalize(self.weight).T

    def folded(self) -> tuple[Tensor, Tensor]:
        """As one linear function of features of length 1: weight [1, C] and bias [1]."""
        return self.span * normalize(self.weight), self.weight.new_zeros(1)


class FaceNetwork(nn.Module):
    """Face crops in; out come one logit (> 0 means manipulated) and a map of where it came from.

    The map is the attention gate's. Without a gate it is the class activation map: the head applied to every
    position of the last feature map, through a sigmoid. Sources: Bonettini et al. (gate, siamese head); Zhou
    et al., "Learning Deep Features for Discriminative Localization" (class activation map).

    Names in the state dict: `net.*` as in timm, `attention.conv.*` with a gate; the siamese head is
    `head.0.*` (BatchNorm1d) and `head.1.*` (Linear), the other one `net.classifier.*`.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.net = _backbone(architecture)
        self.backbone = architecture.backbone
        self.mirrored = architecture.mirrored
        self.attention_block = architecture.attention_block
        self.sees = architecture.half
        self.head = SiameseHead(self.net.num_features) if architecture.siamese else None
        if architecture.cosine_range is not None:
            self.net.classifier = CosineHead(self.net.num_features, architecture.cosine_range)
        linear: nn.Linear = self.net.classifier if self.head is None else self.head.linear
        # timm draws the classifier from +-1/sqrt(outputs): with one output that starts at a loss of 6.
        nn.init.normal_(linear.weight, std=0.01)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        self.attention: AttentionGate | None = None
        if architecture.attention_block is not None:
            self.attention = AttentionGate(_output_channels(self.net, architecture.attention_block))

    def forward(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float32 [N, 3, S, S] in; logit [N] and map [N, h, w] in (0, 1) out.

        Of a network that sees half of the face the map is 0 on the other one.
        """
        if self.training or not self.mirrored:
            return self._read(faces)
        logits, attention = self._read(torch.cat([faces, faces.flip(3)]))
        as_is, turned = attention.reshape(2, -1, *attention.shape[1:]).unbind()
        return logits.reshape(2, -1).mean(0), (as_is + turned.flip(2)) / 2

    def features(self, faces: Tensor) -> Tensor:
        """Normalised float32 [N, 3, S, S] in; the pooled features [N, C] out, before dropout and head.

        They are those of the faces as they are, mirrored or not: what triplets are drawn over.
        """
        last, _ = self._trunk(faces)
        pooled: Tensor = self.net.global_pool(last)
        return pooled

    def classified(self, features: Tensor) -> Tensor:
        """Logits [N] of pooled features [N, C], through dropout while training."""
        head: nn.Module = self.net.classifier if self.head is None else self.head
        dropped = dropout(features, self.net.drop_rate, self.training)
        logits: Tensor = head(dropped).squeeze(1)
        return logits

    def _trunk(self, faces: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.net.bn1(self.net.conv_stem(self._seen(faces)))
        attention = None
        index = 0
        for stage in self.net.blocks:
            for block in stage:
                x = block(x)
                if self.attention is not None and index == self.attention_block:
                    x, attention = self.attention(x)
                index += 1
        return self.net.bn2(self.net.conv_head(x)), attention

    def _read(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        last, attention = self._trunk(faces)
        if self.head is None:
            logit = self.net.forward_head(last)
        else:
            logit = self.head(self.net.forward_head(last, pre_logits=True))
        if attention is None:
            attention = self._activation_map(last)
        return logit.squeeze(1), self._whole(attention)

    def _seen(self, faces: Tensor) -> Tensor:
        """The half that it looks at: the network is convolutional and takes any height."""
        middle = faces.shape[2] // 2
        if self.sees is None:
            return faces
        return faces[:, :, :middle] if self.sees == Visible.UPPER else faces[:, :, middle:]

    def _whole(self, attention: Tensor) -> Tensor:
        """The map of a half as one of the whole crop."""
        rows = attention.shape[1]
        if self.sees is None:
            return attention
        return pad(attention, (0, 0, 0, rows) if self.sees == Visible.UPPER else (0, 0, rows, 0))

    def _activation_map(self, last: Tensor) -> Tensor:
        if isinstance(self.net.classifier, CosineHead):
            length = torch.linalg.vector_norm(last.mean((2, 3)), dim=1)
            return activation_map(last / length[:, None, None, None], *self.net.classifier.folded())
        if self.head is None:
            return activation_map(last, self.net.classifier.weight, self.net.classifier.bias)
        return activation_map(last, *self.head.folded())


def activation_map(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Where the logit comes from: features [N, C, h, w], weight [1, C] and bias [1] in, [N, h, w] in (0, 1)
    out. The mean over the positions of what is behind the sigmoid is the logit itself."""
    return torch.sigmoid(conv2d(features, weight[:, :, None, None], bias)).squeeze(1)


def _backbone(architecture: Architecture) -> EfficientNet:
    """timm's network with one output, or with none under a siamese head."""
    if architecture.siamese and architecture.cosine_range is not None:
        raise ArchitectureError("cosine_range and siamese: expected one of them, both say what the head is")
    try:
        net = timm.create_model(
            architecture.backbone,
            pretrained=False,
            num_classes=0 if architecture.siamese else 1,
            drop_rate=architecture.dropout,
        )
    except RuntimeError as error:
        raise ArchitectureError(f"backbone {architecture.backbone!r}: {error}") from error
    if not isinstance(net, EfficientNet):
        raise ArchitectureError(
            f"backbone {architecture.backbone!r} is a {type(net).__name__}: expected an EfficientNet, "
            "tf_efficientnet_b0 to b7 or tf_efficientnet_lite0 to lite4"
        )
    depth = sum(len(stage) for stage in net.blocks)
    block = architecture.attention_block
    if block is not None and not 0 <= block < depth:
        raise ArchitectureError(
            f"attention_block {block} of {architecture.backbone}: expected 0 to {depth - 1}, or none"
        )
    return net


def _output_channels(net: nn.Module, block_index: int) -> int:
    """Channels behind one block: what timm's own bookkeeping does not tell for every block."""
    was_training = net.training
    net.eval()
    with torch.no_grad():
        x = net.bn1(net.conv_stem(torch.zeros(1, 3, 64, 64)))  # type: ignore[operator]
        blocks = [block for stage in net.blocks for block in stage]  # type: ignore[union-attr]
        for block in blocks[: block_index + 1]:
            x = block(x)
    net.train(was_training)
    return int(x.shape[1])
