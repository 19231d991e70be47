"""The same read model over a real Kafka: what differs is the log alone."""

import json
from pathlib import Path
from typing import Any

from stream.clock import SystemClock
from stream.decisions import Choice, Mute, mutes, record_of
from stream.records import OutRecord, Topic
from stream.web import history
from stream.web.follow import Follower
from stream.web.incidents import Wanted, decision_of
from stream.web.view import View
from tests.stream.clustered import Clustered
from tests.stream.web.world import MANIPULATED, World


def test_wall_history_timeline_decisions_and_coverage_over_kafka(tmp_path: Path, servers: str) -> None:
    cluster = Clustered(tmp_path / "kafka", servers)
    world = World(tmp_path / "story")
    try:
        world.tell(MANIPULATED, picture_every=4)
        view = View(cluster.config, SystemClock())
        follower = Follower(cluster.config, cluster.log, SystemClock(), view)
        cluster.list_source("studio", id="studio", url="tcp://192.0.2.7:9000")
        _copy(world, cluster)
        follower.look()
        follower.add_up()
        (found,), total = view.incidents(Wanted(), 10)
        assert (found["stream"], total) == ("studio", 1)
        assert view.glimpse("studio") is not None
        incident = view.incident(found["id"])
        assert incident is not None
        told = history.events(cluster.log, incident)
        assert told[0]["data"]["event"] == "opened"
        scores, whole = history.scores(cluster.log, cluster.topic(Topic.SCORES), incident)
        assert whole
        assert len(scores) >= 20
        now = SystemClock().now_us()
        mute = Mute("studio", now, now + 60_000_000, "rehearsal", "ada", now)
        decision = decision_of(incident, Choice.DISMISSED, "a poster", "ada", now)
        cluster._send([record_of(cluster.config, mute), record_of(cluster.config, decision)])
        follower.look()
        assert view.mute("studio") is not None
        assert mutes(cluster.config, cluster.log)["studio"].author == "ada"
        (asked,) = cluster.records(Topic.MEDIA)
        assert json.loads(asked.value or b"") == {"incident": incident.id, "reason": "a poster"}
        rows: list[Any] = view.ledger.rows(now, frozenset(), 0, now)
        assert [row["stream"] for row in rows] == ["studio"]
    finally:
        world.close()
        cluster.log.close()


def _copy(world: World, cluster: Clustered) -> None:
    """Write what the story said into the cluster's topics."""
    for topic in (Topic.SCORES, Topic.ALERTS, Topic.PICTURES):
        found = [record for place in world.places(topic) for record in world.log.read(place, 0)]
        name = cluster.topic(topic)
        cluster._send([OutRecord(name, one.key, one.value, one.headers, one.timestamp_us) for one in found])
