"""Growth of errors with the horizon: Temporal Difference Flows, Figure 2, as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowmatch_core.intervals import ONE_SIDED, difference, t_interval
from pipelines.base import metric_keys
from pipelines.config.params import Params
from pipelines.reporting.ranking import horizon_groups
from pipelines.reporting.tables import RIVAL, Cells, Table, between, physics_steps, said, seeds_note, text

METRICS = (("mse_v", "MSE(V) (1 - γ)²"), ("emd", "EMD"))


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per metric and method, for environments that differ in gamma (see `horizon_groups`)."""
    import pandas as pd

    rows, groups = [], horizon_groups(params)
    repeats = sorted({f"{100 * physics_steps(params.environments[first])}" for first in groups})
    for first, group in groups.items():
        everywhere = [
            method
            for method in ("floor", *params.successor.methods)
            if all(_ran(metrics[name].get(method, {})) for name in group.values())
        ]
        lost = {m for m in everywhere if any(metrics[name][m].get("diverged") for name in group.values())}
        gammas, repeat = list(group), physics_steps(params.environments[first])
        for metric, title in METRICS:
            # V is a sum over the horizon, so that its error is compared as that of the mean reward, (1 - gamma) V.
            units = [(1 - gamma) ** 2 if metric == "mse_v" else 1.0 for gamma in gammas]
            slopes = {m: _slopes([metrics[e][m] for e in group.values()], gammas, metric, units) for m in everywhere}
            for method in everywhere:
                row: dict[str, Any] = {"environments": first, "metric": title, "method": method}
                for (gamma, environment), unit in zip(group.items(), units, strict=True):
                    cell = metrics[environment][method]
                    mark = " (diverged)" if cell.get("diverged") else ""
                    value = None if cell.get(metric) is None else unit * cell[metric]
                    row[f"horizon {repeat / (1 - gamma):.0f}"] = f"{text(value)}{mark}"
                row |= _growth(method, slopes, bool({method, RIVAL} & lost))
                rows.append(row)
    notes = (
        "Horizon: 1 / (1 - γ) transitions, in physics steps. In the paper a transition is one physics step, so that "
        f"γ = .99 is 100 there, and here {' or '.join(repeats)}. With the horizon grow the length of episodes and, if "
        "need be, the target's step.",
        "MSE(V) (1 - γ)²: the error of the mean reward over the horizon. V itself grows with the horizon.",
        "Slope: of the logarithm of the number against that of the horizon, least squares for each seed, with its "
        "95 % t interval; 0 is a method whose error does not grow.",
        f"The paper: TD² methods are flat, the others degrade. Holds: the 90 % interval of the slope minus that of "
        f"{RIVAL}, paired or welch as in the claims, lies above 0, a one-sided test at 5 %; FAILS: below; open: it "
        "contains 0.",
        seeds_note(params.successor, params.environments),
    )
    return Table("horizons", "Error against horizon", pd.DataFrame(rows), notes)


def _ran(cell: Mapping[str, Any]) -> bool:
    return cell.get("emd") is not None or bool(cell.get("diverged"))


def _slopes(
    cells: Sequence[Mapping[str, Any]], gammas: Sequence[float], metric: str, units: Sequence[float]
) -> dict[int, float]:
    """Return the least-squares slope of log metric in log horizon, for every seed that has all numbers."""
    x = [-math.log(1 - gamma) for gamma in gammas]
    centre = sum(x) / len(x)
    each = [metric_keys.by_seed(cell, metric) for cell in cells]
    found = {}
    for seed in each[0]:
        values = [unit * values.get(seed, 0.0) for unit, values in zip(units, each, strict=True)]
        if min(values) > 0:
            rise = sum((a - centre) * math.log(value) for a, value in zip(x, values, strict=True))
            found[seed] = rise / sum((a - centre) ** 2 for a in x)
    return found


def _growth(method: str, slopes: Mapping[str, Mapping[int, float]], diverged: bool) -> dict[str, str | None]:
    own, rival = slopes[method], slopes.get(RIVAL, {})
    slope = between(*t_interval(list(own.values()))[:3]) if own else None
    gap = difference(own, rival, ONE_SIDED) if own and rival else None
    verdict = None
    if method == "td_cfm" and (diverged or gap is not None):
        verdict = "diverged" if diverged or gap is None else gap.verdict(0.0, None)
    beside = None if method == RIVAL else said(gap)
    return {"slope": slope, f"minus that of {RIVAL}": beside, "steeper than TD²-CFM": verdict}
