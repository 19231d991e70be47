"""How good the verdicts are on files whose truth is known: `unmask evaluate MANIFEST.csv`."""

import csv
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from stream.config import Config
from stream.curves import (
    Confusion,
    Floats,
    Interval,
    Truth,
    area_under_risk,
    auc,
    average_precision,
    bootstrap,
    confusion,
    equal_error_rate,
    has_both,
    log_loss,
    precision_recall_curve,
    risk_coverage_curve,
    roc_curve,
    share,
)
from stream.errors import Code, UnmaskError

LABELS: Mapping[str, bool] = {"real": False, "fake": True}

UNDECIDED = 0.5
"""Probability that a file without a face counts with: the detector knows nothing of it."""

SEED = 41
"""The same manifest and scores give the same intervals."""

HISTOGRAM_BINS = 20


@dataclass(frozen=True, slots=True)
class Item:
    """One file of a manifest. `identity` groups files of one person for the bootstrap; its path if none."""

    path: Path
    manipulated: bool
    identity: str


@dataclass(frozen=True, slots=True)
class Report:
    """What an evaluation found. Rates are None when nothing of that class is there."""

    files: int
    real: int
    fake: int
    identities: int
    without_face: int
    unreadable: int
    auc: Interval
    average_precision: Interval
    log_loss: Interval
    equal_error_rate: Interval
    operating_point: float
    confusion: Confusion
    coverage: Interval
    recall_of_decided: Interval
    false_positives_of_decided: Interval
    aurc: Interval


def read_manifest(path: Path) -> list[Item]:
    """Read `path,label[,identity]` rows; paths are relative to the manifest.

    Raises `UnmaskError` (CONFIG) naming line, column and what would be right.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _items(csv.DictReader(file, strict=True), path)
    except OSError as error:
        raise UnmaskError(Code.CONFIG, f"manifest {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UnmaskError(Code.CONFIG, f"manifest {path} is not CSV in UTF-8: {error}") from None


def _items(rows: "csv.DictReader[str]", path: Path) -> list[Item]:
    missing = {"path", "label"} - set(rows.fieldnames or ())
    if missing:
        raise UnmaskError(
            Code.CONFIG,
            f"manifest {path} has no column {' and '.join(sorted(missing))}; line 1 must be path,label",
        )
    items = [_item(row, path, rows.line_num) for row in rows]
    if not items:
        raise UnmaskError(Code.CONFIG, f"manifest {path} lists no files; each line must be path,label")
    return items


def _item(row: Mapping[str, str | None], manifest: Path, line: int) -> Item:
    name, label = (row["path"] or "").strip(), (row["label"] or "").strip().lower()
    if not name:
        raise UnmaskError(Code.CONFIG, f"manifest {manifest} line {line}: path is empty; it must name a file")
    if label not in LABELS:
        raise UnmaskError(
            Code.CONFIG, f"manifest {manifest} line {line}: label is {label!r}; it must be real or fake"
        )
    identity = (row.get("identity") or "").strip()
    return Item(manifest.parent / name, LABELS[label], identity or name)


def summarise(items: Sequence[Item], results: Sequence[Mapping[str, Any]], operating_point: float) -> Report:
    """Return the figures for `results` (objects of `unmask score`, one per item, in order).

    Results with "error" are left out and counted; a null probability counts as .5.
    """
    read = [(item, result) for item, result in zip(items, results, strict=True) if "error" not in result]
    if not read:
        raise UnmaskError(
            Code.SOURCE_INVALID, "none of the files in the manifest could be read; nothing to evaluate"
        )
    truth = np.array([item.manipulated for item, _ in read], dtype=np.bool_)
    scores = np.array([_probability(result) for _, result in read], dtype=np.float64)
    verdicts = np.array([result["verdict"] for _, result in read])
    decided, accused = verdicts != "inconclusive", verdicts == "manipulated"
    groups = [item.identity for item, _ in read]
    rng = np.random.default_rng(SEED)

    def interval(figure: Callable[[NDArray[np.intp]], float | None]) -> Interval:
        return bootstrap(figure, groups, rng)

    return Report(
        files=len(read),
        real=int(np.sum(~truth)),
        fake=int(np.sum(truth)),
        identities=len(set(groups)),
        without_face=sum(result["probability"] is None for _, result in read),
        unreadable=len(items) - len(read),
        auc=interval(lambda index: auc(truth[index], scores[index])),
        average_precision=interval(lambda index: average_precision(truth[index], scores[index])),
        log_loss=interval(lambda index: log_loss(truth[index], scores[index])),
        equal_error_rate=interval(lambda index: equal_error_rate(truth[index], scores[index])),
        operating_point=operating_point,
        confusion=confusion(truth, scores >= operating_point),
        coverage=share(decided, np.ones_like(decided), groups, rng),
        recall_of_decided=share(accused, decided & truth, groups, rng),
        false_positives_of_decided=share(accused, decided & ~truth, groups, rng),
        aurc=interval(lambda index: area_under_risk(truth[index], scores[index])),
    )


def _probability(result: Mapping[str, Any]) -> float:
    value = result["probability"]
    return UNDECIDED if value is None else float(value)


def write_report(
    folder: Path, items: Sequence[Item], results: Sequence[Mapping[str, Any]], report: Report
) -> list[Path]:
    """Write report.json, files.csv, roc.png, precision_recall.png, histogram.png and risk_coverage.png."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = folder / "report.json"
    summary.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    table = folder / "files.csv"
    _write_files(table, items, results)
    read = [(item, result) for item, result in zip(items, results, strict=True) if "error" not in result]
    truth = np.array([item.manipulated for item, _ in read], dtype=np.bool_)
    scores = np.array([_probability(result) for _, result in read], dtype=np.float64)
    return [summary, table, *_draw(folder, truth, scores, report)]


def _write_files(path: Path, items: Sequence[Item], results: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["path", "label", "identity", "verdict", "probability", "low", "high", "reasons", "error"]
        )
        for item, result in zip(items, results, strict=True):
            low, high = result.get("interval") or (None, None)
            writer.writerow(
                [
                    item.path,
                    "fake" if item.manipulated else "real",
                    item.identity,
                    result.get("verdict"),
                    result.get("probability"),
                    low,
                    high,
                    " ".join(result.get("reasons", ())),
                    result.get("error"),
                ]
            )


def _draw(folder: Path, truth: Truth, scores: Floats, report: Report) -> list[Path]:
    from matplotlib.figure import Figure

    def picture(name: str, across: str, up: str, title: str, draw: Callable[[Any], None]) -> Path:
        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.add_subplot(xlabel=across, ylabel=up, title=title)
        draw(axes)
        path = folder / name
        figure.savefig(path, dpi=120)
        return path

    paths = [
        picture(
            "histogram.png",
            "probability",
            "files",
            "Scores by truth",
            lambda axes: _histogram(axes, truth, scores),
        ),
        picture(
            "risk_coverage.png",
            "coverage",
            "share of errors",
            "Risk when only the surest are decided",
            lambda axes: axes.step(*risk_coverage_curve(truth, scores), where="post"),
        ),
    ]
    if not has_both(truth):
        return paths
    false_rate, true_rate, _ = roc_curve(truth, scores)
    precision, recall = precision_recall_curve(truth, scores)
    title = f"AUC {_shown(report.auc)}"
    return [
        *paths,
        picture(
            "roc.png",
            "false positive rate",
            "true positive rate",
            title,
            lambda axes: _roc(axes, false_rate, true_rate),
        ),
        picture(
            "precision_recall.png",
            "recall",
            "precision",
            f"Average precision {_shown(report.average_precision)}",
            lambda axes: axes.plot(recall, precision),
        ),
    ]


def _histogram(axes: Any, truth: Truth, scores: Floats) -> None:
    bins = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    axes.hist(scores[~truth], bins, alpha=0.6, label="real", color="tab:blue")
    axes.hist(scores[truth], bins, alpha=0.6, label="fake", color="tab:red")
    axes.legend()


def _roc(axes: Any, false_rate: Floats, true_rate: Floats) -> None:
    axes.plot(false_rate, true_rate)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")


def _shown(figure: Interval) -> str:
    if figure.value is None:
        return "unknown"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.4f}"
    return f"{figure.value:.4f} ({figure.low:.4f} to {figure.high:.4f})"


def lines(report: Report) -> list[str]:
    """Return the report as lines for a person."""
    at = report.confusion
    named = [
        ("AUC", report.auc),
        ("average precision", report.average_precision),
        ("LogLoss", report.log_loss),
        ("equal error rate", report.equal_error_rate),
        ("coverage (share decided)", report.coverage),
        ("recall among the decided", report.recall_of_decided),
        ("false positives among the decided", report.false_positives_of_decided),
        ("area under risk-coverage", report.aurc),
    ]
    return [
        f"{report.files} files: {report.real} real, {report.fake} fake; "
        f"{report.identities} independent groups",
        f"{report.without_face} without a face (counted as probability .5), "
        f"{report.unreadable} unreadable (left out)",
        *(f"{name:34} {_shown(figure)}" for name, figure in named),
        f"at probability >= {report.operating_point:g}: "
        f"{at.true_positive} true and {at.false_positive} false alarms, "
        f"{at.true_negative} rightly and {at.false_negative} wrongly left alone",
    ]


def run(settings: Config, manifest: Path, crops: bool, folder: Path, as_json: bool, out: TextIO) -> int:
    """Score the files of `manifest`, write the report into `folder` and to `out`; return the exit code.

    The operating point is the probability at which a stream's incident opens.
    """
    items = read_manifest(manifest)
    from stream.score import OK, SOME_FAILED, assembled

    with tempfile.TemporaryDirectory(prefix="unmask-evaluate-") as scratch:
        results = list(assembled(settings, Path(scratch)).score([item.path for item in items], crops))
    report = summarise(items, results, settings.verdict.open_probability)
    written = write_report(folder, items, results, report)
    _tell(report, written, results, as_json, out)
    return SOME_FAILED if report.unreadable else OK


def _tell(
    report: Report, written: Sequence[Path], results: Iterable[Mapping[str, Any]], as_json: bool, out: TextIO
) -> None:
    if as_json:
        out.write(json.dumps(asdict(report)) + "\n")
        return
    for line in [*lines(report), "written: " + ", ".join(str(path) for path in written)]:
        out.write(line + "\n")
    for result in results:
        if "error" in result:
            out.write(f"not scored: {result['path']} {result['error']}\n")
