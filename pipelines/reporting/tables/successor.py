"""Successor models: Temporal Difference Flows (Farebrother et al., ICML 2025, arXiv 2503.09817), Table 11, Maze."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.config.params import EnvironmentEntry, Params, SuccessorFit
from pipelines.config.yaml_files import merge
from pipelines.reporting.tables import HOLE, Cells, Table, interval, papers_task, seeds_note, text
from pipelines.reporting.tables.domains import PUBLISHED as DOMAINS

# Description of a simulator's behaviours.
BEHAVIOURS = {
    "uniform": "uniform states and actions",
    "random": "episodes of random actions",
    "policy": "episodes of the policy",
    "mixed": "uniform states and actions and, half of them, states that the policy visits",
}
# EMD, NLL per dimension, MSE(V) of the paper's Table 11 by task and method; GAN and VAE have no likelihood.
PUBLISHED: dict[str, dict[str, tuple[float | None, ...]]] = {
    "loop": {
        "td_cfm": (0.071, 0.748, 677.0),
        "td_cfm_coupled": (0.025, -0.703, 10.9),
        "td2_cfm": (0.020, -0.674, 1.75),
        "td_dd": (0.189, 3.46, 4718.0),
        "td2_dd": (0.031, 0.577, 4.27),
        "gan": (0.225, None, 2276.0),
        "vae": (0.456, None, 4011.0),
    },
    "reach_bottom_left": {
        "td_cfm": (0.059, 0.520, 224.0),
        "td_cfm_coupled": (0.024, -0.729, 16.6),
        "td2_cfm": (0.020, -0.984, 10.4),
        "td_dd": (0.139, 2.81, 321.0),
        "td2_dd": (0.025, 0.980, 5.76),
        "gan": (0.269, None, 1200.0),
        "vae": (0.313, None, 981.0),
    },
    "reach_bottom_right": {
        "td_cfm": (0.066, 0.549, 166.0),
        "td_cfm_coupled": (0.023, -0.759, 11.0),
        "td2_cfm": (0.020, -0.855, 4.84),
        "td_dd": (0.174, 3.27, 231.0),
        "td2_dd": (0.025, 0.640, 4.82),
        "gan": (0.170, None, 417.0),
        "vae": (0.505, None, 489.0),
    },
    "reach_top_left": {
        "td_cfm": (0.055, 0.454, 473.0),
        "td_cfm_coupled": (0.021, -0.517, 14.9),
        "td2_cfm": (0.025, -0.797, 23.5),
        "td_dd": (0.102, 2.41, 594.0),
        "td2_dd": (0.033, 0.863, 34.4),
        "gan": (0.132, None, 1350.0),
        "vae": (0.321, None, 2404.0),
    },
    "reach_top_right": {
        "td_cfm": (0.059, 0.501, 238.0),
        "td_cfm_coupled": (0.020, -0.771, 6.2),
        "td2_cfm": (0.018, -0.903, 3.21),
        "td_dd": (0.141, 2.92, 363.0),
        "td2_dd": (0.023, 0.743, 6.38),
        "gan": (0.218, None, 1043.0),
        "vae": (0.453, None, 1224.0),
    },
}


_TRUTHS = {
    "held-out episodes": "Truth held-out episodes: the logged futures of start states in episodes that are no training "
    "data. Each is one draw where the process is random; its floor is another logged future, of the training state and "
    "action nearest to the start, so that a good model of a random process is below it. V of the truth is the logged "
    "return; of samples, a logged reward is that of the training row with the nearest next state. A terminal state and "
    "its reward go on for ever, as its mass in the measure does.",
    "no reference": "No reference: the log is of another policy, so that no future of this one is known. Bellman "
    "residual: EMD between samples of m(s, a) and of (1 - γ) δ(s') + γ m(s', π(s')) at held-out transitions, by its "
    "floor, two draws of the latter. It is small for a model that agrees with itself, which is necessary and not "
    "sufficient.",
}


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per environment and method that it runs, below the floor of the environment."""
    import pandas as pd

    rows, skipped, without = list[dict[str, Any]](), list[str](), list[str]()
    truths = {name: provenance[name]["truth"] for name in params.environments}
    for environment, entry in params.environments.items():
        published = _published(entry)
        for method in ["floor", *filter(entry.runs, params.successor.methods)]:
            cell = metrics[environment].get(method, {"skipped": "not evaluated"})
            if "skipped" in cell:
                skipped.append(f"{environment}, {method}: left out, {cell['skipped']}.")
            if not cell.get("has_density", True) and method not in without:
                without.append(method)
            paper = published.get(method)
            rows.append(
                {
                    "environment": environment,
                    "method": method,
                    "EMD": interval(cell, "emd"),
                    "EMD / floor": cell.get("emd_over_floor"),
                    "NLL / dim": interval(cell, "nll"),
                    "solver error": cell.get("nll_solver_error"),
                    "MSE(V)": interval(cell, "mse_v"),
                    "V bias": cell.get("value_bias"),
                    "sensitivity s, a": _sensitivity(cell),
                    **({"Bellman residual / floor": _residual(cell)} if "no reference" in truths.values() else {}),
                    "outside": "diverged" if cell.get("diverged") else _percent(cell.get("outside")),
                    "truth": truths[environment],
                    "paper: EMD, NLL/dim, MSE(V)": ", ".join(map(_plain, paper)) if paper else None,
                }
            )
    fit, sample = params.successor.fit, params.successor.sample
    evaluate = params.successor.evaluate
    notes = [
        "Mean over start states, then over seeds, with its 95 % t interval where there are several seeds. It covers "
        "initialisation and batches; data set and start states are the same for all seeds. "
        f"EMD (exact, Euclidean, raw units, for a log standard deviations) and V from {sample.samples} samples each. "
        "The floor compares true samples with true samples, fresh ones for each seed; its NLL is the exact density's, "
        "where there is one.",
        f"Solver error: the rms change of a log-density, per dimension, when the {evaluate.steps} steps of "
        f"{evaluate.solver} are twice as long.",
        "Sensitivity: how far the mean of the samples follows the true mean when only the state, or only the action, "
        "is exchanged (the slope over start states): 0 is a model that ignores it, 1 the truth. MC-CFM and n-step "
        "returns have seen the policy's actions alone, and their EMD at the policy's actions does not show it.",
        "Outside: the largest share over seeds of samples beyond the range of the data, widened by its width on each "
        "side. Above 1 % in the worst single seed the model has diverged, and its numbers are no measure of it.",
        *([f"{', '.join(without)}: no NLL, as these models have no density."] if without else []),
        *(_TRUTHS[truth] for truth in _TRUTHS if truth in truths.values()),
        *_differences(params, provenance),
        *(f"{name}: {provenance[name]['fidelity']}; {provenance[name]['source']}" for name in params.environments),
        *(f"{name}: {message}." for name in params.environments for message in provenance[name].get("messages", ())),
        f"Training: {fit.steps} steps of {fit.batch} rows, lr {fit.lr:g}, target step {fit.ema_step:g}, "
        f"{fit.ode_solver} with {fit.ode_steps} steps, network {fit.network}, where not stated.",
        *skipped,
        seeds_note(params.successor, params.environments),
    ]
    return Table("successor", "Successor measures", pd.DataFrame(rows), tuple(notes))


def _published(entry: EnvironmentEntry) -> dict[str, tuple[float | None, ...]]:
    """Return the paper's numbers of a task, if the horizon is comparable."""
    return PUBLISHED.get(papers_task(entry), {})


def _plain(number: float | None) -> str:
    return HOLE if number is None else f"{number:g}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2g} %"


def _residual(cell: Mapping[str, Any]) -> str | None:
    floor = cell.get("bellman_residual_floor")
    return None if floor is None else f"{interval(cell, 'bellman_residual')} / {text(floor)}"


def _sensitivity(cell: Mapping[str, Any]) -> str | None:
    pair = [cell.get(f"sensitivity_{name}") for name in ("state", "action")]
    return None if pair == [None, None] else ", ".join(map(text, pair))


def _differences(params: Params, provenance: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield notes on the differences between our settings and the paper's."""
    mazes = {name: entry for name, entry in params.environments.items() if entry.kind == "maze"}
    if mazes:
        yield (
            f"{', '.join(mazes)}: the paper's numbers are for another setting and not comparable in absolute value. "
            "Paper: TD3 policy, 10 M RND transitions, γ = .99 a physics step, U-Net 512, 3 M steps of 1024, 64 starts "
            "× 2048 samples; beside other horizons than its 100 physics steps they are left out."
        )
    for name, entry in params.environments.items():
        fit = SuccessorFit.model_validate(merge(params.successor.fit.model_dump(), entry.fit))
        here = (
            f"network {fit.network}, {fit.steps} steps of {fit.batch}, {provenance[name]['starts']} starts × "
            f"{params.successor.sample.samples} samples."
        )
        count = provenance[name]["rows"]["transitions"]
        behaviour = BEHAVIOURS.get(str(entry.own.get("behaviour", "uniform")), "own states and actions")
        if entry.kind == "maze":
            yield (
                f"{name}: scripted policy, {count} transitions from {behaviour}, γ = {entry.gamma:g} a "
                f"transition of {entry.own.get('action_repeat', 5)} physics steps, {here}"
            )
        elif entry.kind in DOMAINS:
            odds = " with odds of a random action from 0 to 1" * (entry.own.get("behaviour", "mixed") == "mixed")
            yield (
                f"{name}: stored policy, {count} transitions of episodes{odds}, γ = {entry.gamma:g} a transition of "
                f"{entry.own.get('action_repeat', 2)} control steps, {here}"
            )
        elif entry.kind == "linear_gaussian":
            yield f"{name}: not in the paper; its truth is in closed form (γ = {entry.gamma:g})."
        else:
            episodes = f"{made}, " if (made := provenance[name].get("episodes")) else ""
            yield f"{name}: not in the paper; {episodes}{count} transitions, γ = {entry.gamma:g}, {here}"
