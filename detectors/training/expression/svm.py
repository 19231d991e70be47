"""The linear SVM over embeddings: one class against the others, squared hinge."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detectors.expression import LinearSvm
from detectors.readings import EXPRESSIONS

ROUNDS = 200
"""Of L-BFGS at most; it stops by itself where the loss no longer falls."""


def fit_svm(features: NDArray[np.float32], labels: NDArray[np.int64], cost: float) -> LinearSvm:
    """Fit to features [N, D] and labels [N], places in EXPRESSIONS.

    Minimises |w|^2 / 2 plus `cost` times the sum of the squared hinges, as LIBLINEAR does (Fan et al.), for
    each expression against the others; the bias is not held small. No draws are involved.
    """
    x = torch.from_numpy(np.ascontiguousarray(features, np.float32))
    sign = 2 * torch.nn.functional.one_hot(torch.from_numpy(labels), len(EXPRESSIONS)).float() - 1
    weight = torch.zeros(len(EXPRESSIONS), x.shape[1], requires_grad=True)
    bias = torch.zeros(len(EXPRESSIONS), requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=ROUNDS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        hinge = torch.relu(1 - sign * (x @ weight.T + bias))
        # by the number of pictures: the solver's tolerances are made for losses of about one
        value = (weight.square().sum() / 2 + cost * hinge.square().sum()) / (cost * len(x))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return LinearSvm(weight.detach().numpy(), bias.detach().numpy())
