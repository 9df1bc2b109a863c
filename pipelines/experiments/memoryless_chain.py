"""Measure the convergence of a memoryless chain to the flow as its steps shrink.

At every step the chain follows a random one of the conditional paths through its point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.base import plugins
from pipelines.experiments import Finding, Outcome

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from flowmatch_core.oracles import GaussianMixture

CHAINS = ("random drift", "diffusion")
FINE = 200  # steps of the flow and of the integral of the prediction


class Settings(plugins.Settings):
    """Sizes of the experiment."""

    steps: tuple[int, ...] = Field(default=(64, 128, 256, 512), min_length=2, description="steps of the chains")
    starts: int = Field(default=40, ge=2, le=10_000, description="start points, one in each equal part of the noise")
    chains: int = Field(default=100, ge=2, le=100_000, description="chains from each start")
    repeats: int = Field(default=5, ge=2, le=100, description="independent repetitions")


def run(settings: Settings, *, generator: torch.Generator) -> Outcome:
    r"""Measure the variance of the end points of chains from one start point.

    At $x_t$ the chain draws a pair $(x_0, x_1)$ whose path passes through $x_t$, from the posterior in closed form, and
    moves by its velocity: $x_{t+dt} = x_t + v\,dt$. With $\operatorname{var}_t$ the variance of $v$ and $\psi'$ the
    sensitivity of the flow from $t$ to the end, the variance of the end point should be

    $$ dt \int_0^1 (\psi')^2 \operatorname{var}_t\,dt + o(dt). $$

    A diffusion with the same marginals adds $e \sqrt{dt}$ instead of $e\,dt$, so its variance does not vanish.
    """
    import numpy as np
    import pandas as pd
    import torch

    from flowmatch_core.intervals import ONE_SIDED, t_interval
    from flowmatch_core.paths import CondOT
    from flowmatch_core.solvers import solve_sde

    data = _mixture(generator.device)
    field, rows = data.velocity_field(), []
    with torch.no_grad():
        for repeat in range(settings.repeats):
            share = torch.rand(settings.starts, generator=generator, device=generator.device, dtype=torch.float64)
            level = (torch.arange(settings.starts, device=generator.device) + share) / settings.starts
            start = torch.special.ndtri(level)[:, None]
            many = start.repeat(settings.chains, 1)
            end, rate = _prediction(data, start)
            for steps in settings.steps:
                ends = {
                    "random drift": _chain(data, many, steps, generator),
                    "diffusion": solve_sde(field, many, path=CondOT(), steps=steps, generator=generator).x,
                }
                for name, x in ends.items():
                    x = x.reshape(settings.chains, settings.starts)
                    rows.append(
                        {
                            "chain": name,
                            "repeat": repeat,
                            "dt": 1 / steps,
                            "variance": float(x.var(0).mean()),
                            "predicted": float(rate.mean()) / steps if name == "random drift" else None,
                            "bias": float((x.mean(0) - end.squeeze(1)).square().mean().sqrt()),
                        }
                    )
    table = pd.DataFrame(rows)

    def slopes(chain: str) -> list[float]:
        groups = table[table["chain"] == chain].groupby("repeat")
        return [float(np.polyfit(np.log(g["dt"]), np.log(g["variance"]), 1)[0]) for _, g in groups]

    finest = table[(table["chain"] == "random drift") & (table["dt"] == table["dt"].min())]
    return Outcome(
        title="Random drift becomes the flow",
        table=table,
        findings=(
            Finding(
                "slope",
                "Random drift: slope of log variance in log dt",
                t_interval(slopes("random drift"), ONE_SIDED),
                0.9,
                1.1,
            ),
            Finding(
                "constant",
                "Random drift: variance / its prediction at the finest step",
                t_interval((finest["variance"] / finest["predicted"]).tolist(), ONE_SIDED),
                0.8,
                1.2,
            ),
            Finding(
                "diffusion_slope", "Diffusion: the same slope", t_interval(slopes("diffusion"), ONE_SIDED), -0.1, 0.1
            ),
        ),
        notes=(
            f"Two Gaussians in one dimension, CondOT path; {settings.chains} chains from each of {settings.starts} "
            f"points, {settings.repeats} repetitions. Predicted: dt times the integral of the "
            "velocity's variance along the exact flow, each weighted with the square of its effect on the end."
        ),
        caption=(
            "Variance of the end points of chains from one start point. With a random drift e dt it is proportional to "
            "dt, so the chain converges to the flow; with the e √dt of a diffusion it is constant."
        ),
    )


def figure(table: pd.DataFrame) -> Figure:
    """Draw the variance against the step, with the prediction."""
    from matplotlib import pyplot as plt

    from pipelines.reporting.figures import style

    shown, axis = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    for index, chain in enumerate(CHAINS):
        rows = table[table["chain"] == chain].groupby("dt")
        mean, error = rows["variance"].mean(), rows["variance"].sem()
        axis.errorbar(mean.index, mean, error, label=chain, color=f"C{index}", marker="o", markersize=3, capsize=2)
        if index == 0:
            axis.plot(mean.index, rows["predicted"].mean(), color=style.TRUTH, linestyle=":", label="prediction")
    axis.set(xlabel="dt", ylabel="variance of the end", xscale="log", yscale="log")
    steps = sorted({round(1 / dt) for dt in table["dt"]})
    axis.set_xticks([1 / n for n in steps], [f"1/{n}" for n in steps])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)
    return shown


def _mixture(device: torch.device) -> GaussianMixture:
    import torch

    from flowmatch_core.oracles import GaussianMixture

    weights = torch.tensor([0.4, 0.6], dtype=torch.float64, device=device)
    means = torch.tensor([[-0.8], [0.8]], dtype=torch.float64, device=device)
    covariances = torch.tensor([[[0.25]], [[0.16]]], dtype=torch.float64, device=device)
    return GaussianMixture(weights, means, covariances)


def _posterior(data: GaussianMixture, t: float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the posterior of the data given a point of the straight path.

    It consists of weights and means (rows, components), and variances (components,).
    """
    prior, means = data.covariances.flatten(), data.means.flatten()
    total = t**2 * prior + (1 - t) ** 2
    offset = x - t * means
    log_weights = data.weights.log() - (offset.square() / total + total.log()) / 2
    return log_weights.softmax(1), means + t * prior / total * offset, prior * (1 - t) ** 2 / total


def _chain(data: GaussianMixture, x: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    import torch

    for i in range(steps):
        t = i / steps
        weights, means, variances = _posterior(data, t, x)
        level = torch.rand((len(x), 1), generator=generator, device=x.device, dtype=x.dtype)
        chosen = (level > weights[:, :1]).long()
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x1 = means.gather(1, chosen) + variances.sqrt()[chosen] * noise
        x = x + (x1 - x) / (1 - t) / steps  # on a straight path x1 - x0 = (x1 - x) / (1 - t)
    return x


def _prediction(data: GaussianMixture, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return the end of the flow from each start point, and the variance per dt of the chains around it."""
    import torch

    from flowmatch_core.divergence import divergence
    from flowmatch_core.solvers import solve

    field = data.velocity_field()
    solution = solve(field, start, solver="rk4", steps=FINE, save=True)
    assert solution.path is not None
    variances, divergences = [], []
    for i, x in enumerate(solution.path):
        t = min(i, FINE - 0.5) / FINE  # at t = 1 the limit, approximated half a step earlier
        weights, means, spread = _posterior(data, t, x)
        mean = (weights * means).sum(1, keepdim=True)
        variances.append((weights * (spread + (means - mean).square())).sum(1) / (1 - t) ** 2)
        divergences.append(divergence(field, t, x)[1])
    variance, growth = torch.stack(variances), torch.stack(divergences)
    weight = torch.full((FINE + 1, 1), 1 / FINE, dtype=x.dtype, device=x.device)
    weight[[0, -1]] /= 2
    passed = torch.cumulative_trapezoid(growth, dx=1 / FINE, dim=0)
    passed = torch.cat([torch.zeros_like(growth[:1]), passed])
    sensitivity = (passed[-1] - passed).exp()
    return solution.x, (weight * sensitivity.square() * variance).sum(0)
