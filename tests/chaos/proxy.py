"""The network between parts and brokers: TCP proxies that can be cut, as a switch or a firewall would cut."""

import contextlib
import socket
import threading
from enum import StrEnum

READ_BYTES = 64 * 1024
LOOK_S = 0.1
"""How soon a pipe notices that its zone was cut or healed."""
CONNECT_S = 1.0


class Cut(StrEnum):
    """What becomes of traffic."""

    NONE = "none"
    SILENT = "silent"
    """Nothing passes and nobody is told: a pulled cable, a firewall that drops."""
    RESET = "reset"
    """Connections break, new ones are refused at once: a part that was rebooted in between."""


class Zone:
    """Proxies of one zone; `routes` are (port to listen on, port to forward to), all on loopback."""

    def __init__(self, routes: list[tuple[int, int]]) -> None:
        self._cut = Cut.NONE
        self._stopped = threading.Event()
        self._listeners = [socket.create_server(("127.0.0.1", here)) for here, _ in routes]
        self._threads: list[threading.Thread] = []
        for listener, (_, there) in zip(self._listeners, routes, strict=True):
            self._spawn(self._accept, listener, there)
        self.carried = 0
        """Bytes passed on so far, both ways."""
        self.held = 0
        """Times that something wanted through and the zone was cut."""

    def cut(self, how: Cut) -> None:
        self._cut = how

    def heal(self) -> None:
        self._cut = Cut.NONE

    def close(self) -> None:
        self._stopped.set()
        for listener in self._listeners:
            listener.close()

    def _spawn(self, target: object, *args: object) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()  # type: ignore[arg-type]

    def _accept(self, listener: socket.socket, there: int) -> None:
        listener.settimeout(LOOK_S)
        while not self._stopped.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self._spawn(self._connect, client, there)

    def _connect(self, client: socket.socket, there: int) -> None:
        if not self._passable(client):
            client.close()
            return
        try:
            server = socket.create_connection(("127.0.0.1", there), CONNECT_S)
        except OSError:
            client.close()
            return
        for end in (client, server):
            end.settimeout(LOOK_S)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._spawn(self._pump, client, server)
        self._spawn(self._pump, server, client)

    def _pump(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not self._stopped.is_set() and self._cut is not Cut.RESET:
                try:
                    data = near.recv(READ_BYTES)
                except TimeoutError:
                    continue
                if not data or not self._passable(near):
                    break
                far.sendall(data)
                self.carried += len(data)
        for end in (near, far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _passable(self, end: socket.socket) -> bool:
        """Wait while the zone is silent; return whether traffic may pass."""
        if self._cut is not Cut.NONE:
            self.held += 1
        while self._cut is Cut.SILENT and not self._stopped.is_set():
            self._stopped.wait(LOOK_S)
        return self._cut is Cut.NONE and not self._stopped.is_set()
