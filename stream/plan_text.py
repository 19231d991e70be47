"""A plan in words, with everything that it assumes, and as JSON; what `unmask plan` prints."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, TextIO

from stream.config import Config
from stream.plan import (
    COMPRESSED,
    CROWDED,
    DISK_FILL,
    FACE_STATE_BYTES,
    GOP_S,
    GROUP_MEMBERS,
    PARTITIONS_PER_BROKER,
    PARTITIONS_PER_WORKER,
    STATE_BYTES,
    UTILISATION,
    Asked,
    Plan,
    Prices,
    broker_measured,
    plan,
    workers_per_machine,
)
from stream.profile import Profile

OK = 0


def run(asked: Asked, profile: Profile, config: Config, prices: Prices, as_json: bool, out: TextIO) -> int:
    """Plan and write it to `out`, as JSON or for a person; return the exit code."""
    made = plan(asked, profile, config, prices)
    out.write(json.dumps(as_object(made, config)) if as_json else "\n".join(lines(made, config)))
    out.write("\n")
    return OK


def as_object(made: Plan, config: Config) -> dict[str, Any]:
    """Return the plan as JSON: what one stream asks, what a region needs, and all regions together."""
    profile = made.profile
    whole = {
        name: value * made.asked.regions
        for name, value in asdict(made.region).items()
        if isinstance(value, int | float) and name not in ("streams_per_worker", "takeover_bytes")
    }
    return {
        "asked": asdict(made.asked),
        "profile": {"name": profile.name, "made": profile.made, "machine": profile.machine()},
        "per_stream": asdict(made.stream),
        "per_region": asdict(made.region),
        "total": whole,
        "cost": made.cost,
        "settings": list(_settings(made, config)),
        "limits": list(_limits(made)),
        "assumed": list(_assumptions(made, config)),
    }


def lines(made: Plan, config: Config) -> list[str]:
    """Return the plan for a person, line by line."""
    asked, stream, regions = made.asked, made.stream, made.asked.regions
    gpu = f", {stream.gpus:.4f} of a GPU" if stream.gpus else ""
    return [
        f"{asked.streams:,} streams of {asked.bitrate:g} Mbit/s, looked at {asked.fps:g} times a second, "
        f"faces in view: {asked.faces:g}; regions: {regions}",
        "",
        f"{'':26}{'per region':>12}{'in all':>12}",
        *(
            f"{name:26}{_number(one):>12}{_number(one * regions):>12}  {note}"
            for name, one, note in _rows(made)
        ),
        "",
        f"one stream takes {stream.ingest_cores:.3f} cores of ingest, {stream.detect_cores:.3f} of detect, "
        f"{stream.broker_cores:.3f} of brokers{gpu}",
        _cost(made.cost),
        *_listed("settings", _settings(made, config)),
        *_listed("limits", _limits(made)),
        *_listed("assumed", _assumptions(made, config)),
    ]


def _rows(made: Plan) -> Iterator[tuple[str, float, str]]:
    region = made.region
    yield "ingest machines", region.ingest_machines, f"{region.ingest_shards} shards in a region"
    each = workers_per_machine(made.asked, made.profile)
    yield "detect machines", region.detect_machines, f"{each} worker{'s' if each > 1 else ''} on each"
    yield "detect workers", region.workers, f"none can do more than {region.streams_per_worker} streams"
    yield "brokers", region.brokers, f"decided by {region.brokers_for}"
    yield "cores", region.cores, ""
    if region.gpus:
        yield "GPUs", region.gpus, "one per worker"
    yield "partitions of media", region.partitions, f"{region.partition_copies:,} copies of partitions in all"
    yield (
        "disk, TB",
        region.disk_bytes / 1e12,
        f"{region.disk_bytes / region.brokers / 1e12:.2f} on each broker",
    )
    yield "feeds in, Gbit/s", region.feeds_gbit, ""
    copies = f"and {_number(region.copies_gbit)} between them for copies"
    yield "into brokers, Gbit/s", region.to_brokers_gbit, copies
    yield "out of brokers, Gbit/s", region.from_brokers_gbit, "to detect"
    yield "transactions a second", region.transactions_per_s, ""


def _cost(cost: dict[str, float]) -> str:
    if not cost:
        return "cost: no prices given (--price-core-hour, --price-disk-gb-month, --price-network-gb, ...)"
    parts = ", ".join(
        f"{name} {cost[name]:.2f}" for name in ("cores", "gpus", "disk", "network") if cost[name]
    )
    return f"cost: {cost['per_stream_hour']:.5f} per stream-hour; {cost['hour']:.2f} an hour in all: {parts}"


def _settings(made: Plan, config: Config) -> Iterator[str]:
    """Yield the settings that must be other than they are."""
    region, media, log = made.region, config.media, config.log
    if region.partitions != media.partitions:
        yield f"media.partitions={region.partitions}, before `unmask topics create`; now {media.partitions}"
    if region.source_partitions != config.ingest.partitions:
        now = config.ingest.partitions
        yield f"ingest.partitions={region.source_partitions}, before `unmask topics create`; now {now}"
    rate = region.streams * made.stream.media_bytes
    wanted = math.ceil(rate * media.retention_s)
    if wanted > media.retention_bytes:
        yield f"media.retention_bytes={wanted}; now enough for {_span(media.retention_bytes / rate)}"
    rate = region.streams * made.stream.output_bytes
    wanted = math.ceil(rate * log.records_retention_s)
    if wanted > log.records_retention_bytes:
        enough = _span(log.records_retention_bytes / rate)
        yield f"log.records_retention_bytes={wanted}; now enough for {enough}"
    if workers_per_machine(made.asked, made.profile) > 1 and config.engines.threads == 0:
        yield f"engines.threads={max(1, made.profile.cores // 2)} in detect: workers share a machine's cores"
    if config.sampling.idle_fps != made.asked.fps:
        idle_fps = config.sampling.idle_fps
        yield f"sampling.idle_fps={made.asked.fps:g}, or `unmask attach --fps`; now {idle_fps:g}"


def _limits(made: Plan) -> Iterator[str]:
    """Yield what is beyond its limit, then how near the others are."""
    region = made.region
    if region.workers > GROUP_MEMBERS:
        yield (
            f"BEYOND: {region.workers} members in one consumer group; this plan trusts it up to "
            f"{GROUP_MEMBERS}; more --regions"
        )
    each = region.transactions_per_s / region.brokers
    cores = region.transaction_cores / region.brokers
    taken = f" and take {_number(cores)} of its cores" if broker_measured(made.profile) else ""
    yield f"{region.transactions_per_s:,.0f} transactions a second are {each:,.0f} per broker{taken}"
    yield f"a takeover reads {region.takeover_bytes / 1e6:.1f} MB of state for each partition that moves"


def _assumptions(made: Plan, config: Config) -> Iterator[str]:
    asked, profile = made.asked, made.profile
    yield f"profile {profile.name} of {profile.made}: {profile.machine()}"
    yield f"members {', '.join(profile.members)} on {profile.engine}"
    if made.lent is not None:
        yield f"the log's figures are those of profile {made.lent}: the own one has none of a cluster"
    yield f"a machine carries one ingest, one broker or detect workers; {_machine(asked, profile)}"
    yield (
        f"{100 * UTILISATION:.0f} % of cores and network are used on average: the rest is for chance, "
        f"takeovers, closer looks (sampling.burst_fps {config.sampling.burst_fps:g}); memory is not planned"
    )
    yield (
        f"feeds are H.264 of {asked.lines} lines, {asked.source_fps:g} pictures a second, every one decoded; "
        f"a keyframe every {GOP_S:g} s"
    )
    yield (
        f"streams are placed by hash: so many members that at most {100 * CROWDED:g} % of the streams are on "
        "one that has more than it can do; one spare ingest, worker and broker in each region"
    )
    yield (
        f"{PARTITIONS_PER_WORKER} partitions per worker, so that the group can grow so much; at most "
        f"{PARTITIONS_PER_BROKER} copies of partitions on a broker, a rule of operators"
    )
    yield (
        f"{config.kafka.replication} copies of everything; media kept {config.media.retention_s / 3600:g} h, "
        f"scores {config.log.records_retention_s / 86400:g} days; disks at most {100 * DISK_FILL:.0f} % full"
    )
    state = (STATE_BYTES + FACE_STATE_BYTES * asked.faces) / 1000
    yield (
        f"a state of {state:.1f} kB per stream every {config.log.commit_ms} ms; compression leaves "
        f"{100 * COMPRESSED:.0f} % of scores and states, nothing of it helps media"
    )
    yield _brokers_cpu(profile)
    yield "evidence and its store, dashboards, traffic to other regions are not counted"


def _machine(asked: Asked, profile: Profile) -> str:
    cores = asked.cores or profile.cores
    if cores == profile.cores:
        return f"it has the {cores} cores that were measured, and {asked.nic_gbit:g} Gbit/s"
    times = cores / profile.cores
    return (
        f"it has {cores} cores, {asked.nic_gbit:g} Gbit/s, a worker for each {profile.cores} cores, and is "
        f"taken to do {times:g} times what the measured {profile.cores} cores do: EXTRAPOLATED"
    )


def _brokers_cpu(profile: Profile) -> str:
    if broker_measured(profile):
        return "brokers' CPU was measured on one broker that copies to none; each copy counts as a write more"
    return "brokers' CPU was not measured and is NOT counted; network, copies and partitions decide"


def _listed(title: str, items: Iterator[str]) -> list[str]:
    return ["", f"{title}:", *(f"  - {item}" for item in items)]


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _span(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"
