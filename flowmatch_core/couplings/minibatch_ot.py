"""Noise paired with data by exact optimal transport within the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core.couplings._base import Coupling
from flowmatch_core.fields import check_shape, flatten_event
from flowmatch_core.transport import optimal_plan

__all__ = ["MinibatchOT"]


@final
@dataclass(frozen=True)
class MinibatchOT(Coupling):
    r"""The permutation of the noise with the least :math:`\sum_i \lVert x_1^i - x_0^{\pi(i)} \rVert^2`.

    No row is lost and none doubled. It is computed on the CPU in float64 and does not look at the
    conditions, so within a condition the noise is no longer Gaussian: use it for unconditional models.

    References:
        | Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport
          (Tong et al., 2024), https://arxiv.org/abs/2302.00482

    Example:
        >>> x0, x1 = torch.tensor([[0.0], [9.0]]), torch.tensor([[10.0], [1.0]])
        >>> MinibatchOT()(x0, x1)[0]
        tensor([[9.],
                [0.]])
    """

    def __call__(
        self, x0: Tensor, x1: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        check_shape("x0", x0, x1.shape)
        noise, data = (flatten_event(x.detach()).to("cpu", torch.float64) for x in (x0, x1))
        distances = torch.cdist(data, noise, compute_mode="donot_use_mm_for_euclid_dist")
        plan = optimal_plan(distances.square().numpy())
        return x0[torch.as_tensor(plan.argmax(1), device=x0.device)], x1, cond
