"""What services share: they wait for a log that is away when they start, and stop when told to."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from stream.assemble import open_log
from stream.clock import Clock
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.log import Log
from stream.records import Topic
from stream.topics import topic_name, topic_specs

logger = logging.getLogger(__name__)

AWAY_S = 2.0
"""Between tries to reach a cluster that was away when the process started."""


def opened(config: Config, clock: Clock, stopping: threading.Event) -> Log | None:
    """Open the log and check its topics, however long it is away; None when told to stop before it came.

    Raises `UnmaskError` as `open_log` and `check_topics` do.
    """
    told = False
    while not stopping.is_set():
        try:
            return _checked(config, open_log(config, clock))
        except UnmaskError as error:
            if error.code is not Code.LOG_AWAY:
                raise
            if not told:
                logger.warning("%s; trying again", error)
            told = True
            stopping.wait(AWAY_S)
    return None


def _checked(config: Config, log: Log) -> Log:
    try:
        check_topics(config, log)
    except BaseException:
        log.close()
        raise
    return log


@contextmanager
def stop_signals(stopping: threading.Event) -> Iterator[None]:
    """Let SIGTERM and SIGINT set `stopping`: an interrupt would break the order of the stop."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda *_: stopping.set())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_topics(config: Config, log: Log) -> None:
    """Make sure of the topics. Raises `UnmaskError` (LOG_UNUSABLE) naming what is missing or does not fit."""
    if not config.kafka.bootstrap_servers:
        log.create_topics(topic_specs(config))
        return
    found = {spec.name: _partitions(log, spec.name) for spec in topic_specs(config)}
    media, state = (topic_name(config, topic) for topic in (Topic.MEDIA, Topic.STATE))
    if found[media] != found[state]:
        raise UnmaskError(
            Code.LOG_UNUSABLE,
            f"topic {state} has {found[state]} partitions and {media} has {found[media]}; they must have as "
            f"many: delete {state} and run unmask topics create",
        )
    if found[media] != config.media.partitions:
        raise UnmaskError(
            Code.CONFIG,
            f"media.partitions is {config.media.partitions}; it must be {found[media]}, as topic {media} has",
        )


def _partitions(log: Log, topic: str) -> int:
    try:
        return log.partitions(topic)
    except UnmaskError as error:
        if error.code is not Code.LOG_UNUSABLE:
            raise
        raise UnmaskError(
            Code.LOG_UNUSABLE, f"topic {topic} is missing; unmask topics create makes it"
        ) from error
