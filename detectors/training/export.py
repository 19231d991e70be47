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
from detectors.training.recipe import Recipe


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
    save_file({name: _half(tensor) for name, tensor in tensors.items()}, weights)
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


def _half(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.ndim < 2:
        return tensor.contiguous()
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} holds values beyond fp16's range")
    return half.contiguous()
