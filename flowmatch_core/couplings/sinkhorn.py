"""Entropic optimal transport within a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition
from flowmatch_core.couplings._base import IndexCoupling
from flowmatch_core.couplings._batch import check_weight, conditional_costs
from flowmatch_core.transport import entropic_plan

__all__ = ["Sinkhorn"]


@final
@dataclass(frozen=True)
class Sinkhorn(IndexCoupling):
    r"""Partners drawn from the entropic transport plan of the batch.

    The plan `P` minimises $\sum_{ij} P_{ij} (\lVert x_1^i - x_0^j \rVert^2 + \epsilon \log P_{ij})$.

    It lies between `MinibatchOT` ($\epsilon \to 0$) and `Independent` ($\epsilon \to \infty$).
    Each row of the data draws its own partner, so a row of the noise may be used several times or not at all, and
    once on average. Like `MinibatchOT` it runs on the CPU and by default ignores the conditions. With a weight, a
    change of condition adds to the cost as in `ConditionalOT`, in units of the mean squared distance: an infinite
    weight solves for a plan within each label, and a large one serves continuous conditions.

    References:
        - Sinkhorn Distances: Lightspeed Computation of Optimal Transport (Cuturi, 2013),
          https://arxiv.org/abs/1306.0895

    Args:
        reg: The regularisation $\epsilon$, in units of the squared distance.
        weight: The weight of a change of condition in the cost, see `ConditionalOT`.

    Examples:
        >>> x0, x1 = torch.tensor([[0.0], [9.0]]), torch.tensor([[10.0], [1.0]])
        >>> Sinkhorn(reg=0.1)(x0, x1, generator=torch.Generator().manual_seed(0))[0]
        tensor([[9.],
                [0.]])
    """

    reg: float = 0.1
    weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.reg < math.inf:
            raise ValueError(f"reg is {self.reg}, but should be positive and finite.")
        check_weight(self.weight)

    def partners(
        self, x0: Tensor, x1: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        # draws by inverse distribution functions: torch.multinomial on the CPU refuses a generator of another device
        levels = torch.rand(len(x0), 1, generator=generator, dtype=torch.float32, device=x0.device)
        levels = levels.to("cpu", torch.float64)
        partner = torch.arange(len(x1))
        for rows, cost in conditional_costs(x0, x1, cond, self.weight):
            cumulative = torch.from_numpy(entropic_plan(cost, self.reg)).cumsum(1)
            drawn = torch.searchsorted(cumulative, levels[rows] * cumulative[:, -1:], right=True)
            partner[rows] = rows[drawn[:, 0]]
        return partner.to(x0.device)
