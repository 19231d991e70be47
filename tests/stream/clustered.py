"""A detect worker over a real Kafka, with a reader that knows the truth."""

import uuid
from pathlib import Path
from typing import Any

from stream.config import Kafka, Media
from stream.kafka_log import KafkaLog
from stream.log import TopicPartition
from stream.records import Topic
from stream.topics import topic_specs
from tests.stream.detecting import Detect


class Clustered(Detect):
    """As `Detect`, its topics under a prefix that nobody else has."""

    def __init__(self, folder: Path, servers: str, **settings: Any) -> None:
        media = settings.pop("media", Media(partitions=2))
        kafka = Kafka(bootstrap_servers=servers, replication=1, session_s=6)
        prefix = f"t{uuid.uuid4().hex[:12]}"
        super().__init__(folder, media=media, kafka=kafka, prefix=prefix, **settings)
        self.log.close()
        self.log: Any = KafkaLog(kafka, media.max_message_bytes, self.clock)
        self.log.create_topics(topic_specs(self.config))
        self._last: dict[TopicPartition, tuple[int, int]] = {}

    def run(self, until: Any = None, seconds: float = 60.0, log: Any = None) -> None:
        super().run(until or (lambda _: self.all_applied()), seconds, log)

    def all_applied(self) -> bool:
        """Whether the group is past the last record of each partition; behind it come markers only."""
        return all(self._applied(n) for n in range(self.config.media.partitions))

    def _applied(self, number: int) -> bool:
        partition = TopicPartition(self.topic(Topic.MEDIA), number)
        end = self.log.end_offset(partition)
        known, last = self._last.get(partition, (0, -1))
        if known != end:
            last = max((record.offset for record in self.log.read(partition, known)), default=last)
            self._last[partition] = (end, last)
        return last < (self.log.group_position(f"{self.config.prefix}-detect", partition) or 0)
