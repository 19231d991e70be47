"""`unmask detect`: one worker of the group that watches the partitions of `media` (DESIGN 3.9).

The main thread watches the worker. A worker that hangs is given up and the process ends with exit code 1, for
a supervisor to start it again: healthy heartbeats around a dead stage are the silent failure.
"""

import logging
import threading

from stream.aggregate import StreamAggregate
from stream.alerts import Publisher
from stream.assemble import Assembly, build_reader, data_folder
from stream.bursts import follower_of
from stream.clock import Clock, Deadline, SystemClock
from stream.config import Config
from stream.copies import copying
from stream.errors import Code, UnmaskError
from stream.evidence import EvidenceStore
from stream.health import serve
from stream.log import Log
from stream.metrics import Metrics
from stream.service import opened, stop_signals
from stream.spool import Home
from stream.worker import Worker

logger = logging.getLogger(__name__)

LOOK_S = 0.1
"""Between looks at the worker."""

LEAVE_S = 2.0
"""What a worker gets to end beyond its deadline, which bounds each of its steps and not their sum."""

STOPPED, FAILED = 0, 1


def detect(config: Config) -> int:
    """Work until told to stop (SIGTERM, SIGINT); return the exit code, 1 if a supervisor is to restart it.

    Raises `UnmaskError` for settings, weights or topics that cannot be used. The caller must end the process
    without waiting for threads: one of them may hang for good.
    """
    clock, stopping = SystemClock(), threading.Event()
    with stop_signals(stopping):
        assembly = build_reader(config)
        log = opened(config, clock, stopping)
        if log is None:
            return STOPPED
        return _Service(config, assembly, log, clock, stopping).run()


class _Service:
    def __init__(
        self, config: Config, assembly: Assembly, log: Log, clock: Clock, stopping: threading.Event
    ) -> None:
        self._config = config
        self._clock = clock
        self._stopping = stopping
        evidence = EvidenceStore(data_folder(config) / "evidence", clock)
        metrics = Metrics(assembly.usage, assembly.refusals)
        self._copier = copying(config, evidence, clock, metrics)

        def make_aggregate(stream: str) -> StreamAggregate:
            return StreamAggregate(stream, config, assembly.calibration, assembly.provenance, evidence)

        self._worker = Worker(
            config,
            log,
            assembly.reader,
            make_aggregate,
            Publisher(config, assembly.provenance, clock),
            evidence,
            clock,
            metrics,
            member_name(config),
            alone=not config.kafka.bootstrap_servers,
            heavy=assembly.heavy,
            follower=follower_of(config),
        )
        if config.worker.metrics_port:
            serve(
                metrics.registry,
                config.worker.metrics_port,
                config.worker.metrics_host,
                self._worker.healthy,
                self._worker.ready,
            )
        self._thread = threading.Thread(target=self._work, name="unmask-detect", daemon=True)

    def run(self) -> int:
        self._thread.start()
        while not self._stopping.is_set() and self._thread.is_alive() and self._worker.healthy():
            self._stopping.wait(LOOK_S)
        if self._stopping.is_set():
            self._worker.drain(Deadline(self._config.worker.shutdown_s, self._clock))
        elif self._worker.error is None and self._thread.is_alive():
            sentence = f"a stage has done nothing for {self._config.worker.stall_s:g} s"
            self._worker.fail(UnmaskError(Code.STAGE_WEDGED, sentence))
        self._thread.join(self._config.worker.shutdown_s + LEAVE_S)
        if self._copier is not None:
            self._copier.stop()
        if self._thread.is_alive():
            logger.error("the worker hangs, leaving it behind")
            return FAILED
        return STOPPED if self._worker.error is None else FAILED

    def _work(self) -> None:
        try:
            self._worker.run()
        except UnmaskError as error:
            logger.debug("worker ended: %s", error)
        except BaseException:
            logger.exception("worker ended")


def member_name(config: Config) -> str:
    """Return this process's name in the group, the same when it is started again: what its predecessor left
    unfinished in the log then ends at once. Its slot is `kafka.member_id`, else a folder that it locks."""
    if config.kafka.member_id or not config.kafka.bootstrap_servers:
        return "detect"
    return f"detect-{Home(data_folder(config) / 'detect').member}"
