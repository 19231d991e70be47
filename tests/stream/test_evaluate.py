"""Manifests are read strictly, reports count every file, pictures and table are written."""

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stream.config import Config
from stream.errors import UnmaskError
from stream.evaluate import Item, lines, read_manifest, run, summarise, write_report


def result(path: str, probability: float | None, verdict: str = "inconclusive") -> dict[str, Any]:
    interval = None if probability is None else [max(0.0, probability - 0.1), min(1.0, probability + 0.1)]
    return {
        "path": path,
        "verdict": verdict,
        "probability": probability,
        "interval": interval,
        "reasons": ["AMBIGUOUS"] if verdict == "inconclusive" else [],
        "members": {},
        "tracks": [],
    }


ITEMS = [Item(Path(f"{index}.jpg"), index >= 3, f"person {index % 3}") for index in range(6)]
RESULTS = [
    result("0.jpg", 0.1, "authentic"),
    result("1.jpg", 0.6),
    result("2.jpg", 0.97, "manipulated"),
    result("3.jpg", None),
    result("4.jpg", 0.2, "authentic"),
    result("5.jpg", 0.99, "manipulated"),
]


def test_manifest(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text("\ufeffpath,label,identity\na.jpg,real,ada\n/b.mp4,FAKE,\n")
    assert read_manifest(manifest) == [
        Item(tmp_path / "a.jpg", False, "ada"),
        Item(Path("/b.mp4"), True, "/b.mp4"),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no column label and path; line 1 must be path,label"),
        ("path\na.jpg\n", "has no column label; line 1 must be path,label"),
        ("path,label\n", "lists no files"),
        (
            "path,label\na.jpg,real\nb.jpg,manipulated\n",
            "line 3: label is 'manipulated'; it must be real or fake",
        ),
        ("path,label\na.jpg\n", "line 2: label is ''; it must be real or fake"),
        ("path,label\n,real\n", "line 2: path is empty"),
        ('path,label\n"a,real\n', "is not CSV"),
    ],
)
def test_wrong_manifests_are_named(tmp_path: Path, text: str, sentence: str) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text(text)
    with pytest.raises(UnmaskError) as caught:
        read_manifest(manifest)
    assert sentence in str(caught.value)


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="cannot be read: No such file"):
        read_manifest(tmp_path / "none.csv")


def test_report_counts_every_file() -> None:
    report = summarise(ITEMS, RESULTS, 0.9)
    assert (report.files, report.real, report.fake, report.identities) == (6, 3, 3, 3)
    assert (report.without_face, report.unreadable) == (1, 0)
    # Pairs: fake .5 beats .1; fake .2 beats .1; fake .99 beats all three.
    assert report.auc.value == pytest.approx(5 / 9)
    assert report.coverage.value == pytest.approx(4 / 6)
    assert report.recall_of_decided.value == pytest.approx(1 / 2)
    assert report.false_positives_of_decided.value == pytest.approx(1 / 2)
    at = report.confusion
    assert (at.true_positive, at.false_positive, at.true_negative, at.false_negative) == (1, 1, 2, 2)


def test_unreadable_files_are_left_out_and_counted() -> None:
    broken = [*RESULTS[:5], {"path": "5.jpg", "error": "no picture"}]
    report = summarise(ITEMS, broken, 0.9)
    assert (report.files, report.unreadable) == (5, 1)
    with pytest.raises(UnmaskError, match="none of the files"):
        summarise(ITEMS[:1], [{"path": "0.jpg", "error": "no picture"}], 0.9)


def test_one_class_alone_leaves_figures_unknown() -> None:
    report = summarise(ITEMS[:3], RESULTS[:3], 0.9)
    assert report.auc.value is None
    assert report.recall_of_decided.value is None
    assert any("AUC" in line and "unknown" in line for line in lines(report))


def test_report_is_written(tmp_path: Path) -> None:
    broken = [*RESULTS[:5], {"path": "5.jpg", "error": "no picture"}]
    report = summarise(ITEMS, broken, 0.9)
    written = write_report(tmp_path / "out", ITEMS, broken, report)
    names = {path.name for path in written}
    pictures = {"roc.png", "precision_recall.png", "histogram.png", "risk_coverage.png"}
    assert names == {"report.json", "files.csv"} | pictures
    for name in pictures:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "out" / "files.csv").open()))
    assert [row["probability"] for row in rows] == ["0.1", "0.6", "0.97", "", "0.2", ""]
    assert rows[5]["error"] == "no picture"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["unreadable"] == 1


def test_json_is_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = SimpleNamespace(score=lambda paths, crops: RESULTS[: len(paths)])
    monkeypatch.setattr("stream.score.assembled", lambda settings, scratch: scorer)
    manifest = tmp_path / "list.csv"
    rows = [f"{item.path},{'fake' if item.manipulated else 'real'}" for item in ITEMS]
    manifest.write_text("\n".join(["path,label", *rows]))
    out = io.StringIO()
    assert run(Config(), manifest, False, tmp_path / "out", True, out) == 0
    assert json.loads(out.getvalue()) == json.loads((tmp_path / "out" / "report.json").read_text())
