"""`unmask serve`: what hands on what detect found, as a service: the sinks (DESIGN 3.6)."""

import logging
import random
import threading

from stream.assemble import data_folder
from stream.clock import Deadline, SystemClock
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.health import serve as serve_health
from stream.service import opened, stop_signals
from stream.sinks.service import SinkService
from stream.sinks.settings import load_sinks
from stream.spool import Home

logger = logging.getLogger(__name__)

LOOK_S = 0.2
"""Between looks at whether to stop."""

STOPPED, FAILED = 0, 1


def serve(config: Config) -> int:
    """Deliver alerts until told to stop (SIGTERM, SIGINT); return the exit code, 1 if something hung or died.

    Raises `UnmaskError` for settings or topics that cannot be used. The caller must end the process without
    waiting for threads: one of them may hang for good.
    """
    sinks = load_sinks(config)
    if not sinks:
        raise UnmaskError(
            Code.CONFIG, "sinks.file is empty or names no sink; see docs/sinks.md for what to put there"
        )
    clock, stopping = SystemClock(), threading.Event()
    with stop_signals(stopping):
        log = opened(config, clock, stopping)
        if log is None:
            return STOPPED
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
        logger.info("serving %d sinks: %s", len(sinks), ", ".join(sinks))
        while service.healthy() and not stopping.wait(LOOK_S):
            pass
        whole = service.stop(Deadline(config.worker.shutdown_s, clock))
        if not whole or not stopping.is_set():
            return FAILED
        log.close()
        return STOPPED


def member_name(config: Config) -> str:
    """Return this process's name in its groups, the same when it is started again."""
    if config.kafka.member_id or not config.kafka.bootstrap_servers:
        return "serve"
    return f"serve-{Home(data_folder(config) / 'serve').member}"
