"""Returns of planning among the policies of a family: Temporal Difference Flows, Table 15."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from flowmatch_core.intervals import ONE_SIDED, ratio, t_interval
from pipelines.base import metric_keys
from pipelines.config.params import CandidateLaw, Params
from pipelines.reporting.tables import Cells, Table, between, physics_steps, seeds_note

LAWS: tuple[str, ...] = get_args(CandidateLaw)
SINGLE = "single"

PUBLISHED: Mapping[str, tuple[str, str, str]] = {
    SINGLE: ("472.5 (FB)", "472.5 (FB)", "472.5 (FB)"),
    "td_dd": ("569", "600", "538"),
    "td2_dd": ("764", "806", "789"),
    "td_cfm": ("625", "672", "696"),
    "td_cfm_coupled": ("801", "812", "808"),
    "td2_cfm": ("790", "814", "801"),
}
"""Mean returns of Table 15 on the Maze, by method, for the laws `LAWS`."""


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per environment, task and method, and one per method for the mean over tasks."""
    import pandas as pd

    rows = [row for name in params.plans for row in _rows(params, name, metrics[f"plans/{name}"])]
    notes = (
        "Sum of rewards along an episode, in units of physics steps in the maze; means over episodes, then over seeds "
        "with the 95 % t interval. Random, local and train: laws of the candidates' w, uniform between its bounds, "
        "around w_r, and that of the training.",
        "Best single policy: the policy of the family with the greatest true return (w_r), which a zero-shot choice "
        "does not reach. GPI by simulation: the same plans with the true values. Scripted policy: that of the task.",
        "Over single: ratio of the mean returns with law train (or the last one), with its 90 % interval over seeds, "
        "where all returns are positive.",
        "The maze's policies are scripted ones to goals, in place of Forward-Backward. The paper's numbers are means "
        "over its own tasks and 1000 steps, of policies of Forward-Backward (FB) and 256 candidates; FB with GPI by "
        "its own values has -0.6, 241 and -18.",
        seeds_note(params.successor, {name: params.environments[name] for name in params.plans}),
    )
    return Table("planning", "Planning", pd.DataFrame(rows), notes if rows else ())


def seeds_of(cell: Mapping[str, Any], law: str, unit: float) -> dict[int, float]:
    """Return the returns of a method by seed; one that draws no candidates has the same for all laws."""
    found = metric_keys.by_seed(cell, f"return_{law}") or metric_keys.by_seed(cell, "return")
    return {seed: unit * value for seed, value in found.items()}


def _rows(params: Params, name: str, found: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    settings, entry = params.plans[name], params.environments[name]
    unit, laws = float(physics_steps(entry)), [law for law in LAWS if law in settings.laws]
    tasks = {
        task: {method: {law: seeds_of(cell, law, unit) for law in laws} for method, cell in found[task].items()}
        for task in settings.rewards
    }
    everywhere = [m for m in tasks[settings.rewards[0]] if all(m in methods for methods in tasks.values())]
    if len(tasks) > 1:
        tasks["mean"] = {m: {law: _mean([task[m][law] for task in tasks.values()]) for law in laws} for m in everywhere}
    for task, methods in tasks.items():
        for method, returns in methods.items():
            row: dict[str, Any] = {"environment": name, "task": task, "method": method}
            row |= {law: between(*t_interval(list(returns[law].values()))[:3]) for law in laws}
            pair = returns[laws[-1]], methods[SINGLE][laws[-1]]
            positive = method != SINGLE and min(*pair[0].values(), *pair[1].values()) > 0
            row["over single"] = between(*ratio(*pair, ONE_SIDED)[:3]) if positive else None
            published = PUBLISHED.get(method) if task == "mean" and entry.kind == "maze" else None
            row |= {f"paper: {law}": published[LAWS.index(law)] if published else None for law in laws}
            yield row


def _mean(each: list[dict[int, float]]) -> dict[int, float]:
    """Return the mean over tasks by seed."""
    return {seed: sum(found[seed] for found in each) / len(each) for seed in each[0]}
