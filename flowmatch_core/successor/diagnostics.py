"""Diagnostics of a bootstrap target: the error of its ODE solve."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmatch_core.field import Time, VelocityField
from flowmatch_core.solvers import solve

__all__ = ["path_error"]


def path_error(
    field: VelocityField,
    x0: Tensor,
    cond: Tensor | None = None,
    t: Time = 1.0,
    *,
    steps: int,
    solver: str = "midpoint",
    reference_steps: int = 64,
) -> Tensor:
    r"""Return the relative error of the points of a bootstrap, a scalar.

    It is $\sqrt{E\|x_K - x_{64}\|^2 / E\|x_{64} - E x_{64}\|^2}$ for a solve of $K$ steps.

    It measures the bias of $K$ = `steps`. TD²-CFM solves to the times of the regression (pass these as `t`), TD-CFM
    and TD-CFM(C) to 1, where the error is several times larger. Increase `steps` if it is above 0.05.

    Args:
        field: The trained target.
        x0: Draws of N(0, I), `(batch, d)`.
        cond: Their conditions, `(batch, c)`.
        t: Where the solves end, a float or `(batch,)`.
        steps: The number of steps of the short solve.
        solver: The solver of both.
        reference_steps: The number of steps of the long one.

    Examples:
        >>> x0 = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> path_error(lambda t, x, cond: x, x0, steps=2) > path_error(lambda t, x, cond: x, x0, steps=5)
        tensor(True)
    """
    with torch.no_grad():
        short, long = (
            solve(field, x0, t1=t, cond=cond, solver=solver, steps=k, check=False).x for k in (steps, reference_steps)
        )
        return ((short - long).square().sum() / (long - long.mean(0)).square().sum()).sqrt()
