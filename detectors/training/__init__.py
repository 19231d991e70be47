"""Training of members: a recipe and data in, a member's directory with its card out."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from detectors.backbones import FaceNetwork
from detectors.members import load_member
from detectors.training.calibrate import fit_calibration
from detectors.training.card import write_card
from detectors.training.clips import CLIP_CLASSES, load_clips
from detectors.training.data import load_authentic, load_faces, resized
from detectors.training.evaluate import ClipScore, evaluate
from detectors.training.export import export_member, exported_weights, member_facts, weights_file
from detectors.training.expression.drive import train_expression
from detectors.training.expression.recipe import is_expression
from detectors.training.layout import check_clips, check_layout
from detectors.training.loop import fit
from detectors.training.objective import score
from detectors.training.recipe import Mode, load_recipe

logger = logging.getLogger(__name__)


def train(
    recipe_path: Path,
    out_dir: Path,
    data_dir: Path,
    *,
    threads: int = 2,
    device: str = "auto",
    precision: str = "auto",
    hardware: str = "",
    on_progress: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Trains a recipe, or goes on where it was interrupted, then exports, calibrates and measures the member.

    Leaves the member in `out_dir/member/` (weights, member.json, calibration.json, card.md, its learning
    curve) beside what `detectors.training.loop.fit` leaves. Returns the measured figures. A run of mode
    triplet gives no member, but features to train a head on; its record is returned. A recipe with `task:
    expression` is trained by `detectors.training.expression.drive`, below `out_dir`. Raises what `fit`
    raises.
    """
    if is_expression(recipe_path):
        return train_expression(
            recipe_path,
            out_dir,
            data_dir,
            threads=threads,
            device=device,
            precision=precision,
            on_progress=on_progress,
        )
    recipe = load_recipe(recipe_path)
    check_layout(data_dir, recipe.authentic)
    if recipe.mode is not Mode.TRIPLET:
        check_clips(data_dir)
    record = fit(
        recipe_path,
        out_dir,
        data_dir,
        threads=threads,
        device=device,
        precision=precision,
        on_progress=on_progress,
    )
    if recipe.mode is Mode.TRIPLET:
        on_progress(f"features in {weights_file(out_dir, recipe)}: `start` of a recipe of mode head")
        return record
    return finish(recipe_path, out_dir, data_dir, hardware=hardware, on_progress=on_progress)


def finish(
    recipe_path: Path,
    out_dir: Path,
    data_dir: Path,
    *,
    hardware: str = "",
    on_progress: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Exports the averaged weights as they are now, also in the middle of a training; returns the figures."""
    recipe = load_recipe(recipe_path)
    tensors = exported_weights(out_dir, recipe)
    directory, cache = out_dir / "member", out_dir / "cache"
    known = member_facts(recipe)
    (directory / "calibration.json").unlink(missing_ok=True)
    export_member(directory, tensors, recipe, None, known)
    member = load_member(directory)

    on_progress("scoring validation crops, held-out authentic faces and clips")
    faces = load_faces(data_dir, cache, "val")
    logits = score(member.module, resized(faces.images, recipe.crop.size), recipe.crop)
    authentic = {}
    for name in recipe.authentic:
        held_out = load_authentic(data_dir, cache, name, recipe.crop, held_out=True)
        authentic[name] = score(member.module, resized(held_out, recipe.crop.size), recipe.crop)
    clips = {
        label: [
            ClipScore(clip.name, score(member.module, clip.faces, recipe.crop), clip.sampled)
            for clip in load_clips(data_dir / "clips" / label, cache, recipe.crop)
        ]
        for label in CLIP_CLASSES
    }
    tracks = [clip.logits for found in clips.values() for clip in found]
    fitted = fit_calibration(logits, faces.labels, faces.identity, tracks, _calibration_data(len(logits)))
    trained = FaceNetwork(recipe.architecture())
    trained.load_state_dict(tensors)
    unrounded = score(trained.eval(), resized(faces.images, recipe.crop.size), recipe.crop)
    metrics = evaluate(logits, faces, fitted.calibration, authentic, clips) | {
        "calibration": fitted.report,
        "fp16_logit_change": float(np.abs(logits - unrounded).max()),
    }
    export_member(directory, tensors, recipe, fitted.calibration, known | {"metrics": _summary(metrics)})
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_card(directory, recipe, out_dir, member, metrics, hardware)
    on_progress(f"validation AUC {metrics['overall']['auc']:.4f}; member in {directory}")
    return metrics


def _summary(metrics: dict[str, Any]) -> dict[str, Any]:
    overall = metrics["overall"]
    return {
        "val_auc": overall["auc"],
        "val_auc_interval": overall["auc_interval"],
        "val_log_loss": metrics["calibration"]["log_loss_cross_fitted"],
        "false_alarms": metrics["false_alarms"],
    }


def _calibration_data(crops: int) -> str:
    return (
        f"{crops} DFDC validation crops of 104 people, every person and class weighted equally; sigma from "
        "authentic and manipulated clips; one scale for every length"
    )
