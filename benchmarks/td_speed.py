"""CPU time of TD²-CFM until its samples are nearly as good as those of Monte Carlo flow matching."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import Cell, Claim, Result
from benchmarks.timing import Ratio
from flowmatch_core.averaging import polyak_update
from flowmatch_core.field import VelocityField
from flowmatch_core.intervals import paired_ratio
from flowmatch_core.metrics import emd
from flowmatch_core.networks import MLPField
from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.successor import (
    GeometricHorizonModel,
    Loss,
    Particles,
    Transitions,
    mc_cfm_loss,
    n_step,
    td2_cfm_loss,
)
from flowmatch_core.times import LogitNormalTime

__all__ = ["benchmark_td_speed"]

GAMMAS = (0.95, 0.98)
SEEDS = (3, 4, 5)
"""Of the data, the network and the draws; none of them was used to choose a recipe or a number of steps."""
ROWS, WINDOW = 100_000, 5
"""Windows of the policy's episodes, and their numbers of steps; all but the returns see the first step only."""
STARTS, SAMPLES = 24, 512
TOLERANCE = 1.3
"""The target is this multiple of the error of Monte Carlo."""
WARMUP, BLOCK = 50, 20
"""Steps of linear warm-up, and steps between two readings of the clock."""
SHORTEST, LONGEST = 150, 6_400
"""Bounds of the number of steps of a run."""


def spiral() -> LinearGaussianMDP:
    """Return a slow spiral into the origin, with noise; its policy does nothing."""
    cos, sin = math.cos(0.15), math.sin(0.15)
    rotation, identity = torch.tensor([[cos, -sin], [sin, cos]]), torch.eye(2)
    return LinearGaussianMDP(
        A=0.99 * rotation, B=identity, c=torch.zeros(2), W=0.05**2 * identity, K=0 * identity, k=torch.zeros(2)
    )


@dataclass(frozen=True)
class Data:
    """What there is to learn from: on-policy windows `(rows, n + 1, 2)` and, for Monte Carlo, futures `(rows, 2)`."""

    gamma: float
    windows: Tensor
    state: Tensor
    next_state: Tensor
    future: Tensor

    def rows(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.state), (n,), generator=generator)

    def transitions(self, n: int, generator: torch.Generator) -> Transitions:
        i = self.rows(n, generator)
        return Transitions(self.state[i], None, self.next_state[i], None)


def draw(gamma: float, seed: int) -> Data:
    """Return fresh data: starts from N(0, I), and one exact sample of the successor measure of each."""
    generator, mdp = torch.Generator().manual_seed(seed), spiral()
    states = [torch.randn(ROWS, 2, generator=generator)]
    for _ in range(WINDOW):
        states.append(mdp.step(states[-1], None, generator=generator))
    future = torch.cat(
        [mdp.successor(s, None, gamma).sample(1, generator=generator)[0] for s in torch.split(states[0], 5_000)]
    )
    return Data(gamma, torch.stack(states, 1), states[0], states[1], future)


@cache
def truth(gamma: float) -> tuple[Tensor, Tensor]:
    """Return the starts of the evaluation, `(starts, 2)`, and exact samples for each, `(samples, starts, 2)`."""
    generator = torch.Generator().manual_seed(1234)
    starts = torch.randn(STARTS, 2, generator=generator)
    return starts, spiral().successor(starts, None, gamma).sample(SAMPLES, generator=generator)


def error(field: VelocityField, gamma: float) -> float:
    """Return the exact earth mover's distance of samples from the truth, averaged over the starts."""
    starts, exact = truth(gamma)
    model = GeometricHorizonModel(field, (2,), gamma, "midpoint", steps=20)
    with torch.no_grad():
        samples = model.sample(starts, None, SAMPLES, generator=torch.Generator().manual_seed(4321))
    return statistics.fmean(float(emd(samples[:, i], exact[:, i])) for i in range(STARTS))


Objective = Callable[[VelocityField, VelocityField], Tensor]
"""The loss of one step, from the field that learns and its average."""
Method = Callable[[Data, torch.Generator], Objective]


def td2(rows: int, **options: Any) -> Method:
    """TD²-CFM with so many rows in each of its terms."""

    def method(data: Data, generator: torch.Generator) -> Objective:
        loss: Callable[..., Loss] = partial(td2_cfm_loss, gamma=data.gamma, generator=generator, **options)
        return lambda field, target: loss(field, target, data.transitions(rows, generator)).total

    return method


def td2_returns(rows: int, **options: Any) -> Method:
    """TD²-CFM that bootstraps at the end of a window."""

    def method(data: Data, generator: torch.Generator) -> Objective:
        loss: Callable[..., Loss] = partial(td2_cfm_loss, gamma=data.gamma, generator=generator, **options)

        def objective(field: VelocityField, target: VelocityField) -> Tensor:
            windows = data.windows[data.rows(rows, generator)]
            return loss(field, target, n_step(windows, None, data.gamma, generator=generator)).total

        return objective

    return method


def td2_particles(rows: int) -> Method:
    """TD²-CFM whose bootstrap points persist."""

    def method(data: Data, generator: torch.Generator) -> Objective:
        particles = Particles(rows, 2, 2, steps=10, time=LogitNormalTime())
        loss = partial(particles.td2_cfm_loss, gamma=data.gamma, generator=generator)
        return lambda field, target: loss(field, target, data.transitions(rows, generator)).total

    return method


def monte_carlo(rows: int) -> Method:
    """MC-CFM on exact futures."""

    def method(data: Data, generator: torch.Generator) -> Objective:
        def objective(field: VelocityField, target: VelocityField) -> Tensor:
            i = data.rows(rows, generator)
            state, future = data.state[i], data.future[i]
            return mc_cfm_loss(field, Transitions(state, None, future, None), future, generator=generator).total

        return objective

    return method


@dataclass(frozen=True)
class Recipe:
    """A way to train for any number of steps.

    Arguments:
        method: What gives the loss of a step.
        setting: The method's own settings, in words.
        steps: The number of steps of the first run.
        lr: The learning rate after the warm-up, from where it falls to zero by a cosine.
        eta: The step of the target towards the network, of Polyak's average, where it is constant.
    """

    method: Method
    setting: str
    steps: int
    lr: float
    eta: float | None = None

    def ema_step(self, gamma: float, steps: int) -> float:
        """Return `eta`, or what lets the target forget its start in a run: it lags by 1 / (eta (1 - gamma)) steps."""
        return 5 / ((1 - gamma) * steps) if self.eta is None else self.eta


MONTE_CARLO, PUBLISHED = "MC-CFM", "TD², as published"
FAIR = {3e-3: "TD², fair baseline", 6e-3: "TD², fair baseline, few steps"}
OURS = {3e-3: "TD², ours", 6e-3: "TD², ours, few steps"}
"""The same learning rate, times and target as the baseline of the same key."""
RETURNS = "TD², returns of 5 steps"
"""What on-policy data allow; its target follows more slowly than that of the baseline with its learning rate."""

QUICK: dict[str, Any] = {"steps": 2, "time": LogitNormalTime()}

RECIPES: dict[str, Recipe] = {
    MONTE_CARLO: Recipe(monte_carlo(256), "256 rows, uniform t", 3_600, 3e-3, 0.1),
    PUBLISHED: Recipe(td2(256, steps=10), "256 + 256 rows, K=10, uniform t", 2_400, 1e-3),
    FAIR[3e-3]: Recipe(td2(256, steps=10, time=LogitNormalTime()), "256 + 256, K=10, logit-normal", 1_600, 3e-3, 0.1),
    OURS[3e-3]: Recipe(td2(128, **QUICK), "128 + 128, K=2, logit-normal", 1_600, 3e-3, 0.1),
    FAIR[6e-3]: Recipe(td2(256, steps=10, time=LogitNormalTime()), "256 + 256, K=10, logit-normal", 600, 6e-3, 0.3),
    OURS[6e-3]: Recipe(td2(128, **QUICK), "128 + 128, K=2, logit-normal", 800, 6e-3, 0.3),
    "TD², for comparisons": Recipe(td2(128, steps=5), "128 + 128, K=5, uniform", 1_600, 3e-3, 0.1),
    RETURNS: Recipe(td2_returns(128, **QUICK), "128 + 128, K=2, logit-normal", 600, 6e-3, 0.1),
    "TD², particles": Recipe(td2_particles(128), "128 + 128, 10 points a path, logit-normal", 2_400, 3e-3, 0.1),
}


def training(recipe: Recipe, steps: int, data: Data, seed: int) -> tuple[VelocityField, Callable[[], None]]:
    """Return the average of a new 3×128 network, and a function that takes the next of so many steps."""
    generator = torch.Generator().manual_seed(seed)
    field = MLPField(2, (128,) * 3, cond_dim=2, frequencies=8, generator=generator)
    average = copy.deepcopy(field).requires_grad_(False)
    optimizer = torch.optim.Adam(field.parameters(), recipe.lr, fused=True)
    objective, ema_step = recipe.method(data, generator), recipe.ema_step(data.gamma, steps)
    order = iter(range(steps))

    def step() -> None:
        i = next(order)
        warm = min(1.0, (i + 1) / (WARMUP + 1))
        optimizer.param_groups[0]["lr"] = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * i / steps))
        optimizer.zero_grad()
        objective(field, average).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        polyak_update(average, field, ema_step)

    return average, step


@dataclass(frozen=True)
class Run:
    """The error after so many steps."""

    steps: int
    error: float


def train(recipe: Recipe, steps: int, data: Data, seed: int) -> Run:
    """Train and evaluate the average."""
    average, step = training(recipe, steps, data, seed)
    for _ in range(steps):
        step()
    return Run(steps, error(average, data.gamma))


def step_seconds(data: Data, rounds: int) -> dict[str, float]:
    """Return the CPU seconds of a step of every recipe: the 15 % quantile of blocks of steps, in turn.

    What disturbs the machine makes a step slower, never quicker, and disturbs all recipes alike.
    """
    steps = {name: training(recipe, rounds * BLOCK, data, seed=0)[1] for name, recipe in RECIPES.items()}
    times: dict[str, list[float]] = {name: [] for name in RECIPES}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            for _ in range(BLOCK):
                step()
            times[name].append((time.process_time() - start) / BLOCK)
    return {name: sorted(t)[round(0.15 * (rounds - 1))] for name, t in times.items()}


def bracket(run: Callable[[int], Run], first: int, target: float, longest: int = LONGEST) -> list[Run]:
    """Return two runs, one twice as long as the other, of which only the longer one reaches the target.

    Steps are halved or doubled until there are such two, or until there would be too few or too many of them.

    >>> [run.steps for run in bracket(lambda steps: Run(steps, 100 / steps), 800, target=0.3)]
    [200, 400]
    """
    runs = [run(first)]
    reached = runs[0].error <= target
    while SHORTEST <= (steps := runs[-1].steps // 2 if reached else runs[-1].steps * 2) <= longest:
        runs.append(run(steps))
        if (runs[-1].error <= target) != reached:
            break
    return sorted(runs[-2:], key=lambda run: run.steps)


@dataclass(frozen=True)
class Cost:
    """What a seed needs to reach the target; where `unreached`, the steps of its longest run, which does not.

    Arguments:
        runs: The runs that enclose the target.
        steps: The number of steps.
        seconds: The CPU seconds that they take.
        unreached: Whether these are lower bounds.
    """

    runs: list[Run]
    steps: float
    seconds: float
    unreached: bool = False


def cost(runs: list[Run], target: float, step: float) -> Cost:
    """Return what it takes to the target, by a power law between two runs, if a step takes `step` seconds.

    >>> round(cost([Run(200, 0.4), Run(800, 0.1)], target=0.2, step=0.001).steps)
    400
    """
    first, last = runs[0], runs[-1]
    steps = float(last.steps)
    if first.error > target > last.error:
        share = math.log(first.error / target) / math.log(first.error / last.error)
        steps = first.steps * (last.steps / first.steps) ** share
    return Cost(runs, steps, steps * step, unreached=last.error > target)


def ratio(slow: Sequence[Cost], fast: Sequence[Cost]) -> Ratio | None:
    """Return how many times the seconds of `fast` those of `slow` are, None if `fast` does not reach the target.

    The geometric mean over the seeds, with its 95 % t interval; a lower bound where `slow` does not reach it.
    """
    if any(c.unreached for c in fast):
        return None
    mean, low, high = paired_ratio([s.seconds for s in slow], [f.seconds for f in fast])[:3]
    return Ratio(mean, low, high, at_least=any(c.unreached for c in slow))


def benchmark_td_speed(quick: bool) -> Result:
    """Compare the CPU time that TD²-CFM takes to the target, by recipes, of which some are published or plain."""
    rows: list[dict[str, Cell]] = []
    claims: list[Claim] = []
    notes = [
        f"One thread. A spiral in the plane, {ROWS:,} independent transitions of the policy, a 3×128 network. The "
        f"error is the exact earth mover's distance of {SAMPLES} samples from the truth in closed form, averaged over "
        f"{STARTS} fixed starts. The target is {TOLERANCE} × the error of MC-CFM, which is given exact samples of the "
        "successor measure, one for each of the states: no temporal difference method has such data.",
        "Each number of steps is a run of its own, with its own warm-up and cosine; the steps to the target are "
        "interpolated between two runs, one half as long as the other, of which one reaches it. The seconds are CPU "
        f"seconds, those of a step the 15 % quantile of blocks of {BLOCK} steps, all recipes in turn, data included.",
        "Ratios are geometric means over seeds, paired, with a 95 % t interval. Recipes and numbers of steps were "
        "chosen on other seeds.",
    ]
    for gamma in GAMMAS[:1] if quick else GAMMAS:
        costs, step, target = _costs(gamma, quick)
        notes.append(f"gamma {gamma}: target {target:.4f}; two exact samples are {floor(gamma):.4f} apart.")
        baselines = {"published": costs[PUBLISHED], "fair": costs[FAIR[3e-3]], "fair, few steps": costs[FAIR[6e-3]]}
        for name in RECIPES:
            rows.append(_row(gamma, name, step[name], costs[name], baselines))
        if quick:
            continue
        for ours, fair in (*((OURS[lr], FAIR[lr]) for lr in OURS), (RETURNS, FAIR[6e-3])):
            for baseline, wanted in ((PUBLISHED, 10.0), (fair, 2.5)):
                if (found := ratio(costs[baseline], costs[ours])) is not None:
                    claims.append(Claim(f"CPU time of {baseline}, over that of {ours}, gamma {gamma}", found, wanted))
    return Result("Temporal difference flows to equal error", rows, claims, notes)


def _costs(gamma: float, quick: bool) -> tuple[dict[str, list[Cost]], dict[str, float], float]:
    """Return each recipe's cost by seed and seconds a step, and the target; `quick` takes a seed and fewer steps."""
    seeds, part = (SEEDS[:1], 8) if quick else (SEEDS, 1)
    data = {seed: draw(gamma, seed) for seed in seeds}
    first = {name: recipe.steps // part for name, recipe in RECIPES.items()}

    def run(name: str, seed: int) -> Callable[[int], Run]:
        return lambda steps: train(RECIPES[name], steps, data[seed], seed)

    step = step_seconds(data[seeds[0]], rounds=3 if quick else 21)
    best = [run(MONTE_CARLO, seed)(first[MONTE_CARLO]) for seed in seeds]
    target = TOLERANCE * statistics.fmean(b.error for b in best)
    costs = {MONTE_CARLO: [cost([b], target, step[MONTE_CARLO]) for b in best]}
    costs |= {name: [] for name in RECIPES if name != MONTE_CARLO}
    for name in list(RECIPES)[1:]:
        for seed in seeds:
            runs = bracket(run(name, seed), first[name], target, longest=first[name] if quick else LONGEST)
            costs[name].append(cost(runs, target, step[name]))
    return costs, step, target


def floor(gamma: float) -> float:
    """Return the error of exact samples."""
    starts, exact = truth(gamma)
    again = spiral().successor(starts, None, gamma).sample(SAMPLES, generator=torch.Generator().manual_seed(5))
    return statistics.fmean(float(emd(again[:, i], exact[:, i])) for i in range(STARTS))


def _row(
    gamma: float, name: str, step: float, costs: Sequence[Cost], baselines: dict[str, list[Cost]]
) -> dict[str, Cell]:
    recipe = RECIPES[name]
    errors: dict[int, list[float]] = {}
    for run in (run for c in costs for run in c.runs):
        errors.setdefault(run.steps, []).append(run.error)
    bound = "> " * any(c.unreached for c in costs)
    row: dict[str, Cell] = {
        "gamma": gamma,
        "recipe": name,
        "setting": recipe.setting,
        "lr": f"{recipe.lr:g}",
        "eta": "by length" if recipe.eta is None else recipe.eta,
        "ms a step": 1e3 * step,
        "mean error at steps": ", ".join(f"{statistics.fmean(e):.3f} at {n}" for n, e in sorted(errors.items())),
        "steps to target, by seed": ", ".join("> " * c.unreached + f"{c.steps:.0f}" for c in costs),
        "CPU s to target": f"{bound}{statistics.geometric_mean(c.seconds for c in costs):.3g}",
    }
    for label, baseline in baselines.items():
        plain = name in (MONTE_CARLO, PUBLISHED) or baseline is costs
        found = None if plain else ratio(baseline, costs)
        row[f"{label} / this"] = None if found is None else str(found)
    return row
