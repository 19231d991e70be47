"""A cluster of one or three brokers whose nodes can be killed one by one, with zones that can be cut off."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kafka
import psutil
from kafka import KafkaAdminClient

from tests.chaos.proxy import Zone
from tests.stream.servers import free_port

BROKER = Path(__file__).parents[2] / "deploy" / "kafka" / "broker"
START_S = 300.0
"""The first start of all fetches the jars."""
ZONES = 3
WAIT_S = 60.0
STEP_S = 0.2


class Cluster:
    """Brokers in `directory`; node N and zone Z count from 1."""

    def __init__(self, directory: Path, nodes: int) -> None:
        self._directory = directory
        self.nodes = nodes
        # Below the ports that the system gives out; nodes take ten each.
        self._port = 20_000 + free_port() % 900 * 10
        options = ["--nodes", str(nodes), "--port", str(self._port), "--zones", str(ZONES)]
        self._run("start", *options)
        self._commands = {node: psutil.Process(self.pid(node)).cmdline() for node in self._numbers()}
        self.zones = {zone: Zone(self._routes(zone)) for zone in range(1, ZONES + 1)}

    def servers(self, zone: int = 0) -> str:
        """Return the bootstrap servers as clients of a zone see them; zone 0 cannot be cut."""
        shift = 6 + zone if zone else 0
        return ",".join(f"127.0.0.1:{self._first(node) + shift}" for node in self._numbers())

    def pid(self, node: int) -> int:
        return int((self._home(node) / "pid").read_text())

    def alive(self, node: int) -> bool:
        try:
            process = psutil.Process(self.pid(node))
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def kill(self, node: int) -> None:
        """SIGKILL a node and wait until it is gone."""
        process = psutil.Process(self.pid(node))
        process.kill()
        end = time.monotonic() + WAIT_S
        while self.alive(node) and time.monotonic() < end:
            time.sleep(STEP_S / 4)

    def revive(self, node: int) -> None:
        """Start a node that was killed, on what it left behind; does not wait until it serves."""
        home = self._home(node)
        with (home / "server.log").open("ab") as out:
            process = subprocess.Popen(
                self._commands[node],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd=home,
            )
        (home / "pid").write_text(str(process.pid))

    def wait_serving(self) -> None:
        """Return when every partition of every topic has a leader and all its copies again."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            if all(map(self._listens, self._numbers())) and self._whole():
                return
            time.sleep(5 * STEP_S)
        raise TimeoutError(f"the cluster is not whole after {WAIT_S:g} s")

    def leader(self, topic: str, partition: int) -> int:
        """Return the node that leads a partition, -1 if none does."""
        with self.admin() as admin:
            for found in admin.describe_topics([topic])[0]["partitions"]:
                if found["partition_index"] == partition:
                    return int(found["leader_id"])
        raise LookupError(f"{topic} has no partition {partition}")

    def controller(self) -> int:
        """Return the node that leads the quorum of controllers."""
        with self.admin() as admin:
            quorum = admin.describe_metadata_quorum()
        return int(_find(quorum, "leader_id"))

    def admin(self) -> "_Closing":
        return _Closing(
            KafkaAdminClient(bootstrap_servers=self.servers().split(","), bootstrap_timeout_ms=20_000)
        )

    def stop(self) -> None:
        for zone in self.zones.values():
            zone.close()
        self._run("stop")
        for node in self._numbers():
            if self.alive(node):
                os.kill(self.pid(node), signal.SIGKILL)

    def _whole(self) -> bool:
        try:
            with self.admin() as admin:
                partitions = [p for topic in admin.describe_topics() for p in topic["partitions"]]
        except kafka.errors.KafkaError:
            return False
        return all(p["leader_id"] >= 0 and len(p["isr_nodes"]) == len(p["replica_nodes"]) for p in partitions)

    def _listens(self, node: int) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._first(node)), STEP_S):
                return True
        except OSError:
            return False

    def _routes(self, zone: int) -> list[tuple[int, int]]:
        return [(self._first(node) + 6 + zone, self._first(node) + 3 + zone) for node in self._numbers()]

    def _first(self, node: int) -> int:
        return self._port + 10 * (node - 1)

    def _home(self, node: int) -> Path:
        return self._directory / f"node-{node}"

    def _numbers(self) -> range:
        return range(1, self.nodes + 1)

    def _run(self, command: str, *options: str) -> None:
        done = subprocess.run(
            [sys.executable, str(BROKER), command, str(self._directory), *options],
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"broker {command}: {done.stderr}")


class _Closing:
    """kafka-python's admin client is no context manager."""

    def __init__(self, admin: Any) -> None:
        self._admin = admin

    def __enter__(self) -> Any:
        return self._admin

    def __exit__(self, *_: object) -> None:
        self._admin.close()


def _find(value: Any, name: str) -> Any:
    """Return the first entry of that name in nested dicts and lists."""
    if isinstance(value, dict):
        if name in value:
            return value[name]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            found = _find(item, name)
            if found is not None:
                return found
    return None
