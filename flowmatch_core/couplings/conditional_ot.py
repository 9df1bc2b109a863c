"""Optimal transport within a batch that respects the conditions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core._tensors import flatten_event
from flowmatch_core.couplings._base import Coupling
from flowmatch_core.couplings._batch import centred, centred_pair, pair_cost
from flowmatch_core.transport import optimal_permutation

__all__ = ["ConditionalOT"]


@final
@dataclass(frozen=True)
class ConditionalOT(Coupling):
    r"""The permutation of the noise of least cost that keeps it Gaussian within each condition.

    $$
    \sum_i \frac{\lVert x_1^i - x_0^{\pi(i)} \rVert^2}{E\lVert x_1 - x_0 \rVert^2}
    + w \frac{\lVert c^i - c^{\pi(i)} \rVert^2}{E\lVert c - c' \rVert^2}
    $$

    Each row of the noise has the condition of its original partner, and a change of condition adds to the cost. Both
    distances are divided by their mean over the batch (after aligning the means of noise and data, whose distance no
    plan changes), so the weight has no units.

    - Labels: the default $w = \infty$ only exchanges rows of equal conditions, so the noise stays exactly Gaussian
      within a condition.
    - Continuous conditions, where no two are equal: a weight such as 100 exchanges rows of similar conditions. The
      noise is Gaussian within a condition only in the limit of a large weight, where no row moves; a smaller weight
      reduces the transport cost more and adds more bias.

    References:
        - The Curse of Conditions: Analyzing and Improving Optimal Transport for Conditional Flow-Based
          Generation (Cheng & Schwing, 2025), https://arxiv.org/abs/2503.10636

    Args:
        weight: The weight $w$ of a change of condition in the cost.

    Examples:
        >>> x0, x1 = torch.tensor([[0.0], [5.0], [9.0]]), torch.tensor([[10.0], [1.0], [2.0]])
        >>> ConditionalOT()(x0, x1, cond=torch.tensor([[0.0], [1.0], [1.0]]))[0].T
        tensor([[0., 5., 9.]])
        >>> ConditionalOT()(x0, x1, cond=torch.tensor([[0.0], [0.0], [1.0]]))[0].T
        tensor([[5., 0., 9.]])
    """

    weight: float = math.inf

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight is {self.weight}, but should be at least 0.")

    def __call__(
        self, x0: Tensor, x1: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if cond is None or cond.shape[:1] != x1.shape[:1]:
            shape = None if cond is None else tuple(cond.shape)
            raise ValueError(f"cond has shape {shape}, but should have shape ({len(x1)}, c), one for each row of x1.")
        noise, data = centred_pair(x0, x1)
        if math.isinf(self.weight):
            permutation = _within_equal(noise, data, flatten_event(cond.detach()).cpu())
        else:
            given = centred("cond", cond)
            cost = pair_cost(noise, data) / _mean_distance(noise, data)
            price = pair_cost(given, given) / _mean_distance(given, given)
            permutation = torch.from_numpy(optimal_permutation(cost + self.weight * price))
        return x0[permutation.to(x0.device)], x1, cond


def _within_equal(noise: Tensor, data: Tensor, cond: Tensor) -> Tensor:
    """Return the best of the permutations that keep every row within its condition."""
    _, label, counts = torch.unique(cond, dim=0, return_inverse=True, return_counts=True)
    permutation = torch.arange(len(data))
    for rows in label.argsort(stable=True).split(counts.tolist()):
        permutation[rows] = rows[torch.from_numpy(optimal_permutation(pair_cost(noise[rows], data[rows])))]
    return permutation


def _mean_distance(x: Tensor, y: Tensor) -> float:
    """Return the mean squared distance of the rows of two centred sets; not zero, for a division."""
    distance = x.square().sum(1).mean() + y.square().sum(1).mean()
    return max(float(distance), torch.finfo(distance.dtype).tiny)
