"""What passes through a relay while a cluster of the test's own comes and goes: all of it, in order."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from stream.chunks import content_hash
from stream.claims import Claim
from stream.clock import SystemClock
from stream.config import Config, LogSettings, Media
from stream.controls import Gap, from_body
from stream.errors import Code, UnmaskError
from stream.log import Log
from stream.records import ChunkMeta, Control, Kind, OutRecord, decode_headers, encode_headers
from stream.relay import Relay, State
from stream.spool import names_in
from stream.sqlite_log import SqliteLog
from stream.topics import media_partition, topic_specs

CONFIG = Config(media=Media(partitions=2))
PLENTY = 10**9


class Cluster:
    """Takes records as `LogProducer` does, and keeps what was written. `up` and the rest are for the test."""

    def __init__(self, log: Log, seed: int = 1) -> None:
        self.log = log
        self.up = True
        self.reachable = True
        self.fenced = False
        self.written: list[OutRecord] = []
        self.dropped = 0
        self._pending: list[OutRecord] = []
        self._rng = random.Random(seed)
        self._lock = threading.Lock()

    @property
    def away(self) -> bool:
        return not self.up

    def reach(self) -> tuple[Log, "Cluster"]:
        if not (self.up and self.reachable):
            raise UnmaskError(Code.LOG_AWAY, "nobody answers")
        return self.log, self

    def offer(self, record: OutRecord) -> bool:
        with self._lock:
            if self.fenced:
                raise UnmaskError(Code.LOG_FENCED, "another producer has taken over")
            if len(self._pending) >= 20:
                return False
            self._pending.append(record)
            return True

    def unfinished(self) -> int:
        with self._lock:
            if self.up and self._pending:
                batch = self._pending[: self._rng.randint(1, 20)]
                self.written += batch
                if self._rng.random() < 0.8:  # else nobody hears that it was written
                    del self._pending[: len(batch)]
            return len(self._pending)

    def close(self, timeout: float) -> None: ...

    def newer(self) -> list[tuple[ChunkMeta, bytes]]:
        """Return the media records that detect would take: those newer than what came before."""
        taken: list[tuple[ChunkMeta, bytes]] = []
        newest: dict[str, tuple[str, int, int, int]] = {}
        for record in self.written:
            if record.topic != "unmask.media":
                continue
            assert record.partition == media_partition(record.key, 2)
            meta = decode_headers(record.key, record.headers)
            if meta.order() > newest.get(meta.stream, ("", 0, 0, 0)):
                newest[meta.stream] = meta.order()
                taken.append((meta, record.value or b""))
        return taken


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    log = SqliteLog(tmp_path / "log", LogSettings(), SystemClock())
    log.create_topics(topic_specs(CONFIG))
    yield Cluster(log)
    log.close()


Make = Callable[..., Relay]


@pytest.fixture
def relay(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr("stream.relay.PATIENCE_S", 0.1)
    monkeypatch.setattr("stream.relay.CONTACT_S", 0.02)
    monkeypatch.setattr("stream.relay.RETRY_S", 0.05)
    monkeypatch.setattr("stream.relay.LINGER_S", 0.005)
    made: list[Relay] = []

    def make(limit: int = PLENTY) -> Relay:
        # A relay closes the log that it reached: the test's own stays open beside it.
        def reach() -> tuple[Log, Cluster]:
            cluster.reach()
            return SqliteLog(tmp_path / "log", LogSettings(), SystemClock()), cluster

        made.append(Relay(CONFIG, tmp_path / "0.spool", "me", reach, SystemClock(), limit))
        return made[-1]

    yield make
    cluster.up = True
    for one in made:
        one.close(2.0)


def media(stream: str, sequence: int, size: int = 100, attachment: str = "0000000000000001") -> OutRecord:
    value = random.Random(sequence).randbytes(size)
    meta = ChunkMeta(
        stream=stream,
        attachment=attachment,
        epoch=0,
        sequence=sequence,
        kind=Kind.LIVE,
        capture_us=1_700_000_000_000_000 + sequence,
        epoch_anchor_us=1_700_000_000_000_000,
        time_base=Fraction(1, 1000),
        first_pts=0,
        pts=sequence,
        starts_on_keyframe=True,
        codec=None,
        content_type="video/mp4",
        content_hash=content_hash(value),
    )
    return OutRecord("unmask.media", stream, value, encode_headers(meta), 1)


def until(reached: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "not reached"
        time.sleep(0.01)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_outages_come_everything_arrives_once_and_in_order(
    relay: Make, cluster: Cluster, seed: int
) -> None:
    rng = random.Random(seed)
    cluster.up = rng.random() < 0.5
    out = relay()
    sent = 0
    states = set()
    for _ in range(6):
        for _ in range(rng.randint(5, 60)):
            for stream in ("a", "b"):
                out.send(media(stream, sent))
            sent += 1
            states.add(out.state)
            time.sleep(0.003)
        cluster.up = not cluster.up
        time.sleep(rng.choice([0.0, 0.05, 0.3]))
    cluster.up = True
    until(lambda: out.drained)
    found = cluster.newer()
    for stream in ("a", "b"):
        assert [meta.sequence for meta, _ in found if meta.stream == stream] == list(range(sent))
    assert State.SPOOLING in states
    assert (out.dropped, out.spooled) == (0, 0)


def test_nothing_is_on_disk_while_the_cluster_answers(relay: Make, cluster: Cluster, tmp_path: Path) -> None:
    out = relay()
    for number in range(50):
        out.send(media("a", number))
    out.flush(5.0)
    until(lambda: out.drained)
    assert [meta.sequence for meta, _ in cluster.newer()] == list(range(50))
    assert not (tmp_path / "0.spool").exists()


def test_what_a_killed_process_left_comes_before_what_is_new(
    relay: Make, cluster: Cluster, tmp_path: Path
) -> None:
    cluster.up = False
    first = relay()
    first.adopt("a", "")
    for number in range(30):
        first.send(media("a", number))
    first.flush(5.0)
    assert first.spooled >= 30
    first.close(1.0)
    assert names_in(tmp_path / "0.spool") == ["a"]
    second = relay()
    for number in range(30, 40):
        second.send(media("a", number))
    second.flush(5.0)
    cluster.up = True
    until(lambda: second.drained)
    assert [meta.sequence for meta, _ in cluster.newer()] == list(range(40))
    assert not (tmp_path / "0.spool").exists()
    assert names_in(tmp_path / "0.spool") == []


def test_beyond_its_bound_the_spool_drops_the_oldest_and_a_gap_says_how_many(
    relay: Make, cluster: Cluster
) -> None:
    out = relay(limit=400_000)
    out.send(media("a", 0))
    until(lambda: bool(cluster.newer()))
    cluster.up = False
    for number in range(1, 121):
        out.send(media("a", number, size=20_000))
        time.sleep(0.002)
        if number % 20 == 0:
            out.flush(5.0)
    cluster.up = True
    until(lambda: out.drained)
    found = cluster.newer()
    gaps = [from_body(Gap, value) for meta, value in found if meta.control is Control.GAP]
    kept = [meta.sequence for meta, _ in found if meta.control is None]
    assert kept == sorted(kept)
    assert kept[-1] == 120
    assert 0 < len(kept) < 100
    assert sum(gap.packets for gap in gaps) == 121 - len(kept) == out.dropped
    assert {gap.code for gap in gaps} == {Code.LOG_AWAY}
    sequences = [meta.sequence for meta, _ in found]
    assert sequences == sorted(set(sequences))


@pytest.mark.parametrize("sent_before", [1, 0])
def test_a_full_disk_costs_records_and_nothing_else(
    relay: Make, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, sent_before: int
) -> None:
    """Also when they are the first of their feed: what comes then must not look like its beginning."""
    cluster.up = bool(sent_before)
    out = relay()
    if sent_before:
        out.send(media("a", 0))
        until(lambda: bool(cluster.newer()))

    def full(*_: object) -> None:
        raise UnmaskError(Code.LOG_FULL, "no space left")

    cluster.up = False
    with monkeypatch.context() as disk:
        disk.setattr("stream.spool.Spool._open", full)
        for number in range(sent_before, 101):
            out.send(media("a", number))
        until(lambda: out.dropped > 0)
        dropped = out.dropped
        cluster.up = True
        if sent_before:
            until(lambda: out.drained)
    out.send(media("a", 101))
    until(lambda: any(meta.sequence == 101 for meta, _ in cluster.newer()))
    kept = [meta.sequence for meta, _ in cluster.newer() if meta.control is None]
    assert kept == sorted(kept)
    assert len(kept) == 102 - out.dropped
    assert out.dropped >= dropped > 0
    gaps = [from_body(Gap, value) for meta, value in cluster.newer() if meta.control is Control.GAP]
    assert sum(gap.packets for gap in gaps) == out.dropped


def test_of_a_feed_that_another_member_took_nothing_more_is_sent(relay: Make, cluster: Cluster) -> None:
    """Ours would be the newer attachment, and detect would pass over the other's for good."""
    out = relay()
    out.adopt("a", "0000000000000001")
    out.adopt("b", "0000000000000001")
    out.send(media("a", 0, attachment="0000000000000002"))
    until(lambda: bool(cluster.newer()))
    cluster.up = False
    for stream in ("a", "b"):
        out.send(media(stream, 1, attachment="0000000000000002"))
    until(lambda: out.state is State.SPOOLING)
    with cluster.log.producer("other") as other:
        claim = Claim("0000000000000003", 1, "other")
        other.send(claim.record(CONFIG, "a", media_partition("a", 2), 1))
    for stream in ("a", "b"):
        out.send(media(stream, 0, attachment="0000000000000004"))
    out.flush(5.0)
    cluster.up = True
    until(lambda: out.drained)
    last = {meta.stream: meta.attachment for meta, _ in cluster.newer()}
    assert last["b"] == "0000000000000004"
    assert last["a"] < "0000000000000003"
    assert out.dropped > 0
    # It is ours again: what comes from now on is sent.
    out.adopt("a", "0000000000000003")
    out.send(media("a", 0, attachment="0000000000000005"))
    until(lambda: cluster.newer()[-1][0].attachment == "0000000000000005")


def test_a_fenced_relay_stops(relay: Make, cluster: Cluster) -> None:
    out = relay()
    out.send(media("a", 0))
    until(lambda: bool(cluster.newer()))
    cluster.fenced = True

    def send_on() -> bool:
        try:
            out.send(media("a", 1))
        except UnmaskError as error:
            return error.code is Code.LOG_FENCED
        return False

    until(send_on)


def test_a_spool_has_one_process_at_a_time(relay: Make, cluster: Cluster) -> None:
    cluster.up = False
    first = relay()
    first.send(media("a", 0))
    until(lambda: first.spooled == 1)
    second = relay()
    second.send(media("a", 1))
    time.sleep(0.2)
    assert second.state is State.OPENING
    first.close(1.0)
    cluster.up = True
    until(lambda: second.drained)
    assert [meta.sequence for meta, _ in cluster.newer()] == [0, 1]


def test_claims_travel_in_order_with_the_media(relay: Make, cluster: Cluster) -> None:
    cluster.up = False
    out = relay()
    out.send(media("a", 0))
    out.send(Claim("0000000000000001", 5, "me").record(CONFIG, "a", None, 1))
    out.flush(5.0)
    cluster.up = True
    until(lambda: out.drained)
    topics = list(dict.fromkeys((record.topic, record.partition) for record in cluster.written))
    place = media_partition("a", 2)
    assert topics == [("unmask.media", place), ("unmask.state", place)]
