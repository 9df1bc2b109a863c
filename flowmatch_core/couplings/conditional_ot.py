"""Optimal transport within a batch that respects the conditions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition
from flowmatch_core.couplings._base import IndexCoupling
from flowmatch_core.couplings._batch import check_weight, conditional_costs
from flowmatch_core.transport import optimal_permutation

__all__ = ["ConditionalOT"]


@final
@dataclass(frozen=True)
class ConditionalOT(IndexCoupling):
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
        check_weight(self.weight)

    def partners(
        self, x0: Tensor, x1: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        partner = torch.arange(len(x1))
        for rows, cost in conditional_costs(x0, x1, cond, self.weight):
            partner[rows] = rows[torch.from_numpy(optimal_permutation(cost))]
        return partner.to(x0.device)
