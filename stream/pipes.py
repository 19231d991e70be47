"""Byte sources that can be left at any moment: stdin, named pipes, TCP, UDP, the pipe of a bridge.

PyAV cannot interrupt a read of a pipe or of a Python object (FIELD: "blocks; the timeout has no effect"),
so these are read here, with short waits between which the reader looks whether it has been given up.
"""

import os
import select
import socket
import stat
import struct
from collections.abc import Callable
from urllib.parse import urlsplit

from stream.errors import Code, UnmaskError
from stream.programs import SNIFF_BYTES

GivenUp = Callable[[], bool]

WAIT_MS = 200
"""How late an abandoned reader notices; short against every timeout, long against the cost of waking."""
DATAGRAM = 65_536
"""No UDP datagram is larger."""
UDP_BUFFER = 4 * 1024 * 1024
"""About six seconds at 5 Mbit/s, so that a busy moment loses nothing; the kernel may grant less."""


class ByteReader:
    """What PyAV reads from instead of a file: blocks for data, yet ends when given up.

    `sniffed` holds the first bytes until `forget`, for what PyAV does not tell (programs).
    Owns its descriptor. Used by one thread.
    """

    def __init__(self, fd: int, given_up: GivenUp, receive: Callable[[int], bytes] | None = None) -> None:
        self._fd = fd
        self._given_up = given_up
        self._receive = receive or (lambda size: os.read(fd, size))
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._left = b""
        self._sniffing = True
        self.sniffed = bytearray()

    def read(self, size: int) -> bytes:
        """Return 1 to `size` bytes; empty at the end and when given up."""
        if not self._left:
            self._left = self._wait(size)
            if self._sniffing:
                self.sniffed += self._left[: SNIFF_BYTES - len(self.sniffed)]
        data, self._left = self._left[:size], self._left[size:]
        return data

    def forget(self) -> None:
        """Keep no more of what was read."""
        self._sniffing = False
        self.sniffed.clear()

    def close(self) -> None:
        os.close(self._fd)

    def _wait(self, size: int) -> bytes:
        while not self._given_up():
            if not self._poll.poll(WAIT_MS):
                continue
            try:
                return self._receive(size)
            except (BlockingIOError, InterruptedError):
                continue
        return b""


def open_fd(fd: int, given_up: GivenUp) -> ByteReader:
    """Return a reader of an inherited descriptor (stdin); the descriptor itself stays open."""
    return ByteReader(os.dup(fd), given_up)


def open_pipe(path: str, given_up: GivenUp) -> ByteReader:
    """Return a reader of a named pipe; a writer may come later."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise UnmaskError(Code.SOURCE_INVALID, f"source {path} is no named pipe any more")
    return ByteReader(fd, given_up)


def open_tcp(address: str, listen: bool, timeout: float, given_up: GivenUp) -> ByteReader:
    """Return a reader of a TCP connection, called or (`listen`) awaited for at most `timeout` seconds."""
    host, port = _endpoint(address)
    if not listen:
        return _of_socket(socket.create_connection((host, port), timeout), given_up)
    with socket.create_server((host, port), backlog=1) as server:
        server.settimeout(WAIT_MS / 1000)
        for _ in range(max(1, round(timeout * 1000 / WAIT_MS))):
            if given_up():
                break
            try:
                return _of_socket(server.accept()[0], given_up)
            except TimeoutError:
                continue
    raise TimeoutError


def open_udp(address: str, given_up: GivenUp) -> ByteReader:
    """Return a reader of datagrams sent to `address`, joined if it is a multicast group."""
    host, port = _endpoint(address)
    family, _, _, _, place = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_DGRAM)[0]
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UDP_BUFFER)
        _join(sock, family, str(place[0]))
        sock.bind(place)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    fd = sock.detach()
    return ByteReader(fd, given_up, lambda _: os.read(fd, DATAGRAM))


def _join(sock: socket.socket, family: int, host: str) -> None:
    group = socket.inet_pton(family, host.partition("%")[0])
    if family == socket.AF_INET and 224 <= group[0] <= 239:
        # Several programs of one machine may watch the same group.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group + struct.pack("=I", 0))
    elif family == socket.AF_INET6 and group[0] == 0xFF:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + struct.pack("=I", 0))


def _of_socket(sock: socket.socket, given_up: GivenUp) -> ByteReader:
    sock.setblocking(False)
    return ByteReader(sock.detach(), given_up)


def _endpoint(address: str) -> tuple[str, int]:
    parts = urlsplit(address)
    return parts.hostname or "", parts.port or 0
