"""How far numbers of today lie from those of the calibration: the population stability index.

PSI = sum over bins of (p - q) ln(p / q), p today's shares and q the reference's; by convention below .1
nothing moved, above .25 something did (Siddiqi, "Credit Risk Scorecards"). Of n independent looks it is about
(bins - 1) / n by chance alone, with the spread of a chi-square (Yurdakul, "Statistical Properties of
Population Stability Index"): `chance` is what it stays below then.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from detectors.calibration import Histogram

BINS = 10
"""Bins of equal share at calibration, the convention that the limits of .1 and .25 belong to."""

FLOOR = 1e-3
"""Least share of a bin: an empty one is no proof that nothing ever falls there, and logarithms need some."""

DIGITS = 4
"""Edges are rounded: they are read by people, and fitted on hundreds of people at best."""

SPREAD = 3.0
"""Standard deviations above the chance value: about one stream in a thousand by chance."""


def reference_histograms(values: Mapping[str, ArrayLike]) -> dict[str, Histogram]:
    """Return what each part looked like: `BINS` bins of equal share, fewer where values repeat.

    `values` by name: `score`, the fused logits of authentic faces good enough to be decided upon, and
    quality parts (`detectors.quality`) of all authentic faces; number arrays (N,) of any lengths, one look
    each. What is not finite is left out; a part with fewer than `BINS` values, or with one value only, too.
    Leave out parts that the way of taking the pictures decides (`face_px` and pose of cropped faces).
    """
    found = {name: _histogram(np.asarray(looks, np.float64).ravel()) for name, looks in values.items()}
    return {name: histogram for name, histogram in found.items() if histogram is not None}


def _histogram(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> Histogram | None:
    values = values[np.isfinite(values)]
    if len(values) < BINS:
        return None
    edges = np.unique(np.round(np.quantile(values, np.arange(1, BINS) / BINS), DIGITS))
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    kept = edges[counts[:-1] > 0]  # a bin that holds nothing says nothing
    if len(kept) == 0:
        return None
    counts = np.bincount(np.searchsorted(kept, values, side="right"), minlength=len(kept) + 1)
    return Histogram(tuple(kept.tolist()), tuple((counts / counts.sum()).tolist()))


def bin_of(reference: Histogram, value: float) -> int:
    """Return which bin of `reference` a finite value falls into."""
    return bisect_right(reference.edges, value)


def stability(reference: Histogram, counts: Sequence[float]) -> float:
    """Return the PSI (>= 0, natural logarithm) of `counts` per bin of `reference`, whose sum is above 0."""
    total = math.fsum(counts)
    shares = [
        (max(FLOOR, count / total), max(FLOOR, q)) for count, q in zip(counts, reference.shares, strict=True)
    ]
    return math.fsum((p - q) * math.log(p / q) for p, q in shares)


def chance(reference: Histogram, looks: float) -> float:
    """Return what the PSI of so many independent looks (above 0) stays below if nothing has changed."""
    freedom = len(reference.edges)
    return (freedom + SPREAD * math.sqrt(2 * freedom)) / looks


def median(reference: Histogram, counts: Sequence[float]) -> float:
    """Return about where the middle of `counts` lies: the inner edge of the bin that holds it."""
    half, passed = math.fsum(counts) / 2, 0.0
    for index, count in enumerate(counts):
        passed += count
        if passed >= half:
            return reference.edges[min(index, len(reference.edges) - 1)]
    return reference.edges[-1]
