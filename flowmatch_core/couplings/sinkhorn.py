"""Entropic optimal transport within a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core.couplings._base import Coupling
from flowmatch_core.couplings._batch import centred_pair, pair_cost
from flowmatch_core.transport import entropic_plan

__all__ = ["Sinkhorn"]


@final
@dataclass(frozen=True)
class Sinkhorn(Coupling):
    r"""Partners drawn from the entropic transport plan of the batch.

    The plan `P` minimises $\sum_{ij} P_{ij} (\lVert x_1^i - x_0^j \rVert^2 + \epsilon \log P_{ij})$.

    It lies between `MinibatchOT` ($\epsilon \to 0$) and `Independent` ($\epsilon \to \infty$).
    Each row of the data draws its own partner, so a row of the noise may be used several times or not at all, and
    once on average. Like `MinibatchOT` it ignores the conditions and runs on the CPU.

    References:
        - Sinkhorn Distances: Lightspeed Computation of Optimal Transport (Cuturi, 2013),
          https://arxiv.org/abs/1306.0895

    Args:
        reg: The regularisation $\epsilon$, in units of the squared distance.

    Examples:
        >>> x0, x1 = torch.tensor([[0.0], [9.0]]), torch.tensor([[10.0], [1.0]])
        >>> Sinkhorn(reg=0.1)(x0, x1, generator=torch.Generator().manual_seed(0))[0]
        tensor([[9.],
                [0.]])
    """

    reg: float = 0.1

    def __post_init__(self) -> None:
        if not self.reg > 0:
            raise ValueError(f"reg is {self.reg}, but should be positive.")

    def __call__(
        self, x0: Tensor, x1: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        plan = entropic_plan(pair_cost(*centred_pair(x0, x1)), self.reg)
        # draws by inverse distribution functions: torch.multinomial on the CPU refuses a generator of another device
        levels = torch.rand(len(x0), 1, generator=generator, dtype=torch.float32, device=x0.device)
        cumulative = torch.from_numpy(plan).cumsum(1)
        partner = torch.searchsorted(cumulative, levels.to("cpu", torch.float64) * cumulative[:, -1:], right=True)
        return x0[partner[:, 0].to(x0.device)], x1, cond
