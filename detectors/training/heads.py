"""The mask head: while training only, the network also says WHERE a crop was manipulated."""

from torch import Tensor, nn

from detectors.backbones import FaceNetwork

MASK_STRIDE = 16
"""Of the feature map it reads: 14x14 cells at 224 px, as many as the masks have."""


class MaskHead(nn.Module):
    """One 1x1 convolution on the last feature map of stride 16, which the network lays by as it runs."""

    def __init__(self, network: FaceNetwork) -> None:
        super().__init__()
        levels = [level for level in network.net.feature_info if level["reduction"] == MASK_STRIDE]
        stage, channels = levels[-1]["module"], levels[-1]["num_chs"]
        self.conv = nn.Conv2d(channels, 1, kernel_size=1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self._seen: Tensor | None = None
        network.net.get_submodule(stage)[-1].register_forward_hook(self._lay_by)

    def forward(self) -> Tensor:
        """Mask logits float32 [N, S / 16, S / 16] of the batch that the network read last."""
        if self._seen is None:
            raise RuntimeError("mask head: the network has read no batch yet")
        cells: Tensor = self.conv(self._seen.float())[:, 0]
        self._seen = None
        return cells

    def _lay_by(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if module.training:
            self._seen = output
