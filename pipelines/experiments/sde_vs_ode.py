"""Compare samples of the SDE and the ODE of one field at equal numbers of field evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.base import plugins
from pipelines.experiments import Finding, Outcome

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from flowmatch_core.field import Time, VelocityField
    from flowmatch_core.intervals import Interval
    from flowmatch_core.oracles import GaussianMixture

SAMPLERS = ("ODE, Euler", "ODE, Heun", "SDE, Euler-Maruyama", "SDE, Heun")
FIELDS = ("exact", "early error", "late error", "learned")
MODES, RADIUS, SPREAD = 8, 1.5, 0.2


class Settings(plugins.Settings):
    """Sizes of the comparison and of the errors of the field."""

    evaluations: tuple[int, ...] = Field(
        default=(4, 8, 16, 32), min_length=2, description="evaluations of the field a sample, even, increasing"
    )
    samples: int = Field(default=2000, ge=2, le=100_000, description="samples in a distance")
    repeats: int = Field(default=5, ge=2, le=100, description="independent repetitions of everything but the training")
    projections: int = Field(default=32, ge=1, le=10_000, description="directions of the sliced Wasserstein distance")
    error: float = Field(default=0.8, ge=0, le=10, description="size of the error added to the velocity")
    early: float = Field(default=0.5, gt=0, lt=1, description="the early error ends at this time")
    late: float = Field(default=0.8, gt=0, lt=1, description="the late error begins at this time")
    training_steps: int = Field(default=1000, ge=1, le=1_000_000, description="gradient steps of the learned field")


def run(settings: Settings, *, generator: torch.Generator) -> Outcome:
    r"""Compare the flow $\dot x = v$ with its memoryless diffusion on eight Gaussians, for which $v$ is known.

    The diffusion is $dx = [v + \tfrac12 w^2 \nabla \log p_t]\,dt + w\,dB$ with the score that corresponds to $v$, so an
    error of $v$ affects both. All samplers of a repetition share the start and the true samples.
    """
    import pandas as pd
    import torch

    from flowmatch_core.metrics import sliced_wasserstein

    truth = _mixture(generator.device)
    fields = _fields(settings, truth, generator)
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        for repeat in range(settings.repeats):
            start = torch.randn(settings.samples, 2, generator=generator, device=generator.device)
            data, other = (truth.sample(settings.samples, generator=generator) for _ in range(2))
            directions = generator.get_state()

            def distance(x: Tensor, data: Tensor = data, directions: Tensor = directions) -> float:
                same = torch.Generator(generator.device)
                same.set_state(directions)
                return float(sliced_wasserstein(x, data, settings.projections, generator=same))

            rows.append({"field": "exact", "sampler": "floor", "repeat": repeat, "nfe": 0, "distance": distance(other)})
            for name, field in fields.items():
                for sampler in SAMPLERS:
                    for nfe in settings.evaluations:
                        x = _sample(sampler, field, start, nfe, generator)
                        row = {"field": name, "sampler": sampler, "repeat": repeat, "nfe": nfe}
                        rows.append({**row, "distance": distance(x)})
    table = pd.DataFrame(rows)
    return Outcome(
        title="SDE versus ODE sampling",
        table=table,
        findings=_findings(table, settings),
        notes=(
            f"Ratios of the sliced Wasserstein distance between {settings.samples} samples and as many true ones, each "
            f"by the better of two methods; {settings.repeats} repetitions. Eight Gaussians, CondOT "
            f"path, the memoryless SDE. The error is a smooth field of size {settings.error:g}, before "
            f"t = {settings.early:g} (early) or after t = {settings.late:g} (late); the learned field is an MLP of two "
            f"layers of 64 after {settings.training_steps} steps. A Heun step costs two evaluations."
        ),
        caption=(
            "Distance to the data by field evaluations per sample. For the exact field the ODE needs fewer. Noise "
            "reduces the effect of early errors and amplifies late errors, when the gradient of the score is large."
        ),
    )


def figure(table: pd.DataFrame) -> Figure:
    """Draw the distance against evaluations, one panel per field."""
    from matplotlib import pyplot as plt

    from pipelines.reporting.figures import style

    shown, axes = plt.subplots(1, len(FIELDS), figsize=(11, 2.9), sharey=True, layout="constrained")
    floor = table.loc[table["sampler"] == "floor", "distance"].mean()
    for axis, name in zip(axes, FIELDS, strict=True):
        for index, sampler in enumerate(SAMPLERS):
            rows = table[(table["field"] == name) & (table["sampler"] == sampler)].groupby("nfe")["distance"]
            axis.errorbar(
                rows.mean().index,
                rows.mean(),
                rows.sem(),
                label=sampler,
                color=f"C{index // 2}",
                linestyle=("--", "-")[index % 2],
                linewidth=1.2,
                capsize=2,
            )
        axis.axhline(floor, color=style.TRUTH, linewidth=1, linestyle=":", label="true samples")
        axis.set(title=name, xlabel="evaluations", xscale="log", yscale="log")
        axis.set_xticks(sorted(set(table["nfe"]) - {0}), [f"{n}" for n in sorted(set(table["nfe"]) - {0})])
        axis.minorticks_off()
    axes[0].set_ylabel("sliced Wasserstein")
    axes[0].set_yticks([0.05, 0.1, 0.2, 0.4], ["0.05", "0.1", "0.2", "0.4"])
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return shown


def _findings(table: pd.DataFrame, settings: Settings) -> tuple[Finding, ...]:
    from flowmatch_core.intervals import ONE_SIDED, ratio

    few, many = settings.evaluations[0], settings.evaluations[-1]
    floor = table[table["sampler"] == "floor"].set_index("repeat")["distance"]

    def best(field: str, equation: str, nfe: int) -> pd.Series[float]:
        """Return the distances of the better of the equation's two methods, by repetition."""
        at = table[(table["field"] == field) & table["sampler"].str.startswith(equation) & (table["nfe"] == nfe)]
        methods = at.pivot(index="repeat", columns="sampler", values="distance")
        distances: pd.Series[float] = methods[methods.mean().idxmin()]
        return distances

    def over(a: pd.Series[float], b: pd.Series[float]) -> Interval:
        return ratio(dict(enumerate(a)), dict(enumerate(b)), ONE_SIDED)

    def against(field: str, nfe: int = many) -> Interval:
        return over(best(field, "SDE", nfe), best(field, "ODE", nfe))

    worse = max((best("exact", equation, many) for equation in ("ODE", "SDE")), key=lambda distances: distances.mean())
    return (
        Finding("exact_few", f"Exact field, {few} evaluations: SDE / ODE", against("exact", few), at_least=1.0),
        Finding(
            "exact_many",
            f"Exact field, {many} evaluations: the worse of the two / true samples",
            over(worse, floor),
            at_most=1.5,
        ),
        Finding("early_error", f"Early error, {many} evaluations: SDE / ODE", against("early error"), at_most=1.0),
        Finding("late_error", f"Late error, {many} evaluations: SDE / ODE", against("late error"), at_least=1.0),
        Finding("learned", f"Learned field, {many} evaluations: SDE / ODE", against("learned")),
    )


def _mixture(device: torch.device) -> GaussianMixture:
    import torch

    from flowmatch_core.oracles import GaussianMixture

    angle = torch.arange(MODES, device=device) * (2 * math.pi / MODES)
    means = RADIUS * torch.stack([angle.cos(), angle.sin()], -1)
    covariances = SPREAD**2 * torch.eye(2, device=device).expand(MODES, 2, 2)
    return GaussianMixture(torch.full((MODES,), 1 / MODES, device=device), means, covariances)


def _fields(settings: Settings, truth: GaussianMixture, generator: torch.Generator) -> dict[str, VelocityField]:
    import torch

    exact = truth.velocity_field()

    def wrong(when: Callable[[float], bool]) -> VelocityField:
        def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
            velocity = exact(t, x, cond)
            if not when(float(t)):
                return velocity
            return velocity + settings.error * torch.stack([torch.sin(2 * x[:, 1] + 0.5), torch.cos(2 * x[:, 0])], 1)

        return field

    return {
        "exact": exact,
        "early error": wrong(lambda t: t < settings.early),
        "late error": wrong(lambda t: t >= settings.late),
        "learned": _learned(settings, truth, generator),
    }


def _learned(settings: Settings, truth: GaussianMixture, generator: torch.Generator) -> VelocityField:
    import torch

    from flowmatch_core.networks import MLPField
    from flowmatch_core.objectives import cfm_loss
    from flowmatch_core.paths import CondOT

    network = MLPField(2, (64, 64), generator=torch.Generator().manual_seed(generator.initial_seed()))
    network = network.to(generator.device)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3, fused=True)
    for _ in range(settings.training_steps):
        optimizer.zero_grad()
        batch = truth.sample(256, generator=generator)
        cfm_loss(network, CondOT(), batch, generator=generator).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.requires_grad_(False)


def _sample(sampler: str, field: VelocityField, start: Tensor, nfe: int, generator: torch.Generator) -> Tensor:
    from flowmatch_core.paths import CondOT
    from flowmatch_core.solvers import solve, solve_sde

    equation, method = sampler.split(", ")
    steps = nfe // 2 if method == "Heun" else nfe
    if equation == "ODE":
        return solve(field, start, solver=method.lower(), steps=steps).x
    solver = method.lower().replace("-", "_")
    return solve_sde(field, start, path=CondOT(), solver=solver, steps=steps, generator=generator).x
