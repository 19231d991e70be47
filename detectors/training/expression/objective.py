"""What a step minimises, by the recipe's method; all are means over the batch, in float32."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from detectors.readings import EXPRESSIONS
from detectors.training.expression.ferplus import NONE
from detectors.training.expression.recipe import Labels, NetworkRecipe
from detectors.training.recipe import Triplets


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of the training pictures: `shares` float32 [N, 8] of the votes, `labels` int64 [N] (NONE
    where nobody agrees), and of methods with a teacher its `logits` [N, 8] and `embeddings` [N, C] of the
    whole faces."""

    shares: NDArray[np.float32]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32] | None = None
    embeddings: NDArray[np.float32] | None = None


def targets(shares: Tensor, labels: Tensor, how: Labels, rng: torch.Generator) -> Tensor:
    """What the logits are to say, float32 [N, 8], of the votes' `shares` [N, 8] and the agreed `labels` [N].

    `rng` is a generator on their device and draws the votes of `probabilistic`.
    """
    if how is Labels.DISTRIBUTION:
        return shares
    chosen = labels
    if how is Labels.PROBABILISTIC:
        chosen = torch.multinomial(shares, 1, generator=rng)[:, 0]
    return F.one_hot(chosen, len(EXPRESSIONS)).float()


def cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Of logits [N, 8] with shares [N, 8]."""
    return -(wanted * F.log_softmax(logits.float(), dim=1)).sum(1).mean()


def distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the teacher's answer, both softened by `temperature`, times its
    square.

    Hinton et al., "Distilling the Knowledge in a Neural Network". 0 when the student agrees.
    """
    own = F.log_softmax(logits.float() / temperature, dim=1)
    soft = F.softmax(taught.float() / temperature, dim=1)
    return F.kl_div(own, soft, reduction="batchmean") * temperature**2


def cross_triplets(
    student: Tensor, teacher: Tensor, labels: Tensor, margin: float, how: Triplets, rng: torch.Generator
) -> Tensor:
    """Hinge on Euclidean distances between embeddings of length 1 (Georgescu and Ionescu).

    Anchor: the student's embedding of a half. Positive: the teacher's of a whole face of the same class, the
    farthest in the batch, or any of them. Negative: the student's of a half of another class, the nearest, or
    any. `student` and `teacher` [N, C] of the same pictures in the same order, `labels` [N]; pictures without
    one are left out. 0 where a batch has fewer than two classes.
    """
    chosen = labels != NONE
    student, teacher = F.normalize(student.float())[chosen], F.normalize(teacher.float())[chosen]
    same = labels[chosen][:, None] == labels[chosen][None, :]
    if same.all():
        return student.sum() * 0
    to_teacher, to_student = _distances(student, teacher), _distances(student, student)
    if how is Triplets.BATCH_HARD:
        positive = to_teacher.masked_fill(~same, -1.0).amax(1)
        negative = to_student.masked_fill(same, torch.inf).amin(1)
    else:
        positive = to_teacher.gather(1, torch.multinomial(same.float(), 1, generator=rng))[:, 0]
        negative = to_student.gather(1, torch.multinomial((~same).float(), 1, generator=rng))[:, 0]
    return F.relu(positive - negative + margin).mean()


def objective(
    recipe: NetworkRecipe, logits: Tensor, embeddings: Tensor, rows: NDArray[np.int64], told: Told, seed: int
) -> Tensor:
    """The loss of a batch: `rows` of what is `told`, read as `logits` and `embeddings`."""
    device = logits.device
    rng = torch.Generator(device).manual_seed(seed)
    labels = torch.from_numpy(told.labels[rows]).to(device)
    wanted = targets(torch.from_numpy(told.shares[rows]).to(device), labels, recipe.labels, rng)
    loss = cross_entropy(logits, wanted)
    if recipe.distil_weight is not None and recipe.distil_temperature is not None and told.logits is not None:
        taught = torch.from_numpy(told.logits[rows]).to(device)
        share = recipe.distil_weight
        loss = (1 - share) * loss + share * distillation(logits, taught, recipe.distil_temperature)
    if recipe.triplet_weight and recipe.margin and recipe.triplets and told.embeddings is not None:
        teacher = torch.from_numpy(told.embeddings[rows]).to(device)
        pulled = cross_triplets(embeddings, teacher, labels, recipe.margin, recipe.triplets, rng)
        loss = loss + recipe.triplet_weight * pulled
    return loss


def _distances(left: Tensor, right: Tensor) -> Tensor:
    """Euclidean, [N, M], with a slope where they are 0."""
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
