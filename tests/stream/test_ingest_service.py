"""`unmask ingest` as processes over both logs: shares of `sources`, handover, outages, bad entries."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from stream.assemble import open_log
from stream.claims import Claim, read_standings
from stream.clock import SystemClock
from stream.config import Config, Ingest, Kafka, Media, Worker
from stream.config_file import to_yaml
from stream.log import Log, TopicPartition
from stream.records import ChunkMeta, Control, OutRecord, decode_headers
from stream.topics import media_partition, topic_specs
from tests.stream.kafka_broker import Broker
from tests.stream.live import LiveFeed, live_feed, make_feed
from tests.stream.media import make_clip

UNMASK = Path(sys.executable).with_name("unmask")

QUICK = Ingest(tick_s=0.3, backoff_first_s=0.2, backoff_max_s=0.5, shard_size=4)


@pytest.fixture(scope="module")
def feed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_feed(tmp_path_factory.mktemp("feed"))


@pytest.fixture
def feed(feed_file: Path) -> Iterator[LiveFeed]:
    with live_feed(feed_file) as made:
        yield made


class Bench:
    """Ingest processes over one log, and what a test asks of it."""

    def __init__(self, folder: Path, servers: str) -> None:
        self.folder = folder
        self.servers = servers
        self.prefix = f"t{secrets.token_hex(4)}"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.config = self._config("main")
        log = open_log(self.config, SystemClock())
        log.create_topics(topic_specs(self.config))
        self._log: Log | None = log

    def _config(self, name: str) -> Config:
        return Config(
            data_dir=str(self.folder / name),
            prefix=self.prefix,
            kafka=Kafka(bootstrap_servers=self.servers, replication=1),
            media=Media(partitions=2, chunk_ms=200),
            ingest=QUICK,
            worker=Worker(shutdown_s=6.0),
        )

    @property
    def log(self) -> Log:
        if self._log is None:
            self._log = open_log(self.config, SystemClock())
        return self._log

    def let_log_go(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def settings(self, name: str = "main") -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(to_yaml(self._config(name)))
        return path

    def ingest(self, name: str = "main", **environ: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as out:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "from stream.cli import main; main()",
                    "ingest",
                    "--config",
                    self.settings(name),
                ],
                stdout=out,
                stderr=out,
                env=os.environ | environ,
            )
        self.processes.append(process)
        return process

    def unmask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable,
                "-c",
                "from stream.cli import main; main()",
                *arguments,
                "--config",
                self.settings(),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def entry(self, key: str, value: bytes | None, partition: int | None = None) -> None:
        with self.log.producer(f"test-{secrets.token_hex(4)}") as producer:
            producer.send(OutRecord(f"{self.prefix}.sources", key, value, {}, 1, partition))

    def attach(self, stream: str, address: str) -> None:
        self.entry(stream, json.dumps({"id": stream, "url": address}).encode())

    def records(self, topic: str) -> list[Any]:
        found: list[Any] = []
        for number in range(self.log.partitions(f"{self.prefix}.{topic}")):
            partition = TopicPartition(f"{self.prefix}.{topic}", number)
            found += self.log.read(partition, self.log.begin_offset(partition))
        return found

    def media(self, stream: str) -> list[ChunkMeta]:
        """Return what detect would take of a stream: what is newer than all before it."""
        metas = [
            decode_headers(record.key, record.headers)
            for record in self.records("media")
            if record.key == stream
        ]
        taken: list[ChunkMeta] = []
        for meta in metas:
            if not taken or meta.order() > taken[-1].order():
                taken.append(meta)
        return taken

    def chunks(self, stream: str) -> int:
        return sum(meta.control is None for meta in self.media(stream))

    def controls(self, stream: str) -> list[Control]:
        return [meta.control for meta in self.media(stream) if meta.control not in (None, Control.TICK)]

    def until(self, reached: Callable[[], bool], seconds: float = 40.0) -> None:
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, f"not reached\n{self.told()}"
            time.sleep(0.2)

    def spools(self) -> list[Path]:
        return list((self.folder / "main" / "ingest").glob("*/*.spool"))

    def told(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.let_log_go()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Over the embedded log."""
    made = Bench(tmp_path, "")
    yield made
    made.close()


@pytest.fixture
def cluster(servers: str, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, servers)
    yield made
    made.close()


def whole(metas: Sequence[ChunkMeta]) -> None:
    """Every attachment has all its records from its start on; attachments rise, and media time with them."""
    expected: dict[str, int] = {}
    for meta in metas:
        assert meta.sequence == expected.get(meta.attachment, 0), f"{meta.attachment} {meta.sequence}"
        expected[meta.attachment] = meta.sequence + 1
    assert list(expected) == sorted(expected)
    times = [meta.media_us(meta.pts) for meta in metas if meta.pts is not None]
    assert times == sorted(times)


def test_feeds_come_and_go_and_others_do_not_notice(cluster: Bench, feed_file: Path) -> None:
    service = cluster.ingest()
    with live_feed(feed_file) as one, live_feed(feed_file) as two, live_feed(feed_file) as moved:
        cluster.attach("one", one.address)
        cluster.attach("two", two.address)
        cluster.until(lambda: cluster.chunks("one") > 3 and cluster.chunks("two") > 3)
        cluster.attach("two", moved.address)
        cluster.until(lambda: moved.connections == 1 and two.readers == 0)
        cluster.until(lambda: cluster.controls("two") == [Control.START, Control.START])
        cluster.entry("two", None)
        cluster.until(lambda: Control.END in cluster.controls("two") and moved.readers == 0)
        service.send_signal(signal.SIGTERM)
        assert service.wait(15) == 0, cluster.told()
        assert cluster.controls("one") == [Control.START]
        assert (one.connections, one.most_readers) == (1, 1)
        before = cluster.media("one")[-1].attachment
        cluster.ingest()
        cluster.until(lambda: cluster.media("one")[-1].attachment > before and cluster.chunks("one") > 6)
        assert (one.connections, one.most_readers) == (2, 1)
    whole(cluster.media("one"))
    whole(cluster.media("two"))


def test_bad_entries_are_told_once_and_stop_nothing(bench: Bench, feed: LiveFeed) -> None:
    count = bench.log.partitions(f"{bench.prefix}.sources")
    bench.entry("nonsense", b"no json")
    bench.entry("secret", b'{"url": "rtmp://user:hunter22@host/live/x"}')
    bench.entry("Upper Case", b'{"url": "tcp://127.0.0.1:1"}')
    bench.entry(
        "misplaced", b'{"url": "tcp://127.0.0.1:1"}', (media_partition("misplaced", count) + 1) % count
    )
    bench.entry("other", b'{"id": "another", "url": "tcp://127.0.0.1:1"}')
    bench.attach("good", feed.address)
    for enough in (1, 8):  # the second time as a new owner of all partitions
        service = bench.ingest()
        bench.until(partial(_attached, bench, "good", enough))
        bench.until(lambda: len(bench.records("deadletter")) >= 5)
        service.send_signal(signal.SIGTERM)
        assert service.wait(15) == 0
    letters = bench.records("deadletter")
    reasons = {letter.key: letter.headers["dead_reason"].decode() for letter in letters}
    assert len(letters) == 5
    assert "no JSON" in reasons["nonsense"]
    assert "env:NAME" in reasons["secret"]
    assert "not allowed" in reasons["Upper Case"]
    assert "CRC-32" in reasons["misplaced"]
    assert "another" in reasons["other"]
    assert "hunter22" not in str(letters) + bench.told()


def _ready(bench: Bench, times: int) -> bool:
    return bench.told().count("partitions of sources") == times


def _attached(bench: Bench, stream: str, chunks: int) -> bool:
    return bench.chunks(stream) >= chunks


def test_a_file_that_was_read_is_not_read_again(bench: Bench, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", seconds=1, size=(64, 48))
    bench.attach("clip", str(clip))
    for run in (1, 2):
        service = bench.ingest()
        bench.until(partial(_ready, bench, run))
        bench.until(lambda: read_standings(bench.log, bench.config, ["clip"])["clip"].claim.over != "")
        time.sleep(1.0)
        service.send_signal(signal.SIGTERM)
        assert service.wait(15) == 0
    assert bench.controls("clip") == [Control.START, Control.END]
    done = bench.unmask("attach", str(clip), "--id", "clip")
    assert done.returncode == 0, done.stderr
    bench.ingest()
    bench.until(lambda: bench.controls("clip") == 2 * [Control.START, Control.END])


def test_attachments_and_media_time_rise_whatever_the_clocks(cluster: Bench, feed: LiveFeed) -> None:
    """Who read the feed before had a clock an hour ahead of ours."""
    ahead_us = SystemClock().now_us() + 3_600_000_000
    claim = Claim(f"{ahead_us:016x}", ahead_us, "another")
    with cluster.log.producer("other") as producer:
        producer.send(claim.record(cluster.config, "feed", media_partition("feed", 2), 1))
    cluster.attach("feed", feed.address)
    cluster.ingest()
    cluster.until(lambda: cluster.chunks("feed") > 2)
    metas = cluster.media("feed")
    assert metas[0].attachment == f"{ahead_us + 1:016x}"
    assert min(meta.media_us(meta.pts) for meta in metas if meta.pts is not None) >= ahead_us
    assert all(meta.capture_us < ahead_us for meta in metas)
    claimed = read_standings(cluster.log, cluster.config, ["feed"])["feed"].claim
    assert claimed.attachment == metas[0].attachment
    assert claimed.media_end_us > ahead_us


@pytest.mark.slow
def test_members_share_feeds_and_hand_them_over(cluster: Bench, feed_file: Path) -> None:
    names = [f"s{number}" for number in range(6)]
    with contextlib.ExitStack() as stack:
        feeds = {name: stack.enter_context(live_feed(feed_file)) for name in names}
        for name, feed in feeds.items():
            cluster.attach(name, feed.address)
        first = cluster.ingest("first")
        cluster.until(lambda: all(feed.readers == 1 for feed in feeds.values()))
        second = cluster.ingest("second")
        cluster.until(lambda: _shares(second) > 0 and all(feed.readers == 1 for feed in feeds.values()))
        moved = {name for name, feed in feeds.items() if feed.connections > 1}
        assert 0 < len(moved) < len(names)
        assert all(feed.most_readers == 1 for feed in feeds.values())
        # Nobody says goodbye for the feeds of a process that stands still: its shards notice by themselves.
        first.send_signal(signal.SIGSTOP)
        cluster.until(lambda: all(feed.connections > 1 and feed.readers == 1 for feed in feeds.values()))
        first.send_signal(signal.SIGCONT)
        time.sleep(3.0)
        cluster.until(lambda: all(feed.readers == 1 for feed in feeds.values()))
        second.kill()
        cluster.until(lambda: _shares(second) == 0 and all(feed.readers == 1 for feed in feeds.values()))
        time.sleep(1.0)
        assert all(feed.most_readers == 1 for feed in feeds.values())
        first.send_signal(signal.SIGTERM)
        assert first.wait(15) == 0, cluster.told()
    for name in names:
        whole(cluster.media(name))
        assert Control.END not in cluster.controls(name)


def _shares(process: subprocess.Popen[bytes]) -> int:
    try:
        return len(psutil.Process(process.pid).children())
    except psutil.NoSuchProcess:
        return 0


@pytest.fixture
def away(broker: Broker, tmp_path: Path) -> Iterator[Bench]:
    """A bench whose broker the test may kill; it runs again in the end."""
    made = Bench(tmp_path, broker.servers)
    yield made
    if broker.running():
        _signal(broker, signal.SIGCONT)
    made.close()
    if not broker.running():
        broker.start()


def _signal(broker: Broker, number: signal.Signals) -> None:
    for file in broker.directory.glob("node-*/pid"):
        os.kill(int(file.read_text()), number)


@pytest.mark.slow
def test_a_feed_goes_on_while_the_broker_is_dead_and_all_of_it_arrives(
    away: Bench, broker: Broker, feed: LiveFeed
) -> None:
    away.attach("feed", feed.address)
    away.ingest()
    away.until(lambda: away.chunks("feed") > 3)
    away.let_log_go()
    _signal(broker, signal.SIGKILL)
    time.sleep(6.0)
    assert feed.readers == 1
    assert away.spools()
    broker.start()
    # What is sent from now on is behind what was spooled.
    back_us = SystemClock().now_us()
    away.until(lambda: away.media("feed")[-1].capture_us > back_us + 1_000_000)
    assert (feed.connections, feed.readers) == (1, 1)
    metas = away.media("feed")
    whole(metas)
    assert away.controls("feed") == [Control.START]
    away.until(lambda: not away.spools())


@pytest.mark.slow
def test_what_was_spooled_survives_the_death_of_shard_and_service(
    away: Bench, broker: Broker, feed: LiveFeed
) -> None:
    away.attach("feed", feed.address)
    service = away.ingest()
    away.until(lambda: away.chunks("feed") > 3)
    away.let_log_go()
    _signal(broker, signal.SIGSTOP)
    time.sleep(5.0)
    (shard,) = psutil.Process(service.pid).children()
    shard.kill()
    away.until(lambda: feed.connections == 2)
    time.sleep(2.0)
    service.kill()
    service.wait()
    assert away.spools()
    _signal(broker, signal.SIGCONT)
    away.ingest()
    away.until(lambda: feed.connections == 3 and len({meta.attachment for meta in away.media("feed")}) == 3)
    metas = away.media("feed")
    whole(metas)
    for attachment in {meta.attachment for meta in metas}:
        assert sum(meta.control is None for meta in metas if meta.attachment == attachment) > 3
    assert Control.END not in away.controls("feed")
