"""What a training minimises, one function a loss; all are means over the batch, in float32."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RECOGNITION_SCALE = 8.0
"""Half the range of a cosine member's logit. Face recognition takes 30 to 64, for thousands of classes; of
two classes 8 already gives probabilities from 1e-7 to 1 - 1e-7."""
AM_SOFTMAX_MARGIN = 0.35
"""Of the cosine; Wang et al., "Additive Margin Softmax for Face Verification"."""
ARCFACE_MARGIN = 0.5
"""Radians; Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition"."""
COSINE_EDGE = 1e-6
"""The arc cosine's slope is infinite at +-1."""


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy of logits [N] with labels [N] in {0, 1}, drawn towards 1/2 by `smoothing`."""
    targets = labels * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


def am_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax over two classes with an additive margin on the cosine of the right one.

    `logits` [N] are 2 s cos(feature, w): with two classes the best class vectors are opposite, w and -w, so
    one vector holds both and the member still gives one logit. `labels` [N] in {0, 1}.
    """
    own = (2 * labels - 1) * logits.float()
    return F.softplus(RECOGNITION_SCALE * AM_SOFTMAX_MARGIN - own).mean()


def arcface(logits: Tensor, labels: Tensor) -> Tensor:
    """As `am_softmax`, with the margin added to the angle.

    Where angle and margin would pass pi the loss goes on as a straight line, so that it never falls again.
    """
    cosine = (2 * labels - 1) * logits.float() / (2 * RECOGNITION_SCALE)
    cosine = cosine.clamp(COSINE_EDGE - 1, 1 - COSINE_EDGE)
    turned = torch.cos(torch.acos(cosine) + ARCFACE_MARGIN)
    edge = -math.cos(ARCFACE_MARGIN)
    held = torch.where(cosine > edge, turned, cosine - edge - 1)
    return F.softplus(-RECOGNITION_SCALE * (held + cosine)).mean()


def batch_hard(features: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Hinge on each crop's farthest companion of its class and nearest of the other one, Euclidean.

    After Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification". `features` [N, C],
    not normalised; `labels` [N]; both classes must be present twice.
    """
    distance = torch.cdist(features.float(), features.float(), compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels[None, :]
    farthest = distance.masked_fill(~same, -math.inf).amax(1)
    nearest = distance.masked_fill(same, math.inf).amin(1)
    return F.relu(farthest - nearest + margin).mean()


def triplets(features: Tensor, index: Tensor, margin: float) -> Tensor:
    """Hinge on Euclidean distances.

    `index` int64 [T, 3] are rows of `features` [N, C]: anchor, positive, negative.
    """
    anchor, positive, negative = features.float()[index].unbind(1)
    return F.triplet_margin_loss(anchor, positive, negative, margin=margin)


def mask_loss(predicted: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of mask logits [N, h, w] with the share of each cell that is manipulated.

    `masks` [N, H, W] in 0..1, NaN where unknown: such cells count nothing. Logits of a finer grid are
    averaged to that of the masks.
    """
    height, width = masks.shape[1:]
    cells = F.adaptive_avg_pool2d(predicted.float()[:, None], (height, width))[:, 0]
    known = torch.isfinite(masks)
    each = F.binary_cross_entropy_with_logits(cells, masks.nan_to_num(), reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)
