"""Commands: no shell, their own environment, an end in time, and a bound on what they say."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from stream.clock import SystemClock
from stream.sinks.command import CommandTarget
from stream.sinks.delivery import Outcome, Result
from stream.sinks.settings import Command
from tests.stream.sinks.world import incident


def run(*argv: str, timeout_s: float = 20.0, env: tuple[str, ...] = ()) -> Result:
    settings = Command(type="command", argv=argv, timeout_s=timeout_s, env=env)
    return CommandTarget(settings, SystemClock()).deliver(incident())


def python(code: str, *arguments: str, **settings: float) -> Result:
    return run(sys.executable, "-S", "-c", code, *arguments, **settings)  # type: ignore[arg-type]


def test_it_reads_the_event_and_its_arguments_are_no_shell_words(tmp_path: Path) -> None:
    out = tmp_path / "$(touch hacked); out"
    code = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"
    assert python(code, str(out)).outcome is Outcome.DELIVERED
    assert json.loads(out.read_text()) == incident().structured()


def test_it_gets_what_it_needs_of_the_environment_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMASK_KAFKA_PASSWORD", "secret")
    monkeypatch.setenv("SLACK_URL", "there")
    out = tmp_path / "out"
    code = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    run(sys.executable, "-S", "-c", code, str(out), env=("SLACK_URL", "NOT_SET"))
    found = json.loads(out.read_text())
    assert found["SLACK_URL"] == "there"
    assert found["UNMASK_ID"] == "i1.1"
    assert found["UNMASK_TYPE"] == "unmask.incident.opened.v1"
    assert "UNMASK_KAFKA_PASSWORD" not in found
    assert found["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("code", "outcome", "reason"),
    [
        ("", Outcome.DELIVERED, ""),
        ("raise SystemExit(1)", Outcome.REFUSED, "exit_code"),
        ("raise SystemExit(75)", Outcome.AWAY, "busy"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", Outcome.REFUSED, "exit_code"),
    ],
)
def test_what_an_end_means(code: str, outcome: Outcome, reason: str) -> None:
    result = python(code)
    assert (result.outcome, result.reason) == (outcome, reason)


def test_what_it_says_is_told_in_part_and_redacted() -> None:
    code = "print('x' * 10_000_000); print('cannot reach https://u:hunter2@h.example/'); raise SystemExit(3)"
    result = python(code)
    assert "cannot reach https://***@h.example/" in result.detail
    assert len(result.detail) < 400


def test_one_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    out = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    result = python(code, str(out), timeout_s=3.0)
    assert (result.outcome, result.reason) == (Outcome.AWAY, "timeout")
    assert not alive(int(out.read_text()))


def test_a_child_that_keeps_the_output_open_holds_nothing_up(tmp_path: Path) -> None:
    out = tmp_path / "pid"
    code = "import subprocess, sys\nopen(sys.argv[1], 'w').write(str(subprocess.Popen(['sleep', '600']).pid))"
    assert python(code, str(out), timeout_s=25.0).outcome is Outcome.DELIVERED
    assert not alive(int(out.read_text()))


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody reaped yet does not."""
    for _ in range(100):
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        if status.rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.02)
    return True


def test_one_that_does_not_read_is_no_trouble() -> None:
    assert run("true").outcome is Outcome.DELIVERED


def test_one_that_is_missing_is_an_outage() -> None:
    result = run("no-such-program-here")
    assert (result.outcome, result.reason) == (Outcome.AWAY, "start")
    assert "no-such-program-here cannot be started" in result.detail
