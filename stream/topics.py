"""The topics of one prefix, as they must be (DESIGN 3.1)."""

import zlib

from stream.config import Config
from stream.log import Cleanup, TopicSpec
from stream.records import Topic

CANARY_RETENTION_S, CANARY_RETENTION_BYTES = 3600.0, 16 * 1024 * 1024
"""Who sent a canary reads the answer within seconds; the rest is for people who ask what happened."""

PICTURES_RETENTION_S, PICTURES_RETENTION_BYTES = 900.0, 256 * 1024 * 1024
"""Only the newest of each feed is shown; the rest is what a page that has just been opened needs."""


def topic_name(config: Config, topic: Topic) -> str:
    """Return the topic's name below the configured prefix."""
    return f"{config.prefix}.{topic.value}"


def media_partition(stream: str, partitions: int) -> int:
    """Return the partition of `media`, and of `state`, that holds a stream.

    Records name it, so no log need hash alike; the log's own choice by key is the same.
    """
    return zlib.crc32(stream.encode()) % partitions


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
        TopicSpec(topic_name(config, Topic.SOURCES), config.ingest.partitions, Cleanup.COMPACT),
        kept(Topic.SCORES),
        kept(Topic.ALERTS),
        kept(Topic.DEADLETTER),
        # What sinks keep of each partition of alerts, in the same partition.
        TopicSpec(topic_name(config, Topic.DELIVERIES), media.partitions, Cleanup.COMPACT),
        TopicSpec(
            topic_name(config, Topic.CANARY),
            1,
            Cleanup.DELETE,
            CANARY_RETENTION_S,
            CANARY_RETENTION_BYTES,
        ),
        TopicSpec(
            topic_name(config, Topic.PICTURES),
            media.partitions,
            Cleanup.DELETE,
            PICTURES_RETENTION_S,
            PICTURES_RETENTION_BYTES,
        ),
        kept(Topic.DECISIONS),
        kept(Topic.AUDIT),
    ]
