"""All sinks of a process together: none delays another, and the end is bounded."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from stream.alerts import CloudEvent
from stream.clock import Deadline, SystemClock
from stream.errors import UnmaskError
from stream.sinks.service import HANGS_S, SinkService, lag
from stream.sinks.settings import Command, File, Sink, Webhook
from tests.stream.sinks.receivers import dripping, raw, receiver, silent
from tests.stream.sinks.world import World, incident

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
PATIENCE_S = 60.0


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    made = World(tmp_path / "data")
    yield made
    made.log.close()


def hook(url: str, **fields: Any) -> Webhook:
    return Webhook(type="webhook", url=url, secrets=("env:HOOK_SECRET",), allow_private=True, **fields)


def service(world: World, **sinks: Sink) -> SinkService:
    return SinkService(world.config, sinks, world.log, SystemClock(), random.Random(3))


def started(world: World, **sinks: Sink) -> SinkService:
    """Start sinks and wait until each has its place."""
    made = service(world, **sinks)
    made.start()
    keys = {f"{name}#position" for name in sinks}
    until(lambda: keys <= world.states().keys())
    return made


def until(reached: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def write(world: World, *events: CloudEvent) -> None:
    world.clock = SystemClock()  # type: ignore[assignment]
    world.write(*events)


def scraped(made: SinkService, sample: str) -> str:
    made.look()
    found = generate_latest(made.metrics.registry).decode().splitlines()
    return next(line.split()[-1] for line in found if line.startswith(f"unmask_sink_{sample}"))


def lines(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()] if path.exists() else []


def test_sinks_that_hang_delay_no_other_and_the_end_is_bounded(world: World, tmp_path: Path) -> None:
    path = tmp_path / "alerts"
    with raw(silent) as hanging, raw(dripping) as slow, receiver() as well:
        made = started(
            world,
            hanging=hook(hanging, timeout_s=30.0),
            slow=hook(slow, timeout_s=30.0),
            sleeping=Command(type="command", argv=("sleep", "600"), timeout_s=10.0),
            file=File(type="file", path=str(path)),
            well=hook(well.url),
        )
        write(world, *(incident(f"i{n}") for n in range(5)))
        until(lambda: len(lines(path)) == 5 and len(well.requests) == 5)
        assert lines(path) == [f"i{n}.1" for n in range(5)]
        assert made.healthy()
        until(made.ready)
        until(lambda: scraped(made, 'lag_records{sink="file"}') == "0.0")
        assert scraped(made, 'delivered_total{sink="file"}') == "5.0"
        assert scraped(made, 'delivered_total{sink="hanging"}') == "0.0"
        assert scraped(made, 'lag_records{sink="hanging"}') == "5.0"
        assert not made.stop(Deadline(1.0, SystemClock())), "what hangs is left behind, and that is said"
    assert made.stop(Deadline(PATIENCE_S, SystemClock())), "each ends when its attempt does"


def test_what_a_stop_interrupted_is_sent_after_the_next_start(world: World, tmp_path: Path) -> None:
    path = tmp_path / "alerts"
    with receiver(status=503) as there:
        made = started(world, hook=hook(there.url), file=File(type="file", path=str(path)))
        write(world, incident("i1"), incident("i1", 2, "closed"))
        until(lambda: there.requests and len(lines(path)) == 2)
        assert made.stop(Deadline(20.0, SystemClock()))
        assert not any(thread.name.startswith("sink ") for thread in threading.enumerate())
        there.status = 200
        made = service(world, hook=hook(there.url), file=File(type="file", path=str(path)))
        made.start()
        until(lambda: [json.loads(r.body)["id"] for r in there.requests][-2:] == ["i1.1", "i1.2"])
        assert made.stop(Deadline(20.0, SystemClock()))
    assert lines(path) == ["i1.1", "i1.2"], "the file had them already"
    assert lag(world.config, world.log, "unmask-sink-hook") == 0


def test_metrics_follow_the_conventions(world: World, tmp_path: Path) -> None:
    made = service(world, file=File(type="file", path=str(tmp_path / "a")))
    families = list(text_string_to_metric_families(generate_latest(made.metrics.registry).decode()))
    assert families
    for family in families:
        assert family.name.startswith("unmask_sink_")
        assert family.documentation
        for sample in family.samples:
            if family.type == "counter" and not sample.name.endswith("_created"):
                assert sample.name.endswith("_total")


def test_one_that_hangs_is_told(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = service(world, file=File(type="file", path=str(tmp_path / "a")))
    made._loops[0].turned_at -= HANGS_S + 1
    made.look()
    made.look()
    assert caplog.text.count("sink file has done nothing") == 1
    assert 'unmask_sink_up{sink="file"} 0.0' in generate_latest(made.metrics.registry).decode()


def test_a_sink_that_cannot_be_made_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOK_SECRET")
    with pytest.raises(UnmaskError, match="sink moderation: env:HOOK_SECRET is empty or not set"):
        service(world, moderation=hook("http://127.0.0.1:9/"))
