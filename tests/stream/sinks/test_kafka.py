"""Sinks over a real Kafka: alerts from a cluster, and to a topic of one."""

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stream.clock import SystemClock
from stream.config import Config, Kafka, Media
from stream.errors import UnmaskError
from stream.log import TopicSpec, everything
from stream.sinks.delivery import DELIVERED, Outcome
from stream.sinks.loop import SinkLoop
from stream.sinks.service import lag
from stream.sinks.settings import Flood, KafkaTopic
from stream.sinks.topic import TopicTarget
from stream.topics import media_partition
from stream.watch import structured
from tests.stream.sinks.world import REFUSED, FakeTarget, World, end, incident

PATIENCE_S = 60.0


@pytest.fixture
def world(tmp_path: Path, servers: str) -> Iterator[World]:
    kafka = Kafka(bootstrap_servers=servers, replication=1, session_s=6.0)
    made = World(tmp_path, kafka=kafka, prefix=f"t{uuid.uuid4().hex[:12]}")
    made.clock = SystemClock()  # type: ignore[assignment]
    yield made
    made.log.close()


def run(loop: SinkLoop, reached: Callable[[], object]) -> None:
    run_all([loop], reached)


def run_all(loops: list[SinkLoop], reached: Callable[[], object]) -> None:
    """Let each have its turn until it is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline, "not in time"
        for loop in loops:
            try:
                loop.step()
            except UnmaskError as error:
                print(error)
        time.sleep(0.02)


def told(target: FakeTarget, name: str) -> bool:
    """Whether the withdrawal of an incident that was held back came, by itself or with the others."""
    return f"{name}.2" in target.got or any(
        {"incident": name, "stream": "studio", "severity": "medium", "event": "retracted"}
        in event.data.get("incidents", ())
        for event in target.events
    )


def placed(world: World) -> bool:
    return "s#position" in world.states()


def test_a_sink_goes_on_where_another_process_ended(world: World) -> None:
    target = FakeTarget()
    world.write(incident("old"))
    limits = Flood(most=2, within_s=1.0)
    loop = world.loop(target, flood=limits)
    run(loop, lambda: placed(world) and len(loop._parts) == 2)
    target.answers.append(REFUSED)
    world.write(incident("bad"), incident("good"), incident("held"))
    run(loop, lambda: target.got == ["good.1"] and world.counted("unmask_sink_held_back_total") == 1)
    end(loop)
    world.write(incident("good", 2, "retracted"), incident("held", 2, "retracted"))
    other = FakeTarget()
    loop = world.loop(other, flood=limits)
    run(loop, lambda: {"bad.1", "good.2"} <= set(other.got) and told(other, "held"))
    run(loop, lambda: not loop._writes)
    end(loop)
    assert "old.1" not in [*target.tried, *other.tried]
    assert {"s#position", "s!bad"} <= world.states().keys() <= {"s#position", "s!bad", "s!held"}
    assert lag(world.config, world.log, loop.group) < 10, "ends of transactions count"


def test_what_a_sink_knows_goes_with_the_partition(world: World) -> None:
    """Withdrawals and retries are for whoever has the partition now."""
    streams = [next(f"cam{n}" for n in range(99) if media_partition(f"cam{n}", 2) == p) for p in (0, 1)]
    one, two = FakeTarget(), FakeTarget()
    first = world.loop(one, member="one")
    run_all([first], lambda: len(first._parts) == 2)
    one.answers += [DELIVERED, DELIVERED, REFUSED, REFUSED]
    for kind in ("told", "bad"):
        world.write(*(incident(f"{kind}-{stream}", stream=stream) for stream in streams))
    run_all([first], lambda: len(one.tried) == 4)
    second = world.loop(two, member="two")
    run_all([first, second], lambda: len(first._parts) == len(second._parts) == 1)
    world.write(*(incident(f"told-{stream}", 2, "retracted", stream=stream) for stream in streams))
    wanted = {f"told-{stream}.2" for stream in streams} | {f"bad-{stream}.1" for stream in streams}
    run_all([first, second], lambda: wanted <= {*one.got, *two.got})
    assert two.got
    assert sorted(one.got + two.got) == sorted({*one.got, *two.got}), "each once"
    end(first)
    world.write(*(incident("last-" + stream, stream=stream) for stream in streams))
    run_all([second], lambda: {f"last-{stream}.1" for stream in streams} <= set(two.got))
    end(second)


def test_alerts_go_to_a_topic_as_they_stand(world: World) -> None:
    name = f"{world.config.prefix}-moderation"
    settings = KafkaTopic(type="kafka", topic=name)
    target = TopicTarget(settings, "test", world.config, SystemClock())
    assert target.deliver(incident()).outcome is Outcome.AWAY, "there is no such topic yet"
    world.log.create_topics([TopicSpec(name, 2)])
    for number in (1, 2):
        assert target.deliver(incident(number=number)).outcome is Outcome.DELIVERED
    target.close()
    found = list(everything(world.log, name))
    assert [structured(record) for record in found] == [incident(number=n).structured() for n in (1, 2)]
    assert {record.key for record in found} == {"studio"}


def test_a_cluster_that_is_not_there_is_an_outage() -> None:
    settings = KafkaTopic(type="kafka", topic="x", cluster=Kafka(bootstrap_servers="127.0.0.1:9"))
    result = TopicTarget(settings, "test", Config(media=Media()), SystemClock()).deliver(incident())
    assert (result.outcome, result.reason) == (Outcome.AWAY, "log_away")
