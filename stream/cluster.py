"""`unmask topics`: make the topics of a cluster, or say in what they are not as they must be (DESIGN 3.1)."""

from importlib.util import find_spec
from typing import TextIO

from stream.clock import Deadline, SystemClock
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.kafka_log import KafkaLog
from stream.topics import topic_specs

OK, DIFFERENT = 0, 1

SETTLE_S, SETTLE_NAP_S = 5.0, 0.2
"""Which broker answers is chance, and one may not have heard yet of what another has just made."""


def open_cluster(config: Config) -> KafkaLog:
    """Return the log over the cluster of `config`; raises `UnmaskError` as `KafkaLog`, or with none named."""
    if not config.kafka.bootstrap_servers:
        raise UnmaskError(
            Code.CONFIG,
            "kafka.bootstrap_servers is empty; it must name brokers, like 127.0.0.1:9092 (the embedded log "
            "makes its topics itself)",
        )
    if config.kafka.compression == "lz4" and find_spec("lz4") is None:
        raise UnmaskError(
            Code.PROGRAM_MISSING,
            'kafka.compression is lz4 and its library is not installed: pip install "unmask[kafka]", or set '
            "kafka.compression to gzip or none",
        )
    return KafkaLog(config.kafka, config.media.max_message_bytes, SystemClock())


def create(config: Config, out: TextIO) -> int:
    """Make what is missing, change settings that differ, and tell what is left different."""
    log = open_cluster(config)
    try:
        specs, clock = topic_specs(config), SystemClock()
        log.create_topics(specs)
        deadline = Deadline(SETTLE_S, clock)
        while any(map(log.differences, specs)) and not deadline.passed():
            clock.sleep(SETTLE_NAP_S)
        return _tell(log, config, out)
    finally:
        log.close()


def check(config: Config, out: TextIO) -> int:
    """Tell what differs; change nothing."""
    log = open_cluster(config)
    try:
        return _tell(log, config, out)
    finally:
        log.close()


def _tell(log: KafkaLog, config: Config, out: TextIO) -> int:
    different = OK
    for spec in topic_specs(config):
        differences = log.differences(spec)
        for difference in differences:
            out.write(f"{difference.sentence}\n")
            different = DIFFERENT
        if not differences:
            out.write(f"topic {spec.name}: {spec.partitions} partitions, as it must be\n")
    return different
