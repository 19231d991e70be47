"""Feed mutated chunks to a decoder and tell what became of them. Run as a module, in a process of its own:

    python -m tests.stream.fuzz_chunks CLIP COUNT SEED

Prints one JSON object. A crash of the codec ends the process, which is for the caller to see.
"""

import json
import random
import resource
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from stream.chunks import read_chunk
from stream.decode import StreamDecoder
from stream.errors import UnmaskError
from stream.frames import Applied, Failed, SampledFrame
from stream.records import ChunkMeta, decode_headers, encode_headers
from tests.stream.decoding import START_US, Chunk, chunked, decoder, frames, run, shown, with_bytes

MEMORY_BYTES = 2 * 1024**3
"""What a decoder child may have by default."""


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return `data` damaged in one of the ways that bytes get damaged."""
    kind = rng.randrange(7)
    at = rng.randrange(len(data) + 1)
    length = min(rng.choice((1, 2, 8, 64, 512)), len(data) - at)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + length :]
    if kind == 2:
        return data[:at] + rng.randbytes(length or 1) + data[at:]
    if kind == 3:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if kind == 4:
        return data[:at] + bytes([rng.choice((0, 255))]) * length + data[at + length :]
    if kind == 5:
        return data[:at] + other[at:]
    flipped = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 10))):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def mutate_meta(meta: ChunkMeta, rng: random.Random) -> ChunkMeta:
    """Return headers that are legal one by one and wrong together."""
    assert meta.codec is not None
    huge = rng.choice((0, 1, -1, 2**31, 2**40, -(2**40)))
    return rng.choice(
        (
            replace(meta, codec=replace(meta.codec, extradata=mutate(meta.codec.extradata, b"", rng))),
            replace(
                meta, codec=replace(meta.codec, name=rng.choice(("h264", "hevc", "vp9", "mjpeg", "png")))
            ),
            replace(meta, codec=replace(meta.codec, width=abs(huge), height=abs(huge), rotation=huge)),
            replace(meta, codec=None),
            replace(meta, time_base=Fraction(rng.choice((1, 1001)), rng.choice((1, 24, 2**31)))),
            replace(meta, first_pts=huge),
            replace(meta, epoch_anchor_us=huge),
            replace(meta, content_type=rng.choice(("video/mp4", "video/mp2t", "video/x-matroska", "text/x"))),
            replace(meta, starts_on_keyframe=not meta.starts_on_keyframe),
        )
    )


def again(path: Path, attachment: int, **options: Any) -> list[Chunk]:
    """Return the clip's records as a later attachment of the stream."""
    start_us = START_US + attachment * 60_000_000
    return chunked(path, 100, attachment=f"{attachment:016x}", start_us=start_us, **options)


def damaged_pass(path: Path, attachment: int, rng: random.Random) -> list[tuple[Chunk, bool]]:
    """Return the clip's records under a new attachment, most of them damaged, and whether each is."""
    inside = rng.random() < 0.5
    touched: set[int] = set()

    def damage(index: int, packet: Any) -> Any:
        if not inside or rng.random() < 0.6:
            return packet
        touched.add(packet.pts)
        data = bytes(packet)
        return with_bytes(packet, mutate(data, data[::-1], rng) or b"\0")

    records = again(path, attachment, change=damage, end=False)
    result: list[tuple[Chunk, bool]] = []
    for position, (meta, value) in enumerate(records):
        if meta.pts is None:
            result.append(((meta, value), False))
        elif inside:
            result.append(((meta, value), any(p.pts in touched for p in read_chunk(meta, value).video)))
        elif rng.random() < 0.35:
            result.append(((meta, value), False))
        elif rng.random() < 0.2:
            result.append(((mutate_meta(meta, rng), value), True))
        else:
            other = records[rng.randrange(len(records))][1]
            # Without its hash, or the hash alone would catch everything.
            unhashed = replace(meta, content_hash="")
            result.append(((unhashed, mutate(value, other, rng)), True))
        if rng.random() < 0.03 and position:
            result.pop()
    return result


def feed(target: StreamDecoder, offset: int, chunk: Chunk, outcome: Counter[str]) -> list[SampledFrame]:
    """Feed one record; exactly one event ends it."""
    meta, value = chunk
    try:
        meta = decode_headers(meta.stream, encode_headers(meta))
    except UnmaskError:
        outcome["refused"] += 1
        return []
    events = list(target.feed(offset, meta, value))
    ends = [event for event in events if isinstance(event, Applied | Failed)]
    assert len(ends) == 1, ends
    assert events[-1] is ends[0]
    assert ends[0].offset == offset
    assert ends[0].decode_from <= offset
    outcome[type(ends[0]).__name__ if isinstance(ends[0], Applied) else ends[0].code.value] += 1
    return frames(events)


def main(path: Path, count: int, seed: int) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    rng = random.Random(seed)
    expected = frames(run(chunked(path, 100)))
    target = decoder()
    outcome: Counter[str] = Counter()
    mutated = offset = attachment = 0
    while mutated < count:
        attachment += 1
        for chunk, damaged in damaged_pass(path, attachment, rng):
            feed(target, offset, chunk, outcome)
            offset += 1
            mutated += damaged
    intact: list[SampledFrame] = []
    for chunk in again(path, attachment + 1):
        intact += feed(target, offset, chunk, outcome)
        offset += 1
    # The first of its records also flushes what the attachment before has left.
    intact = [frame for frame in intact if frame.meta.attachment == f"{attachment + 1:016x}"]
    return {
        "records": offset,
        "mutated": mutated,
        "outcome": dict(outcome),
        "counted": target.counts.records,
        "unharmed": [shown(f).picture for f in intact] == [shown(f).picture for f in expected],
        "megabytes": _peak_megabytes(),
    }


def _peak_megabytes() -> int:
    """Return this program's peak of resident memory; `ru_maxrss` would count its parent's at the fork."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) // 1024


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
