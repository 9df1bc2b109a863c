"""Scores of successor models: values at each start state, their means, and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from flowmatch_core import metrics
from flowmatch_core.intervals import t_interval
from flowmatch_core.solvers import SolverError
from flowmatch_core.successor import HorizonModel
from pipelines.base import metric_keys
from pipelines.environments import Array
from pipelines.evaluation.truth import DIVERGED, Reward, Starts, rewards

BELLMAN = "bellman_residual"
"""Distance between a model and its own one-step bootstrap, in place of the EMD where there is no reference."""


@dataclass(frozen=True)
class SampleScore:
    """A comparison of samples (n, starts, d) with the truth at each start state.

    Attributes:
        truth: True samples, (n, starts, d).
        reward: Reward whose value is compared, or None.
        value: True value at each start state, (starts,); None without a reward.
        gamma: Discount per transition.
        unit: Unit of distances by component, (d,); None for that of the state.
        scale: Another unit, in which distances are reported as well; None for none.
    """

    truth: Tensor
    reward: Reward | None
    value: Array | None
    gamma: float
    unit: Tensor | None = None
    scale: Tensor | None = None

    def __call__(self, x: Tensor) -> dict[str, Array]:
        """Return EMD and value at each start state; NaN where a sample is not finite."""
        found = {"emd": distances(x, self.truth, self.unit)}
        if self.scale is not None:
            found["emd_standardised"] = distances(x, self.truth, self.scale)
        if self.reward is None or self.value is None:
            return found
        value = rewards(self.reward, x).mean(0) / (1 - self.gamma)
        return found | {
            "value": value,
            "true_value": self.value,
            "squared_value_error": (value - self.value) ** 2,
        }


def distances(x: Tensor, y: Tensor, unit: Tensor | None = None) -> Array:
    """Return the EMD of two samples (n, starts, d) at each start state, by component in a unit."""
    x, y = (x, y) if unit is None else (x / unit, y / unit)
    return np.array([emd(x[:, i], y[:, i]) for i in range(x.shape[1])])


def sensitivity(
    mean: Callable[[Starts], Tensor],
    true_mean: Callable[[Starts], Tensor],
    start: Starts,
    exchanged: Mapping[str, Starts],
) -> dict[str, float]:
    """Return how closely a model follows the truth when only the state, or only the action, is replaced.

    It is the slope, through 0, of the model's shift of the mean against the true shift, over all start states: 0 for a
    model that ignores the replacement, 1 for the truth. A distance between samples would mostly measure sampling noise,
    because an action moves the future by less than the distance between finite samples.

    Args:
        mean: Mean of the model's samples at any start states, (starts, d); always from the same noise, which cancels.
        true_mean: True mean at any start states, (starts, d).
        start: Start states.
        exchanged: The first start states, with a replaced state or action. A replacement without effect on the true
            mean is omitted.
    """
    slopes = {}
    if exchanged:
        here = start.first(len(next(iter(exchanged.values())).state))
        before = [m(here).double() for m in (mean, true_mean)]
    for name, there in exchanged.items():
        shift, true_shift = (m(there).double() - x for m, x in zip((mean, true_mean), before, strict=True))
        if true_shift.any():
            slopes[name] = float((shift * true_shift).sum() / true_shift.square().sum())
    return slopes


def likelihood(model: HorizonModel, x: Tensor, start: Starts) -> tuple[dict[str, Array], str | None]:
    """Return the NLL per dimension of true samples (n, starts, d) with its solver error, and a warning sentence.

    The error is the root mean square change when the steps of the solver are twice as long. There is a warning where
    the error of the mean over all samples may exceed its standard error.
    """
    dims = x.shape[-1]
    try:
        with torch.no_grad():
            estimate = model.estimate(x, start.state, start.action)
    except SolverError:  # the model has diverged
        return {"nll": np.full(x.shape[1], np.nan)}, None
    error = estimate.solver_error.double().square().mean(0).sqrt()
    numbers = {
        "nll": (-estimate.log_prob.double().mean(0) / dims).cpu().numpy(),
        "nll_solver_error": (error / dims).cpu().numpy(),
    }
    return numbers, estimate.warning()


def means(values: Mapping[str, Array]) -> dict[str, float]:
    """Return the scores of one seed: means over start states, and the EMD of the worst one."""
    same = ("emd", "emd_standardised", BELLMAN, f"{BELLMAN}_floor", "nll", "nll_solver_error")
    numbers = {name: values[name].mean() for name in same if name in values}
    if "emd" in values:
        numbers["emd_worst"] = values["emd"].max()
    if "squared_value_error" in values:
        numbers |= {
            "mse_v": values["squared_value_error"].mean(),
            "value_bias": (values["value"] - values["true_value"]).mean(),
        }
    return {name: float(number) for name, number in numbers.items()}


def over_seeds(seeds: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Return the scores of a method: means over seeds with 95 % t intervals, and the value of each seed.

    `outside` is the maximum over seeds. The method has `diverged` if it exceeds `DIVERGED`, or if there is no distance.
    """
    result: dict[str, Any] = {"seeds": len(seeds)}
    for name in dict.fromkeys(name for numbers in seeds.values() for name in numbers):
        each = [numbers.get(name, math.nan) for numbers in seeds.values()]
        found = t_interval(each)
        result[name] = max(each) if name == "outside" else found.mean
        if found.n > 1 and name != "outside":
            result |= {f"{name}_low": found.low, f"{name}_high": found.high}
        result |= {metric_keys.seed_key(name, seed): value for seed, value in zip(seeds, each, strict=True)}
    distance = result["emd"] if "emd" in result else result[BELLMAN]
    result["diverged"] = result["outside"] > DIVERGED or not math.isfinite(distance)
    return result


def table(method: str, seed: int, values: Mapping[str, Array]) -> pd.DataFrame:
    """Return the scores with one row per start state."""
    rows = pd.DataFrame(values)
    return rows.assign(method=method, seed=seed, start=range(len(rows)))


def emd(x: Tensor, y: Tensor) -> float:
    """Return the EMD of two samples, NaN where one is not finite."""
    return float(metrics.emd(x, y)) if x.isfinite().all() and y.isfinite().all() else math.nan
