"""The topics of one prefix, as they must be (DESIGN 3.1)."""

from stream.config import Config
from stream.log import Cleanup, TopicSpec
from stream.records import Topic

SOURCES_PARTITIONS = 8
"""Ingest members share feeds by these; fixed at creation like those of `media`."""


def topic_name(config: Config, topic: Topic) -> str:
    """Return the topic's name below the configured prefix."""
    return f"{config.prefix}.{topic.value}"


def topic_specs(config: Config) -> list[TopicSpec]:
    """Return every topic with its partitions and retention; `state` has as many partitions as `media`."""
    media, log = config.media, config.log

    def kept(topic: Topic) -> TopicSpec:
        return TopicSpec(
            topic_name(config, topic),
            media.partitions,
            Cleanup.DELETE,
            log.records_retention_s,
            log.records_retention_bytes,
        )

    return [
        TopicSpec(
            topic_name(config, Topic.MEDIA),
            media.partitions,
            Cleanup.DELETE,
            media.retention_s,
            media.retention_bytes,
        ),
        TopicSpec(topic_name(config, Topic.STATE), media.partitions, Cleanup.COMPACT),
        TopicSpec(topic_name(config, Topic.SOURCES), SOURCES_PARTITIONS, Cleanup.COMPACT),
        kept(Topic.SCORES),
        kept(Topic.ALERTS),
        kept(Topic.DEADLETTER),
    ]
