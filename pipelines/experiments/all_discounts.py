"""Compare one successor model of many discounts with a model of each discount, trained for as many steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from pipelines.base import plugins
from pipelines.experiments import Finding, Outcome

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from flowmatch_core.oracles import LinearGaussianMDP
    from flowmatch_core.successor import Discounts, GeometricHorizonModel

MODELS = {
    "one": "one model of all discounts",
    "each": "a model of each discount",
    "composed": "the one model at the discount before, composed",
    "floor": "true samples",
}
CONTRACTION, ANGLE, NOISE, ACTIONS = 0.99, 0.15, 0.03, 0.15  # of the environment `spiral`
AT_MOST = 1.5  # times the distance of a model of one discount

Discount = Annotated[float, Field(ge=0, lt=1)]


class Settings(plugins.Settings):
    """Discounts, training and sizes of the comparison."""

    low: Discount = Field(default=0.5, description="smallest discount of the one model")
    high: Discount = Field(default=0.95, description="largest discount of the one model")
    gammas: tuple[Discount, ...] = Field(
        default=(0.5, 0.8, 0.95), min_length=2, description="discounts of the comparison, in ascending order"
    )
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(192, 192, 192), min_length=1, description="hidden layers of every network"
    )
    steps: int = Field(default=3000, ge=1, description="gradient steps of every model")
    batch: int = Field(default=128, ge=2, description="transitions per gradient step")
    lr: float = Field(default=3e-3, gt=0, description="peak learning rate; linear warm-up of 50 steps, then a cosine")
    ema_step: float = Field(
        default=0.1, gt=0, le=1, description="step of the target; ema_step * (1 - high) * steps should be at least 5"
    )
    ode_steps: int = Field(default=5, ge=1, description="midpoint steps per bootstrap target")
    starts: int = Field(default=16, ge=1, description="start states of the comparison")
    samples: int = Field(default=512, ge=2, description="samples at each of them")
    repeats: int = Field(default=3, ge=2, le=100, description="independent repetitions")

    @model_validator(mode="after")
    def _gammas_are_among_the_discounts(self) -> Self:
        if list(self.gammas) != sorted(set(self.gammas)):
            raise ValueError(f"gammas is {self.gammas}, but it should be in ascending order")
        if not self.low <= self.gammas[0] <= self.gammas[-1] <= self.high:
            raise ValueError(f"gammas is {self.gammas}, but it should be in [low, high], [{self.low}, {self.high}]")
        return self


def run(settings: Settings, *, generator: torch.Generator) -> Outcome:
    """Train by TD²-CFM on the spiral, and measure the EMD of samples to those of the closed form."""
    import pandas as pd
    import torch

    from flowmatch_core.metrics import emd
    from flowmatch_core.successor import ComposedHorizonModel, UniformDiscounts

    mdp, rows = _spiral(generator.device), []

    def distance(x: Tensor, y: Tensor) -> float:
        return sum(float(emd(x[:, i], y[:, i])) for i in range(x.shape[1])) / x.shape[1]

    for repeat in range(settings.repeats):
        start = torch.randn(settings.starts, 2, generator=generator, device=generator.device)
        action = mdp.policy(start)
        one = _train(mdp, UniformDiscounts(settings.low, settings.high), settings, generator)
        before = settings.low
        for gamma in settings.gammas:
            truth = mdp.successor(start, action, gamma)
            exact, other = (truth.sample(settings.samples, generator=generator) for _ in range(2))
            models = {
                "one": one.at(gamma),
                "each": _train(mdp, UniformDiscounts(gamma, gamma), settings, generator),
                "composed": ComposedHorizonModel([one.at(before)], [mdp.policy], gamma),
            }
            with torch.no_grad():
                samples = {
                    name: model.sample(start, action, settings.samples, generator=generator)
                    for name, model in models.items()
                }
            for name, x in {**samples, "floor": other}.items():
                rows.append({"model": name, "gamma": gamma, "repeat": repeat, "emd": distance(x, exact)})
            before = gamma
    table = pd.DataFrame(rows)
    return Outcome(
        title="All discounts at once",
        table=table,
        findings=_findings(table, settings),
        notes=(
            f"TD²-CFM on the spiral, whose successor measure is known. Every model has {settings.steps} steps of "
            f"{settings.batch} transitions and an MLP of {' × '.join(map(str, settings.hidden))}; the one model draws "
            f"the discount of every row from [{settings.low:g}, {settings.high:g}]. EMD of {settings.samples} samples "
            f"at {settings.starts} start states, {settings.repeats} repetitions."
        ),
        caption=(
            "EMD to the closed form by horizon, with the standard error over repetitions. Composed: chains of samples "
            "of the one model at the discount before."
        ),
    )


def figure(table: pd.DataFrame) -> Figure:
    """Draw the distance of every model against the horizon."""
    from matplotlib import pyplot as plt

    from pipelines.reporting.figures import style

    shown, axis = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    for index, (name, label) in enumerate(MODELS.items()):
        rows = table[table["model"] == name].groupby("gamma")["emd"]
        look: dict[str, Any] = {"color": f"C{index}", "marker": "o"}
        if name == "floor":
            look = {"color": style.TRUTH, "linestyle": ":"}
        axis.errorbar(
            1 / (1 - rows.mean().index), rows.mean(), rows.sem(), label=label, markersize=3, capsize=2, **look
        )
    axis.set(xlabel="horizon 1 / (1 − γ)", ylabel="EMD", xscale="log", yscale="log")
    gammas = sorted(set(table["gamma"]))
    axis.set_xticks([1 / (1 - gamma) for gamma in gammas], [f"{1 / (1 - gamma):.3g}" for gamma in gammas])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)
    return shown


def _spiral(device: torch.device) -> LinearGaussianMDP:
    import torch

    from flowmatch_core.oracles import LinearGaussianMDP

    eye, zero = torch.eye(2, device=device), torch.zeros(2, device=device)
    cos, sin = math.cos(ANGLE), math.sin(ANGLE)
    gain = torch.tensor([[cos - 1, -sin], [sin, cos - 1]], device=device)
    return LinearGaussianMDP(A=CONTRACTION * eye, B=CONTRACTION * eye, c=zero, W=NOISE**2 * eye, K=gain, k=zero)


def _train(
    mdp: LinearGaussianMDP, discounts: Discounts, settings: Settings, generator: torch.Generator
) -> GeometricHorizonModel:
    """Return the model of the averaged network, at the largest discount."""
    import copy

    import torch

    from flowmatch_core.averaging import polyak_update
    from flowmatch_core.networks import MLPField
    from flowmatch_core.successor import GeometricHorizonModel, Transitions, td2_cfm_loss, with_discount

    n, device = settings.batch, generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    cond_dim, own = 4 + discounts.FEATURES, torch.Generator().manual_seed(seed)
    field = MLPField(2, settings.hidden, cond_dim=cond_dim, generator=own).to(device)
    target = copy.deepcopy(field).requires_grad_(False)
    optimizer = torch.optim.Adam(field.parameters(), settings.lr, fused=True)
    for step in range(settings.steps):
        warm = min(1.0, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = settings.lr * warm * (1 + math.cos(math.pi * step / settings.steps)) / 2
        state = torch.randn(n, 2, generator=generator, device=device)
        action = ACTIONS * torch.randn(n, 2, generator=generator, device=device)
        later = mdp.step(state, action, generator=generator)
        gamma = discounts.sample(n, generator=generator, device=device)
        batch = with_discount(Transitions(state, action, later, mdp.policy(later)), gamma)
        loss = td2_cfm_loss(field, target, batch, gamma=gamma, steps=settings.ode_steps, generator=generator)
        optimizer.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        polyak_update(target, field, settings.ema_step)
    return GeometricHorizonModel(target, (2,), discounts.high, discounts=discounts)


def _findings(table: pd.DataFrame, settings: Settings) -> tuple[Finding, ...]:
    from flowmatch_core.intervals import ONE_SIDED, ratio, t_interval

    found = []
    for gamma in settings.gammas:
        here = table[table["gamma"] == gamma].pivot(index="repeat", columns="model", values="emd")
        compared = ratio(dict(enumerate(here["one"])), dict(enumerate(here["each"])), ONE_SIDED)
        sentence = f"γ = {gamma:g}: EMD of the one model / that of a model of this discount"
        found.append(Finding(f"gamma_{gamma:g}_ratio", sentence, compared, at_most=AT_MOST))
        found += [
            Finding(
                f"gamma_{gamma:g}_{name}", f"γ = {gamma:g}, {label}: EMD", t_interval(here[name].tolist(), ONE_SIDED)
            )
            for name, label in MODELS.items()
        ]
    return tuple(found)
