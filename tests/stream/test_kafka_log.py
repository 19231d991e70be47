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
from stream.kafka_producer import IN_FLIGHT_BYTES
from stream.log import Cleanup, Consumer, Log, LogFactory, TopicPartition, TopicSpec
from stream.records import Record
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
    poll_until,
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


def test_what_is_kept_for_a_time_is_kept_from_its_arrival(log: KafkaLog) -> None:
    topic = f"kafka-{uuid.uuid4().hex[:12]}"
    log.create_topics([TopicSpec(topic, 1, retention_s=3600.0)])
    sent = record(topic, b"of a writer whose clock is years behind")
    write(log, sent)
    got = everything(log, topic)
    assert [found.value for found in got] == [sent.value]
    assert got[0].timestamp_us > sent.timestamp_us + 3600 * 1_000_000


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


def test_a_broker_that_was_away_when_we_came_is_found(log: KafkaLog, topic: str) -> None:
    write(log, record(topic, number(0), partition=1))
    # As kafka-python knows a cluster that it asked while the leader was down: by another broker alone.
    cluster = log._admin._manager.cluster
    cluster._brokers = {99: next(iter(cluster._brokers.values()))}
    assert log.begin_offset(TopicPartition(topic, 1)) == 0
    assert len(list(log.read(TopicPartition(topic, 1), 0))) == 1


def test_what_is_paused_while_another_is_read_to_its_end_goes_on(log: KafkaLog, topic: str) -> None:
    write(log, *(record(topic, number(value), partition=value % 2) for value in range(200)))
    with member(log, topic, topic) as (consumer, _):
        got: list[Record] = []
        while not got:
            got += consumer.poll(1, PATIENCE_S)
        first = TopicPartition(topic, got[0].partition)
        consumer.pause([first])
        got += poll_some(consumer, 100)
        consumer.resume([first])
        got += poll_some(consumer, 200 - len(got))
    assert sorted(numbers(got)) == list(range(200))


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


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Broker]:
    """A broker that a test may kill."""
    requires("java", "mvn")
    broker = Broker(tmp_path / "kafka", tmp_path)
    yield broker
    broker.stop()


def test_broker_restarts_under_a_producer_and_a_member(own: Broker) -> None:
    log = KafkaLog(settings(own.servers), MESSAGE_BYTES, SystemClock())
    log.create_topics([TopicSpec("media", 1), TopicSpec("out", 1)])
    producer = log.producer("ingest")
    with member(log, "detect", "media") as (consumer, heard):
        producer.send(record("media", number(0)))
        got = poll_some(consumer, 1)
        consumer.commit([record("out", number(0))], {TopicPartition("media", 0): got[0].offset + 1})
        own.stop()
        assert not own.running()
        producer.send(record("media", number(1)))
        with pytest.raises(UnmaskError, match="1 records not durable") as caught:
            producer.flush(0.5)
        assert caught.value.code is Code.LOG_AWAY
        own.start()
        producer.flush(PATIENCE_S)
        producer.send(record("media", number(2)))
        got = answered(consumer, 2)
        assert numbers(got) == [1, 2]
        outputs = [record("out", got.value) for got in got]
        consumer.commit(outputs, {TopicPartition("media", 0): got[-1].offset + 1})
        assert heard.names == ["assigned"]
    producer.close(PATIENCE_S)
    assert numbers(everything(log, "out")) == [0, 1, 2]
    assert producer.dropped == 0
    log.close()


def test_while_the_broker_is_away_that_is_what_is_told_and_nothing_is_lost(own: Broker) -> None:
    log = KafkaLog(settings(own.servers), MESSAGE_BYTES, SystemClock())
    log.create_topics([TopicSpec("media", 1), TopicSpec("out", 1)])
    producer = log.producer("ingest", insistent=True)
    with member(log, "detect", "media") as (consumer, heard):
        producer.send(record("media", number(0)))
        got = poll_some(consumer, 1)
        outputs = [record("out", number(0))]
        positions = {TopicPartition("media", 0): got[0].offset + 1}
        own.kill(1)
        taken = 1
        while producer.offer(record("media", number(taken) + bytes(MESSAGE_BYTES))):
            taken += 1
        assert IN_FLIGHT_BYTES - 2 * MESSAGE_BYTES < (taken - 1) * MESSAGE_BYTES <= IN_FLIGHT_BYTES
        with pytest.raises(UnmaskError) as caught:
            consumer.commit(outputs, positions)
        assert caught.value.code is Code.LOG_AWAY
        with pytest.raises(UnmaskError) as caught:
            poll_some(consumer, 1)
        assert caught.value.code is Code.LOG_AWAY
        with pytest.raises(UnmaskError) as caught:
            log.end_offset(TopicPartition("out", 0))
        assert caught.value.code is Code.LOG_AWAY
        end = time.monotonic() + PATIENCE_S
        while not producer.away and time.monotonic() < end:
            time.sleep(0.1)
        assert (producer.away, producer.unfinished()) == (True, taken - 1)
        assert consumer.assignment() == {TopicPartition("media", 0)}
        own.start_again(1)
        producer.flush(PATIENCE_S)
        assert (producer.away, producer.unfinished(), producer.dropped) == (False, 0, 0)
        written = [number_of(got) for got in everything_again(log, "media")]
        assert sorted(set(written)) == list(range(taken))
        answered(consumer, taken - 1)
        consumer.commit(outputs, positions)
        assert heard.names == ["assigned"]
        assert consumer.committed(TopicPartition("media", 0)) == positions[TopicPartition("media", 0)]
    assert numbers(everything(log, "out")) == [0]
    producer.close(PATIENCE_S)
    log.close()


def everything_again(log: KafkaLog, topic: str) -> list[Record]:
    """Everything in a topic, as soon as the log has found its cluster again."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return everything(log, topic)
        except UnmaskError as error:
            if error.code is not Code.LOG_AWAY or time.monotonic() > end:
                raise
            time.sleep(0.1)


def answered(consumer: Consumer, count: int) -> list[Record]:
    """Poll until `count` records have come, whatever the cluster does in between."""
    found: list[Record] = []
    end = time.monotonic() + PATIENCE_S
    while len(found) < count:
        assert time.monotonic() < end, f"waited {PATIENCE_S} s, got {len(found)} records"
        try:
            found += consumer.poll(100, 0.2)
        except UnmaskError as error:
            if error.code is not Code.LOG_AWAY:
                raise
    return found


def number_of(got: Record) -> int:
    return int.from_bytes((got.value or b"")[:8], "big")


def test_members_that_stay_are_not_disturbed(log: KafkaLog, topic: str) -> None:
    with member(log, topic, topic) as (first, heard):
        poll_until(first, lambda _: len(first.assignment()) == 4)
        with member(log, topic, topic) as (second, _):
            end = time.monotonic() + PATIENCE_S
            while len(second.assignment()) < 2 and time.monotonic() < end:
                first.poll(1, 0.02)
                second.poll(1, 0.02)
            kept = first.assignment()
            assert len(kept) == 2
            assert [(name, len(moved)) for name, moved in heard.events] == [("assigned", 4), ("revoked", 2)]
            assert kept.isdisjoint(heard.events[1][1])
