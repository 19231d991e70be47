"""The five published networks of "Video Face Manipulation Detection through Ensemble of CNNs" (Bonettini et
al.), with any checkpoint in their layout.

Key mapping, checkpoint on the left:

| checkpoint | network |
|---|---|
| `efficientnet.*` | `net.*`, by `detectors.naming.backbone_names` |
| `efficientnet.attconv.*` | `attention.conv.*` |
| `classifier.{weight,bias}` | `net.classifier.{weight,bias}` |
| siamese: `feat_ext.efficientnet.*` | as `efficientnet.*` above |
| siamese: `classifier.{0,1}.*` | `head.{0,1}.*` |
| siamese: `feat_ext.classifier.*` | nothing: left over from the triplet stage; its shape is checked |
| `xception.*` | `net.*`, `last_linear` as `fc` |
"""

import io
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import timm
import torch
from torch import Tensor, nn

from detectors.backbones import Architecture, FaceNetwork, activation_map
from detectors.calibration import Calibration
from detectors.crops import CropKind, CropPolicy, Resampling
from detectors.members import Member, MemberError, fill, parse, read_checked
from detectors.naming import backbone_names
from detectors.registry import LICENCE, PREFIX, describe, find_published

PAPER_CROP = CropPolicy(
    CropKind.MARGIN_SQUARE, size=224, side=0.2, top=0.4, resampling=Resampling.PIL_BILINEAR
)
"""The paper's preprocessing. Its boxes were BlazeFace's; about another detector's the margins differ."""

ATTENTION_BLOCK = 9
VERSION = "1"

MAX_BYTES = 256 * 2**20
"""The largest of the layouts is Xception with 84 MB: what is far larger is not one of them."""


class Xception(nn.Module):
    """The paper's baseline: timm's `legacy_xception`, which is the Cadene layout, with one logit.

    There is no attention: the map is the class activation map, [N, 7, 7] at 224 pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("legacy_xception", pretrained=False, num_classes=1)

    def forward(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float32 [N, 3, S, S] in; logit [N] and map [N, h, w] in (0, 1) out."""
        last = self.net.forward_features(faces)
        return (
            self.net.forward_head(last).squeeze(1),
            activation_map(last, self.net.fc.weight, self.net.fc.bias),
        )

    def features(self, faces: Tensor) -> Tensor:
        """Normalised float32 [N, 3, S, S] in; the pooled features [N, 2048] out, before the head."""
        pooled: Tensor = self.net.global_pool(self.net.forward_features(faces))
        return pooled


ARCHITECTURES: Mapping[str, Architecture | None] = MappingProxyType(
    {
        "EfficientNetB4": Architecture("tf_efficientnet_b4", None),
        "EfficientNetB4ST": Architecture("tf_efficientnet_b4", None, siamese=True),
        "EfficientNetAutoAttB4": Architecture("tf_efficientnet_b4", ATTENTION_BLOCK),
        "EfficientNetAutoAttB4ST": Architecture("tf_efficientnet_b4", ATTENTION_BLOCK, siamese=True),
        "Xception": None,
    }
)
"""By the checkpoints' layout names; Xception is no EfficientNet and has a module of its own."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a checkpoint must hold: `names` maps each tensor onto the network's, `unused` gives the shape of
    those that no forward pass reads."""

    names: Mapping[str, str]
    unused: Mapping[str, tuple[int, ...]]


def build(layout: str) -> FaceNetwork | Xception:
    """The network of a layout, with random weights. Raises MemberError for an unknown layout."""
    if layout not in ARCHITECTURES:
        raise MemberError(f"layout {layout!r}: expected one of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[layout]
    return Xception() if architecture is None else FaceNetwork(architecture)


def layout_of(network: FaceNetwork | Xception) -> Layout:
    """The names of a published checkpoint for this network."""
    if isinstance(network, Xception):
        return Layout({_xception_name(ours): f"net.{ours}" for ours in network.net.state_dict()}, {})
    names = {f"efficientnet.{theirs}": f"net.{ours}" for theirs, ours in backbone_names(network.net).items()}
    if network.attention is not None:
        names |= {f"efficientnet.attconv.{leaf}": f"attention.conv.{leaf}" for leaf in ("weight", "bias")}
    if network.head is None:
        return Layout(
            names | {f"classifier.{leaf}": f"net.classifier.{leaf}" for leaf in ("weight", "bias")}, {}
        )
    below = {f"feat_ext.{theirs}": ours for theirs, ours in names.items()}
    head = {f"classifier.{leaf}": f"head.{leaf}" for leaf in network.head.state_dict()}
    unused = {
        "feat_ext.classifier.weight": (1, network.head.linear.in_features),
        "feat_ext.classifier.bias": (1,),
    }
    return Layout(below | head, unused)


def load_checkpoint(
    layout: str, path: Path, sha256: str | None = None
) -> tuple[FaceNetwork | Xception, str, Layout]:
    """Builds the network of `layout` with the weights at `path`: a bare state dict as `.safetensors` or, read
    with `weights_only=True`, as `.pth`.

    Returns the network in evaluation mode, the file's SHA-256 and the layout that was filled. Raises
    MemberError for a file that cannot be read or holds more than tensors, TamperedWeightsError where its
    hash is not `sha256`, MisshapenWeightsError with every tensor that is missing, extra or of another shape.
    """
    network = build(layout)
    wanted = layout_of(network)
    content, found = read_checked(path, sha256, at_most=MAX_BYTES)
    tensors = parse(content, path) if path.suffix == ".safetensors" else _unpickled(content, path)
    fill(network, tensors, path, wanted.names, wanted.unused)
    return network.eval().requires_grad_(False), found, wanted


def load_published(name: str, path: Path, sha256: str | None = None) -> Member:
    """A published checkpoint as a member, uncalibrated; `name` is a checkpoint's, as EfficientNetB4_DFDC.

    `sha256` is what the file must hash to; None takes any weights of that layout. Raises RegistryError for
    an unknown name, and what `load_checkpoint` does.
    """
    published = find_published(name)
    network, found, layout = load_checkpoint(published.layout, path, sha256)
    architecture = ARCHITECTURES[published.layout]
    return Member(
        name=PREFIX + published.name,
        version=VERSION,
        policy=PAPER_CROP,
        module=network,
        calibration=Calibration.identity(),
        sha256=found,
        licence=LICENCE,
        record=describe(published)
        | {
            "sha256": found,
            "architecture": {"backbone": "legacy_xception"}
            if architecture is None
            else architecture.to_json(),
            "crop": PAPER_CROP.to_json(),
            "unused_tensors": sorted(layout.unused),
        },
    )


def _xception_name(ours: str) -> str:
    layer, _, leaf = ours.partition(".")
    return f"xception.last_linear.{leaf}" if layer == "fc" else f"xception.{ours}"


def _unpickled(content: bytes, path: Path) -> dict[str, Tensor]:
    expected = "expected a bare state dict: nothing but tensors by name"
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message goes on to advise weights_only=False
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it would run {culprit[1]}" if culprit else "it is no pickle of tensors alone"
        raise MemberError(f"{path}: refused: {what}; {expected}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise MemberError(f"{path}: truncated, or no PyTorch checkpoint; {expected}") from error
    if not isinstance(found, dict):
        raise MemberError(f"{path}: holds a {type(found).__name__}; {expected}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise MemberError(f"{path}: {name!r} is a {type(value).__name__}; {expected}")
    return found
