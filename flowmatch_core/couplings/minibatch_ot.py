"""Exact optimal transport within a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition
from flowmatch_core.couplings._base import IndexCoupling
from flowmatch_core.couplings._batch import centred_pair, pair_cost
from flowmatch_core.transport import optimal_permutation

__all__ = ["MinibatchOT"]


@final
@dataclass(frozen=True)
class MinibatchOT(IndexCoupling):
    r"""The permutation of the noise with the least $\sum_i \lVert x_1^i - x_0^{\pi(i)} \rVert^2$.

    The result is a permutation: every row of the noise is used once. It is computed on the CPU in float64, which
    synchronises with the device: see `flowmatch_core.prefetch.ahead`. It ignores the conditions, so the noise is no
    longer Gaussian within a condition: use it for unconditional models, and `ConditionalOT` for conditional ones.

    References:
        - Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport
          (Tong et al., 2024), https://arxiv.org/abs/2302.00482

    Examples:
        >>> x0, x1 = torch.tensor([[0.0], [9.0]]), torch.tensor([[10.0], [1.0]])
        >>> MinibatchOT()(x0, x1)[0]
        tensor([[9.],
                [0.]])
    """

    def partners(
        self, x0: Tensor, x1: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        permutation = optimal_permutation(pair_cost(*centred_pair(x0, x1)))
        return torch.from_numpy(permutation).to(x0.device)
