"""A real RTMP server whose publisher is killed, restarted and frozen at random, 20 times in 10 minutes.

    python benchmarks/outages.py --minutes 10 --json outages.json

Measured, from the records in the log alone: how long until an outage was told (bound: `ingest.silence_s`),
how long until pictures came again once the publisher was back, memory of the ingest process, and whether
every frame counted at ingest comes out of the chunks again: as many as counted, numbers drawn into the
pictures without a gap. Needs ffmpeg and nginx with its RTMP module; the clip is made on the spot.
Exit code 1 if an outage was noticed late, a return was missed or a frame is missing.
"""

import argparse
import functools
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import av
import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stream.chunks import read_chunk
from stream.clock import Deadline, SystemClock
from stream.config import Config, LogSettings, Media
from stream.controls import Tick, from_body
from stream.ingest import IngestSupervisor
from stream.log import Log, TopicPartition
from stream.records import ChunkMeta, Control, decode_headers
from stream.sources import parse_sources
from stream.sqlite_log import SqliteLog
from stream.topics import media_partition, topic_specs
from tests.stream.media import make_clip, read_number
from tests.stream.servers import Publisher, RtmpServer, running

STREAM = "outages"
CLIP_S = 20
FPS = 25
OUTAGES_PER_MINUTE = 2
LIVE_S = (11.0, 14.0)
"""Live time before an outage: longer than `silence_s`, so that each outage is one of its own."""
DOWN_S = (1.0, 6.0)
"""How long a killed publisher stays away."""
FROZEN_S = (11.0, 13.0)
"""How long a frozen publisher stays frozen: beyond `silence_s`, or it would be no outage."""
RETURN_S = 40.0
"""Pictures must be back within the longest backoff and an attach."""
SAMPLE_S = 5.0


class Fault(StrEnum):
    KILLED = "killed"
    RESTARTED = "restarted"
    FROZEN = "frozen"


@dataclass(slots=True)
class Outage:
    """Times are UTC microseconds; `noticed_s` from the fault, `returned_s` from the publisher's return."""

    fault: Fault
    began_us: int
    over_us: int
    noticed_s: float | None = None
    returned_s: float | None = None
    code: str | None = None


@dataclass(slots=True)
class Frames:
    """`counted` by ingest; `in_chunks` packets read back; `decoded` of them; `out_of_sequence` pictures whose
    drawn number does not follow the one before within an epoch."""

    counted: int
    in_chunks: int = 0
    decoded: int = 0
    before_keyframe: int = 0
    out_of_sequence: int = 0
    epochs: int = 0
    attachments: int = 0


@dataclass(slots=True)
class Memory:
    """Resident MiB of the ingest process every `SAMPLE_S`."""

    samples: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        quarter = max(1, len(self.samples) // 4)
        settled = self.samples[quarter:]
        return {
            "first_quarter": round(statistics.median(self.samples[:quarter]), 1),
            "last_quarter": round(statistics.median(self.samples[-quarter:]), 1),
            "highest": round(max(self.samples), 1),
            "growth_after_first_quarter": round(settled[-1] - settled[0], 1) if settled else 0.0,
        }


class Run:
    """One feed over a real log, and a publisher to be tormented."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.rng = random.Random(seed)
        self.clock = SystemClock()
        self.config = Config(media=Media(partitions=1))
        self.factory = functools.partial(SqliteLog, directory / "log", LogSettings(), self.clock)
        self.log: Log = self.factory()
        self.log.create_topics(topic_specs(Config(media=Media(partitions=1))))
        self.supervisor = IngestSupervisor(self.config, self.factory, self.clock, self.rng)
        self.memory = Memory()
        self.outages: list[Outage] = []
        self._next_sample = 0.0

    def torment(self, minutes: float, console: Console) -> None:
        clip = make_clip(
            self.directory / "clip.mp4",
            seconds=CLIP_S,
            fps=FPS,
            size=(320, 240),
            gop=FPS,
            bframes=0,
            audio="aac",
        )
        end = time.monotonic() + 60 * minutes
        count = round(OUTAGES_PER_MINUTE * minutes)
        faults = self._faults(count)
        with running(RtmpServer(self.directory / "nginx")) as server:
            assert isinstance(server, RtmpServer)
            with running(Publisher(clip, server.url(STREAM))) as publisher:
                self.supervisor.start(parse_sources([f"{STREAM}={server.url(STREAM)}"]))
                for number, fault in enumerate(faults):
                    self._wait_live(self.rng.uniform(*LIVE_S))
                    self.outages.append(self._strike(fault, publisher))
                    console.print(f"{number + 1}/{count} {fault}")
                while time.monotonic() < end:
                    self._rest(0.2)
                self._wait_live(2.0)
                self.supervisor.stop(Deadline(10.0, self.clock))

    def _faults(self, count: int) -> list[Fault]:
        faults = [list(Fault)[n % len(Fault)] for n in range(count)]
        self.rng.shuffle(faults)
        return faults

    def _strike(self, fault: Fault, publisher: Any) -> Outage:
        began = self.clock.now_us()
        if fault is Fault.FROZEN:
            publisher.freeze()
            self._rest(self.rng.uniform(*FROZEN_S))
            publisher.thaw()
        else:
            publisher.kill()
            if fault is Fault.KILLED:
                self._rest(self.rng.uniform(*DOWN_S))
            publisher.restart()
        return Outage(fault, began, self.clock.now_us())

    def _wait_live(self, seconds: float) -> None:
        """Return when the feed has been live for `seconds` without a break, or never was in time."""
        since = None
        end = time.monotonic() + RETURN_S + seconds
        while time.monotonic() < end:
            status = self.supervisor.statuses().get(STREAM)
            live = status is not None and status.phase == "live"
            since = (since or time.monotonic()) if live else None
            if since is not None and time.monotonic() - since >= seconds:
                return
            self._rest(0.1)

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            self.supervisor.poll()
            self._sample()
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(0.1, left))

    def _sample(self) -> None:
        now = time.monotonic()
        if now < self._next_sample or STREAM not in self.supervisor.statuses():
            return
        self._next_sample = now + SAMPLE_S
        sizes = [psutil.Process(pid).memory_info().rss for pid in self.supervisor.pids()]
        if sizes:
            self.memory.samples.append(sum(sizes) / 2**20)

    def records(self) -> list[tuple[ChunkMeta, bytes]]:
        partition = TopicPartition("unmask.media", media_partition(STREAM, 1))
        found = self.log.read(partition, self.log.begin_offset(partition))
        return [(decode_headers(record.key, record.headers), record.value or b"") for record in found]


def judge(outages: Sequence[Outage], records: Sequence[tuple[ChunkMeta, bytes]]) -> None:
    """Fill in when each outage was told and when pictures came again."""
    ticks = [
        (meta.capture_us, from_body(Tick, value)) for meta, value in records if meta.control is Control.TICK
    ]
    starts = [meta.capture_us for meta, _ in records if meta.pts is not None and meta.control is None]
    for outage in outages:
        told = next(((at, tick) for at, tick in ticks if at > outage.began_us and not tick.video), None)
        if told is not None:
            outage.noticed_s = (told[0] - outage.began_us) / 1e6
            outage.code = told[1].code
            again = next((at for at in starts if at > max(told[0], outage.over_us)), None)
            outage.returned_s = None if again is None else (again - outage.over_us) / 1e6


def count_frames(records: Sequence[tuple[ChunkMeta, bytes]], counted: int) -> Frames:
    """Decode all chunks, epoch by epoch."""
    frames = Frames(counted)
    epochs: dict[tuple[str, int], list[tuple[ChunkMeta, bytes]]] = {}
    for meta, value in records:
        if meta.control is None:
            epochs.setdefault((meta.attachment, meta.epoch), []).append((meta, value))
    frames.epochs = len(epochs)
    frames.attachments = len({attachment for attachment, _ in epochs})
    for chunks in epochs.values():
        packets = [packet for meta, value in chunks for packet in read_chunk(meta, value).video]
        first = next((n for n, packet in enumerate(packets) if packet.is_keyframe), len(packets))
        frames.in_chunks += len(packets)
        frames.before_keyframe += first
        numbers = list(_numbers(chunks[0][0], packets[first:]))
        frames.decoded += len(numbers)
        total = CLIP_S * FPS
        frames.out_of_sequence += sum(
            (before + 1) % total != after for before, after in itertools.pairwise(numbers)
        )
    return frames


def _numbers(meta: ChunkMeta, packets: Sequence[Any]) -> Iterator[int]:
    """Yield the number drawn into each decoded picture."""
    assert meta.codec is not None
    context: Any = av.CodecContext.create(meta.codec.name, "r")
    context.extradata = meta.codec.extradata or None
    context.thread_count = 1
    for packet in [*packets, None]:
        for frame in context.decode(packet):
            yield read_number(frame.to_ndarray(format="gray"))


def show(console: Console, run: Run, frames: Frames) -> None:
    table = Table("outage", "noticed after s", "code", "pictures again after s")
    for outage in run.outages:
        times = ["never" if t is None else f"{t:.2f}" for t in (outage.noticed_s, outage.returned_s)]
        table.add_row(outage.fault, times[0], outage.code or "", times[1])
    console.print(table)
    console.print(f"frames: {asdict(frames)}")
    console.print(f"memory MiB: {run.memory.summary()}")


def passed(run: Run, frames: Frames) -> bool:
    silence = run.config.ingest.silence_s
    noticed = all(o.noticed_s is not None and o.noticed_s <= silence for o in run.outages)
    returned = all(o.returned_s is not None for o in run.outages)
    exact = frames.counted == frames.in_chunks == frames.decoded + frames.before_keyframe
    return noticed and returned and exact and not frames.out_of_sequence


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("outages.json"))
    arguments = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as directory:
        run = Run(Path(directory), arguments.seed)
        run.torment(arguments.minutes, console)
        records = run.records()
        judge(run.outages, records)
        status = run.supervisor.statuses()[STREAM]
        frames = count_frames(records, status.frames)
        run.log.close()
    show(console, run, frames)
    result = {
        "passed": passed(run, frames),
        "minutes": arguments.minutes,
        "seed": arguments.seed,
        "silence_s": run.config.ingest.silence_s,
        "outages": [asdict(outage) for outage in run.outages],
        "frames": asdict(frames),
        "memory_mib": run.memory.summary() | {"samples": [round(size, 1) for size in run.memory.samples]},
        "feed": {"attempts": status.attempts, "losses": status.losses, "discarded": status.discarded},
        "shard_restarts": run.supervisor.restarts,
    }
    arguments.json.write_text(json.dumps(result, indent=1))
    console.print(f"{'passed' if result['passed'] else 'FAILED'}; written to {arguments.json}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
