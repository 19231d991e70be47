"""Decoder children that misbehave at a marked record. Named by the tests, run in the children."""

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from stream import decode, decoder_child
from stream.chunks import ChunkPackets, read_chunk
from stream.decode import StreamDecoder
from stream.decoder_child import ChildSettings
from stream.foreign import Segment
from stream.frames import DecoderEvent
from stream.records import ChunkMeta

KILL, HANG, KILL_ONCE, KILL_LATE = b"poison: kill", b"poison: hang", b"poison: once ", b"poison: late "
"""Appended to a chunk's value. After `once` comes the path of a file whose absence means not yet; after
`late`, likewise, and the child dies when the frames of the record are out."""


class PoisonedDecoder(StreamDecoder):
    """Takes the poison off a chunk, and its effect."""

    def feed(self, offset: int, record: ChunkMeta | Segment, value: bytes) -> Iterator[DecoderEvent]:
        value, late = _swallow(value)
        for event in super().feed(offset, record, value):
            if late and not hasattr(event, "image"):
                os.kill(os.getpid(), signal.SIGKILL)
            yield event


def _swallow(value: bytes) -> tuple[bytes, bool]:
    if value.endswith(KILL):
        os.kill(os.getpid(), signal.SIGKILL)
    if value.endswith(HANG):
        time.sleep(3600)
    for kind in (KILL_ONCE, KILL_LATE):
        head, found, name = value.rpartition(kind)
        if not found:
            continue
        if Path(name.decode()).exists():
            return head, False
        Path(name.decode()).touch()
        if kind == KILL_ONCE:
            os.kill(os.getpid(), signal.SIGKILL)
        return head, True
    return value, False


def main(connection: Connection, side: Connection, settings: ChildSettings) -> None:
    """`stream.decoder_child.main` with a decoder that can be poisoned."""
    decoder_child.StreamDecoder = PoisonedDecoder  # type: ignore[misc]
    decoder_child.main(connection, side, settings)


def swelling_main(connection: Connection, side: Connection, settings: ChildSettings) -> None:
    """A child that asks for more memory than it may have at every chunk."""

    def swell(meta: ChunkMeta, value: bytes) -> ChunkPackets:
        return read_chunk(meta, value + bytes(2 * settings.memory_limit_bytes))

    decode.read_chunk = swell
    decoder_child.main(connection, side, settings)
