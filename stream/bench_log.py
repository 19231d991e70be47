"""What a log carries, and what that costs: chunks in and out, small records, commits with outputs."""

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from stream.errors import Code, UnmaskError
from stream.log import Cleanup, Consumer, Log, Producer, TopicPartition, TopicSpec
from stream.profile import Figure, Of, Spread, Step, log_figure
from stream.records import OutRecord

LARGE = os.urandom(300_000)
"""A chunk of 500 ms at 4.8 Mbit/s. Random, as video is to a compressor."""
SMALL = os.urandom(30_000)
"""The same at 0.5 Mbit/s."""
SCORE = (b'{"type":"frame","stream":"camera-17","media_us":1700000000000000,"faces":[0.123]}' * 20)[:1500]
"""Text, which a compressor shrinks, as it does scores."""
STATE = (b'{"aggregate":[1.25,0.5],"tracks":{"17":{"logits":[0.25,-1.75,3.5]}}}' * 400)[:20_000]
HEADERS = {f"header-{number}": b"0123456789abcdef" for number in range(14)}
"""As many as a chunk has."""
SCORES_A_COMMIT = 8
"""Eight streams looked at twice a second, committed twice a second."""

PARTITIONS = 8
FLUSH_S = 60.0
POLL_RECORDS = 100
SILENT_S = 20.0
"""Nothing read for so long: records are missing."""
REPEAT_BYTES = 128 * 1024 * 1024
"""Appended at most in one repeat: no disk fills, however quick the log."""
ALONE_MAX = 2000

RETENTION_S = 600.0

MEASURED = {
    Step.APPEND_LARGE: ("chunk of 300 kB appended", LARGE),
    Step.APPEND_SMALL: ("chunk of 30 kB appended", SMALL),
    Step.APPEND_RECORD: ("record of 1.5 kB appended", SCORE),
}

Clock = Callable[[], float]
"""CPU seconds that somebody has used so far."""


@dataclass(frozen=True, slots=True)
class Taken:
    """One repeat: how many pieces of work, seconds by the wall clock, CPU seconds of each party."""

    count: int
    wall_s: float
    cpu_s: Mapping[Of, float]


class LogBench:
    """Measures one log. `topics` are made below `prefix`; whoever gave the log removes them.

    `parties` are those whose CPU seconds count, with a way to read them: this process, perhaps the broker.
    """

    def __init__(self, log: Log, prefix: str, parties: Mapping[Of, Clock], of: Of) -> None:
        self._log = log
        self._prefix = prefix
        self._parties = parties
        self._of = of
        self._written: Counter[str] = Counter()
        log.create_topics(self.specs(prefix))

    @staticmethod
    def specs(prefix: str) -> list[TopicSpec]:
        """Return the topics that are needed."""
        names = [f"{prefix}.{topic}" for topic in ("large", "small", "record")]
        kept = [TopicSpec(name, PARTITIONS, Cleanup.DELETE, RETENTION_S) for name in names]
        return [*kept, TopicSpec(f"{prefix}.state", PARTITIONS, Cleanup.COMPACT)]

    @staticmethod
    def groups(prefix: str) -> list[str]:
        """Return the consumer groups that are left behind."""
        return [f"{prefix}.{topic}.readers" for topic in ("large", "small")]

    def run(self, seconds: float, repeats: int, told: Callable[[str], None]) -> dict[str, Figure]:
        """Return every figure; each repeat of each takes about `seconds`."""
        figures: dict[str, Figure] = {}
        for step, topic in (
            (Step.APPEND_LARGE, "large"),
            (Step.APPEND_SMALL, "small"),
            (Step.APPEND_RECORD, "record"),
        ):
            unit, value = MEASURED[step]
            taken = [self._append(topic, value, seconds) for _ in range(repeats)]
            figures |= self._figures(step, unit, len(value), taken, told)
        taken = [self._alone(seconds) for _ in range(repeats)]
        unit = "transaction of one 30 kB chunk"
        figures |= self._figures(Step.APPEND_ALONE, unit, len(SMALL), taken, told)
        for step, topic, value in ((Step.POLL_LARGE, "large", LARGE), (Step.POLL_SMALL, "small", SMALL)):
            taken = self._poll(topic, repeats)
            figures |= self._figures(step, f"chunk of {len(value) // 1000} kB read", len(value), taken, told)
        taken = self._commit(seconds, repeats)
        unit = f"transaction of {SCORES_A_COMMIT} scores, a state and a position"
        size = SCORES_A_COMMIT * len(SCORE) + len(STATE)
        return figures | self._figures(Step.COMMIT, unit, size, taken, told)

    def _append(self, topic: str, value: bytes, seconds: float) -> Taken:
        """Send as fast as the producer takes it, until all of it is durable."""
        most = REPEAT_BYTES // len(value)
        with self._producer(topic, value) as producer:
            meter, count = Meter(self._parties), 0
            while count < most and meter.wall_s() < seconds:
                for _ in range(10):
                    producer.send(self._record(topic, count, value))
                    count += 1
            producer.flush(FLUSH_S)
            self._written[topic] += count
            return meter.taken(count)

    def _alone(self, seconds: float) -> Taken:
        """Send one and wait until it is durable, over and over: what a transaction costs."""
        with self._producer("small", SMALL) as producer:
            meter, count = Meter(self._parties), 0
            while count < ALONE_MAX and meter.wall_s() < seconds:
                producer.send(self._record("small", count, SMALL))
                producer.flush(FLUSH_S)
                count += 1
            self._written["small"] += count
            return meter.taken(count)

    def _poll(self, topic: str, repeats: int) -> list[Taken]:
        """Read back what the last appends left there, from its begin each time."""
        name = f"{self._prefix}.{topic}"
        partitions = [TopicPartition(name, number) for number in range(PARTITIONS)]
        begins = {partition: self._log.begin_offset(partition) for partition in partitions}
        with self._member(name) as consumer:
            return [self._drain(consumer, begins, self._written[topic]) for _ in range(repeats)]

    def _drain(self, consumer: Consumer, begins: Mapping[TopicPartition, int], count: int) -> Taken:
        for partition, begin in begins.items():
            consumer.seek(partition, begin)
        meter, found = Meter(self._parties), 0
        while found < count:
            records = consumer.poll(POLL_RECORDS, SILENT_S)
            if not records:
                raise UnmaskError(
                    Code.LOG_UNUSABLE, f"{found} of {count} records came back in {SILENT_S:g} s"
                )
            found += len(records)
        return meter.taken(found)

    def _commit(self, seconds: float, repeats: int) -> list[Taken]:
        """Commit scores, a state and a position, one transaction after the other."""
        scores = [self._record("record", number, SCORE) for number in range(SCORES_A_COMMIT)]
        outputs = [*scores, self._record("state", 0, STATE)]
        partition = TopicPartition(f"{self._prefix}.large", 0)
        with self._member(partition.topic) as consumer:
            self._commits(consumer, outputs, partition, 0.0)
            return [self._commits(consumer, outputs, partition, seconds) for _ in range(repeats)]

    def _commits(
        self, consumer: Consumer, outputs: Sequence[OutRecord], partition: TopicPartition, seconds: float
    ) -> Taken:
        begin = self._log.begin_offset(partition)
        meter, count = Meter(self._parties), 0
        while count == 0 or (count < ALONE_MAX and meter.wall_s() < seconds):
            consumer.commit(outputs, {partition: begin + count % 2})
            count += 1
        return meter.taken(count)

    @contextmanager
    def _producer(self, topic: str, value: bytes) -> Iterator[Producer]:
        """Return a producer that has written one record: the first finds the way and makes the files."""
        with self._log.producer("bench") as producer:
            producer.send(self._record(topic, 0, value))
            producer.flush(FLUSH_S)
            self._written[topic] += 1
            yield producer

    @contextmanager
    def _member(self, topic: str) -> Iterator[Consumer]:
        """Join a group of one, which has every partition before this returns."""
        consumer = self._log.consumer(f"{topic}.readers", [topic], _Silent(), "bench")
        try:
            end = time.monotonic() + FLUSH_S
            while len(consumer.assignment()) < PARTITIONS:
                consumer.poll(1, 0.1)
                if time.monotonic() > end:
                    sentence = f"no partition of {topic} was assigned in {FLUSH_S:g} s"
                    raise UnmaskError(Code.LOG_UNUSABLE, sentence)
            yield consumer
        finally:
            consumer.close(FLUSH_S)

    def _record(self, topic: str, number: int, value: bytes) -> OutRecord:
        return OutRecord(f"{self._prefix}.{topic}", f"s{number % 64}", value, HEADERS, time.time_ns() // 1000)

    def _figures(
        self, step: Step, unit: str, size: int, taken: Sequence[Taken], told: Callable[[str], None]
    ) -> dict[str, Figure]:
        how = f"{len(taken)} times {taken[0].wall_s:.1f} s as fast as it goes, one writer or reader"
        figures = {}
        for party in self._parties:
            figure = Figure(
                unit,
                Spread.of([one.cpu_s[party] / one.count for one in taken]),
                Spread.of([one.count / one.wall_s for one in taken]),
                how,
                size,
            )
            figures[log_figure(party, step)] = figure
        told(row(log_figure(self._of, step), figures[log_figure(self._of, step)]))
        return figures


class Meter:
    """Wall and CPU seconds since it was made."""

    def __init__(self, parties: Mapping[Of, Clock]) -> None:
        self._parties = parties
        self._cpu = {party: counter() for party, counter in parties.items()}
        self._start = time.perf_counter()

    def wall_s(self) -> float:
        return time.perf_counter() - self._start

    def taken(self, count: int) -> Taken:
        spent = {party: counter() - self._cpu[party] for party, counter in self._parties.items()}
        return Taken(count, self.wall_s(), spent)


class _Silent:
    def assigned(self, partitions: Collection[TopicPartition]) -> None: ...

    def revoked(self, partitions: Collection[TopicPartition]) -> None: ...

    def lost(self, partitions: Collection[TopicPartition]) -> None: ...


def row(name: str, figure: Figure) -> str:
    """Return a figure as one line."""
    rate, cpu = figure.per_s, figure.cpu_s
    size = f"{rate.median * figure.size / 1e6:9.1f} MB/s" if figure.size else " " * 14
    return (
        f"{name:28} {rate.median:10.1f}/s ({rate.low:.1f} to {rate.high:.1f}) {size}"
        f"  {1000 * cpu.median:.3g} ms of a core each ({1000 * cpu.low:.3g} to {1000 * cpu.high:.3g})"
    )
