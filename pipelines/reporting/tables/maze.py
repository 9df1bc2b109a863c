"""Means over the Maze's tasks: Temporal Difference Flows, Table 1; the table `successor` is Table 11."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmatch_core.intervals import t_interval
from pipelines.config.params import Params
from pipelines.reporting.labels import label
from pipelines.reporting.tables import Cells, Table, between, numbers_of, seeds_note, tasks_of
from pipelines.reporting.tables.successor import PUBLISHED

BASELINES = ("td_cfm", "td_dd", "gan", "vae")
METRICS = (("emd", "EMD"), ("nll", "NLL / dim"), ("mse_v", "MSE(V)"))


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per method that runs in every task, if there are several; a task's first environment is used."""
    import pandas as pd

    tasks = {task: name for task, name in tasks_of(params).items() if task in PUBLISHED}
    entries = [params.environments[name] for name in tasks.values()]
    everywhere = [m for m in params.successor.methods if all(entry.runs(m) for entry in entries)]
    rows = []
    for method in ["floor", *everywhere] if len(tasks) > 1 else []:
        cells = [metrics[name].get(method, {}) for name in tasks.values()]
        if all("skipped" in cell for cell in cells):
            continue
        row: dict[str, Any] = {"method": method}
        for place, (metric, title) in enumerate(METRICS):
            each = [numbers_of(params, e, method, c, metric) for e, c in zip(entries, cells, strict=True)]
            row[title] = _mean(each)
            paper = [PUBLISHED[task][method][place] for task in tasks] if method in PUBLISHED["loop"] else []
            numbers = [number for number in paper if number is not None]
            row[f"paper: {title}"] = f"{sum(numbers) / len(numbers):.3g}" if numbers else None
        row["diverged in"] = ", ".join(task for task, c in zip(tasks, cells, strict=True) if c.get("diverged")) or None
        rows.append(row)
    notes = (
        f"Mean over the tasks {', '.join(tasks)} for each seed, then over seeds with its 95 % t interval. A method "
        "without a number in one of the tasks has none here.",
        "The paper's numbers are for its own policies, data and budget, as under 'Successor measures'. "
        f"{_order(rows)}".rstrip(),
        seeds_note(params.successor, params.environments),
    )
    return Table("maze", "Maze, mean over tasks", pd.DataFrame(rows), notes)


def _mean(each: list[dict[int, float]]) -> str | None:
    """Return the mean over tasks within a seed, then over seeds; None if the tasks do not have the same seeds."""
    if any(found.keys() != each[0].keys() or not found for found in each):
        return None
    return between(*t_interval([sum(found[seed] for found in each) / len(each) for seed in each[0]])[:3])


def _order(rows: list[dict[str, Any]]) -> str:
    """Return the order of the baselines by EMD, here and in the paper; empty if one of them is missing."""
    emd = {row["method"]: (row["EMD"], row["paper: EMD"]) for row in rows if row["method"] in BASELINES}
    if emd.keys() != set(BASELINES) or None in {number for pair in emd.values() for number in pair}:
        return ""
    orders = []
    for place in range(2):
        means = {method: float(pair[place].split()[0]) for method, pair in emd.items()}
        orders.append(" < ".join(f"{label(m)} {means[m]:.3g}" for m in sorted(means, key=lambda m: means[m])))
    here, paper = orders
    return f"Order of the baselines by EMD here: {here}; in the paper: {paper}."
