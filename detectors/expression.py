"""Which expression a face shows, also when half of it is hidden: networks for whole faces and for either
half.

After Georgescu and Ionescu, "Teacher-Student Training and Triplet Loss for Facial Expression Recognition
under Occlusion": a teacher reads whole faces, students read the half that can be seen, a linear SVM reads two
of them together. `detectors.training.expression` trains them. No verdict rests on an expression.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from detectors.crops import CropKind, CropPolicy, crop
from detectors.members import MemberError, fill, parse, read_checked
from detectors.readings import EXPRESSIONS, Expression, FaceReading, Image, Reason, Visible

SCHEMA = 1
SHIPPED = Path(__file__).parent / "expression_weights"
INDEX = "expression.json"
"""What lies in a folder of expression weights, with its hash."""

SIDE = 48
"""Pixels of a face in FER2013; all that the networks ever see of one."""

FRAMING = CropPolicy(CropKind.TIGHT, size=SIDE, side=0.92, shift=0.0)
"""How FER2013 frames a face. Of 100 validation faces, enlarged four times and padded, MTCNN found 88: the
picture's side is .95 of the box's height (median; 10-90 % .76-1.22), its centre .02 higher; the distance from
eyes to mouth is .417 of the side, and .357 to .372 of an MTCNN box's height elsewhere (`CropPolicy`), which
makes the side .86 to .89. Between the two."""

MIN_DEVIATION = 4.0
"""Grey levels. A flatter picture is not stretched any further: that would be its noise."""

BATCH = 64
"""Faces at once: more gains nothing on a CPU."""


class ExpressionError(ValueError):
    """Expression networks that cannot be used; names the file and what would be right."""


class Method(StrEnum):
    """How a network, or the SVM over two of them, came to be; in the paper's order."""

    TEACHER = "teacher"
    OCCLUSION_TRAINED = "occlusion_trained"
    DISTILLED = "distilled"
    TRIPLET = "triplet"
    COMBINED = "combined"


@dataclass(frozen=True, slots=True)
class Read:
    """Of N faces: `logits` float32 [N, 8] in the order of EXPRESSIONS, `embeddings` float32 [N, C]."""

    logits: NDArray[np.float32]
    embeddings: NDArray[np.float32]


class ExpressionNetwork(nn.Module):
    """A timm EfficientNet with eight outputs; the embedding is its pooled last feature map.

    Convolutional throughout, so that the same weights read a whole face or a half of it. Raises
    ExpressionError for a backbone that timm lacks or that is another kind of network.
    """

    def __init__(self, backbone: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        try:
            net = timm.create_model(
                backbone, pretrained=False, num_classes=len(EXPRESSIONS), drop_rate=dropout
            )
        except RuntimeError as error:
            raise ExpressionError(f"backbone {backbone!r}: {error}") from error
        if not isinstance(net, EfficientNet):
            raise ExpressionError(
                f"backbone {backbone!r} is a {type(net).__name__}: expected an EfficientNet"
            )
        self.net = net
        # timm draws the classifier from +-1/sqrt(outputs): that starts at a loss of 6 instead of log 8.
        nn.init.normal_(net.classifier.weight, std=0.01)
        nn.init.zeros_(net.classifier.bias)

    def forward(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [N, 3, h, w] as `arranged` gives it; logits [N, 8] and embeddings [N, C] out."""
        last = self.net.forward_features(faces)
        embeddings: Tensor = self.net.forward_head(last, pre_logits=True)
        logits: Tensor = self.net.classifier(embeddings)
        return logits, embeddings


@dataclass(frozen=True, slots=True)
class ExpressionModel:
    """A loaded network, in evaluation mode. `reads` is what it was trained on: whole faces or one half."""

    method: Method
    reads: Visible
    size: int
    network: ExpressionNetwork

    def read(self, faces: NDArray[np.uint8], visible: Visible = Visible.BOTH) -> Read:
        """Read grey faces uint8 [N, 48, 48], as they are and mirrored, and average both.

        `visible`: what can be seen of them; a network of whole faces gets the rest blanked.
        """
        return read_faces(self.network, faces, self.size, self.reads, visible)


@dataclass(frozen=True, slots=True)
class LinearSvm:
    """One linear function an expression: `weight` float32 [8, D], `bias` float32 [8]."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def scores(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Signed distances [N, 8] of features [N, D]; the largest is the answer."""
        found: NDArray[np.float32] = features @ self.weight.T + self.bias
        return found


@dataclass(frozen=True, slots=True)
class Combined:
    """The SVM over the embeddings of two networks that read the same half, in that order."""

    parts: tuple[Method, ...]
    svm: LinearSvm


@dataclass(frozen=True, slots=True)
class ExpressionModels:
    """All that a folder of expression weights holds. `version` names it in records."""

    version: str
    networks: Mapping[tuple[Visible, Method], ExpressionModel]
    combined: Mapping[Visible, Combined]

    def of(self, visible: Visible, method: Method) -> ExpressionModel:
        """The network for faces of which `visible` can be seen; ExpressionError when it was not loaded."""
        try:
            return self.networks[visible, method]
        except KeyError:
            raise ExpressionError(f"no expression network {method} for {visible}") from None


class ExpressionReader:
    """Says which expression good faces show: the teacher of whole ones, the distilled student of halves.

    Both were trained to give the distribution of ten people's votes, which is why they and not the SVM speak
    here. Of faces that cannot be judged otherwise, or of which neither half can be seen, it says nothing.
    """

    def __init__(self, models: ExpressionModels, batch: int = BATCH) -> None:
        self._readers = {
            Visible.BOTH: models.of(Visible.BOTH, Method.TEACHER),
            Visible.UPPER: models.of(Visible.UPPER, Method.DISTILLED),
            Visible.LOWER: models.of(Visible.LOWER, Method.DISTILLED),
        }
        self._batch = batch

    def read(self, looks: Sequence[tuple[Image, FaceReading]]) -> list[Expression | None]:
        """Return what each face shows, None where nothing is said. `looks`: pictures uint8 (H, W, 3) RGB in
        full resolution, with a face that was read in each."""
        found: list[Expression | None] = [None] * len(looks)
        for visible, model in self._readers.items():
            places = [n for n, (_, face) in enumerate(looks) if face.visible == visible and _is_told(face)]
            for start in range(0, len(places), self._batch):
                part = places[start : start + self._batch]
                faces = np.stack([grey_face(looks[n][0], looks[n][1]) for n in part])
                shares = softmax(model.read(faces, visible).logits)
                for n, row in zip(part, shares, strict=True):
                    found[n] = Expression(visible, dict(zip(EXPRESSIONS, map(float, row), strict=True)))
        return found


def _is_told(face: FaceReading) -> bool:
    """OCCLUSION alone does not silence the networks of half faces."""
    return set(face.quality.reasons) <= {Reason.OCCLUSION}


def grey_face(image: Image, face: FaceReading) -> NDArray[np.uint8]:
    """Cut a face as FER2013 frames it: uint8 [48, 48]."""
    return np.asarray(cv2.cvtColor(crop(image, face.detection.box, FRAMING), cv2.COLOR_RGB2GRAY), np.uint8)


def enlarged(faces: NDArray[np.uint8], size: int) -> Tensor:
    """uint8 [N, 48, 48] in, float32 [N, 1, size, size] in grey levels out."""
    if faces.ndim != 3 or faces.shape[1:] != (SIDE, SIDE) or faces.dtype != np.uint8:
        raise ExpressionError(f"faces {faces.dtype} {faces.shape}: expected uint8 (N, {SIDE}, {SIDE})")
    grey = torch.from_numpy(np.ascontiguousarray(faces)).float().unsqueeze(1)
    return F.interpolate(grey, (size, size), mode="bilinear", align_corners=False)


def arranged(grey: Tensor, reads: Visible, visible: Visible) -> Tensor:
    """The input of a network that `reads` whole faces or a half: float32 [N, 1, S, S] in grey levels, of
    which `visible` can be seen, in; [N, 3, S, S] or [N, 3, S / 2, S] out.

    Every picture is brought to mean 0 and deviation 1 over what can be seen of it, and the hidden half of a
    whole one becomes 0. Raises ExpressionError where the half that a network reads is not to be seen.
    """
    if Visible.NEITHER in (reads, visible) or (
        reads != Visible.BOTH and visible not in (reads, Visible.BOTH)
    ):
        raise ExpressionError(f"a network of {reads} for faces of which {visible} can be seen")
    wanted = visible if reads == Visible.BOTH else reads
    seen = half_of(grey, wanted)
    deviation, mean = torch.std_mean(seen, dim=(1, 2, 3), keepdim=True)
    seen = (seen - mean) / deviation.clamp(min=MIN_DEVIATION)
    if reads == Visible.BOTH and wanted != Visible.BOTH:
        hidden = torch.zeros_like(seen)
        seen = torch.cat([seen, hidden] if wanted == Visible.UPPER else [hidden, seen], dim=2)
    return seen.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def half_of(grey: Tensor, visible: Visible) -> Tensor:
    """What can be seen of pictures [N, 1, S, S]: all, or the rows of one half [N, 1, S / 2, S]."""
    middle = grey.shape[2] // 2
    if visible == Visible.BOTH:
        return grey
    return grey[:, :, :middle] if visible == Visible.UPPER else grey[:, :, middle:]


def read_faces(
    network: ExpressionNetwork,
    faces: NDArray[np.uint8],
    size: int,
    reads: Visible,
    visible: Visible = Visible.BOTH,
    mirrored: bool = True,
) -> Read:
    """Read faces uint8 [N, 48, 48] by a network in evaluation mode, on its own device.

    `mirrored`: average with the mirror images; training leaves it out where only the trend matters.
    """
    device = next(network.parameters()).device
    logits, embeddings = [], []
    with torch.inference_mode():
        for part in _parts(faces):
            x = arranged(enlarged(part, size).to(device), reads, visible)
            looks = [network(x), network(x.flip(3))] if mirrored else [network(x)]
            logits.append(torch.stack([look[0] for look in looks]).mean(0).float().cpu().numpy())
            embeddings.append(torch.stack([look[1] for look in looks]).mean(0).float().cpu().numpy())
    if not logits:
        raise ExpressionError("no faces to read; expected at least one")
    return Read(np.concatenate(logits), np.concatenate(embeddings))


def _parts(faces: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(faces), BATCH):
        yield faces[start : start + BATCH]


def joined(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Embeddings [N, C] of several networks side by side, each brought to length 1."""
    return np.concatenate(
        [part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in parts], axis=1
    )


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities [N, 8] of logits [N, 8]."""
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float32] = raised / raised.sum(axis=1, keepdims=True)
    return shares


def load_expression(
    folder: Path = SHIPPED, wanted: Callable[[Visible, Method], bool] = lambda visible, method: True
) -> ExpressionModels:
    """Load the networks of `folder` that are `wanted`, hashes checked.

    Raises ExpressionError, in one sentence, when there are none, or for a file that is broken, misshapen or
    has another hash than the folder's `expression.json` says.
    """
    index = folder / INDEX
    if not index.is_file():
        raise ExpressionError(
            f"no expression networks in {folder}: this installation ships none; train some as "
            "docs/expression.md says, or name a folder of them"
        )
    try:
        return _loaded(folder, json.loads(index.read_text(encoding="utf-8")), wanted)
    except (MemberError, OSError) as error:
        raise ExpressionError(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ExpressionError):
            raise
        raise ExpressionError(f"{index}: {type(error).__name__}: {error}") from error


def _loaded(
    folder: Path, record: dict[str, Any], wanted: Callable[[Visible, Method], bool]
) -> ExpressionModels:
    if record["schema"] != SCHEMA or tuple(record["classes"]) != EXPRESSIONS:
        raise ExpressionError(f"{folder / INDEX}: expected schema {SCHEMA} and classes {list(EXPRESSIONS)}")
    networks = {}
    for entry in record["networks"]:
        reads, method = Visible(entry["reads"]), Method(entry["method"])
        if wanted(reads, method):
            networks[reads, method] = _network(folder, entry, reads, method)
    combined = {
        Visible(entry["reads"]): _combined(folder, entry)
        for entry in record["combined"]
        if wanted(Visible(entry["reads"]), Method.COMBINED)
    }
    return ExpressionModels(str(record["version"]), networks, combined)


def _network(folder: Path, entry: dict[str, Any], reads: Visible, method: Method) -> ExpressionModel:
    path = folder / entry["file"]
    content, _ = read_checked(path, entry["sha256"])
    network = ExpressionNetwork(entry["backbone"])
    fill(network, parse(content, path), path)
    network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return ExpressionModel(method, reads, int(entry["size"]), network)


def _combined(folder: Path, entry: dict[str, Any]) -> Combined:
    path = folder / entry["file"]
    content, _ = read_checked(path, entry["sha256"])
    tensors = parse(content, path)
    if set(tensors) != {"weight", "bias"} or tensors["weight"].shape[0] != len(EXPRESSIONS):
        raise ExpressionError(f"{path}: expected tensors weight [{len(EXPRESSIONS)}, D] and bias")
    svm = LinearSvm(tensors["weight"].numpy(), tensors["bias"].numpy())
    return Combined(tuple(Method(part) for part in entry["parts"]), svm)
