"""`unmask evaluate-expression`, and expressions as score fields: only where the settings ask for them."""

import io
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from detectors import expression as expressions
from detectors.expression import INDEX, SCHEMA, ExpressionNetwork
from detectors.reader import NO_LANDMARKS
from detectors.readings import EXPRESSIONS, Detection, Expression, FaceReading, Image, Quality, Visible
from detectors.registry import file_sha256
from detectors.training.expression.evaluate import VIEWS
from stream import scores as scores_module
from stream.cli import app
from stream.closer import Closer, looks_of
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.expression import run
from stream.frames import ScoredFrame
from stream.scores import ScoreRecord
from tests.detectors.ferplus_faces import write_faces

METHODS = ["teacher", "occlusion_trained", "distilled", "triplet", "combined"]
BACKBONE = "tf_efficientnet_lite0"
SCHEMA_FILE = Path(scores_module.__file__).with_name("scores.schema.json")


@pytest.fixture(autouse=True)
def _quick(one_thread: None) -> None:
    """Every test here runs small networks."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder of expression networks, untrained: all of one file."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    network = ExpressionNetwork(BACKBONE)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()},
        folder / "net.safetensors",
    )
    svm = {
        "weight": torch.randn(len(EXPRESSIONS), 2 * network.net.num_features),
        "bias": torch.zeros(len(EXPRESSIONS)),
    }
    save_file(svm, folder / "svm.safetensors")
    networks = [
        ("both", "teacher"),
        *((half, method) for half in ("lower", "upper") for method in METHODS[1:4]),
    ]
    one = {
        "file": "net.safetensors",
        "sha256": file_sha256(folder / "net.safetensors"),
        "backbone": BACKBONE,
        "size": 48,
    }
    both = {
        "file": "svm.safetensors",
        "sha256": file_sha256(folder / "svm.safetensors"),
        "parts": METHODS[2:4],
    }
    record = {
        "schema": SCHEMA,
        "version": "1",
        "classes": EXPRESSIONS,
        "networks": [one | {"reads": reads, "method": method} for reads, method in networks],
        "combined": [both | {"reads": half} for half in ("lower", "upper")],
    }
    (folder / INDEX).write_text(json.dumps(record))
    return folder


@pytest.fixture
def shipped(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if these were shipped."""
    load = expressions.load_expression
    monkeypatch.setattr("stream.expression.load_expression", lambda wanted: load(weights, wanted))


@pytest.mark.parametrize("pictures", [False, True])
def test_json_holds_every_view_and_method_and_nothing_else(
    weights: Path, tmp_path: Path, pictures: bool
) -> None:
    write_faces(tmp_path / "faces", "test", 5, seed=1, pictures=pictures)
    out = io.StringIO()
    assert run(tmp_path / "faces", weights, tmp_path / "told" / "confusion.png", True, out) == 0
    told = json.loads(out.getvalue())
    assert list(told) == list(VIEWS) == ["full", "lower_half", "upper_half"]
    for by_method in told.values():
        assert list(by_method) == METHODS
        for row in by_method.values():
            assert set(row) == {"accuracy", "macro_f1", "n"}
            assert row["n"] == 4  # on the first of the five nobody agrees
            assert 0 <= row["macro_f1"] <= 1
            assert row["accuracy"] * 4 == pytest.approx(round(row["accuracy"] * 4))
    assert (tmp_path / "told" / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_table_for_a_person(weights: Path, tmp_path: Path) -> None:
    write_faces(tmp_path, "train", 4, seed=1)
    write_faces(tmp_path, "val", 4, seed=2)
    out = io.StringIO()
    run(tmp_path, weights, tmp_path / "confusion.png", False, out)
    text = out.getvalue()
    assert text.startswith("3 of 4 faces of ferplus_val.csv: those on which the voters agree\n")
    assert "lower_half   combined " in text


def test_command_without_networks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    write_faces(tmp_path, "val", 4, seed=2)
    done = CliRunner().invoke(
        app, ["evaluate-expression", str(tmp_path), "--weights", str(tmp_path), "--json"]
    )
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"unmask: no expression networks in {tmp_path}")


def test_folder_without_tables_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match=r"ferplus_\*\.csv: no such file") as caught:
        run(tmp_path, weights, tmp_path / "confusion.png", True, io.StringIO())
    assert caught.value.code is Code.CONFIG


class OneFace:
    """Finds the same face in every picture."""

    engine, precision, faces_cut_off = "eager", "fp32", 0

    def read(self, frames: list[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        return [(face(Visible.LOWER), face(Visible.BOTH)) for _ in frames]

    def read_crops(self, crops: list[Image]) -> list[FaceReading]:
        return [face(Visible.BOTH) for _ in crops]


def face(visible: Visible) -> FaceReading:
    return FaceReading(
        detection=Detection((10.0, 10.0, 60.0, 80.0), NO_LANDMARKS, 1.0),
        quality=Quality(1.0, {}, ()),
        logits={"member": 0.5},
        fused=0.5,
        crop=np.zeros((2, 2, 3), np.uint8),
        attention=np.zeros((1, 1), np.float32),
        visible=visible,
    )


def record(*faces: FaceReading) -> dict[str, object]:
    frame = ScoredFrame(
        "studio", "a", 0, 1, 2, 3, 4, 5, 100, 100, False, False, faces=faces, engine="eager", precision="fp32"
    )
    return ScoreRecord(frame, tuple(range(len(faces))), {"member": "1"}, "shipped").as_json()


@pytest.mark.usefixtures("shipped")
def test_scores_tell_expression_and_visible_half() -> None:
    settings = Config(expression=True)
    reader = Closer(OneFace(), looks_of(settings))  # type: ignore[arg-type]
    picture = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    faces = reader.read([(picture, picture)])[0]
    told = record(*faces)
    jsonschema.validate(told, json.loads(SCHEMA_FILE.read_text()))
    found = [one["expression"] for one in told["faces"]]  # type: ignore[attr-defined]
    assert [one["visible"] for one in found] == ["lower", "both"]
    for one in found:
        assert list(one["distribution"]) == list(EXPRESSIONS)
        assert sum(one["distribution"].values()) == pytest.approx(1, abs=1e-3)


def test_schema_refuses_half_a_distribution() -> None:
    wrong = replace(face(Visible.BOTH), expression=Expression(Visible.BOTH, {"neutral": 1.0}))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record(wrong), json.loads(SCHEMA_FILE.read_text()))


def test_off_by_default_and_then_nothing_is_loaded() -> None:
    assert Config().expression is False
    assert yaml.safe_load("expression: off") == {"expression": False}
    script = (
        "import sys; from stream.closer import looks_of; from stream.config import Config; "
        "assert looks_of(Config()) == []; "
        "sys.exit(any(name in sys.modules for name in ('stream.expression', 'detectors.expression')))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0
    assert "expression" not in record(face(Visible.BOTH))["faces"][0]  # type: ignore[index]


def test_on_without_networks_stops_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load = expressions.load_expression
    monkeypatch.setattr("stream.expression.load_expression", lambda wanted: load(tmp_path, wanted))
    with pytest.raises(UnmaskError, match="expression is on: no expression networks") as caught:
        looks_of(Config(expression=True))
    assert caught.value.code is Code.WEIGHTS
