"""`unmask topics create|check` against a real cluster."""

import uuid

import pytest
from typer.testing import CliRunner

from stream.cli import OK, WRONG, app
from stream.config_file import load
from stream.topics import topic_specs


@pytest.fixture
def options(
    servers: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    given = [f"kafka.bootstrap_servers={servers}", "kafka.replication=1", f"prefix=t{uuid.uuid4().hex[:8]}"]
    return [item for setting in given for item in ("--set", setting)]


def run(*arguments: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["topics", *arguments])
    return result.exit_code, result.output.splitlines()


def test_check_tells_what_is_missing_and_create_makes_it(options: list[str]) -> None:
    code, lines = run("check", *options)
    assert code == 1
    assert len(lines) == len(topic_specs(load(None, [], {})))
    assert all("is missing; unmask topics create makes it" in line for line in lines)
    code, lines = run("create", *options)
    assert code == OK
    assert lines[0].endswith(".media: 8 partitions, as it must be")
    assert run("check", *options) == (OK, lines)
    assert run("create", *options) == (OK, lines)


def test_what_cannot_be_changed_is_named(options: list[str]) -> None:
    run("create", *options)
    code, lines = run("check", *options, "--set", "media.partitions=3", "--set", "media.retention_s=60")
    assert code == 1
    assert any(".media has 8 partitions, not 3" in line for line in lines)
    assert any(".media has retention.ms 3600000, not 60000" in line for line in lines)
    code, lines = run("create", *options, "--set", "media.partitions=3")
    assert code == WRONG
    assert len(lines) == 1
    assert "8 partitions, not 3; their number is fixed once the topic exists" in lines[0]


def test_without_a_cluster_it_says_what_to_set() -> None:
    code, lines = run("check", "--set", "kafka.bootstrap_servers=")
    assert code == WRONG
    assert len(lines) == 1
    assert lines[0].startswith("unmask: kafka.bootstrap_servers is empty; it must name brokers")
