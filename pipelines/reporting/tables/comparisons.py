"""Compare every method with TD²-CFM, paired by seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmatch_core.intervals import Interval, paired_difference
from pipelines.config.catalog import ORACLE
from pipelines.config.params import Params
from pipelines.reporting.tables import RIVAL, Cells, Table, between, paired, text


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per environment and method other than TD²-CFM; the closed form is excluded."""
    import pandas as pd

    methods, seeds = params.successor.methods, params.successor.seeds
    rows = []
    for environment, entry in params.environments.items():
        cells, rival = metrics[environment], metrics[environment].get(RIVAL, {})
        for method, choice in methods.items() if RIVAL in methods else ():
            if method == RIVAL or choice.loss.name == ORACLE or not (entry.runs(method) and entry.runs(RIVAL)):
                continue
            cell = cells.get(method, {})
            row: dict[str, Any] = {"environment": environment, "method": method, "against": RIVAL}
            for metric, name in (("emd", "EMD"), ("mse_v", "MSE(V)")):
                verdict, gap = _compare(metric, cell, rival, method, seeds)
                row[f"{name}: difference"] = None if gap is None else between(*gap[:3])
                row[f"{name}: ratio"] = _ratio(cell.get(metric), rival.get(metric))
                if metric == "emd":
                    floors = [of.get("emd_over_floor") for of in (cell, rival)]
                    row["EMD / floor"] = " : ".join(map(text, floors)) if any(floors) else None
                row[f"smaller {name}"] = verdict
            rows.append(row)
    notes = (
        f"Difference (method minus {RIVAL}) and ratio (method by {RIVAL}): above 0 and above 1 {RIVAL} is better. Mean "
        f"over seeds {list(seeds)} with the 95 % t interval of the paired differences; EMD / floor of both, where 1 is "
        "as good as true samples.",
        "The better one is named where the interval excludes 0; open: it does not; diverged: samples of one of the two "
        "are far outside of the data, so that nobody wins; one seed: there is no interval.",
    )
    return Table("comparisons", "Who wins where, by how much", pd.DataFrame(rows), notes)


def _compare(
    metric: str, cell: Mapping[str, Any], rival: Mapping[str, Any], method: str, seeds: tuple[int, ...]
) -> tuple[str, Interval | None]:
    """Return the better method and the paired difference over the seeds that both have."""
    if metric not in cell or metric not in rival:
        return "not run", None
    gap = paired(paired_difference, cell, rival, metric, seeds)
    if cell.get("diverged") or rival.get("diverged"):
        return "diverged", gap
    if gap is None or gap.n < 2:
        return "one seed", gap
    return RIVAL if gap.low > 0 else method if gap.high < 0 else "open", gap


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
