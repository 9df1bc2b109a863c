"""Experiments: measured numbers and their expected ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.config.params import Params
from pipelines.reporting.tables import Cells, Table, interval, limits


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per experiment and finding."""
    import pandas as pd

    rows = [
        {
            "experiment": name,
            "measured": cell["sentence"],
            "value": interval(cell, "value"),
            "expected": limits(cell["at_least"], cell["at_most"]),
            "verdict": cell["verdict"],
        }
        for name in params.experiments
        for cell in metrics[f"experiments/{name}"].values()
    ]
    notes = (
        "Mean over repetitions, of a ratio the geometric mean, with its 90 % t interval, each end of which is a "
        "one-sided bound at 5 %. A finding holds if the whole interval lies in the range, FAILS if none of it does, "
        "and is open otherwise; what has no range is only measured.",
        "SDE / ODE: the distances of their samples to the data, each by the better of two methods at equal evaluations "
        "of the field; below 1 noise helps.",
    )
    columns = ["experiment", "measured", "value", "expected", "verdict"]
    return Table("experiments", "Experiments", pd.DataFrame(rows, columns=columns), notes)
