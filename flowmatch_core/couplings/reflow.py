"""Noise paired with the samples that a trained flow generates from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import check_shape
from flowmatch_core.couplings._base import Coupling
from flowmatch_core.field import VelocityField
from flowmatch_core.solvers import solve

__all__ = ["Reflow"]


@final
@dataclass(frozen=True)
class Reflow(Coupling):
    r"""The data are replaced by the images $\psi_1(x_0, c)$ of the noise under a trained flow.

    A flow that is trained on these pairs (rectified flow) has the same distribution at `t = 1`, no larger transport
    cost and straighter trajectories, which take fewer steps to solve. Of the given data only the shape is used. No
    gradient reaches the trained flow.

    References:
        - Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow
          (Liu et al., 2023), https://arxiv.org/abs/2209.03003

    Args:
        field: The trained velocity field.
        solver: The ODE solver, see `flowmatch_core.solvers.solve`.
        steps: The number of its steps.

    Examples:
        >>> x0, x1, _ = Reflow(lambda t, x, cond: -x, solver="rk4")(torch.ones(1, 1), torch.zeros(1, 1))
        >>> x0, x1
        (tensor([[1.]]), tensor([[0.3679]]))
    """

    field: VelocityField
    solver: str = "midpoint"
    steps: int = 20

    def __call__(
        self, x0: Tensor, x1: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Condition]:
        check_shape("x0", x0, x1.shape)
        with torch.no_grad():
            image = solve(self.field, x0, cond=cond, solver=self.solver, steps=self.steps).x
        return x0, image, cond
