"""Kafka against the embedded log, in one run: what each carries, how late alerts are, what the log costs.

    python benchmarks/kafka.py --json kafka.json --profile profile.json

Three parts, `--only` picks some of them; each alternates between the two logs, so that both meet the same
machine, and gives the ratio of each round. The broker is one node of `deploy/kafka` on loopback.

log      chunks of 300 kB and 30 kB and records of 1.5 kB appended, chunks read back, transactions with
         outputs, by one writer or reader; CPU of this process and, by itself, of the broker.
latency  feeds over loopback TCP at real time (MPEG-TS, a drawn marker that turns red now and then), watched
         by `unmask watch`, and by `unmask ingest` and `unmask detect` as processes of their own. From
         `capture_time` of the chunk that opened an incident to the alert as another process reads it: a
         read-committed consumer, and a reader of the embedded log, each looking every 5 ms.
share    ingest's chunker and a detect worker with the shipped members over a clip with a face, in this
         process: CPU seconds of all calls into the log and of the log's own threads, over those of the
         process and its decoders. The broker's CPU by itself. Once as fast as it goes, once at real time.

`--profile` adds what the log's part measured to a profile that `unmask bench` wrote. Needs Java and Maven.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

# The folder of this script would come first, and this file has the name of the library.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import psutil
from kafka import KafkaConsumer, TopicPartition
from rich.console import Console
from rich.table import Table

from benchmarks import share
from stream import bench, marker
from stream.assemble import build_reader, log_folder, open_log
from stream.clock import SystemClock
from stream.config import Config, Kafka, LogSettings, Media
from stream.config_file import load
from stream.errors import UnmaskError
from stream.log import Log
from stream.log import TopicPartition as Place
from stream.profile import Figure, Of, Spread, Step, log_figure, machine, read
from stream.records import Topic
from stream.topics import topic_name
from tests.stream.servers import free_port

ROOT = Path(__file__).resolve().parents[1]
BROKER = ROOT / "deploy" / "kafka" / "broker"
UNMASK = Path(sys.executable).with_name("unmask")

PARTITIONS = 4
PORTS_TRIED = 3

CYCLE_S, RED_S = 8.0, 3.5
"""The marker is red for RED_S of each CYCLE_S: an incident opens and is over before the next."""
QUICK_VERDICTS = (
    "verdict.window_s=1",
    "verdict.min_track_s=0.4",
    "verdict.min_samples=2",
    "verdict.open_hold_s=0.4",
    "verdict.close_hold_s=1",
)
"""An incident per cycle, rather than per minute: many openings in little time. What a verdict waits for lies
before the chunk that opens, and is no part of this latency."""
SETTLE_S = 8.0
"""Openings before this are not counted: processes start, code warms up."""
LOOK_S = 0.005
READY_S = 60.0
STOP_S = 20.0

SHARE_LINES = 720


class Cluster:
    """One broker of `deploy/kafka` on a port nobody has, and its CPU seconds."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.servers = f"127.0.0.1:{self._start()}"
        self._process = psutil.Process(int((directory / "node-1" / "pid").read_text()))

    def cpu_s(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def stop(self) -> None:
        self._run("stop")

    def _start(self) -> int:
        """Start it on ports that nobody has, which can only be found out by trying; return the first."""
        for _ in range(PORTS_TRIED - 1):
            port = 20_000 + free_port() % 1_000 * 10
            with contextlib.suppress(subprocess.CalledProcessError):
                self._run("start", "--port", str(port))
                return port
        port = 20_000 + free_port() % 1_000 * 10
        self._run("start", "--port", str(port))
        return port

    def _run(self, command: str, *options: str) -> None:
        subprocess.run([sys.executable, str(BROKER), command, str(self._directory), *options], check=True)


# The log alone


def log_part(directory: Path, cluster: Cluster, rounds: int, seconds: float, console: Console) -> Any:
    """Measure both logs, turn by turn; return the figures of each and the ratios of the rounds."""
    kafka = Config(kafka=Kafka(bootstrap_servers=cluster.servers, replication=1))
    pace = bench.Pace(1, seconds)
    parties = {Of.KAFKA: time.process_time, Of.BROKER: cluster.cpu_s}
    found: dict[str, list[Figure]] = {}
    for number in range(rounds):
        console.print(f"log, round {number + 1} of {rounds}")
        folder = directory / f"log-{number}"
        figures = bench.embedded_log(folder, kafka, pace, _silent)
        shutil.rmtree(folder)
        figures |= bench.cluster_log(kafka, pace, parties, _silent)
        for name, figure in figures.items():
            found.setdefault(name, []).append(figure)
    merged = {name: _merged(figures) for name, figures in found.items()}
    ratios = {
        step.value: asdict(
            Spread.of(
                [
                    ours.per_s.median / theirs.per_s.median
                    for ours, theirs in zip(
                        found[log_figure(Of.EMBEDDED, step)], found[log_figure(Of.KAFKA, step)], strict=True
                    )
                ]
            )
        )
        for step in Step
    }
    return {"figures": merged, "ratios": ratios}


def _merged(figures: Sequence[Figure]) -> Figure:
    first = figures[0]
    return Figure(
        first.unit,
        Spread.of([figure.cpu_s.median for figure in figures]),
        Spread.of([figure.per_s.median for figure in figures]),
        f"{len(figures)} rounds, embedded log and Kafka in turn; {first.how.partition(' s ')[2]}",
        first.size,
    )


def _silent(line: str) -> None: ...


# Latency


@dataclass(slots=True)
class Pieces:
    """A clip as MPEG-TS: bytes with the second at which a live encoder would have sent them."""

    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    now: float = 0.0

    def write(self, data: bytes) -> int:
        self.pieces.append((self.now, bytes(data)))
        return len(data)


def live_pieces(directory: Path, seconds: float) -> Pieces:
    """Return a marker clip of `seconds`, red in each cycle's last RED_S."""
    cycles = int(seconds // CYCLE_S) + 1
    planted = [((n + 1) * CYCLE_S - RED_S, (n + 1) * CYCLE_S) for n in range(cycles)]
    clip = marker.write_clip(directory / "marker.mp4", seconds, planted, gop=25, bframes=0)
    recorder = Pieces()
    with (
        av.open(str(clip)) as source,
        av.open(recorder, "w", format="mpegts", options={"flush_packets": "1"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is None:
                continue
            recorder.now = float(packet.dts * packet.time_base)
            packet.stream = stream
            out.mux(packet)
    return recorder


class Encoder:
    """A live source: waits on a TCP port for its reader, then sends at real time."""

    def __init__(self, pieces: Pieces, skip_s: float) -> None:
        self._pieces = pieces
        self._skip_s = skip_s
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.began: float | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._server.close()
        self._thread.join(5)

    def _run(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            return
        with connection:
            # Each begins elsewhere in the cycle, or all incidents would open at once.
            if self._stopping.wait(self._skip_s):
                return
            start = self.began = time.monotonic()
            for due, data in self._pieces.pieces:
                if self._stopping.wait(max(0.0, start + due - time.monotonic())):
                    return
                try:
                    connection.sendall(data)
                except OSError:
                    return
            self._stopping.wait()


@dataclass(slots=True)
class Latencies:
    """Seconds from capture to alert of each opening, and CPU seconds per second of each process tree."""

    seconds: list[float] = field(default_factory=list)
    cores: dict[str, float] = field(default_factory=dict)


class AlertReader:
    """Notes when each alert could be read, in a thread."""

    def __init__(self, poll: Callable[[], Iterator[tuple[Mapping[str, bytes], bytes]]]) -> None:
        self._poll = poll
        self.opened: list[tuple[str, int, int]] = []
        """Stream, media time of the opening (UTC microseconds), when it was read (the same)."""
        self._stopping = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _run(self) -> None:
        try:
            while not self._stopping.wait(LOOK_S):
                for headers, _ in self._poll():
                    now = time.time_ns() // 1000
                    if headers["ce_type"] == b"unmask.incident.opened.v1":
                        moment = _microseconds(headers["ce_time"].decode())
                        self.opened.append((headers["ce_subject"].decode(), moment, now))
        except BaseException as error:
            self.error = error


def _microseconds(text: str) -> int:
    moment = datetime.fromisoformat(text)
    return (moment - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)


def latency_part(
    directory: Path, cluster: Cluster, rounds: int, seconds: float, feeds: int, console: Console
) -> Any:
    """Measure both, turn by turn; return quantiles of each, of all rounds and round by round."""
    pieces = live_pieces(directory, SETTLE_S + seconds + CYCLE_S)
    taken: dict[Of, list[Latencies]] = {Of.EMBEDDED: [], Of.KAFKA: []}
    for number in range(rounds):
        for of in taken:
            console.print(f"latency, round {number + 1} of {rounds}, {of}")
            folder = directory / f"{of}-{number}"
            settings = [f"data_dir={folder}", f"prefix=round-{number}", f"media.partitions={PARTITIONS}"]
            settings += [*QUICK_VERDICTS, "members.names=[marker]"]
            if of is Of.KAFKA:
                settings += [f"kafka.bootstrap_servers={cluster.servers}", "kafka.replication=1"]
            encoders = [Encoder(pieces, n * CYCLE_S / feeds) for n in range(feeds)]
            try:
                taken[of].append(_latencies(of, settings, encoders, seconds, cluster))
            finally:
                for encoder in encoders:
                    encoder.stop()
    per_round = {of: [_quantiles(one.seconds) for one in found] for of, found in taken.items()}
    return {
        "feeds": feeds,
        "all": {
            of.value: _quantiles([s for one in found for s in one.seconds]) for of, found in taken.items()
        },
        "rounds": {of.value: found for of, found in per_round.items()},
        "cores": {of.value: [one.cores for one in found] for of, found in taken.items()},
        "ratios": {
            name: asdict(
                Spread.of(
                    [
                        ours[name] / theirs[name]
                        for ours, theirs in zip(per_round[Of.EMBEDDED], per_round[Of.KAFKA], strict=True)
                    ]
                )
            )
            for name in ("p50", "p95", "p99")
        },
    }


def _latencies(
    of: Of, settings: Sequence[str], encoders: Sequence[Encoder], seconds: float, cluster: Cluster
) -> Latencies:
    config = load(None, list(settings), {})
    sources = [f"feed-{n}=tcp://127.0.0.1:{encoder.port}" for n, encoder in enumerate(encoders)]
    with ExitStack() as stack:
        parts = _start_parts(of, settings, sources, stack)
        log = stack.enter_context(_opened(config))
        reader = AlertReader(_poll_alerts(of, config, log))
        stack.callback(reader.stop)
        _await(lambda: all(encoder.began is not None for encoder in encoders), "feeds are attached", parts)
        time.sleep(SETTLE_S)
        begin_us, cpu = time.time_ns() // 1000, _cpu(parts, of, cluster)
        begin = time.monotonic()
        time.sleep(seconds)
        lasted, spent = time.monotonic() - begin, _cpu(parts, of, cluster)
        reader.stop()
        if reader.error is not None:
            raise reader.error
        captures = _captures(config, log)
        opened = [one for one in reader.opened if one[2] >= begin_us]
        if not opened:
            sys.exit(f"kafka.py: no incident opened in {seconds:g} s ({of}); at least one was planted")
        found = [(at - captures[stream, moment]) / 1e6 for stream, moment, at in opened]
    return Latencies(found, {name: (spent[name] - cpu[name]) / lasted for name in spent})


def _start_parts(
    of: Of, settings: Sequence[str], sources: Sequence[str], stack: ExitStack
) -> dict[str, psutil.Popen]:
    """Start the processes that watch; each says what it does to a file in the data folder."""
    options = [word for setting in settings for word in ("--set", setting)]
    folder = Path(settings[0].partition("=")[2])
    folder.mkdir(parents=True)

    def start(name: str, *arguments: str) -> psutil.Popen:
        out = stack.enter_context((folder / f"{name}.out").open("wb"))
        process = psutil.Popen([str(UNMASK), *arguments, *options], stdout=out, stderr=out, cwd=folder)
        stack.callback(_end, process)
        return process

    if of is Of.EMBEDDED:
        return {"watch": start("watch", "watch", "--json", *sources)}
    subprocess.run([str(UNMASK), "topics", "create", *options], check=True, stdout=subprocess.DEVNULL)
    for source in sources:
        name, _, address = source.partition("=")
        command = [str(UNMASK), "attach", address, "--id", name, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"detect": start("detect", "detect"), "ingest": start("ingest", "ingest")}


def _end(process: psutil.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _opened(config: Config) -> Iterator[Log]:
    """Open the log beside those that use it, once they have made it."""
    deadline = time.monotonic() + READY_S
    alerts = topic_name(config, Topic.ALERTS)
    while True:
        log = None
        try:
            if config.kafka.bootstrap_servers or log_folder(config).is_dir():
                log = open_log(config, SystemClock())
                log.partitions(alerts)
                break
        except UnmaskError:
            if log is not None:
                log.close()
        if time.monotonic() > deadline:
            sys.exit(f"kafka.py: no topic {alerts} in {READY_S:g} s")
        time.sleep(0.2)
    try:
        yield log
    finally:
        log.close()


def _poll_alerts(
    of: Of, config: Config, log: Log
) -> Callable[[], Iterator[tuple[Mapping[str, bytes], bytes]]]:
    topic = topic_name(config, Topic.ALERTS)
    numbers = range(log.partitions(topic))
    if of is Of.KAFKA:
        consumer = KafkaConsumer(
            bootstrap_servers=config.kafka.bootstrap_servers.split(","),
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=int(1000 * LOOK_S),
        )
        consumer.assign([TopicPartition(topic, number) for number in numbers])

        def poll() -> Iterator[tuple[Mapping[str, bytes], bytes]]:
            for records in consumer.poll(timeout_ms=0).values():
                yield from ((dict(record.headers), record.value) for record in records)

        return poll
    following = {Place(topic, number): 0 for number in numbers}

    def look() -> Iterator[tuple[Mapping[str, bytes], bytes]]:
        for place, start in following.items():
            for record in log.read(place, start):
                following[place] = record.offset + 1
                yield record.headers, record.value or b""

    return look


def _captures(config: Config, log: Log) -> dict[tuple[str, int], int]:
    """Return, by stream and media time of a sampled frame, `capture_time` of the chunk it came in."""
    topic = topic_name(config, Topic.SCORES)
    found = {}
    for number in range(log.partitions(topic)):
        place = Place(topic, number)
        for record in log.read(place, log.begin_offset(place)):
            score = json.loads(record.value or b"{}")
            if score.get("type") == "frame":
                found[score["stream"], score["media_us"]] = score["capture_us"]
    return found


def _await(done: Callable[[], bool], what: str, parts: Mapping[str, psutil.Popen]) -> None:
    deadline = time.monotonic() + READY_S
    while not done():
        ended = [name for name, process in parts.items() if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            sys.exit(f"kafka.py: waited in vain until {what}; ended: {', '.join(ended) or 'none'}")
        time.sleep(0.05)


def _cpu(parts: Mapping[str, psutil.Popen], of: Of, cluster: Cluster) -> dict[str, float]:
    """Return CPU seconds so far of each part with its children, and of the broker."""
    found = {}
    for name, process in parts.items():
        total = 0.0
        for one in [process, *process.children(recursive=True)]:
            try:
                times = one.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system + times.children_user + times.children_system
        found[name] = total
    return found | ({"broker": cluster.cpu_s()} if of is Of.KAFKA else {})


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"count": len(ordered), "p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": ordered[-1]}


# The log's share of everything


def share_part(directory: Path, cluster: Cluster, rounds: int, live_s: float, console: Console) -> Any:
    """Measure both, turn by turn, as fast as it goes and at real time; return the shares."""
    clip = directory / "face.mp4"
    bench.write_clip(clip, SHARE_LINES, share.CLIP_S)
    assembly, threads = build_reader(Config()), share.Threads()
    results: dict[str, dict[str, list[share.Share]]] = {}
    for number in range(rounds):
        for paced in (False, True):
            for of in (Of.EMBEDDED, Of.KAFKA):
                pace = "real time" if paced else "as fast as it goes"
                console.print(f"share, round {number + 1} of {rounds}, {pace}, {of}")
                servers = cluster.servers if of is Of.KAFKA else ""
                config = Config(
                    data_dir=str(directory / f"share-{number}-{paced}-{of}"),
                    prefix=f"share-{number}-{str(paced).lower()}",
                    kafka=Kafka(bootstrap_servers=servers, replication=1),
                    media=Media(partitions=PARTITIONS, accept_unlisted=True),
                    log=LogSettings(),
                )
                times = max(1, round(live_s / share.CLIP_S))
                one = share.measure(config, assembly, clip, times, paced, cluster.cpu_s, threads)
                results.setdefault(pace, {}).setdefault(of.value, []).append(one)
    return {
        pace: {
            of: {
                "share": asdict(Spread.of([one.share for one in found])),
                "broker_over_total": asdict(Spread.of([one.broker_cpu_s / one.total_cpu_s for one in found])),
                "runs": [asdict(one) for one in found],
            }
            for of, found in by_log.items()
        }
        for pace, by_log in results.items()
    }


# Telling


def show(result: Mapping[str, Any], console: Console) -> None:
    if "log" in result:
        table = Table(
            "one after the other", "embedded", "Kafka", "embedded : Kafka", "broker, ms of a core each"
        )
        figures, ratios = result["log"]["figures"], result["log"]["ratios"]
        for step in Step:
            ours, theirs, broker = (
                figures[log_figure(of, step)] for of in (Of.EMBEDDED, Of.KAFKA, Of.BROKER)
            )
            ratio = ratios[step.value]
            table.add_row(
                theirs.unit,
                _rate(ours),
                _rate(theirs),
                f"{ratio['median']:.1f} ({ratio['low']:.1f} to {ratio['high']:.1f})",
                f"{1000 * broker.cpu_s.median:.3f}",
            )
        console.print(table)
    if "latency" in result:
        table = Table("capture to alert", "openings", "p50 s", "p95 s", "p99 s", "cores")
        for of, found in result["latency"]["all"].items():
            cores: dict[str, list[float]] = {}
            for one in result["latency"]["cores"][of]:
                for name, value in one.items():
                    cores.setdefault(name, []).append(value)
            told = ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in cores.items())
            table.add_row(of, str(found["count"]), *(f"{found[p]:.3f}" for p in ("p50", "p95", "p99")), told)
        ratios = result["latency"]["ratios"]
        cells = ["{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio) for ratio in ratios.values()]
        table.add_row("embedded : Kafka", "", *cells, "")
        console.print(table)
    if "share" in result:
        table = Table("log's share of CPU", "log", "share", "broker beside it")
        for pace, by_log in result["share"].items():
            for of, found in by_log.items():
                portion, broker = found["share"], found["broker_over_total"]
                table.add_row(
                    pace,
                    of,
                    "{median:.1%} ({low:.1%} to {high:.1%})".format(**portion),
                    f"{100 * broker['median']:.1f} %" if of == Of.KAFKA else "",
                )
        console.print(table)


def _rate(figure: Figure) -> str:
    rate = figure.per_s
    told = f"{rate.median:,.0f}/s ({rate.low:,.0f} to {rate.high:,.0f})"
    return f"{told}, {rate.median * figure.size / 1e6:.1f} MB/s"


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--only", choices=("log", "latency", "share"), action="append", help="may be repeated"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each part")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each step of the log's part")
    parser.add_argument(
        "--latency-s", type=float, default=60.0, help="of feeding, in each round, for each log"
    )
    parser.add_argument("--feeds", type=int, default=4, help="of the part latency")
    parser.add_argument("--share-s", type=float, default=24.0, help="of media, in each round, for each log")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--profile", type=Path, help="add the log's figures to this profile")
    chosen = parser.parse_args()
    parts = chosen.only or ["log", "latency", "share"]
    console = Console(stderr=True, width=140)  # tables stay whole in a file too
    result: dict[str, Any] = {"machine": machine() | {"cores": os.cpu_count()}, "options": _options(chosen)}
    with tempfile.TemporaryDirectory(prefix="unmask-kafka-") as name:
        cluster = Cluster(Path(name) / "broker")
        try:
            folder = Path(name)
            if "log" in parts:
                result["log"] = log_part(folder, cluster, chosen.rounds, chosen.seconds, console)
            if "latency" in parts:
                result["latency"] = latency_part(
                    folder, cluster, chosen.rounds, chosen.latency_s, chosen.feeds, console
                )
            if "share" in parts:
                result["share"] = share_part(folder, cluster, chosen.rounds, chosen.share_s, console)
        finally:
            cluster.stop()
    show(result, console)
    if "log" in result and chosen.profile:
        figures = {
            name: figure
            for name, figure in result["log"]["figures"].items()
            if not name.startswith(Of.EMBEDDED.value)
        }
        chosen.profile.write_text(read(chosen.profile).with_figures(figures).to_json(), encoding="utf-8")
    if chosen.json:
        chosen.json.write_text(json.dumps(result, default=asdict, indent=1) + "\n", encoding="utf-8")
    return 0


def _options(chosen: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(chosen).items() if name not in ("json", "profile")}


if __name__ == "__main__":
    sys.exit(main())
