"""What every log must do, embedded or Kafka: one suite, run against each through a factory.

A test class inherits `LogContract` and gives a fixture `factory` that opens the log anew (picklable: children
are given it too), and `session_s`, after which a silent member has lost its place.
"""

import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest

from stream.errors import Code, UnmaskError
from stream.log import Cleanup, Consumer, Log, LogFactory, PositionError, TopicPartition, TopicSpec
from stream.records import OutRecord, Record

PATIENCE_S = 60.0
"""Bound on every wait for something that must happen; a healthy log needs a fraction."""


class Recorder:
    """A listener that keeps what it was told and can do something when told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, frozenset[TopicPartition]]] = []
        self.on_assigned: Callable[[], None] = lambda: None
        self.on_revoked: Callable[[], None] = lambda: None

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def assigned(self, partitions: Collection[TopicPartition]) -> None:
        self.events.append(("assigned", frozenset(partitions)))
        self.on_assigned()

    def revoked(self, partitions: Collection[TopicPartition]) -> None:
        self.events.append(("revoked", frozenset(partitions)))
        self.on_revoked()

    def lost(self, partitions: Collection[TopicPartition]) -> None:
        self.events.append(("lost", frozenset(partitions)))


def record(
    topic: str,
    value: bytes | None,
    key: str = "stream",
    partition: int | None = 0,
    headers: Mapping[str, bytes] | None = None,
) -> OutRecord:
    return OutRecord(topic, key, value, headers or {}, 1_700_000_000_000_000, partition)


def number(value: int) -> bytes:
    return value.to_bytes(8, "big")


def numbers(records: Collection[Record]) -> list[int]:
    return [int.from_bytes(record.value or b"", "big") for record in records]


def write(log: Log, *records: OutRecord) -> None:
    with log.producer(f"writer-{uuid.uuid4().hex}") as producer:
        for out in records:
            producer.send(out)
        producer.flush(PATIENCE_S)


def everything(log: Log, topic: str) -> list[Record]:
    found: list[Record] = []
    for part in range(log.partitions(topic)):
        partition = TopicPartition(topic, part)
        found += log.read(partition, log.begin_offset(partition))
    return found


def poll_until(consumer: Consumer, enough: Callable[[list[Record]], bool]) -> list[Record]:
    """Poll until what has come is `enough`."""
    found: list[Record] = []
    end = time.monotonic() + PATIENCE_S
    while not enough(found):
        assert time.monotonic() < end, f"waited {PATIENCE_S} s, got {len(found)} records"
        found += consumer.poll(100, 0.2)
    return found


def poll_some(consumer: Consumer, count: int) -> list[Record]:
    return poll_until(consumer, lambda found: len(found) >= count)


def join(consumer: Consumer) -> list[Record]:
    """Poll until something is assigned; returns what came with it."""
    return poll_until(consumer, lambda _: bool(consumer.assignment()))


class LogContract:
    """The contract. `session_s` is how long a member may be silent."""

    session_s: float

    @pytest.fixture
    def log(self, factory: LogFactory) -> Iterator[Log]:
        log = factory()
        yield log
        log.close()

    @pytest.fixture
    def name(self) -> str:
        """A name nobody else used: the suite may run against a shared cluster."""
        return f"contract-{uuid.uuid4().hex[:12]}"

    @pytest.fixture
    def topic(self, log: Log, name: str) -> str:
        """A topic of one partition."""
        log.create_topics([TopicSpec(name, 1)])
        return name

    # Topics

    def test_topics_are_made_once_and_differences_named(self, log: Log, name: str) -> None:
        spec = TopicSpec(name, 3)
        log.create_topics([spec])
        log.create_topics([spec])
        assert log.partitions(name) == 3
        with pytest.raises(UnmaskError, match=f"{name}.*3 partitions"):
            log.create_topics([TopicSpec(name, 4)])
        with pytest.raises(UnmaskError, match=f"{name}.*cleanup"):
            log.create_topics([TopicSpec(name, 3, Cleanup.COMPACT)])

    def test_topic_that_is_missing_is_named(self, log: Log, name: str) -> None:
        with pytest.raises(UnmaskError, match=name):
            log.partitions(name)
        with log.producer(name) as producer, pytest.raises(UnmaskError, match=name):
            producer.send(record(name, b"x"))

    def test_partition_that_is_missing_is_named(self, log: Log, topic: str) -> None:
        with log.producer(topic) as producer, pytest.raises(UnmaskError, match=r"partition 7"):
            producer.send(record(topic, b"x", partition=7))

    # Records

    def test_records_come_back_in_order_and_whole(self, log: Log, topic: str) -> None:
        sizes = [0, 1, 100, 20_000, 300_000]
        headers = {"raw": b"\xff\x00\n", "": b""}
        sent = [
            record(topic, os.urandom(sizes[i % 5]), f"k{i % 7}", headers=headers | {"n": number(i)})
            for i in range(60)
        ]
        write(log, *sent)
        got = list(log.read(TopicPartition(topic, 0), 0))
        assert [(r.key, r.value, dict(r.headers)) for r in got] == [(r.key, r.value, r.headers) for r in sent]
        assert all(r.timestamp_us // 1000 == sent[0].timestamp_us // 1000 for r in got)
        offsets = [r.offset for r in got]
        assert offsets == sorted(set(offsets))

    def test_tombstone_is_not_an_empty_value(self, log: Log, topic: str) -> None:
        write(log, record(topic, None), record(topic, b""))
        assert [r.value for r in log.read(TopicPartition(topic, 0), 0)] == [None, b""]

    def test_partition_by_key_or_by_name(self, log: Log, name: str) -> None:
        log.create_topics([TopicSpec(name, 4)])
        keys = [f"stream-{i}" for i in range(40)]
        write(log, *(record(name, b"1", key, None) for key in keys + keys))
        write(log, record(name, b"named", "anything", 2))
        home: dict[str, set[int]] = {}
        for got in everything(log, name):
            home.setdefault(got.key, set()).add(got.partition)
        assert all(len(home[key]) == 1 for key in keys)
        assert len(set.union(*(home[key] for key in keys))) == 4
        assert home["anything"] == {2}

    def test_read_stops_where_told(self, log: Log, topic: str) -> None:
        write(log, *(record(topic, number(i)) for i in range(10)))
        partition = TopicPartition(topic, 0)
        offsets = [r.offset for r in log.read(partition, 0)]
        assert numbers(list(log.read(partition, offsets[3], offsets[6]))) == [3, 4, 5]
        assert list(log.read(partition, log.end_offset(partition))) == []

    def test_read_ends_at_the_end_as_of_the_call(self, log: Log, topic: str) -> None:
        write(log, *(record(topic, number(i)) for i in range(3)))
        reading = log.read(TopicPartition(topic, 0), 0)
        first = next(reading)
        write(log, record(topic, number(3)))
        assert numbers([first, *reading]) == [0, 1, 2]

    def test_compacted_topic_keeps_the_last_of_each_key(self, log: Log, name: str) -> None:
        log.create_topics([TopicSpec(name, 1, Cleanup.COMPACT)])
        write(log, *(record(name, number(i), f"k{i % 4}") for i in range(40)), record(name, None, "k0"))
        last: dict[str, bytes | None] = {}
        for got in log.read(TopicPartition(name, 0), log.begin_offset(TopicPartition(name, 0))):
            last[got.key] = got.value
        assert last.pop("k0", None) is None
        assert last == {f"k{i}": number(36 + i) for i in range(1, 4)}

    def test_group_follows_a_compacted_topic(self, log: Log, name: str) -> None:
        log.create_topics([TopicSpec(name, 1, Cleanup.COMPACT)])
        write(log, *(record(name, number(i), "k") for i in range(10)))
        with member(log, name, name) as (consumer, _):
            poll_until(consumer, lambda found: 9 in numbers(found))
            write(log, *(record(name, number(i), "k") for i in range(10, 20)))
            poll_until(consumer, lambda found: 19 in numbers(found))

    # Producers

    def test_flush_makes_durable(self, factory: LogFactory, log: Log, topic: str) -> None:
        with log.producer(topic) as producer:
            for i in range(1200):
                producer.send(record(topic, number(i)))
            producer.flush(PATIENCE_S)
            other = factory()
            assert numbers(list(other.read(TopicPartition(topic, 0), 0))) == list(range(1200))
            other.close()
            assert producer.dropped == 0

    def test_records_go_out_without_flush(self, log: Log, topic: str) -> None:
        with log.producer(topic) as producer, member(log, topic, topic) as (consumer, _):
            producer.send(record(topic, number(1)))
            assert numbers(poll_some(consumer, 1)) == [1]

    def test_successor_replaces_a_producer(self, factory: LogFactory, log: Log, topic: str) -> None:
        old = log.producer(topic)
        old.send(record(topic, b"before"))
        old.flush(PATIENCE_S)
        restarted = factory()
        with restarted.producer(topic) as new:
            new.send(record(topic, b"after"))
            new.flush(PATIENCE_S)
            old.send(record(topic, b"zombie"))
            with pytest.raises(UnmaskError) as caught:
                old.flush(PATIENCE_S)
            assert caught.value.code is Code.LOG_FENCED
        with pytest.raises(UnmaskError):
            old.send(record(topic, b"zombie"))
        with pytest.raises(UnmaskError):
            old.close(PATIENCE_S)
        restarted.close()
        assert [r.value for r in log.read(TopicPartition(topic, 0), 0)] == [b"before", b"after"]

    # Positions

    def test_group_without_position_starts_at_the_beginning(self, log: Log, topic: str) -> None:
        write(log, *(record(topic, number(i)) for i in range(5)))
        with member(log, topic, topic) as (consumer, heard):
            assert numbers(poll_some(consumer, 5)) == [0, 1, 2, 3, 4]
            assert heard.events == [("assigned", frozenset({TopicPartition(topic, 0)}))]
            assert consumer.committed(TopicPartition(topic, 0)) is None
        assert log.group_position(topic, TopicPartition(topic, 0)) is None

    def test_group_goes_on_at_its_committed_position(self, log: Log, topic: str) -> None:
        partition = TopicPartition(topic, 0)
        write(log, *(record(topic, number(i)) for i in range(10)))
        with member(log, topic, topic) as (consumer, _):
            got = poll_some(consumer, 10)
            consumer.commit([], {partition: got[4].offset})
            assert consumer.committed(partition) == got[4].offset
        assert log.group_position(topic, partition) == got[4].offset
        with member(log, topic, topic) as (consumer, _):
            assert numbers(poll_some(consumer, 6)) == [4, 5, 6, 7, 8, 9]
        with member(log, topic + "-other", topic) as (consumer, _):
            assert numbers(poll_some(consumer, 10)) == list(range(10))

    def test_poll_takes_no_more_than_asked_and_starves_nobody(self, log: Log, name: str) -> None:
        log.create_topics([TopicSpec(name, 3)])
        write(log, *(record(name, number(i), partition=i % 3) for i in range(300)))
        got: list[Record] = []
        with member(log, name, name) as (consumer, _):
            end = time.monotonic() + PATIENCE_S
            while len(got) < 300 and time.monotonic() < end:
                page = consumer.poll(7, 0.2)
                assert len(page) <= 7
                got += page
        for part in range(3):
            assert numbers([r for r in got if r.partition == part]) == list(range(part, 300, 3))

    def test_seek_moves_reading_not_the_committed_position(self, log: Log, topic: str) -> None:
        partition = TopicPartition(topic, 0)
        write(log, *(record(topic, number(i)) for i in range(6)))
        with member(log, topic, topic) as (consumer, _):
            got = poll_some(consumer, 6)
            consumer.commit([], {partition: got[-1].offset + 1})
            consumer.seek(partition, got[2].offset)
            assert numbers(poll_some(consumer, 4)) == [2, 3, 4, 5]
            assert consumer.committed(partition) == got[-1].offset + 1

    def test_seek_when_assigned_decides_where_polling_starts(self, log: Log, topic: str) -> None:
        partition = TopicPartition(topic, 0)
        write(log, *(record(topic, number(i)) for i in range(6)))
        offset = [r.offset for r in log.read(partition, 0)][3]
        heard = Recorder()
        consumer = log.consumer(topic, [topic], heard, "a")
        heard.on_assigned = lambda: consumer.seek(partition, offset)
        assert numbers(poll_some(consumer, 3)) == [3, 4, 5]
        consumer.close(PATIENCE_S)

    def test_paused_partition_gives_nothing_and_stays_ours(self, log: Log, name: str) -> None:
        log.create_topics([TopicSpec(name, 2)])
        with member(log, name, name) as (consumer, heard):
            join(consumer)
            poll_until(consumer, lambda _: len(consumer.assignment()) == 2)
            consumer.pause([TopicPartition(name, 0)])
            write(log, *(record(name, number(i), partition=i % 2) for i in range(10)))
            assert numbers(poll_some(consumer, 5)) == [1, 3, 5, 7, 9]
            assert list(consumer.poll(100, 0.3)) == []
            assert len(consumer.assignment()) == 2
            consumer.resume([TopicPartition(name, 0)])
            assert numbers(poll_some(consumer, 5)) == [0, 2, 4, 6, 8]
            assert heard.names.count("lost") == 0

    def test_foreign_partition_is_refused(self, log: Log, topic: str) -> None:
        with member(log, topic, topic) as (consumer, _):
            join(consumer)
            for call in (consumer.pause, consumer.resume):
                with pytest.raises(ValueError, match="not assigned"):
                    call([TopicPartition(topic, 5)])
            with pytest.raises(ValueError, match="not assigned"):
                consumer.seek(TopicPartition(topic, 5), 0)

    def test_position_outside_is_an_event_and_not_a_jump(self, log: Log, topic: str) -> None:
        partition = TopicPartition(topic, 0)
        write(log, *(record(topic, number(i)) for i in range(4)))
        with member(log, topic, topic) as (consumer, _):
            poll_some(consumer, 4)
            consumer.seek(partition, 1000)
            with pytest.raises(PositionError, match=f"1000.*{topic}") as caught:
                poll_until(consumer, bool)
            assert caught.value.code is Code.LOG_POSITION
            assert caught.value.partition == partition
            consumer.seek(partition, caught.value.resume_at)
            write(log, record(topic, number(4)))
            assert numbers(poll_some(consumer, 1))[-1] == 4

    # Transactions

    def test_commit_writes_outputs_and_position_together(self, log: Log, topic: str, name: str) -> None:
        outputs = f"{name}-out"
        log.create_topics([TopicSpec(outputs, 2)])
        partition = TopicPartition(topic, 0)
        write(log, *(record(topic, number(i)) for i in range(3)))
        with member(log, topic, topic) as (consumer, _):
            got = poll_some(consumer, 3)
            sent = [record(outputs, b"small", partition=1), record(outputs, os.urandom(50_000), partition=1)]
            consumer.commit(sent, {partition: got[-1].offset + 1})
        assert [r.value for r in everything(log, outputs)] == [out.value for out in sent]
        assert log.group_position(topic, partition) == got[-1].offset + 1

    def test_commit_that_cannot_be_made_leaves_nothing(self, log: Log, topic: str, name: str) -> None:
        outputs = f"{name}-out"
        log.create_topics([TopicSpec(outputs, 1)])
        partition = TopicPartition(topic, 0)
        write(log, record(topic, b"x"))
        with member(log, topic, topic) as (consumer, _):
            got = poll_some(consumer, 1)
            with pytest.raises(UnmaskError, match="partition 9"):
                consumer.commit(
                    [record(outputs, b"first"), record(outputs, b"second", partition=9)],
                    {partition: got[0].offset + 1},
                )
            assert everything(log, outputs) == []
            assert consumer.committed(partition) is None
            consumer.commit([record(outputs, b"again")], {partition: got[0].offset + 1})
        assert [r.value for r in everything(log, outputs)] == [b"again"]

    def test_killed_while_committing_is_all_or_nothing(
        self, factory: LogFactory, log: Log, topic: str
    ) -> None:
        state = f"{topic}-state"
        log.create_topics([TopicSpec(state, 1)])
        write(log, *(record(topic, number(i)) for i in range(2000)))
        with child(commit_forever, factory, topic, state) as (process, pipe):
            assert pipe.poll(PATIENCE_S)
            pipe.recv()
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join(PATIENCE_S)
        with member(log, topic, topic) as (consumer, heard):
            got = join(consumer)
            got += poll_some(consumer, 0 if got else 1)
            copied = numbers(everything(log, state))
            assert copied == list(range(len(copied)))
            assert len(copied) > 0
            assert numbers(got)[0] == len(copied)
            assert heard.names == ["assigned"]

    # Membership

    def test_position_and_state_are_handed_over_in_one_piece(self, log: Log, topic: str) -> None:
        state = f"{topic}-state"
        partition = TopicPartition(topic, 0)
        log.create_topics([TopicSpec(state, 1, Cleanup.COMPACT)])
        write(log, *(record(topic, number(i)) for i in range(10)))
        heard = Recorder()
        first = log.consumer(topic, [topic], heard, "first")
        got = poll_some(first, 4)[:4]
        heard.on_revoked = lambda: first.commit(
            [record(state, number(sum(numbers(got))))], {partition: got[-1].offset + 1}
        )
        first.close(PATIENCE_S)
        assert heard.names == ["assigned", "revoked"]
        assert heard.events[1][1] == {partition}
        with member(log, topic, topic) as (second, _):
            rest = poll_some(second, 6)
            (kept,) = numbers(everything(log, state)[-1:])
            assert kept + sum(numbers(rest)) == sum(range(10))

    def test_second_member_waits_and_takes_over(self, log: Log, topic: str) -> None:
        write(log, record(topic, number(0)))
        first_heard, second_heard = Recorder(), Recorder()
        first = log.consumer(topic, [topic], first_heard, "first")
        got = poll_some(first, 1)
        second = log.consumer(topic, [topic], second_heard, "second")
        for _ in range(5):
            assert list(second.poll(10, 0.1)) == []
            first.poll(10, 0.1)
        holders = [consumer for consumer in (first, second) if consumer.assignment()]
        assert holders == [first]
        first.commit([], {TopicPartition(topic, 0): got[0].offset + 1})
        write(log, record(topic, number(1)))
        first.close(PATIENCE_S)
        assert numbers(poll_some(second, 1)) == [1]
        second.close(PATIENCE_S)
        assert second_heard.names[-2:] == ["assigned", "revoked"]

    def test_healthy_member_that_does_not_poll_stays(self, factory: LogFactory, log: Log, topic: str) -> None:
        with member(log, topic, topic) as (consumer, heard):
            join(consumer)
            rival = factory()
            with member(rival, topic, topic) as (other, _):
                end = time.monotonic() + 2 * self.session_s
                while time.monotonic() < end:
                    assert list(other.poll(10, 0.1)) == []
                    assert not other.assignment()
                consumer.commit([], {TopicPartition(topic, 0): 0})
                consumer.poll(1, 0.0)
            rival.close()
            assert heard.names == ["assigned"]

    def test_member_of_a_dead_process_is_replaced(self, factory: LogFactory, log: Log, topic: str) -> None:
        with child(hold, factory, topic) as (process, pipe):
            assert pipe.recv() == "assigned"
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join(PATIENCE_S)
            with member(log, topic, topic) as (consumer, _):
                join(consumer)

    def test_stopped_member_is_fenced(self, factory: LogFactory, log: Log, topic: str) -> None:
        partition = TopicPartition(topic, 0)
        with child(hold, factory, topic) as (process, pipe):
            assert pipe.recv() == "assigned"
            os.kill(process.pid or 0, signal.SIGSTOP)
            try:
                with member(log, topic, topic) as (consumer, heard):
                    join(consumer)
                    os.kill(process.pid or 0, signal.SIGCONT)
                    pipe.send("commit")
                    assert pipe.recv() == Code.LOG_FENCED
                    assert pipe.recv() == ["assigned", "lost"]
                    assert everything(log, topic) == []
                    consumer.commit([record(topic, b"mine")], {partition: 0})
                    assert heard.names == ["assigned"]
            finally:
                os.kill(process.pid or 0, signal.SIGCONT)
            assert [r.value for r in everything(log, topic)] == [b"mine"]

    # Processes

    def test_reading_while_another_process_writes(self, factory: LogFactory, log: Log, topic: str) -> None:
        with child(produce, factory, topic, 600) as (_, pipe), member(log, topic, topic) as (consumer, _):
            assert pipe.poll(PATIENCE_S)
            assert numbers(poll_some(consumer, 600)) == list(range(600))

    def test_two_processes_write_one_partition(self, factory: LogFactory, log: Log, topic: str) -> None:
        with child(produce, factory, topic, 400) as (one, _), child(produce, factory, topic, 400) as (two, _):
            one.join(PATIENCE_S)
            two.join(PATIENCE_S)
            assert (one.exitcode, two.exitcode) == (0, 0)
        got = everything(log, topic)
        by_writer: dict[bytes, list[Record]] = {}
        for one_record in got:
            by_writer.setdefault(one_record.headers["writer"], []).append(one_record)
        assert [numbers(records) for records in by_writer.values()] == [list(range(400))] * 2


@contextmanager
def member(log: Log, group: str, topic: str) -> Iterator[tuple[Consumer, Recorder]]:
    heard = Recorder()
    consumer = log.consumer(group, [topic], heard, f"member-{uuid.uuid4().hex[:6]}")
    try:
        yield consumer, heard
    finally:
        consumer.close(PATIENCE_S)


@contextmanager
def child(run: Callable[..., None], *arguments: object) -> Iterator[tuple[BaseProcess, Connection]]:
    """Run a function of this module in a process of its own; killed at the end if it still runs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        ours.close()


def commit_forever(pipe: Connection, factory: LogFactory, topic: str, state: str) -> None:
    """Copy each record to `state` and move the position past it, one transaction each."""
    log = factory()
    consumer = log.consumer(topic, [topic], Recorder(), "copier")
    copied = 0
    while True:
        for got in consumer.poll(10, 0.1):
            consumer.commit([record(state, got.value)], {TopicPartition(topic, 0): got.offset + 1})
            copied += 1
            if copied == 50:
                pipe.send("under way")


def hold(pipe: Connection, factory: LogFactory, topic: str) -> None:
    """Be a member; when told, try to commit, and say what came of it."""
    log = factory()
    heard = Recorder()
    consumer = log.consumer(topic, [topic], heard, "holder")
    join(consumer)
    pipe.send("assigned")
    pipe.recv()
    try:
        consumer.commit([record(topic, b"zombie")], {TopicPartition(topic, 0): 0})
        pipe.send("committed")
    except UnmaskError as error:
        pipe.send(error.code)
    consumer.poll(1, 0.1)
    pipe.send(heard.names)
    consumer.close(PATIENCE_S)
    log.close()


def produce(pipe: Connection, factory: LogFactory, topic: str, count: int) -> None:
    """Write numbered records, small and large, a few at a time."""
    log = factory()
    writer = uuid.uuid4().bytes
    with log.producer(f"producer-{writer.hex()}") as producer:
        pipe.send("started")
        for i in range(count):
            value = number(i) if i % 3 else bytes(20_000) + number(i)
            producer.send(record(topic, value, headers={"writer": writer}))
            if i % 50 == 0:
                time.sleep(0.01)
        producer.flush(PATIENCE_S)
    log.close()
