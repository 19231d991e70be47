"""The command line as a user meets it: help, exit codes, one sentence for what is wrong."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from stream import cli
from stream.cli import app
from stream.config import Config
from stream.config_file import load
from stream.console import Console
from stream.errors import Code, UnmaskError

COMMANDS = (
    "watch",
    "demo",
    "score",
    "evaluate",
    "evaluate-expression",
    "calibrate",
    "coverage",
    "train",
    "bench",
    "plan",
    "attach",
    "detach",
    "streams",
    "ingest",
    "detect",
    "serve",
    "canary",
    "retract",
    "serve",
    "enroll",
    "config",
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNMASK_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    shown = call(command, "--help")
    assert shown.exit_code == 0
    assert re.search(rf"Example.*:\n +.*unmask {command}", shown.output)


def test_every_command_is_tested() -> None:
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)  # type: ignore[union-attr]


def test_examples_parse() -> None:
    """Every `unmask ...` in a help text is accepted by the parser: its options and arguments exist."""
    for command in COMMANDS:
        shown = call(command, "--help").output
        example = re.findall(r"(?:^ +|&& )unmask ([\w-]+)((?: [^&\n]+)?)", shown, re.M)
        assert example
        for name, arguments in example:
            options = set(re.findall(r"--\w+", arguments))
            assert options <= set(re.findall(r"--\w+", call(name, "--help").output))


def test_help_and_config_need_no_network_library() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from stream.cli import app\n"
        "for arguments in (['--help'], ['watch', '--help'], ['config']):\n"
        "    assert CliRunner().invoke(app, arguments).exit_code == 0\n"
        "heavy = {'torch', 'av', 'cv2', 'matplotlib', 'openvino', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_version() -> None:
    assert re.fullmatch(r"unmask \d+\.\d+\.\d+\n", call("--version").output)


def test_config_prints_what_is_in_effect(tmp_path: Path) -> None:
    shown = call("config", "--set", "media.chunk_ms=250")
    assert shown.exit_code == 0
    (tmp_path / "printed.yaml").write_text(shown.output)
    expected = Config.model_validate({"data_dir": str(tmp_path / "data"), "media": {"chunk_ms": 250}})
    assert load(tmp_path / "printed.yaml", [], {}) == expected


def test_config_prints_no_secret() -> None:
    shown = call("config", "--set", "data_dir=https://me:hunter2@host/x?token=abcdef")
    assert "hunter2" not in shown.output
    assert "abcdef" not in shown.output


@pytest.mark.parametrize(
    "command",
    [["watch", "x.mp4"], ["demo"], ["score", "x"], ["evaluate", "x"], ["coverage", "x"], ["config"]],
)
def test_a_wrong_setting_is_one_sentence_and_exit_code_2(command: list[str]) -> None:
    done = call(*command, "--set", "media.chunk_ms=1")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert (
        done.stderr == "unmask: media.chunk_ms is 1 (--set); it must be a whole number from 50 to 5000 (ms)\n"
    )


def test_a_wrong_setting_does_not_show_its_secret() -> None:
    done = call("config", "--set", "media.chunk_ms=rtmp://me:hunter2@host/live")
    assert done.exit_code == 2
    assert "hunter2" not in done.stderr


def test_a_wrong_manifest_is_exit_code_2() -> None:
    done = call("evaluate", "none.csv")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "unmask: manifest none.csv cannot be read: No such file or directory\n"


def test_coverage_of_nothing_is_exit_code_2() -> None:
    done = call("coverage", "clip")
    assert done.exit_code == 2
    assert done.stderr.startswith("unmask: nothing is recorded of stream 'clip' in ")


def test_training_without_data_is_exit_code_2(tmp_path: Path) -> None:
    done = call("train", "--data", "none", "--out", "out")
    assert done.exit_code == 2
    assert re.fullmatch(r"unmask: .*none.*\n", done.stderr)


def test_recipes_are_shown_by_name() -> None:
    assert call("train", "b4-paper", "--show").stdout.startswith("# EfficientNetB4 ")
    done = call("train", "guessed", "--show")
    assert done.exit_code == 2
    assert re.match(r"unmask: recipe guessed: expected a file, or one of: .*b4-paper", done.stderr)


def test_usage_errors_are_exit_code_2() -> None:
    assert call("watch").exit_code == 2
    assert call("watch", "x.mp4", "--sett", "a=b").exit_code == 2


def raising(error: BaseException) -> Any:
    def function() -> int:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "stopped", "code"),
    [
        (UnmaskError(Code.WEIGHTS, "weights are wrong"), 0, 2),
        (KeyboardInterrupt(), 0, 0),
        (KeyboardInterrupt(), 130, 130),
        (BrokenPipeError(), 130, 0),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, stopped: int, code: int) -> None:
    monkeypatch.setattr("stream.console.abandon_stdout", lambda: None)
    assert cli._guarded(raising(error), stopped) == code


def test_what_is_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        cli._guarded(raising(ZeroDivisionError()), 0)


def start(*arguments: str) -> "subprocess.Popen[str]":
    program = [sys.executable, "-c", "from stream.cli import main; main()", *arguments]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = start("config")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


@pytest.mark.parametrize("as_json", [True, False])
def test_watch_hands_over_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    def watch(settings: Config, sources: Sequence[str], json_mode: bool, console: Console) -> int:
        assert (settings.media.chunk_ms, sources, json_mode) == (250, ["a.mp4", "b=c.mp4"], as_json)
        console.event({"type": "unmask.feed.up.v1", "subject": "a", "data": {}})
        console.summary([])
        return 7

    monkeypatch.setitem(sys.modules, "stream.watch", SimpleNamespace(watch=watch))
    monkeypatch.setattr("stream.redact.install_logging", lambda level: None)
    done = call("watch", "a.mp4", "b=c.mp4", "--set", "media.chunk_ms=250", *(["--json"] if as_json else []))
    assert done.exit_code == 7
    if as_json:
        assert json.loads(done.stdout)["subject"] == "a"
    else:
        assert done.stdout == "a: feed up\n"


def test_stopping_before_anything_is_attached_is_no_error() -> None:
    program = (
        "import os, signal, sys, types\n"
        "def watch(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    signal.pause()\n"
        "sys.modules['stream.watch'] = types.SimpleNamespace(watch=watch)\n"
        "from stream.cli import main\n"
        "sys.argv = ['unmask', 'watch', 'a.mp4']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
