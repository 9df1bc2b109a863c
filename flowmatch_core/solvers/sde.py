"""Stochastic sampling: integrate the SDEs that have the marginals of a flow."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from flowmatch_core._tensors import check_choice, noise_like
from flowmatch_core.field import VelocityField
from flowmatch_core.paths import AffinePath
from flowmatch_core.solvers._problem import CountedField, check_finite
from flowmatch_core.solvers.diffusions import Diffusion, Memoryless
from flowmatch_core.solvers.grids import TimeGrid, Uniform
from flowmatch_core.solvers.ode import Solution

__all__ = ["SDE_SOLVERS", "solve_sde"]

SDE_SOLVERS = ("euler_maruyama", "heun")
"""The names of the solvers, of weak order 1 and 2."""


def solve_sde(
    field: VelocityField,
    x: Tensor,
    *,
    path: AffinePath,
    diffusion: Diffusion = Memoryless(),
    t0: float = 0.0,
    t1: float = 1.0,
    cond: Tensor | None = None,
    solver: str = "euler_maruyama",
    steps: int = 100,
    grid: TimeGrid = Uniform(),
    generator: torch.Generator | None = None,
    save: bool = False,
    check: bool = True,
) -> Solution:
    r"""Simulate the diffusion that has the marginals $p_t$ of the flow, from `t0` to `t1`.

    $$
    dX = \left[ v(t, X) + \tfrac{w_t^2}{2} \nabla \log p_t(X) \right] dt + w_t\, dB
    $$

    The score is computed from the velocity field. The drift may be infinite at `t = 0` and `t = 1`, so a step uses
    the means $\hat x_0, \hat x_1$ of noise and data that follow from the velocity:

    $$
    X_t = \alpha_t \hat x_1 + \sigma_t \left( \kappa\, \hat x_0 + \sqrt{1 - \kappa^2}\, z \right),
    \quad z \sim N(0, I), \quad \kappa = \exp\left( -\tfrac12 \int_s^t w_u^2 / \sigma_u^2\, du \right).
    $$

    The step is exact for data that are a single point, and equals Euler-Maruyama up to terms of second order
    otherwise. `heun` corrects the step by $\hat x_1$ at its end, unless that is `t = 1`. With $w = 0$
    `euler_maruyama` is Euler's method on `CondOT`, and DDIM on any path. A step to $\sigma_t = 0$ ends in $\hat x_1$,
    the mean of the data, without noise; a path whose noise is large until shortly before `t = 1` (`VP`, `OU`) needs a
    `grid` with short steps there.

    References:
        - Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          https://arxiv.org/abs/2011.13456
        - SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling from Diffusion Models (Gonzalez et al.,
          2023), https://arxiv.org/abs/2305.14267

    Args:
        field: The velocity field, as trained along `path`.
        x: The state at `t0`, with shape `(batch, *event)`.
        path: The path of the field.
        diffusion: The diffusion coefficient $w_t$.
        t0: The start.
        t1: The end, after the start.
        cond: The condition handed to the field, with shape `(batch, c)`.
        solver: One of `SDE_SOLVERS`.
        steps: The number of steps.
        grid: Where the steps end between `t0` and `t1`.
        generator: The source of randomness.
        save: Whether to keep the states at the ends of the steps.
        check: Whether to raise a `SolverError` if the result is not finite; the check synchronises with the device.

    Examples:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> g = torch.Generator().manual_seed(0)
        >>> x0 = torch.randn(1000, 2, generator=g)
        >>> field = lambda t, x, cond: (2 * t - 1) / (t**2 + (1 - t)**2) * x  # from N(0, I) to N(0, I)
        >>> solve_sde(field, x0, path=CondOT(), solver="heun", steps=20, generator=g).x.std().round(decimals=1)
        tensor(1.)
    """
    check_choice("solver", solver, SDE_SOLVERS)
    if not 0 <= t0 < t1 <= 1:
        raise ValueError(f"t0 and t1 are {t0} and {t1}, but should be between 0 and 1 and t0 before t1.")
    ends = [(1 - s) * t0 + s * t1 for s in grid.nodes(steps)]  # exactly t0 and t1 at the ends
    # Coefficients stay on the CPU in float64: they promote no other dtype, and no step synchronises with the device.
    times = torch.tensor(ends, dtype=torch.float64)
    alpha, sigma = path.alpha(times), path.sigma(times)
    data_of_x, data_of_v = path.data_or_mean(times, "velocity")
    retention = diffusion.noise_retention(path, times[:-1], times[1:])
    fresh = (1 - retention**2).clamp_min(0).sqrt()
    of_x, of_v = path.step_coefficients(times, "velocity", retention)
    states, evaluate = [x], CountedField(field, cond)
    for i, j in itertools.pairwise(range(steps + 1)):
        velocity = evaluate(ends[i], x)
        z = noise_like(x, generator)
        trial = of_x[i] * x + of_v[i] * velocity + sigma[j] * fresh[i] * z
        # At t = 1 the state is the data: there is nothing to correct, and the velocity may be infinite.
        if solver == "heun" and ends[j] < 1:
            data = data_of_x[i] * x + data_of_v[i] * velocity
            change = data_of_x[j] * trial + data_of_v[j] * evaluate(ends[j], trial) - data
            trial = trial + (alpha[j] - alpha[i] * retention[i] * sigma[j] / sigma[i]) / 2 * change
        x = trial
        if save:
            states.append(x)
    if check:
        check_finite(solver, x)
    solution = Solution(x=x, nfe=evaluate.calls, status="finished" if check else "unchecked")
    return replace(solution, t=times.to(x.device, x.dtype), path=torch.stack(states)) if save else solution
