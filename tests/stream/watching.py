"""Watches one feed as a shard does, in the test's own thread, and keeps what it would have written."""

import contextlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import av

from stream.attach import Attachment
from stream.chunks import Chunk, read_chunk
from stream.clock import SystemClock
from stream.config import Config, Ingest, Media
from stream.controls import FeedPhase
from stream.intake import Intake, Last
from stream.records import Control
from stream.sources import Source, parse_source

QUICK = Ingest(
    silence_s=1.5,
    first_frame_s=5.0,
    tick_s=0.2,
    backoff_first_s=0.1,
    backoff_max_s=0.3,
    hls_min_lines=200,
)
"""Short times, so that a test of an outage takes seconds."""


class Watching:
    """A feed under way. `chunks` and `controls` fill as `until` runs."""

    def __init__(self, address: str, settings: Ingest = QUICK, stdin_fd: int = -1) -> None:
        self.settings = settings
        self.source: Source = parse_source(address)[0]
        config = Config(ingest=settings, media=Media(chunk_ms=200))
        self.intake = Intake(
            self.source,
            config,
            SystemClock(),
            random.Random(1),
            Last(),
            lambda given_up: Attachment(self.source, settings, given_up, stdin_fd),
        )
        self.chunks: list[Chunk] = []
        self.records: list[Chunk] = []
        self.controls: list[tuple[Control, dict[str, Any]]] = []
        self.intake.start()

    def step(self) -> None:
        self.intake.step()
        for meta, value in self.intake.take():
            self.records.append((meta, value))
            if meta.control is None:
                self.chunks.append((meta, value))
            else:
                self.controls.append((meta.control, json.loads(value)))

    def until(self, reached: Callable[[], bool], seconds: float = 15.0) -> None:
        """Go on until `reached`; fail after `seconds`."""
        begin = time.monotonic()
        while not reached():
            assert time.monotonic() - begin < seconds, f"not reached in {seconds} s: {self.intake.status()}"
            self.step()
            time.sleep(0.02)

    def until_live(self, frames: int = 10) -> None:
        """Go on until `frames` more pictures have come."""
        before = self.intake.status().frames
        self.until(lambda: self.phase is FeedPhase.LIVE and self.intake.status().frames >= before + frames)

    def until_down(self, seconds: float = 10.0) -> None:
        """Go on until the feed is found lost. How soon it must be is tested on a clock of the test's own."""
        self.until(lambda: self.phase not in (FeedPhase.LIVE, FeedPhase.SILENT), seconds)
        self.step()

    def rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, seconds + 5)

    @property
    def phase(self) -> FeedPhase:
        return self.intake.status().phase

    @property
    def code(self) -> str | None:
        return self.intake.status().code

    @property
    def attachments(self) -> list[str]:
        """Attachments in the order in which they began."""
        return list(dict.fromkeys(meta.attachment for meta, _ in self.records))

    def named(self, control: Control) -> list[dict[str, Any]]:
        return [body for name, body in self.controls if name is control]

    def packets(self, attachment: str) -> list[Any]:
        """Return the video packets of an attachment's chunks."""
        packets = []
        for meta, value in self.chunks:
            if meta.attachment == attachment:
                packets += read_chunk(meta, value).video
        return packets

    def decode(self, attachment: str, epoch: int) -> int:
        """Return how many frames the chunks of one epoch decode to."""
        mine = [
            chunk for chunk in self.chunks if (chunk[0].attachment, chunk[0].epoch) == (attachment, epoch)
        ]
        codec = mine[0][0].codec
        assert codec is not None
        context: Any = av.CodecContext.create(codec.name, "r")
        context.extradata = codec.extradata or None
        packets = [packet for meta, value in mine for packet in read_chunk(meta, value).video]
        return sum(len(context.decode(packet)) for packet in [*packets, None])

    def check_order(self) -> None:
        """Every record has the next sequence number of its attachment; attachments rise; media time too."""
        expected: dict[str, int] = {}
        for meta, _ in self.records:
            assert meta.sequence == expected.get(meta.attachment, 0)
            expected[meta.attachment] = meta.sequence + 1
            if meta.sequence == 0:
                assert meta.control is Control.START
        assert list(expected) == sorted(expected)
        starts = [meta.media_us(meta.pts) for meta, _ in self.chunks if meta.pts is not None]
        assert all(later > earlier for earlier, later in itertools.pairwise(starts))


@contextlib.contextmanager
def watching(address: str, settings: Ingest = QUICK, stdin_fd: int = -1) -> Iterator[Watching]:
    """Watch `address` for the length of the block, then stop and check what was written."""
    feed = Watching(address, settings, stdin_fd)
    try:
        yield feed
    finally:
        feed.intake.stop()
        feed.step()
        feed.intake.join(3.0)
    feed.check_order()
