"""Topics of the cluster: made as specified, compared with what is there, and which partition a key has."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import kafka
from kafka import errors
from kafka.admin import ConfigResource, ConfigResourceType

from stream.config import Kafka
from stream.errors import Code, UnmaskError
from stream.kafka_client import said, translated
from stream.log import Cleanup, TopicPartition, TopicSpec
from stream.records import OutRecord

N = TypeVar("N", int, float)

ENVELOPE_BYTES = 64 * 1024
"""What a topic allows beyond the largest value: key, headers with codec parameters, Kafka's own framing."""

RECORD_BYTES = 100
"""Python objects and framing per record: without it records of no bytes would have no bound."""

SEGMENT_SHARE = 8
"""Retention removes whole segments: with eight in the bound it overshoots by an eighth, not by the default
of a gigabyte each."""
SEGMENT_BYTES_MIN = 16 * 1024 * 1024
"""Holds the largest record, and a segment is two files: far smaller ones would be many."""
SEGMENT_BYTES_MAX = 1024**3
SEGMENT_S_MIN, SEGMENT_S_MAX = 60.0, 7 * 86400.0

COMPACT_SEGMENT_S = 60.0
"""Only closed segments are compacted, and a restart reads the rest whole: a feed's state is some 15 kB, twice
a second, so that a dozen feeds in a partition are 20 MB in this time."""
COMPACT_DIRTY_SHARE = 0.3
"""Of what is to be compacted, before it is; Kafka's half would let the topic double first."""

UNKNOWN = errors.UnknownTopicOrPartitionError.errno


@dataclass(frozen=True, slots=True)
class Placed:
    """A record with its partition chosen."""

    record: OutRecord
    partition: int

    @property
    def size(self) -> int:
        """Bytes that it takes in flight."""
        headers = sum(len(name) + len(value) for name, value in self.record.headers.items())
        return RECORD_BYTES + len(self.record.value or b"") + headers


@dataclass(frozen=True, slots=True)
class Difference:
    """One point in which a topic is not as specified. `fixed`: only a new topic can cure it."""

    sentence: str
    fixed: bool = False


class KafkaTopics:
    """Topics as the cluster has them; partition counts never change and are remembered. Any thread."""

    def __init__(self, admin: Any, settings: Kafka, max_message_bytes: int) -> None:
        self._admin = admin
        self._settings = settings
        self.max_message_bytes = max_message_bytes + ENVELOPE_BYTES
        self._partitions: dict[str, int] = {}

    def create(self, specs: Sequence[TopicSpec]) -> None:
        """Make what is missing, bring settings to the spec; raises `UnmaskError` naming what cannot be."""
        for spec in specs:
            if self._describe(spec.name) is None:
                self._create(spec)
                continue
            fixed = [difference.sentence for difference in self.differences(spec) if difference.fixed]
            if fixed:
                raise UnmaskError(Code.LOG_UNUSABLE, "; ".join(fixed))
            self._alter(spec)

    def differences(self, spec: TopicSpec) -> list[Difference]:
        """Return in what the topic differs from `spec`; nothing if it is as it must be."""
        found = self._describe(spec.name)
        if found is None:
            return [Difference(f"topic {spec.name} is missing; unmask topics create makes it")]
        config = self._config(spec.name)
        return [*self._shape(spec, found, config), *self._settings_off(spec, config)]

    def count(self, topic: str) -> int:
        """Return the number of partitions; raises `UnmaskError` (LOG_UNUSABLE) if there is no such topic."""
        if topic not in self._partitions:
            found = self._describe(topic)
            if found is None:
                raise UnmaskError(
                    Code.LOG_UNUSABLE, f"the cluster has no topic {topic}: unmask topics create makes it"
                )
            self._partitions[topic] = len(found["partitions"])
        return self._partitions[topic]

    def place(self, record: OutRecord) -> Placed:
        """Choose the partition by the key's CRC-32, as the embedded log does, unless the record names one."""
        count = self.count(record.topic)
        number = record.partition
        if number is None:
            number = zlib.crc32(record.key.encode()) % count
        self.check(TopicPartition(record.topic, number))
        return Placed(record, number)

    def check(self, partition: TopicPartition) -> kafka.TopicPartition:
        """Return the partition as kafka-python's; raises `UnmaskError` if there is none."""
        count = self.count(partition.topic)
        if not 0 <= partition.partition < count:
            raise UnmaskError(
                Code.LOG_UNUSABLE,
                f"topic {partition.topic} has no partition {partition.partition}: it has {count}",
            )
        return kafka.TopicPartition(partition.topic, partition.partition)

    def _describe(self, topic: str) -> dict[str, Any] | None:
        with translated(f"topic {topic} cannot be looked up"):
            found: dict[str, Any] = self._admin.describe_topics([topic])[0]
        if found["error_code"] == UNKNOWN:
            return None
        if found["error_code"]:
            raise UnmaskError(
                Code.LOG_UNUSABLE,
                f"topic {topic} cannot be looked up: {said(errors.for_code(found['error_code'])())}",
            )
        return found

    def _config(self, topic: str) -> dict[str, str]:
        resource = ConfigResource(ConfigResourceType.TOPIC, topic)
        with translated(f"settings of topic {topic} cannot be read"):
            found = self._admin.describe_configs([resource], config_filter="all")
        return {name: entry["value"] for name, entry in found["topic"][topic].items()}

    def _create(self, spec: TopicSpec) -> None:
        wanted = {
            "num_partitions": spec.partitions,
            "replication_factor": self._settings.replication,
            "configs": self._wanted(spec),
        }
        with translated(f"topic {spec.name} cannot be made"):
            try:
                self._admin.create_topics({spec.name: wanted})
            except errors.TopicAlreadyExistsError:
                return  # made by another process at the same moment
            except errors.InvalidReplicationFactorError as error:
                raise UnmaskError(
                    Code.LOG_UNUSABLE,
                    f"topic {spec.name} cannot have kafka.replication {self._settings.replication}: the "
                    "cluster has too few brokers; set kafka.replication to at most their number",
                ) from error
            self._admin.wait_for_topics([spec.name])

    def _alter(self, spec: TopicSpec) -> None:
        config = self._config(spec.name)
        off = {name: value for name, value in self._wanted(spec).items() if config.get(name) != value}
        if not off:
            return
        with translated(f"settings of topic {spec.name} cannot be changed"):
            self._admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, spec.name, off)])

    def _shape(self, spec: TopicSpec, found: dict[str, Any], config: dict[str, str]) -> Iterator[Difference]:
        partitions = found["partitions"]
        if len(partitions) != spec.partitions:
            yield Difference(
                f"topic {spec.name} has {len(partitions)} partitions, not {spec.partitions}; their number is "
                "fixed once the topic exists",
                fixed=True,
            )
        if config["cleanup.policy"] != spec.cleanup:
            yield Difference(
                f"topic {spec.name} has cleanup {config['cleanup.policy']}, not {spec.cleanup}", fixed=True
            )
        copies = min(len(partition["replica_nodes"]) for partition in partitions)
        if copies != self._settings.replication:
            yield Difference(
                f"topic {spec.name} has {copies} copies of a partition, not kafka.replication "
                f"{self._settings.replication}; kafka-reassign-partitions changes that"
            )

    def _settings_off(self, spec: TopicSpec, config: dict[str, str]) -> Iterator[Difference]:
        for name, value in self._wanted(spec).items():
            if name != "cleanup.policy" and config.get(name) != value:
                yield Difference(f"topic {spec.name} has {name} {config.get(name)}, not {value}")

    def _wanted(self, spec: TopicSpec) -> dict[str, str]:
        """Return the settings of the topic, in Kafka's words."""
        share = None if spec.retention_bytes is None else max(1, spec.retention_bytes // spec.partitions)
        wanted: dict[str, object] = {
            "cleanup.policy": spec.cleanup.value,
            "max.message.bytes": self.max_message_bytes,
            "min.insync.replicas": max(1, self._settings.replication - 1),
            "retention.ms": -1 if spec.retention_s is None else round(spec.retention_s * 1000),
            "retention.bytes": -1 if share is None else share,
        }
        if share is not None:
            wanted["segment.bytes"] = _clamp(share // SEGMENT_SHARE, SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX)
        if spec.cleanup is Cleanup.COMPACT:
            wanted["segment.ms"] = round(COMPACT_SEGMENT_S * 1000)
            wanted["min.cleanable.dirty.ratio"] = COMPACT_DIRTY_SHARE
        elif spec.retention_s is not None:
            # Counted from arrival, as in the embedded log: a writer with a wrong clock loses nothing by it.
            wanted["message.timestamp.type"] = "LogAppendTime"
            seconds = _clamp(spec.retention_s / SEGMENT_SHARE, SEGMENT_S_MIN, SEGMENT_S_MAX)
            wanted["segment.ms"] = round(seconds * 1000)
        return {name: str(value) for name, value in wanted.items()}


def _clamp(value: N, low: N, high: N) -> N:
    return min(max(value, low), high)
