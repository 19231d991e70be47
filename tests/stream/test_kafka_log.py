"""The log over a real Kafka cluster: the contract, and what only it must get right."""

import time
import uuid
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from kafka import KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

from stream.clock import SystemClock
from stream.config import Kafka
from stream.errors import Code, UnmaskError
from stream.kafka_log import KafkaLog
from stream.log import Cleanup, Consumer, Log, LogFactory, TopicPartition, TopicSpec
from tests.conftest import requires
from tests.stream.kafka_broker import Broker
from tests.stream.log_contract import (
    PATIENCE_S,
    LogContract,
    Recorder,
    everything,
    join,
    member,
    number,
    numbers,
    poll_some,
    record,
    write,
)

SESSION_S = 6.0
"""The least that brokers allow."""

MESSAGE_BYTES = 1024 * 1024


def settings(servers: str, member_id: str = "") -> Kafka:
    return Kafka(bootstrap_servers=servers, replication=1, session_s=SESSION_S, member_id=member_id)


class TestContract(LogContract):
    session_s = SESSION_S

    @pytest.fixture
    def factory(self, servers: str) -> LogFactory:
        return partial(KafkaLog, settings(servers), MESSAGE_BYTES, SystemClock())


@pytest.fixture
def log(servers: str) -> Iterator[KafkaLog]:
    log = KafkaLog(settings(servers), MESSAGE_BYTES, SystemClock())
    yield log
    log.close()


@pytest.fixture
def topic(log: KafkaLog) -> str:
    """A topic of four partitions."""
    name = f"kafka-{uuid.uuid4().hex[:12]}"
    log.create_topics([TopicSpec(name, 4)])
    return name


# Topics


def test_topics_get_what_the_spec_says(log: KafkaLog, topic: str) -> None:
    spec = TopicSpec(f"{topic}-media", 2, Cleanup.DELETE, 3600.0, 1024**3)
    log.create_topics([spec])
    assert log.differences(spec) == []
    shorter = TopicSpec(spec.name, 2, Cleanup.DELETE, 60.0, 1024**3)
    told = " ".join(difference.sentence for difference in log.differences(shorter))
    assert "retention.ms 3600000, not 60000" in told
    log.create_topics([shorter])
    assert log.differences(shorter) == []


def test_what_somebody_changed_is_told_and_put_right(log: KafkaLog, topic: str, servers: str) -> None:
    spec = TopicSpec(f"{topic}-state", 1, Cleanup.COMPACT)
    log.create_topics([spec])
    with KafkaAdminClient(bootstrap_servers=servers) as admin:
        change = {"max.message.bytes": "1000", "retention.ms": "5000"}
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, spec.name, change)])
    found = log.differences(spec)
    assert len(found) == 2
    assert f"topic {spec.name} has max.message.bytes 1000, not {MESSAGE_BYTES + 65536}" == found[0].sentence
    log.create_topics([spec])
    assert log.differences(spec) == []


def test_missing_topic_and_other_copies_are_told(log: KafkaLog, topic: str, servers: str) -> None:
    (missing,) = log.differences(TopicSpec(f"{topic}-none", 1))
    assert "is missing" in missing.sentence
    thrice = Kafka(bootstrap_servers=servers, replication=7)
    other = KafkaLog(thrice, MESSAGE_BYTES, SystemClock())
    told = [difference.sentence for difference in other.differences(TopicSpec(topic, 4))]
    assert any("copies of a partition, not kafka.replication 7" in sentence for sentence in told)
    with pytest.raises(UnmaskError, match=r"too few brokers; set kafka\.replication"):
        other.create_topics([TopicSpec(f"{topic}-new", 1)])
    other.close()


# Records


def test_partition_is_that_of_the_embedded_log(log: KafkaLog, topic: str) -> None:
    keys = [f"stream-{i}" for i in range(20)]
    write(log, *(record(topic, b"1", key, None) for key in keys))
    assert {got.key: got.partition for got in everything(log, topic)} == {
        key: zlib.crc32(key.encode()) % 4 for key in keys
    }


def test_records_of_others_need_no_key(log: KafkaLog, topic: str, servers: str) -> None:
    other = KafkaProducer(bootstrap_servers=servers)
    other.send(topic, b"value", headers=[("a", b"1"), ("a", b"2")], partition=0)
    other.send(topic, b"value", key=b"\xff", partition=0)
    other.close()
    first, second = everything(log, topic)
    assert (first.key, first.value, first.headers) == ("", b"value", {"a": b"2"})
    assert second.key == "\N{REPLACEMENT CHARACTER}"


def test_too_large_is_refused_and_the_producer_goes_on(log: KafkaLog, topic: str) -> None:
    with log.producer(topic) as producer:
        producer.send(record(topic, bytes(MESSAGE_BYTES)))
        with pytest.raises(UnmaskError, match=r"media\.max_message_bytes"):
            producer.send(record(topic, bytes(MESSAGE_BYTES + 100_000)))
        producer.send(record(topic, b"after"))
        producer.flush(PATIENCE_S)
        assert producer.dropped == 0
    assert [len(got.value or b"") for got in everything(log, topic)] == [MESSAGE_BYTES, 5]


def test_uncommitted_is_not_read(log: KafkaLog, topic: str, servers: str) -> None:
    other = KafkaProducer(bootstrap_servers=servers, transactional_id=topic)
    other.init_transactions()
    other.begin_transaction()
    other.send(topic, b"aborted", key=b"k", partition=0).get(PATIENCE_S)
    other.abort_transaction()
    other.close()
    write(log, record(topic, b"committed"))
    assert [got.value for got in everything(log, topic)] == [b"committed"]


# Membership


class Worker:
    """A member that applies what it reads, and commits when partitions are taken from it."""

    def __init__(self, log: Log, topic: str, name: str, story: list[tuple[str, str, int]]) -> None:
        self.heard = Recorder()
        self.name = name
        self.story = story
        self.applied: dict[TopicPartition, int] = {}
        self.seen: list[int] = []
        self.consumer: Consumer = log.consumer(topic, [topic], self.heard, name)
        self.heard.on_assigned = partial(self._note, "assigned")
        self.heard.on_revoked = self._revoked

    def poll(self) -> None:
        for got in self.consumer.poll(7, 0.02):
            self.seen += numbers([got])
            self.applied[TopicPartition(got.topic, got.partition)] = got.offset + 1

    def commit(self) -> None:
        positions = {tp: at for tp, at in self.applied.items() if tp in self.consumer.assignment()}
        self.consumer.commit([], positions)

    def _revoked(self) -> None:
        time.sleep(0.3)
        self.commit()
        self._note("revoked")

    def _note(self, what: str) -> None:
        self.story += [(what, self.name, tp.partition) for tp in self.heard.events[-1][1]]


def test_partitions_move_to_a_new_member_and_back_without_loss_or_double(log: KafkaLog, topic: str) -> None:
    write(log, *(record(topic, number(i), partition=i % 4) for i in range(400)))
    story: list[tuple[str, str, int]] = []
    first = Worker(log, topic, "first", story)
    while len(first.seen) < 50:
        first.poll()
    second = Worker(log, topic, "second", story)
    end = time.monotonic() + PATIENCE_S
    while len(second.consumer.assignment()) < 2 and time.monotonic() < end:
        first.poll()
        second.poll()
    assert (len(first.consumer.assignment()), len(second.consumer.assignment())) == (2, 2)
    for partition in {tp.partition for tp in second.consumer.assignment()}:
        owners = [(what, name) for what, name, at in story if at == partition]
        assert owners == [("assigned", "first"), ("revoked", "first"), ("assigned", "second")]
    second.consumer.close(PATIENCE_S)
    while len(first.seen) + len(second.seen) < 400 and time.monotonic() < end:
        first.poll()
    first.consumer.close(PATIENCE_S)
    assert sorted(first.seen + second.seen) == list(range(400))
    assert "lost" not in first.heard.names + second.heard.names


def test_brief_polls_with_pauses_between_join_once(log: KafkaLog, topic: str) -> None:
    with member(log, topic, topic) as (consumer, heard):
        end = time.monotonic() + PATIENCE_S
        while not consumer.assignment() and time.monotonic() < end:
            consumer.poll(1, 0.0)
            time.sleep(0.1)
        assert heard.names == ["assigned"]
        assert consumer._consumer.group_metadata().generation_id == 1  # type: ignore[attr-defined]


def test_commit_of_outputs_alone_is_checked_too(log: KafkaLog, topic: str) -> None:
    with member(log, topic, topic) as (consumer, _):
        join(consumer)
        consumer.commit([record(topic, b"1")], {})
        consumer._consumer._coordinator.reset_generation()  # type: ignore[attr-defined]
        with pytest.raises(UnmaskError) as caught:
            consumer.commit([record(topic, b"2")], {})
        assert caught.value.code is Code.LOG_FENCED
    assert [got.value for got in everything(log, topic)] == [b"1"]


def test_static_member_comes_back_without_a_rebalance(servers: str, topic: str) -> None:
    one, two = (KafkaLog(settings(servers, name), MESSAGE_BYTES, SystemClock()) for name in ("one", "two"))
    first, heard = one.consumer(topic, [topic], Recorder(), "detect"), Recorder()
    second = two.consumer(topic, [topic], heard, "detect")
    end = time.monotonic() + PATIENCE_S
    while not (len(first.assignment()) == len(second.assignment()) == 2) and time.monotonic() < end:
        first.poll(1, 0.02)
        second.poll(1, 0.02)
    held, told = first.assignment(), list(heard.events)
    first.close(PATIENCE_S)
    again = one.consumer(topic, [topic], Recorder(), "detect")
    while not again.assignment() and time.monotonic() < end:
        again.poll(1, 0.02)
        second.poll(1, 0.02)
    assert again.assignment() == held
    assert heard.events == told
    one.close()
    two.close()


def test_second_process_with_the_same_static_name_ousts_the_first(servers: str, topic: str) -> None:
    old = KafkaLog(settings(servers, "same"), MESSAGE_BYTES, SystemClock())
    new = KafkaLog(settings(servers, "same"), MESSAGE_BYTES, SystemClock())
    heard = Recorder()
    first = old.consumer(topic, [topic], heard, "detect")
    join(first)
    second = new.consumer(topic, [topic], Recorder(), "detect")
    join(second)
    with pytest.raises(UnmaskError) as caught:
        first.commit([record(topic, b"zombie")], {})
    assert caught.value.code is Code.LOG_FENCED
    for _ in range(2):
        with pytest.raises(UnmaskError, match=r"another process is member same\.detect") as caught:
            first.poll(1, 0.0)
        assert caught.value.code is Code.LOG_FENCED
    assert heard.names == ["assigned", "lost"]
    second.commit([record(topic, b"mine")], {})
    old.close()
    assert [got.value for got in everything(new, topic)] == [b"mine"]
    new.close()


# The broker goes and comes back


def test_broker_restarts_under_a_producer_and_a_member(tmp_path: Path) -> None:
    requires("java", "mvn")
    broker = Broker(tmp_path / "kafka", tmp_path)
    log = KafkaLog(settings(broker.servers), MESSAGE_BYTES, SystemClock())
    try:
        log.create_topics([TopicSpec("media", 1), TopicSpec("out", 1)])
        producer = log.producer("ingest")
        with member(log, "detect", "media") as (consumer, heard):
            producer.send(record("media", number(0)))
            got = poll_some(consumer, 1)
            consumer.commit([record("out", number(0))], {TopicPartition("media", 0): got[0].offset + 1})
            broker.stop()
            assert not broker.running()
            producer.send(record("media", number(1)))
            with pytest.raises(UnmaskError, match="1 records not durable"):
                producer.flush(0.5)
            assert list(consumer.poll(10, 0.5)) == []
            broker.start()
            producer.flush(PATIENCE_S)
            producer.send(record("media", number(2)))
            got = poll_some(consumer, 2)
            assert numbers(got) == [1, 2]
            outputs = [record("out", got.value) for got in got]
            consumer.commit(outputs, {TopicPartition("media", 0): got[-1].offset + 1})
            assert heard.names == ["assigned"]
        producer.close(PATIENCE_S)
        assert numbers(everything(log, "out")) == [0, 1, 2]
        assert producer.dropped == 0
    finally:
        log.close()
        broker.stop()
