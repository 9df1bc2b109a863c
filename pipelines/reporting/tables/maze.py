"""Means over the Maze's tasks: Temporal Difference Flows, Table 1; the table `successor` is Table 11."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmatch_core.intervals import t_interval
from pipelines.config.params import Params
from pipelines.reporting.tables import Cells, Table, between, numbers_of, papers_task
from pipelines.reporting.tables.successor import PUBLISHED

METRICS = (("emd", "EMD"), ("nll", "NLL / dim"), ("mse_v", "MSE(V)"))


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per method that runs in every task, if there are several; a task's first environment is used."""
    import pandas as pd

    tasks: dict[str, str] = {}
    for name, entry in params.environments.items():
        if papers_task(entry) in PUBLISHED and entry.own.get("behaviour", "uniform") == "uniform":
            tasks.setdefault(papers_task(entry), name)
    entries = [params.environments[name] for name in tasks.values()]
    everywhere = [m for m in params.successor.methods if all(entry.runs(m) for entry in entries)]
    rows = []
    for method in ["floor", *everywhere] if len(tasks) > 1 else []:
        cells = [metrics[name].get(method, {}) for name in tasks.values()]
        if all("skipped" in cell for cell in cells):
            continue
        row: dict[str, Any] = {"method": method}
        for place, (metric, title) in enumerate(METRICS):
            row[title] = _mean(cells, metric, params.successor.seeds)
            paper = [PUBLISHED[task][method][place] for task in tasks] if method in PUBLISHED["loop"] else []
            numbers = [number for number in paper if number is not None]
            row[f"paper: {title}"] = f"{sum(numbers) / len(numbers):.3g}" if numbers else None
        row["diverged in"] = ", ".join(task for task, c in zip(tasks, cells, strict=True) if c.get("diverged")) or None
        rows.append(row)
    notes = (
        f"Mean over the tasks {', '.join(tasks)} for each seed of {list(params.successor.seeds)}, then over seeds with "
        "its 95 % t interval. A method without a number in one of the tasks has none here.",
        "The paper's numbers are for its own policies, data and budget, as under 'Successor measures'.",
    )
    return Table("maze", "Maze, mean over tasks", pd.DataFrame(rows), notes)


def _mean(cells: list[Mapping[str, Any]], metric: str, seeds: tuple[int, ...]) -> str | None:
    each = [numbers_of(cell, metric, seeds) for cell in cells]
    if not all(found.keys() == set(seeds) for found in each):
        return None
    return between(*t_interval([sum(found[seed] for found in each) / len(each) for seed in seeds])[:3])
