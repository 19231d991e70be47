"""Over a real broker: what docs/producers.md tells other producers to do, and chunks in many parts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stream.config import Freshness, LogSettings
from stream.marker import write_clip
from stream.records import Topic
from stream.topics import media_partition
from tests.conftest import requires
from tests.stream.clustered import Clustered
from tests.stream.detecting import chunked, kinds
from tests.stream.test_deadletters import listed, replay, working

DOC = Path(__file__).parents[2] / "docs" / "producers.md"
SCORE = Freshness(on_late="score")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 16, [(4, 12)])


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)


def sh(script: str, folder: Path, made: Clustered) -> None:
    """Run an example as it stands, but for the prefix of the topics."""
    mine = script.replace("unmask.media", made.topic(Topic.MEDIA))
    environment = os.environ | {"KAFKA": made.config.kafka.bootstrap_servers}
    done = subprocess.run(
        ["sh", "-euc", mine],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def clustered(folder: Path, servers: str) -> Clustered:
    made = Clustered(folder / "data", servers, log=LogSettings(commit_ms=100), freshness=SCORE)
    made.list_source("studio")
    return made


def check(made: Clustered, seconds: int) -> None:
    made.run()
    assert made.dead() == []
    assert 2 * seconds <= len(made.frames("studio")) <= 2 * seconds + 2
    assert {frame["epoch"] for frame in made.frames("studio")} == {0}
    told = kinds(made.alerts())
    assert told[:2] == ["feed.up", "incident.opened"]
    assert told.count("incident.closed") == 1


def test_the_example_with_kcat_is_watched(tmp_path: Path, servers: str, planted: Path) -> None:
    requires("kcat", "ffmpeg")
    (tmp_path / "clip.mp4").write_bytes(planted.read_bytes())
    made = clustered(tmp_path, servers)
    [example] = [text for text in examples("sh") if "kcat" in text]
    sh(example, tmp_path, made)
    check(made, 16)


def test_the_example_in_python_is_watched(tmp_path: Path, servers: str, planted: Path) -> None:
    requires("ffmpeg")
    (tmp_path / "clip.mp4").write_bytes(planted.read_bytes())
    made = clustered(tmp_path, servers)
    [segments] = [text for text in examples("sh") if "fmp4" in text]
    sh(segments, tmp_path, made)
    [script] = examples("python")
    (tmp_path / "push.py").write_text(script.replace("unmask.media", made.topic(Topic.MEDIA)))
    sh(f"{sys.executable} push.py studio init.mp4 part-*.m4s", tmp_path, made)
    check(made, 16)


def test_every_command_of_the_page_exists() -> None:
    commands = [line for text in examples("sh") for line in text.splitlines() if line.startswith("unmask ")]
    assert commands == ["unmask attach push: --id studio"]


def test_dead_letters_are_listed_and_replayed_over_kafka(tmp_path: Path, servers: str) -> None:
    made = clustered(tmp_path, servers)
    clip = write_clip(tmp_path / "clip.mp4", 12, [(2, 10)], gop=300)
    chunks = chunked(clip, "studio", 1_700_000_000_000_000)
    meta, value = chunks[21]
    chunks[21] = (meta, bytes(len(value)))
    made.write(chunks, media_partition("studio", 2))
    made.run()
    [letter] = listed(made)
    assert letter["stream"] == "studio"
    with working(made):
        code, outcome = replay(made, letter["id"])
    assert code == 1
    assert outcome["frames"] > 4
    assert [again["code"] for again in outcome["dead_letters"]] == [letter["code"]]
    assert len(listed(made)) == 2
    assert {alert["subject"]: alert["data"].get("replay") for alert in made.alerts()} == {
        "studio": False,
        "studio~replay": True,
    }
