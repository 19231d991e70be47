"""A feed's records on a clock of the test's own, files that wait for their readers, shards that die."""

import functools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from stream.attach import Attachment
from stream.chunks import Chunk, join_parts, read_chunk
from stream.clock import Deadline, FakeClock, SystemClock
from stream.config import Config, Ingest, LogSettings, Media
from stream.controls import End, FeedPhase, Gap, Start, Tick, from_body, to_body
from stream.errors import Code, UnmaskError
from stream.ingest import GIVE_UP_FILE_AFTER, IngestSupervisor
from stream.intake import OUTBOX_BYTES, Intake, Last
from stream.log import Log, TopicPartition
from stream.records import Control, Kind, OutRecord, Record, decode_headers
from stream.shard import AHEAD_RECORDS, HEADER_ROOM, MAX_HUNG, Failure, ReadAhead, Shard, ShardJob
from stream.sources import Source, parse_source, parse_sources
from stream.sqlite_log import SqliteLog
from stream.topics import media_partition, topic_specs
from tests.conftest import requires
from tests.stream.live import live_feed, make_feed
from tests.stream.media import demux, make_clip
from tests.stream.servers import Publisher, RtmpServer, running, tcp_server

SETTINGS = Ingest(silence_s=10.0, first_frame_s=20.0, tick_s=1.0, backoff_first_s=1.0, backoff_jitter=0.0)
LIVE = "rtmp://127.0.0.1/live/x"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=4, size=(160, 120), gop=25)


@pytest.fixture(scope="module")
def packets(clip: Path) -> Iterator[list[Any]]:
    container, found = demux(clip)
    yield found
    container.close()


class FakeAttachment:
    """What a feed needs to know of an attachment."""

    def __init__(self, kind: Kind = Kind.LIVE) -> None:
        self.kind = kind
        self.picked = "a picture"


class Bench:
    """A feed without threads: the test is its reader and its owner, on a clock of its own."""

    def __init__(self, address: str = LIVE, last: Last | None = None, kind: Kind = Kind.LIVE) -> None:
        self.clock = FakeClock()
        self.generations: list[int] = []
        self.intake = Intake(
            parse_source(address)[0],
            Config(ingest=SETTINGS),
            self.clock,
            random.Random(1),
            last or Last(),
            lambda given_up: pytest.fail("nothing is opened here"),
            attach=self._attach,
        )
        self.attachment: Any = FakeAttachment(kind)
        self.records: list[Chunk] = []
        self.intake.start()

    def _attach(self, intake: Intake, generation: int) -> threading.Thread:
        self.generations.append(generation)
        return threading.Thread()

    @property
    def reader(self) -> int:
        return self.generations[-1]

    def open(self) -> None:
        assert self.intake.opened(self.reader, self.attachment)

    def feed(self, packets: Sequence[Any], step_s: float = 0.02) -> list[bool]:
        """Hand packets over as the present reader would, time passing between them."""
        taken = []
        for packet in packets:
            self.clock.advance(step_s)
            taken.append(self.intake.packet(self.reader, packet, packet.stream.type == "video"))
            self.step()
        return taken

    def step(self) -> None:
        self.intake.step()
        self.records += self.intake.take()

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            self.clock.advance(0.1)
            self.step()

    def controls(self) -> list[tuple[Control, dict[str, Any]]]:
        return [(meta.control, json.loads(value)) for meta, value in self.records if meta.control]

    def named(self, control: Control) -> list[dict[str, Any]]:
        return [body for name, body in self.controls() if name is control]


def test_a_feed_begins_with_start_and_ticks_while_nothing_comes() -> None:
    bench = Bench()
    bench.wait(3.5)
    assert [name for name, _ in bench.controls()] == [Control.START, *[Control.TICK] * 4]
    assert bench.named(Control.START) == [{"source": LIVE, "scheme": "rtmp", "kind": "live"}]
    tick = bench.named(Control.TICK)[-1]
    assert (tick["video"], tick["phase"], tick["code"], tick["capture_us"]) == (
        False,
        "connecting",
        None,
        None,
    )
    assert [meta.sequence for meta, _ in bench.records] == [0, 1, 2, 3, 4]


def test_chunks_and_ticks_share_one_sequence(packets: list[Any]) -> None:
    bench = Bench()
    bench.open()
    bench.feed(packets)
    assert [meta.sequence for meta, _ in bench.records] == list(range(len(bench.records)))
    assert {meta.attachment for meta, _ in bench.records} == {bench.intake.status().last.attachment}
    tick = bench.named(Control.TICK)[-1]
    assert (tick["video"], tick["phase"]) == (True, "live")
    assert tick["capture_us"] <= bench.clock.now_us()
    status = bench.intake.status()
    assert status.frames == sum(packet.stream.type == "video" for packet in packets)
    assert status.bytes == sum(packet.size for packet in packets)
    assert 10 < status.fps < 60


def test_a_stalled_feed_gives_what_it_has_within_chunk_ms(packets: list[Any]) -> None:
    bench = Bench()
    bench.open()
    bench.feed(packets[:5], step_s=0.01)
    assert all(meta.control for meta, _ in bench.records)
    bench.wait(0.6)
    assert any(meta.control is None for meta, _ in bench.records)


def test_silence_is_told_once_and_every_return_is_a_new_attachment(packets: list[Any]) -> None:
    bench = Bench()
    bench.open()
    bench.feed(packets[:100])
    first = bench.intake.status().last
    bench.wait(9.2)
    assert bench.named(Control.GAP)[0]["code"] == Code.SOURCE_SILENT
    told = bench.named(Control.TICK)[-1]
    assert (told["video"], told["code"]) == (False, Code.SOURCE_SILENT)
    bench.wait(60)
    assert len(bench.named(Control.GAP)) == 1
    assert len(bench.generations) >= 3
    assert len(bench.named(Control.START)) == 1
    bench.open()
    bench.feed(packets[:60])
    second = bench.intake.status().last
    assert second.attachment > first.attachment
    assert second.media_end_us > first.media_end_us
    assert len(bench.named(Control.START)) == 2
    assert bench.named(Control.TICK)[-1]["code"] is None
    assert bench.named(Control.TICK)[-1]["frames"] < bench.intake.status().frames


def test_what_an_abandoned_reader_still_brings_is_discarded_and_counted(packets: list[Any]) -> None:
    bench = Bench()
    bench.open()
    bench.feed(packets[:50])
    old = bench.reader
    bench.wait(12)
    assert bench.reader != old
    frames, written = bench.intake.status().frames, len(bench.records)
    assert not bench.intake.packet(old, packets[50], True)
    assert not bench.intake.opened(old, bench.attachment)
    bench.intake.ended(old, UnmaskError(Code.SOURCE_LOST, "late"), False)
    assert not bench.intake.current(old)
    status = bench.intake.status()
    assert (status.frames, status.discarded, status.phase) == (frames, 1, FeedPhase.CONNECTING)
    assert len(bench.records) == written


def test_errors_are_told_and_never_end_a_live_feed() -> None:
    bench = Bench()
    for _ in range(20):
        tried = len(bench.generations)
        bench.intake.ended(bench.reader, UnmaskError(Code.SOURCE_REFUSED, "source x refuses"), False)
        while len(bench.generations) == tried:
            bench.wait(0.1)
    assert {tick["code"] for tick in bench.named(Control.TICK)} == {Code.SOURCE_REFUSED}
    assert not any(tick["video"] for tick in bench.named(Control.TICK))
    assert len({meta.attachment for meta, _ in bench.records}) == 1
    assert bench.intake.status().losses == 20


def test_eof_of_a_live_feed_is_not_its_end_but_of_a_file_it_is(clip: Path, packets: list[Any]) -> None:
    bench = Bench()
    bench.open()
    bench.feed(packets[:20])
    bench.intake.ended(bench.reader, None, False)
    assert bench.intake.status().phase is FeedPhase.BACKOFF
    assert bench.intake.status().code == Code.SOURCE_ENDED
    file = Bench(str(clip), kind=Kind.FILE)
    file.open()
    file.feed(packets)
    file.intake.ended(file.reader, None, True)
    file.wait(5)
    assert file.named(Control.END) == [{"reason": "finished", "code": None, "sentence": None}]
    assert file.controls()[-1][0] is Control.END
    assert file.intake.over


def test_stop_writes_what_is_pending_and_an_end(packets: list[Any]) -> None:
    bench = Bench()
    bench.open()
    bench.feed(packets[:5], step_s=0.001)
    bench.intake.stop()
    bench.intake.stop()
    bench.step()
    kinds = [meta.control for meta, _ in bench.records]
    assert kinds[-2:] == [None, Control.END]
    assert bench.named(Control.END)[0]["reason"] == "stopped"
    assert not bench.intake.packet(bench.reader, packets[5], True)
    bench.wait(30)
    assert bench.intake.over


def test_leaving_writes_what_is_pending_but_no_end(packets: list[Any]) -> None:
    bench = Bench()
    bench.open()
    bench.feed(packets[:5], step_s=0.001)
    bench.intake.leave()
    bench.step()
    assert bench.records[-1][0].control is None
    assert bench.named(Control.END) == []


def test_an_attachment_comes_after_all_before_it_whatever_the_clock_says() -> None:
    clock = FakeClock()
    later = clock.now_us() + 3_600_000_000
    bench = Bench(last=Last(f"{later:016x}", later))
    assert bench.intake.status().last.attachment == f"{later + 1:016x}"
    assert bench.records == []
    bench.step()
    assert bench.records[0][0].epoch_anchor_us >= later


def test_a_recording_behind_http_is_found_to_be_a_file(packets: list[Any]) -> None:
    bench = Bench("https://host.example/a.m3u8", kind=Kind.FILE)
    bench.open()
    bench.feed(packets[:10])
    assert bench.intake.kind is Kind.FILE
    assert [body["kind"] for body in bench.named(Control.START)] == ["live", "file"]
    bench.intake.ended(bench.reader, UnmaskError(Code.SOURCE_LOST, "broke off"), False)
    bench.step()
    assert bench.named(Control.END)[0]["reason"] == "failed"


def test_a_full_outbox_halts_the_reader_and_accuses_nobody(packets: list[Any]) -> None:
    bench = Bench()
    bench.open()
    video = [packet for packet in packets if packet.stream.type == "video"]
    pushed = threading.Event()

    def read() -> None:
        while bench.intake.packet(bench.reader, video[0], True):
            pushed.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    end = time.monotonic() + 30
    while bench.intake._outbox_bytes < OUTBOX_BYTES and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    halted = bench.intake.status().frames
    for _ in range(300):
        bench.clock.advance(0.1)
        bench.intake.step()
    assert bench.intake.status().frames == halted
    assert bench.intake.status().phase is FeedPhase.LIVE
    assert bench.intake._outbox_bytes < OUTBOX_BYTES + 1024 * 1024
    bench.records += bench.intake.take()
    end = time.monotonic() + 10
    while bench.intake.status().frames == halted and time.monotonic() < end:
        time.sleep(0.01)
    assert bench.intake.status().frames > halted
    bench.intake.stop()
    reader.join(5)
    assert not reader.is_alive()


@pytest.mark.parametrize(
    "body",
    [
        Start("rtmp://host/x", "rtmp", "live"),
        Tick(17, True, "live", 3, 99),
        Gap("source_lost", "broke off", 0, None),
        End("finished"),
    ],
)
def test_control_bodies_survive_the_log(body: Start | Tick | Gap | End) -> None:
    value = json.dumps(to_body(body) | {"added_later": 1}).encode()
    assert from_body(type(body), value) == body
    for wrong in (b"", b"[]", b"{}", b"\xff", b"3"):
        with pytest.raises(UnmaskError, match="control record"):
            from_body(type(body), wrong)


# Read-ahead.


class FakeOffsets:
    """The three numbers that read-ahead asks a log for."""

    def __init__(self) -> None:
        self.begin, self.end = 0, 0
        self.position: int | None = None

    def begin_offset(self, partition: TopicPartition) -> int:
        return self.begin

    def end_offset(self, partition: TopicPartition) -> int:
        return self.end

    def group_position(self, group: str, partition: TopicPartition) -> int | None:
        return self.position


def test_a_file_stays_a_bounded_way_ahead_of_its_reader() -> None:
    offsets: Any = FakeOffsets()
    ahead = ReadAhead(offsets, "unmask-detect", TopicPartition("unmask.media", 0), 1000)
    for _ in range(10):
        assert ahead.room() > 0
        ahead.sent(100)
        offsets.end += 1
    assert ahead.room() == 0
    offsets.position = 4
    assert ahead.room() == 400
    offsets.position = 10
    assert ahead.room() == 1000
    # Records of other streams in the same partition count as ours: too careful, never stuck.
    ahead.sent(600)
    offsets.end += 50
    assert ahead.room() == 400
    offsets.position = 60
    assert ahead.room() == 1000


def test_a_file_of_small_chunks_is_bounded_by_their_number() -> None:
    offsets: Any = FakeOffsets()
    ahead = ReadAhead(offsets, "unmask-detect", TopicPartition("unmask.media", 0), 10**9)
    for _ in range(AHEAD_RECORDS):
        assert ahead.room() > 0
        ahead.sent(1)
        offsets.end += 1
    assert ahead.room() == 0
    offsets.position = 1
    assert ahead.room() > 0


def test_what_is_still_on_its_way_into_the_log_counts_as_unread() -> None:
    offsets: Any = FakeOffsets()
    ahead = ReadAhead(offsets, "unmask-detect", TopicPartition("unmask.media", 0), 1000)
    for _ in range(10):
        ahead.sent(100)
    assert ahead.room() == 0


# Shards and their supervisor, over the real log.

QUICK = Ingest(
    shard_size=2,
    silence_s=2.0,
    first_frame_s=5.0,
    tick_s=0.2,
    backoff_first_s=0.1,
    backoff_max_s=0.3,
    file_ahead_bytes=40_000,
)


def config(**changes: Any) -> Config:
    return Config(ingest=QUICK.model_copy(update=changes), media=Media(partitions=2, chunk_ms=200))


class House:
    """A log in a directory, and what a test asks of it."""

    def __init__(self, directory: Path) -> None:
        self.factory = functools.partial(SqliteLog, directory / "log", LogSettings(), SystemClock())
        self.log: Log = self.factory()
        self.log.create_topics(topic_specs(Config(media=Media(partitions=2))))

    def records(self, stream: str) -> list[Record]:
        partition = TopicPartition("unmask.media", media_partition(stream, 2))
        found = self.log.read(partition, self.log.begin_offset(partition))
        return [record for record in found if record.key == stream]

    def controls(self, stream: str) -> list[Control]:
        metas = [decode_headers(record.key, record.headers) for record in self.records(stream)]
        return [meta.control for meta in metas if meta.control is not None]

    def attachments(self, stream: str) -> list[str]:
        metas = [decode_headers(record.key, record.headers) for record in self.records(stream)]
        return list(dict.fromkeys(meta.attachment for meta in metas))

    def consume(self, stream: str) -> None:
        """Let the group `unmask-detect` read and commit all there is."""
        listener: Any = _Listener()
        consumer = self.log.consumer("unmask-detect", ["unmask.media"], listener, "test")
        try:
            polled: Sequence[Record] = consumer.poll(1000, 2.0)
            while polled:
                positions = {TopicPartition(r.topic, r.partition): r.offset + 1 for r in polled}
                consumer.commit([], positions)
                polled = consumer.poll(1000, 0.2)
        finally:
            consumer.close(2.0)


class _Listener:
    def assigned(self, partitions: object) -> None: ...

    def revoked(self, partitions: object) -> None: ...

    def lost(self, partitions: object) -> None: ...


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.log.close()


@pytest.fixture
def supervise(house: House) -> Iterator[Callable[..., IngestSupervisor]]:
    """Return a function that starts sources; all is stopped with the test."""
    started: list[IngestSupervisor] = []

    def start(texts: Sequence[str], settings: Config | None = None) -> IngestSupervisor:
        made = IngestSupervisor(settings or config(), house.factory, SystemClock(), random.Random(1))
        started.append(made)
        made.start(parse_sources(texts))
        return made

    yield start
    for supervisor in started:
        supervisor.stop(Deadline(5.0, SystemClock()))


def until(supervisor: IngestSupervisor, reached: Callable[[], bool], seconds: float = 25.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"not reached: {supervisor.statuses()} {supervisor.failures()}"
        supervisor.poll()
        time.sleep(0.05)


def test_files_go_through_a_shard_whole_and_in_order(
    house: House, supervise: Callable[..., IngestSupervisor], clip: Path
) -> None:
    settings = config(file_ahead_bytes=10_000_000)
    supervisor = supervise([f"a={clip}", f"b={clip}", f"c={clip}"], settings)
    until(supervisor, supervisor.finished)
    assert supervisor.restarts == 0
    assert supervisor.pids() == []
    for stream in "abc":
        metas = [decode_headers(record.key, record.headers) for record in house.records(stream)]
        assert [meta.sequence for meta in metas] == list(range(len(metas)))
        assert metas[-1].control is Control.END
        assert supervisor.statuses()[stream].frames == 100
        assert {record.partition for record in house.records(stream)} == {media_partition(stream, 2)}


def test_a_file_waits_for_its_readers(
    house: House, supervise: Callable[..., IngestSupervisor], clip: Path
) -> None:
    supervisor = supervise([f"a={clip}"])
    until(supervisor, lambda: len(house.records("a")) > 3)
    time.sleep(1.0)
    supervisor.poll()
    written = sum(len(record.value or b"") for record in house.records("a"))
    assert 10_000 < written <= 60_000
    assert not supervisor.finished()
    assert Control.END not in house.controls("a")
    end = time.monotonic() + 20
    while not supervisor.finished() and time.monotonic() < end:
        house.consume("a")
        supervisor.poll()
    assert supervisor.finished()
    assert house.controls("a")[-1] is Control.END


def test_stop_ends_live_feeds_in_order_and_in_time(
    house: House, supervise: Callable[..., IngestSupervisor], clip: Path, tmp_path: Path
) -> None:
    requires("nginx-rtmp", "ffmpeg")
    with running(RtmpServer(tmp_path / "nginx")) as server:
        assert isinstance(server, RtmpServer)
        with running(Publisher(clip, server.url())):
            supervisor = supervise([f"a={server.url()}", "b=rtmp://127.0.0.1:1/live/b"])
            until(supervisor, lambda: "a" in supervisor.statuses() and supervisor.statuses()["a"].frames > 20)
            pids = supervisor.pids()
            supervisor.stop(Deadline(5.0, SystemClock()))
    assert not any(psutil.pid_exists(pid) for pid in pids)
    for stream in "ab":
        assert house.controls(stream)[0] is Control.START
        assert house.controls(stream)[-1] is Control.END
    ticks = [json.loads(r.value or b"") for r in house.records("b") if b"phase" in (r.value or b"")]
    assert {tick["code"] for tick in ticks} <= {None, Code.SOURCE_REFUSED}
    assert supervisor.statuses()["a"].phase is FeedPhase.STOPPED


def test_a_killed_shard_is_replaced_and_its_feeds_go_on(
    house: House, supervise: Callable[..., IngestSupervisor], clip: Path, tmp_path: Path
) -> None:
    requires("nginx-rtmp", "ffmpeg")
    with running(RtmpServer(tmp_path / "nginx")) as server:
        assert isinstance(server, RtmpServer)
        with running(Publisher(clip, server.url())):
            supervisor = supervise([f"a={server.url()}", "b=rtmp://127.0.0.1:1/live/b"])
            for kills in (1, 2):
                until(supervisor, lambda: _live(supervisor, "a"))
                attachment = supervisor.statuses()["a"].last.attachment
                os.kill(supervisor.pids()[0], signal.SIGKILL)
                until(supervisor, lambda wanted=kills: supervisor.restarts == wanted)  # type: ignore[misc]
                assert supervisor.statuses()["a"].phase is FeedPhase.BACKOFF
                until(supervisor, lambda: _live(supervisor, "a"))
                assert supervisor.statuses()["a"].last.attachment > attachment
            # Two restarts, and nobody knows whose fault: each feed gets a process of its own.
            until(supervisor, lambda: len(supervisor.pids()) == 2)
    metas = [decode_headers(record.key, record.headers) for record in house.records("a")]
    assert Control.END not in [meta.control for meta in metas]
    orders = [meta.order() for meta in metas]
    assert orders == sorted(orders)


def _live(supervisor: IngestSupervisor, stream: str) -> bool:
    status = supervisor.statuses().get(stream)
    return status is not None and status.phase is FeedPhase.LIVE


def test_a_shard_that_somebody_else_stops_is_started_again(
    house: House, supervise: Callable[..., IngestSupervisor]
) -> None:
    supervisor = supervise(["b=rtmp://127.0.0.1:1/live/b"])
    until(supervisor, lambda: "b" in supervisor.statuses())
    (pid,) = supervisor.pids()
    os.kill(pid, signal.SIGTERM)
    until(supervisor, lambda: supervisor.restarts == 1 and len(supervisor.pids()) == 1)
    assert not supervisor.finished()
    until(supervisor, lambda: house.controls("b").count(Control.START) == 2)
    assert Control.END in house.controls("b")


def test_stdin_reaches_its_shard(house: House, clip: Path, tmp_path: Path) -> None:
    transport = make_clip(tmp_path / "clip.ts", seconds=2)
    program = _program(tmp_path, "-") + "while not made.finished():\n    made.poll()\n    time.sleep(0.05)\n"
    with open(transport, "rb") as file:
        subprocess.run([sys.executable, "-c", program], stdin=file, check=True, timeout=60)
    assert house.controls("stdin")[-1] is Control.END
    metas = [(decode_headers(r.key, r.headers), r.value or b"") for r in house.records("stdin")]
    assert sum(len(read_chunk(*chunk).video) for chunk in metas if chunk[0].control is None) == 50


def _program(directory: Path, source: str) -> str:
    """Return a program that supervises `source` over the log in `directory` and prints the shard's pid."""
    return (
        "import functools, pathlib, random, time\n"
        "from stream.clock import SystemClock\n"
        "from stream.config import Config, Ingest, LogSettings, Media\n"
        "from stream.ingest import IngestSupervisor\n"
        "from stream.sources import parse_sources\n"
        "from stream.sqlite_log import SqliteLog\n"
        f"factory = functools.partial(SqliteLog, pathlib.Path({str(directory / 'log')!r}),"
        " LogSettings(), SystemClock())\n"
        "config = Config(ingest=Ingest(tick_s=0.2), media=Media(partitions=2))\n"
        "made = IngestSupervisor(config, factory, SystemClock(), random.Random(1))\n"
        f"made.start(parse_sources([{source!r}]))\n"
        "print(made.pids()[0], flush=True)\n"
    )


def test_feeds_are_added_and_let_go_beside_others(
    house: House, supervise: Callable[..., IngestSupervisor], tmp_path: Path
) -> None:
    path = make_feed(tmp_path)
    with live_feed(path) as one, live_feed(path) as two, live_feed(path) as three:
        supervisor = supervise([f"one={one.address}"])
        until(supervisor, lambda: one.readers == 1)
        (shard,) = supervisor.pids()
        supervisor.add(parse_sources([f"two={two.address}", f"three={three.address}"]))
        until(supervisor, lambda: (two.readers, three.readers) == (1, 1))
        # Shards of two here.
        assert len(supervisor.pids()) == 2
        assert shard in supervisor.pids()
        until(supervisor, lambda: len(house.records("two")) > 3)
        supervisor.remove(["two"], end=True)
        until(supervisor, lambda: two.readers == 0)
        assert house.controls("two")[-1] is Control.END
        supervisor.hand_over(["three"], Deadline(5.0, SystemClock()))
        assert "three" not in supervisor.statuses()
        assert Control.END not in house.controls("three")
        until(supervisor, lambda: three.readers == 0)
        # What comes again comes behind what was, also when another place of its shard was given up.
        supervisor.add(parse_sources([f"three={three.address}"]), {"three": Last("00ffffffffffffff", 0)})
        until(supervisor, lambda: three.connections == 2 and len(house.attachments("three")) == 2)
        assert house.attachments("three")[-1] == "0100000000000000"
        supervisor.remove(["one", "three"], end=True)
        until(supervisor, supervisor.finished)
        assert (one.connections, one.most_readers) == (1, 1)
        assert supervisor.restarts == 0


def test_a_feed_that_is_to_end_ends_although_its_shard_died(
    house: House, supervise: Callable[..., IngestSupervisor], tmp_path: Path
) -> None:
    with live_feed(make_feed(tmp_path)) as feed:
        supervisor = supervise([f"one={feed.address}"])
        until(supervisor, lambda: len(house.records("one")) > 3)
        (shard,) = supervisor.pids()
        os.kill(shard, signal.SIGKILL)
        supervisor.remove(["one"], end=True)
        until(supervisor, supervisor.finished)
        assert house.controls("one")[-1] is Control.END


def test_a_frozen_shard_is_replaced(
    supervise: Callable[..., IngestSupervisor], clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.ingest.SHARD_SILENT_S", 1.5)
    supervisor = supervise([f"a={clip}"])
    until(supervisor, lambda: "a" in supervisor.statuses())
    (pid,) = supervisor.pids()
    os.kill(pid, signal.SIGSTOP)
    until(supervisor, lambda: supervisor.restarts == 1)
    until(supervisor, lambda: supervisor.pids() not in ([], [pid]))


def test_a_feed_that_is_over_is_not_read_again_when_its_shard_dies(
    house: House, supervise: Callable[..., IngestSupervisor], clip: Path
) -> None:
    supervisor = supervise([f"a={clip}", "b=rtmp://127.0.0.1:1/live/b"], config(file_ahead_bytes=10_000_000))
    until(
        supervisor,
        lambda: "a" in supervisor.statuses() and supervisor.statuses()["a"].phase is FeedPhase.ENDED,
    )
    os.kill(supervisor.pids()[0], signal.SIGKILL)
    until(supervisor, lambda: supervisor.restarts == 1 and len(supervisor.pids()) == 1)
    attempts = supervisor.statuses()["b"].attempts
    until(supervisor, lambda: supervisor.statuses()["b"].attempts not in (0, attempts))
    assert house.controls("a").count(Control.START) == 1


def test_a_file_that_keeps_killing_its_process_is_given_up(
    supervise: Callable[..., IngestSupervisor], clip: Path
) -> None:
    supervisor = supervise([f"a={clip}"], config(file_ahead_bytes=1))
    for deaths in range(1, GIVE_UP_FILE_AFTER + 1):
        until(supervisor, lambda: bool(supervisor.pids()))
        os.kill(supervisor.pids()[0], signal.SIGKILL)
        until(supervisor, lambda wanted=deaths: supervisor.restarts == wanted)  # type: ignore[misc]
    until(supervisor, supervisor.finished)
    assert supervisor.given_up == {"a"}
    assert supervisor.statuses()["a"].phase is FeedPhase.ENDED
    assert supervisor.statuses()["a"].code == Code.SOURCE_INVALID


def test_credentials_reach_the_shard_but_not_its_command_line_or_the_log(
    house: House, supervise: Callable[..., IngestSupervisor], capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[bytes] = []

    def serve(connection: Any) -> None:
        with connection:
            asked.append(connection.recv(4096))

    with tcp_server(serve) as port:
        supervisor = supervise([f"cam=http://me:hunter2@127.0.0.1:{port}/x.m3u8?token=s3cretvalue"])
        try:
            until(supervisor, lambda: len(asked) > 1 and "cam" in supervisor.statuses())
            lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in supervisor.pids()]
        finally:
            os.environ.pop("UNMASK_SOURCE_CAM")
        supervisor.stop(Deadline(5.0, SystemClock()))
    assert any(b"token=s3cretvalue" in request for request in asked)
    written = b"".join((record.value or b"") for record in house.records("cam")) + b"".join(lines)
    status = supervisor.statuses()["cam"]
    out, err = capfd.readouterr()
    for text in (written.decode(), repr(status), out, err):
        assert "hunter2" not in text
        assert "s3cretvalue" not in text


def test_a_shard_whose_parent_dies_leaves_without_an_end(house: House, clip: Path, tmp_path: Path) -> None:
    """The parent is killed; nobody said that watching is over, so no incident may close."""
    requires("nginx-rtmp", "ffmpeg")
    with running(RtmpServer(tmp_path / "nginx")) as server:
        assert isinstance(server, RtmpServer)
        with running(Publisher(clip, server.url())):
            program = _program(tmp_path, f"a={server.url()}")
            program += "while True:\n    made.poll()\n    time.sleep(0.1)\n"
            parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            end = time.monotonic() + 20
            while Control.TICK not in house.controls("a") and time.monotonic() < end:
                time.sleep(0.1)
            parent.kill()
            parent.wait()
            parent.stdout.close()
            end = time.monotonic() + 10
            while psutil.pid_exists(pid) and time.monotonic() < end:
                time.sleep(0.1)
    assert not psutil.pid_exists(pid)
    controls = house.controls("a")
    assert Control.TICK in controls
    assert Control.END not in controls


def test_a_shard_imports_no_network_library() -> None:
    code = "import stream.ingest, sys; print('torch' in sys.modules, 'cv2' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_too_many_hung_readers_replace_the_shard_and_name_the_feed(house: House, tmp_path: Path) -> None:
    """Readers that nothing can interrupt: opening blocks for good."""
    release = threading.Event()
    ours, theirs = Pipe()
    settings = config(first_frame_s=0.05, backoff_first_s=0.01, backoff_max_s=0.01)
    job = _job(parse_source("bad=rtmp://127.0.0.1/live/x")[0], settings, house)
    shard = Shard(job, house.log, SystemClock(), theirs, threading.Event(), threading.Event())

    def block(given_up: object) -> Attachment:
        release.wait(30)
        raise UnmaskError(Code.SOURCE_LOST, "released")

    shard._feeds[0].open = block
    try:
        with house.log.producer("test") as producer, pytest.raises(UnmaskError, match="readers hang"):
            shard.run(producer)
    finally:
        release.set()
    messages = []
    while ours.poll():
        messages.append(ours.recv())
    failure = messages[-1]
    assert isinstance(failure, Failure)
    assert (failure.code, failure.culprit) == (Code.STAGE_WEDGED, "bad")
    assert str(MAX_HUNG + 1) in failure.sentence


def _job(source: Source, settings: Config, house: House) -> ShardJob:
    return ShardJob(
        name="0",
        entries=(source.entry(),),
        last={},
        config=settings,
        log_factory=house.factory,
        parent=os.getppid(),
        stdin_fd=-1,
        log_level=logging.INFO,
        seed=1,
    )


def test_a_packet_larger_than_a_message_travels_in_parts(house: House, tmp_path: Path) -> None:
    """`max_message_bytes` bounds every record, and the parts join to the chunk."""
    noise = np.random.default_rng(1).integers(0, 256, (3, 240, 320, 3), dtype=np.uint8)
    noisy = make_clip(
        tmp_path / "noisy.mp4",
        seconds=0.4,
        size=(320, 240),
        crf=10,
        picture=lambda number: noise[number % 3],
    )
    small = Config(ingest=SETTINGS, media=Media(partitions=2, max_message_bytes=HEADER_ROOM + 5_000))
    source = parse_source(f"a={noisy}")[0]
    _, theirs = Pipe()
    events = threading.Event(), threading.Event()
    shard = Shard(_job(source, small, house), house.log, SystemClock(), theirs, *events)
    with house.log.producer("test") as producer:
        shard.run(producer)
    chunks: dict[int, list[Chunk]] = {}
    for record in house.records("a"):
        meta = decode_headers(record.key, record.headers)
        assert len(record.value or b"") <= 5_000
        if meta.control is None:
            chunks.setdefault(meta.sequence, []).append((meta, record.value or b""))
    assert any(len(parts) > 1 for parts in chunks.values())
    assert sum(len(read_chunk(*join_parts(parts)).video) for parts in chunks.values()) == 10


def test_records_name_their_partition(house: House) -> None:
    assert {media_partition(f"s{n}", 2) for n in range(20)} == {0, 1}
    record = OutRecord("unmask.media", "s", b"x", {}, 1, media_partition("s", 2))
    with house.log.producer("test") as producer:
        producer.send(record)
    assert [found.value for found in house.records("s")] == [b"x"]
