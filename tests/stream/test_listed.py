"""The list of streams is followed record by record, and strangers cost one look a second."""

from pathlib import Path
from typing import Any

from stream.clock import FakeClock
from stream.config import LogSettings
from stream.listed import STRANGER_S, STRANGERS, Listed
from stream.log import TopicPartition, TopicSpec
from stream.records import OutRecord
from stream.sqlite_log import SqliteLog


class Counting:
    """Counts what is read."""

    def __init__(self, log: SqliteLog) -> None:
        self._log = log
        self.reads: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def read(self, partition: TopicPartition, start: int, stop: int | None = None) -> Any:
        self.reads.append((partition.partition, start))
        return self._log.read(partition, start, stop)


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    clock = FakeClock()
    log = SqliteLog(tmp_path, LogSettings(), clock)
    log.create_topics([TopicSpec("sources", 1)])
    counting = Counting(log)
    listed = Listed(counting, "sources", clock)

    def send(stream: str, value: bytes | None) -> None:
        with log.producer("test") as producer:
            producer.send(OutRecord("sources", stream, value, {}, 0))
            producer.flush(10)

    send("a", b'{"fps": 5}')
    send("b", b"no json")
    listed.read()
    assert set(listed) == {"a", "b"}
    assert (listed.fps("a"), listed.fps("b"), listed.fps("c")) == (5.0, None, None)
    version = listed.version
    listed.read()
    assert listed.version == version
    send("a", None)
    listed.read()
    assert set(listed) == {"b"}
    assert listed.version > version
    assert counting.reads == [(0, 0), (0, 2)]
    log.close()


def test_a_stranger_is_looked_for_once_a_second(tmp_path: Path) -> None:
    clock = FakeClock()
    log = SqliteLog(tmp_path, LogSettings(), clock)
    log.create_topics([TopicSpec("sources", 1)])
    listed = Listed(log, "sources", clock)
    for number in range(STRANGERS + 2):
        assert not listed.look_for(f"s{number}")
    read_at = listed.read_at
    with log.producer("test") as producer:
        producer.send(OutRecord("sources", "new", b"{}", {}, 0))
        producer.flush(10)
    clock.advance(STRANGER_S / 2)
    assert not listed.look_for(f"s{STRANGERS + 1}")
    assert listed.read_at == read_at
    assert listed.look_for("new")
    clock.advance(STRANGER_S)
    assert not listed.look_for(f"s{STRANGERS + 1}")
    assert listed.read_at > read_at
    log.close()


def test_labels_are_those_of_the_entry(tmp_path: Path) -> None:
    clock = FakeClock()
    log = SqliteLog(tmp_path, LogSettings(), clock)
    log.create_topics([TopicSpec("sources", 1)])
    with log.producer("test") as producer:
        producer.send(OutRecord("sources", "a", b'{"labels": {"site": "berlin"}}', {}, 0))
        producer.send(OutRecord("sources", "b", b'{"labels": "no object"}', {}, 0))
        producer.flush(10)
    listed = Listed(log, "sources", clock)
    listed.read()
    assert listed.labels("a") == {"site": "berlin"}
    assert listed.labels("b") == {}
    assert listed.labels("nobody") == {}
