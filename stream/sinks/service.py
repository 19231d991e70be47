"""All sinks of a process: a thread each, watched by one that none of them can hold up."""

import logging
import random
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress

from stream.clock import Clock, Deadline
from stream.config import Config
from stream.decisions import Mute, mutes
from stream.errors import UnmaskError
from stream.listed import Listed
from stream.log import Log, TopicPartition, partitions_of
from stream.records import Topic
from stream.sinks.command import CommandTarget
from stream.sinks.delivery import Target
from stream.sinks.lines import FileTarget, StdoutTarget
from stream.sinks.loop import SinkLoop
from stream.sinks.metrics import SinkMetrics
from stream.sinks.settings import Command, File, KafkaTopic, Sink, Stdout, Webhook
from stream.topics import topic_name

logger = logging.getLogger(__name__)

LOOK_S = 5.0
"""Between looks at how far each sink is behind."""

MUTES_S = 2.0
"""How long a mute may go unnoticed: what people decided is read anew this often, and only for an alert."""

HANGS_S = 90.0
"""A sink whose loop does not turn for this long hangs: an attempt takes 30 s at most, joining a group 40."""


class SinkService:
    """Runs the sinks of the configuration. `start`, then `stop`; the counts are in `metrics`.

    Raises `UnmaskError` (CONFIG, PROGRAM_MISSING) for a sink that cannot be made: none is started then.
    """

    def __init__(
        self,
        config: Config,
        sinks: Mapping[str, Sink],
        log: Log,
        clock: Clock,
        rng: random.Random,
        member: str = "serve",
    ) -> None:
        self._config = config
        self._log = log
        self._clock = clock
        self._stopping = threading.Event()
        self._deadline = Deadline(config.worker.shutdown_s, clock)
        self.metrics = SinkMetrics()
        self._hanging: set[str] = set()
        self._loops = [
            SinkLoop(
                name,
                settings,
                target_of(name, settings, config, clock, member),
                log,
                config,
                _Labels(config, log, clock),
                Muted(config, log, clock),
                clock,
                rng,
                self.metrics,
                member,
            )
            for name, settings in sinks.items()
        ]
        self._threads = [
            threading.Thread(
                target=loop.run,
                args=(self._stopping, lambda: self._deadline.left() / 2),
                name=f"sink {loop.name}",
                daemon=True,
            )
            for loop in self._loops
        ]
        self._watcher = threading.Thread(target=self._watch, name="sinks", daemon=True)

    def start(self) -> None:
        for thread in [*self._threads, self._watcher]:
            thread.start()

    def stop(self, deadline: Deadline) -> bool:
        """Let each sink finish its attempt, commit and leave; return whether all did before `deadline`.

        What hangs is left behind: the caller ends the process without waiting for threads. Nothing is lost by
        it, what was not committed is sent again.
        """
        self._deadline = deadline
        self._stopping.set()
        for thread in [*self._threads, self._watcher]:
            thread.join(deadline.left())
        left = [thread.name for thread in self._threads if thread.is_alive()]
        if left:
            logger.error("%s did not end in time, left behind", ", ".join(left))
        return not left

    def healthy(self) -> bool:
        """Whether every sink's thread lives. One that hangs is told by metrics, not by a restart of all."""
        return all(thread.is_alive() for thread in self._threads) or self._stopping.is_set()

    def ready(self) -> bool:
        """Whether every sink can read the log; receivers that are away make nobody unready."""
        return self.healthy() and all(loop.works for loop in self._loops)

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_S):
            self.look()

    def look(self) -> None:
        """Measure how far each sink is behind and tell of one that hangs."""
        for loop in self._loops:
            with suppress(UnmaskError):
                behind = lag(self._config, self._log, loop.group)
                self.metrics.lag.labels(loop.name).set(behind)
            hangs = self._clock.monotonic() - loop.turned_at > HANGS_S
            if hangs and loop.name not in self._hanging:
                logger.error("sink %s has done nothing for %g s: it hangs", loop.name, HANGS_S)
                self.metrics.up.labels(loop.name).set(0)
            (self._hanging.add if hangs else self._hanging.discard)(loop.name)


def lag(config: Config, log: Log, group: str) -> int:
    """Return how many alerts a group has not looked at; of a group that never was here, none.

    Over Kafka it counts offsets, of which ends of transactions take some too. Raises as the log does.
    """
    behind = 0
    for where in partitions_of(log, topic_name(config, Topic.ALERTS)):
        position = log.group_position(group, TopicPartition(where.topic, where.partition))
        if position is not None:
            behind += max(0, log.end_offset(where) - max(position, log.begin_offset(where)))
    return behind


def target_of(name: str, settings: Sink, config: Config, clock: Clock, member: str) -> Target:
    """Return where a sink sends to. Raises `UnmaskError` naming the sink if it cannot be had."""
    try:
        return _target(name, settings, config, clock, member)
    except UnmaskError as error:
        raise UnmaskError(error.code, f"sink {name}: {error}") from None


def _target(name: str, settings: Sink, config: Config, clock: Clock, member: str) -> Target:
    match settings:
        case Webhook():
            from stream.sinks.webhook import WebhookTarget

            return WebhookTarget(settings, clock)
        case File():
            return FileTarget(settings)
        case Stdout():
            return StdoutTarget(sys.stdout.buffer)
        case Command():
            return CommandTarget(settings, clock)
        case KafkaTopic():
            from stream.sinks.topic import TopicTarget

            # A producer of the same name would end this one.
            slot = ".".join(filter(None, [config.prefix, "sink", name, config.kafka.member_id, member]))
            return TopicTarget(settings, slot, config, clock)


class Muted:
    """Whether a stream is muted now; each sink's own, as labels are."""

    def __init__(self, config: Config, log: Log, clock: Clock) -> None:
        self._config = config
        self._log = log
        self._clock = clock
        self._mutes: Mapping[str, Mute] = {}
        self._read_at = -MUTES_S

    def __call__(self, stream: str) -> bool:
        now = self._clock.monotonic()
        if now - self._read_at >= MUTES_S:
            self._mutes, self._read_at = mutes(self._config, self._log), now
        mute = self._mutes.get(stream)
        return mute is not None and mute.holds(self._clock.now_us())


class _Labels:
    """Labels of listed streams, each sink's own: it may be asked by that thread alone."""

    def __init__(self, config: Config, log: Log, clock: Clock) -> None:
        self._listed = Listed(log, topic_name(config, Topic.SOURCES), clock)

    def __call__(self, stream: str) -> Mapping[str, str]:
        self._listed.read()
        return self._listed.labels(stream)
