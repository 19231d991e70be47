"""The bench measures what it says, of the parts that watch; no test here looks at a speed."""

import time
from io import StringIO
from pathlib import Path
from typing import Any

import av
import pytest

from detectors.mtcnn import MtcnnDetector
from detectors.readings import Image
from stream import bench
from stream.assemble import Assembly
from stream.bench_log import SCORES_A_COMMIT, LogBench
from stream.clock import SystemClock
from stream.config import Config, LogSettings, Members
from stream.errors import UnmaskError
from stream.log import TopicPartition
from stream.marker import CALIBRATION, PROVENANCE
from stream.profile import FILE, Name, Of, Step, find, log_figure
from stream.sqlite_log import SqliteLog

BRIEF = bench.Pace(2, 0.01)


class Seer:
    """Finds as many faces as `crowd` drew: the first pixels differ where heads were pasted."""

    engine = "seer"
    precision = "exact"

    def __init__(self) -> None:
        self._known = {bench.crowd(faces).tobytes(): faces for faces in (0, bench.MANY)}
        self.pictures = 0

    def read(self, frames: Any) -> list[tuple[Any, ...]]:
        self.pictures += len(frames)
        time.sleep(0.001)
        return [(None,) * self._known[image.tobytes()] for image, _ in frames]

    def read_crops(self, crops: Any) -> list[Any]:
        raise AssertionError("the bench looks for faces")


def test_every_figure_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CLIP_S", 1)
    monkeypatch.setattr(bench, "WIDTHS", {720: 128, 1080: 160})  # narrow pictures are soon made
    monkeypatch.setattr(bench, "QUICK", BRIEF)
    reader = Seer()
    monkeypatch.setattr(bench, "build_reader", lambda config: Assembly(reader, CALIBRATION, PROVENANCE))
    out = StringIO()
    config = Config(data_dir=str(tmp_path))
    assert bench.run(config, None, True, out) == 0
    profile = find(None, tmp_path / FILE)
    wanted = {name.value for name in Name if not name.value.startswith("gpu")}
    assert set(profile.figures) == wanted | {log_figure(Of.EMBEDDED, step) for step in Step}
    for name, figure in profile.figures.items():
        assert figure.unit, name
        assert figure.how, name
        assert 0 <= figure.cpu_s.low <= figure.cpu_s.median <= figure.cpu_s.high
        assert 0 < figure.per_s.low <= figure.per_s.median <= figure.per_s.high
        assert f"{name} " in out.getvalue()
    assert profile.engine == "seer exact"
    assert profile.members == ("marker",)
    assert profile.cores >= 1
    assert reader.pictures >= 2 * bench.AT_ONCE * (1 + BRIEF.repeats)


def test_a_reader_that_finds_no_faces_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "WIDTHS", {})
    config = Config(data_dir=str(tmp_path), members=Members(names=("marker",)))
    with pytest.raises(UnmaskError, match="0 faces found in a picture of 4"):
        bench.run(config, None, True, StringIO())
    assert not (tmp_path / FILE).exists()


def test_the_crowd_has_the_faces_it_says() -> None:
    detector = MtcnnDetector(40, 0.9)
    pictures: list[Image] = [bench.reduced(bench.crowd(faces), 640) for faces in range(bench.MANY + 1)]
    assert [len(found) for found in detector.detect(pictures)] == list(range(bench.MANY + 1))


def test_the_clip_is_what_its_figures_say(tmp_path: Path) -> None:
    bench.write_clip(tmp_path / "clip.mp4", 720, 0.4)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.codec_context.name) == (1280, 720, "h264")
        frames = list(container.decode(video=0))
    assert len(frames) == 10
    chunks = bench._remuxed(tmp_path / "clip.mp4", 500)
    assert bench._decode(chunks, bench.DecodeSettings()) == 10


def test_what_a_log_is_given_arrives(tmp_path: Path) -> None:
    """Counts the records in the log against what the figures were divided by."""
    log = SqliteLog(tmp_path, LogSettings(), SystemClock())
    told: list[str] = []
    counted = Counting(log, "b", {Of.EMBEDDED: time.process_time}, Of.EMBEDDED)
    counted.run(0.01, 2, told.append)
    assert len(told) == len(Step)
    written = {topic: held(log, f"b.{topic}") for topic in ("large", "small", "record", "state")}
    # each writer's first record, and each member's first commit, is not counted
    assert written["large"] == sum(counted.counts[Step.APPEND_LARGE]) + 2
    alone = sum(counted.counts[Step.APPEND_ALONE])
    assert written["small"] == sum(counted.counts[Step.APPEND_SMALL]) + alone + 4
    commits = 1 + sum(counted.counts[Step.COMMIT])
    assert written["record"] == sum(counted.counts[Step.APPEND_RECORD]) + 2 + SCORES_A_COMMIT * commits
    assert written["state"] == 1  # compacted: the last of its key
    assert counted.counts[Step.POLL_LARGE] == [written["large"]] * 2
    assert counted.counts[Step.POLL_SMALL] == [written["small"]] * 2
    log.close()


class Counting(LogBench):
    """Remembers what the figures are made of."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.counts: dict[Step, list[int]] = {}

    def _figures(self, step: Step, unit: str, size: int, taken: Any, told: Any) -> Any:
        self.counts[step] = [one.count for one in taken]
        return super()._figures(step, unit, size, taken, told)


def held(log: SqliteLog, topic: str) -> int:
    partitions = [TopicPartition(topic, number) for number in range(log.partitions(topic))]
    return sum(1 for partition in partitions for _ in log.read(partition, log.begin_offset(partition)))
