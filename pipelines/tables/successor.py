"""Successor models: Temporal Difference Flows (Farebrother et al., ICML 2025, arXiv 2503.09817), Table 11, Maze."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.params import Environment, Params, SuccessorFit, merge
from pipelines.tables import Cells, Table, interval

# EMD, NLL per dimension, MSE(V) of the paper's Table 11 by task and method.
PUBLISHED = {
    "loop": {
        "td_cfm": (0.071, 0.748, 677.0),
        "td_cfm_coupled": (0.025, -0.703, 10.9),
        "td2_cfm": (0.020, -0.674, 1.75),
    },
    "reach_bottom_left": {
        "td_cfm": (0.059, 0.520, 224.0),
        "td_cfm_coupled": (0.024, -0.729, 16.6),
        "td2_cfm": (0.020, -0.984, 10.4),
    },
    "reach_bottom_right": {
        "td_cfm": (0.066, 0.549, 166.0),
        "td_cfm_coupled": (0.023, -0.759, 11.0),
        "td2_cfm": (0.020, -0.855, 4.84),
    },
    "reach_top_left": {
        "td_cfm": (0.055, 0.454, 473.0),
        "td_cfm_coupled": (0.021, -0.517, 14.9),
        "td2_cfm": (0.025, -0.797, 23.5),
    },
    "reach_top_right": {
        "td_cfm": (0.059, 0.501, 238.0),
        "td_cfm_coupled": (0.020, -0.771, 6.2),
        "td2_cfm": (0.018, -0.903, 3.21),
    },
}


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row an environment and method, under the floor of the environment."""
    import pandas as pd

    rows = []
    skipped = []
    for environment, entry in params.environments.items():
        published = PUBLISHED.get(str(entry.member.get("task")), {}) if entry.kind == "maze" else {}
        for method in ["floor", *params.successor.methods]:
            cell = metrics[environment].get(method, {"skipped": "not evaluated"})
            if "skipped" in cell:
                skipped.append(f"{environment}, {method}: left out, {cell['skipped']}.")
            paper = published.get(method)
            rows.append(
                {
                    "environment": environment,
                    "method": method,
                    "EMD": interval(cell, "emd"),
                    "EMD / floor": cell.get("emd_over_floor"),
                    "NLL / dim": interval(cell, "nll"),
                    "MSE(V)": interval(cell, "mse_v"),
                    "V bias": cell.get("value_bias"),
                    "paper: EMD, NLL/dim, MSE(V)": ", ".join(f"{x:g}" for x in paper) if paper else None,
                }
            )
    fit, sample = params.successor.fit, params.successor.sample
    notes = [
        "Mean over start states with its 95 % t interval; each start is averaged over seeds "
        f"{list(params.successor.seeds)}. EMD (exact, Euclidean, raw units) and V from {sample.samples} samples each. "
        "The floor compares true samples with true samples; its NLL is the exact density's, where there is one.",
        *(_differences(environment, entry, params) for environment, entry in params.environments.items()),
        *(f"{name}: {provenance[name]['fidelity']}; {provenance[name]['source']}" for name in params.environments),
        f"Training: {fit.steps} steps of {fit.batch} rows, lr {fit.lr:g}, target step {fit.ema_step:g}, "
        f"{fit.ode_solver} with {fit.ode_steps} steps, network {fit.network}, where not stated.",
        *skipped,
    ]
    return Table("successor", "Successor measures", pd.DataFrame(rows), tuple(notes))


def _differences(environment: str, entry: Environment, params: Params) -> str:
    """What stands between our numbers and the paper's."""
    if entry.kind != "maze":
        return f"{environment}: not in the paper; its truth is in closed form (γ = {entry.gamma:g})."
    fit = SuccessorFit.model_validate(merge(params.successor.fit.model_dump(), entry.fit))
    repeat = entry.member.get("action_repeat", 1)
    return (
        f"{environment}: the paper's numbers are for another setting and not comparable in absolute value. Paper: TD3 "
        "policy, 10 M RND transitions, γ = .99 a physics step, U-Net 512, 3 M steps of 1024, 64 starts × 2048 samples. "
        f"Here: scripted policy, {entry.transitions} transitions from uniform states and actions, γ = {entry.gamma:g} "
        f"a transition of {repeat} physics steps, network {fit.network}, {fit.steps} steps of "
        f"{fit.batch}, {entry.starts} starts × {params.successor.sample.samples} samples."
    )
