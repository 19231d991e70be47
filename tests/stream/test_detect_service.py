"""`unmask detect` as processes of their own: over Kafka, in a group, handing over, hanging, poisoned."""

import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest

from stream.config import Config, Kafka, Media
from stream.detect_service import member_name
from stream.errors import Code, UnmaskError
from stream.log import Cleanup, TopicSpec
from stream.marker import write_clip
from stream.records import Topic
from stream.service import check_topics
from tests.stream.detecting import chunked
from tests.stream.hooked import HANG, HANG_START, POISON
from tests.stream.poison import KILL
from tests.stream.servers import free_port
from tests.stream.services import PARTITIONS, Cluster, cluster, service, until

START_US = 1_700_000_000_000_000


@pytest.fixture
def made(servers: str) -> Iterator[Cluster]:
    with cluster(servers, f"t{uuid.uuid4().hex[:8]}") as found:
        yield found


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 s, manipulated from 4 to 16 s, but for a moment without a face."""
    return write_clip(tmp_path_factory.mktemp("clips") / "planted.mp4", 22, [(4, 16)], [(12, 12.6)])


WHOLE = ["incident.opened", "incident.updated", "incident.closed"]


def numbers(made: Cluster, stream: str) -> list[str]:
    return [event["id"].rpartition(".")[2] for event in made.alerts(stream)]


def check_one_incident(made: Cluster, stream: str) -> None:
    kinds = made.kinds(stream)
    assert kinds[0] == "incident.opened"
    assert kinds[-1] == "incident.closed"
    assert kinds.count("incident.opened") == kinds.count("incident.closed") == 1
    assert numbers(made, stream) == [str(n + 1) for n in range(len(kinds))]


def test_an_incident_is_handed_over_open_and_told_once(made: Cluster, planted: Path, tmp_path: Path) -> None:
    made.list_sources("a")
    chunks = chunked(planted, "a", START_US)
    half = next(index for index, (meta, _) in enumerate(chunks) if (meta.pts or 0) * meta.time_base >= 11)
    port = free_port()
    more = {"worker.metrics_port": str(port)}
    with service(tmp_path / "first", made.settings(), "detect", **more) as first:
        made.write(chunks[:half])
        until(lambda: "incident.opened" in made.kinds("a"), first)
        for path in ("healthz", "readyz", "metrics"):
            assert urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5).status == 200
        first.signal(signal.SIGTERM)
        assert first.wait() == 0
    assert "incident.closed" not in made.kinds("a")
    with service(tmp_path / "second", made.settings(), "detect") as second:
        made.write(chunks[half:])
        until(lambda: "incident.closed" in made.kinds("a"), second)
        second.signal(signal.SIGINT)
        assert second.wait() == 0
    check_one_incident(made, "a")
    times = [value["media_us"] for value in made.values(Topic.SCORES) if value["type"] == "frame"]
    assert times == sorted(set(times))
    assert len(times) >= 40


@pytest.mark.parametrize("stage", [HANG, HANG_START], ids=["device", "decoders"])
def test_a_worker_of_which_a_stage_hangs_ends_and_another_goes_on(
    made: Cluster, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setenv(stage, str(tmp_path / "hung"))
    made.list_sources("a")
    made.write(chunked(planted, "a", START_US))
    settings = made.settings() | {"worker.stall_s": "3", "worker.shutdown_s": "3"}
    with (
        service(tmp_path / "one", settings, "detect", hooks=True) as one,
        service(tmp_path / "two", settings, "detect", hooks=True) as two,
    ):
        until(lambda: _over(made), one, two)
        ended = [each for each in (one, two) if each.process.poll() is not None]
        assert [each.process.returncode for each in ended] == [1]
        assert "detect worker failed: " in ended[0].said()
    check_one_incident(made, "a")


def _over(made: Cluster) -> bool:
    return "incident.closed" in made.kinds("a")


def test_a_chunk_that_kills_decoders_is_dead_lettered_once_by_a_whole_fleet(
    made: Cluster, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POISON, "1")
    streams = ["s0", "s1", "s2"]
    made.list_sources("bad", *streams)
    chunks = chunked(planted, "bad", START_US)
    meta, value = chunks[20]
    chunks[20] = (meta, value + KILL)
    with (
        service(tmp_path / "one", made.settings(), "detect", hooks=True) as one,
        service(tmp_path / "two", made.settings(), "detect", hooks=True) as two,
        service(tmp_path / "three", made.settings(), "detect", hooks=True) as three,
    ):
        made.write(chunks)
        for stream in streams:
            made.write([(replace(m, stream=stream), v) for m, v in chunked(planted, stream, START_US)])
        until(lambda: all("incident.closed" in made.kinds(s) for s in ["bad", *streams]), one, two, three)
        assert [each.process.poll() for each in (one, two, three)] == [None] * 3
    culprits = [record for record in made.records(Topic.DEADLETTER) if record.headers["dead_culprit"] == b"1"]
    assert [record.headers["dead_code"] for record in culprits] == [b"decoder_died"]
    assert [record.headers["sequence"] for record in culprits] == [b"20"]
    for stream in ["bad", *streams]:
        check_one_incident(made, stream)


def test_topics_that_are_missing_or_do_not_fit_are_one_sentence(made: Cluster, tmp_path: Path) -> None:
    config, prefix = made.config, made.config.prefix
    check_topics(config, made.log)
    other = config.model_copy(update={"prefix": f"{prefix}-none"})
    with pytest.raises(UnmaskError, match=f"{prefix}-none.media is missing; unmask topics create"):
        check_topics(other, made.log)
    wider = config.model_copy(update={"media": Media(partitions=PARTITIONS + 1)})
    with pytest.raises(UnmaskError, match=f"must be {PARTITIONS}, as topic {prefix}.media has") as caught:
        check_topics(wider, made.log)
    assert caught.value.code is Code.CONFIG
    with service(tmp_path, {**made.settings(), "prefix": f"{prefix}-none"}, "detect") as started:
        assert started.wait() == 2
        assert "unmask topics create" in started.said()


def test_state_must_have_as_many_partitions_as_media(servers: str) -> None:
    prefix = f"t{uuid.uuid4().hex[:8]}"
    with cluster(servers, prefix) as made:
        uneven = made.config.model_copy(update={"prefix": f"{prefix}-uneven"})
        for topic in Topic:
            count = 2 if topic is Topic.STATE else 1
            made.log.create_topics([TopicSpec(f"{prefix}-uneven.{topic.value}", count, Cleanup.DELETE)])
        with pytest.raises(UnmaskError, match="they must have as many"):
            check_topics(uneven, made.log)


def test_a_member_is_named_by_its_slot(tmp_path: Path) -> None:
    slot = Config(kafka=Kafka(bootstrap_servers="b:1", member_id="pod-1"))
    assert member_name(slot) == member_name(Config()) == "detect"
    free = Config(data_dir=str(tmp_path), kafka=Kafka(bootstrap_servers="b:1"))
    first = member_name(free)
    assert first.startswith("detect-")
    assert member_name(free) != first  # that slot is taken
    code = (
        "import sys; from stream.config import Config; from stream.detect_service import member_name; "
        "print(member_name(Config.model_validate_json(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, free.model_dump_json()]
    names = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
    assert len({done.stdout for done in names}) == 1  # who comes after a process that has gone has its name
