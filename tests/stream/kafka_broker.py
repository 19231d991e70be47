"""A real Kafka for tests: the cluster that UNMASK_KAFKA names, else one that deploy/kafka/broker starts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.stream.servers import free_port

BROKER = Path(__file__).parents[2] / "deploy" / "kafka" / "broker"

USER, PASSWORD = "unmask", "for-tests-only"

START_S = 300.0
"""The first start of all fetches the jars."""


class Broker:
    """A broker of our own in `directory`, on ports nobody has."""

    def __init__(self, directory: Path, certificates: Path, *options: str) -> None:
        self.directory = directory
        self.certificates = certificates
        self.port = _free_ports()
        self._options = options
        self.start()

    @property
    def servers(self) -> str:
        nodes = 3 if "--nodes" in self._options else 1
        return ",".join(f"127.0.0.1:{self.port + 10 * node}" for node in range(nodes))

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

    def kill(self, node: int) -> None:
        """End one node, of 1 to 3, with SIGKILL."""
        assert self._run("kill", "--node", str(node)).returncode == 0

    def start_again(self, node: int) -> None:
        done = self._run("start", "--node", str(node))
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


def make_certificates(directory: Path) -> None:
    """Write an authority (ca.pem), the broker's broker.pem and a client's client.pem and client.key."""
    authority = ["-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority of the tests"]
    _openssl(directory, "req", "-x509", *NEW_KEY, "-days", "2", *authority)
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("broker", "client"):
        request = ["-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"]
        _openssl(directory, "req", *NEW_KEY, *request)
        signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names"]
        files = ["-in", f"{name}.csr", "-out", f"{name}.pem"]
        _openssl(directory, "x509", "-req", *files, *signing, "-days", "2")
    certificate = directory / "broker.pem"
    certificate.write_text((directory / "broker.key").read_text() + certificate.read_text())


NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, capture_output=True, check=True)


def _free_ports() -> int:
    """Return a port below those that the system gives out, free with those that three nodes take above it."""
    while True:
        first = 20_000 + free_port() % 400 * 30
        if all(_is_free(first + 10 * node + listener) for node in range(3) for listener in range(4)):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
