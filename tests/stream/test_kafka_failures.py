"""Members and brokers die, stop and come back: real processes, real signals, every record exactly once."""

import multiprocessing
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from kafka.admin import KafkaAdminClient

from stream.clock import SystemClock
from stream.config import Kafka
from stream.errors import Code, UnmaskError
from stream.kafka_log import KafkaLog
from stream.log import Consumer, Log, LogFactory, TopicPartition, TopicSpec
from stream.records import OutRecord, Record
from tests.conftest import requires
from tests.stream.kafka_broker import Broker
from tests.stream.log_contract import PATIENCE_S, everything, number, numbers, record

SESSION_S = 6.0
"""The least that brokers allow."""

MESSAGE_BYTES = 1024 * 1024

PAGE = 5
"""Records of one transaction: few, so that a kill has many to hit."""


def opener(servers: str, replication: int = 1) -> LogFactory:
    settings = Kafka(bootstrap_servers=servers, replication=replication, session_s=SESSION_S)
    return partial(KafkaLog, settings, MESSAGE_BYTES, SystemClock())


class Copier:
    """Copies `source` to `target`, each page with its positions in one transaction, until it is ended.

    Tells what happens to it through `pipe`, as `(what, how many)`.
    """

    def __init__(self, pipe: Connection, log: Log, source: str, target: str, name: str) -> None:
        self.pipe = pipe
        self.target = target
        self.consumer: Consumer = log.consumer(source, [source], self, name)

    def assigned(self, partitions: Collection[TopicPartition]) -> None:
        self.pipe.send(("assigned", len(partitions)))

    def revoked(self, partitions: Collection[TopicPartition]) -> None:
        self.pipe.send(("revoked", len(partitions)))

    def lost(self, partitions: Collection[TopicPartition]) -> None:
        self.pipe.send(("lost", len(partitions)))

    def run(self) -> None:
        while True:
            try:
                got = self.consumer.poll(PAGE, 0.2)
            except UnmaskError as error:
                if error.code is Code.LOG_AWAY:
                    continue
                raise
            if got:
                self.copy(got)

    def copy(self, got: Collection[Record]) -> None:
        outputs = [OutRecord(self.target, r.key, r.value, {}, r.timestamp_us, r.partition) for r in got]
        positions = {TopicPartition(r.topic, r.partition): r.offset + 1 for r in got}
        while True:
            try:
                self.consumer.commit(outputs, positions)
            except UnmaskError as error:
                if error.code is Code.LOG_AWAY:
                    continue
                if error.code is not Code.LOG_FENCED:
                    raise
                self.pipe.send(("fenced", len(got)))
                return
            self.pipe.send(("copied", len(got)))
            return


def copy(pipe: Connection, factory: LogFactory, source: str, target: str, name: str) -> None:
    Copier(pipe, factory(), source, target, name).run()


class Workers:
    """Copiers in processes of their own."""

    def __init__(self, factory: LogFactory, source: str, target: str) -> None:
        self._arguments = factory, source, target
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[str, multiprocessing.process.BaseProcess] = {}
        self._pipes: dict[str, Connection] = {}
        self.heard: dict[str, list[str]] = {}
        self.held: Counter[str] = Counter()
        self.copied: Counter[str] = Counter()

    def start(self, name: str) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=copy, args=(theirs, *self._arguments, name), daemon=True)
        process.start()
        theirs.close()
        self._processes[name], self._pipes[name] = process, ours
        self.heard[name], self.held[name] = [], 0

    def signal(self, name: str, number: int) -> None:
        pid = self._processes[name].pid
        assert pid is not None
        os.kill(pid, number)

    def listen(self) -> None:
        for name, pipe in self._pipes.items():
            with suppress(EOFError):
                while pipe.poll():
                    what, count = pipe.recv()
                    if what == "copied":
                        self.copied[name] += count
                        continue
                    self.heard[name].append(what)
                    self.held[name] += {"assigned": count, "revoked": -count, "lost": -count}.get(what, 0)

    def until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < end, f"waited {PATIENCE_S} s: {self.heard}, {dict(self.copied)}"
            self.listen()
            time.sleep(0.05)

    def end(self) -> None:
        for name, process in self._processes.items():
            if process.is_alive():
                self.signal(name, signal.SIGKILL)
            process.join()


@pytest.fixture
def name() -> str:
    return f"failures-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def workers(request: pytest.FixtureRequest) -> Iterator[Callable[[LogFactory, str, str], Workers]]:
    made: list[Workers] = []

    def make(factory: LogFactory, source: str, target: str) -> Workers:
        made.append(Workers(factory, source, target))
        return made[-1]

    yield make
    for workers in made:
        workers.end()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_members_are_killed_and_stopped_and_every_record_is_copied_once(
    servers: str, name: str, workers: Callable[[LogFactory, str, str], Workers]
) -> None:
    source, target, count = f"{name}-in", f"{name}-out", 1000
    factory = opener(servers)
    log = factory()
    log.create_topics([TopicSpec(source, 6), TopicSpec(target, 6)])
    group = workers(factory, source, target)
    for member in ("a", "b", "c"):
        group.start(member)
    with log.producer(name) as producer:
        sent = iter(range(count))

        def feed(n: int) -> None:
            for _, i in zip(range(n), sent, strict=False):
                producer.send(record(source, number(i), partition=i % 6))
            producer.flush(PATIENCE_S)

        group.until(lambda: all(group.held[member] == 2 for member in "abc"))
        feed(200)
        group.until(lambda: all(group.copied[member] for member in "abc"))
        group.signal("a", signal.SIGKILL)
        feed(200)
        group.until(lambda: group.copied.total() > 200)
        # Stopped at any moment, in a transaction perhaps, for longer than the session lasts.
        group.signal("b", signal.SIGSTOP)
        feed(200)
        copied = group.copied["c"]
        group.until(lambda: group.copied["c"] > copied + 100)
        time.sleep(SESSION_S)
        group.signal("b", signal.SIGCONT)
        group.until(lambda: "lost" in group.heard["b"])
        group.until(lambda: group.held["b"] > 0)
        group.start("a")
        feed(200)
        group.until(lambda: group.held["a"] > 0)
        group.signal("c", signal.SIGKILL)
        copied_by_b = group.copied["b"]
        feed(200)
        group.until(lambda: len(everything(log, target)) >= count)
        group.until(lambda: group.copied["b"] > copied_by_b)
    assert sorted(numbers(everything(log, target))) == list(range(count))
    log.close()


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Broker]:
    requires("java", "mvn")
    broker = Broker(tmp_path / "kafka", tmp_path, "--nodes", "3")
    yield broker
    broker.stop()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_leader_and_controller_are_killed_under_a_producer_and_members(
    three: Broker, name: str, workers: Callable[[LogFactory, str, str], Workers]
) -> None:
    source, target = f"{name}-in", f"{name}-out"
    factory = opener(three.servers, replication=3)
    log = factory()
    assert isinstance(log, KafkaLog)
    log.create_topics([TopicSpec(source, 4), TopicSpec(target, 4)])
    group = workers(factory, source, target)
    group.start("a")
    group.start("b")
    producer = log.producer(name, insistent=True)
    count = 0

    def feed() -> None:
        nonlocal count
        for _ in range(100):
            producer.send(record(source, number(count), partition=count % 4))
            count += 1

    group.until(lambda: group.held["a"] == group.held["b"] == 2)
    for victim in (leader(three, source), controller(three)):
        feed()
        three.kill(victim)
        feed()
        producer.flush(PATIENCE_S)
        group.until(lambda: set(numbers(everything(log, target))) == set(range(count)))
        three.start_again(victim)
    feed()
    producer.close(PATIENCE_S)
    assert producer.dropped == 0
    group.until(lambda: len(everything(log, target)) >= len(everything(log, source)))
    written = numbers(everything(log, source))
    assert set(written) == set(range(count))
    assert sorted(numbers(everything(log, target))) == sorted(written)
    log.close()


def leader(broker: Broker, topic: str) -> int:
    with KafkaAdminClient(bootstrap_servers=broker.servers) as admin:
        return int(admin.describe_topics([topic])[0]["partitions"][0]["leader_id"])


def controller(broker: Broker) -> int:
    with KafkaAdminClient(bootstrap_servers=broker.servers) as admin:
        return int(admin.describe_cluster()["controller_id"])
