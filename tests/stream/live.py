"""A live feed for tests of whole processes: a transport stream over TCP, sent at its own speed."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.stream.media import make_clip
from tests.stream.servers import tcp_server

SECONDS = 120.0
"""Longer than any test here takes: a feed that ends is attached anew."""

STEP_S = 0.04


def make_feed(folder: Path) -> Path:
    """Make the stream: small pictures, a keyframe each second."""
    return make_clip(
        folder / "feed.ts", seconds=SECONDS, fps=10, size=(64, 48), gop=10, bframes=0, audio=None
    )


class LiveFeed:
    """Serves the stream from its beginning to whoever connects. `readers`: who is connected now."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self._lock = threading.Lock()
        self.readers = 0
        self.most_readers = 0
        self.connections = 0
        self.port = 0

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def serve(self, connection: socket.socket) -> None:
        with self._lock:
            self.readers += 1
            self.connections += 1
            self.most_readers = max(self.most_readers, self.readers)
        begin = time.monotonic()
        sent = 0
        with contextlib.suppress(OSError), connection:
            while sent < len(self._data):
                upto = int(len(self._data) * min(1.0, (time.monotonic() - begin + 1.0) / SECONDS))
                connection.sendall(self._data[sent:upto])
                sent = upto
                time.sleep(STEP_S)
        with self._lock:
            self.readers -= 1


@contextlib.contextmanager
def live_feed(path: Path) -> Iterator[LiveFeed]:
    feed = LiveFeed(path)
    with tcp_server(feed.serve) as port:
        feed.port = port
        yield feed
