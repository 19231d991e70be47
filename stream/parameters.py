"""Codec parameters of a running stream: what changed in mid-stream, what a fresh decoder needs (DESIGN 3.2).

PyAV's `stream.width`, `.height`, `.extradata` stay as they were at attach: a restarted publisher shows only
as `new_extradata` side data (FLV) or as other parameter sets inside keyframes (MPEG-TS, VP8/9, AV1).
"""

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import av

from stream.records import CodecParameters

HEAD_BYTES = 64 * 1024
"""Parameter sets precede the picture data; looking further would copy whole keyframes."""

TKHD_MATRIX = 44
"""Bytes from the name `tkhd` (version 0) to the display matrix: nine 32-bit numbers (ISO 14496-12, 8.3.2)."""

ONE = 1 << 16
"""1.0 in the matrix's 16.16 fixed point."""

_ROTATIONS = {(ONE, 0, 0, ONE): 0, (0, ONE, -ONE, 0): 90, (-ONE, 0, 0, -ONE): 180, (0, -ONE, ONE, 0): 270}


class ParameterWatch:
    """Follows the parameters of one video stream from packet to packet."""

    def __init__(self, stream: Any) -> None:
        self._codec = stream.codec_context.codec.canonical_name
        self._signature: bytes | None = None
        self._fresh = True
        self.current = stream_parameters(stream)

    def update(self, packet: Any) -> bool:
        """Take in one video packet; return whether decoding must begin anew with it."""
        fresh, self._fresh = self._fresh, False
        extradata = new_extradata(packet)
        if extradata is not None and extradata != self.current.extradata:
            self._adopt(packet, extradata)
            return not fresh
        if not packet.is_keyframe:
            return False
        found = _sets(self._codec, packet, self.current.extradata)
        if found is None:
            return False
        signature, sets = found
        first, changed = self._signature is None, signature != self._signature
        self._signature = signature
        if first:
            self._complete(packet, sets)
            return False
        if changed:
            self._adopt(packet, sets if _is_annexb(self.current.extradata) else self.current.extradata)
        return changed

    def _adopt(self, packet: Any, extradata: bytes) -> None:
        self.current = replace(self.current, extradata=extradata)
        found = _sets(self._codec, packet, extradata)
        self._signature = found[0] if found else None
        self._probe(packet)

    def _complete(self, packet: Any, sets: bytes) -> None:
        """Fill in what the container did not know at attach."""
        if not self.current.extradata:
            self.current = replace(self.current, extradata=sets)
        if not self.current.width:
            self._probe(packet)

    def _probe(self, packet: Any) -> None:
        width, height = _decoded_size(self.current, packet)
        if width:
            self.current = replace(self.current, width=width, height=height)


def stream_parameters(stream: Any) -> CodecParameters:
    """Return what the demuxer knows of a video stream."""
    context = stream.codec_context
    return CodecParameters(
        name=context.name,
        width=context.width,
        height=context.height,
        extradata=context.extradata or b"",
        rotation=read_rotation(stream),
    )


def read_rotation(stream: Any) -> int:
    """Return the clockwise degrees that turn the stream's pictures upright: 0, 90, 180 or 270.

    PyAV shows a stream's display matrix only on decoded frames; an MP4 header written from the stream
    carries it too, and nothing is decoded.
    """
    header = io.BytesIO()
    try:
        with av.open(header, "w", format="mp4", options={"movflags": "empty_moov"}) as out:
            out.add_stream_from_template(stream, opaque=True)
            out.start_encoding()
    except (av.FFmpegError, ValueError):
        return 0
    data = header.getvalue()
    start = data.find(b"tkhd") + TKHD_MATRIX
    cells = [
        int.from_bytes(data[start + 4 * n : start + 4 * n + 4], "big", signed=True) for n in (0, 1, 3, 4)
    ]
    return _ROTATIONS.get((cells[0], cells[1], cells[2], cells[3]), 0)


def write_rotation(data: bytearray, rotation: int) -> None:
    """Set the display matrix of the first track of the MP4 `data` in place."""
    start = data.find(b"tkhd") + TKHD_MATRIX
    cells = next(matrix for matrix, degrees in _ROTATIONS.items() if degrees == rotation)
    for position, cell in zip((0, 1, 3, 4), cells, strict=True):
        data[start + 4 * position : start + 4 * position + 4] = cell.to_bytes(4, "big", signed=True)


def new_extradata(packet: Any) -> bytes | None:
    """Return the extradata that this packet brings with it, None if it brings none."""
    if not packet.has_sidedata("new_extradata"):
        return None
    return bytes(packet.get_sidedata("new_extradata"))


def _decoded_size(codec: CodecParameters, packet: Any) -> tuple[int, int]:
    """Return width and height of the keyframe as decoded, (0, 0) if it cannot be.

    One picture per change of parameters is the only thing ingest ever decodes: `find_stream_info` does
    the same at attach.
    """
    try:
        context: Any = av.CodecContext.create(codec.name, "r")
        context.extradata = codec.extradata or None
        context.thread_count = 1
        frames = context.decode(av.Packet(packet)) + context.decode(None)
    except (av.FFmpegError, ValueError):
        return 0, 0
    return (frames[0].width, frames[0].height) if frames else (0, 0)


def _sets(codec: str, packet: Any, extradata: bytes) -> tuple[bytes, bytes] | None:
    """Return what identifies the sequence a keyframe begins, and its parameter sets (Annex B) if any."""
    head = bytes(memoryview(packet)[:HEAD_BYTES])
    if codec in ("h264", "hevc"):
        return _nal_sets(codec, head, extradata)
    signature = _SIGNATURES.get(codec, _no_signature)(head)
    return None if signature is None else (signature, b"")


def _nal_sets(codec: str, head: bytes, extradata: bytes) -> tuple[bytes, bytes] | None:
    units = _annexb(head) if _is_annexb(extradata) else _prefixed(head, _length_size(codec, extradata))
    sequence, sets = [], []
    for unit in units:
        kind = unit[0] & 31 if codec == "h264" else unit[0] >> 1 & 63
        picture = 1 <= kind <= 5 if codec == "h264" else kind < 32
        if picture:
            break
        if kind == (7 if codec == "h264" else 33):
            sequence.append(unit)
        if kind in ((7, 8) if codec == "h264" else (32, 33, 34)):
            sets.append(b"\0\0\0\1" + unit)
    return (b"".join(sequence), b"".join(sets)) if sequence else None


def _is_annexb(extradata: bytes) -> bool:
    return not extradata or extradata.startswith((b"\0\0\1", b"\0\0\0\1"))


def _length_size(codec: str, extradata: bytes) -> int:
    """Return how many bytes the length before each NAL unit has (avcC byte 4, hvcC byte 21)."""
    at = 4 if codec == "h264" else 21
    return (extradata[at] & 3) + 1 if len(extradata) > at else 4


def _annexb(data: bytes) -> Iterator[bytes]:
    start = data.find(b"\0\0\1")
    while start >= 0:
        end = data.find(b"\0\0\1", start + 3)
        unit = data[start + 3 : end if end >= 0 else len(data)].rstrip(b"\0")
        if unit:
            yield unit
        start = end


def _prefixed(data: bytes, size: int) -> Iterator[bytes]:
    at = 0
    while at + size < len(data):
        length = int.from_bytes(data[at : at + size], "big")
        unit = data[at + size : at + size + length]
        if not unit:
            return
        yield unit
        at += size + length


def _no_signature(_: bytes) -> bytes | None:
    return None


def _mpeg2_size(head: bytes) -> bytes | None:
    """Return the 12 + 12 bits of width and height of the sequence header."""
    at = head.find(b"\0\0\1\xb3")
    return head[at + 4 : at + 7] if at >= 0 else None


def _vp8_size(head: bytes) -> bytes | None:
    """Return width and height after a keyframe's start code (RFC 6386, 9.1)."""
    return head[6:10] if head[3:6] == b"\x9d\x01\x2a" else None


def _vp9_size(head: bytes) -> bytes | None:
    """Return profile, width and height of a keyframe (VP9 bitstream specification, 6.2)."""
    bits = _Bits(head[:32])
    marker, low, high = bits.take(2), bits.take(1), bits.take(1)
    profile = high << 1 | low
    bits.take(1 if profile == 3 else 0)
    shown, inter, _ = bits.take(1), bits.take(1), bits.take(2)
    if marker != 2 or shown or inter or bits.take(24) != 0x498342:
        return None
    bits.take(1 if profile >= 2 else 0)
    srgb = bits.take(3) == 7
    subsampled = profile in (1, 3)
    bits.take((1 if subsampled else 0) if srgb else (4 if subsampled else 1))
    return bytes([profile]) + bits.take(32).to_bytes(4, "big")


def _av1_sequence(head: bytes) -> bytes | None:
    """Return the sequence header OBU (AV1 specification, 5.3)."""
    at = 0
    while at < len(head):
        header = head[at]
        at += 2 if header & 4 else 1
        if not header & 2:
            return None
        size, at = _leb128(head, at)
        if header >> 3 & 15 == 1:
            return head[at : at + size]
        at += size
    return None


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place in range(8):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << 7 * place
        if byte < 128:
            break
    return value, at


class _Bits:
    """Reads big-endian bit fields; past the end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            return 0
        return self._value >> self._left & ((1 << count) - 1)


_SIGNATURES = {
    "mpeg2video": _mpeg2_size,
    "mpeg1video": _mpeg2_size,
    "vp8": _vp8_size,
    "vp9": _vp9_size,
    "av1": _av1_sequence,
}
