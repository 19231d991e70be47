"""`unmask serve`, and the web interface within `unmask watch` (DESIGN 1): where the extra `serve` is
needed."""

import logging
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

from stream.clock import Clock, SystemClock
from stream.config import Config, Web
from stream.errors import Code, UnmaskError
from stream.log import Log
from stream.service import opened, stop_signals

if TYPE_CHECKING:
    from stream.web.server import WebServer

logger = logging.getLogger(__name__)

LOOK_S = 0.5

OFF = "off"

STOPPED, FAILED = 0, 1


def serve(config: Config) -> int:
    """Serve the web interface until told to stop (SIGTERM, SIGINT); return the exit code.

    Raises `UnmaskError` if it cannot: the port, the tokens (CONFIG), the extra `serve` (PROGRAM_MISSING).
    """
    if config.web.listen == OFF:
        raise UnmaskError(
            Code.CONFIG, "web.listen is off; an address and a port would be right, 127.0.0.1:8470"
        )
    clock, stopping = SystemClock(), threading.Event()
    with ExitStack() as stack:
        stack.enter_context(stop_signals(stopping))
        log = opened(config, clock, stopping)
        if log is None:
            return STOPPED
        stack.callback(log.close)
        server = web_server(config, log, clock)
        server.start()
        stack.callback(server.stop, config.worker.shutdown_s)
        logger.info("the web interface is at %s", server.url)
        while server.alive() and not stopping.wait(LOOK_S):
            pass
        return STOPPED if stopping.is_set() else FAILED


def web_server(config: Config, log: Log, clock: Clock) -> "WebServer":
    """Return the web interface, its port taken. Raises `UnmaskError`: CONFIG as `WebServer` does,
    PROGRAM_MISSING without the extra `serve`."""
    try:
        from stream.web.server import WebServer
    except ModuleNotFoundError as error:
        raise UnmaskError(
            Code.PROGRAM_MISSING,
            f"the web interface needs {error.name}; pip install 'unmask[serve]'",
        ) from error
    return WebServer(config, log, clock)


def beside_watch(config: Config, log: Log, clock: Clock) -> "WebServer | None":
    """Return the web interface of a `watch`, None where it is off or cannot be: watching is worth more.

    Raises `UnmaskError` (CONFIG) if somebody asked for another address than the default and it cannot be.
    """
    if config.web.listen == OFF:
        return None
    try:
        return web_server(config, log, clock)
    except UnmaskError as error:
        if config.web.listen != Web().listen:
            raise
        level = logging.INFO if error.code is Code.PROGRAM_MISSING else logging.WARNING
        logger.log(level, "no web interface: %s", error)
        return None
