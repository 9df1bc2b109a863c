"""Curved against straight probability paths: Temporal Difference Flows, Table 2, and the Maze tasks of its mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flowmatch_core.intervals import difference
from pipelines.config.params import Params, SuccessorMethod
from pipelines.reporting.tables import Cells, Table, compared, numbers_of, papers_task, said, seeds_note, text
from pipelines.reporting.tables.successor import PUBLISHED

# The paper's EMD on the curved path by task and loss; `PUBLISHED` has that on the straight path.
CURVED = {
    "loop": {"td_cfm": 0.112, "td_cfm_coupled": 0.132, "td2_cfm": 0.020},
    "reach_bottom_left": {"td_cfm": 0.096, "td_cfm_coupled": 0.078, "td2_cfm": 0.022},
    "reach_bottom_right": {"td_cfm": 0.097, "td_cfm_coupled": 0.109, "td2_cfm": 0.019},
    "reach_top_left": {"td_cfm": 0.070, "td_cfm_coupled": 0.048, "td2_cfm": 0.025},
    "reach_top_right": {"td_cfm": 0.083, "td_cfm_coupled": 0.080, "td2_cfm": 0.019},
}


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per environment and pair of methods that differ only in their path."""
    import pandas as pd

    rows = []
    for environment, entry in params.environments.items():
        for straight, curved in pairs(params.successor.methods):
            if not (entry.runs(straight) and entry.runs(curved)):
                continue
            cells = [metrics[environment].get(method, {}) for method in (straight, curved)]
            choice = params.successor.methods[curved]
            row: dict[str, Any] = {"environment": environment, "method": straight, "path": choice.path.name}
            for metric, name in (("emd", "EMD"), ("mse_v", "MSE(V)"), ("nll", "NLL / dim")):
                one, other = (
                    numbers_of(params, entry, m, c, metric) for m, c in zip((straight, curved), cells, strict=True)
                )
                if metric != "nll":
                    row[f"{name}: straight, {choice.path.name}"] = ", ".join(text(cell.get(metric)) for cell in cells)
                row[f"{name}: difference"] = said(compared(difference, other, one))
            row["diverged"] = ", ".join(m for m, c in zip((straight, curved), cells, strict=True) if c.get("diverged"))
            task, loss = papers_task(entry), choice.loss.name
            paper = CURVED.get(task, {}).get(loss)
            row["paper: EMD straight, curved"] = f"{text(PUBLISHED[task][loss][0])}, {text(paper)}" if paper else None
            rows.append(row)
    notes = (
        "Difference: the method on the curved path minus the same on the straight one, mean over seeds with its 95 % "
        "interval, paired or welch as in the comparisons. The paper: TD²-CFM keeps its EMD, TD-CFM(C) loses it.",
        "The paper's numbers are for its own policies, data and budget, as under 'Successor measures'.",
        seeds_note(params.successor, params.environments),
    )
    table = pd.DataFrame(rows)
    return Table("paths", "Curved paths", table.loc[:, (table != "").any()] if len(table) else table, notes)


def pairs(methods: Mapping[str, SuccessorMethod]) -> Iterator[tuple[str, str]]:
    """Yield pairs of methods that differ only in their path, the straight one first."""
    for straight, one in methods.items():
        for curved, other in methods.items():
            same = (one.loss, one.fit) == (other.loss, other.fit)
            if same and one.path.name == "cond_ot" and other.path.name != "cond_ot":
                yield straight, curved
