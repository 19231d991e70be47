"""A detect worker over a real Kafka: what only a group with sessions can do to it."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from detectors.readings import FaceReading, Image
from stream.config import Sampling
from stream.marker import MarkerReader, write_clip
from stream.worker import Worker
from tests.stream.clustered import Clustered
from tests.stream.detecting import chunked

SESSION_S = 6.0
"""The least that brokers allow, and what `Clustered` asks for."""

SECONDS, FPS = 8, 1.0
BATCH_S = 2.0
"""One picture at a time takes so long: in all several sessions, each far below `worker.stall_s`."""


class SlowReader(MarkerReader):
    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        time.sleep(BATCH_S)
        return super().read(frames)


def test_no_load_gets_a_healthy_worker_evicted(
    servers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.stream.detecting.MarkerReader", SlowReader)
    told: list[str] = []
    for name in ("assigned", "revoked", "lost"):
        whole = getattr(Worker, name)

        def noted(worker: Worker, partitions: object, name: str = name, whole: object = whole) -> None:
            told.append(name)
            whole(worker, partitions)  # type: ignore[operator]

        monkeypatch.setattr(Worker, name, noted)
    made = Clustered(tmp_path, servers, sampling=Sampling(idle_fps=FPS))
    made.list_source("cam")
    made.write(chunked(write_clip(tmp_path / "clip.mp4", SECONDS), "cam", round(time.time() * 1e6)))
    began = time.monotonic()
    made.run()
    assert time.monotonic() - began > 2 * SESSION_S
    shown = [frame["pts"] for frame in made.frames("cam")]
    assert len(shown) == len(set(shown)) >= SECONDS * FPS
    assert told[:2] == ["assigned", "revoked"]  # the latter by its own stop
    assert set(told[2:]) <= {"lost"}  # which forgets what was revoked
    made.log.close()
