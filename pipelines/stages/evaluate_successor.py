"""Score every successor model of an environment at the same start states, each number beside its sampling floor."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipelines import members, store
from pipelines.stage import DATA, Stage, run

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

    from flowmatch_core.successor import HorizonModel
    from pipelines.starts import Starts


def main(stage: Stage, environment: str) -> None:
    import numpy as np
    import pandas as pd
    import torch

    from flowmatch_core import metrics
    from pipelines import horizon, starts, training

    successor, settings = stage.params.successor, stage.params.successor.evaluate
    entry = stage.params.environments[environment]
    device = training.use(stage.params)
    built = members.load("pipelines.environments", entry.kind).build(entry.settings())
    oracle = built.oracle()
    mdp = None if oracle is None else oracle.to(device, torch.float32)
    start = starts.read(DATA / "transitions" / environment, device)
    count, dims = start.state.shape
    size = successor.sample.samples
    generator = stage.generator("evaluate", environment, device=device)
    truth, other = (starts.truth(start, mdp, entry.gamma, size, generator) for _ in range(2))
    scored = truth[: settings.likelihood_rows]

    def reward(x: torch.Tensor) -> np.ndarray:
        """Of states (..., d), the reward that the environment's entry names."""
        flat = x.reshape(-1, dims).double().cpu().numpy()
        values: np.ndarray = built.rewards(flat)[entry.reward]
        return values.reshape(x.shape[:-1])

    def at_starts(x: torch.Tensor) -> dict[str, np.ndarray]:
        """EMD to the truth and value, at each start, of samples (n, starts, d)."""
        emd = [float(metrics.emd(x[:, i], truth[:, i])) for i in range(count)]
        return {"emd": np.array(emd), "value": reward(x).mean(0) / (1 - entry.gamma)}

    state, action = (t.double().cpu().numpy() for t in (start.state, start.action))
    exact = built.exact_values(state, action, entry.gamma).get(entry.reward)
    if exact is None:
        rewards = reward(start.states[:, 1:])
        exact = (rewards * entry.gamma ** np.arange(rewards.shape[1])).sum(1)

    cells = [_cell("floor", 0, {**at_starts(other), "true_value": exact})]
    if mdp is not None:
        log_prob = mdp.successor(start.state, start.action, entry.gamma).log_prob(scored)
        cells[0]["nll"] = -log_prob.double().mean(0).cpu().numpy() / dims
    skipped: dict[str, str] = {}
    for method, choice in successor.methods.items():
        for seed in successor.seeds:
            folder = DATA / "models" / environment / method
            fine, coarse = (
                horizon.horizon_model(folder, seed, entry, choice, device, settings.solver, steps)
                for steps in (settings.steps, max(1, settings.steps // 2))
            )
            if isinstance(fine, str) or isinstance(coarse, str):
                skipped[method] = str(fine)
                break
            table = store.read_table(DATA / "samples" / environment / f"{method}.parquet", [*start.names, "seed"])
            x = torch.tensor(table.loc[table["seed"] == seed, start.names].to_numpy(), device=device)
            likelihood = _likelihood(fine, coarse, scored, start) if fine.has_density else {}
            values = at_starts(x.reshape(size, count, dims))
            cells.append(_cell(method, seed, {**values, "true_value": exact, **likelihood}))
            stage.log(f"{method} seed {seed}: EMD {cells[-1]['emd'].mean():.4f} (floor {cells[0]['emd'].mean():.4f})")
    table = pd.concat(cells, ignore_index=True)
    table["squared_value_error"] = (table["value"] - table["true_value"]) ** 2
    with stage.output(DATA / "evaluations" / environment) as folder:
        store.write_table(folder / "cells.parquet", table)
        store.write_table(folder / "truth.parquet", _samples(truth, start.names))
    summary = {method: _summary(table[table["method"] == method]) for method in table["method"].unique()}
    for method, numbers in summary.items():
        numbers["emd_over_floor"] = numbers["emd"] / summary["floor"]["emd"]
        stage.metrics({f"{method}.{name}": number for name, number in numbers.items()})
    with stage.output(DATA / "metrics" / f"{environment}.json") as temporary:
        store.write_json(temporary, {**summary, **{m: {"skipped": reason} for m, reason in skipped.items()}})


def _samples(x: torch.Tensor, names: list[str]) -> pd.DataFrame:
    """Samples (n, starts, d) as rows."""
    import numpy as np
    import pandas as pd

    rows = pd.DataFrame(x.flatten(0, 1).cpu().numpy(), columns=names)
    return rows.assign(start=np.tile(np.arange(x.shape[1]), x.shape[0]))


def _cell(method: str, seed: int, values: dict[str, np.ndarray]) -> pd.DataFrame:
    """One row a start state."""
    import pandas as pd

    table = pd.DataFrame(values)
    return table.assign(method=method, seed=seed, start=range(len(table)))


def _likelihood(fine: HorizonModel, coarse: HorizonModel, x: torch.Tensor, start: Starts) -> dict[str, np.ndarray]:
    """NLL per dimension of true samples (n, starts, d), and what doubling the solver's step changes in it."""
    import torch

    n, count, dims = x.shape
    state, action = start.state.repeat(n, 1), start.action.repeat(n, 1)
    with torch.no_grad():
        values = [m.log_prob(x.flatten(0, 1), state, action).double().reshape(n, count) for m in (fine, coarse)]
    error = (values[0] - values[1]).square().mean(0).sqrt()
    return {
        "nll": (-values[0].mean(0) / dims).cpu().numpy(),
        "nll_solver_error": (error / dims).cpu().numpy(),
    }


def _summary(table: pd.DataFrame) -> dict[str, float]:
    """Means with 95 % t intervals over start states, each start averaged over the seeds."""
    from flowmatch_core.statistics import t_interval

    summary: dict[str, float] = {}
    starts = table.drop(columns=["method"]).groupby("start").mean()
    for column, name in (("emd", "emd"), ("squared_value_error", "mse_v"), ("nll", "nll")):
        if column not in starts or starts[column].isna().any():
            continue
        mean, low, high, _ = t_interval(starts[column].to_numpy())
        summary |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    if "nll_solver_error" in starts:
        error = float(starts["nll_solver_error"].mean())
        summary |= {"nll_solver_error": error} if math.isfinite(error) else {}
    summary["value_bias"] = float((starts["value"] - starts["true_value"]).mean())
    if table["seed"].nunique() > 1:
        for seed, group in table.groupby("seed"):
            summary |= {f"emd_seed{seed}": float(group["emd"].mean())}
            summary |= {f"mse_v_seed{seed}": float(group["squared_value_error"].mean())}
    return summary


if __name__ == "__main__":
    run(main)
