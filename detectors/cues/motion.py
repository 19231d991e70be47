"""How a face's landmarks move: a bidirectional LSTM with attention over a window of pictures (Zhang et al.,
SCIENCE E; window and width ours).

Input of a picture: the 68 normalised landmarks and their differences to the picture before. Window of 32, two
directions of 64. Training is `detectors.training.motion`; off until a trained one shows a gain.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor, nn

WINDOW = 32
STRIDE = 16
"""Pictures from one window of a burst to the next."""

HIDDEN = 64
INPUTS = 2 * 2 * 68
RATE_HZ = 25.0
"""Windows are taken at this rate, whatever the stream's: what 32 pictures span must not depend on it."""

DIFFERENCES = 8.0
"""Times differences are enlarged: they are an order of magnitude below the landmarks, which are within
one."""


class MotionNet(nn.Module):
    """float32 [N, 32, 272] to logits [N] (> 0 manipulated) and attention over the window [N, 32], sum 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(INPUTS, HIDDEN, batch_first=True, bidirectional=True)
        self.attention = nn.Linear(2 * HIDDEN, 1)
        self.head = nn.Linear(2 * HIDDEN, 1)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = self.lstm(windows)
        weights = torch.softmax(self.attention(torch.tanh(states))[..., 0], dim=1)
        return self.head((weights[..., None] * states).sum(dim=1))[:, 0], weights


def windows(times: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the windows of a series as the network takes them, float32 [K, 32, 272]; K 0 if it is too short.

    `times` seconds [N], rising; `points` [N, 68, 2] normalised. They are resampled to RATE_HZ.
    """
    if len(times) < 2:
        return np.empty((0, WINDOW, INPUTS), np.float32)
    grid = np.arange(times[0], times[-1] + 1e-6, 1 / RATE_HZ)
    flat = points.reshape(len(points), -1)
    even = np.stack([np.interp(grid, times, column) for column in flat.T], axis=1)
    moved = np.concatenate([np.zeros((1, even.shape[1])), np.diff(even, axis=0)]) * DIFFERENCES
    both = np.concatenate([even, moved], axis=1).astype(np.float32)
    starts = range(0, len(both) - WINDOW + 1, STRIDE)
    if not len(starts):
        return np.empty((0, WINDOW, INPUTS), np.float32)
    cut = np.stack([both[start : start + WINDOW] for start in starts])
    cut[:, 0, even.shape[1] :] = 0  # the picture before the first is not the window's
    return cut


class MotionModel:
    """A trained network. Raises ValueError for a file that is none, of another layout or another SHA-256."""

    def __init__(self, folder: Path) -> None:
        record: dict[str, Any] = json.loads((folder / "motion.json").read_text(encoding="utf-8"))
        data = (folder / "motion.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != record.get("sha256"):
            raise ValueError(f"{folder}: motion.safetensors has not the SHA-256 of motion.json")
        self._net = MotionNet()
        self._net.load_state_dict(load(data))
        self._net.eval()
        self._mean = np.asarray(record["mean"], np.float32)
        self._spread = np.asarray(record["spread"], np.float32)

    def logit(self, times: NDArray[np.float64], points: NDArray[np.float64]) -> float | None:
        """Return the mean logit over the windows of a series; None if it is shorter than one."""
        cut = windows(times, points)
        if not len(cut):
            return None
        with torch.inference_mode():
            logits, _ = self._net(torch.from_numpy(scaled(cut, self._mean, self._spread)))
        return float(logits.mean())


def scaled(
    cut: NDArray[np.float32], mean: NDArray[np.float32], spread: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return windows standardised by the training set's mean and spread, [272] each."""
    return ((cut - mean) / np.maximum(spread, 1e-4)).astype(np.float32)
