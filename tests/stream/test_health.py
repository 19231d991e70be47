"""Probes see what the process says of itself."""

from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, Gauge

from stream.health import serve
from tests.stream.servers import free_port


def ask(port: int, path: str) -> tuple[int, str]:
    try:
        with urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("well", [True, False])
def test_healthz_and_readyz_are_asked_each_time(well: bool) -> None:
    port, asked = free_port(), list[str]()
    registry = CollectorRegistry()
    Gauge("unmask_up", "One", registry=registry).set(1)

    def look(name: str, answer: bool) -> bool:
        asked.append(name)
        return answer

    serve(registry, port, healthy=lambda: look("healthy", well), ready=lambda: look("ready", not well))
    assert ask(port, "healthz")[0] == (200 if well else 503)
    assert ask(port, "readyz")[0] == (503 if well else 200)
    assert asked == ["healthy", "ready"]
    assert "unmask_up 1.0" in ask(port, "metrics")[1]
