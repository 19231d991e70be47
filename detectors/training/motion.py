"""Training of the landmark Bi-LSTM with attention (Zhang et al., SCIENCE E) on authentic bursts and the swaps
simulated of them."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from detectors.cues.motion import MotionNet, scaled, windows
from detectors.cues.series import FaceSeries

logger = logging.getLogger(__name__)

EPOCHS = 60
BATCH = 32
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-3
DROPPED = 0.1
"""Share of inputs set to their mean in training: some hundred windows of few people are soon known by
heart."""

NOISE = 0.05
"""In standard deviations, for the same reason."""

MIRROR = np.array(
    [16 - k for k in range(17)] + [26 - k for k in range(10)] + [27, 28, 29, 30, 35, 34, 33, 32, 31]
    + [45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40]
    + [54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65]
)  # fmt: skip
"""Where each of the 68 points lies in a mirrored face."""


def windows_of(series: FaceSeries) -> NDArray[np.float32]:
    """Windows of one burst, float32 [K, 32, 272]."""
    return windows(series.seconds, series.points)


def mirrored(cut: NDArray[np.float32]) -> NDArray[np.float32]:
    """The windows of the mirrored face."""
    points = cut.reshape(*cut.shape[:-1], 2, 68, 2)[..., MIRROR, :] * np.array([-1, 1], np.float32)
    flipped: NDArray[np.float32] = points.reshape(cut.shape).astype(np.float32)
    return flipped


def fit_motion(
    cut: NDArray[np.float32],
    y: NDArray[np.int64],
    *,
    epochs: int = EPOCHS,
    seed: int = 41,
    told: Callable[[int, float], None] = lambda epoch, loss: None,
) -> tuple[MotionNet, NDArray[np.float32], NDArray[np.float32]]:
    """Network, mean and spread of its inputs, from windows [N, 32, 272] and labels; both classes weigh alike.

    The same windows and seed give the same network on one machine. Raises ValueError for a single class.
    """
    if len(np.unique(y)) < 2:
        raise ValueError("motion: windows of one class only; both are needed")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    both = np.concatenate([cut, mirrored(cut)])
    mean, spread = both.mean(axis=(0, 1)), both.std(axis=(0, 1))
    x, target = scaled(both, mean, spread), np.concatenate([y, y])
    net = MotionNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    weight = torch.tensor(float((target == 0).sum() / max((target == 1).sum(), 1)))
    cost = nn.BCEWithLogitsLoss(pos_weight=weight)
    for epoch in range(epochs):
        losses = []
        net.train()
        for rows in np.array_split(rng.permutation(len(x)), max(1, round(len(x) / BATCH))):
            noisy = x[rows] + rng.normal(0, NOISE, x[rows].shape).astype(np.float32)
            noisy *= rng.random(noisy.shape) >= DROPPED
            logits, _ = net(torch.from_numpy(noisy.astype(np.float32)))
            loss = cost(logits, torch.from_numpy(target[rows].astype(np.float32)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        told(epoch, float(np.mean(losses)))
    return net.eval(), mean, spread


def logit_of(
    net: MotionNet, mean: NDArray[np.float32], spread: NDArray[np.float32], cut: NDArray[np.float32]
) -> float:
    """Mean logit over a burst's windows (at least one), as at run time."""
    with torch.inference_mode():
        logits, _ = net(torch.from_numpy(scaled(cut, mean, spread)))
    return float(logits.mean())


def write_motion(
    folder: Path,
    net: MotionNet,
    mean: NDArray[np.float32],
    spread: NDArray[np.float32],
    measured: dict[str, Any],
) -> None:
    """Write what `detectors.cues.motion.MotionModel` reads, with the measurement beside it."""
    data = save({name: tensor.contiguous() for name, tensor in net.state_dict().items()})
    (folder / "motion.safetensors").write_bytes(data)
    record = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "mean": [round(float(value), 6) for value in mean],
        "spread": [round(float(value), 6) for value in spread],
        "measured": measured,
    }
    (folder / "motion.json").write_text(json.dumps(record) + "\n")
