"""Where partitions begin and end, for a reader of committed records."""

from typing import Any

from kafka import errors
from kafka.admin import OffsetSpec
from kafka.consumer.fetcher import IsolationLevel

from stream.clock import Clock, Deadline
from stream.kafka_client import translated
from stream.kafka_topics import KafkaTopics
from stream.kafka_transactions import TRANSACTION_TIMEOUT_S
from stream.log import TopicPartition

SETTLE_S = TRANSACTION_TIMEOUT_S + 3.0
"""A transaction open now is over by then, aborted by the broker at the latest, which looks now and then."""

NAP_S = 0.005
"""Between looks: markers follow a commit within milliseconds."""


class KafkaOffsets:
    """Asks the cluster; any thread. Raises `UnmaskError` (LOG_AWAY, LOG_UNUSABLE)."""

    def __init__(self, admin: Any, topics: KafkaTopics, clock: Clock) -> None:
        self._admin = admin
        self._topics = topics
        self._clock = clock

    def begin(self, partition: TopicPartition) -> int:
        """Return the first offset not removed by retention."""
        return self._ask(partition, OffsetSpec.EARLIEST, IsolationLevel.READ_UNCOMMITTED)

    def end(self, partition: TopicPartition) -> int:
        """Return the offset up to which records can be read now, everything committed before the call
        included: a commit returns before its records can be read, so this waits for open transactions."""
        written = self._ask(partition, OffsetSpec.LATEST, IsolationLevel.READ_UNCOMMITTED)
        deadline = Deadline(SETTLE_S, self._clock)
        while True:
            stable = self._ask(partition, OffsetSpec.LATEST, IsolationLevel.READ_COMMITTED)
            if stable >= written or deadline.passed():
                return stable
            self._clock.sleep(NAP_S)

    def _ask(self, partition: TopicPartition, spec: Any, isolation: Any) -> int:
        place = self._topics.check(partition)
        with translated(f"offsets of {partition.topic}/{partition.partition} cannot be read"):
            try:
                found = self._admin.list_partition_offsets({place: spec}, isolation)
            except errors.UnknownBrokerIdError:
                # It learned the brokers while the leader was away, and never asks again by itself.
                manager = self._admin._manager
                manager.run(manager.cluster.refresh_metadata)
                found = self._admin.list_partition_offsets({place: spec}, isolation)
        return int(found[place].offset)
