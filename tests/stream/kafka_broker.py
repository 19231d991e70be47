"""A real Kafka for tests: the cluster that UNMASK_KAFKA names, else one that deploy/kafka/broker starts."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import requires
from tests.stream.servers import free_port

BROKER = Path(__file__).parents[2] / "deploy" / "kafka" / "broker"

START_S = 300.0
"""The first start of all fetches the jars."""


class Broker:
    """A broker of our own in `directory`, on ports nobody has."""

    def __init__(self, directory: Path, *options: str) -> None:
        requires("java", "mvn")
        self.directory = directory
        self.port = _free_ports()
        self._options = options
        self.start()

    @property
    def servers(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def sasl_servers(self) -> str:
        return f"127.0.0.1:{self.port + 2}"

    @property
    def tls_servers(self) -> str:
        return f"127.0.0.1:{self.port + 3}"

    def start(self) -> None:
        done = self._run("start", "--port", str(self.port), *self._options)
        assert done.returncode == 0, done.stderr

    def stop(self) -> None:
        done = self._run("stop")
        assert done.returncode == 0, done.stderr

    def running(self) -> bool:
        return self._run("status").returncode == 0

    def _run(self, command: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(BROKER), command, str(self.directory), *options],
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )


def given_servers() -> str | None:
    """Return the cluster that whoever runs the tests wants them to use."""
    return os.environ.get("UNMASK_KAFKA") or None


def _free_ports() -> int:
    """Return a port below those that the system gives out, with the three after it probably free too."""
    return 20_000 + free_port() % 1_000 * 10
