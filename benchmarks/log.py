"""What the embedded log carries: media in, small records, commits, and what it costs in CPU.

    python benchmarks/log.py [--directory DIR] [--seconds S] [--json FILE]

Prints a table; `--json` writes the same figures with the machine's data.
"""

import argparse
import json
import os
import platform
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

from stream.clock import SystemClock
from stream.config import LogSettings
from stream.log import Cleanup, TopicPartition, TopicSpec
from stream.records import OutRecord
from stream.sqlite_log import SqliteLog

CHUNK = os.urandom(512 * 1024)
"""A chunk of 500 ms at 8 Mbit/s."""

SCORE = os.urandom(1500)
STATE = os.urandom(20_000)
HEADERS = {f"header-{i}": b"0123456789abcdef" for i in range(14)}
"""As many as a chunk has."""

Figures = dict[str, float]


class Silent:
    def assigned(self, partitions: Collection[TopicPartition]) -> None: ...

    def revoked(self, partitions: Collection[TopicPartition]) -> None: ...

    def lost(self, partitions: Collection[TopicPartition]) -> None: ...


def append(log: SqliteLog, seconds: float, topic: str, value: bytes) -> Figures:
    """Send as fast as the producer takes it."""
    count = 0
    with log.producer("bench") as producer:
        start, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds:
            for _ in range(10):
                producer.send(OutRecord(topic, f"s{count % 8}", value, HEADERS, count))
                count += 1
        producer.flush(60)
        return rates(count, len(value), time.perf_counter() - start, time.process_time() - cpu)


def paced(log: SqliteLog, seconds: float) -> Figures:
    """Send 8 feeds of 8 Mbit/s at their own speed: what the log takes of a core."""
    count = 0
    with log.producer("bench") as producer:
        start, cpu = time.perf_counter(), time.process_time()
        while (elapsed := time.perf_counter() - start) < seconds:
            while count < elapsed * 16:
                producer.send(OutRecord("media", f"s{count % 8}", CHUNK, HEADERS, count))
                count += 1
            time.sleep(0.01)
        return rates(count, len(CHUNK), time.perf_counter() - start, time.process_time() - cpu)


def consume(log: SqliteLog, seconds: float) -> Figures:
    """Poll what `append` left in `media`."""
    consumer = log.consumer("bench", ["media"], Silent(), "bench")
    count = size = 0
    start, cpu = time.perf_counter(), time.process_time()
    while records := consumer.poll(100, 0.1):
        count += len(records)
        size += sum(len(record.value or b"") for record in records)
    taken, spent = time.perf_counter() - start, time.process_time() - cpu
    consumer.close(5)
    return rates(count, size // max(1, count), taken, spent)


def commit(log: SqliteLog, seconds: float) -> Figures:
    """Commit one state record, eight scores and the position, one transaction after the other."""
    consumer = log.consumer("commit", ["media"], Silent(), "bench")
    while not consumer.assignment():
        consumer.poll(1, 0.1)
    outputs = [OutRecord("scores", "s", SCORE, {}, 0)] * 8 + [OutRecord("state", "s", STATE, {}, 0)]
    times: list[float] = []
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        consumer.commit(outputs, {TopicPartition("media", 0): len(times)})
        times.append(time.perf_counter() - before)
    taken, spent = time.perf_counter() - start, time.process_time() - cpu
    consumer.close(5)
    slowest = statistics.quantiles(times, n=100)[98] * 1000
    return {"per_s": len(times) / taken, "p99_ms": slowest, "cores": spent / taken}


def latency(log: SqliteLog, seconds: float) -> Figures:
    """Measure from `send` to `poll` for single records, 20 a second."""
    consumer = log.consumer("latency", ["ping"], Silent(), "bench")
    while not consumer.assignment():
        consumer.poll(1, 0.1)
    times = []
    with log.producer("ping") as producer:
        for _ in range(round(seconds * 20)):
            before = time.perf_counter()
            producer.send(OutRecord("ping", "s", b"", {}, 0))
            while not consumer.poll(10, 1.0):
                pass
            times.append((time.perf_counter() - before) * 1000)
            time.sleep(0.05)
    consumer.close(5)
    return {"p50_ms": statistics.median(times), "p99_ms": statistics.quantiles(times, n=100)[98]}


def idle(log: SqliteLog, seconds: float) -> Figures:
    """Poll where nothing comes."""
    consumer = log.consumer("idle", ["ping"], Silent(), "bench")
    consumer.poll(10, 1.0)
    consumer.seek(TopicPartition("ping", 0), log.end_offset(TopicPartition("ping", 0)))
    start, cpu = time.perf_counter(), time.process_time()
    consumer.poll(10, seconds)
    taken, spent = time.perf_counter() - start, time.process_time() - cpu
    consumer.close(5)
    return {"cores": spent / taken}


def rates(count: int, size: int, seconds: float, cpu: float) -> Figures:
    return {"per_s": count / seconds, "mb_per_s": count * size / seconds / 1e6, "cores": cpu / seconds}


def measure(directory: Path, seconds: float, settings: LogSettings) -> dict[str, Figures]:
    log = SqliteLog(directory, settings, SystemClock())
    log.create_topics(
        [
            TopicSpec("media", 8),
            TopicSpec("scores", 8),
            TopicSpec("state", 8, Cleanup.COMPACT),
            TopicSpec("ping", 1),
        ]
    )
    steps: dict[str, Callable[[], Figures]] = {
        "append media, 512 kB": lambda: append(log, seconds, "media", CHUNK),
        "poll media, 512 kB": lambda: consume(log, seconds),
        "append scores, 1.5 kB": lambda: append(log, seconds, "scores", SCORE),
        "commit 8 scores + state": lambda: commit(log, seconds),
        "send to poll": lambda: latency(log, seconds),
        "idle poll": lambda: idle(log, seconds),
        "8 feeds of 8 Mbit/s": lambda: paced(log, seconds),
    }
    figures = {name: step() for name, step in steps.items()}
    log.close()
    return figures


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary one)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    chosen = parser.parse_args()
    results = {}
    for settings in (LogSettings(synchronous="NORMAL"), LogSettings(synchronous="FULL")):
        scratch = Path(tempfile.mkdtemp(prefix="unmask-log-", dir=chosen.directory))
        try:
            results[settings.synchronous] = measure(scratch, chosen.seconds, settings)
        finally:
            shutil.rmtree(scratch)
    columns = ["per_s", "mb_per_s", "p50_ms", "p99_ms", "cores"]
    print(f"{'synchronous':12} {'':26}" + "".join(f"{name:>11}" for name in columns))
    for mode, figures in results.items():
        for name, row in figures.items():
            cells = (f"{row[column]:11.3f}" if column in row else " " * 11 for column in columns)
            print(f"{mode:12} {name:26}{''.join(cells)}")
    if chosen.json:
        versions = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
        machine = {"cores": os.cpu_count(), **versions}
        chosen.json.write_text(json.dumps({"machine": machine, "figures": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
