"""Numbers of solver steps in training and in sampling: Temporal Difference Flows, Table 10."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.config.params import EnvironmentEntry, Params
from pipelines.reporting.tables import Cells, Table, interval, papers_task, seeds_note

# The paper's EMD and MSE(V) of TD²-CFM on the loop by number of steps.
PUBLISHED = {2: (0.076, 379.5), 5: (0.036, 23.8), 10: (0.025, 7.7), 20: (0.0218, 4.4)}


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per environment, method and number of steps: those varied in training, then in sampling."""
    import pandas as pd

    rows = []
    for environment, entry in params.environments.items():
        loop, sampled = papers_task(entry) == "loop", params.successor.sample.steps
        found = [("training", name, steps, sampled, "") for steps, name in sorted(_trained(params, entry))]
        for name in filter(entry.runs, ("td_cfm", "td2_cfm")):
            if name in params.successor.methods:
                steps = _steps(params, entry, name)
                listed = params.successor.evaluate.solver_steps.get(environment, ())
                found += [("sampling", name, steps, k, f"_steps{k}") for k in listed]
        for varied, method, training, sampling, suffix in found:
            cell = metrics[environment].get(method, {})
            td2 = params.successor.methods[method].loss.name == "td2_cfm"
            paper = PUBLISHED.get(training if varied == "training" else sampling) if loop and td2 else None
            rows.append(
                {
                    "environment": environment,
                    "method": method,
                    "varied": varied,
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
        "sampling); mean over seeds with its 95 % t interval. Samples of one seed start from the same noise at all "
        "numbers of steps.",
        "The paper varies the steps and does not say which of the two; its numbers are for its own policy and budget.",
        seeds_note(params.successor, params.environments),
    )
    return Table("ode_steps", "Solver steps", pd.DataFrame(rows), notes)


def _steps(params: Params, entry: EnvironmentEntry, method: str) -> int:
    return params.successor.fit_for(entry, params.successor.methods[method]).ode_steps


def _trained(params: Params, entry: EnvironmentEntry) -> list[tuple[int, str]]:
    """Return the steps and names of the methods that run here and differ from another one only in `ode_steps`."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for name, method in params.successor.methods.items():
        if entry.runs(name):
            fit = params.successor.fit_for(entry, method).model_dump(mode="json")
            steps = fit.pop("ode_steps")
            groups.setdefault(f"{method.loss!r} {method.path!r} {fit}", []).append((steps, name))
    return [pair for group in groups.values() if len(dict(group)) > 1 for pair in group]
