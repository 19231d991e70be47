"""The pace of a training: steps until its schedule is spent; lines, validations, checkpoints in between."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CHECKPOINT_S = 180.0
"""A kill costs at most three minutes; a checkpoint of 50 MB takes a tenth of a second."""
LOG_S = 20.0


@dataclass
class Progress:
    """What a checkpoint remembers besides the tensors. `loss_sum` is over `loss_steps` since validation."""

    step: int = 0
    elapsed_s: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def learned(self, loss: float) -> None:
        """Counts a step. Raises FloatingPointError when the loss is no number."""
        self.step += 1
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {self.step}: the loss is {loss}; lower the learning rate")
        self.loss_sum += loss
        self.loss_steps += 1

    def mean_loss(self) -> float:
        """Since it was last asked."""
        mean = self.loss_sum / self.loss_steps
        self.loss_sum, self.loss_steps = 0.0, 0
        return mean


@dataclass
class Pace:
    """`steps` planned, or `budget_minutes` if they pass first; a validation every so many steps."""

    steps: int
    budget_minutes: float | None
    validate_every: int
    clock: Callable[[], float] = time.monotonic
    progress: Progress = field(default_factory=Progress)

    def share(self) -> float:
        """How much of the schedule is spent, 0..1: by steps, or by time when that is further."""
        share = self.progress.step / self.steps
        if self.budget_minutes is not None:
            share = max(share, self.progress.elapsed_s / (60 * self.budget_minutes))
        return min(1.0, share)

    def minutes_left(self, steps_per_s: float) -> float:
        left = (self.steps - self.progress.step) / steps_per_s / 60
        if self.budget_minutes is None:
            return left
        return min(left, self.budget_minutes - self.progress.elapsed_s / 60)

    def run(
        self,
        done: Callable[[], bool],
        step: Callable[[], float],
        validate: Callable[[], None],
        save: Callable[[], None],
        log: Callable[[float, float], None],
    ) -> None:
        """Steps until `done`; at the end what was learned since is validated, and saved.

        `step` returns its loss and counts itself; `log` gets steps a second and the loss.
        """
        state = self.progress
        base_s, started, first = state.elapsed_s, self.clock(), state.step
        saved = logged = started
        while not done():
            loss = step()
            now = self.clock()
            state.elapsed_s = base_s + now - started
            if now - logged >= LOG_S:
                log((state.step - first) / (now - started), loss)
                logged = now
            if state.step % self.validate_every == 0:
                validate()
                state.elapsed_s = base_s + self.clock() - started
            if now - saved >= CHECKPOINT_S:
                save()
                saved = now
        if state.loss_steps:
            validate()
        save()
