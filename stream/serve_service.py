"""`unmask serve`: the web interface and the sinks, what hands on what detect found (DESIGN 3.6)."""

import logging
import random
import threading

from stream.assemble import data_folder
from stream.clock import Deadline, SystemClock
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.health import serve as serve_health
from stream.service import opened, stop_signals
from stream.serving import OFF, web_beside, web_server
from stream.sinks.service import SinkService
from stream.sinks.settings import load_sinks
from stream.spool import Home

logger = logging.getLogger(__name__)

LOOK_S = 0.2
"""Between looks at whether to stop."""

STOPPED, FAILED = 0, 1


def serve(config: Config) -> int:
    """Serve and deliver until told to stop (SIGTERM, SIGINT); return the exit code, 1 if something died.

    Raises `UnmaskError` for settings, topics, a port or tokens that cannot be used, and (PROGRAM_MISSING)
    without the extra `serve`. The caller must end the process without waiting for threads: one of them may
    hang for good.
    """
    sinks = load_sinks(config)
    if not sinks and config.web.listen == OFF:
        raise UnmaskError(
            Code.CONFIG,
            "web.listen is off and sinks.file names no sink; one of them would be something to do",
        )
    clock, stopping = SystemClock(), threading.Event()
    with stop_signals(stopping):
        log = opened(config, clock, stopping)
        if log is None:
            return STOPPED
        # A watch on this machine has an interface of its own at the same port: alerts go out all the same.
        web = (web_beside if sinks else web_server)(config, log, clock)
        service = SinkService(config, sinks, log, clock, random.Random(), member_name(config))
        if config.worker.metrics_port:
            serve_health(
                service.metrics.registry,
                config.worker.metrics_port,
                config.worker.metrics_host,
                service.healthy,
                service.ready,
            )
        service.start()
        if web is not None:
            web.start()
            logger.info("the web interface is at %s", web.url)
        logger.info("serving %d sinks: %s", len(sinks), ", ".join(sinks) or "none")
        while service.healthy() and (web is None or web.alive()) and not stopping.wait(LOOK_S):
            pass
        deadline = Deadline(config.worker.shutdown_s, clock)
        whole = web is None or web.stop(deadline.left() / 2)
        whole = service.stop(deadline) and whole
        if not whole or not stopping.is_set():
            return FAILED
        log.close()
        return STOPPED


def member_name(config: Config) -> str:
    """Return this process's name in its groups, the same when it is started again."""
    if config.kafka.member_id or not config.kafka.bootstrap_servers:
        return "serve"
    return f"serve-{Home(data_folder(config) / 'serve').member}"
