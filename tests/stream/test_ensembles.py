"""`unmask evaluate --ensembles`: the arithmetic of the tables, and that every file and frame is counted."""

import io
import json
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from detectors.members import DEFAULT_MEMBER
from detectors.readings import Detection, FaceReading, Image, Quality
from detectors.registry import PUBLISHED
from stream import ensembles
from stream.alerts import Model, Provenance
from stream.assemble import Assembly
from stream.cli import app
from stream.config import Config
from stream.curves import Interval
from stream.ensembles import Looked, Tables, expand, fused, markdown, run, subsets, tables
from stream.errors import UnmaskError
from stream.evaluate import Item
from stream.marker import CALIBRATION
from stream.stills import evenly
from tests.stream.media import make_clip, read_number

B4, ATT, XCEPTION = (
    "published:EfficientNetB4_DFDC",
    "published:EfficientNetAutoAttB4_DFDC",
    "published:Xception_DFDC",
)
POINT = (0.0, 0.0)


def looked(*logits: tuple[float, float], faceless: int = 0) -> Looked:
    """A video of two networks, a pair of logits for each frame with a face."""
    by_name = {"a": [pair[0] for pair in logits], "b": [pair[1] for pair in logits]} if logits else {}
    return Looked(1, 1, len(logits) + faceless, faceless, 0, by_name)


ITEMS = [
    Item(Path("real.mp4"), False, "ada"),
    Item(Path("fake.mp4"), True, "bob"),
    Item(Path("nobody.mp4"), True, "cem"),
]
LOOKED = {
    Path("real.mp4"): looked((-2.0, 1.0), (0.0, 0.0)),
    Path("fake.mp4"): looked((3.0, -1.0), faceless=3),
    Path("nobody.mp4"): looked(faceless=4),
}


def table(intervals: bool = False) -> Tables:
    return tables(ITEMS, LOOKED, {"gone.mp4": "cannot be read"}, {"a": "1+0", "b": "1+1"}, 4, intervals)


def test_logits_are_averaged_over_frames_then_over_networks() -> None:
    rows = {row.members: row for row in table().rows}
    assert list(rows) == [("a",), ("b",), ("a", "b")]

    def loss(real: Sequence[float], fake: Sequence[float]) -> float:
        return float(
            np.mean([math.log1p(math.exp(z)) for z in real] + [math.log1p(math.exp(-z)) for z in fake])
        )

    both = rows["a", "b"]
    assert both.frame.log_loss.value == pytest.approx(loss([-0.5, 0.0], [1.0]))
    assert both.video.log_loss.value == pytest.approx(loss([-0.25], [1.0]))
    assert both.frame.auc.value == 1.0
    assert rows["b",].frame.auc.value == 0.0
    assert rows["b",].video.log_loss.value == pytest.approx(loss([0.5], [-1.0]))


def test_everything_is_counted() -> None:
    found = table()
    assert (found.videos, found.real, found.fake, found.identities) == (2, 1, 1, 2)
    assert (found.frames, found.faceless_frames) == (3, 7)
    assert found.without_face == ("nobody.mp4",)
    shown = markdown(found)
    assert (
        "7 frames without a face, 0 faces that were not the largest, 1 files without a face, 1 unread"
        in shown
    )
    assert "- without a face: nobody.mp4\n- unreadable: gone.mp4: cannot be read\n" in shown


def test_intervals_are_over_identities_and_only_when_asked_for() -> None:
    assert table().rows[0].video.auc == Interval(1.0, None, None)
    items = [Item(Path(str(index)), index % 2 == 1, f"person {index // 2}") for index in range(20)]
    rng = np.random.default_rng(0)
    seen = {item.path: looked((rng.normal() + item.manipulated, 0.0)) for item in items}
    auc = tables(items, seen, {}, {"a": "1+0", "b": "1+1"}, 1, True).rows[0].video.auc
    assert auc.low is not None
    assert auc.high is not None
    assert auc.low < auc.value < auc.high  # type: ignore[operator]


def test_no_face_anywhere() -> None:
    with pytest.raises(UnmaskError, match="no face was found: 1 files without one, 1 unreadable"):
        tables(ITEMS[2:], LOOKED, {"gone.mp4": "cannot be read"}, {"a": "1+0"}, 4, False)


def test_fusion_does_not_overflow() -> None:
    np.testing.assert_allclose(fused([np.array([0.0, 2000.0, -2000.0])]), [0.5, 1.0, 0.0])


def test_the_paper_s_ensembles_and_its_baseline_alone() -> None:
    names = [f"published:{name}" for name in PUBLISHED if name.endswith("_FFPP")]
    rows = subsets(names)
    assert [len(row) for row in rows] == [1] * 5 + [2] * 6 + [3] * 4 + [4]
    assert rows[0] == ("published:Xception_FFPP",)
    assert sum("published:Xception_FFPP" in row for row in rows) == 1
    assert subsets(["one"]) == [("one",)]
    assert [len(row) for row in subsets(list("abcde"))] == [1] * 5 + [2] * 10 + [3] * 10 + [5]


def test_patterns_name_networks() -> None:
    assert expand(["published:*B4_DFDC", "folder/of/mine", B4]) == (B4, ATT, "folder/of/mine")
    assert DEFAULT_MEMBER in expand(["*"])
    with pytest.raises(UnmaskError, match=r"'published:B5\*' matches no network; there are: "):
        expand(["published:B5*"])


@pytest.mark.parametrize(("count", "numbers"), [(1, [0]), (5, [0, 6, 12, 18, 24]), (40, list(range(25)))])
def test_frames_are_taken_evenly(tmp_path: Path, count: int, numbers: list[int]) -> None:
    clip = make_clip(tmp_path / "clip.mp4", seconds=1.0, audio=None)
    taken = list(evenly(clip, count, 80))
    assert [read_number(still.image) for still in taken] == numbers
    assert taken[-1].small.shape[1] == 80


class Brightness:
    """Sees a face in what is not black, and reads its mean brightness."""

    engine = precision = "test"

    def __init__(self) -> None:
        self.faces_cut_off = 0
        self.seen = 0

    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        self.seen += len(frames)
        self.faces_cut_off += len(frames)
        return [() if image.mean() < 20 else (self._reading(image),) for image, _ in frames]

    def read_crops(self, crops: Sequence[Image]) -> list[FaceReading]:
        self.seen += len(crops)
        return [self._reading(crop) for crop in crops]

    @staticmethod
    def _reading(image: Image) -> FaceReading:
        level = float(image.mean()) / 64 - 2
        return FaceReading(
            Detection((0.0, 0.0, 1.0, 1.0), (POINT, POINT, POINT, POINT, POINT), 1.0),
            Quality(1.0, {}, ()),
            {B4: level, ATT: level / 2, XCEPTION: 0.0},
            level,
            image,
            np.zeros((1, 1), np.float32),
        )


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Brightness:
    seeing = Brightness()

    def assembled(settings: Config) -> Assembly:
        assert settings.faces.max_faces == 1
        assert settings.members.names == (B4, ATT, XCEPTION)
        models = tuple(Model(name, "1", "0" * 64) for name in settings.members.names)
        return Assembly(seeing, CALIBRATION, Provenance(models, (), (), "none", "", 0.5))

    monkeypatch.setattr(ensembles, "build_reader", assembled)
    return seeing


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two authentic and two manipulated videos, one that shows nobody, one that is none."""
    rows = ["path,label,identity"]
    for name, level, label in (
        ("dim", 60, "real"),
        ("grey", 100, "real"),
        ("light", 150, "fake"),
        ("white", 240, "fake"),
    ):
        picture = np.full((48, 64, 3), level, np.uint8)
        make_clip(
            tmp_path / f"{name}.mp4", seconds=1.0, audio=None, size=(64, 48), picture=lambda _, p=picture: p
        )  # type: ignore[misc]
        rows.append(f"{name}.mp4,{label},{name}")
    make_clip(
        tmp_path / "black.mp4",
        seconds=0.4,
        audio=None,
        size=(64, 48),
        picture=lambda _: np.zeros((48, 64, 3), np.uint8),
    )
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    path = tmp_path / "videos.csv"
    path.write_text("\n".join([*rows, "black.mp4,real,", "broken.mp4,fake,"]))
    return path


def evaluated(manifest: Path, **changed: Any) -> tuple[int, dict[str, Any], str]:
    folder = manifest.parent / "out"
    out = io.StringIO()
    arguments: dict[str, Any] = {
        "wanted": ["published:*B4_DFDC", XCEPTION],
        "frames": 4,
        "crops": False,
        "intervals": False,
        "folder": folder,
        "as_json": False,
    }
    code = run(Config(), manifest, out=out, **(arguments | changed))
    return code, json.loads((folder / "ensembles.json").read_text()), out.getvalue()


def test_videos_to_a_table_in_the_paper_s_layout(reader: Brightness, manifest: Path) -> None:
    code, found, shown = evaluated(manifest)
    assert code == 1
    assert reader.seen == 20
    assert (found["videos"], found["frames"], found["further_faces"]) == (4, 16, 20)
    assert [Path(path).name for path in found["without_face"]] == ["black.mp4"]
    assert [Path(path).name for path in found["unreadable"]] == ["broken.mp4"]
    assert [row["video"]["auc"]["value"] for row in found["rows"]] == [0.5, 1.0, 1.0, 1.0]
    assert "| model(s) | frame | video | published, frame | published, video |" in shown
    assert "| Xception | 0.6931/0.5000 | 0.6931/0.5000 | 0.4897/0.8784 | 0.2537/0.9497 |" in shown
    assert "| B4+B4Att | " in shown
    assert "| 0.4731/0.8785 | 0.2650/0.9483 |" in shown
    assert (manifest.parent / "out" / "ensembles.md").read_text() == shown


def test_json_is_all_there_is_on_stdout(reader: Brightness, manifest: Path) -> None:
    _, found, shown = evaluated(manifest, as_json=True)
    assert json.loads(shown) == found


def test_a_stopped_run_goes_on(reader: Brightness, manifest: Path) -> None:
    evaluated(manifest)
    first, kept = reader.seen, manifest.parent / "out" / "frames.jsonl"
    _, found, _ = evaluated(manifest)
    assert reader.seen == first
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # killed while it wrote the third video
    _, again, _ = evaluated(manifest)
    assert reader.seen == first + 12
    assert again == found
    assert len(kept.read_bytes().splitlines()) == len(lines)


def test_a_file_that_changed_is_looked_at_anew(reader: Brightness, manifest: Path) -> None:
    _, before, _ = evaluated(manifest)
    first = reader.seen
    (manifest.parent / "dim.mp4").write_bytes((manifest.parent / "white.mp4").read_bytes())
    _, after, _ = evaluated(manifest)
    assert reader.seen == first + 4
    assert after["rows"][1]["video"] != before["rows"][1]["video"]


def test_what_was_kept_with_other_settings_is_not_mixed_in(reader: Brightness, manifest: Path) -> None:
    evaluated(manifest)
    with pytest.raises(UnmaskError, match=r"was made with frames 4, now it is 8; choose another --out"):
        evaluated(manifest, frames=8)
    kept = manifest.parent / "out" / "frames.jsonl"
    kept.write_text(kept.read_text() + "[]\n")
    with pytest.raises(UnmaskError, match=r"line 7 is not what a run writes; delete the file"):
        evaluated(manifest)
    kept.write_text("[]\n")
    with pytest.raises(UnmaskError, match=r"line 1 is not what a run writes"):
        evaluated(manifest)


def test_crops_and_pictures(reader: Brightness, tmp_path: Path) -> None:
    for name, level in (("a", 10), ("b", 200)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((32, 32, 3), level, np.uint8))
    manifest = tmp_path / "faces.csv"
    manifest.write_text("path,label\na.png,real\nb.png,fake\n")
    code, found, _ = evaluated(manifest, crops=True)
    assert (code, found["videos"], found["frames"]) == (0, 2, 2)
    _, found, _ = evaluated(manifest, folder=tmp_path / "out2")
    found = json.loads((tmp_path / "out2" / "ensembles.json").read_text())
    assert (found["videos"], [Path(path).name for path in found["without_face"]]) == (1, ["a.png"])


def test_a_number_that_is_none_is_told(
    reader: Brightness, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = reader._reading

    def broken(image: Image) -> FaceReading:
        reading = usual(image)
        if image.mean() > 200:
            reading.logits[ATT] = math.nan
        return reading

    monkeypatch.setattr(reader, "_reading", broken)
    _, found, _ = evaluated(manifest)
    assert found["videos"] == 3
    assert f"network {ATT} gives a logit of nan" in found["unreadable"].values()


def test_a_file_listed_twice_is_refused(reader: Brightness, manifest: Path) -> None:
    manifest.write_text("path,label\ndim.mp4,real\ndim.mp4,fake\n")
    with pytest.raises(UnmaskError, match=r"lists .*dim.mp4 twice; each file counts once"):
        evaluated(manifest)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["evaluate", *arguments])


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped member, on a real face and an empty picture."""
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    monkeypatch.chdir(tmp_path)
    from detectors.reference import portrait

    cv2.imwrite("portrait.png", cv2.cvtColor(portrait(), cv2.COLOR_RGB2BGR))
    cv2.imwrite("wall.png", np.full((200, 200, 3), 128, np.uint8))
    Path("list.csv").write_text("path,label\nportrait.png,real\nwall.png,fake\n")
    options = ("--set", f"engines.cache_dir={tmp_path}", "--set", 'engines.order=["eager"]')
    done = call("list.csv", "--ensembles", "--members", DEFAULT_MEMBER, *options)
    assert done.exit_code == 0
    assert f"| {DEFAULT_MEMBER} | " in done.output
    assert "- without a face: wall.png" in done.output
    absent = call("list.csv", "--ensembles", "--members", "published:*_DFDC", *options)
    assert absent.exit_code == 2
    assert "unmask models pull Xception_DFDC" in absent.output
    for alone in (("--intervals",), ("--frames", "8"), ("--members", DEFAULT_MEMBER)):
        assert call("list.csv", *alone).exit_code == 2
