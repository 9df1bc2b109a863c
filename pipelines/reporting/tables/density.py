"""Density models: likelihood and distances on the test rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.config.params import Params
from pipelines.reporting.tables import Cells, Table

# Test NLL in nats of published models on MINIBOONE: FFJORD (Grathwohl et al. 2019, arXiv 1810.01367), Table 6.
PUBLISHED = {"miniboone": "Real NVP 13.55, MAF 11.75, FFJORD 10.43"}


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per data set and method, below the floor of the data set."""
    import pandas as pd

    rows = []
    for dataset, entry in params.datasets.items():
        floor = metrics[dataset]["floor"]
        for method in ["floor", *params.density.methods]:
            cell = metrics[dataset].get(method, {})
            rows.append(
                {
                    "data": dataset,
                    "method": method,
                    "NLL (nats)": cell.get("nll"),
                    "± s.e.": cell.get("nll_standard_error"),
                    "solver error": cell.get("nll_solver_error"),
                    "bits/dim": cell.get("bits_per_dim"),
                    "EMD": cell.get("emd"),
                    "EMD / floor": cell["emd"] / floor["emd"] if "emd" in cell else None,
                    "sliced W": cell.get("sliced_wasserstein"),
                    "published NLL": PUBLISHED.get(entry.kind) if method == "floor" else None,
                }
            )
    evaluate = params.density.evaluate
    notes = [
        f"Means over seeds {list(params.density.seeds)}. Exact trace, {evaluate.solver} with {evaluate.steps} steps; "
        "the solver error is the rms change of a row's log-density when the steps are twice as long.",
        f"EMD (exact, Euclidean) and sliced Wasserstein between {evaluate.rows} samples and test rows, or as many as "
        "there are. The floor is the distance of two sets of true rows of that size, its NLL the exact density's.",
    ]
    for dataset in params.datasets:
        cells = {method: metrics[dataset].get(method, {}) for method in params.density.methods}
        notes += [f"{dataset}, {method}: {cell['warning']}" for method, cell in cells.items() if "warning" in cell]
        origin = provenance[dataset]
        notes.append(f"{dataset}: {origin['fidelity']}; {origin['source']}. {origin['notes']}".strip())
    return Table("density", "Density models", pd.DataFrame(rows).dropna(axis=1, how="all"), tuple(notes))
