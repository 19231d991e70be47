"""Learning from teachers: the student matches the softened answer of an ensemble of members.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", for one logit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from detectors.crops import CropPolicy, to_tensor
from detectors.members import Member, load_member


class TeacherError(ValueError):
    """A teacher that cannot teach this student; names the member and what would be right."""


@dataclass(frozen=True, slots=True)
class Teachers:
    """Members in evaluation mode on `device`; their logits are averaged, as an ensemble's are."""

    members: tuple[Member, ...]
    device: torch.device

    def logits(self, images: NDArray[np.uint8]) -> Tensor:
        """Mean logit float32 [N] of the student's own augmented crops, uint8 [N, S, S, 3] RGB.

        A teacher of another input size gets them resampled.
        """
        answers = [self._ask(member, images) for member in self.members]
        return torch.stack(answers).mean(0)

    def inputs(self, member: Member, images: NDArray[np.uint8]) -> Tensor:
        """The crops as one of the members takes them: normalised, of its size, on the device."""
        return to_tensor(_at_size(images, member.policy.size), member.policy).to(self.device)

    def _ask(self, member: Member, images: NDArray[np.uint8]) -> Tensor:
        with torch.no_grad():
            logits, _ = member.module(self.inputs(member, images))
        answer: Tensor = logits.float()
        return answer


def load_teachers(names: Sequence[str], policy: CropPolicy, device: torch.device) -> Teachers:
    """Loads members by name or directory; TeacherError when one frames faces otherwise than `policy`."""
    members = tuple(load_member(name) for name in names)
    for member in members:
        if member.policy.at_size(policy.size) != policy:
            raise TeacherError(
                f"teachers: {member.name}: its crops are {member.policy}; expected the recipe's framing, of "
                f"any size: {policy}"
            )
        member.module.to(device)
    return Teachers(members, device)


def distillation_loss(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Cross-entropy with the teachers' answer, both divided by `temperature`, times its square.

    The square keeps the gradient's size when the temperature is raised. The answer's own entropy is taken
    off: 0 when the student agrees.
    """
    soft = torch.sigmoid(taught / temperature)
    own = F.binary_cross_entropy_with_logits(logits.float() / temperature, soft)
    entropy = F.binary_cross_entropy_with_logits(taught / temperature, soft)
    return (own - entropy) * temperature**2


def _at_size(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if images.shape[1] == size:
        return images
    shrinks = images.shape[1] > size
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.stack([cv2.resize(image, (size, size), interpolation=how) for image in images])
