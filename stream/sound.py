"""Audio packets of chunks as mono sound at 16 kHz: what runs in a decoder child within a burst.

Sound is never worth a picture: whatever is wrong with it is counted and leaves silence.
"""

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from stream.chunks import ChunkPackets, SoundParameters
from stream.records import ChunkMeta

RATE_HZ = 16_000
"""What voice activity hears; speech has nothing above 8 kHz that matters here."""

GAP_US = 50_000
"""Packets that far off where the last ended are another stretch: what the resampler holds is not theirs."""

MOST_SAMPLES = 10 * RATE_HZ
"""Of one chunk, which is half a second long: what claims more is hostile."""

Stretch = tuple[int, NDArray[np.int16]]
"""Media time of the first sample in microseconds, and samples int16 [N]."""


class SoundDecoder:
    """Decodes the sound of one stream, chunk after chunk, while asked to. `errors` counts packets refused."""

    def __init__(self) -> None:
        self._parameters: SoundParameters | None = None
        self._context: Any = None
        self._resampler: Any = None
        self._ends_us: int | None = None
        self.errors = 0

    def hear(self, meta: ChunkMeta, chunk: ChunkPackets) -> list[Stretch]:
        """Return what the chunk's audio sounds like; nothing where none can be decoded."""
        if chunk.sound is None:
            return []
        if chunk.sound != self._parameters:
            self._open(chunk.sound)
        if self._context is None:
            self.errors += len(chunk.audio)
            return []
        heard: list[Stretch] = []
        for packet in chunk.audio:
            if sum(len(samples) for _, samples in heard) >= MOST_SAMPLES:
                self.errors += 1
                continue
            try:
                for frame in self._context.decode(packet):
                    if frame.pts is not None:
                        self._add(heard, self._media_us(meta, frame), frame)
            except Exception:  # whatever PyAV stumbles over; a format that changed needs a new resampler
                self.errors += 1
                self._ends_us = None
        return heard

    def stop(self) -> None:
        """Forget what was heard: the burst is over, the next one begins elsewhere."""
        self._parameters = self._context = self._resampler = self._ends_us = None

    def _open(self, sound: SoundParameters) -> None:
        self._parameters, self._ends_us = sound, None
        try:
            context: Any = av.CodecContext.create(sound.codec, "r")
            context.sample_rate = sound.rate_hz
            context.layout = sound.layout
            if sound.extradata:
                context.extradata = sound.extradata
            context.thread_count = 1
            self._context = context
        except (av.FFmpegError, ValueError, LookupError):
            self._context = None

    def _add(self, heard: list[Stretch], media_us: int, frame: Any) -> None:
        rate_hz, samples = frame.sample_rate, frame.samples
        if self._ends_us is None or abs(media_us - self._ends_us) > GAP_US:
            self._resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE_HZ)
            self._ends_us = media_us
            begins_anew = True
        else:
            begins_anew = not heard
        frame.pts = None  # the resampler counts samples; gaps are ours to see
        found = _mono(self._resampler.resample(frame))
        begin_us = self._ends_us
        self._ends_us += round(samples * 1e6 / rate_hz)
        if not len(found):
            return
        if begins_anew:
            heard.append((begin_us, found))
        else:
            begun_us, before = heard[-1]
            heard[-1] = (begun_us, np.concatenate([before, found]))

    @staticmethod
    def _media_us(meta: ChunkMeta, frame: Any) -> int:
        at: Fraction = frame.pts * frame.time_base - meta.first_pts * meta.time_base
        return meta.epoch_anchor_us + round(at * 1_000_000)


def _mono(frames: Iterable[Any]) -> NDArray[np.int16]:
    parts = [frame.to_ndarray().reshape(-1) for frame in frames]
    return np.concatenate(parts).astype(np.int16, copy=False) if parts else np.empty(0, np.int16)
