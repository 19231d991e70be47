"""What a producer of another make sends: a clip cut into segments at keyframes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from stream.records import Record

MUXERS = {
    "video/mp2t": "mpegts",
    "video/mp4": "mp4",
    "video/x-matroska": "matroska",
    "application/x-nut": "nut",
}
OPTIONS = {
    "mpegts": {"mpegts_copyts": "1"},
    "mp4": {"movflags": "frag_keyframe+empty_moov+default_base_moof+frag_discont", "use_editlist": "0"},
    "matroska": {},
    "nut": {},
}
START_US = 1_700_000_000_000_000


@dataclass(frozen=True, slots=True)
class Sent:
    """One segment and when its first picture was captured."""

    value: bytes
    capture_us: int


def segments(
    clip: Path, content_type: str, start_us: int = START_US, shift_s: float = 0.0, audio: bool = True
) -> list[Sent]:
    """Return the clip in segments of one group of pictures each, timestamps running on over all of them."""
    name = MUXERS[content_type]
    with av.open(str(clip)) as source:
        streams = [*source.streams.video[:1], *(source.streams.audio[:1] if audio else [])]
        packets = [packet for packet in source.demux(streams) if packet.size]
        groups = _groups(packets)
        origin = groups[0][0].pts * groups[0][0].time_base
        sent = []
        for group in groups:
            at_us = round((group[0].pts * group[0].time_base - origin) * 1_000_000)
            sent.append(Sent(_muxed(name, streams, group, shift_s), start_us + at_us))
        return sent


def _groups(packets: Sequence[Any]) -> list[list[Any]]:
    number = 0
    groups: list[list[Any]] = []
    for packet in packets:
        if packet.stream.type == "video" and packet.is_keyframe:
            number += 1
            groups.append([])
        if groups:
            groups[-1].append(packet)
    return groups


def _muxed(name: str, streams: Sequence[Any], packets: Sequence[Any], shift_s: float) -> bytes:
    file = io.BytesIO()
    options = OPTIONS[name] | {"avoid_negative_ts": "disabled"}
    with av.open(file, "w", format=name, options=options) as out:
        added = {stream.index: out.add_stream_from_template(stream, opaque=True) for stream in streams}
        for packet in packets:
            copy = av.Packet(packet)
            copy.time_base, copy.is_keyframe, copy.duration = (
                packet.time_base,
                packet.is_keyframe,
                packet.duration,
            )
            shift = round(shift_s / packet.time_base)
            copy.pts, copy.dts = packet.pts + shift, packet.dts + shift
            copy.stream = added[packet.stream_index]
            out.mux(copy)
    return file.getvalue()


def headers(sent: Sent, content_type: str, **more: bytes) -> dict[str, bytes]:
    """Return the headers that are required, and more."""
    return {"content-type": content_type.encode(), "capture_time": str(sent.capture_us).encode(), **more}


def as_records(
    sent: Sequence[Sent], content_type: str, stream: str = "cam", first_offset: int = 0
) -> list[Record]:
    """Return the segments as records of the topic `media`."""
    return [
        Record("media", 0, first_offset + n, stream, one.value, headers(one, content_type), one.capture_us)
        for n, one in enumerate(sent)
    ]


def ended(after: Sequence[Record]) -> Record:
    """Return the record with which a producer says that nothing more will come."""
    last = after[-1]
    headers = {"control": b"end", "capture_time": last.headers["capture_time"]}
    return Record(last.topic, last.partition, last.offset + 1, last.key, b"", headers, last.timestamp_us)
