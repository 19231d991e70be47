"""Alerts to a topic of Kafka's, in this cluster or another, as they stand on the alerts topic."""

from contextlib import suppress

from stream.alerts import CloudEvent
from stream.clock import Clock
from stream.cluster import open_cluster
from stream.config import Config
from stream.errors import UnmaskError
from stream.log import Log, Producer
from stream.records import OutRecord
from stream.sinks.delivery import DELIVERED, Outcome, Result
from stream.sinks.settings import MAX_ATTEMPT_S, KafkaTopic

CLOSE_S = 2.0
"""For what is unfinished when the sink ends: everything sent was flushed."""


class TopicTarget:
    """Connects at the first alert, so that a cluster that is away holds up nothing else."""

    def __init__(self, settings: KafkaTopic, name: str, config: Config, clock: Clock) -> None:
        self._topic = settings.topic
        cluster = settings.cluster or config.kafka
        self._config = config.model_copy(update={"kafka": cluster})
        self._name = name
        self._clock = clock
        self._log: Log | None = None
        self._producer: Producer | None = None

    def deliver(self, event: CloudEvent) -> Result:
        headers = dict(event.headers())
        key = event.attributes.get("partitionkey", "")
        record = OutRecord(self._topic, key, event.body(), headers, self._clock.now_us())
        try:
            producer = self._connected()
            producer.send(record)
            producer.flush(MAX_ATTEMPT_S)
        except UnmaskError as error:
            # Made anew next time: one that another took over from never works again.
            self.close()
            return Result(Outcome.AWAY, error.code.value, str(error))
        return DELIVERED

    def identity(self) -> str:
        return self._topic

    def close(self) -> None:
        producer, self._producer = self._producer, None
        log, self._log = self._log, None
        if producer is not None:
            with suppress(UnmaskError):
                producer.close(CLOSE_S)
        if log is not None:
            with suppress(UnmaskError):
                log.close()

    def _connected(self) -> Producer:
        if self._producer is None:
            self._log = open_cluster(self._config)
            self._producer = self._log.producer(self._name)
        return self._producer
