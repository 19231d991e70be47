"""How the learning rate moves: by the share of the schedule that is spent, or by what validation says."""

import math
from dataclasses import dataclass

PLATEAU_FACTOR = 0.1
PLATEAU_PATIENCE = 10
"""Validations without a lower loss before the rate falls (Bonettini et al.)."""
LOWEST_RATE = 1e-10
"""Reaching it ends the training (Bonettini et al.)."""


def one_cycle(share: float, warmup: float) -> float:
    """Factor on the peak learning rate: up linearly from a tenth, down along a cosine to a thousandth."""
    if share < warmup:
        return 0.1 + 0.9 * share / warmup
    return 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


@dataclass
class Plateau:
    """Lowers the rate when the validation loss has not fallen for more than PLATEAU_PATIENCE validations.

    `stale` counts validations since the best one, `waited` those since the rate last fell.
    """

    rate: float
    best: float = math.inf
    stale: int = 0
    waited: int = 0

    def validated(self, loss: float) -> bool:
        """Takes a validation loss in; whether it is the best so far. NaN never is."""
        if loss < self.best:
            self.best, self.stale, self.waited = loss, 0, 0
            return True
        self.stale += 1
        self.waited += 1
        if self.waited > PLATEAU_PATIENCE:
            self.rate *= PLATEAU_FACTOR
            self.waited = 0
        return False

    @property
    def exhausted(self) -> bool:
        """Whether the rate has come down to LOWEST_RATE, rounding aside."""
        return self.rate < LOWEST_RATE * 1.01
