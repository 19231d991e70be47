"""The bridge from whole faces to half ones (SCIENCE B): a student that sees half of a crop learns from an
ensemble that sees all of it.

After Georgescu and Ionescu, "Teacher-Student Training and Triplet Loss ...": the student's answer is drawn to
the ensemble's (classic distillation), and its embedding to a teacher's. Their positive is a teacher embedding
of the same class; here it is that of the SAME crop, uncovered, and the negative is the student's own
embedding of the partner (the same original, other label): a face of the same class would reward knowing
people. That ablation is `Positive.SAME_CLASS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from detectors.backbones import FaceNetwork
from detectors.crops import CropPolicy
from detectors.readings import Visible
from detectors.training.distil import TeacherError, Teachers, load_teachers
from detectors.training.occluders import cover, random_occluder

DRAWN_SHARE = 0.7
"""Of pairs, in front of which something is drawn: at run time an occluder often reaches over the middle of
the face, but not always."""


class Positive(StrEnum):
    """Whose teacher embedding a student's is drawn to."""

    SAME_FACE = "same_face"
    SAME_CLASS = "same_class"


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the teachers make of whole crops: their mean logit [N], and the first one's pooled features
    [N, C]."""

    logits: Tensor
    features: Tensor


class Bridge:
    """Teachers of half-face students. The first one gives the embeddings, all of them the logits; each reads
    a crop once, the first as it is, the others as at run time.

    Raises TeacherError for teachers of another framing, for one that sees half faces itself, and for a first
    one whose embeddings the student's cannot be compared with; and what `load_member` raises.
    """

    def __init__(
        self, names: Sequence[str], policy: CropPolicy, student: FaceNetwork, device: torch.device
    ) -> None:
        found = load_teachers(names, policy, device)
        halves = [member.name for member in found.members if member.half is not None]
        if halves:
            raise TeacherError(
                f"teachers: {halves[0]}: sees half a face; expected members that see all of it"
            )
        first = found.members[0]
        if not isinstance(first.module, FaceNetwork):
            raise TeacherError(f"teachers: {first.name}: expected a network of ours as the first one")
        if first.module.net.num_features != student.net.num_features:
            raise TeacherError(
                f"teachers: {first.name}: embeddings of {first.module.net.num_features} numbers; "
                f"expected the student's {student.net.num_features}"
            )
        self._first: FaceNetwork = first.module
        self._leading = Teachers(found.members[:1], device)
        self._others = Teachers(found.members[1:], device)

    def lesson(self, images: NDArray[np.uint8]) -> Lesson:
        """Of a batch of whole augmented crops, uint8 [N, S, S, 3] RGB."""
        with torch.no_grad():
            features = self._first.features(self._leading.inputs(self._leading.members[0], images)).float()
            logits = self._first.classified(features)
        others = len(self._others.members)
        if others:
            logits = (logits + others * self._others.logits(images)) / (1 + others)
        return Lesson(logits, features)


def covered_pairs(images: NDArray[np.uint8], leaves: Visible, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draws occluders over the half that is not `leaves`, the same one over both crops of a pair.

    `images` uint8 [2P, S, S, 3], the authentic half first; returned as new ones. Training kinds only.
    """
    pairs = len(images) // 2
    out = images.copy()
    for i in range(pairs):
        if rng.random() < DRAWN_SHARE:
            occluder = random_occluder(rng, leaves)
            out[i], out[pairs + i] = cover(images[i], occluder), cover(images[pairs + i], occluder)
    return out


def bridge_loss(features: Tensor, taught: Tensor, margin: float, positive: Positive) -> Tensor:
    """Hinge on Euclidean distances of features of length 1, the mean over all crops; float32.

    `features` [2P, C] are the student's of half-covered crops, the authentic half first and partners in the
    same order; `taught` [2P, C] the teacher's of the whole ones. SAME_FACE: to the teacher's of the same crop
    against the student's of the partner. SAME_CLASS: to the teacher's farthest of the class against the
    student's nearest of the other one (batch-hard).
    """
    student, teacher = F.normalize(features.float()), F.normalize(taught.float())
    pairs = len(student) // 2
    if positive is Positive.SAME_FACE:
        near = torch.linalg.vector_norm(student - teacher, dim=1)
        far = torch.linalg.vector_norm(student - student.roll(pairs, 0), dim=1)
        return F.relu(near - far + margin).mean()
    of_fake = torch.arange(2 * pairs, device=student.device) >= pairs
    same = of_fake[:, None] == of_fake[None, :]
    to_teacher = torch.cdist(student, teacher, compute_mode="donot_use_mm_for_euclid_dist")
    among = torch.cdist(student, student, compute_mode="donot_use_mm_for_euclid_dist")
    farthest = to_teacher.masked_fill(~same, -torch.inf).amax(1)
    nearest = among.masked_fill(same, torch.inf).amin(1)
    return F.relu(farthest - nearest + margin).mean()
