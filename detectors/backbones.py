"""The networks: a timm EfficientNet, an attention gate in its early middle, one logit."""

from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from detectors.attention import AttentionGate


@dataclass(frozen=True, slots=True)
class Architecture:
    """What has to be known to build a network before its weights are loaded.

    `backbone` is timm's name of an EfficientNet. `attention_block` counts the MBConv blocks from 0; the gate
    sits behind that block. The paper puts it behind block 9 of B4, the last one of stride 8; the last one of
    stride 8 in Lite0 is block 4 (40 channels, 20x20 at 160 px). `mirrored`: outside of training a face is
    read as it is and mirrored, and both logits averaged; twice the work of a small network, for .004 to .005
    of validation AUC in the first member.
    """

    backbone: str
    attention_block: int
    dropout: float = 0.0
    mirrored: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class FaceNetwork(nn.Module):
    """Face crops in, one logit (> 0 means manipulated) and the attention map out."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.net = timm.create_model(
            architecture.backbone, pretrained=False, num_classes=1, drop_rate=architecture.dropout
        )
        # timm draws the classifier from +-1/sqrt(outputs): with one output that starts at a loss of 6.
        nn.init.normal_(self.net.classifier.weight, std=0.01)
        nn.init.zeros_(self.net.classifier.bias)
        blocks = [block for stage in self.net.blocks for block in stage]
        if not 0 <= architecture.attention_block < len(blocks):
            raise ValueError(
                f"attention_block {architecture.attention_block} of {architecture.backbone}: "
                f"expected 0 to {len(blocks) - 1}"
            )
        self.mirrored = architecture.mirrored
        self.attention_block = architecture.attention_block
        self.attention = AttentionGate(_output_channels(self.net, architecture.attention_block))

    def forward(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float32 [N, 3, S, S] in; logit [N] and attention map [N, h, w] in (0, 1) out."""
        if self.training or not self.mirrored:
            return self._read(faces)
        logits, attention = self._read(torch.cat([faces, faces.flip(3)]))
        as_is, turned = attention.reshape(2, -1, *attention.shape[1:]).unbind()
        return logits.reshape(2, -1).mean(0), (as_is + turned.flip(2)) / 2

    def _read(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        x = self.net.bn1(self.net.conv_stem(faces))
        attention = x
        index = 0
        for stage in self.net.blocks:
            for block in stage:
                x = block(x)
                if index == self.attention_block:
                    x, attention = self.attention(x)
                index += 1
        x = self.net.bn2(self.net.conv_head(x))
        logit = self.net.forward_head(x)
        return logit.squeeze(1), attention


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
