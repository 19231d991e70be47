"""Metrics follow Prometheus' conventions and tell of decoders too."""

import socket
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from detectors.reader import Role, Usage
from stream.cascade import Outcome
from stream.errors import UnmaskError
from stream.marker import write_clip
from stream.metrics import Metrics
from tests.stream.detecting import Detect, chunked


def read(metrics: Metrics) -> dict[str, float]:
    """Return samples by name and labels, as a scrape would see them."""
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {
        sample.name + "".join(f",{value}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_names_have_the_prefix_and_counters_end_in_total() -> None:
    families = list(text_string_to_metric_families(generate_latest(Metrics().registry).decode()))
    assert families
    for family in families:
        assert family.name.startswith("unmask_")
        assert family.documentation
        for sample in family.samples:
            if family.type == "counter" and not sample.name.endswith("_created"):
                assert sample.name.endswith("_total")


def test_what_a_worker_did_is_counted(tmp_path: Path) -> None:
    made = Detect(tmp_path)
    made.list_source("a")
    chunks = chunked(write_clip(tmp_path / "calm.mp4", 4), "a", 1_700_000_000_000_000)
    made.write(chunks)
    made.run()
    seen = read(made.metrics)
    assert seen["unmask_frames_total,decoded"] == 100
    assert seen["unmask_frames_total,scored"] == 8
    assert seen["unmask_faces_scored_total"] == 8
    assert seen["unmask_records_total,applied"] == len(chunks)
    assert seen["unmask_decoder_events_total,started"] == 1
    assert seen["unmask_decoder_counts_total,sampled"] == 8
    assert seen["unmask_commits_total"] >= 1


def test_members_and_streams_are_told_apart() -> None:
    used = (
        Usage("a", Role.VOTER, faces=30, seconds=0.5),
        Usage("s", Role.SHADOW, faces=10, seconds=0.25, off=True),
        Usage("t", Role.SHADOW),
    )
    made = Metrics(lambda: used)
    made.drift = {"cam": {"score": 0.31}}
    made.heavy = {Outcome.READ: 4, Outcome.REFUSED: 9}
    seen = read(made)
    assert seen["unmask_member_faces_total,a,voter"] == 30
    assert seen["unmask_member_seconds_total,s,shadow"] == 0.25
    assert (seen["unmask_shadow_up,s"], seen["unmask_shadow_up,t"]) == (0, 1)
    assert "unmask_shadow_up,a" not in seen
    assert seen["unmask_drift_psi,score,cam"] == 0.31
    assert (seen["unmask_heavy_pictures_total,read"], seen["unmask_heavy_pictures_total,refused"]) == (4, 9)


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnmaskError, match=f"port for metrics is {port}"):
            Metrics().serve(port)
