"""The tensor names of `efficientnet-pytorch`, beside timm's.

timm's `tf_efficientnet_*` are the same networks in the same order: TensorFlow's SAME padding worked out from
each input's size, BatchNorm with epsilon .001. That package (0.7) works its padding out once, for the size
the network was made for (380 in B4): at another size its block 6 is shifted by a pixel. Made for 224 pixels
it pads as timm does, and so does version 0.6, of the time when the published networks were trained.
"""

from timm.models.efficientnet import EfficientNet

_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}

_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}

_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}

_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
"""Blocks without expansion, those of the first stage: their norms count from 1 there as here."""


def backbone_names(net: EfficientNet) -> dict[str, str]:
    """timm's name, by `efficientnet-pytorch`'s, of every tensor of a timm EfficientNet but its classifier."""
    layers = dict(_OUTER)
    places = [(stage, i) for stage, blocks in enumerate(net.blocks) for i in range(len(blocks))]
    for number, (stage, i) in enumerate(places):
        block = net.blocks[stage][i]
        inner = _EXPANDED if hasattr(block, "conv_pwl") else _PLAIN
        squeeze = _SQUEEZE if hasattr(block.se, "conv_reduce") else {}
        for theirs, ours in (inner | squeeze).items():
            layers[f"_blocks.{number}.{theirs}"] = f"blocks.{stage}.{i}.{ours}"
    return {
        f"{theirs}.{leaf}": f"{ours}.{leaf}"
        for theirs, ours in layers.items()
        for leaf in net.get_submodule(ours).state_dict()
    }
