"""The densities of the literature's data sets in full: a row per data set and method, with what each costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.config.params import Params
from pipelines.reporting.published import DATA, MODELS
from pipelines.reporting.tables import Cells, Table
from pipelines.reporting.tables.density import shown
from pipelines.reporting.tables.literature import placed, score

PAPERS: Mapping[str, str] = {
    "one Gaussian": "Gaussian",
    "made": "MADE",
    "real_nvp": "Real NVP",
    "glow": "Glow",
    "maf": "MAF",
    "ffjord": "FFJORD",
}
"""Published models of the same kind, by method."""


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per data set and method."""
    import pandas as pd

    values = {each.model: each.values for each in MODELS}
    rows = []
    for name, entry in placed(params).items():
        for method in shown(params, name, metrics[name]):
            cell = metrics[name].get(method, {})
            found = score(params, entry, method, cell, provenance[name])
            if method == "floor":
                continue
            gain, error = cell.get("over_mixture"), cell.get("over_mixture_standard_error")
            rows.append(
                {
                    "data": name,
                    "method": method,
                    "test": None if found is None else str(found),
                    "published": values.get(PAPERS.get(method, ""), {}).get(entry.kind),
                    "nats above the mixture": None if gain is None else f"{gain:.3g} ± {error:.2g}",
                    "parameters": cell.get("parameters"),
                    "training, CPU s": cell.get("seconds"),
                    "NFE of the likelihood": cell.get("nfe"),
                    "NFE of a sample": cell.get("nfe_sample"),
                    "solver error": cell.get("nll_solver_error"),
                    "test rows": provenance[name]["rows"]["test"],
                    "label": provenance[name]["fidelity"],
                }
            )
    notes = (
        "test: NLL in nats, of images in bits per dimension, ± its standard error over rows and over seeds. nats above "
        "the mixture: the mean gain in log-density over the best mixture of Gaussians on the same test rows, ± its "
        "standard error over rows; negative: worse.",
        f"published: the same kind of model in the literature ({', '.join(DATA.values())}), with other networks, "
        "without transforms of the columns and on all official training rows. It compares only where the label begins "
        "with official.",
    )
    table = pd.DataFrame(rows).dropna(axis=1, how="all")
    return Table("literature_rows", "Densities of the literature's data sets, in full", table, notes if rows else ())
