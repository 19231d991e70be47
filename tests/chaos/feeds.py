"""Live feeds for the chaos runs: H.264 in MPEG-TS over loopback TCP, in step with the wall clock, for ever.

    python -m tests.chaos.feeds DIRECTORY FIRST_PORT COUNT ORIGIN

Feed K listens on FIRST_PORT + K. Whoever connects gets the feed from its newest keyframe on: timestamps
follow from the wall clock and ORIGIN (Unix time, seconds) alone, so one who comes again joins in at the
present.
The pictures are encoded once, before this process starts (`write_clips`).
"""

import contextlib
import socket
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from tests.chaos.pictures import FPS, HEIGHT, PLAN, WIDTH, draw

TICKS = 90_000
FRAME_TICKS = TICKS // FPS
GOP = FPS
REORDER = 2
"""Frames by which pts run ahead of dts in `write_clip`'s encoding."""
SLOW_S = 20.0
"""Who takes nothing for so long is let go, as servers do."""


def write_clip(path: Path, feed: int, rounds: int = 1) -> Path:
    """Write `rounds` rounds of the plan as feed number `feed`; the suffix chooses the container."""
    with av.open(str(path), "w") as out:
        params = f"keyint={GOP}:min-keyint={GOP}:scenecut=0:bframes=2:b-adapt=0:threads=1"
        stream: Any = out.add_stream(
            "libx264", rate=FPS, options={"preset": "ultrafast", "crf": "26", "x264-params": params}
        )
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        for number in range(PLAN.loop * rounds):
            picture = draw(number % PLAN.loop, feed, PLAN.face(number))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def clip_of(directory: Path, feed: int) -> Path:
    return directory / f"feed-{feed}.ts"


def write_clips(directory: Path, count: int) -> None:
    """Encode what `count` feeds send."""
    directory.mkdir(parents=True, exist_ok=True)
    for feed in range(count):
        write_clip(clip_of(directory, feed), feed)


def number_of(pts: int) -> int:
    """Return which picture of the round has this pts (1/90000 s) in a live feed."""
    return (pts // FRAME_TICKS - REORDER) % PLAN.loop


def shown_at(pts: int, origin: float) -> float:
    """Return when (Unix time) a live feed showed the picture of this pts."""
    return origin + pts / TICKS


@dataclass(frozen=True, slots=True)
class _Coded:
    """One packet of the round, in decoding order; `shown` is its picture's number."""

    data: bytes
    shown: int
    keyframe: bool


class Feed:
    """The packets of one feed, and its listening socket."""

    def __init__(self, clip: Path, port: int, origin: float) -> None:
        self._clip = clip
        self._origin = origin
        self._packets = _packets(clip)
        self._starts = [place for place, packet in enumerate(self._packets) if packet.keyframe]
        self._socket = socket.create_server(("127.0.0.1", port))

    def serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            connection.settimeout(SLOW_S)
            threading.Thread(target=self._send, args=(connection,), daemon=True).start()

    def _send(self, connection: socket.socket) -> None:
        # Whoever leaves, or is let go, is no news to a feed.
        with connection, contextlib.suppress(OSError, av.error.FFmpegError):
            self._mux(_Sink(connection))

    def _mux(self, sink: "_Sink") -> None:
        options = {"mpegts_copyts": "1", "flush_packets": "1"}
        with (
            av.open(str(self._clip)) as template,
            av.open(sink, "w", format="mpegts", options=options) as out,
        ):
            stream = out.add_stream_from_template(template.streams.video[0])
            for place, coded in self._from_now():
                left = self._origin + place / FPS - time.time()
                if left > 0:
                    time.sleep(left)
                packet = av.Packet(coded.data)
                packet.time_base = Fraction(1, TICKS)
                packet.dts = place * FRAME_TICKS
                packet.pts = (place // PLAN.loop * PLAN.loop + coded.shown + REORDER) * FRAME_TICKS
                packet.is_keyframe = coded.keyframe
                packet.stream = stream
                out.mux(packet)

    def _from_now(self) -> Iterator[tuple[int, _Coded]]:
        """Yield packets with their place in the feed, from the newest keyframe on."""
        now = max(0, int((time.time() - self._origin) * FPS))
        rounds, within = divmod(now, PLAN.loop)
        place = rounds * PLAN.loop + self._starts[bisect_right(self._starts, within) - 1]
        while True:
            yield place, self._packets[place % PLAN.loop]
            place += 1


class _Sink:
    """What PyAV writes to."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def write(self, data: bytes) -> int:
        self._connection.sendall(data)
        return len(data)


def _packets(clip: Path) -> list[_Coded]:
    with av.open(str(clip)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    first = min(packet.pts for packet in packets)
    step = Fraction(1, FPS) / packets[0].time_base
    return [_Coded(bytes(packet), int((packet.pts - first) / step), packet.is_keyframe) for packet in packets]


def main() -> None:
    directory, first_port, count, origin = sys.argv[1:]
    feeds = [
        Feed(clip_of(Path(directory), number), int(first_port) + number, float(origin))
        for number in range(int(count))
    ]
    for feed in feeds:
        threading.Thread(target=feed.serve, daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
