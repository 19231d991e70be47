"""deploy/compose: what can be checked where no container engine is."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from stream.cli import app
from stream.config_file import load
from stream.kafka_client import PASSWORD_VARIABLE, KafkaClients
from tests.conftest import requires

COMPOSE = Path(__file__).parents[2] / "deploy" / "compose"
OURS = {"topics", "ingest", "detect", "canary"}


def resolved(settings: Path) -> dict[str, Any]:
    """Return the file as docker-compose understands it, with the settings of an .env file."""
    requires("docker-compose")
    done = subprocess.run(
        ["docker-compose", "--env-file", str(settings), "-f", COMPOSE / "docker-compose.yaml", "config"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    return found


@pytest.fixture
def services() -> dict[str, Any]:
    found: dict[str, Any] = resolved(COMPOSE / ".env.example")["services"]
    return found


def test_services_run_commands_that_exist_with_settings_that_are_valid(services: dict[str, Any]) -> None:
    assert set(services) == OURS | {"kafka"}
    for name in OURS:
        command, *rest = services[name]["command"]
        found = get_command(app).commands[command]  # type: ignore[attr-defined]
        assert all(part in found.commands for part in rest)
        config = load(None, [], services[name]["environment"])
        assert config.kafka.bootstrap_servers == "kafka:9092"
        assert config.kafka.replication == 1


def test_nothing_of_ours_runs_with_more_rights_than_it_needs(services: dict[str, Any]) -> None:
    for name in OURS:
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["read_only"] is True
    users = [line for line in (COMPOSE / "Dockerfile").read_text().splitlines() if line.startswith("USER")]
    assert users == ["USER 10001"]


def test_what_the_example_offers_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "all"
    offered = [line[1:] for line in (COMPOSE / ".env.example").read_text().splitlines() if "=" in line]
    settings.write_text("\n".join(offered) + "secret\n")
    services = resolved(settings)["services"]
    given = services["detect"]["environment"]
    config = load(None, [], given)
    assert (config.kafka.security_protocol, config.kafka.username) == ("SASL_SSL", "unmask")
    monkeypatch.setenv(PASSWORD_VARIABLE, given[PASSWORD_VARIABLE])
    assert KafkaClients(config.kafka).arguments["sasl_plain_password"] == "secret"
    for line in offered:
        name, _, value = line.partition("=")
        assert f"${{{name}:-" in (COMPOSE / "docker-compose.yaml").read_text()
        assert name == PASSWORD_VARIABLE or value


def test_kafka_serves_inside_and_outside_what_it_advertises(services: dict[str, Any]) -> None:
    kafka = services["kafka"]
    assert [str(port) for port in kafka["ports"]] == ["127.0.0.1:9094:9094/tcp"]
    listeners = dict(item.split("://") for item in kafka["environment"]["KAFKA_LISTENERS"].split(","))
    advertised = dict(
        item.split("://") for item in kafka["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(",")
    )
    assert advertised == {"INSIDE": "kafka:9092", "OUTSIDE": "127.0.0.1:9094"}
    assert all(advertised[name].endswith(listeners[name]) for name in advertised)
