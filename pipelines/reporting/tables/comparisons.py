"""Compare every method with TD²-CFM over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmatch_core.intervals import Interval, difference, ratio
from pipelines.config.catalog import ORACLE
from pipelines.config.params import EnvironmentEntry, Params
from pipelines.reporting.tables import HOLE, RIVAL, Cells, Table, compared, numbers_of, said, seeds_note, text


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per environment and method other than TD²-CFM; the closed form is excluded."""
    import pandas as pd

    methods = params.successor.methods
    rows = []
    for environment, entry in params.environments.items():
        cells, rival = metrics[environment], metrics[environment].get(RIVAL, {})
        for method, choice in methods.items() if RIVAL in methods else ():
            if method == RIVAL or choice.loss.name == ORACLE or not (entry.runs(method) and entry.runs(RIVAL)):
                continue
            cell = cells.get(method, {})
            row: dict[str, Any] = {"environment": environment, "method": method, "against": RIVAL}
            for metric, name in (("emd", "EMD"), ("mse_v", "MSE(V)")):
                verdict, gap, times = _compare(params, entry, metric, cell, rival, method)
                row[f"{name}: difference"] = said(gap)
                row[f"{name}: ratio"] = times
                if metric == "emd":
                    floors = [of.get("emd_over_floor") for of in (cell, rival)]
                    row["EMD / floor"] = " : ".join(map(text, floors)) if any(floors) else None
                row[f"smaller {name}"] = verdict
            rows.append(row)
    notes = (
        f"Difference of the means (method minus {RIVAL}) and ratio of the geometric means (method by {RIVAL}) over "
        f"seeds: above 0 and above 1 {RIVAL} is better. With the 95 % interval of the difference: paired over shared "
        "seeds, or welch over those of each method, whichever has less estimated variance. EMD / floor of both, where "
        "1 is as good as true samples.",
        "The better one is named where the interval excludes 0; not significant: it does not; diverged: samples of one "
        "of the two are far outside of the data, so that nobody wins; one seed: there is no interval.",
        seeds_note(params.successor, params.environments),
    )
    return Table("comparisons", "Who wins where, by how much", pd.DataFrame(rows), notes)


def _compare(
    params: Params,
    entry: EnvironmentEntry,
    metric: str,
    cell: Mapping[str, Any],
    rival: Mapping[str, Any],
    method: str,
) -> tuple[str, Interval | None, float | None]:
    """Return the better method, the difference and the ratio over the seeds of the two."""
    if metric not in cell or metric not in rival:
        return "not run" if "skipped" in cell or "skipped" in rival or not (cell and rival) else HOLE, None, None
    a, b = numbers_of(params, entry, method, cell, metric), numbers_of(params, entry, RIVAL, rival, metric)
    gap, positive = compared(difference, a, b), min((*a.values(), *b.values()), default=0.0) > 0
    times = compared(ratio, a, b) if positive else None
    quotient = None if times is None else times.mean
    if cell.get("diverged") or rival.get("diverged"):
        return "diverged", gap, quotient
    if gap is None or gap.n < 2:
        return "one seed", gap, quotient
    return RIVAL if gap.low > 0 else method if gap.high < 0 else "not significant", gap, quotient
