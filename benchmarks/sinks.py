"""What delivering costs: a backlog of alerts through a file and a webhook on loopback, and sinks that wait.

    python benchmarks/sinks.py [--alerts N] [--idle-s S] [--json FILE]

Over the embedded log, each sink with a thread, a group and a commit for each alert, as in earnest. The
webhook's receiver runs in this process, so its cost is in the figure.
"""

import argparse
import json
import os
import platform
import random
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from stream.alerts import CloudEvent, iso
from stream.clock import Deadline, SystemClock
from stream.config import Config
from stream.log import everything
from stream.records import OutRecord, Topic
from stream.sinks.service import SinkService
from stream.sinks.settings import File, Flood, Sink, Webhook
from stream.sqlite_log import SqliteLog
from stream.topics import topic_name, topic_specs

BODY_BYTES = 3000
"""Of an incident with two faces."""

IDLE_SINKS = 8
OPEN = Flood(most=10**9)
SECRET = "BENCHMARK_HOOK_SECRET"

Figures = dict[str, float]


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def alert(number: int, now_us: int) -> CloudEvent:
    stream = f"s{number % 8}"
    name = f"{number:024x}"
    attributes = {
        "specversion": "1.0",
        "source": "/unmask/unmask",
        "subject": stream,
        "time": iso(now_us),
        "partitionkey": stream,
        "id": f"{name}.1",
        "type": "unmask.incident.opened.v1",
        "severity": "medium",
        "sequence": "0000000001",
    }
    data = {"schema": 1, "stream": stream, "incident": name, "event": "opened", "filler": "x" * BODY_BYTES}
    return CloudEvent(attributes, data)


def begun(config: Config, log: SqliteLog, sinks: dict[str, Sink]) -> SinkService:
    """Start sinks and wait until each has its place in the log."""
    service = SinkService(config, sinks, log, SystemClock(), random.Random(1))
    service.start()
    wanted = {f"{name}#position" for name in sinks}
    while not wanted <= {record.key for record in everything(log, topic_name(config, Topic.DELIVERIES))}:
        time.sleep(0.05)
    return service


def backlog(config: Config, log: SqliteLog, sink: Sink, alerts: int) -> Figures:
    """Deliver `alerts` that are all there already."""
    service = begun(config, log, {"bench": sink})
    clock, topic = SystemClock(), topic_name(config, Topic.ALERTS)
    with log.producer("bench") as producer:
        for number in range(alerts):
            event, now = alert(number, clock.now_us()), clock.now_us()
            producer.send(OutRecord(topic, event.attributes["subject"], event.body(), event.headers(), now))
        producer.flush(60)
    start, cpu = time.perf_counter(), time.process_time()
    delivered = service.metrics.delivered.labels("bench")
    while delivered._value.get() < alerts:
        time.sleep(0.02)
    seconds, spent = time.perf_counter() - start, time.process_time() - cpu
    service.stop(Deadline(10, clock))
    return {"alerts_per_s": alerts / seconds, "cpu_ms_per_alert": 1000 * spent / alerts}


def idle(config: Config, log: SqliteLog, folder: Path, seconds: float) -> Figures:
    """Let sinks wait for alerts that do not come."""
    sinks: dict[str, Sink] = {
        f"idle-{n}": File(type="file", path=str(folder / f"idle-{n}")) for n in range(IDLE_SINKS)
    }
    service = begun(config, log, sinks)
    cpu = time.process_time()
    time.sleep(seconds)
    spent = time.process_time() - cpu
    service.stop(Deadline(10, SystemClock()))
    return {"sinks": IDLE_SINKS, "share_of_a_core": spent / seconds}


def measure(alerts: int, idle_s: float) -> dict[str, Figures]:
    os.environ[SECRET] = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
    found = {}
    with tempfile.TemporaryDirectory(prefix="unmask-bench-") as name:
        folder = Path(name)
        server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        sinks: dict[str, Sink] = {
            "file": File(type="file", path=str(folder / "alerts"), flood=OPEN),
            "webhook": Webhook(
                type="webhook", url=url, secrets=(f"env:{SECRET}",), allow_private=True, flood=OPEN
            ),
        }
        for kind, sink in sinks.items():
            config = Config(data_dir=str(folder / kind), prefix="unmask")
            log = SqliteLog(folder / kind / "log", config.log, SystemClock())
            log.create_topics(topic_specs(config))
            found[kind] = backlog(config, log, sink, alerts)
            if kind == "file":
                found["idle"] = idle(config, log, folder, idle_s)
            log.close()
        server.shutdown()
        server.server_close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--alerts", type=int, default=2000)
    parser.add_argument("--idle-s", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(given.alerts, given.idle_s)
    for name, figures in found.items():
        print(name.ljust(10), "  ".join(f"{what} {value:.3g}" for what, value in figures.items()))
    if given.json:
        machine = {
            "processor": platform.processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
        given.json.write_text(json.dumps({"machine": machine, "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
