"""`unmask plan`: how many machines, brokers and partitions so many feeds take, and what they cost.

Arithmetic on measured CPU seconds (`stream.profile`), nothing else: what each feed asks of each part, divided
by what a machine of the profile gives. Streams are placed by hash, so some members get more than their share;
that is counted. More streams never need fewer of anything.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.profile import Name, Of, Profile, Step, log_figure, shipped
from stream.profile import read as read_profile

UTILISATION = 0.7
"""Share of a machine that is used on average: the rest is for chance, closer looks and takeovers."""
CROWDED = 0.01
"""Share of the streams that may be on a member with more than it can do: placed by hash, to avoid that for
every one would take several times the machines. There they are looked at less often, counted as STALE."""
SPARES = 1
"""Machines of each part that a region has beyond its load: one may be down."""
PARTITIONS_PER_WORKER = 2
"""The partition count of `media` is fixed at creation: the group may grow to twice its size."""
LEAST_PARTITIONS = 8
PARTITIONS_PER_BROKER = 4000
"""Copies of partitions on one broker, an old and careful rule of Kafka's operators; not measured."""
GROUP_MEMBERS = 500
"""Members of one consumer group beyond which the plan says so: each change of members stops every one of
them. A guess; three were tried."""
TOPICS_LIKE_MEDIA = 5
"""media, state, scores, alerts and deadletter have as many partitions each."""
DISK_FILL = 0.7
"""Share of a disk that may be used: retention removes whole segments, and a full broker stops."""

GOP_S = 2.0
"""Between keyframes, where a chunk is cut too: the usual setting of live encoders."""
CHUNK_OVERHEAD_BYTES = 1100
"""Container and headers of a chunk (`stream.chunks`)."""
FRAME_RECORD_BYTES, FACE_RECORD_BYTES = 420, 290
"""A score record with headers, measured on the demo: 344 bytes and 283 for each face."""
STATE_BYTES, FACE_STATE_BYTES = 3000, 5000
"""A stream's state, measured on the demo: 7.1 kB with one face."""
COMPRESSED = 0.4
"""What lz4 leaves of scores and states: 0.30 and 0.39 on those of the demo."""

LINGER_S = 0.1
"""How long a writer of ingest collects for one transaction (`stream.kafka_producer`)."""
COMPACT_S = 60.0
"""Of `state` this much is not compacted yet (`stream.kafka_topics`), and is read at a takeover."""
DETECT_CORES, INGEST_CORES, SHARD_CORES = 0.065, 0.05, 0.02
"""What a detect worker, an ingest process and each of its shards take of a core over Kafka, idle: measured at
0.063, 0.048 and 0.015 to 0.018 on 2 cores of a Xeon."""

SMALL, LARGE = 30_000, 300_000
"""Bytes of the chunks that profiles measure logs with."""
HOURS_PER_MONTH = 730.0
GB = 1e9


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be planned. `fps`: pictures looked at a second, as in `unmask attach --fps`; `source_fps`:
    pictures that the feed brings; `bitrate` Mbit/s of a feed; `faces` in view on average."""

    streams: int
    fps: float
    bitrate: float
    faces: float
    source_fps: float = 25.0
    lines: int = 1080
    regions: int = 1
    cores: int | None = None
    nic_gbit: float = 10.0


@dataclass(frozen=True, slots=True)
class Prices:
    """In whatever currency; None was not given and counts nothing."""

    core_hour: float | None = None
    gpu_hour: float | None = None
    disk_gb_month: float | None = None
    network_gb: float | None = None

    def given(self) -> bool:
        return any(price is not None for price in asdict(self).values())


@dataclass(frozen=True, slots=True)
class Stream:
    """What one stream asks of each part: cores, share of a thread or GPU, bytes and chunks a second."""

    ingest_cores: float
    detect_cores: float
    device: float
    """Of the one thread of its worker that reads faces; 0 where a GPU does."""
    gpus: float
    broker_cores: float
    media_bytes: float
    output_bytes: float
    state_bytes: float
    chunks: float


@dataclass(frozen=True, slots=True)
class Region:
    """What one region needs: a cluster with its ingest and its detect. Spares included."""

    streams: int
    ingest_machines: int
    ingest_shards: int
    detect_machines: int
    workers: int
    streams_per_worker: int
    """As many as a worker can do while its neighbours on the machine leave it cores."""
    gpus: int
    partitions: int
    source_partitions: int
    brokers: int
    brokers_for: str
    transactions_per_s: float
    transaction_cores: float
    """Of the brokers' cores, what transactions take beside what is in them."""
    partition_copies: int
    feeds_gbit: float
    to_brokers_gbit: float
    copies_gbit: float
    from_brokers_gbit: float
    disk_bytes: float
    takeover_bytes: float
    cores: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Per region and in all. `cost` by what it is for, per hour, and `per_stream_hour`."""

    asked: Asked
    profile: Profile
    lent: str | None
    """The shipped profile that the figures of a cluster come from, if the own one has none."""
    stream: Stream
    region: Region
    cost: dict[str, float]


_BOUNDS: tuple[tuple[str, float, float, str], ...] = (
    ("streams", 1, 10_000_000, "a whole number from 1 to 10,000,000"),
    ("fps", 0.01, 60, "pictures a second, from 0.01 to 60"),
    ("bitrate", 0.01, 1000, "Mbit/s, from 0.01 to 1000"),
    ("faces", 0, 100, "a number from 0 to 100"),
    ("source_fps", 1, 240, "pictures a second, from 1 to 240"),
    ("regions", 1, 1000, "a whole number from 1 to 1000"),
    ("cores", 1, 1024, "a whole number from 1 to 1024"),
    ("nic_gbit", 0.01, 1000, "Gbit/s, from 0.01 to 1000"),
)


def check(asked: Asked, prices: Prices) -> None:
    """Raise `UnmaskError` (CONFIG) naming option, value and what would be right."""
    for name, low, high, right in _BOUNDS:
        value = getattr(asked, name)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise _wrong(name, value, right)
    if asked.lines not in (720, 1080):
        raise _wrong("lines", asked.lines, "720 or 1080, the sizes that profiles hold")
    if asked.fps > asked.source_fps:
        raise _wrong("fps", asked.fps, f"at most --source-fps ({asked.source_fps:g})")
    if asked.regions > asked.streams:
        raise _wrong("regions", asked.regions, f"at most --streams ({asked.streams})")
    for name, price in asdict(prices).items():
        if price is not None and not (math.isfinite(price) and price >= 0):
            raise _wrong(f"price_{name}", price, "a number, at least 0")


def _wrong(name: str, value: float, right: str) -> UnmaskError:
    return UnmaskError(Code.CONFIG, f"--{name.replace('_', '-')} is {value:g}; it must be {right}")


def with_cluster(profile: Profile) -> tuple[Profile, str | None]:
    """Return the profile with figures of a cluster, a shipped one's if it has none, and that one's name.

    Raises `UnmaskError` (CONFIG) if there are none anywhere.
    """
    steps = [log_figure(Of.KAFKA, step) for step in Step]
    if profile.has(*steps):
        return profile, None
    for name, path in shipped().items():
        other = read_profile(path)
        if other.has(*steps):
            names = [log_figure(of, step) for of in (Of.KAFKA, Of.BROKER) for step in Step]
            found = {key: other.figures[key] for key in names if other.has(key)}
            return profile.with_figures(found), name
    raise UnmaskError(
        Code.CONFIG,
        f"profile {profile.name} has no figures of a cluster; `unmask bench --set "
        "kafka.bootstrap_servers=HOST:PORT` measures them",
    )


def plan(asked: Asked, profile: Profile, config: Config, prices: Prices) -> Plan:
    """Return what `asked` needs. Raises `UnmaskError` (CONFIG) for what makes no sense, or does not fit."""
    check(asked, prices)
    profile, lent = with_cluster(profile)
    stream = per_stream(asked, profile, config)
    count = math.ceil(asked.streams / asked.regions)
    region = _Sizing(count, asked, stream, profile, config).region()
    return Plan(asked, profile, lent, stream, region, _cost(asked, region, prices))


def per_stream(asked: Asked, profile: Profile, config: Config) -> Stream:
    """Return what one stream asks of each part."""
    chunks = 1000 / config.media.chunk_ms + 1 / GOP_S
    video = asked.bitrate * 1e6 / 8
    media = video + chunks * CHUNK_OVERHEAD_BYTES
    ticks = 1 / config.ingest.tick_s
    commits = 1000 / config.log.commit_ms
    scores = asked.fps * (FRAME_RECORD_BYTES + FACE_RECORD_BYTES * asked.faces)
    states = commits * (STATE_BYTES + FACE_STATE_BYTES * asked.faces)
    costs = _Costs(asked, profile, config, chunks, media / chunks)
    return Stream(
        ingest_cores=costs.remux() + costs.append(Of.KAFKA, ticks) + costs.share_of_shard(ticks),
        detect_cores=costs.decode()
        + costs.device()
        + costs.poll(Of.KAFKA)
        + costs.outputs(Of.KAFKA, commits),
        device=costs.device(),
        gpus=costs.gpus(),
        broker_cores=costs.broker(ticks, commits),
        media_bytes=media,
        output_bytes=COMPRESSED * scores,
        state_bytes=COMPRESSED * states,
        chunks=chunks,
    )


class _Costs:
    """Cores that one stream takes, part by part."""

    def __init__(
        self, asked: Asked, profile: Profile, config: Config, chunks: float, chunk_bytes: float
    ) -> None:
        self._asked = asked
        self._profile = profile
        self._config = config
        self._chunks = chunks
        self._chunk_bytes = chunk_bytes
        self._on_gpu = profile.has(Name.GPU_DETECT, Name.GPU_FACE)

    def remux(self) -> float:
        name = Name.REMUX_720 if self._asked.lines == 720 else Name.REMUX_1080
        cost, bit_rate = self._profile.cost(name), self._profile.figures[name].size * 8 / 1e6
        # By bytes or by packets, whichever is more; what a still stream costs is not known.
        return cost * max(1.0, self._asked.bitrate / bit_rate, self._asked.source_fps / 25)

    def append(self, of: Of, ticks: float) -> float:
        chunk = self._between(of, Step.APPEND_SMALL, Step.APPEND_LARGE)
        return self._chunks * chunk + ticks * self._profile.cost(log_figure(of, Step.APPEND_RECORD))

    def poll(self, of: Of) -> float:
        return self._chunks * self._between(of, Step.POLL_SMALL, Step.POLL_LARGE)

    def share_of_shard(self, ticks: float) -> float:
        """Return the stream's share of what its shard takes for itself and for transactions."""
        size = self._config.ingest.shard_size
        transactions = shard_transactions(size * (self._chunks + ticks))
        return (SHARD_CORES + transactions * transaction(self._profile, Of.KAFKA)) / size

    def decode(self) -> float:
        decode, picture = (
            (Name.DECODE_720, Name.PICTURE_720)
            if self._asked.lines == 720
            else (Name.DECODE_1080, Name.PICTURE_1080)
        )
        return self._asked.source_fps * self._profile.cost(decode) + self._asked.fps * self._profile.cost(
            picture
        )

    def reading(self) -> float:
        cost = self._profile.cost
        return 0.0 if self._on_gpu else self._looks(cost(Name.DETECT), cost(Name.FACE))

    def device(self) -> float:
        """Return the time of the one thread that reads faces, by the clock: it may use several cores."""
        wall = self._profile.wall
        return 0.0 if self._on_gpu else self._looks(wall(Name.DETECT), wall(Name.FACE))

    def gpus(self) -> float:
        cost = self._profile.cost
        return self._looks(cost(Name.GPU_DETECT), cost(Name.GPU_FACE)) if self._on_gpu else 0.0

    def outputs(self, of: Of, commits: float) -> float:
        """Return the cost of a stream's scores and states; that of the transaction is its worker's."""
        score = self._asked.fps * self._profile.cost(log_figure(of, Step.APPEND_RECORD))
        return score + commits * self._profile.cost(log_figure(of, Step.APPEND_SMALL))

    def broker(self, ticks: float, commits: float) -> float:
        """Return what brokers take for the stream, all copies together; 0 if that was not measured."""
        if not broker_measured(self._profile):
            return 0.0
        size, copies = self._config.ingest.shard_size, self._config.kafka.replication
        transactions = shard_transactions(size * (self._chunks + ticks)) / size
        written = self.append(Of.BROKER, ticks) + self.outputs(Of.BROKER, commits)
        return copies * written + self.poll(Of.BROKER) + transactions * transaction(self._profile, Of.BROKER)

    def _looks(self, picture: float, face: float) -> float:
        return self._asked.fps * (picture + self._asked.faces * face)

    def _between(self, of: Of, small: Step, large: Step) -> float:
        """Return the cost of a chunk of this size, on the line through the two that were measured."""
        low = self._profile.cost(log_figure(of, small))
        high = max(low, self._profile.cost(log_figure(of, large)))
        return low + (high - low) * max(0.0, (self._chunk_bytes - SMALL) / (LARGE - SMALL))


def workers_per_machine(asked: Asked, profile: Profile) -> int:
    """Return detect workers on a machine: one per GPU, else each of the size that was measured."""
    if profile.has(Name.GPU_DETECT, Name.GPU_FACE):
        return 1
    return max(1, (asked.cores or profile.cores) // profile.cores)


def broker_measured(profile: Profile) -> bool:
    """Return whether it is known what brokers' CPU does; only a broker beside the bench can be watched."""
    return profile.has(*(log_figure(Of.BROKER, step) for step in Step))


def transaction(profile: Profile, of: Of) -> float:
    """Return the CPU seconds that a transaction costs beside the chunk in it."""
    alone = profile.cost(log_figure(of, Step.APPEND_ALONE))
    return max(0.0, alone - profile.cost(log_figure(of, Step.APPEND_SMALL)))


def shard_transactions(records: float) -> float:
    """Return transactions a second of a writer that gets so many records a second: it waits for one, then
    collects for LINGER_S."""
    return records / (1 + records * LINGER_S)


def fewest(start: int, holds: Callable[[int], bool]) -> int:
    """Return the smallest number from `start` on that holds; all beyond one that does must hold too."""
    low, high = start - 1, start
    while not holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def members(streams: int, most: float) -> int:
    """Return the machines that streams need of which one machine can do `most`, placed by hash.

    On average UTILISATION of a machine is used, and at most CROWDED of the streams are where more are than it
    can do.
    """
    start = max(1, math.ceil(streams / (UTILISATION * most)))
    return fewest(start, lambda count: crowded(streams, math.floor(most), 1 / count) <= CROWDED)


def detect_members(streams: int, most: float, workers: int, worker_most: float) -> int:
    """Return the same for detect: each machine carries some workers, of which one alone can do less."""
    capacity = math.floor(worker_most)
    start = members(streams, most)
    return fewest(start, lambda count: crowded(streams, capacity, 1 / (workers * count)) <= CROWDED)


def ingest_members(streams: int, most: float, partitions: int) -> tuple[int, int]:
    """Return the same for ingest, whose members share the partitions of `sources`, and those it needs."""
    while True:
        for count in range(1, partitions + 1):
            share = math.ceil(partitions / count) / partitions
            enough = streams * share <= UTILISATION * most
            if enough and crowded(streams, math.floor(most), share) <= CROWDED:
                return count, partitions
        partitions *= 2


def crowded(streams: int, capacity: int, share: float) -> float:
    """Return the chance that a stream shares its member with `capacity` others or more, each of which is
    there with probability `share`: the upper tail of a binomial distribution."""
    others = streams - 1
    if capacity > others:
        return 0.0
    if share >= 1 or others * share >= capacity:
        return 1.0
    chance = math.exp(
        math.lgamma(others + 1)
        - math.lgamma(capacity + 1)
        - math.lgamma(others - capacity + 1)
        + capacity * math.log(share)
        + (others - capacity) * math.log1p(-share)
    )
    total = 0.0
    for number in range(capacity, others + 1):
        total += chance
        chance *= (others - number) / (number + 1) * share / (1 - share)
        if chance < 1e-12:
            break
    return total


class _Sizing:
    """Sizes one region of `streams`."""

    def __init__(self, streams: int, asked: Asked, stream: Stream, profile: Profile, config: Config) -> None:
        self._streams = streams
        self._asked = asked
        self._stream = stream
        self._profile = profile
        self._config = config
        self._copies = config.kafka.replication
        self._cores = asked.cores or profile.cores
        self._nic = UTILISATION * asked.nic_gbit * 1e9 / 8
        self._commits = 1000 / config.log.commit_ms
        self._media = streams * stream.media_bytes
        self._outputs = streams * (stream.output_bytes + stream.state_bytes)

    def region(self) -> Region:
        config, stream, streams = self._config, self._stream, self._streams
        each = workers_per_machine(self._asked, self._profile)
        worker_most = self._worker_most()
        attaching, sources = ingest_members(streams, self._per_ingest(), config.ingest.partitions)
        ingest = SPARES + attaching
        machines = SPARES + detect_members(streams, self._machine_most(each), each, worker_most)
        workers = machines * each
        shards = math.ceil(streams / config.ingest.shard_size)
        partitions = max(LEAST_PARTITIONS, PARTITIONS_PER_WORKER * workers)
        copies = self._copies * (TOPICS_LIKE_MEDIA * partitions + sources)
        records = config.ingest.shard_size * (stream.chunks + 1 / config.ingest.tick_s)
        written, committed = shards * shard_transactions(records), workers * self._commits
        cores = self._transaction_cores(written, committed)
        brokers, reason = self._brokers(committed, copies)
        return Region(
            streams=streams,
            ingest_machines=ingest,
            ingest_shards=shards,
            detect_machines=machines,
            workers=workers,
            streams_per_worker=math.floor(worker_most),
            gpus=workers if stream.gpus else 0,
            partitions=partitions,
            source_partitions=sources,
            brokers=brokers,
            brokers_for=reason,
            transactions_per_s=written + committed,
            transaction_cores=cores,
            partition_copies=copies,
            feeds_gbit=streams * self._asked.bitrate / 1000,
            to_brokers_gbit=_gbit(self._media + self._outputs),
            copies_gbit=_gbit((self._copies - 1) * (self._media + self._outputs)),
            from_brokers_gbit=_gbit(self._media),
            disk_bytes=self._disk(),
            takeover_bytes=streams * stream.state_bytes * COMPACT_S / partitions,
            cores=(ingest + machines + brokers) * self._cores,
        )

    def _per_ingest(self) -> float:
        return self._most("ingest", self._cores - INGEST_CORES, self._stream.ingest_cores, math.inf)

    def _machine_most(self, workers: int) -> float:
        """Return how many streams the workers of a machine can do together, their own expenses taken off."""
        commit = self._commits * self._profile.cost(log_figure(Of.KAFKA, Step.COMMIT))
        room = self._cores - workers * (DETECT_CORES + commit)
        return self._most("detect", room, self._stream.detect_cores, math.inf)

    def _worker_most(self) -> float:
        """Return how many streams one worker can do: a thread, or a GPU, reads all their faces."""
        stream = self._stream
        each = stream.gpus or stream.device
        if each > 1:
            raise UnmaskError(
                Code.CONFIG,
                f"--faces is {self._asked.faces:g}; it must be lower: at --fps {self._asked.fps:g} a stream "
                f"takes {each:.2f} times what one worker's device does",
            )
        return min(1 / each if each else math.inf, self._machine_most(1))

    def _most(self, part: str, room: float, each: float, otherwise: float) -> float:
        """Return how many streams a machine can do at all, by cores, by network or by `otherwise`.

        Raises `UnmaskError` if not one.
        """
        by_network = self._asked.nic_gbit * 1e9 / 8 / self._stream.media_bytes
        found = min(room / each if each else math.inf, by_network, otherwise)
        if found >= 1 and room > 0:
            return found
        raise UnmaskError(
            Code.CONFIG,
            f"--cores is {self._cores}; it must be more: a stream takes {each:.2f} cores of {part}, and "
            f"{room:.2f} of a machine are left for streams (or lower --fps, --faces; more --regions)",
        )

    def _transaction_cores(self, written: float, committed: float) -> float:
        if not broker_measured(self._profile):
            return 0.0
        commit = self._profile.cost(log_figure(Of.BROKER, Step.COMMIT))
        return written * transaction(self._profile, Of.BROKER) + committed * commit

    def _brokers(self, committed: float, copies: int) -> tuple[int, str]:
        """Return brokers, one more than the load needs, and what decides their number."""
        written, committing = self._media + self._outputs, 0.0
        if broker_measured(self._profile):
            committing = committed * self._profile.cost(log_figure(Of.BROKER, Step.COMMIT))
        needs = {
            "network in": self._copies * written / self._nic,
            "network out": ((self._copies - 1) * written + self._media) / self._nic,
            "CPU": (self._streams * self._stream.broker_cores + committing) / (UTILISATION * self._cores),
            "copies of partitions": copies / PARTITIONS_PER_BROKER,
        }
        reason = max(needs, key=lambda name: needs[name])
        brokers = SPARES + math.ceil(needs[reason])
        return (brokers, reason) if brokers > self._copies else (self._copies, "kafka.replication")

    def _disk(self) -> float:
        """Return bytes of disk, all copies, with the room that must stay free."""
        stream, config = self._stream, self._config
        kept = stream.media_bytes * config.media.retention_s
        kept += stream.output_bytes * config.log.records_retention_s
        kept += stream.state_bytes * COMPACT_S
        return self._streams * kept * self._copies / DISK_FILL


def _gbit(bytes_per_s: float) -> float:
    return bytes_per_s * 8 / 1e9


def _cost(asked: Asked, region: Region, prices: Prices) -> dict[str, float]:
    if not prices.given():
        return {}
    network_gb_hour = 3600 / 8 * (region.to_brokers_gbit + region.copies_gbit + region.from_brokers_gbit)
    hourly = {
        "cores": region.cores * (prices.core_hour or 0.0),
        "gpus": region.gpus * (prices.gpu_hour or 0.0),
        "disk": region.disk_bytes / GB * (prices.disk_gb_month or 0.0) / HOURS_PER_MONTH,
        "network": network_gb_hour * (prices.network_gb or 0.0),
    }
    total = {name: cost * asked.regions for name, cost in hourly.items()}
    hour = sum(total.values())
    return {**total, "hour": hour, "per_stream_hour": hour / asked.streams}
