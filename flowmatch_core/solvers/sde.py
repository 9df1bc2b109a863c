"""Stochastic sampling: integrate the SDEs that have the marginals of a flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import check_choice, check_floating, check_object, noise_like
from flowmatch_core.field import VelocityField
from flowmatch_core.paths import AffinePath, CondOT
from flowmatch_core.solvers._problem import (
    Clock,
    CountedField,
    check_finite,
    check_output_times,
    output_marks,
    step_ends,
)
from flowmatch_core.solvers.diffusions import Diffusion, Memoryless, integral
from flowmatch_core.solvers.grids import TimeGrid, Uniform
from flowmatch_core.solvers.ode import Solution

__all__ = ["SDE_SOLVERS", "solve_sde"]

SDE_SOLVERS = ("euler_maruyama", "heun")
"""The names of the solvers, of weak order 1 and 2."""

Step = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Returns the state after the i-th step from the state and the velocity before it and a standard normal draw."""


def solve_sde(
    field: VelocityField,
    x: Tensor,
    *,
    path: AffinePath | None = None,
    score: VelocityField | None = None,
    diffusion: Diffusion = Memoryless(),
    t0: float = 0.0,
    t1: float = 1.0,
    times: Sequence[float] | Tensor | None = None,
    cond: Condition = None,
    solver: str = "euler_maruyama",
    steps: int = 100,
    grid: TimeGrid = Uniform(),
    generator: torch.Generator | None = None,
    save: bool = False,
    check: bool = True,
) -> Solution:
    r"""Simulate the diffusion that has the marginals $p_t$ of the flow, from `t0` to `t1`, also backward in time.

    $$
    dX = \left[ v(t, X) \pm \tfrac{w_t^2}{2} \nabla \log p_t(X) \right] dt + w_t\, dB
    $$

    with the positive sign forward in time and the negative one backward.

    **Along a path**, for a field trained with noise that is independent of the data, the score follows from the
    velocity. The drift may be infinite at `t = 0` and `t = 1`, so a step from $s$ to $t$ uses the means
    $\hat x_0, \hat x_1$ of noise and data that follow from the velocity:

    $$
    X_t = \alpha_t \hat x_1 + \sigma_t \left( \kappa\, \hat x_0 + \sqrt{1 - \kappa^2}\, z \right),
    \quad z \sim N(0, I), \quad \kappa = \exp\left( -\tfrac12 \left| \int_s^t w_u^2 / \sigma_u^2\, du \right| \right).
    $$

    The step is exact for data that are a single point, and equals Euler-Maruyama up to terms of second order
    otherwise. `heun` corrects the step by $\hat x_1$ at its end, unless one of its ends is `t = 1`. With $w = 0$
    `euler_maruyama` is Euler's method on `CondOT`, and DDIM on any path. A step to $\sigma_t = 0$ ends in $\hat x_1$,
    the mean of the data, without noise; a path whose noise is large until shortly before `t = 1` (`VP`, `OU`) needs a
    `grid` with short steps there. Backward in time `Memoryless` is the diffusion from data to noise.

    **A coupling** of noise and data (`MinibatchOT`, `SchrodingerBridge`, `Reflow`) makes that score, and hence the
    samples, wrong for any $w > 0$: give `score`, as trained by `sf2m_loss`. The step then gets the term
    $\sigma_t (1 - \kappa) (\hat x_0 + \sigma_s \nabla \log p_s)$, which is zero without a coupling. A field does not
    show how it was trained, so that a missing score is no error. For a diffusion that does not vanish at `t = 1`, as
    `Constant`, leave out the path.

    **A bridge** between any two laws has a score and no path. The methods are then Euler-Maruyama and Heun's method
    with the drift above, the latter without correction of a step that ends in `t = 0` or `t = 1`. The diffusion is
    `Constant` or `Custom`: `Constant(sigma)` with the fields of `sf2m_loss(sigma=sigma)` simulates the Schrödinger
    bridge.

    References:
        - Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          https://arxiv.org/abs/2011.13456
        - SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling from Diffusion Models (Gonzalez et al.,
          2023), https://arxiv.org/abs/2305.14267
        - Simulation-Free Schrödinger Bridges via Score and Flow Matching (Tong et al., 2024),
          https://arxiv.org/abs/2307.03672

    Args:
        field: The velocity field.
        x: The state at `t0`, with shape `(batch, *event)`.
        path: The path along which the field was trained; None for a bridge.
        score: The score $\nabla \log p_t$, with the call of a velocity field; None where it follows from the velocity.
        diffusion: The diffusion coefficient $w_t$.
        t0: The start.
        t1: The end.
        times: The output times in place of `t0` and `t1`, which are their ends; steps are divided there.
        cond: The condition handed to the field, a tensor or a mapping of tensors whose first dimension is the batch.
        solver: One of `SDE_SOLVERS`.
        steps: The number of steps.
        grid: Where the steps end between `t0` and `t1`.
        generator: The source of randomness.
        save: Whether to keep the states at the ends of the steps.
        check: Whether to raise a `SolverError` if the result is not finite; the check synchronises with the device.

    Returns:
        The solution; its `nfe` counts the field, not the score, which is evaluated as often.

    Examples:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> g = torch.Generator().manual_seed(0)
        >>> x0 = torch.randn(1000, 2, generator=g)
        >>> field = lambda t, x, cond: (2 * t - 1) / (t**2 + (1 - t)**2) * x  # from N(0, I) to N(0, I)
        >>> solve_sde(field, x0, path=CondOT(), solver="heun", steps=20, generator=g).x.std().round(decimals=1)
        tensor(1.)

        The stationary Brownian bridge of a standard normal law, backward:

        >>> from flowmatch_core.solvers import Constant
        >>> field, score = lambda t, x, cond: 0 * x, lambda t, x, cond: -x
        >>> x1 = torch.randn(1000, 2, generator=g)
        >>> end = solve_sde(field, x1, score=score, diffusion=Constant(0.5), t0=1.0, t1=0.0, generator=g).x
        >>> end.std().round(decimals=1)
        tensor(1.)
    """
    check_choice("solver", solver, SDE_SOLVERS)
    for name, value in (("path", path), ("diffusion", diffusion), ("grid", grid)):
        check_object(name, value)
    check_floating("x", x)
    outputs = None if times is None else check_output_times(times, t0, t1, save)
    if outputs is not None:
        t0, t1 = outputs[0], outputs[-1]
    if not (0 <= min(t0, t1) < max(t0, t1) <= 1):
        raise ValueError(f"t0 and t1 are {t0} and {t1}, but should be different times between 0 and 1.")
    if path is None and score is None:
        raise ValueError("path is None, but should be the path of the field unless score is given.")
    if path is None and diffusion.needs_path:
        raise ValueError(
            f"diffusion is {diffusion}, but should be Constant or Custom where path is None; for a bridge use "
            "Constant(sigma)."
        )
    if steps < 1:
        raise ValueError(f"steps is {steps}, but should be at least 1.")
    clock = Clock(grid, t0, t1 - t0)
    marks = output_marks(clock, steps, save, outputs)
    nodes, kept = step_ends(steps, marks), set(marks)
    ends = [(1 - share) * t0 + share * t1 for share in map(clock.forward.time, nodes)]  # exactly t0 and t1 at the ends
    evaluate = CountedField(field, cond)
    learned = None if score is None else CountedField(score, cond, "score")
    if path is None:
        assert learned is not None
        step = _bridge_step(evaluate, learned, diffusion, ends, solver)
    else:
        step = _path_step(evaluate, learned, path, diffusion, ends, solver)
    states = [x]
    for i, s in enumerate(nodes[1:]):
        x = step(i, x, evaluate(ends[i], x), noise_like(x, generator))
        if s in kept:
            states.append(x)
    if check:
        check_finite(solver, x)
    solution = Solution(x=x, nfe=evaluate.calls, status="finished" if check else "unchecked")
    if not save and outputs is None:
        return solution
    return replace(solution, t=torch.tensor(outputs or ends, dtype=x.dtype, device=x.device), path=torch.stack(states))


def _path_step(
    evaluate: CountedField,
    score: CountedField | None,
    path: AffinePath,
    diffusion: Diffusion,
    ends: Sequence[float],
    solver: str,
) -> Step:
    """Return the step along an affine path."""
    # Coefficients stay on the CPU in float64: they promote no other dtype, and no step synchronises with the device.
    times = torch.tensor(ends, dtype=torch.float64)
    alpha, sigma = path.alpha(times), path.sigma(times)
    data_of_x, data_of_v = path.data_or_mean(times, "velocity")
    noise_of_x, noise_of_v = path.coefficients(times, "velocity", "noise")
    earlier, later = torch.minimum(times[:-1], times[1:]), torch.maximum(times[:-1], times[1:])
    retention = diffusion.noise_retention(path, earlier, later)
    fresh = (1 - retention**2).clamp_min(0).sqrt()
    of_x, of_v = path.step_coefficients(times, "velocity", retention)

    def surplus(i: int, x: Tensor, velocity: Tensor, score: CountedField) -> Tensor:
        """Return the mean of the noise less what it is in a path without a coupling."""
        return noise_of_x[i] * x + noise_of_v[i] * velocity + sigma[i] * score(ends[i], x)

    def step(i: int, x: Tensor, velocity: Tensor, z: Tensor) -> Tensor:
        j = i + 1
        trial = of_x[i] * x + of_v[i] * velocity + sigma[j] * fresh[i] * z
        share = sigma[j] * (1 - retention[i])
        if score is not None:
            coupled = surplus(i, x, velocity, score)
            trial = trial + share * coupled
        # At t = 1 the state is the data: there is nothing to correct, and the velocity may be infinite.
        if solver == "euler_maruyama" or max(ends[i], ends[j]) == 1:
            return trial
        velocity_there = evaluate(ends[j], trial)
        change = data_of_x[j] * trial + data_of_v[j] * velocity_there - data_of_x[i] * x - data_of_v[i] * velocity
        corrected = trial + (alpha[j] - alpha[i] * retention[i] * sigma[j] / sigma[i]) / 2 * change
        if score is not None:
            corrected = corrected + share / 2 * (surplus(j, trial, velocity_there, score) - coupled)
        return corrected

    return step


def _bridge_step(
    evaluate: CountedField, score: CountedField, diffusion: Diffusion, ends: Sequence[float], solver: str
) -> Step:
    """Return the step with the drift of velocity and score; both signs of time have the same formula."""
    times = torch.tensor(ends, dtype=torch.float64)
    earlier, later = torch.minimum(times[:-1], times[1:]), torch.maximum(times[:-1], times[1:])
    any_path = CondOT()  # this diffusion does not depend on it
    variance = integral(lambda t: diffusion.w(any_path, t).square(), earlier, later)
    length, spread = times[1:] - times[:-1], variance.sqrt()

    def step(i: int, x: Tensor, velocity: Tensor, z: Tensor) -> Tensor:
        j = i + 1
        drift = length[i] * velocity + variance[i] / 2 * score(ends[i], x)
        trial = x + drift + spread[i] * z
        # At the ends of a bridge velocity and score may be infinite.
        if solver == "euler_maruyama" or not 0 < ends[j] < 1:
            return trial
        drift_there = length[i] * evaluate(ends[j], trial) + variance[i] / 2 * score(ends[j], trial)
        return trial + (drift_there - drift) / 2

    return step
