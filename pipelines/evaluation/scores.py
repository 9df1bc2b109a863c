"""What is measured of successor models: numbers at each start state, their means, and intervals over seeds."""

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
from pipelines.environments import Array, Environment
from pipelines.evaluation.truth import DIVERGED, Starts, rewards


@dataclass(frozen=True)
class SampleScore:
    """Compares samples (n, starts, d) with the truth at each start.

    Attributes:
        truth: true samples, (n, starts, d).
        environment, reward: whose reward of that name is valued.
        value: the true value at each start, (starts,).
    """

    truth: Tensor
    environment: Environment
    reward: str
    value: Array
    gamma: float

    def __call__(self, x: Tensor) -> dict[str, Array]:
        """EMD and value at each start; NaN where a sample is not finite."""
        emd = [_emd(x[:, i], self.truth[:, i]) for i in range(x.shape[1])]
        value = rewards(self.environment, self.reward, x).mean(0) / (1 - self.gamma)
        error = (value - self.value) ** 2
        return {"emd": np.array(emd), "value": value, "true_value": self.value, "squared_value_error": error}


def sensitivity(
    mean: Callable[[Starts], Tensor],
    true_mean: Callable[[Starts], Tensor],
    start: Starts,
    exchanged: Mapping[str, Starts],
) -> dict[str, float]:
    """How far a model follows the truth when only the state, or only the action, is exchanged.

    The slope of the model's shift of the mean against the true one, through 0, over all starts: 0 is a model that
    ignores what was exchanged, 1 the truth. Of a distance between samples little but their noise would be seen, as an
    action moves the future by less than finite samples are apart.

    Arguments:
        mean, true_mean: (starts, d) at any starts; that of a model always from the same noise, which then cancels.
        exchanged: the first starts again, with something exchanged. What does not move the truth is left out.
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


def likelihood(fine: HorizonModel, coarse: HorizonModel, x: Tensor, start: Starts) -> dict[str, Array]:
    """NLL per dimension of true samples (n, starts, d), and what doubling the solver's step changes in it."""
    n, count, dims = x.shape
    state, action = start.state.repeat(n, 1), start.action.repeat(n, 1)
    try:
        with torch.no_grad():
            values = [m.log_prob(x.flatten(0, 1), state, action).double().reshape(n, count) for m in (fine, coarse)]
    except SolverError:  # of a diverged model
        return {"nll": np.full(count, np.nan)}
    error = (values[0] - values[1]).square().mean(0).sqrt()
    return {
        "nll": (-values[0].mean(0) / dims).cpu().numpy(),
        "nll_solver_error": (error / dims).cpu().numpy(),
    }


def means(values: Mapping[str, Array]) -> dict[str, float]:
    """The numbers of one seed: means over start states, and the EMD of the worst one."""
    numbers = {
        "emd": values["emd"].mean(),
        "emd_worst": values["emd"].max(),
        "mse_v": values["squared_value_error"].mean(),
        "value_bias": (values["value"] - values["true_value"]).mean(),
        **{name: values[name].mean() for name in ("nll", "nll_solver_error") if name in values},
    }
    return {name: float(number) for name, number in numbers.items()}


def over_seeds(seeds: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """The numbers of a method from those of its seeds: means with 95 % t intervals, and each seed's own.

    `outside` is the largest share of any seed. The method has `diverged` if that is too large, or if it has no EMD.
    """
    result: dict[str, Any] = {"seeds": len(seeds)}
    for name in dict.fromkeys(name for numbers in seeds.values() for name in numbers):
        each = [numbers.get(name, math.nan) for numbers in seeds.values()]
        mean, low, high, n = t_interval(each)
        result[name] = max(each) if name == "outside" else mean
        if n > 1 and name != "outside":
            result |= {f"{name}_low": low, f"{name}_high": high}
        result |= {metric_keys.seed_key(name, seed): value for seed, value in zip(seeds, each, strict=True)}
    result["diverged"] = result["outside"] > DIVERGED or not math.isfinite(result["emd"])
    return result


def table(method: str, seed: int, values: Mapping[str, Array]) -> pd.DataFrame:
    """One row a start state."""
    rows = pd.DataFrame(values)
    return rows.assign(method=method, seed=seed, start=range(len(rows)))


def _emd(x: Tensor, y: Tensor) -> float:
    return float(metrics.emd(x, y)) if x.isfinite().all() and y.isfinite().all() else math.nan
