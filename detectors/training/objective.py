"""What one step minimises and what validation measures, by the recipe's mode."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from detectors.backbones import FaceNetwork
from detectors.crops import CropPolicy, to_tensor
from detectors.training.bridge import Bridge, Lesson, bridge_loss, covered_pairs
from detectors.training.data import Batch, Faces, resized
from detectors.training.distil import Teachers, distillation_loss, load_teachers
from detectors.training.hardware import Hardware
from detectors.training.heads import MaskHead
from detectors.training.losses import am_softmax, arcface, batch_hard, cross_entropy, mask_loss, triplets
from detectors.training.metrics import auc, log_loss
from detectors.training.recipe import Loss, Mode, Recipe, Triplets
from detectors.training.triplets import random_triplets, separation

SCORED = 64
"""Crops a batch when a whole set is read."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch on its device. `taught` are the teachers' logits [N]; `lesson` what they make of whole crops,
    in mode half; `seed` draws dropout and triplets, the same each time the batch is read."""

    faces: Tensor
    labels: Tensor
    masks: Tensor
    taught: Tensor | None
    seed: int
    lesson: Lesson | None = None


class Objective:
    """The loss of a batch, and the validation figures; owns what exists while training only."""

    def __init__(self, recipe: Recipe, network: FaceNetwork, check: Faces, hardware: Hardware) -> None:
        self.recipe, self.network, self.hardware, self.check = recipe, network, hardware, check
        self.check_images = resized(check.images, recipe.crop.size)
        self.mask_head = MaskHead(network).to(hardware.device) if recipe.mask_weight else None
        self.teachers: Teachers | None = None
        self.bridge: Bridge | None = None
        if recipe.half is not None:
            self.bridge = Bridge(recipe.teachers, recipe.crop, network, hardware.device)
        elif recipe.teachers:
            self.teachers = load_teachers(recipe.teachers, recipe.crop, hardware.device)

    def trained(self) -> nn.ModuleList:
        """The modules whose parameters move."""
        if self.recipe.mode is Mode.HEAD:
            return nn.ModuleList([self._head()])
        return nn.ModuleList([self.network] if self.mask_head is None else [self.network, self.mask_head])

    def prepare(self, batch: Batch, step: int) -> Inputs:
        """Moves a batch to the device and asks the teachers."""
        device, seed = self.hardware.device, self.recipe.seed * 1_000_003 + step
        images, half = batch.images, self.recipe.half
        if half is not None:
            images = covered_pairs(images, half, np.random.default_rng(seed))
        return Inputs(
            faces=to_tensor(images, self.recipe.crop).to(device, non_blocking=True),
            labels=torch.from_numpy(batch.labels).to(device),
            masks=torch.from_numpy(batch.masks).to(device),
            taught=None if self.teachers is None else self.teachers.logits(batch.images),
            seed=seed,
            lesson=None if self.bridge is None else self.bridge.lesson(batch.images),
        )

    def loss(self, inputs: Inputs) -> Tensor:
        """Reads the batch in training mode; a scalar, float32."""
        torch.manual_seed(inputs.seed)
        self.network.train()
        if self.recipe.mode is Mode.TRIPLET:
            with self.hardware.autocast():
                features = self.network.features(inputs.faces)
            return self.embedding_loss(features, np.random.default_rng(inputs.seed))
        if inputs.lesson is not None:
            return self._half_loss(inputs, inputs.lesson)
        with self.hardware.autocast():
            logits = self._frozen(inputs.faces) if self.recipe.mode is Mode.HEAD else self._read(inputs.faces)
        loss = classification_loss(logits, inputs.labels, self.recipe)
        if inputs.taught is not None:
            loss = self._taught(loss, logits, inputs.taught)
        if self.mask_head is not None:
            loss = loss + self.recipe.mask_weight * mask_loss(self.mask_head(), inputs.masks)
        return loss

    def _half_loss(self, inputs: Inputs, lesson: Lesson) -> Tensor:
        """The answer drawn to the teachers', the embedding over the bridge."""
        with self.hardware.autocast():
            features = self.network.features(inputs.faces)
            logits = self.network.classified(features)
        loss = self._taught(classification_loss(logits, inputs.labels, self.recipe), logits, lesson.logits)
        recipe = self.recipe
        bridge = bridge_loss(features, lesson.features, recipe.margin, recipe.positive)
        return loss + recipe.bridge_weight * bridge

    def _taught(self, loss: Tensor, logits: Tensor, taught: Tensor) -> Tensor:
        share = self.recipe.distil_weight
        drawn = distillation_loss(logits, taught, self.recipe.distil_temperature)
        return (1 - share) * loss + share * drawn

    def embedding_loss(self, features: Tensor, rng: np.random.Generator) -> Tensor:
        """Of features [2P, C], the authentic half first."""
        pairs = len(features) // 2
        if self.recipe.triplets is Triplets.RANDOM:
            index = torch.from_numpy(random_triplets(pairs, rng)).to(features.device)
            return triplets(features, index, self.recipe.margin)
        labels = torch.arange(2 * pairs, device=features.device) >= pairs
        return batch_hard(features, labels, self.recipe.margin)

    def validate(self, network: FaceNetwork) -> dict[str, float]:
        """`val_loss` and `val_auc` of a network of the same architecture, in evaluation mode.

        Of a triplet run: the loss of the validation pairs in batches of the training's size, and the AUC
        along the line between the classes' means (`separation`).
        """
        if self.recipe.mode is not Mode.TRIPLET:
            logits = score(network, self.check_images, self.recipe.crop)
            return {
                "val_loss": log_loss(logits, self.check.labels),
                "val_auc": auc(logits, self.check.labels),
            }
        found = features_of(network, self.check_images, self.recipe.crop)
        pairs = np.random.default_rng(0).permutation(self.check.pairs())
        size = self.recipe.mix().pairs
        losses = [
            float(self.embedding_loss(torch.from_numpy(found[part.T.ravel()]), np.random.default_rng(0)))
            for part in np.split(pairs, range(size, len(pairs), size))
            if len(part) == size
        ]
        return {
            "val_loss": float(np.mean(losses)),
            "val_auc": separation(found, self.check.labels, self.check.identity),
        }

    def _read(self, faces: Tensor) -> Tensor:
        logits: Tensor = self.network(faces)[0]
        return logits

    def _head(self) -> nn.Module:
        if self.network.head is None:
            raise RuntimeError("mode head: the network has no siamese head")
        return self.network.head

    def _frozen(self, faces: Tensor) -> Tensor:
        """The head in training mode over features in evaluation mode: their norms must not move."""
        head = self._head()
        self.network.eval()
        head.train()
        with torch.no_grad():
            features = self.network.features(faces)
        logits: Tensor = head(features).squeeze(1)
        return logits


def classification_loss(logits: Tensor, labels: Tensor, recipe: Recipe) -> Tensor:
    """By the recipe's loss; with a pair weight a manipulated crop should also score above its own original.

    `logits` and `labels` [2P]: the authentic half first, partners in the same order.
    """
    if recipe.loss is Loss.AM_SOFTMAX:
        return am_softmax(logits, labels)
    if recipe.loss is Loss.ARCFACE:
        return arcface(logits, labels)
    return pair_loss(logits, labels, recipe.label_smoothing, recipe.pair_weight)


def pair_loss(logits: Tensor, labels: Tensor, smoothing: float, pair_weight: float) -> Tensor:
    """Cross-entropy, and a manipulated crop should score above its own original.

    `logits` and `labels` [2P]: the authentic half first, partners in the same order.
    """
    real, fake = logits.float().chunk(2)
    return cross_entropy(logits, labels, smoothing) + pair_weight * F.softplus(real - fake).mean()


def score(
    network: nn.Module, images: NDArray[np.uint8], policy: CropPolicy, batch: int = SCORED
) -> NDArray[np.float32]:
    """Logits float32 [N] of uint8 crops [N, S, S, 3], in evaluation mode, on the network's own device."""
    parts = [np.empty(0, np.float32)]
    with torch.inference_mode():
        for faces in _batches(network, images, policy, batch):
            logits, _ = network(faces)
            parts.append(logits.float().cpu().numpy())
    return np.concatenate(parts)


def features_of(network: FaceNetwork, images: NDArray[np.uint8], policy: CropPolicy) -> NDArray[np.float32]:
    """Pooled features float32 [N, C] of uint8 crops [N, S, S, 3]."""
    with torch.inference_mode():
        parts = [
            network.features(faces).float().cpu().numpy()
            for faces in _batches(network, images, policy, SCORED)
        ]
    return np.concatenate(parts)


def _batches(
    network: nn.Module, images: NDArray[np.uint8], policy: CropPolicy, batch: int
) -> Iterator[Tensor]:
    device = next(network.parameters()).device
    for start in range(0, len(images), batch):
        yield to_tensor(images[start : start + batch], policy).to(device)
