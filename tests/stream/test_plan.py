"""Plans against sums done by hand, and that more is never had for less."""

import json
import math
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream import plan as planning
from stream import plan_text
from stream.config import Config, Kafka, LogSettings, Media
from stream.errors import Code, UnmaskError
from stream.kafka_producer import LINGER_S
from stream.kafka_topics import COMPACT_SEGMENT_S
from stream.plan import Asked, Plan, Prices, crowded, ingest_members, members, plan
from stream.profile import Figure, Name, Of, Profile, Spread, Step, find, log_figure, parse

CORES = 10
COSTS = {
    Name.REMUX_720: 0.005,
    Name.REMUX_1080: 0.010,
    Name.DECODE_720: 0.002,
    Name.DECODE_1080: 0.004,
    Name.PICTURE_720: 0.003,
    Name.PICTURE_1080: 0.005,
    Name.DETECT: 0.020,
    Name.FACE: 0.010,
}
SIZES = {Name.REMUX_720: 312_500, Name.REMUX_1080: 625_000}
CONFIG = Config()
NO_PRICES = Prices()


def figure(cost: float, size: int = 0) -> Figure:
    rate = 1 / cost if cost > 0 else 1.0  # of one core
    return Figure("one", Spread(cost, cost, cost), Spread(rate, rate, rate), "made up", size)


def profile(log: float = 0.0, broker: float | None = None, gpu: float | None = None) -> Profile:
    """Return a machine of round numbers, on which everything about the log costs the same."""
    figures = {name.value: figure(cost, SIZES.get(name, 0)) for name, cost in COSTS.items()}
    figures |= {log_figure(Of.KAFKA, step): figure(log) for step in Step}
    if broker is not None:
        figures |= {log_figure(Of.BROKER, step): figure(broker) for step in Step}
    if gpu is not None:
        figures |= {name.value: figure(gpu) for name in (Name.GPU_DETECT, Name.GPU_FACE)}
    return Profile(
        "made-up",
        "2026-01-01T00:00:00Z",
        "abacus",
        CORES,
        2**34,
        "none",
        {"unmask": "0"},
        "e",
        ("m",),
        figures,
    )


def planned(streams: int, made: Profile | None = None, config: Config = CONFIG, **asked: float) -> Plan:
    given_ = {"fps": 2.0, "bitrate": 5.0, "faces": 1.0} | asked
    return plan(Asked(streams, **given_), made or profile(), config, NO_PRICES)  # type: ignore[arg-type]


# The sums


def test_what_one_stream_takes() -> None:
    stream = planned(100).stream
    # remuxed, and an eighth of a shard
    assert stream.ingest_cores == pytest.approx(0.010 + 0.02 / 8)
    # 25 frames decoded, 2 converted, 2 looked at, 2 faces
    assert stream.detect_cores == pytest.approx(25 * 0.004 + 2 * 0.005 + 2 * 0.020 + 2 * 0.010)
    # 5 Mbit/s and, of two and a half chunks a second, container and headers
    assert stream.media_bytes == pytest.approx(625_000 + 2.5 * 1100)
    assert stream.chunks == 2.5
    assert stream.gpus == 0


def test_720_lines_cost_what_was_measured_of_them() -> None:
    stream = planned(100, lines=720, bitrate=2.5).stream
    assert stream.ingest_cores == pytest.approx(0.005 + 0.02 / 8)
    assert stream.detect_cores == pytest.approx(25 * 0.002 + 2 * 0.003 + 2 * 0.020 + 2 * 0.010)


def test_workers_by_hand() -> None:
    region = planned(1000).region
    # two looks at 20 ms and two faces at 10 ms: a worker's one device thread does 16 streams and two thirds
    assert region.streams_per_worker == 16
    # 10 cores less 0.065 for idling, at 0.17 a stream, seven tenths of it used: 24.4 machines by cores alone;
    # by chance one stream in a hundred may be with 16 others or more
    found = region.workers - 1
    assert crowd(1000, 16, found) <= 0.01 < crowd(1000, 16, found - 1)
    assert (region.detect_machines, region.partitions) == (region.workers, 2 * region.workers)


def crowd(streams: int, capacity: int, workers: int) -> float:
    """Return the chance that a stream finds `capacity` others or more on its worker."""
    chance, others = 1 / workers, streams - 1
    return 1 - sum(math.comb(others, k) * chance**k * (1 - chance) ** (others - k) for k in range(capacity))


def test_large_machines_carry_several_workers_by_hand() -> None:
    region = planned(1000, cores=5 * CORES).region
    # as many workers as before, five on each machine, and a spare machine
    alone = planned(1000).region.workers - 1
    assert region.detect_machines == math.ceil(alone / 5) + 1
    assert region.workers == 5 * region.detect_machines
    assert region.cores == (region.detect_machines + region.ingest_machines + region.brokers) * 50


def test_brokers_by_network_by_hand() -> None:
    region = planned(10_000).region
    stream = planned(10_000).stream
    written = 10_000 * (stream.media_bytes + stream.output_bytes + stream.state_bytes)
    # three copies into seven tenths of 10 Gbit/s each, and one broker may be down
    assert region.brokers == 1 + math.ceil(3 * written / (0.7 * 10e9 / 8))
    assert region.brokers_for == "network in"


def test_brokers_by_their_cpu_by_hand() -> None:
    stream = planned(1000, profile(broker=0.001)).stream
    # three copies of 2.5 chunks, 1 tick, 2 scores, 2 states; 2.5 chunks read; transactions cost nothing more
    assert stream.broker_cores == pytest.approx(0.001 * (3 * (2.5 + 1 + 2 + 2) + 2.5))
    region = planned(1000, profile(broker=0.001)).region
    cores = 1000 * stream.broker_cores + 2 * region.workers * 0.001
    assert region.brokers == 1 + math.ceil(cores / 7)
    assert region.brokers_for == "CPU"


def test_a_small_cluster_has_as_many_brokers_as_copies() -> None:
    assert planned(1).region.brokers == 3
    assert planned(1, config=Config(kafka=Kafka(replication=1))).region.brokers == 2


def test_disk_by_hand() -> None:
    config = Config(media=Media(retention_s=100.0), log=LogSettings(records_retention_s=1000.0))
    made = planned(10, config=config)
    scores = 0.4 * 2 * (420 + 290)
    states = 0.4 * 2 * (3000 + 5000)
    kept = made.stream.media_bytes * 100 + scores * 1000 + states * 60
    assert made.region.disk_bytes == pytest.approx(10 * kept * 3 / 0.7)


def test_network_by_hand() -> None:
    made = planned(1000)
    assert made.region.feeds_gbit == pytest.approx(5.0)
    assert made.region.from_brokers_gbit == pytest.approx(1000 * made.stream.media_bytes * 8e-9)
    assert made.region.copies_gbit == pytest.approx(2 * made.region.to_brokers_gbit)


def test_transactions_by_hand() -> None:
    region = planned(80).region
    # 8 feeds with 3.5 records a second: one every 1/28 s and 30 ms more
    assert region.ingest_shards == 10
    each = 1 / (1 / 28 + 0.100)
    assert region.transactions_per_s == pytest.approx(10 * each + 2 * region.workers)
    assert region.transaction_cores == 0  # of a broker nobody measured


def test_what_transactions_take_of_brokers_by_hand() -> None:
    made = profile(broker=0.001)
    alone = {log_figure(Of.BROKER, Step.APPEND_ALONE): figure(0.004)}
    region = planned(80, made.with_figures(alone)).region
    each = 1 / (1 / 28 + 0.100)
    # 4 ms less 1 ms for the chunk itself; a commit is 1 ms
    assert region.transaction_cores == pytest.approx(10 * each * 0.003 + 2 * region.workers * 0.001)


def test_cost_by_hand() -> None:
    prices = Prices(core_hour=0.1, disk_gb_month=0.73, network_gb=0.01)
    made = plan(Asked(1000, 2.0, 5.0, 1.0), profile(), CONFIG, prices)
    region = made.region
    gbit = region.to_brokers_gbit + region.copies_gbit + region.from_brokers_gbit
    assert made.cost["cores"] == pytest.approx(region.cores * 0.1)
    assert made.cost["disk"] == pytest.approx(region.disk_bytes / 1e9 / 1000)
    assert made.cost["network"] == pytest.approx(gbit * 450 * 0.01)
    hour = made.cost["cores"] + made.cost["disk"] + made.cost["network"]
    assert made.cost["hour"] == pytest.approx(hour)
    assert made.cost["per_stream_hour"] == pytest.approx(hour / 1000)


def test_gpus_take_over_what_the_profile_says_they_do() -> None:
    made = planned(1000, profile(gpu=0.001))
    assert made.stream.gpus == pytest.approx(2 * 0.001 + 2 * 0.001)
    assert made.stream.detect_cores == pytest.approx(25 * 0.004 + 2 * 0.005)
    assert made.region.gpus == made.region.workers
    assert planned(1000, profile(gpu=0.1)).region.streams_per_worker == 2  # 0.4 of a GPU each


def test_regions_share_the_streams() -> None:
    whole, parts = planned(1000), planned(4000, regions=4)
    assert parts.region == whole.region
    assert plan_text.as_object(parts, CONFIG)["total"]["workers"] == 4 * whole.region.workers


def test_what_a_worker_takes_for_itself_is_not_for_streams() -> None:
    made = planned(1, profile(log=0.5))
    # two commits a second, half a core second each
    assert made.stream.detect_cores > 1  # else the device thread decides
    assert made.region.streams_per_worker == math.floor((10 - 0.065 - 2 * 0.5) / made.stream.detect_cores)


# Placed by hash


@pytest.mark.parametrize(
    ("streams", "capacity", "share"), [(10, 3, 0.2), (40, 9, 0.1), (5, 1, 0.5), (9, 9, 1.0)]
)
def test_crowding_is_the_tail_of_a_binomial(streams: int, capacity: int, share: float) -> None:
    others = streams - 1
    tail = sum(
        math.comb(others, k) * share**k * (1 - share) ** (others - k) for k in range(capacity, others + 1)
    )
    found = crowded(streams, capacity, share)
    # beyond the mean it is called certain: a member that is full on average is no plan
    assert found == pytest.approx(tail if others * share < capacity else 1.0)


def test_members_are_the_fewest_that_hold() -> None:
    for streams in (1, 7, 100, 5000):
        for most in (1.5, 4.2, 60.0):
            found = members(streams, most)
            assert crowded(streams, math.floor(most), 1 / found) <= 0.01
            assert streams <= 0.7 * most * found or found == 1
            fewer = found - 1
            if fewer:
                too_full = streams > 0.7 * most * fewer
                assert too_full or crowded(streams, math.floor(most), 1 / fewer) > 0.01


def test_ingest_cannot_share_what_has_no_partitions() -> None:
    assert ingest_members(100, 1000.0, 8) == (1, 8)
    # of 8 partitions three members take three, three and two: a member has three eighths of the streams
    assert ingest_members(1000, 0.375 * 1000 / 0.7 + 1, 8) == (3, 8)
    # more members than partitions would idle: there must be more of them
    count, partitions = ingest_members(10_000, 100.0, 8)
    assert 143 <= count <= partitions == 256


# More is never had for less


NEEDED = (
    "ingest_machines",
    "ingest_shards",
    "detect_machines",
    "workers",
    "partitions",
    "partition_copies",
    "brokers",
    "transactions_per_s",
    "feeds_gbit",
    "to_brokers_gbit",
    "copies_gbit",
    "from_brokers_gbit",
    "disk_bytes",
    "cores",
)
MEASURED = profile(log=0.0002, broker=0.0005)


def needs(**asked: float) -> list[float]:
    made = planned(int(asked.pop("streams")), MEASURED, **asked)
    found = asdict(made.region)
    return [found[name] for name in NEEDED]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20_000),
    st.integers(0, 5000),
    st.floats(0, 2),
    st.floats(0, 5),
    st.floats(0, 4),
    st.sampled_from([720, 1080]),
    st.integers(1, 4),
    st.sampled_from([CORES, 3 * CORES]),
)
def test_more_never_needs_less(
    streams: int, more: int, faster: float, wider: float, faces: float, lines: int, regions: int, cores: int
) -> None:
    regions = min(regions, streams)
    base = {"streams": streams, "lines": lines, "regions": regions, "cores": cores}
    before = needs(**base)
    for change in (
        {"streams": streams + more},
        {"fps": 2.0 + faster},
        {"bitrate": 5.0 + wider},
        {"faces": 1.0 + faces},
        {"source_fps": 25.0 + 10 * faster},
    ):
        after = needs(**{**base, **change})
        worse = [name for name, a, b in zip(NEEDED, before, after, strict=True) if b < a]
        assert not worse, (change, worse)


# What cannot be meant


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"streams": 0}, "--streams is 0; it must be a whole number from 1 to 10,000,000"),
        ({"fps": 0.0}, "--fps is 0; it must be pictures a second, from 0.01 to 60"),
        ({"fps": math.nan}, "--fps is nan; it must be pictures a second, from 0.01 to 60"),
        ({"fps": 30.0}, "--fps is 30; it must be at most --source-fps (25)"),
        ({"bitrate": -1.0}, "--bitrate is -1; it must be Mbit/s, from 0.01 to 1000"),
        ({"faces": -1.0}, "--faces is -1; it must be a number from 0 to 100"),
        ({"lines": 480}, "--lines is 480; it must be 720 or 1080, the sizes that profiles hold"),
        ({"regions": 11}, "--regions is 11; it must be at most --streams (10)"),
        ({"cores": 0}, "--cores is 0; it must be a whole number from 1 to 1024"),
        ({"nic_gbit": math.inf}, "--nic-gbit is inf; it must be Gbit/s, from 0.01 to 1000"),
    ],
)
def test_silly_input_is_refused_by_name(asked: dict[str, float], sentence: str) -> None:
    with pytest.raises(UnmaskError) as caught:
        planned(int(asked.pop("streams", 10)), **asked)
    assert (caught.value.code, str(caught.value)) == (Code.CONFIG, sentence)


def test_a_silly_price_is_refused_by_name() -> None:
    with pytest.raises(UnmaskError, match=r"^--price-core-hour is -1; it must be a number, at least 0$"):
        plan(Asked(10, 2.0, 5.0, 1.0), profile(), CONFIG, Prices(core_hour=-1.0))


def test_a_machine_too_small_for_one_stream_is_refused() -> None:
    with pytest.raises(
        UnmaskError, match=r"^--cores is 1; it must be more: a stream takes 0.97 cores of detect, and 0.94 of"
    ):
        planned(10, cores=1, faces=41.0)


def test_a_stream_too_much_for_one_device_is_refused() -> None:
    with pytest.raises(
        UnmaskError, match=r"^--faces is 50; it must be lower: at --fps 2 a stream takes 1.04 "
    ):
        planned(10, faces=50.0)


# What is printed


def test_everything_assumed_is_printed() -> None:
    out = StringIO()
    asked = Asked(1000, 2.0, 5.0, 1.0, cores=2 * CORES)
    assert plan_text.run(asked, profile(), CONFIG, NO_PRICES, False, out) == 0
    text = out.getvalue()
    for word in (
        "EXTRAPOLATED",
        "abacus",
        "NOT counted",
        "media.partitions=",
        "media.retention_bytes=",
        "hash",
    ):
        assert word in text
    assert "BEYOND" not in text


def test_what_is_beyond_its_limit_says_so() -> None:
    made = planned(100_000)
    text = "\n".join(plan_text.lines(made, CONFIG))
    assert f"BEYOND: {made.region.workers} members in one consumer group" in text
    assert "ingest.partitions=" in text


def test_json_holds_what_the_text_does() -> None:
    out = StringIO()
    asked = Asked(1000, 2.0, 5.0, 1.0)
    plan_text.run(asked, profile(), CONFIG, Prices(core_hour=0.1), True, out)
    told = json.loads(out.getvalue())
    made = plan(asked, profile(), CONFIG, Prices(core_hour=0.1))
    assert told["per_region"] == asdict(made.region)
    assert told["cost"] == made.cost
    assert told["assumed"]
    assert told["asked"]["streams"] == 1000


# Profiles


def test_without_a_profile_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="run `unmask bench` first"):
        find(None, tmp_path / "profile.json")
    with pytest.raises(UnmaskError, match=r"^--profile is 'nowhere'; it must be a file or "):
        find("nowhere", tmp_path / "profile.json")


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(profile().to_json())
    assert find(None, path) == find(str(path), Path("none")) == profile()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("{}", "'schema'"),
        ("nonsense", "Expecting value"),
        ("[]", "is not a profile"),
        (profile().to_json().replace('"schema": 1', '"schema": 9'), "its schema is not 1"),
        (profile().to_json().replace('"cores": 10', '"cores": 0'), "cores is 0"),
        (replace(profile(), figures={"detect": figure(-1.0)}).to_json(), "detect.cpu_s is -1.0"),
        (replace(profile(), figures={"detect": figure(math.nan)}).to_json(), "detect.cpu_s is nan"),
    ],
)
def test_a_broken_profile_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(UnmaskError, match=wrong) as caught:
        parse(text, "p.json")
    assert str(caught.value).startswith("p.json is not a profile that `unmask bench` wrote: ")


def test_a_figure_that_is_missing_is_named() -> None:
    figures = {name: value for name, value in profile().figures.items() if name != "detect"}
    with pytest.raises(
        UnmaskError, match=r"^profile made-up has no figure detect; `unmask bench` measures it$"
    ):
        planned(10, replace(profile(), figures=figures))


def test_a_profile_without_a_cluster_borrows_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {name: value for name, value in profile().figures.items() if not name.startswith("kafka")}
    alone = replace(profile(), figures=own)
    monkeypatch.setattr(planning, "shipped", dict)
    with pytest.raises(UnmaskError, match="has no figures of a cluster"):
        planned(10, alone)
    (tmp_path / "other.json").write_text(profile(log=0.001).to_json())
    monkeypatch.setattr(planning, "shipped", lambda: {"other": tmp_path / "other.json"})
    made = planned(10, alone)
    assert made.lent == "other"
    assert "those of profile other" in "\n".join(plan_text.lines(made, CONFIG))


def test_constants_of_others_are_as_they_are_there() -> None:
    assert planning.LINGER_S == LINGER_S
    assert planning.COMPACT_S == COMPACT_SEGMENT_S
