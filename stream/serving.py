"""The web interface of `unmask serve` and within `unmask watch` (DESIGN 1); needs the extra `serve`."""

import logging
from typing import TYPE_CHECKING

from stream.clock import Clock
from stream.config import Config, Web
from stream.errors import Code, UnmaskError
from stream.log import Log

if TYPE_CHECKING:
    from stream.web.server import WebServer

logger = logging.getLogger(__name__)

OFF = "off"


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


def web_beside(config: Config, log: Log, clock: Clock) -> "WebServer | None":
    """Return the web interface; None where it is off or cannot be: what runs beside it is worth more.

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
