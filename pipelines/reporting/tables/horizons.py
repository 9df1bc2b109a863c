"""Growth of errors with the horizon: Temporal Difference Flows, Figure 2, as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flowmatch_core.intervals import paired_difference, t_interval
from pipelines.config.params import Params
from pipelines.reporting.ranking import horizon_groups
from pipelines.reporting.tables import RIVAL, Cells, Table, between, numbers_of, text

METRICS = (("mse_v", "MSE(V)"), ("emd", "EMD"))


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per metric and method, for environments that differ in gamma (see `horizon_groups`)."""
    import pandas as pd

    seeds, rows = params.successor.seeds, []
    for first, group in horizon_groups(params).items():
        everywhere = [
            method
            for method in ("floor", *params.successor.methods)
            if all(_ran(metrics[name].get(method, {})) for name in group.values())
        ]
        lost = {m for m in everywhere if any(metrics[name][m].get("diverged") for name in group.values())}
        horizons = [1 / (1 - gamma) for gamma in group]
        for metric, title in METRICS:
            slopes = {m: _slopes([metrics[e][m] for e in group.values()], horizons, metric, seeds) for m in everywhere}
            for method in everywhere:
                row: dict[str, Any] = {"environments": first, "metric": title, "method": method}
                for horizon, environment in zip(horizons, group.values(), strict=True):
                    cell = metrics[environment][method]
                    mark = " (diverged)" if cell.get("diverged") else ""
                    row[f"horizon {horizon:.0f}"] = f"{text(cell.get(metric))}{mark}"
                row |= _growth(method, slopes, bool({method, RIVAL} & lost))
                rows.append(row)
    notes = (
        "Horizon: 1 / (1 - γ) transitions; with it grow the length of episodes and, if need be, the target's step.",
        "Slope: of the logarithm of the number against that of the horizon, least "
        f"squares for each seed of {list(seeds)}, with its 95 % t interval; 0 is a method whose error does not grow.",
        f"The paper: TD² methods are flat, the others degrade. Holds: the interval of the slope minus that of {RIVAL}, "
        "paired by seed, lies above 0; FAILS: below; open: it contains 0.",
    )
    return Table("horizons", "Error against horizon", pd.DataFrame(rows), notes)


def _ran(cell: Mapping[str, Any]) -> bool:
    return cell.get("emd") is not None or bool(cell.get("diverged"))


def _slopes(
    cells: list[Mapping[str, Any]], horizons: list[float], metric: str, seeds: tuple[int, ...]
) -> dict[int, float]:
    """Return the least-squares slope of log metric in log horizon, for every seed that has all numbers."""
    x = [math.log(horizon) for horizon in horizons]
    centre = sum(x) / len(x)
    found = {}
    for seed in seeds:
        values = [numbers_of(cell, metric, [seed]).get(seed, 0.0) for cell in cells]
        if min(values) > 0:
            y = [math.log(value) for value in values]
            rise = sum((a - centre) * b for a, b in zip(x, y, strict=True))
            found[seed] = rise / sum((a - centre) ** 2 for a in x)
    return found


def _growth(method: str, slopes: Mapping[str, Mapping[int, float]], diverged: bool) -> dict[str, str | None]:
    own, rival = slopes[method], slopes.get(RIVAL, {})
    slope = between(*t_interval(list(own.values()))[:3]) if own else None
    shared = sorted(own.keys() & rival.keys())
    gap = paired_difference([own[s] for s in shared], [rival[s] for s in shared]) if shared else None
    verdict = None
    if method == "td_cfm" and (diverged or gap is not None):
        verdict = "diverged" if diverged or gap is None else gap.verdict(0.0, None)
    beside = None if method == RIVAL or gap is None else between(*gap[:3])
    return {"slope": slope, f"minus that of {RIVAL}": beside, "steeper than TD²-CFM": verdict}
