"""The web interface as a part of a process: threads that follow the log and one that serves (DESIGN 1,
3.9)."""

import logging
import secrets
import socket
import threading

import uvicorn

from stream.assemble import data_folder
from stream.clock import Clock
from stream.config import Config
from stream.copies import store_of
from stream.errors import Code, UnmaskError
from stream.evidence import EvidenceStore
from stream.log import Log
from stream.web.access import Sessions, Tokens, is_loopback, tokens_path
from stream.web.app import build_app
from stream.web.follow import Follower
from stream.web.guard import Place
from stream.web.service import Service
from stream.web.view import View

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 400
"""Open at once; beyond, 503. A page uses at most seven."""

KEEP_ALIVE_S = 15

DRAIN_S = 2
"""What answers under way get when the server stops; live events end by themselves within a second."""


class WebServer:
    """Serves from construction of the socket to `stop`; every step of which is bounded."""

    def __init__(self, config: Config, log: Log, clock: Clock) -> None:
        """Take the port. Raises `UnmaskError` (CONFIG) if it cannot be had, for a tokens file that cannot be
        used, and if it listens beyond this machine while there is no token."""
        host, port = split_listen(config.web.listen)
        tokens = Tokens(tokens_path(config), clock)
        loopback = is_loopback(host)
        place = Place(
            host,
            loopback and config.web.auth == "auto",
            config.web.public_url,
            bool(config.web.tls_cert) or config.web.public_url.startswith("https:"),
        )
        if not place.open and not tokens:
            raise UnmaskError(
                Code.CONFIG,
                f"web.listen is {config.web.listen} and nobody has a token; make one with unmask tokens add "
                "NAME --role operator, or listen on 127.0.0.1",
            )
        self._socket = _bound(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._clock = clock
        self.view = View(config, clock)
        self._follower = Follower(config, log, clock, self.view)
        self.service = Service(
            config,
            log,
            clock,
            self.view,
            EvidenceStore(data_folder(config) / "evidence", clock),
            tokens,
            Sessions(tokens, clock),
            place,
            secrets.token_urlsafe(32) if place.open else "",
            data_folder(config) / "web" / "bundle-key.pem",
            store_of(config),
        )
        self._server = uvicorn.Server(self._settings(config))
        self._thread = threading.Thread(target=self._serve, name="unmask-web", daemon=True)
        scheme = "https" if config.web.tls_cert else "http"
        self.url = config.web.public_url or f"{scheme}://{host}:{self.port}"

    def start(self) -> None:
        self._follower.start()
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Stop serving and following; return whether all of it ended within `timeout` seconds."""
        self.service.stopping.set()
        self._server.should_exit = True
        begun = self._clock.monotonic()
        if self._thread.ident is not None:
            self._thread.join(timeout / 2)
        self._server.force_exit = True
        self._socket.close()
        left = max(0.1, timeout - (self._clock.monotonic() - begun))
        followed = self._follower.stop(left)
        return followed and not self._thread.is_alive()

    def alive(self) -> bool:
        """Return whether it still serves."""
        return self._thread.is_alive()

    def _settings(self, config: Config) -> uvicorn.Config:
        return uvicorn.Config(
            build_app(self.service),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=DRAIN_S,
            ssl_certfile=config.web.tls_cert or None,
            ssl_keyfile=config.web.tls_key or None,
        )

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except Exception:
            logger.exception("the web interface ended")


def split_listen(listen: str) -> tuple[str, int]:
    """Return host and port of the setting. Raises `UnmaskError` (CONFIG) for a port that is none."""
    host, _, port = listen.rpartition(":")
    if int(port) > 65_535:
        raise UnmaskError(Code.CONFIG, f"web.listen is {listen}; its port must be at most 65535")
    return host, int(port)


def _bound(host: str, port: int) -> socket.socket:
    plain = host.strip("[]")
    family = socket.AF_INET6 if ":" in plain else socket.AF_INET
    try:
        return socket.create_server((plain, port), family=family)
    except OSError as error:
        raise UnmaskError(
            Code.CONFIG,
            f"web.listen is {host}:{port} ({error.strerror}); name a free port of this machine, or off",
        ) from error
