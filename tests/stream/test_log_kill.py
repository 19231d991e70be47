"""kill -9 at any point: nothing acknowledged is lost, nothing half-written is read, nothing left behind."""

import hashlib
import os
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

from stream.clock import SystemClock
from stream.config import LogSettings
from stream.log import Cleanup, TopicPartition, TopicSpec
from stream.sqlite_log import SqliteLog
from tests.stream.log_contract import Recorder, numbers, record

KILLS = 15
LONGEST_LIFE_S = 0.5
"""From before the log is opened: the child dies while opening, writing, committing or maintaining."""

IN, OUT, STATE, MEDIA = (TopicPartition(name, 0) for name in ("in", "out", "state", "media"))
TOPICS = [
    TopicSpec("in", 1),
    TopicSpec("out", 1),
    TopicSpec("state", 1, Cleanup.COMPACT),
    TopicSpec("media", 1, retention_bytes=500_000),
]


@pytest.mark.slow
@pytest.mark.parametrize("synchronous", ["NORMAL", "FULL"])
def test_killed_again_and_again(tmp_path: Path, synchronous: Literal["NORMAL", "FULL"]) -> None:
    directory, acknowledged = tmp_path / "log", tmp_path / "acknowledged"
    acknowledged.touch()
    chance = random.Random(synchronous)
    for _ in range(KILLS):
        command = [sys.executable, "-m", __name__, str(directory), str(acknowledged), synchronous]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            assert child.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0, LONGEST_LIFE_S))
            child.kill()
            child.wait()
            assert child.returncode == -9, child.stderr.read().decode()
        check(directory, acknowledged.read_text().splitlines())
    copied, removed = progress(directory)
    assert copied > 0
    assert removed > 0


def check(directory: Path, acknowledged: list[str]) -> None:
    """Compare what a fresh reader finds with what the child was promised."""
    promised = {"in": 0, "media": 0, "commit": 0}
    for line in acknowledged:
        kind, following = line.split()
        promised[kind] = int(following)
    log = SqliteLog(directory, LogSettings(), SystemClock())
    log.create_topics(TOPICS)  # the child may have died before it got there
    for partition in (IN, MEDIA):
        begin, end = log.begin_offset(partition), log.end_offset(partition)
        assert end >= promised[partition.topic]
        assert [r.value for r in log.read(partition, begin)] == [value(n) for n in range(begin, end)]
    position = log.group_position("copiers", IN) or 0
    assert position >= promised["commit"]
    assert numbers(list(log.read(OUT, 0))) == list(range(position))
    state = numbers(list(log.read(STATE, 0)))
    assert state == ([position] if position else [])
    log.close()
    with sqlite3.connect(directory / "log.sqlite") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        named = {row[0] for row in connection.execute("SELECT name FROM segments")}
    connection.close()
    assert {path.name for path in (directory / "segments").iterdir()} == named


def progress(directory: Path) -> tuple[int, int]:
    log = SqliteLog(directory, LogSettings(), SystemClock())
    found = log.group_position("copiers", IN) or 0, log.begin_offset(MEDIA)
    log.close()
    return found


def value(n: int) -> bytes:
    """Every third is large, so goes to a segment."""
    seed = hashlib.blake2b(str(n).encode()).digest()
    return seed * (300 if n % 3 == 0 else 1)


def work(directory: Path, acknowledged: Path, synchronous: Literal["NORMAL", "FULL"]) -> None:
    """Append, copy with exactly-once commits, apply retention; note each promise durably, until killed."""
    notes = os.open(acknowledged, os.O_WRONLY | os.O_APPEND)

    def note(kind: str, following: int) -> None:
        os.write(notes, f"{kind} {following}\n".encode())
        os.fsync(notes)

    print("ready", flush=True)
    log = SqliteLog(directory, LogSettings(segment_bytes=200_000, synchronous=synchronous), SystemClock())
    log.create_topics(TOPICS)
    producer = log.producer("writer")
    consumer = log.consumer("copiers", ["in"], Recorder(), "copier")
    counts = {partition: log.end_offset(partition) for partition in (IN, MEDIA)}
    turn = 0
    while True:
        for partition in (IN, MEDIA):
            for _ in range(15):
                producer.send(record(partition.topic, value(counts[partition])))
                counts[partition] += 1
        producer.flush(30)
        for partition in (IN, MEDIA):
            note(partition.topic, counts[partition])
        for got in consumer.poll(15, 0.0):
            following = got.offset + 1
            outputs = [
                record("out", got.offset.to_bytes(8, "big")),
                record("state", following.to_bytes(8, "big")),
            ]
            consumer.commit(outputs, {IN: following})
            note("commit", following)
        turn += 1
        if turn % 3 == 0:
            log.maintain()


if __name__ == "__main__":
    durability: Literal["NORMAL", "FULL"] = "FULL" if sys.argv[3] == "FULL" else "NORMAL"
    work(Path(sys.argv[1]), Path(sys.argv[2]), durability)
