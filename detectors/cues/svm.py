"""A support vector machine at run time: a Gaussian kernel and Platt's sigmoid, in plain numpy.

Training is `detectors.training.eyes`, with scikit-learn; here is only what a trained one says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Svm:
    """f(x) = sum_i coefficients[i] exp(-gamma |x - support[i]|^2) + bias on standardised features.

    `mean`, `spread` [D]; `support` [S, D]; `coefficients` [S]; log odds = slope f + offset (Platt,
    "Probabilistic Outputs for Support Vector Machines"). Raises ValueError for shapes that do not fit and for
    numbers that are not finite.
    """

    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    support: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    gamma: float
    bias: float
    slope: float
    offset: float

    def __post_init__(self) -> None:
        features = self.mean.shape[0]
        shapes = (self.spread.shape, self.support.shape, self.coefficients.shape)
        wanted = ((features,), (len(self.coefficients), features), (len(self.coefficients),))
        if shapes != wanted:
            raise ValueError(f"svm: shapes of spread, support, coefficients are {shapes}, expected {wanted}")
        numbers = [self.mean, self.spread, self.support, self.coefficients]
        scalars = np.array([self.gamma, self.bias, self.slope, self.offset])
        if not all(np.isfinite(part).all() for part in [*numbers, scalars]):
            raise ValueError("svm: a number is not finite")

    def decision(self, features: NDArray[np.float64]) -> float:
        """Return f of features [D], raw."""
        x = (features - self.mean) / np.maximum(self.spread, 1e-9)
        kernel = np.exp(-self.gamma * ((self.support - x) ** 2).sum(axis=1))
        return float(self.coefficients @ kernel + self.bias)

    def log_odds(self, features: NDArray[np.float64]) -> float:
        """Return Platt's log odds of manipulated."""
        return self.slope * self.decision(features) + self.offset

    def to_json(self) -> dict[str, Any]:
        """The machine as a file holds it."""
        tables = {
            name: getattr(self, name).tolist() for name in ("mean", "spread", "support", "coefficients")
        }
        return tables | {name: float(getattr(self, name)) for name in ("gamma", "bias", "slope", "offset")}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Svm":
        """What `to_json` wrote. Raises ValueError for anything else."""
        try:
            mean, spread, support, coefficients = (
                np.asarray(record[name], np.float64) for name in ("mean", "spread", "support", "coefficients")
            )
            gamma, bias, slope, offset = (
                float(record[name]) for name in ("gamma", "bias", "slope", "offset")
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"svm: field {error}") from error
        return cls(mean, spread, support, coefficients, gamma, bias, slope, offset)
