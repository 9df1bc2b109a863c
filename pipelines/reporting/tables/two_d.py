"""Flows between data sets in the plane: Tong et al. (2024), Table 2, and Shi et al. (2023), Table 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.config.params import Params
from pipelines.reporting.tables import Cells, Table, interval

METHODS = {
    "i_cfm": "I-CFM", "ot_cfm": "OT-CFM", "sb_cfm": "SB-CFM", "vp_cfm": "VP-CFM", "reflow": "Reflow",
    "floor": "true samples"
}  # fmt: skip
PUBLISHED: Mapping[str, Mapping[str, tuple[str | None, str | None]]] = {
    "moons": {"i_cfm": (".215 ± .028", None), "ot_cfm": (".111", None), "reflow": (".129", None)},
    "s_curve": {"ot_cfm": (".102", None), "reflow": (".126", None)},
    "eight_gaussians": {"i_cfm": (None, ".222"), "ot_cfm": (".253", ".018"), "reflow": (".267", None)},
    "moons_eight_gaussians": {
        "i_cfm": (None, "2.738"), "ot_cfm": (".716", ".053"), "sb_cfm": (".843", None), "reflow": ("1.522", None)
    },
}  # fmt: skip
"""W2 by 20 Euler steps (Shi et al.) and normalised path energy (Tong et al.), by task and method."""


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per pair of data sets and method."""
    import pandas as pd

    rows = []
    for name, entry in params.experiments.items():
        if entry.kind != "two_d":
            continue
        found = metrics[f"experiments/{name}"]
        columns = _columns(sorted({int(key.rsplit("_", 1)[1]) for key in found if "_w2_euler_" in key}))
        for task in entry.own["tasks"]:
            for method, title in METHODS.items():
                row: dict[str, Any] = {"data sets": task, "method": title}
                for key, column in columns.items():
                    row[column] = interval(found.get(f"{task}_{method}_{key}", {}), "value")
                paper = PUBLISHED.get(task, {}).get(method, (None, None))
                rows.append(row | {"paper: W2, 20 Euler steps": paper[0], "paper: NPE": paper[1]})
    notes = (
        "Mean over repetitions with its 90 % t interval. W2: exact, between samples that start from test rows of the "
        "source and test rows of the target; for true samples, its sampling floor. NPE: the normalised path energy "
        "|E - W2²| / W2². NFE: field evaluations of dopri5 at tolerance 1e-5.",
        "The papers' numbers are quoted from third parties, not confirmed with the papers: W2 from Shi et al. (2023), "
        "NPE from Tong et al. (2024). The number of their test points is not known to be that of this table, and W2 "
        "falls as it grows: compare with the floor here.",
    )
    return Table("two_d", "Flows between data sets in the plane", pd.DataFrame(rows), notes)


def _columns(euler: Sequence[int]) -> dict[str, str]:
    """Return the titles of the columns by the name of the measure."""
    return {
        **{f"w2_euler_{steps}": f"W2, {steps} Euler steps" for steps in euler},
        "w2": "W2, dopri5",
        "npe": "NPE",
        "energy": "path energy",
        "nfe": "NFE",
        "seconds": "CPU s",
    }
