"""Writes a member's directory: fp16 weights, what they are, how they are calibrated."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from detectors.calibration import Calibration
from detectors.members import SCHEMA
from detectors.registry import file_sha256
from detectors.training.data import DFDC
from detectors.training.recipe import Mode, Recipe, Schedule

TESTED_FOR = ("face swaps of the DFDC kinds",)
NOT_TESTED_FOR = (
    "face swaps of other tools, live ones among them",
    "reenactment and lip sync",
    "wholly generated faces",
    "retouching",
)
"""What alerts say of members validated on DFDC crops alone; strangers are made by us, by no tool."""


def export_member(
    directory: Path,
    tensors: dict[str, Tensor],
    recipe: Recipe,
    calibration: Calibration | None,
    facts: dict[str, Any],
) -> None:
    """Writes `weights.safetensors`, `member.json` and, when given, `calibration.json` into `directory`.

    Weights of two dimensions and more become fp16, which the loader widens again; norms, biases and counters
    keep their type: they are 3 % of the bytes and half of the rounding error. `facts` are
    the fields of `member.json` that a recipe does not know: licence, training data, metrics.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / "weights.safetensors"
    save_file({name: halved(tensor) for name, tensor in tensors.items()}, weights)
    weights.chmod(0o644)  # safetensors writes for the owner alone; an installed package is read by others
    size = recipe.crop.size
    record = {
        "schema": SCHEMA,
        "name": recipe.name,
        "version": recipe.version,
        "architecture": recipe.architecture().to_json(),
        "crop": recipe.crop.to_json(),
        "input": f"float32 [N, 3, {size}, {size}], RGB in 0..1 normalised by crop.mean and crop.std",
        "output": "logit float32 [N], above 0 means manipulated; attention float32 [N, h, w] in 0..1",
        "sha256": file_sha256(weights),
        "card": f"docs/models/{recipe.name}.md",
    }
    (directory / "member.json").write_text(json.dumps(record | facts, indent=2) + "\n")
    if calibration is not None:
        (directory / "calibration.json").write_text(json.dumps(calibration.to_json(), indent=2) + "\n")


def member_facts(recipe: Recipe) -> dict[str, Any]:
    """What a member's file says beside its architecture."""
    return {
        "licence": "Apache-2.0",
        "training_data": _training_data(recipe),
        "tested_for": list(TESTED_FOR),
        "not_tested_for": list(NOT_TESTED_FOR),
    }


def _training_data(recipe: Recipe) -> str:
    if recipe.mode is Mode.AVERAGE:
        return f"that of the runs whose weights it is the mean of: {', '.join(recipe.average)}"
    kinds = ", ".join(f"{count} {name}" for name, count in recipe.pairs.items())
    supervised = "manipulated ones of DFDC" if DFDC in recipe.pairs else "no manipulated face of any data set"
    return f"pairs a batch: {kinds}; authentic faces of {', '.join(recipe.sources) or DFDC}; {supervised}"


def exported_weights(out_dir: Path, recipe: Recipe) -> dict[str, Tensor]:
    """The weights of `weights_file`, mixed with the early ones once there are any and the recipe wants that.

    After Wortsman et al., "Robust fine-tuning of zero-shot models": on one path of training, weights
    between an early and a late point keep the accuracy of the late one and more of the early one's outside
    of its data.
    """
    last: dict[str, Tensor] = torch.load(weights_file(out_dir, recipe), map_location="cpu", weights_only=True)
    path, share = out_dir / "early.pt", recipe.early_share
    if not (share and path.exists()):
        return last
    early: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return {
        name: torch.lerp(tensor, early[name], share) if tensor.is_floating_point() else tensor
        for name, tensor in last.items()
    }


def weights_file(out_dir: Path, recipe: Recipe) -> Path:
    """Where a training left the weights that count: by the schedule the best ones, or the last average."""
    return out_dir / ("best.pt" if recipe.schedule is Schedule.PLATEAU else "average.pt")


def halved(tensor: Tensor) -> Tensor:
    """A tensor of weights in fp16, other tensors as they are; ValueError for what fp16 cannot hold."""
    if not tensor.is_floating_point() or tensor.ndim < 2:
        return tensor.contiguous()
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} holds values beyond fp16's range")
    return half.contiguous()
