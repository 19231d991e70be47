"""Reads the topics of a run as any read-committed consumer would, with kafka-python alone."""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import kafka
from kafka import KafkaConsumer

# Of a broker that is away it would tell many times a second.
logging.getLogger("kafka").setLevel(logging.CRITICAL)

READ_S = 120.0
"""Longest wait for a topic's end: transactions of the dead hold it back for ten seconds."""
FETCH_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One committed record."""

    partition: int
    offset: int
    key: str
    value: bytes
    headers: Mapping[str, str]


@dataclass(slots=True)
class Topics:
    """What the checker judges: each topic in order of partition and offset."""

    media: list[Row] = field(default_factory=list)
    scores: list[Row] = field(default_factory=list)
    alerts: list[Row] = field(default_factory=list)
    deadletter: list[Row] = field(default_factory=list)


def consumer(servers: str) -> Any:
    """Return a read-committed consumer without a group."""
    return KafkaConsumer(
        bootstrap_servers=servers.split(","),
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_bytes=FETCH_BYTES,
        max_partition_fetch_bytes=FETCH_BYTES,
        metrics_enabled=False,
        bootstrap_timeout_ms=20_000,
    )


def partitions_of(reader: Any, topic: str) -> list[Any]:
    return [
        kafka.TopicPartition(topic, number) for number in sorted(reader.partitions_for_topic(topic) or ())
    ]


def read_topic(servers: str, topic: str) -> list[Row]:
    """Return every committed record of a topic up to its present end."""
    reader = consumer(servers)
    try:
        places = partitions_of(reader, topic)
        reader.assign(places)
        ends = reader.end_offsets(places)
        for place in places:
            reader.seek_to_beginning(place)
        rows: list[Row] = []
        deadline = time.monotonic() + READ_S
        while any(reader.position(place) < ends[place] for place in places):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{topic} could not be read to its end in {READ_S:g} s")
            for records in reader.poll(timeout_ms=200).values():
                rows += map(_row, records)
        return sorted(rows, key=lambda row: (row.partition, row.offset))
    finally:
        reader.close(autocommit=False)


def read_topics(servers: str, prefix: str, names: Iterable[str] = Topics.__slots__) -> Topics:
    return Topics(**{name: read_topic(servers, f"{prefix}.{name}") for name in names})


def _row(record: Any) -> Row:
    headers = {name: (value or b"").decode(errors="replace") for name, value in record.headers}
    key = (record.key or b"").decode(errors="replace")
    return Row(record.partition, record.offset, key, record.value or b"", headers)
