"""Expressions in the stream, where the settings want them, and `unmask evaluate-expression`.

A model that judges people's faces is never loaded unasked: only `expression: on` brings this module in
(docs/expression.md, privacy).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from detectors.expression import SHIPPED, ExpressionReader, Method, load_expression
from detectors.readings import FaceReading, Visible
from stream.closer import Faces, Look
from stream.config import Config
from stream.errors import Code, UnmaskError

PICTURE = "confusion.png"


def expression_look(config: Config) -> Look:
    """Load the networks that speak in a stream; what comes back adds the expression to each face.

    Raises `UnmaskError` (WEIGHTS) when there are none, or when they cannot be used.
    """
    try:
        models = load_expression(wanted=_in_streams)
        reader = ExpressionReader(models, 1 if config.deterministic else config.engines.batch)
    except ValueError as error:
        raise UnmaskError(Code.WEIGHTS, f"expression is on: {error}") from error

    def look(faces: Faces) -> list[FaceReading]:
        told = reader.read(faces)
        return [replace(face, expression=found) for (_, face), found in zip(faces, told, strict=True)]

    return look


def _in_streams(visible: Visible, method: Method) -> bool:
    return method is (Method.TEACHER if visible == Visible.BOTH else Method.DISTILLED)


def run(folder: Path, weights: Path | None, picture: Path, as_json: bool, out: TextIO) -> int:
    """Measure every method on the faces of `folder`, in the layout of FER+; write the figures to `out` and
    the confusions to `picture`; return the exit code.

    Raises `UnmaskError` (WEIGHTS) without networks, (CONFIG) for a folder that cannot be read.
    """
    from detectors.training.expression.evaluate import all_scores, draw_confusions, figures
    from detectors.training.expression.ferplus import load_votes, tables
    from detectors.training.expression.runs import agreed_only

    try:
        models = load_expression(weights or SHIPPED)
    except ValueError as error:
        raise UnmaskError(Code.WEIGHTS, str(error)) from error
    try:
        found = tables(folder)
        voted = load_votes(found)
    except ValueError as error:
        raise UnmaskError(Code.CONFIG, str(error)) from error
    images, labels = agreed_only(voted)
    if not len(labels):
        raise UnmaskError(
            Code.CONFIG,
            f"{folder}: the voters agree on none of {len(voted.votes)} faces; nothing to evaluate",
        )
    scores = all_scores(models, images)
    draw_confusions(scores, labels, picture)
    told = {
        view: {method.value: figures(given, labels).to_json() for method, given in by_method.items()}
        for view, by_method in scores.items()
    }
    if as_json:
        out.write(json.dumps(told) + "\n")
        return 0
    names = ", ".join(path.name for path in found)
    out.write(f"{len(labels)} of {len(voted.votes)} faces of {names}: those on which the voters agree\n")
    out.write(f"{'visible':12} {'method':18} {'accuracy':>9} {'macro F1':>9}\n")
    for view, by_name in told.items():
        for name, row in by_name.items():
            out.write(f"{view:12} {name:18} {row['accuracy']:9.4f} {row['macro_f1']:9.4f}\n")
    out.write(f"written: {picture}\n")
    return 0
