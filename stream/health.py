"""`/metrics`, `/healthz` and `/readyz` over HTTP (DESIGN 3.10)."""

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from stream.errors import Code, UnmaskError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

LOOPBACK = "127.0.0.1"

CLIENT_S = 10.0
"""A client that says nothing for this long is hung up on."""


def always() -> bool:
    return True


def serve(
    registry: CollectorRegistry,
    port: int,
    host: str = LOOPBACK,
    healthy: Callable[[], bool] = always,
    ready: Callable[[], bool] = always,
) -> None:
    """Serve until the process ends: 200 on /healthz and /readyz while `healthy` and `ready` say so, else 503.

    Raises `UnmaskError` (CONFIG) if the port cannot be had.
    """
    metrics, looks = make_wsgi_app(registry), {"/healthz": healthy, "/readyz": ready}

    def answer(environ: "WSGIEnvironment", start: "StartResponse") -> Iterable[bytes]:
        look = looks.get(str(environ.get("PATH_INFO")))
        if look is None:
            found: Iterable[bytes] = metrics(environ, start)
            return found
        well = look()
        start("200 OK" if well else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"ok\n" if well else b"no\n"]

    try:
        server = make_server(host, port, answer, _Server, _Handler)
    except OSError as error:
        sentence = f"the port for metrics is {port} ({error.strerror}); name a free one, or 0 for none"
        raise UnmaskError(Code.CONFIG, sentence) from error
    threading.Thread(target=server.serve_forever, name="unmask-metrics", daemon=True).start()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: probes come every few seconds."""
