"""`unmask sinks` and `unmask serve`, and what docs/sinks.md says of them."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream.clock import SystemClock
from stream.config import Config, Sinks
from stream.errors import UnmaskError
from stream.sinks.commands import enable, list_sinks, sample, try_sink
from stream.sinks.loop import Dropped
from stream.sinks.metrics import SinkMetrics
from stream.sinks.settings import KINDS, Flood, Only, Quiet, Webhook, load_sinks
from stream.sinks.state import Held
from stream.sinks.webhook import WebhookTarget
from tests.stream.sinks.receivers import receiver
from tests.stream.sinks.test_webhook import ALERT
from tests.stream.sinks.world import GONE, FakeTarget, World, end, incident, settle

REPOSITORY = Path(__file__).parents[3]
DOC = (REPOSITORY / "docs" / "sinks.md").read_text()
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
PATIENCE_S = 90.0


def config(folder: Path, **sinks: Any) -> Config:
    path = folder / "sinks.yaml"
    path.write_text(yaml.safe_dump({"sinks": sinks}, sort_keys=False))
    return Config(data_dir=str(folder / "data"), sinks=Sinks(file=str(path)))


def said(call: Any, *arguments: Any) -> tuple[int, str]:
    out = io.StringIO()
    return call(*arguments, out), out.getvalue()


def test_list_shows_how_each_stands_and_no_secret(tmp_path: Path) -> None:
    world = World(tmp_path / "data")
    target = FakeTarget()
    target.answers.append(GONE)
    loop = world.start(target, name="s")
    world.write(incident("i1"), incident("i2", stream="lobby"))
    settle(loop)
    end(loop)
    world.log.close()
    settings = config(
        tmp_path,
        s={"type": "webhook", "url": "https://r.example/x", "secrets": ["env:S"]},
        other={"type": "command", "argv": ["post", "--token=hunter2hunter2"]},
    )
    code, text = said(list_sinks, settings, False)
    first, second = text.splitlines()
    assert code == 0
    assert re.fullmatch(r"s +webhook +https://r\.example/x +DISABLED, 1 not looked at, 1 waiting", first)
    assert re.fullmatch(r"other +command +post --token=\*\*\* +nothing waits", second)
    rows = [json.loads(line) for line in said(list_sinks, settings, True)[1].splitlines()]
    assert rows[0] == {
        "name": "s",
        "type": "webhook",
        "to": "https://r.example/x",
        "lag": 1,
        "waiting": 1,
        "held_back": 0,
        "disabled": True,
    }


def test_enable_is_for_what_is_disabled(tmp_path: Path) -> None:
    world = World(tmp_path / "data")
    target = FakeTarget()
    target.answers.append(GONE)
    loop = world.start(target)
    world.write(incident())
    settle(loop)
    settings = config(tmp_path, s={"type": "stdout"})
    assert said(enable, settings, "s") == (0, "s is enabled; a running serve notices within seconds\n")
    assert said(enable, settings, "s") == (0, "s is not disabled\n")
    world.clock.advance(10)
    settle(loop)
    assert target.got == ["i1.1"]
    end(loop)
    world.log.close()


def test_a_sample_is_an_event_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S", SECRET)
    with receiver() as there:
        hook = {"type": "webhook", "url": there.url, "secrets": ["env:S"], "allow_private": True}
        settings = config(tmp_path, hook=hook | {"only": {"severity": "high"}})
        assert said(try_sink, settings, "hook") == (0, f"hook: delivered to {there.url}\n")
        there.status = 500
        code, text = said(try_sink, settings, "hook")
    told = json.loads(there.requests[0].body)
    ALERT.validate(told)
    assert told["type"] == "unmask.sink.test.v1"
    assert (code, text) == (1, f"hook: not delivered to {there.url}: answered 500\n")


def test_a_sink_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="no sink 'x'; there are: s"):
        said(try_sink, config(tmp_path, s={"type": "stdout"}), "x")


# The service as a process


@pytest.mark.slow
def test_serve_delivers_and_ends_in_order(tmp_path: Path) -> None:
    world = World(tmp_path / "data", prefix="unmask")
    settings = config(tmp_path, out={"type": "stdout"})
    command = [str(Path(sys.executable).with_name("unmask")), "serve"]
    options = [f"data_dir={settings.data_dir}", f"sinks.file={settings.sinks.file}", "media.partitions=2"]
    process = subprocess.Popen(
        [*command, *(part for option in options for part in ("--set", option))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while "out#position" not in world.states():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        now = int(time.time() * 1e6)
        world.clock.advance(now / 1e6 - world.clock.monotonic())
        world.write(incident())
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == incident().structured()
        process.send_signal(signal.SIGTERM)
        rest, log = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, rest) == (0, "")
    assert "Traceback" not in log
    world.log.close()


# The docs and the examples


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOC, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_commands_of_the_docs_work(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    (tmp_path / "deploy").symlink_to(REPOSITORY / "deploy")
    (tmp_path / "sinks.yaml").write_text(blocks("yaml")[0].replace("8765", port))
    # The receiver needs a moment to listen; who types the commands gives it that.
    script = blocks("sh")[0].replace("8765 &", f"{port} >received &\ntrap 'kill $!' EXIT\nsleep 5")
    assert script.count("unmask sinks test") == 2
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": os.pathsep.join(paths), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "moderation: delivered to http://127.0.0.1" in done.stdout
    assert "archive: delivered to ~/unmask-alerts.ndjson" in done.stdout
    assert json.loads((tmp_path / "received").read_text())["type"] == "unmask.sink.test.v1"
    assert json.loads((tmp_path / "unmask-alerts.ndjson").read_text())["data"]["sink"] == "archive"


def test_the_docs_name_every_setting_reason_and_metric() -> None:
    common = set(next(iter(KINDS.values())).model_fields) & set(KINDS["stdout"].model_fields) - {"type"}
    for kind in KINDS.values():
        for name in set(kind.model_fields) - common:
            assert f"`{name}`" in DOC, name
    for name in (*Only.model_fields, *Quiet.model_fields, *Flood.model_fields):
        assert re.search(rf"`(only\.|flood\.)?{name}`", DOC), name
    for reason in (*Dropped, *Held):
        assert f"`{reason.value}`" in DOC, reason
    metrics = SinkMetrics().registry.collect()
    for family in metrics:
        name = family.name + ("_total" if family.type == "counter" else "")
        assert f"`{name}{{sink" in DOC, name


def test_the_example_of_the_docs_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "sinks.yaml"
    path.write_text(blocks("yaml")[0])
    assert list(load_sinks(Config(sinks=Sinks(file=str(path))))) == ["moderation", "archive", "night-shift"]


def slack(event: Any, url: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-S", str(REPOSITORY / "deploy" / "examples" / "slack.py")],
        input=json.dumps(event.structured()),
        env={"SLACK_URL": url, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_the_chat_example_posts_what_a_person_can_read(tmp_path: Path) -> None:
    with receiver(status=200) as there:
        opened = incident(stream="studio")
        data = {**opened.data, "expected_precision": 0.4025, "suggested_action": "review"}
        withdrawn = incident(number=2, event="retracted")
        why = {**withdrawn.data, "reason": "a <!channel> poster & more"}
        held = sample(Config(), "chat", SystemClock())
        for event in (
            type(opened)(opened.attributes, data),
            type(opened)(withdrawn.attributes, why),
            held,
        ):
            assert slack(event, there.url).returncode == 0
        there.status = 503
        assert slack(held, there.url).returncode == 75
        there.status = 404
        assert slack(held, there.url).returncode == 1
    texts = [json.loads(request.body)["text"] for request in there.requests]
    assert "a face looks manipulated (opened, right with a chance of 40%); suggested: review" in texts[0]
    assert texts[1] == "WITHDRAWN: studio, incident `i1`: a &lt;!channel&gt; poster &amp; more"
    assert "unmask sinks test" in texts[2]
    assert slack(held, "http://127.0.0.1:9/").returncode == 75


def test_the_receiver_of_the_docs_refuses_forgeries_and_drops_doubles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "deploy" / "examples" / "receive_webhook.py"), str(port)],
        env={**os.environ, "HOOK_SECRET": SECRET},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(port)
        found = []
        for secret in (SECRET, SECRET, "whsec_" + "Zm9yZ2VyeSBmb3JnZXJ5IGZvcmdlcnkh"):
            monkeypatch.setenv("S", secret)
            settings = Webhook(
                type="webhook", url=f"http://127.0.0.1:{port}/", secrets=("env:S",), allow_private=True
            )
            event = sample(Config(), "s", FixedClock())  # type: ignore[arg-type]
            found.append(WebhookTarget(settings, SystemClock()).deliver(event).detail)
        process.terminate()
        out, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert found == ["", "", "answered 401"]
    assert [json.loads(line)["type"] for line in out.splitlines()] == ["unmask.sink.test.v1"]


class FixedClock:
    """Every sample is the same one."""

    def now_us(self) -> int:
        return 1_700_000_000_000_000


def wait_for(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nobody listens on {port}")
