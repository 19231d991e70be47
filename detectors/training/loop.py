"""The training loop: pairs in, checkpoints, a learning curve and the averaged weights out."""

import csv
import ctypes
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from detectors.backbones import FaceNetwork
from detectors.crops import CropPolicy, to_tensor
from detectors.members import load_member
from detectors.training.data import (
    DFDC,
    Batch,
    DataError,
    Faces,
    Material,
    load_faces,
    load_material,
    pair_batches,
    resized,
)
from detectors.training.heads import MaskHead
from detectors.training.imagenet import load_imagenet
from detectors.training.losses import mask_loss
from detectors.training.metrics import auc, log_loss
from detectors.training.recipe import Recipe, load_recipe

logger = logging.getLogger(__name__)

CHECKPOINT_S = 180.0
"""A kill costs at most three minutes; a checkpoint of 50 MB takes a tenth of a second."""
LOG_S = 20.0
PREFETCH = 4
"""Batches prepared ahead by the one loader thread, which owns this queue."""
GRADIENT_CLIP = 5.0
FORMAT = 1


@dataclass
class _Progress:
    """What a checkpoint remembers besides the tensors."""

    step: int = 0
    elapsed_s: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class _Average:
    """Exponential moving average of every floating-point tensor of a network, norms' statistics included."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    def update(self, network: nn.Module, step: int) -> None:
        """Early on the average is short (Polyak warm-up), so that the starting weights are forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor.detach(), 1 - decay)
            else:
                self.tensors[name].copy_(tensor)


def fit(
    recipe_path: Path,
    out_dir: Path,
    data_dir: Path,
    *,
    threads: int = 2,
    clock: Callable[[], float] = time.monotonic,
    on_progress: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Trains a recipe, or goes on from `out_dir/checkpoint.pt`; returns the final record.

    Leaves in `out_dir`: `checkpoint.pt`, `average.pt` and `early.pt` (the averaged weights, last and at
    `early_epoch`; state dicts), `record.csv` (one row an epoch), `record.json`, `curve.png`. Equal seeds
    give equal batches at equal steps whatever was interrupted; with `budget_minutes` the schedule also
    depends on the machine's speed, and the record holds what it was. Raises RecipeError, DataError, or
    ValueError when the checkpoint belongs to another recipe.
    """
    recipe = load_recipe(recipe_path)
    out_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    _keep_freed_memory()
    check = load_faces(data_dir, out_dir / "cache", "val")
    material = load_material(
        data_dir,
        out_dir / "cache",
        tuple(recipe.sources),
        eigenfaces=set(recipe.pairs) != {DFDC},
        min_width=recipe.min_width,
    )
    return _Run(recipe, out_dir, material, check, clock, on_progress).finish()


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        out_dir: Path,
        material: Material,
        check: Faces,
        clock: Callable[[], float],
        on_progress: Callable[[str], None],
    ) -> None:
        self.recipe, self.out_dir, self.material, self.mix = recipe, out_dir, material, recipe.mix()
        self.check_images, self.check_labels = resized(check.images, recipe.crop.size), check.labels
        self.clock, self.on_progress = clock, on_progress
        known = len(material.faces.pairs())
        self.per_epoch = known // self.mix.pairs
        if not self.per_epoch:
            raise DataError(f"train: {known} pairs, expected at least {self.mix.pairs} for one batch")
        self.steps = math.ceil(self.per_epoch * recipe.epochs)
        torch.manual_seed(recipe.seed)
        self.network = FaceNetwork(recipe.architecture())
        _start(self.network, recipe.start)
        self.mask_head = MaskHead(self.network)
        self.network.to(memory_format=torch.channels_last)
        self.average = _Average(self.network, recipe.ema_decay)
        self.optimizer = _optimizer(nn.ModuleList([self.network, self.mask_head]), recipe)
        self.progress = _Progress()
        self._resume()

    def finish(self) -> dict[str, Any]:
        recipe, state = self.recipe, self.progress
        batches = _prefetched(
            pair_batches(self.material, self.mix, seed=recipe.seed, size=recipe.crop.size, step=state.step)
        )
        base_s, started = state.elapsed_s, self.clock()
        saved = logged = started
        first_step, losses = state.step, []
        for batch in batches:
            if state.step >= self.steps or self._share() >= 1:
                break
            losses.append(self._step(batch))
            now = self.clock()
            state.elapsed_s = base_s + now - started
            if now - logged >= LOG_S:
                rate = (state.step - first_step) * len(batch.labels) / (now - started)
                self.on_progress(self._line(rate, float(np.mean(losses[-50:]))))
                logged = now
            if state.step % self.per_epoch == 0:
                self._evaluate(float(np.mean(losses)))
                losses = []
                state.elapsed_s = base_s + self.clock() - started
            if now - saved >= CHECKPOINT_S:
                self._save()
                saved = now
        if losses:
            self._evaluate(float(np.mean(losses)))
        self._save()
        return self._record()

    def _share(self) -> float:
        """How much of the schedule is spent, 0..1: by steps, or by time when that is further."""
        share = self.progress.step / self.steps
        if self.recipe.budget_minutes is not None:
            share = max(share, self.progress.elapsed_s / (60 * self.recipe.budget_minutes))
        return min(1.0, share)

    def _step(self, batch: Batch) -> float:
        state, recipe = self.progress, self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * one_cycle(self._share(), recipe.warmup)
        torch.manual_seed(recipe.seed * 1_000_003 + state.step)
        self.network.train()
        logits, _ = self.network(to_tensor(batch.images, recipe.crop))
        labels = torch.from_numpy(batch.labels)
        loss = pair_loss(logits, labels, recipe.label_smoothing, recipe.pair_weight)
        if recipe.mask_weight:
            loss = loss + recipe.mask_weight * mask_loss(self.mask_head(), torch.from_numpy(batch.masks))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_CLIP)
        self.optimizer.step()
        self.average.update(self.network, state.step)
        state.step += 1
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"step {state.step}: the loss is {value}; lower the learning rate")
        return value

    def _evaluate(self, train_loss: float) -> None:
        state = self.progress
        logits = score(self.averaged(), self.check_images, self.recipe.crop)
        row = {
            "step": state.step,
            "epoch": state.step / self.per_epoch,
            "minutes": state.elapsed_s / 60,
            "schedule": self._share(),
            "train_loss": train_loss,
            "val_loss": log_loss(logits, self.check_labels),
            "val_auc": auc(logits, self.check_labels),
        }
        state.history.append(row)
        _replace(self.out_dir / "average.pt", self.average.tensors)
        if state.step == self.recipe.early_epoch * self.per_epoch:
            _replace(self.out_dir / "early.pt", self.average.tensors)
        _write_csv(self.out_dir / "record.csv", state.history)
        (self.out_dir / "record.json").write_text(json.dumps(self._record(), indent=2))
        learning_curve(state.history, self.out_dir / "curve.png")
        self.on_progress(
            f"epoch {row['epoch']:.2f}: val AUC {row['val_auc']:.4f}, val loss {row['val_loss']:.4f}, "
            f"train loss {train_loss:.4f}, {row['minutes']:.0f} min"
        )

    def averaged(self) -> FaceNetwork:
        network = FaceNetwork(self.recipe.architecture())
        network.load_state_dict(self.average.tensors)
        return network.to(memory_format=torch.channels_last).eval()

    def _record(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_json(),
            "crops": {"train": len(self.material.faces.labels), "val": len(self.check_labels)},
            "authentic": {name: len(source.points) for name, source in self.material.sources.items()},
            "steps": self.progress.step,
            "planned_steps": self.steps,
            "minutes": self.progress.elapsed_s / 60,
            "history": self.progress.history,
        }

    def _line(self, rate: float, loss: float) -> str:
        state = self.progress
        left = (self.steps - state.step) * 2 * self.mix.pairs / rate / 60
        if self.recipe.budget_minutes is not None:
            left = min(left, self.recipe.budget_minutes - state.elapsed_s / 60)
        return (
            f"step {state.step}/{self.steps} ({100 * self._share():.1f} % of the schedule), loss {loss:.4f}, "
            f"{rate:.1f} crops/s, {left:.0f} min left"
        )

    def _save(self) -> None:
        _replace(
            self.out_dir / "checkpoint.pt",
            {
                "format": FORMAT,
                "recipe": json.dumps(self.recipe.to_json()),
                "network": self.network.state_dict(),
                "mask_head": self.mask_head.state_dict(),
                "average": self.average.tensors,
                "optimizer": self.optimizer.state_dict(),
                "step": self.progress.step,
                "elapsed_s": self.progress.elapsed_s,
                "history": self.progress.history,
            },
        )

    def _resume(self) -> None:
        path = self.out_dir / "checkpoint.pt"
        if not path.exists():
            return
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["recipe"] != json.dumps(self.recipe.to_json()):
            raise ValueError(f"{path}: made by another recipe; choose another --out or remove it")
        self.network.load_state_dict(saved["network"])
        self.mask_head.load_state_dict(saved["mask_head"])
        self.average.tensors = saved["average"]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.progress = _Progress(saved["step"], saved["elapsed_s"], saved["history"])
        self.on_progress(f"going on from step {self.progress.step}")


def _start(network: FaceNetwork, start: str) -> None:
    """Fills a network with ImageNet's weights, or with those of the member of that name or directory."""
    if start == "imagenet":
        load_imagenet(network)
        return
    network.load_state_dict(load_member(start).module.state_dict())


def pair_loss(logits: Tensor, labels: Tensor, smoothing: float, pair_weight: float) -> Tensor:
    """Cross-entropy, and a manipulated crop should score above its own original.

    `logits` and `labels` [2P]: the authentic half first, partners in the same order.
    """
    targets = labels * (1 - smoothing) + smoothing / 2
    real, fake = logits.chunk(2)
    return F.binary_cross_entropy_with_logits(logits, targets) + pair_weight * F.softplus(real - fake).mean()


def one_cycle(share: float, warmup: float) -> float:
    """Factor on the peak learning rate: up linearly from a tenth, down along a cosine to a thousandth."""
    if share < warmup:
        return 0.1 + 0.9 * share / warmup
    return 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def score(
    network: nn.Module, images: NDArray[np.uint8], policy: CropPolicy, batch: int = 64
) -> NDArray[np.float32]:
    """Logits float32 [N] of uint8 crops [N, S, S, 3], in evaluation mode."""
    parts = [np.empty(0, np.float32)]
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            logits, _ = network(to_tensor(images[start : start + batch], policy))
            parts.append(logits.float().numpy())
    return np.concatenate(parts)


def learning_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Writes a PNG: losses on the left axis, validation AUC on the right one, over epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot()
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["train_loss"] for row in history], label="training loss (with pair term)")
    left.plot(epochs, [row["val_loss"] for row in history], label="validation LogLoss")
    left.set(xlabel="epoch", ylabel="loss")
    right = left.twinx()
    right.plot(epochs, [row["val_auc"] for row in history], "k.-", label="validation AUC")
    right.set(ylabel="AUC", ylim=(0.5, 1))
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """No weight decay on biases and norms."""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def _prefetched(source: Iterator[Batch]) -> Iterator[Batch]:
    """Runs `source` in one thread, PREFETCH items ahead; its error is raised here."""
    ready: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCH)
    stop = threading.Event()

    def work() -> None:
        try:
            for item in source:
                while not stop.is_set():
                    try:
                        ready.put(item, timeout=0.5)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
        except BaseException as error:
            ready.put(error)

    threading.Thread(target=work, name="loader", daemon=True).start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


def _keep_freed_memory() -> None:
    """Keeps glibc from returning every freed activation to the kernel: 29 crops/s became 50 on two cores."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def _replace(path: Path, content: object) -> None:
    """Writes beside the file and renames, so that a kill leaves the old one or the new one, whole."""
    part = path.with_suffix(".part")
    torch.save(content, part)
    part.replace(path)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
