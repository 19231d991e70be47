"""The training of one expression network: checkpoints, a learning curve and averaged weights out."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import nn

from detectors.expression import ExpressionNetwork, Read, arranged, read_faces
from detectors.training.average import Average
from detectors.training.curve import learning_curve, write_csv
from detectors.training.expression.augment import augmented, batch_rows
from detectors.training.expression.ferplus import NONE, Voted, agreed, distributions
from detectors.training.expression.objective import Told, objective
from detectors.training.expression.recipe import Labels, NetworkRecipe
from detectors.training.hardware import Hardware
from detectors.training.loop import GRADIENT_CLIP, decayed, replace_file
from detectors.training.pace import Pace, Progress
from detectors.training.schedule import one_cycle

FORMAT = 1
VALIDATE_EPOCHS = 2
"""Reading the validation pictures takes a twentieth of an epoch's time."""
RECORD, WEIGHTS, CHECKPOINT = "record.json", "average.pt", "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a network is trained on and watched with. `told` is in the order of `train`."""

    train: Voted
    told: Told
    check: Voted


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder came to its end."""
    path = folder / RECORD
    return path.exists() and bool(json.loads(path.read_text()).get("finished"))


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a run's record whole."""
    part = folder / f"{RECORD}.part"
    part.write_text(json.dumps(record, indent=2) + "\n")
    part.replace(folder / RECORD)


def check_recipe(folder: Path, recipe: BaseModel) -> None:
    """Raises ValueError when what lies in a folder was made by another recipe."""
    path = folder / RECORD
    if path.exists() and json.loads(path.read_text())["recipe"] != recipe.model_dump(mode="json"):
        raise ValueError(f"{path}: made by another recipe; choose another --out or remove {folder}")


def lesson(recipe: NetworkRecipe, train: Voted, check: Voted, taught: Read | None) -> Lesson:
    """The pictures that a recipe can learn from, and what is told of them: with `majority` those on which the
    voters agree, else all that show an expression rather than something unknown or no face.

    `taught`: what the teacher says of all of `train`.
    """
    shares, labels = distributions(train.votes), agreed(train.votes)
    kept = labels != NONE if recipe.labels is Labels.MAJORITY else shares.sum(1) > 0
    if taught is None:
        return Lesson(train.of(kept), Told(shares[kept], labels[kept]), check)
    told = Told(shares[kept], labels[kept], taught.logits[kept], taught.embeddings[kept])
    return Lesson(train.of(kept), told, check)


def fit(
    recipe: NetworkRecipe,
    seed: int,
    folder: Path,
    lesson: Lesson,
    network: ExpressionNetwork,
    hardware: Hardware,
    *,
    clock: Callable[[], float] = time.monotonic,
    on_progress: Callable[[str], None],
    at_end: Callable[[], None] = lambda: None,
) -> None:
    """Train `network` from the weights it has, or from the folder's checkpoint; does nothing where the run is
    finished.

    Leaves `average.pt`, `checkpoint.pt`, `record.json`, `record.csv` and `curve.png`. `at_end` is called once
    the last weights are written, before the run counts as finished. Equal seeds give equal batches at equal
    steps whatever was interrupted, and on one machine equal weights to the bit; with `budget_minutes` the
    clock has a say in the schedule. Raises ValueError where the folder holds the run of another recipe,
    FloatingPointError when the loss is no number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_recipe(folder, recipe)
    if not is_finished(folder):
        _Run(recipe, seed, folder, lesson, network, hardware, clock, on_progress).finish(at_end)


class _Run:
    def __init__(
        self,
        recipe: NetworkRecipe,
        seed: int,
        folder: Path,
        lesson: Lesson,
        network: ExpressionNetwork,
        hardware: Hardware,
        clock: Callable[[], float],
        on_progress: Callable[[str], None],
    ) -> None:
        self.recipe, self.seed, self.folder, self.lesson = recipe, seed, folder, lesson
        self.hardware, self.on_progress = hardware, on_progress
        self.count = len(lesson.train.images)
        self.per_epoch = self.count // recipe.batch
        if not self.per_epoch:
            raise ValueError(
                f"{self.count} training pictures, expected at least {recipe.batch} for one batch"
            )
        self.steps = math.ceil(self.per_epoch * recipe.epochs)
        self.network = network.to(hardware.device).to(memory_format=torch.channels_last)
        self.judged = ExpressionNetwork(recipe.backbone)
        self.judged.to(hardware.device).to(memory_format=torch.channels_last).eval()
        self.average = Average(self.network, recipe.ema_decay)
        self.optimizer = torch.optim.AdamW(decayed(network, recipe.weight_decay), lr=recipe.learning_rate)
        self.scaler = hardware.scaler()
        self.pace = Pace(self.steps, recipe.budget_minutes, VALIDATE_EPOCHS * self.per_epoch, clock)
        self._resume()

    @property
    def progress(self) -> Progress:
        return self.pace.progress

    def finish(self, at_end: Callable[[], None]) -> None:
        self.pace.run(lambda: self.pace.share() >= 1, self._step, self._validate, self._save, self._log)
        at_end()
        self._report(finished=True)
        (self.folder / CHECKPOINT).unlink(missing_ok=True)

    def _size(self) -> int:
        sizes = self.recipe.sizes
        return sizes[min(int(self.pace.share() * len(sizes)), len(sizes) - 1)]

    def _rate(self) -> float:
        return self.recipe.learning_rate * one_cycle(self.pace.share(), self.recipe.warmup)

    def _step(self) -> float:
        recipe, state = self.recipe, self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        rows = batch_rows(self.count, recipe.batch, self.seed, state.step)
        seed = self.seed * 1_000_003 + state.step
        grey = augmented(self.lesson.train.images[rows], self._size(), torch.Generator().manual_seed(seed))
        inputs = arranged(grey.to(self.hardware.device, non_blocking=True), recipe.reads, recipe.reads)
        torch.manual_seed(seed)
        self.network.train()
        with self.hardware.autocast():
            logits, embeddings = self.network(inputs)
        loss = objective(recipe, logits, embeddings, rows, self.lesson.told, seed)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update(self.network, state.step)
        value = float(loss.detach())
        state.learned(value)
        return value

    def _validate(self) -> None:
        state = self.progress
        self.judged.load_state_dict(self.average.tensors)
        found = validated(self.judged, self.recipe, self.lesson.check)
        row = {
            "step": state.step,
            "epoch": state.step / self.per_epoch,
            "minutes": state.elapsed_s / 60,
            "schedule": self.pace.share(),
            "size": self._size(),
            "learning_rate": self._rate(),
            "train_loss": state.mean_loss(),
        } | found
        state.history.append(row)
        replace_file(self.folder / WEIGHTS, self.average.tensors)
        self._report(finished=False)
        self.on_progress(
            f"{self._name()}: epoch {row['epoch']:.1f}: val accuracy {row['val_accuracy']:.4f}, val loss "
            f"{row['val_loss']:.4f}, train loss {row['train_loss']:.4f}, {row['minutes']:.0f} min"
        )

    def _report(self, finished: bool) -> None:
        history = self.progress.history
        record = {
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.seed,
            "finished": finished,
            "hardware": str(self.hardware),
            "pictures": {"train": self.count, "val": len(self.lesson.check.images)},
            "steps": self.progress.step,
            "planned_steps": self.steps,
            "minutes": self.progress.elapsed_s / 60,
            "history": history,
        }
        write_csv(self.folder / "record.csv", history)
        learning_curve(history, self.folder / "curve.png", "accuracy", lowest=0.0)
        write_record(self.folder, record)

    def _name(self) -> str:
        return f"{self.recipe.name} seed {self.seed}"

    def _log(self, steps_per_s: float, loss: float) -> None:
        left = self.pace.minutes_left(steps_per_s)
        self.on_progress(
            f"{self._name()}: step {self.progress.step}/{self.steps} "
            f"({100 * self.pace.share():.1f} % of the schedule), loss {loss:.4f}, "
            f"{steps_per_s * self.recipe.batch:.0f} faces/s, {left:.0f} min left"
        )

    def _save(self) -> None:
        replace_file(
            self.folder / CHECKPOINT,
            {
                "format": FORMAT,
                "recipe": self.recipe.model_dump_json(),
                "network": self.network.state_dict(),
                "average": self.average.tensors,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": asdict(self.progress),
            },
        )

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        saved = torch.load(path, map_location=self.hardware.device, weights_only=True)
        if saved["format"] != FORMAT or saved["recipe"] != self.recipe.model_dump_json():
            raise ValueError(f"{path}: made by another recipe; choose another --out or remove {self.folder}")
        self.network.load_state_dict(saved["network"])
        self.average.tensors = saved["average"]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.pace.progress = Progress(**saved["progress"])
        self.on_progress(f"{self._name()}: going on from step {self.progress.step}")


def validated(network: ExpressionNetwork, recipe: NetworkRecipe, check: Voted) -> dict[str, float]:
    """`val_loss` (cross-entropy with the votes) and `val_accuracy` of a network in evaluation mode, over the
    pictures on which the voters agree, not mirrored."""
    labels = agreed(check.votes)
    chosen = labels != NONE
    logits = read_faces(network, check.images[chosen], recipe.size, recipe.reads, mirrored=False).logits
    wanted = torch.from_numpy(distributions(check.votes[chosen]))
    loss = -(wanted * torch.log_softmax(torch.from_numpy(logits), 1)).sum(1).mean()
    return {"val_loss": float(loss), "val_accuracy": accuracy(logits, labels[chosen])}


def accuracy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Share of rows of logits [N, 8] whose largest is the label's."""
    return float((logits.argmax(1) == labels).mean())
