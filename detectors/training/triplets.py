"""Triplets drawn from a batch of pairs, and how far apart they leave the classes."""

import numpy as np
from numpy.typing import NDArray

from detectors.training.metrics import auc


def random_triplets(pairs: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """int64 [2 * pairs / 3, 3]: anchor, positive, negative, as rows of a batch of `pairs` authentic crops and
    then as many manipulated ones.

    Alternately two manipulated and an authentic crop, and two authentic and a manipulated one (Bonettini et
    al.); every crop of the batch is in exactly one triplet. `pairs` is a multiple of 3.
    """
    if pairs % 3:
        raise ValueError(f"{pairs} pairs: expected a multiple of 3, so that every crop has its triplet")
    real, fake = rng.permutation(pairs), pairs + rng.permutation(pairs)
    third = pairs // 3
    of_fake = np.stack([fake[:third], fake[third : 2 * third], real[:third]], axis=1)
    of_real = np.stack([real[third : 2 * third], real[2 * third :], fake[2 * third :]], axis=1)
    return np.stack([of_fake, of_real], axis=1).reshape(-1, 3)


def separation(
    features: NDArray[np.floating], labels: NDArray[np.int64], identity: NDArray[np.int64]
) -> float:
    """AUC of the projection on the line through both classes' means.

    Means of the people with even numbers score those with odd ones and the other way round. NaN when either
    half lacks a class.
    """
    even = identity % 2 == 0
    values = []
    for half in (even, ~even):
        if len(np.unique(labels[half])) < 2 or len(np.unique(labels[~half])) < 2:
            return float("nan")
        line = features[half & (labels == 1)].mean(0) - features[half & (labels == 0)].mean(0)
        values.append(auc(features[~half] @ line, labels[~half]))
    return float(np.mean(values))
