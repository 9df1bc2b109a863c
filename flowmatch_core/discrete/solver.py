"""Simulation of the jump process that a denoiser drives."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from flowmatch_core.discrete.categorical import Denoiser, check_prediction
from flowmatch_core.discrete.path import MixturePath
from flowmatch_core.solvers import Solution, SolverError, TimeGrid, Uniform

__all__ = ["solve_ctmc"]


@torch.no_grad()
def solve_ctmc(
    denoiser: Denoiser,
    x: Tensor,
    *,
    path: MixturePath,
    t0: float = 0.0,
    t1: float = 1.0,
    steps: int = 64,
    grid: TimeGrid = Uniform(),
    cond: Tensor | None = None,
    stochasticity: float = 0.0,
    save: bool = False,
    generator: torch.Generator | None = None,
) -> Solution:
    r"""Simulate the continuous-time Markov chain of a denoiser from `t0` to `t1`.

    In a step from `t` to `s` each position draws $\hat x_1 \sim p_{1|t}(\cdot \mid x_t)$ and jumps there
    with probability

    $$
    1 - \exp \left( -\int_t^s \lambda_r\, dr \right) = 1 - \frac{1 - \kappa_s}{1 - \kappa_t} ,
    $$

    with the integral of the rate in place of Euler's $(s - t) \lambda_t$. Given the draws a step of any size is
    exact; in the last one, to `t = 1`, every position jumps, and a single step samples $p_{1|0}$ at each position.
    The remaining error is that the denoiser does not see the jumps of other positions within a step.

    A stochasticity $\eta > 0$ adds jumps back to noise and as many more to data, which do not change the
    distributions $p_t$ of an exact denoiser, and let an inexact one correct its mistakes:

    $$
    (1 + \eta)\, \lambda_t\, p_{1|t}(y \mid x) + \eta\, \dot\kappa_t\,
    \frac{p_{1|t}(x \mid x)\, p_0(y)}{\kappa_t + (1 - \kappa_t)\, p_0(x)} .
    $$

    The rate of the jumps back is held constant in a step, and a position jumps at most once, so the distribution of
    the samples has an error of order 1 / `steps` that grows with $\eta$: a total variation of 1.7e-3 for one position
    from a uniform source at $\eta = 10$ with 200 steps, where $\eta = 0$ is exact.

    References:
        - Generative Flows on Discrete State-Spaces (Campbell et al., 2024), https://arxiv.org/abs/2402.04997
        - Discrete Flow Matching (Gat et al., 2024), https://arxiv.org/abs/2407.15595

    Args:
        denoiser: The estimate of $p_{1|t}$. It is called with `t` as a float.
        x: The states at `t0`, with shape `(batch, *event)`.
        path: The path on which the denoiser was trained.
        t0: The first time.
        t1: The last time, greater than `t0`.
        steps: The number of steps, each of one call of the denoiser.
        grid: Where the steps end in time.
        cond: The conditions, with shape `(batch, c)`.
        stochasticity: The weight $\eta$ of the jumps back; a positive one needs small steps.
        save: Whether to keep the states at all times.
        generator: The source of randomness.

    Raises:
        SolverError: The results of the denoiser are not distributions, such as logits passed as `Probabilities`.

    Examples:
        >>> from flowmatch_core.discrete import Logits, MaskSource
        >>> path = MixturePath(MaskSource(2))
        >>> sure = lambda t, x, cond: Logits(torch.tensor([-100.0, 100.0]).expand(*x.shape, 2))
        >>> solve_ctmc(sure, path.source.sample((1, 3)), path=path, steps=1).x
        tensor([[1, 1, 1]])
    """
    if not 0 <= t0 < t1 <= 1:
        raise ValueError(f"t0 and t1 are {t0} and {t1}, but should be such that 0 <= t0 < t1 <= 1.")
    if not 0 <= stochasticity < math.inf:
        raise ValueError(f"stochasticity is {stochasticity}, but should be at least 0 and finite.")
    # the grid stays on the CPU in float64: no step synchronises with the device
    times = t0 + (t1 - t0) * torch.tensor(grid.nodes(steps), dtype=torch.float64)
    noise = path.schedule.noise(times)
    hazards = ((1 + stochasticity) * (noise[:-1] / noise[1:]).log()).tolist()  # infinite in the last step to t = 1
    states = [x]
    valid = torch.ones((), dtype=torch.bool, device=x.device)
    for k, t in enumerate(times[:-1].tolist()):
        prediction = denoiser(t, x, cond)
        check_prediction(prediction, x, path.source.vocabulary)
        valid = valid & prediction.is_valid()
        is_data = path.source.is_data(x)
        to_data = torch.where(is_data, x, prediction.sample(generator))
        uniform = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=x.device)
        if stochasticity:
            from_data = torch.where(is_data, 1.0, prediction.log_prob(x).double().exp())
            start = path.source.probability(x)
            weight = stochasticity * float((times[k + 1] - times[k]) * path.schedule.d_kappa(times[k]))
            back = weight * from_data / (1 - noise[k] + noise[k] * start)
            jumps = -torch.expm1(-hazards[k] - back)
            to_noise = path.source.sample(x.shape, generator, x.device)
            after = torch.where(uniform < jumps * (back / (hazards[k] + back)), to_noise, to_data)
            x = torch.where(uniform < jumps, after, x)
        else:
            x = torch.where(uniform < -math.expm1(-hazards[k]), to_data, x)
        if save:
            states.append(x)
    if not bool(valid):
        raise SolverError(
            "the denoiser gave values that are not distributions (NaN, or numbers that do not sum to one); look at "
            "its Logits, or at Probabilities that should be Logits."
        )
    solution = Solution(x, nfe=steps, status="finished")
    return replace(solution, t=times, path=torch.stack(states)) if save else solution
