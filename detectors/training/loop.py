"""The training loop: batches in, checkpoints, a learning curve and the weights to export out."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detectors.backbones import FaceNetwork
from detectors.training.average import Average, average_of
from detectors.training.curve import learning_curve, write_csv
from detectors.training.data import (
    DFDC,
    Batch,
    DataError,
    Faces,
    Material,
    load_faces,
    load_material,
    pair_batches,
)
from detectors.training.hardware import Hardware, choose_hardware, keep_freed_memory, make_deterministic
from detectors.training.layout import check_layout, check_strangers
from detectors.training.objective import Inputs, Objective
from detectors.training.pace import Pace, Progress
from detectors.training.prefetch import prefetched
from detectors.training.recipe import Mode, Optimizer, Recipe, Schedule, load_recipe
from detectors.training.sam import at_the_worst_nearby, frozen_statistics
from detectors.training.schedule import Plateau, one_cycle
from detectors.training.start import begin

logger = logging.getLogger(__name__)

GRADIENT_CLIP = 5.0
SGD_MOMENTUM = 0.9
"""Shiohara and Yamasaki, "Detecting Deepfakes with Self-Blended Images"."""
FORMAT = 2


def fit(
    recipe_path: Path,
    out_dir: Path,
    data_dir: Path,
    *,
    threads: int = 2,
    device: str = "auto",
    precision: str = "auto",
    clock: Callable[[], float] = time.monotonic,
    on_progress: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Trains a recipe, or goes on from `out_dir/checkpoint.pt`; returns the final record.

    Leaves in `out_dir`: `checkpoint.pt`; the weights as state dicts, `average.pt` (the averaged ones, last),
    `early.pt` (at `early_epoch`), `best.pt` (at the lowest validation loss, schedule plateau); `record.csv`
    (one row a validation), `record.json`, `curve.png`. Equal seeds give equal batches at equal steps whatever
    was interrupted, and on one machine equal weights to the bit; with `budget_minutes` the schedule also
    depends on the machine's speed, and the record holds what it was. Raises RecipeError, DataError,
    HardwareError, StartError, TeacherError, AverageError, or ValueError when the checkpoint belongs to
    another recipe.
    """
    recipe = load_recipe(recipe_path)
    hardware = choose_hardware(device, precision)
    check_layout(data_dir, recipe.authentic)
    out_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    keep_freed_memory()
    make_deterministic()
    check = load_faces(data_dir, out_dir / "cache", "val")
    if recipe.mode is Mode.AVERAGE:
        return _average(recipe, out_dir, check, hardware, on_progress)
    material = load_material(
        data_dir,
        out_dir / "cache",
        tuple(recipe.sources),
        eigenfaces=set(recipe.pairs) != {DFDC},
        min_width=recipe.min_width,
    )
    check_strangers(material.faces, check)
    return _Run(recipe, out_dir, material, check, hardware, threads, clock, on_progress).finish()


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        out_dir: Path,
        material: Material,
        check: Faces,
        hardware: Hardware,
        threads: int,
        clock: Callable[[], float],
        on_progress: Callable[[str], None],
    ) -> None:
        self.recipe, self.out_dir, self.material, self.mix = recipe, out_dir, material, recipe.mix()
        self.hardware, self.threads = hardware, threads
        self.on_progress = on_progress
        known = len(material.faces.pairs())
        self.per_epoch = known // self.mix.pairs
        if not self.per_epoch:
            raise DataError(f"train: {known} pairs, expected at least {self.mix.pairs} for one batch")
        plateau = recipe.schedule is Schedule.PLATEAU
        self.steps = recipe.iterations if plateau else math.ceil(self.per_epoch * recipe.epochs)
        self.validate_every = recipe.validate_every if plateau else self.per_epoch
        torch.manual_seed(recipe.seed)
        self.network = FaceNetwork(recipe.architecture())
        begin(self.network, recipe.start)
        self.network.to(hardware.device).to(memory_format=torch.channels_last)
        self.judged = FaceNetwork(recipe.architecture())
        self.judged.to(hardware.device).to(memory_format=torch.channels_last).eval()
        self.objective = Objective(recipe, self.network, check, hardware)
        self.average = Average(self.network, recipe.ema_decay)
        self.optimizer = _optimizer(self.objective.trained(), recipe)
        self.scaler = hardware.scaler()
        self.plateau = Plateau(recipe.learning_rate) if plateau else None
        self.crops = len(check.labels)
        self.pace = Pace(self.steps, recipe.budget_minutes, self.validate_every, clock)
        self._resume()

    @property
    def progress(self) -> Progress:
        return self.pace.progress

    def finish(self) -> dict[str, Any]:
        batches = self._batches()
        self.pace.run(self._done, lambda: self._step(next(batches)), self._validate, self._save, self._log)
        return self._record()

    def _batches(self) -> Iterator[Batch]:
        def make(step: int) -> Batch:
            return next(
                pair_batches(
                    self.material, self.mix, seed=self.recipe.seed, size=self.recipe.crop.size, step=step
                )
            )

        loaders = 1 if self.hardware.device.type == "cpu" else self.threads
        return prefetched(make, self.progress.step, loaders)

    def _done(self) -> bool:
        if self.pace.share() >= 1:
            return True
        if self.plateau is None:
            return False
        patience = self.recipe.patience
        return self.plateau.exhausted or (patience is not None and self.plateau.stale >= patience)

    def _rate(self) -> float:
        if self.plateau is not None:
            return self.plateau.rate
        return self.recipe.learning_rate * one_cycle(self.pace.share(), self.recipe.warmup)

    def _step(self, batch: Batch) -> float:
        state, trained = self.progress, self.objective.trained()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.zero_grad(set_to_none=True)
        inputs = self.objective.prepare(batch, state.step)
        value = self._backward(inputs)
        if self.recipe.sam_rho:
            with (
                at_the_worst_nearby(trained.parameters(), self.recipe.sam_rho),
                frozen_statistics(self.network),
            ):
                self._backward(inputs)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(trained.parameters(), GRADIENT_CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update(self.network, state.step)
        state.learned(value)
        return value

    def _backward(self, inputs: Inputs) -> float:
        loss = self.objective.loss(inputs)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _validate(self) -> None:
        state = self.progress
        rate, train_loss = self._rate(), state.mean_loss()
        self.judged.load_state_dict(self.average.tensors)
        row = {
            "step": state.step,
            "epoch": state.step / self.per_epoch,
            "minutes": state.elapsed_s / 60,
            "schedule": self.pace.share(),
            "learning_rate": rate,
            "train_loss": train_loss,
        } | self.objective.validate(self.judged)
        state.history.append(row)
        replace_file(self.out_dir / "average.pt", self.average.tensors)
        if state.step == self.recipe.early_epoch * self.per_epoch:
            replace_file(self.out_dir / "early.pt", self.average.tensors)
        if self.plateau is not None and self.plateau.validated(row["val_loss"]):
            replace_file(self.out_dir / "best.pt", self.average.tensors)
        _report(self.out_dir, self._record())
        self.on_progress(
            f"epoch {row['epoch']:.2f}: val AUC {row['val_auc']:.4f}, val loss {row['val_loss']:.4f}, "
            f"train loss {train_loss:.4f}, {row['minutes']:.0f} min"
        )

    def _record(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_json(),
            "hardware": str(self.hardware),
            "crops": {"train": len(self.material.faces.labels), "val": self.crops},
            "authentic": {name: len(source.points) for name, source in self.material.sources.items()},
            "steps": self.progress.step,
            "planned_steps": self.steps,
            "minutes": self.progress.elapsed_s / 60,
            "history": self.progress.history,
        }

    def _log(self, steps_per_s: float, loss: float) -> None:
        self.on_progress(
            f"step {self.progress.step}/{self.steps} ({100 * self.pace.share():.1f} % of the schedule), "
            f"loss {loss:.4f}, {steps_per_s * 2 * self.mix.pairs:.1f} crops/s, "
            f"{'at most ' if self.plateau else ''}{self.pace.minutes_left(steps_per_s):.0f} min left"
        )

    def _save(self) -> None:
        mask_head = self.objective.mask_head
        replace_file(
            self.out_dir / "checkpoint.pt",
            {
                "format": FORMAT,
                "recipe": json.dumps(self.recipe.to_json()),
                "network": self.network.state_dict(),
                "mask_head": mask_head and mask_head.state_dict(),
                "average": self.average.tensors,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "plateau": self.plateau and asdict(self.plateau),
                "progress": asdict(self.progress),
            },
        )

    def _resume(self) -> None:
        path = self.out_dir / "checkpoint.pt"
        if not path.exists():
            return
        saved = torch.load(path, map_location=self.hardware.device, weights_only=True)
        if saved["format"] != FORMAT or saved["recipe"] != json.dumps(self.recipe.to_json()):
            raise ValueError(f"{path}: made by another recipe; choose another --out or remove it")
        self.network.load_state_dict(saved["network"])
        if self.objective.mask_head is not None:
            self.objective.mask_head.load_state_dict(saved["mask_head"])
        self.average.tensors = saved["average"]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        if saved["plateau"] is not None:
            self.plateau = Plateau(**saved["plateau"])
        self.pace.progress = Progress(**saved["progress"])
        self.on_progress(f"going on from step {self.progress.step}")


def _average(
    recipe: Recipe, out_dir: Path, check: Faces, hardware: Hardware, on_progress: Callable[[str], None]
) -> dict[str, Any]:
    """Mode average: no step is taken; the mean is validated and left as `average.pt`."""
    tensors = average_of([Path(path) for path in recipe.average])
    network = FaceNetwork(recipe.architecture())
    network.load_state_dict(tensors)
    network.to(device=hardware.device).eval()
    found = Objective(recipe, network, check, hardware).validate(network)
    replace_file(out_dir / "average.pt", tensors)
    row = {"step": 0, "epoch": 0.0, "minutes": 0.0, "train_loss": math.nan} | found
    record = {
        "recipe": recipe.to_json(),
        "hardware": str(hardware),
        "crops": {"train": 0, "val": len(check.labels)},
        "authentic": {},
        "steps": 0,
        "planned_steps": 0,
        "minutes": 0.0,
        "history": [row],
    }
    _report(out_dir, record)
    on_progress(f"mean of {len(recipe.average)} runs: val AUC {found['val_auc']:.4f}")
    return record


def _optimizer(trained: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = decayed(trained, recipe.weight_decay)
    if recipe.optimizer is Optimizer.SGD:
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=SGD_MOMENTUM)
    if recipe.optimizer is Optimizer.ADAM:
        return torch.optim.Adam(groups, lr=recipe.learning_rate)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def decayed(trained: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for an optimiser: no weight decay on biases and norms."""
    return [
        {"params": [p for p in trained.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _report(out_dir: Path, record: dict[str, Any]) -> None:
    write_csv(out_dir / "record.csv", record["history"])
    (out_dir / "record.json").write_text(json.dumps(record, indent=2))
    learning_curve(record["history"], out_dir / "curve.png")


def replace_file(path: Path, content: object) -> None:
    """Writes beside the file and renames, so that a kill leaves the old one or the new one, whole."""
    part = path.with_suffix(".part")
    torch.save(content, part)
    part.replace(path)
