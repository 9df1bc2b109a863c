"""Fewer or more solver steps, in training and in sampling: Temporal Difference Flows, Table 10."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.params import Params
from pipelines.tables import Cells, Table, interval, papers_task

# The paper's EMD and MSE(V) of TD²-CFM on the loop by number of steps.
PUBLISHED = {2: (0.076, 379.5), 5: (0.036, 23.8), 10: (0.025, 7.7), 20: (0.0218, 4.4)}


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row an environment, method and number of steps: those that differ in training, then those in sampling."""
    import pandas as pd

    rows = []
    for environment, entry in params.environments.items():
        trained = [(k, m, "", params.successor.sample.steps) for m, k in _trained(params, environment)]
        sampled = [(_steps(params, environment, m), m, f"_steps{k}", k) for m, k in _sampled(params, environment)]
        for which, found in (("training", sorted(trained)), ("sampling", sampled)):
            for training, method, suffix, sampling in found:
                cell = metrics[environment].get(method, {})
                steps = training if which == "training" else sampling
                paper = PUBLISHED.get(steps) if papers_task(entry) == "loop" and _is_td2(params, method) else None
                rows.append(
                    {
                        "environment": environment,
                        "method": method,
                        "varied": which,
                        "training steps": training,
                        "sampling steps": sampling,
                        "EMD": interval(cell, f"emd{suffix}"),
                        "MSE(V)": interval(cell, f"mse_v{suffix}"),
                        "paper: EMD, MSE(V)": ", ".join(f"{x:g}" for x in paper) if paper else None,
                    }
                )
    fit, sample = params.successor.fit, params.successor.sample
    notes = (
        f"Steps of the {fit.ode_solver} solver of one bootstrap target (training) and of one sample ({sample.solver}, "
        f"sampling); mean over seeds {list(params.successor.seeds)} with its 95 % t interval. Samples of one seed "
        "start from the same noise at all numbers of steps.",
        "The paper varies the steps and does not say which of the two; its numbers are for its own policy and budget.",
    )
    return Table("ode_steps", "Solver steps", pd.DataFrame(rows), notes)


def _is_td2(params: Params, method: str) -> bool:
    return params.successor.methods[method].loss.name == "td2_cfm"


def _steps(params: Params, environment: str, method: str) -> int:
    return params.successor.fit_for(params.environments[environment], params.successor.methods[method]).ode_steps


def _trained(params: Params, environment: str) -> list[tuple[str, int]]:
    """Methods that run here and differ from another one in the steps of their targets alone."""
    entry, groups = params.environments[environment], dict[str, list[str]]()
    for name, method in params.successor.methods.items():
        if entry.runs(name):
            fit = params.successor.fit_for(entry, method).model_dump(mode="json")
            key = f"{method.loss!r} {method.path!r} { {k: v for k, v in fit.items() if k != 'ode_steps'} }"
            groups.setdefault(key, []).append(name)
    several = [name for group in groups.values() for name in group]
    counts = {name: _steps(params, environment, name) for name in several}
    return [
        (name, counts[name])
        for group in groups.values()
        if len({counts[member] for member in group}) > 1
        for name in group
    ]


def _sampled(params: Params, environment: str) -> list[tuple[str, int]]:
    """TD-CFM and TD²-CFM, where they run, with every number of steps that the evaluation lists."""
    entry, listed = params.environments[environment], params.successor.evaluate.solver_steps.get(environment, ())
    shown = [name for name in ("td_cfm", "td2_cfm") if name in params.successor.methods and entry.runs(name)]
    return [(name, steps) for name in shown for steps in listed]
