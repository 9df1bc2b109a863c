"""Domains of the DeepMind Control Suite: Temporal Difference Flows (arXiv 2503.09817), Table 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.config.params import Params
from pipelines.reporting.tables import Cells, Table, interval, seeds_note

# EMD and MSE(V) of the paper by kind and method: means over the domain's tasks.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "cheetah": {"td_cfm": (12.26, 228.8), "td_cfm_coupled": (10.51, 140.8), "td2_cfm": (10.57, 135.2)},
    "walker": {"td_cfm": (13.53, 225.3), "td_cfm_coupled": (11.91, 30.7), "td2_cfm": (11.92, 28.4)},
    "quadruped": {"td_cfm": (15.73, 525.1), "td_cfm_coupled": (14.38, 155.3), "td2_cfm": (14.51, 141.8)},
}


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per domain and method that it runs, below the floor of the domain."""
    import pandas as pd

    rows = []
    here = {name: entry for name, entry in params.environments.items() if entry.kind in PUBLISHED}
    for name, entry in here.items():
        for method in ["floor", *filter(entry.runs, params.successor.methods)]:
            cell = metrics[name].get(method, {})
            paper = PUBLISHED[entry.kind].get(method)
            rows.append(
                {
                    "domain": name,
                    "method": method,
                    "EMD": interval(cell, "emd"),
                    "EMD / floor": cell.get("emd_over_floor"),
                    "EMD, standardised": interval(cell, "emd_standardised"),
                    "MSE(V)": interval(cell, "mse_v"),
                    "V bias": interval(cell, "value_bias"),
                    "bootstrap loss": logs[name].get(method, {}).get("final_bootstrap"),
                    "paper: EMD, MSE(V)": f"{paper[0]:g}, {paper[1]:g}" if paper else None,
                }
            )
    notes = (
        "EMD in the units of the observation, in which joint velocities of rad/s outweigh everything else, and in "
        "standard deviations of the training states. In 17 dimensions and more neither shows an error of the value.",
        "The paper's numbers are means over the tasks of a domain, of TD3 policies on 10 M transitions of ExORL with "
        "γ = .99 and 3 M steps of a U-Net; only the order of the methods compares.",
        *(f"{name}: {message}." for name in here for message in provenance[name].get("messages", ())),
        *([seeds_note(params.successor, here)] if here else []),
    )
    return Table("domains", "Domains of the DeepMind Control Suite", pd.DataFrame(rows), notes)
