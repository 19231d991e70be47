"""Benford's law on a still: first digits of a face's DCT coefficients (Bonettini et al., "On the use of
Benford's law to detect GAN-generated images", ICPR 2020; SCIENCE E).

The grey face is compressed as JPEG at five qualities. Of each of the first nine AC frequencies the first
digits of the quantised coefficients are counted in four bases; a generalised Benford law is fitted to each
count, and three symmetrised divergences say how far it lies: 5 x 9 x 4 x 3 = 540 numbers for a random forest
(`detectors.training.benford`), which is evaluated here by numpy alone.

For stills of whole faces made by a generator. A video codec rewrites the coefficients: there the cue is
missing, and says so.
"""

import json
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.cues import Cue, missing
from detectors.readings import Box, Image

NAME = "benford"
FOREST = Path(__file__).parent / "benford.npz"
SCHEMA = 1

QUALITIES = (80, 85, 90, 95, 100)
BASES = (10, 20, 40, 60)
FREQUENCIES = ((0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0))
"""The first nine AC terms of a block (row, column), in JPEG's zigzag order."""
DIVERGENCES = ("kullback-leibler", "renyi", "tsallis")
FEATURES = len(QUALITIES) * len(FREQUENCIES) * len(BASES) * len(DIVERGENCES)
"""540."""

ALPHA = 0.3
"""Order of the Renyi and Tsallis divergences (SCIENCE E)."""

BLOCK = 8
LEAST_PX, MOST_PX = 96, 256
"""Sides of the face crop. Below, fewer than 144 blocks tell too little of a distribution; above, it is
reduced to this, the largest the forest was trained on."""

STILLS_ONLY = "for stills only: a video codec has rewritten the coefficients"

_LUMINANCE = np.array(
    [[16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
     [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
     [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99]], np.float64,
)  # fmt: skip
"""The luminance table of the JPEG standard (ITU-T T.81, table K.1)."""

COARSE_A = np.concatenate([np.linspace(-0.95, 1.0, 27), np.linspace(1.25, 4.0, 12)])
COARSE_B = np.linspace(0.2, 4.0, 39)
"""Where the two parameters inside of the logarithm are sought: a > -1 keeps it positive at digit 1; natural
pictures have b of 1 to 2, coarse quantisation, which leaves ones and twos, more."""
REFINED = 4
"""Steps to either side of the best coarse point, so many to a coarse step."""


class ForestError(ValueError):
    """A forest file that cannot be used; names the file and what would be right."""


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees one after the other: `feature` int [N] (-1 at a leaf), `threshold` float [N], `left` and `right`
    int [N] indices of the next node, `value` float [N] share of synthetic training faces at a node, `roots`
    int [trees]. `record` says how it was trained. Raises ForestError when they do not fit together."""

    feature: NDArray[np.int32]
    threshold: NDArray[np.float32]
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    value: NDArray[np.float32]
    roots: NDArray[np.int32]
    record: dict[str, Any]

    def __post_init__(self) -> None:
        nodes = len(self.feature)
        same = all(len(part) == nodes for part in (self.threshold, self.left, self.right, self.value))
        if not same or not len(self.roots):
            raise ForestError(f"forest: parts of other lengths than {nodes}, or no tree")
        inner = np.flatnonzero(self.feature >= 0)
        following = np.concatenate([self.left[inner], self.right[inner]])
        # a child comes after its parent, so that no walk goes round in a circle
        ordered = (following > np.concatenate([inner, inner])).all() and (following < nodes).all()
        known = (self.feature < FEATURES).all() and ((self.roots >= 0) & (self.roots < nodes)).all()
        finite = np.isfinite(self.threshold).all() and ((self.value >= 0) & (self.value <= 1)).all()
        if not (ordered and known and finite):
            raise ForestError(f"forest: {nodes} nodes do not form trees over {FEATURES} features")

    def share(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Mean of the trees' values, 0..1, of float [N, 540]."""
        rows = np.arange(len(features))[:, None]
        node = np.repeat(self.roots[None, :], len(features), axis=0)
        while True:
            feature = self.feature[node]
            inner = feature >= 0
            if not inner.any():
                mean: NDArray[np.float64] = self.value[node].mean(1, dtype=np.float64)
                return mean
            below = features[rows, np.maximum(feature, 0)] <= self.threshold[node]
            node = np.where(inner, np.where(below, self.left[node], self.right[node]), node)


def write_forest(path: Path, forest: Forest) -> None:
    """Writes a forest as arrays without pickle."""
    parts = {name: getattr(forest, name) for name in Forest.__slots__ if name != "record"}
    record = np.frombuffer(json.dumps({"schema": SCHEMA, **forest.record}).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez_compressed(file, record=record, **parts)


@lru_cache(maxsize=4)
def read_forest(path: Path) -> Forest:
    """Reads what `write_forest` wrote, once. Raises ForestError for a missing or broken file."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            parts = {name: saved[name] for name in Forest.__slots__ if name != "record"}
            record = json.loads(saved["record"].tobytes())
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ForestError(f"{path}: {error}") from error
    if record.pop("schema", None) != SCHEMA:
        raise ForestError(f"{path}: expected schema {SCHEMA}")
    try:
        return Forest(**parts, record=record)
    except ForestError as error:
        raise ForestError(f"{path}: {error}") from error


def read_still(image: Image, box: Box, forest: Path = FOREST) -> Cue:
    """The cue of one face in a still, uint8 (H, W, 3) RGB, its box in pixels: log odds that it is synthetic,
    as the forest says, uncalibrated. Raises ForestError for a broken forest."""
    if not forest.exists():
        return missing(NAME, "no forest is shipped; python -m detectors.training.benford makes one")
    grey = grey_face(image, box)
    if min(grey.shape) < LEAST_PX:
        return missing(NAME, f"the face has {min(grey.shape)} pixels, {LEAST_PX} are needed")
    return Cue(NAME, log_odds(read_forest(forest), features(grey)[None])[0])


def log_odds(forest: Forest, found: NDArray[np.float32]) -> list[float]:
    """Log odds of the forest's shares, of float32 [N, 540]. A share counts as if one tree more had voted for
    either side, so that a unanimous forest is not infinitely sure."""
    trees = len(forest.roots)
    shares = (forest.share(found) * trees + 1) / (trees + 2)
    return [math.log(share / (1 - share)) for share in shares]


def grey_face(image: Image, box: Box) -> NDArray[np.uint8]:
    """The face, grey, uint8 (h, w), sides multiples of 8: the square about its box, inside of the picture, at
    the picture's own pixels, or reduced to 256 of them."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box
    reach = max(x1 - x0, y1 - y0) / 2
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    left, top = max(0, int(cx - reach)), max(0, int(cy - reach))
    right, bottom = min(width, int(cx + reach)), min(height, int(cy + reach))
    if right <= left or bottom <= top:
        return np.zeros((0, 0), np.uint8)
    grey = np.asarray(cv2.cvtColor(image[top:bottom, left:right], cv2.COLOR_RGB2GRAY), np.uint8)
    scale = MOST_PX / max(grey.shape)
    if scale < 1:
        size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
        grey = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), np.uint8)
    return grey[: grey.shape[0] // BLOCK * BLOCK, : grey.shape[1] // BLOCK * BLOCK]


def features(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The 540 numbers of a grey face, uint8 (h, w), sides multiples of 8: by base, quality, frequency and
    divergence, the last running fastest. Raises ValueError for another shape."""
    if grey.ndim != 2 or not grey.size or grey.shape[0] % BLOCK or grey.shape[1] % BLOCK:
        raise ValueError(f"grey face of shape {grey.shape}, expected (h, w), multiples of {BLOCK}, not empty")
    levels = np.stack([quantised(grey, quality) for quality in QUALITIES])
    series = levels.transpose(0, 2, 1).reshape(len(QUALITIES) * len(FREQUENCIES), -1)
    found = []
    for base in BASES:
        counted = digit_shares(series, base)
        found.append(divergences(counted, fitted(counted)))
    return np.concatenate(found).astype(np.float32).ravel()


def table(quality: int) -> NDArray[np.float64]:
    """The luminance quantisation table [8, 8] of libjpeg at a quality of 1..100."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    return np.asarray(np.clip(np.floor((_LUMINANCE * scale + 50) / 100), 1, 255), np.float64)


def quantised(grey: NDArray[np.uint8], quality: int) -> NDArray[np.int32]:
    """What a JPEG of this quality stores: int32 [blocks, 9], the first nine AC terms of every 8x8 block."""
    rows, columns = grey.shape[0] // BLOCK, grey.shape[1] // BLOCK
    blocks = grey.reshape(rows, BLOCK, columns, BLOCK).transpose(0, 2, 1, 3).reshape(-1, BLOCK, BLOCK)
    transform = _dct()
    terms = transform @ (blocks.astype(np.float64) - 128) @ transform.T
    levels = np.rint(terms / table(quality)).astype(np.int32)
    y, x = zip(*FREQUENCIES, strict=True)
    return levels[:, list(y), list(x)]


def digit_shares(series: NDArray[np.int32], base: int) -> NDArray[np.float64]:
    """Shares of the first digits 1..base-1 among the numbers that are not 0: [K, base - 1] of [K, N].

    Half a count more for each digit (Krichevsky and Trofimov): no digit is impossible because a small face
    does not show it.
    """
    sizes = np.abs(series).astype(np.float64)
    digits = np.zeros(series.shape, np.int64)
    power = 1.0
    while (sizes >= power).any():
        inside = (sizes >= power) & (sizes < power * base)
        digits[inside] = (sizes[inside] // power).astype(np.int64)
        power *= base
    rows = np.arange(len(series))[:, None] * base
    counts = np.bincount((digits + rows).ravel(), minlength=len(series) * base).reshape(len(series), base)
    counted = counts[:, 1:] + 0.5
    shares: NDArray[np.float64] = counted / counted.sum(1, keepdims=True)
    return shares


def fitted(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """The generalised Benford law k * log(1 + 1 / (a + m^b)) of least squared error for each row of
    [K, base - 1], brought to a sum of 1.

    k follows from a and b; those are sought on a grid, then on a finer one about the best point: no start
    value, no divergence, the same answer everywhere.
    """
    digits = shares.shape[1]
    a, b = (part.ravel() for part in np.meshgrid(COARSE_A, COARSE_B, indexing="ij"))
    best = _best(shares, _coarse(digits)[None])
    steps = np.arange(-REFINED, REFINED + 1) / REFINED
    around_a, around_b = (part.ravel() for part in np.meshgrid(steps, steps, indexing="ij"))
    step_a = np.where(a[best] < 1, COARSE_A[1] - COARSE_A[0], COARSE_A[-1] - COARSE_A[-2])
    fine_a = np.maximum(a[best][:, None] + around_a * step_a[:, None], -0.99)
    fine_b = np.maximum(b[best][:, None] + around_b * (COARSE_B[1] - COARSE_B[0]), 0.05)
    laws = _law(fine_a, fine_b, digits)
    chosen = laws[np.arange(len(shares)), _best(shares, laws)]
    return np.asarray(chosen / chosen.sum(1, keepdims=True), np.float64)


def divergences(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Symmetrised Kullback-Leibler, Renyi and Tsallis divergences of rows [K, D] that are above 0: [K, 3]."""
    leibler = ((p - q) * np.log(p / q)).sum(1)
    there, back = ((x**ALPHA * y ** (1 - ALPHA)).sum(1) for x, y in ((p, q), (q, p)))
    renyi = (np.log(there) + np.log(back)) / (ALPHA - 1)
    tsallis = (there - 1 + back - 1) / (ALPHA - 1)
    return np.stack([leibler, renyi, tsallis], axis=1)


def _best(shares: NDArray[np.float64], laws: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the law, of [K or 1, L, D], that fits each of [K, D] best when scaled to it."""
    along = shares @ laws[0].T if len(laws) == 1 else np.einsum("kd,kld->kl", shares, laws)
    chosen: NDArray[np.int64] = (along**2 / (laws**2).sum(-1)).argmax(1)
    return chosen


def _law(a: NDArray[np.float64], b: NDArray[np.float64], digits: int) -> NDArray[np.float64]:
    m = np.arange(1, digits + 1, dtype=np.float64)
    law: NDArray[np.float64] = np.log1p(1 / (a[..., None] + m ** b[..., None]))
    return law


@cache
def _coarse(digits: int) -> NDArray[np.float64]:
    a, b = (part.ravel() for part in np.meshgrid(COARSE_A, COARSE_B, indexing="ij"))
    return _law(a, b, digits)


@cache
def _dct() -> NDArray[np.float64]:
    """The orthonormal 8-point DCT-II, which JPEG's is."""
    k, n = np.mgrid[0:BLOCK, 0:BLOCK]
    basis: NDArray[np.float64] = np.cos((2 * n + 1) * k * np.pi / (2 * BLOCK)) * np.sqrt(2 / BLOCK)
    basis[0] /= np.sqrt(2)
    return basis
