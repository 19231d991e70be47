"""The embedded log: the contract, and what only it promises."""

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from stream import database, lease, sqlite_consumer, sqlite_rows
from stream.clock import FakeClock, SystemClock
from stream.config import LogSettings
from stream.database import Database, check_local
from stream.errors import Code, UnmaskError
from stream.log import Cleanup, Consumer, LogFactory, PositionError, Producer, TopicPartition, TopicSpec
from stream.segments import segment_name
from stream.sqlite_log import SqliteLog
from stream.sqlite_producer import IN_FLIGHT_BYTES
from stream.sqlite_rows import SEGMENTS_PER_RETENTION
from tests.conftest import requires
from tests.stream.log_contract import (
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

SESSION_S = 1.0


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "log"


class TestContract(LogContract):
    session_s = SESSION_S

    @pytest.fixture
    def factory(self, directory: Path) -> LogFactory:
        return partial(SqliteLog, directory, LogSettings(lease_s=SESSION_S), SystemClock())


class TestContractDurable(LogContract):
    """The same with a sync per commit."""

    session_s = SESSION_S

    @pytest.fixture
    def factory(self, directory: Path) -> LogFactory:
        settings = LogSettings(lease_s=SESSION_S, synchronous="FULL")
        return partial(SqliteLog, directory, settings, SystemClock())


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def log(directory: Path, clock: FakeClock) -> Iterator[SqliteLog]:
    log = SqliteLog(directory, LogSettings(), clock)
    yield log
    log.close()


def size_on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def segment_files(directory: Path) -> list[Path]:
    return sorted((directory / "segments").iterdir())


# Offsets


def test_offsets_are_without_gaps(log: SqliteLog) -> None:
    log.create_topics([TopicSpec("t", 2)])
    write(log, *(record("t", number(i), partition=i % 2) for i in range(20)))
    with member(log, "g", "t") as (consumer, _):
        join(consumer)
        with pytest.raises(UnmaskError):
            consumer.commit([record("t", b"x"), record("none", b"x")], {})
    write(log, record("t", number(20)))
    assert [r.offset for r in log.read(TopicPartition("t", 0), 0)] == list(range(11))
    assert (log.begin_offset(TopicPartition("t", 1)), log.end_offset(TopicPartition("t", 1))) == (0, 10)


def test_commit_that_fails_half_way_leaves_nothing(log: SqliteLog, monkeypatch: pytest.MonkeyPatch) -> None:
    partition = TopicPartition("t", 0)
    log.create_topics([TopicSpec("t", 1), TopicSpec("out", 1), TopicSpec("state", 1, Cleanup.COMPACT)])

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with member(log, "g", "t") as (consumer, _):
        join(consumer)
        outputs = [record("out", bytes(20_000)), record("state", b"x")]
        with monkeypatch.context() as patch:
            patch.setattr(sqlite_rows, "_supersede", fail)  # after the rows were inserted
            with pytest.raises(UnmaskError, match="disk I/O error"):
                consumer.commit(outputs, {partition: 5})
        assert everything(log, "out") == everything(log, "state") == []
        assert log.group_position("g", partition) is None
        consumer.commit(outputs, {partition: 5})
    assert [r.offset for r in everything(log, "out")] == [0]
    assert log.group_position("g", partition) == 5


def test_poll_is_bounded_in_bytes(log: SqliteLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_consumer, "POLL_BYTES", 1_000_000)
    log.create_topics([TopicSpec("media", 2)])
    write(log, *(record("media", bytes(200_000), partition=i % 2) for i in range(20)))
    write(log, record("media", bytes(3_000_000)))
    pages = []
    with member(log, "g", "media") as (consumer, _):
        while page := consumer.poll(100, 0.0):
            pages.append([len(r.value or b"") for r in page])
    assert sum(map(len, pages)) == 21
    assert [3_000_000] in pages
    assert max(sum(page) for page in pages if page != [3_000_000]) <= 1_000_000


# Retention


def test_old_records_go_and_the_position_before_them_is_an_event(
    log: SqliteLog, clock: FakeClock, directory: Path
) -> None:
    partition = TopicPartition("media", 0)
    log.create_topics([TopicSpec("media", 1, retention_s=60.0)])
    write(log, *(record("media", bytes(10_000) + number(i)) for i in range(10)))
    clock.advance(50)
    write(log, *(record("media", bytes(10_000) + number(i)) for i in range(10, 15)))
    with member(log, "g", "media") as (consumer, _):
        got = poll_some(consumer, 3)
        consumer.commit([], {partition: got[2].offset + 1})
        consumer.seek(partition, 3)
        clock.advance(20)
        done = log.maintain()
        assert (done.removed["media"], done.unread["media"], done.segments) == (10, 7, 1)
        assert len(segment_files(directory)) == 1
        with pytest.raises(PositionError, match=r"position 3 of media/0 .* 10 to 15") as caught:
            consumer.poll(10, 0.0)
        assert caught.value.resume_at == 10
        with pytest.raises(PositionError):
            log.read(partition, 0)
        consumer.seek(partition, caught.value.resume_at)
        assert numbers(poll_some(consumer, 5)) == [10, 11, 12, 13, 14]
    assert log.begin_offset(partition) == 10


def test_group_whose_position_was_removed_is_told(log: SqliteLog, clock: FakeClock) -> None:
    partition = TopicPartition("media", 0)
    log.create_topics([TopicSpec("media", 1, retention_s=60.0)])
    write(log, *(record("media", number(i)) for i in range(4)))
    with member(log, "g", "media") as (consumer, _):
        poll_some(consumer, 4)
        consumer.commit([], {partition: 2})
    clock.advance(61)
    assert log.maintain().unread["media"] == 2
    with member(log, "g", "media") as (consumer, _), pytest.raises(PositionError, match="position 2"):
        join(consumer)


def test_read_that_retention_overtakes_does_not_jump(log: SqliteLog, clock: FakeClock) -> None:
    log.create_topics([TopicSpec("t", 1, retention_s=60.0)])
    write(log, *(record("t", number(i)) for i in range(1000)))
    reading = log.read(TopicPartition("t", 0), 0)
    next(reading)
    clock.advance(61)
    log.maintain()
    with pytest.raises(PositionError):
        list(reading)


def test_bytes_on_disk_are_bounded(log: SqliteLog, directory: Path) -> None:
    bound = 4_000_000
    log.create_topics([TopicSpec("media", 4, retention_bytes=bound)])
    with log.producer("shard") as producer:
        for i in range(600):
            producer.send(record("media", os.urandom(100_000), f"s{i % 9}", i % 4, headers={"i": number(i)}))
            if i % 60 == 59:
                producer.flush(30)
                log.maintain()
                # The open segment may come on top.
                assert size_on_disk(directory / "segments") <= bound + bound // SEGMENTS_PER_RETENTION
        producer.flush(30)
    log.maintain()
    assert size_on_disk(directory / "segments") <= bound
    kept = everything(log, "media")
    assert sum(len(r.value or b"") for r in kept) > bound // 2
    # The oldest went: what is kept are the last of each partition.
    for part in range(4):
        ids = [int.from_bytes(r.headers["i"], "big") for r in kept if r.partition == part]
        assert ids == list(range(600 - 4 * len(ids) + part, 600, 4))


def test_small_records_are_bounded_too(log: SqliteLog, directory: Path) -> None:
    log.create_topics([TopicSpec("scores", 2, retention_bytes=1_000_000)])
    for _ in range(10):
        write(log, *(record("scores", os.urandom(2_000), partition=i % 2) for i in range(1_000)))
        log.maintain()
    assert 300_000 < sum(len(r.value or b"") for r in everything(log, "scores")) <= 1_000_000
    # 20 MB went through; free pages that are kept, the WAL and two batches remain.
    log.maintain()
    assert size_on_disk(directory) < 45_000_000


def test_state_rewritten_for_ever_stays_small(log: SqliteLog, directory: Path) -> None:
    log.create_topics([TopicSpec("media", 1), TopicSpec("state", 1, Cleanup.COMPACT)])
    with member(log, "g", "media") as (consumer, _):
        join(consumer)
        for _ in range(300):
            consumer.commit([record("state", os.urandom(100_000), f"s{k}") for k in range(4)], {})
        log.maintain()
    assert size_on_disk(directory) < 40_000_000
    assert len(everything(log, "state")) == 4


def test_space_goes_back_to_the_file_system(log: SqliteLog, clock: FakeClock, directory: Path) -> None:
    log.create_topics([TopicSpec("scores", 1, retention_s=60.0)])
    write(log, *(record("scores", os.urandom(8_000)) for _ in range(8_000)))
    full = (directory / "log.sqlite").stat().st_size
    clock.advance(61)
    log.maintain()
    log.maintain()
    assert full > 60_000_000
    assert (directory / "log.sqlite").stat().st_size < 20_000_000


def test_tombstones_go_after_an_hour(log: SqliteLog, clock: FakeClock) -> None:
    log.create_topics([TopicSpec("sources", 1, Cleanup.COMPACT)])
    write(log, record("sources", b"1", "a"), record("sources", b"1", "b"), record("sources", None, "a"))
    clock.advance(3_000)
    log.maintain()
    assert [(r.key, r.value) for r in everything(log, "sources")] == [("b", b"1"), ("a", None)]
    clock.advance(700)
    assert log.maintain().removed["sources"] == 1
    assert [r.key for r in everything(log, "sources")] == ["b"]
    write(log, record("sources", b"2", "a"))
    assert [(r.key, r.value) for r in everything(log, "sources")] == [("b", b"1"), ("a", b"2")]


def test_retention_follows_the_setting(log: SqliteLog, clock: FakeClock) -> None:
    log.create_topics([TopicSpec("t", 1, retention_s=1000.0)])
    write(log, record("t", b"x"))
    clock.advance(100)
    log.maintain()
    assert len(everything(log, "t")) == 1
    log.create_topics([TopicSpec("t", 1, retention_s=10.0)])
    log.maintain()
    assert everything(log, "t") == []


# Segments and what dying leaves


def test_files_without_rows_are_swept_when_their_writer_is_gone(directory: Path, clock: FakeClock) -> None:
    log = SqliteLog(directory, LogSettings(), clock)
    log.create_topics([TopicSpec("t", 1)])
    write(log, record("t", bytes(10_000)))
    named = segment_files(directory)
    orphan = directory / "segments" / segment_name("00ff00ff00ff00ff", 7)
    orphan.write_bytes(b"never named")
    ours = directory / "segments" / segment_name(named[0].name.split("-")[0], 8)
    ours.write_bytes(b"about to be named")
    SqliteLog(directory, LogSettings(), clock).close()
    assert segment_files(directory) == sorted([*named, ours])
    log.close()
    SqliteLog(directory, LogSettings(), clock).close()
    assert segment_files(directory) == named


def test_damaged_record_is_named_and_can_be_passed(log: SqliteLog, directory: Path) -> None:
    partition = TopicPartition("media", 0)
    log.create_topics([TopicSpec("media", 1)])
    write(log, *(record("media", bytes(10_000) + number(i)) for i in range(5)))
    (path,) = segment_files(directory)
    content = bytearray(path.read_bytes())
    content[2 * 10_008 + 17] ^= 1
    path.write_bytes(content)
    with member(log, "g", "media") as (consumer, _):
        assert numbers(poll_some(consumer, 2)) == [0, 1]
        for _ in range(2):
            with pytest.raises(PositionError, match=f"record 2 of media/0 is damaged.*{path.name}") as caught:
                consumer.poll(10, 0.0)
        assert caught.value.code is Code.LOG_UNUSABLE
        consumer.seek(partition, caught.value.resume_at)
        assert numbers(poll_some(consumer, 2)) == [3, 4]
    with pytest.raises(PositionError, match="record 2"):
        list(log.read(partition, 0))
    path.unlink()
    with pytest.raises(PositionError, match="record 3"):
        list(log.read(partition, 3))


def test_compacted_values_never_pin_a_segment(log: SqliteLog, directory: Path) -> None:
    log.create_topics([TopicSpec("state", 1, Cleanup.COMPACT)])
    write(log, record("state", bytes(1_000_000)))
    assert segment_files(directory) == []
    assert len(everything(log, "state")[0].value or b"") == 1_000_000


# Leases


def test_silent_member_loses_its_place_when_the_lease_ends(directory: Path, clock: FakeClock) -> None:
    settings = LogSettings(lease_s=3600.0)  # no heartbeat during the test
    one, two = SqliteLog(directory, settings, clock), SqliteLog(directory, settings, clock)
    one.create_topics([TopicSpec("t", 1), TopicSpec("out", 1)])
    heard = Recorder()
    first = one.consumer("g", ["t"], heard, "first")
    join(first)
    with member(two, "g", "t") as (second, _):
        clock.advance(3590)
        second.poll(1, 0.0)
        assert not second.assignment()
        assert two.holder("g") == "first"
        first.commit([], {})  # a commit renews
        clock.advance(3590)
        second.poll(1, 0.0)
        assert not second.assignment()
        clock.advance(11)
        second.poll(1, 0.0)
        assert second.assignment()
        with pytest.raises(UnmaskError) as caught:
            first.commit([record("out", b"late")], {TopicPartition("t", 0): 0})
        assert caught.value.code is Code.LOG_FENCED
        assert heard.names == ["assigned"]
        first.poll(1, 0.0)
        assert heard.names == ["assigned", "lost"]
        assert not first.assignment()
        with pytest.raises(UnmaskError):
            first.commit([], {})
    assert everything(one, "out") == []
    first.poll(1, 0.0)
    assert heard.names == ["assigned", "lost", "assigned"]
    one.close()
    two.close()
    assert heard.names[-1] == "revoked"


def test_member_that_was_fenced_leaves_without_a_last_commit(directory: Path, clock: FakeClock) -> None:
    settings = LogSettings(lease_s=3600.0)
    log = SqliteLog(directory, settings, clock)
    log.create_topics([TopicSpec("t", 1)])
    heard = Recorder()
    first = log.consumer("g", ["t"], heard, "first")
    join(first)
    clock.advance(3601)
    with member(log, "g", "t") as (second, _):
        join(second)
        first.close(1)
        assert heard.names == ["assigned", "lost"]
        second.commit([], {})
    log.close()


class SteppedClock(SystemClock):
    """A machine whose wall clock was set wrong."""

    def __init__(self, step_s: int) -> None:
        self._step_us = step_s * 1_000_000

    def now_us(self) -> int:
        return super().now_us() + self._step_us


def test_clock_step_fences_nobody(directory: Path) -> None:
    log = SqliteLog(directory, LogSettings(), SystemClock())
    log.create_topics([TopicSpec("t", 1)])
    stepped = SqliteLog(directory, LogSettings(), SteppedClock(10 * 86400))
    with member(log, "g", "t") as (first, _), member(stepped, "g", "t") as (second, _):
        join(first)
        second.poll(1, 0.1)
        assert not second.assignment()
        first.commit([], {})
    stepped.close()
    log.close()


def test_lease_from_before_a_reboot_is_free(
    directory: Path, clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = SqliteLog(directory, LogSettings(lease_s=3600.0), clock)
    log.create_topics([TopicSpec("t", 1)])
    with member(log, "g", "t") as (first, _):
        join(first)
        boot = tmp_path / "boot_id"
        boot.write_text("another\n")
        monkeypatch.setattr(lease, "BOOT_ID", boot)
        with member(log, "g", "t") as (second, _):
            join(second)
    log.close()


def test_closed_log_leaves_its_groups(directory: Path, clock: FakeClock) -> None:
    one, two = SqliteLog(directory, LogSettings(), clock), SqliteLog(directory, LogSettings(), clock)
    one.create_topics([TopicSpec("t", 1)])
    heard = Recorder()
    join(one.consumer("g", ["t"], heard, "first"))
    producer = one.producer("p")
    producer.send(record("t", b"x"))
    one.close()
    assert heard.names == ["assigned", "revoked"]
    with member(two, "g", "t") as (second, _):
        assert len(poll_some(second, 1)) == 1
    assert two.holder("g") is None
    two.close()


# Bounds and failures of writing


def test_send_blocks_at_the_bound_of_bytes_in_flight(log: SqliteLog, directory: Path) -> None:
    log.create_topics([TopicSpec("media", 1)])
    chunk = bytes(4_000_000)
    blocker = Database(directory, "NORMAL")
    producer = log.producer("p")
    sent: list[int] = []

    def flood() -> None:
        for i in range(20):
            producer.send(record("media", chunk))
            sent.append(i)

    with blocker.write():
        flooding = threading.Thread(target=flood)
        flooding.start()
        flooding.join(1.0)
        assert flooding.is_alive()
        assert len(sent) == IN_FLIGHT_BYTES // len(chunk)
    flooding.join(30)
    assert len(sent) == 20
    producer.close(30)
    blocker.close()
    assert log.end_offset(TopicPartition("media", 0)) == 20


def test_failed_write_is_raised_once_and_counted(
    log: SqliteLog, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.create_topics([TopicSpec("t", 1)])
    blocker = Database(directory, "NORMAL")
    producer = log.producer("p")
    with monkeypatch.context() as patch, blocker.write():
        patch.setattr(database, "LOCK_WAIT_S", 0.05)
        producer.send(record("t", b"1"))
        producer.send(record("t", b"2"))
        with pytest.raises(UnmaskError, match="write lock"):
            producer.flush(30)
    assert producer.dropped == 2
    producer.send(record("t", b"3"))
    producer.close(30)
    blocker.close()
    assert [r.value for r in everything(log, "t")] == [b"3"]


def test_flush_that_takes_too_long_says_so(log: SqliteLog, directory: Path) -> None:
    log.create_topics([TopicSpec("t", 1)])
    blocker = Database(directory, "NORMAL")
    producer = log.producer("p")
    with blocker.write():
        producer.send(record("t", b"1"))
        with pytest.raises(UnmaskError, match="1 records not durable"):
            producer.flush(0.1)
    producer.close(30)
    blocker.close()
    assert len(everything(log, "t")) == 1
    with pytest.raises(ValueError, match="closed"):
        producer.send(record("t", b"2"))


# A full disk, the file system, the file


def test_full_disk_is_survived(tmp_path: Path) -> None:
    requires("unshare")
    mount = tmp_path / "small"
    mount.mkdir()
    inside = f"mount -t tmpfs -o size=24m none {mount} && exec {sys.executable} -m {__name__} {mount}/log"
    trial = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", mount], capture_output=True)
    if trial.returncode:
        pytest.skip("this user may not mount a file system in a namespace")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["filled", "freed"] * 2 + ["filled", "reopened", "freed", "whole"]


def fill_the_disk(directory: Path) -> None:
    """Fill the file system with media and scores and let retention free it; again; again with a restart."""
    clock = FakeClock()
    log, consumer = open_small_log(directory, clock)
    log.maintain()
    producer = log.producer("p")
    for restart in (False, False, True):
        acknowledged = fill(producer)
        committed = commit_until_full(consumer)
        print("filled")
        if restart:
            with contextlib.suppress(UnmaskError):
                log.close()
            log, consumer = open_small_log(directory, clock)
            producer = log.producer("p")
            print("reopened")
        assert len(everything(log, "media")) == acknowledged
        assert [r.value for r in everything(log, "scores")] == committed
        clock.advance(61)
        log.maintain()
        print("freed")
    send(producer)
    consumer.commit([record("scores", b"x")], {})
    assert len(everything(log, "media")) == len(everything(log, "scores")) == 1
    log.close()
    assert sqlite3.connect(directory / "log.sqlite").execute("PRAGMA integrity_check").fetchone() == ("ok",)
    print("whole")


def open_small_log(directory: Path, clock: FakeClock) -> tuple[SqliteLog, Consumer]:
    log = SqliteLog(directory, LogSettings(segment_bytes=1_000_000, lease_s=3600.0), clock)
    log.create_topics([TopicSpec("media", 2, retention_s=60.0), TopicSpec("scores", 1, retention_s=60.0)])
    consumer = log.consumer("g", ["media"], Recorder(), "m")
    join(consumer)
    return log, consumer


def send(producer: Producer) -> None:
    producer.send(record("media", os.urandom(100_000)))
    producer.flush(10)


def is_full(action: Callable[[], None]) -> bool:
    try:
        action()
    except UnmaskError as error:
        if error.code is not Code.LOG_FULL:
            raise
        return True
    return False


def fill(producer: Producer) -> int:
    count = 0
    while not is_full(partial(send, producer)):
        count += 1
    return count


def commit_until_full(consumer: Consumer) -> list[bytes | None]:
    committed: list[bytes | None] = []
    while True:
        out = record("scores", os.urandom(4_000))
        if is_full(partial(consumer.commit, [out], {})):
            return committed
        committed.append(out.value)


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "9p"])
def test_remote_file_systems_are_refused(tmp_path: Path, kind: str) -> None:
    mounts = [
        "/dev/vda / ext4 rw 0 0",
        f"server:/x {tmp_path}/far {kind} rw 0 0",
        f"none {tmp_path}/far/near overlay rw 0 0",
        f"server:/y {tmp_path}/with\\040blank {kind} rw 0 0",
    ]
    check_local(tmp_path / "log", mounts)
    check_local(tmp_path / "farther", mounts)
    check_local(tmp_path / "far" / "near" / "log", mounts)
    for name in ("far/log", "with blank/log"):
        with pytest.raises(UnmaskError, match=f"is on {kind}.*data_dir"):
            check_local(tmp_path / name, mounts)


def test_file_that_is_no_log_is_refused(directory: Path) -> None:
    directory.mkdir()
    (directory / "log.sqlite").write_bytes(b"something else entirely" * 100)
    with pytest.raises(UnmaskError, match=r"log\.sqlite cannot be used: file is not a database") as caught:
        SqliteLog(directory, LogSettings(), SystemClock())
    assert caught.value.code is Code.LOG_UNUSABLE


def test_log_of_another_version_is_refused(directory: Path, clock: FakeClock) -> None:
    SqliteLog(directory, LogSettings(), clock).close()
    with sqlite3.connect(directory / "log.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(UnmaskError, match="schema version 99"):
        SqliteLog(directory, LogSettings(), clock)


def test_opened_by_many_at_the_same_time(directory: Path) -> None:
    def open_and_write(i: int) -> None:
        log = SqliteLog(directory, LogSettings(), SystemClock())
        log.create_topics([TopicSpec("t", 2)])
        write(log, record("t", number(i)))
        log.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(open_and_write, range(8)))
    log = SqliteLog(directory, LogSettings(), SystemClock())
    assert sorted(numbers(everything(log, "t"))) == list(range(8))
    assert len(list((directory / "alive").iterdir())) == 1
    log.close()


if __name__ == "__main__":
    fill_the_disk(Path(sys.argv[1]))
