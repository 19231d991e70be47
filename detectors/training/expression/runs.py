"""Where runs lie and what finished ones give: networks, the teacher's answers, answers on validation
pictures."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from detectors.expression import ExpressionModel, ExpressionNetwork, Read, joined
from detectors.readings import Visible
from detectors.registry import file_sha256
from detectors.training.expression.ferplus import NONE, Voted, agreed
from detectors.training.expression.loop import WEIGHTS
from detectors.training.expression.recipe import NetworkRecipe

ANSWERS = "val.npz"
TAUGHT = "taught.npz"


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Where the run of a recipe with one seed lies below `--out`."""
    return out / name / f"seed-{seed}"


def trained(out: Path, recipe: NetworkRecipe, seed: int) -> ExpressionModel:
    """The averaged network that a finished run left, on the CPU. Raises OSError."""
    network = ExpressionNetwork(recipe.backbone)
    path = run_folder(out, recipe.name, seed) / WEIGHTS
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return ExpressionModel(recipe.method, recipe.reads, recipe.size, network)


def taught(out: Path, teacher: NetworkRecipe, device: torch.device, train: Voted) -> Read:
    """What a teacher says of every training picture, whole, as it is and mirrored: read once, then kept
    beside the teacher's weights, and read again when those changed."""
    folder = run_folder(out, teacher.name, teacher.seeds[0])
    path, sha256 = folder / TAUGHT, file_sha256(folder / WEIGHTS)
    if path.exists():
        with np.load(path) as kept:
            if str(kept["sha256"]) == sha256 and len(kept["logits"]) == len(train.images):
                return Read(kept["logits"], kept["embeddings"].astype(np.float32))
    model = trained(out, teacher, teacher.seeds[0])
    model.network.to(device)
    read = model.read(train.images)
    _save(
        path,
        {"sha256": np.array(sha256), "logits": read.logits, "embeddings": read.embeddings.astype(np.float16)},
    )
    return read


def embeddings(
    out: Path, parts: tuple[NetworkRecipe, ...], seed: int, images: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Those of several students of one seed side by side, float32 [N, D], of whole faces uint8 [N, 48,
    48]."""
    return joined([trained(out, part, seed).read(images).embeddings for part in parts])


def agreed_only(voted: Voted) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The pictures on which the voters agree, and their labels."""
    labels = agreed(voted.votes)
    return voted.images[labels != NONE], labels[labels != NONE]


def keep_answers(folder: Path, answers: Mapping[Visible, NDArray[np.float32]]) -> None:
    """Keep the scores [N, 8] of the agreed validation pictures, by what could be seen of them."""
    _save(folder / ANSWERS, {str(visible): scores for visible, scores in answers.items()})


def kept_answers(folder: Path) -> dict[Visible, NDArray[np.float32]]:
    """What `keep_answers` kept. Raises OSError."""
    with np.load(folder / ANSWERS) as kept:
        return {Visible(name): kept[name] for name in kept.files}


def _save(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Written beside the file and renamed, so that a kill leaves the old one or the new one, whole."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    part.replace(path)
