"""The demo's clip is what the script says, and the demo says plainly what was found and missed."""

import csv
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from detectors.mtcnn import MtcnnDetector
from detectors.reference import portrait
from stream import demo
from stream.config import Config
from stream.console import Console
from stream.coverage import cover
from stream.demo import FACE, FPS, HEIGHT, SCRIPT, WIDTH, Found, Stretch, altered, comparison, write_all
from stream.timeline import IncidentSpan, Summary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_all(folder)
    return folder


def test_the_script_has_no_holes_and_plants_all_three() -> None:
    assert SCRIPT[0].first_s == 0
    assert all(part.last_s == following.first_s for part, following in pairwise(SCRIPT))
    assert {part.kind for part in SCRIPT} == set(Stretch)


def test_the_clip_has_faces_where_the_script_says(folder: Path) -> None:
    with av.open(str(folder / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", WIDTH, HEIGHT)
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(pictures) == SCRIPT[-1].last_s * FPS
    detector = MtcnnDetector()
    for part in SCRIPT:
        middle = pictures[round((part.first_s + part.last_s) / 2 * FPS)]
        assert len(detector.detect([middle])[0]) == (part.kind is not Stretch.NO_FACE), part


def test_only_the_face_is_altered() -> None:
    original = portrait()
    changed = np.abs(altered(original).astype(int) - original).max(axis=2)
    x0, y0, x1, y1 = (round(edge) for edge in FACE)
    outside = changed.copy()
    outside[y0 - 25 : y1 + 25, x0 - 25 : x1 + 25] = 0
    assert outside.max() <= 1
    assert changed[y0 + 60 : y1 - 60, x0 + 60 : x1 - 60].mean() > 5


def test_what_is_kept_can_be_scored_and_evaluated(folder: Path) -> None:
    rows = list(csv.DictReader((folder / "manifest.csv").open()))
    assert {row["label"] for row in rows} == {"real", "fake"}
    assert all((folder / row["path"]).stat().st_size > 0 for row in rows)


def test_found_is_said() -> None:
    lines = comparison([Found("7", 12.0, 18.0)])
    assert "The planted manipulation was found." in lines
    assert any("manipulated" in line and "incident 7 from 12.0 to 18.0 s" in line for line in lines)
    assert not any("FALSE" in line or "MISSED" in line for line in lines)


def test_an_incident_that_outlasts_the_stretch_is_no_false_alarm() -> None:
    assert not any("FALSE" in line for line in comparison([Found("7", 12.0, 21.0)]))


def test_missed_is_said_plainly() -> None:
    lines = comparison([])
    assert any("MISSED" in line for line in lines)
    assert sum("no incident" in line for line in lines) == len(SCRIPT)


def test_an_incident_elsewhere_is_a_false_alarm_and_no_find() -> None:
    lines = comparison([Found("7", 1.0, 5.0)])
    assert any("MISSED" in line for line in lines)
    assert any("FALSE ALARM" in line for line in lines)


@pytest.mark.parametrize("code", [0, 2])
def test_run_watches_the_clip_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    start = 1_700_000_000_000_000
    span = IncidentSpan(
        "7", start + 12_000_000, start + 18_000_000, "high", 0.95, (0.9, 0.98), "review", False
    )

    def watch(settings: Config, sources: Sequence[str], json_mode: bool, console: Console) -> int:
        assert settings.data_dir == str(tmp_path / "kept" / "data")
        assert [Path(source).is_file() for source in sources] == [True]
        console.summary([Summary(cover("clip", [], start, start + 24_000_000), {}, (span,))])
        return code

    def write(folder: Path) -> Path:
        folder.mkdir()
        (folder / "clip.mp4").touch()
        return folder / "clip.mp4"

    monkeypatch.setitem(__import__("sys").modules, "stream.watch", SimpleNamespace(watch=watch))
    monkeypatch.setattr(demo, "write_all", write)
    out = io.StringIO()
    assert demo.run(Config(), tmp_path / "kept", out) == code
    said = "The planted manipulation was found." in out.getvalue()
    assert said == (code == 0)
