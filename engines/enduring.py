"""A GPU that runs out of memory: smaller batches, then another engine (DESIGN 3.9)."""

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from engines.engine import Engine, Output, Precision

logger = logging.getLogger(__name__)


class Enduring:
    """An engine on a GPU. A batch that finds no memory is halved; when one input finds none, what `instead`
    gives serves from then on.

    Threads: as the engine's own; the other engine is made once, while other calls that failed wait.
    """

    def __init__(self, engine: "Engine", instead: "Callable[[], Engine]") -> None:
        self._engine, self._instead = engine, instead
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def precision(self) -> "Precision":
        return self._engine.precision

    def __call__(self, faces: Tensor) -> "Output":
        """As the engine's. Raises what the other engine does."""
        engine = self._engine
        try:
            return engine(faces)
        except torch.OutOfMemoryError as error:
            reason = " ".join(str(error).split())
        if len(faces) > 1:
            logger.warning("%s: no memory for %d inputs at once: halved", engine.name, len(faces))
            halves = [self(half) for half in torch.tensor_split(faces, 2)]
            logits, maps = zip(*halves, strict=True)
            return np.concatenate(logits), np.concatenate(maps)
        with self._lock:
            if self._engine is engine:
                logger.error("%s: no memory for one input, another engine serves: %s", engine.name, reason)
                self._engine = self._instead()
        return self._engine(faces)
