"""Voice activity: whether somebody speaks, by the package silero-vad (MIT, weights inside).

Its network hears windows of 32 ms at 16 kHz and remembers what came before; TorchScript, a millisecond a
window on one core.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RATE_HZ = 16_000
WINDOW = 512
"""Samples that the network wants at a time."""

WINDOW_US = WINDOW * 1_000_000 // RATE_HZ
FULL_SCALE = 32768.0
SILENCE_DB = -90.0
"""Level of digital silence: below what 16 bits can hold."""

GAP_US = 50_000
"""Sound that begins this much off where the last ended is another stretch: chunks lose a packet, feeds
jump."""


class VoiceError(ValueError):
    """Voice activity cannot be had; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Window:
    """32 ms of sound from `media_us` on: `voice` probability in 0..1, `level_db` below full scale."""

    media_us: int
    voice: float
    level_db: float


class VoiceActivity:
    """Hears one stretch of sound after the other, of one stream. Used by one thread at a time."""

    def __init__(self, network: Callable[[NDArray[np.float32]], float], reset: Callable[[], None]) -> None:
        """`network` gives the probability for 512 samples in -1..1; `reset` lets it forget what it heard."""
        self._network = network
        self._reset = reset
        self._left = np.empty(0, np.float32)
        self._next_us: int | None = None

    def hear(self, media_us: int, samples: NDArray[np.int16]) -> list[Window]:
        """Return the windows that these samples, int16 mono at 16 kHz from `media_us` on, complete."""
        if self._next_us is None or abs(media_us - self._next_us) > GAP_US:
            self._reset()
            self._left = np.empty(0, np.float32)
            self._next_us = media_us
        begin_us = self._next_us - round(len(self._left) * 1e6 / RATE_HZ)
        heard = np.concatenate([self._left, samples.astype(np.float32) / FULL_SCALE])
        whole = len(heard) // WINDOW
        self._left = heard[whole * WINDOW :]
        self._next_us += round(len(samples) * 1e6 / RATE_HZ)
        return [
            self._window(begin_us + index * WINDOW_US, heard[index * WINDOW : (index + 1) * WINDOW])
            for index in range(whole)
        ]

    def forget(self) -> None:
        """What comes next is another stretch, of another stream perhaps."""
        self._next_us = None

    def _window(self, media_us: int, samples: NDArray[np.float32]) -> Window:
        power = float(np.square(samples, dtype=np.float64).mean())
        level = max(SILENCE_DB, 10 * math.log10(power)) if power > 0 else SILENCE_DB
        return Window(media_us, self._network(samples), level)


def why_no_voice() -> str:
    """Return why voice activity cannot be had here, in a sentence; "" if it can."""
    if importlib.util.find_spec("silero_vad") is None:
        return "voice activity: silero-vad is not installed; pip install 'unmask[cues]' brings it"
    return ""


def silero() -> VoiceActivity:
    """Return voice activity by silero-vad, which remembers for one stream alone.

    Raises VoiceError without the package.
    """
    against = why_no_voice()
    if against:
        raise VoiceError(against)
    import torch
    from silero_vad import load_silero_vad

    network: Any = load_silero_vad()

    def probability(samples: NDArray[np.float32]) -> float:
        with torch.inference_mode():
            return float(network(torch.from_numpy(np.ascontiguousarray(samples)), RATE_HZ))

    return VoiceActivity(probability, network.reset_states)
