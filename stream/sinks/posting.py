"""One POST, bounded in everything: to an address that was checked, in a total time, whatever is answered.

The standard library's client, because its connection can be made by us: the checked address is connected to
while TLS verifies the name, redirects are not followed, no proxy is asked, and nothing of the answer but its
head is read.
"""

import http.client
import io
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

from stream.clock import Clock, Deadline
from stream.sinks.addresses import Guard

MIN_LEFT_S = 0.001
"""A socket takes no timeout of 0 for one that is over."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`retry_after_s` as the receiver asks, None if it does not."""

    status: int
    retry_after_s: float | None


def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    guard: Guard,
    context: ssl.SSLContext,
    timeout_s: float,
    clock: Clock,
) -> Answer:
    """POST `body` and return the head of the answer, all within `timeout_s`, name lookup excepted.

    Addresses of the name are tried in turn. Raises `ForbiddenError`, `OSError` (TimeoutError and
    ssl.SSLError among them) and `http.client.HTTPException`.
    """
    deadline = Deadline(timeout_s, clock)
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    with _connected(guard.addresses(host, port), port, deadline) as raw:
        raw.settimeout(_left(deadline))
        secured = context.wrap_socket(raw, server_hostname=host) if parts.scheme == "https" else raw
        try:
            connection = http.client.HTTPConnection(host, port, blocksize=io.DEFAULT_BUFFER_SIZE)
            connection.sock = cast("socket.socket", _Timed(secured, deadline))
            connection.request("POST", _target(parts), body, {"Host": _host(parts), **headers})
            return _answer(connection.getresponse(), clock)
        finally:
            secured.close()


def _target(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _host(parts: SplitResult) -> str:
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else str(parts.hostname)
    return host if parts.port is None else f"{host}:{parts.port}"


def _connected(addresses: list[str], port: int, deadline: Deadline) -> socket.socket:
    failed: OSError | None = None
    for index, address in enumerate(addresses):
        # Each its share of what is left: the first may be a black hole.
        share = _left(deadline) / (len(addresses) - index)
        try:
            return socket.create_connection((address, port), share)
        except OSError as error:
            failed = error
    raise failed or OSError("no address")


def _answer(response: http.client.HTTPResponse, clock: Clock) -> Answer:
    return Answer(response.status, _retry_after_s(response.headers.get("Retry-After"), clock))


def _retry_after_s(text: str | None, clock: Clock) -> float | None:
    """Return seconds, given as such or as a date; None for anything else."""
    if text is None:
        return None
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - clock.now_us() / 1e6)
    except (ValueError, OverflowError):
        return None


def _left(deadline: Deadline) -> float:
    left = deadline.left()
    if left <= 0:
        raise TimeoutError("timed out")
    return max(left, MIN_LEFT_S)


class _Timed:
    """A socket for `http.client` whose whole conversation shares one deadline: a receiver that drips a byte
    now and then gains no time by it."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def sendall(self, data: Any) -> None:
        self._sock.settimeout(_left(self._deadline))
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reading(self._sock, self._deadline))

    def close(self) -> None:
        self._sock.close()


class _Reading(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._deadline))
        return self._sock.recv_into(buffer)
