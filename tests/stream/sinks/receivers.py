"""Receivers on loopback that do what real ones do: take, refuse, stall, lie."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Receiver:
    """An HTTP server that answers with `status` and `headers`, and keeps what it was sent."""

    status: int = 204
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    requests: list[Request] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"


@contextmanager
def receiver(context: ssl.SSLContext | None = None, **answer: Any) -> Iterator[Receiver]:
    made = Receiver(**answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.requests.append(Request(self.path, dict(self.headers), body))
            self.send_response(made.status)
            for name, value in made.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(made.body)))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(made.body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    made.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextmanager
def raw(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that talks as it likes to each who connects; yields its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    ending = threading.Event()
    clients: list[socket.socket] = []

    def accept() -> None:
        while not ending.is_set():
            with suppress(OSError):
                client, _ = listening.accept()
                clients.append(client)
                threading.Thread(target=handle, args=(client,), daemon=True).start()

    def handle(client: socket.socket) -> None:
        with client, suppress(OSError):
            talk(client)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        ending.set()
        for each in (listening, *clients):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        listening.close()


def silent(client: socket.socket) -> None:
    """Take everything, say nothing."""
    while client.recv(65536):
        pass


def dripping(client: socket.socket) -> None:
    """A byte of the head now and then, for ever: each read is quick, the answer never ends."""
    client.recv(65536)
    client.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        client.sendall(b"x-a: b\r\n"[:1])
        time.sleep(0.02)


def interim(client: socket.socket) -> None:
    """Says for ever that it goes on."""
    client.recv(65536)
    while True:
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.01)


def long_head(client: socket.socket) -> None:
    client.recv(65536)
    client.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        client.sendall(b"x-long: " + b"a" * 60000 + b"\r\n")


def no_http(client: socket.socket) -> None:
    client.recv(65536)
    client.sendall(b"220 mail.example ESMTP\r\n")


def huge_body(client: socket.socket) -> None:
    client.recv(65536)
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
    while True:
        client.sendall(b"\0" * 65536)


def hanging_up(client: socket.socket) -> None:
    client.recv(65536)
