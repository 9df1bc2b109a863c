"""The densities of the literature's data sets in full: a row per data set and method, with what each costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.config.params import DatasetEntry, Params
from pipelines.reporting.labels import label
from pipelines.reporting.published import DATA, MODELS
from pipelines.reporting.tables import Cells, Table
from pipelines.reporting.tables.literature import models, placed, score

LATE = 0.9  # share of the steps after which a validation loss that is lowest there has not risen

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
        for method in models(params, name, metrics[name]):
            cell = metrics[name].get(method, {})
            found = score(entry, cell, provenance[name])
            gain, error = cell.get("over_mixture"), cell.get("over_mixture_standard_error")
            rows.append(
                {
                    "data": name,
                    "method": method,
                    "test": None if found is None else str(found),
                    "published": values.get(PAPERS.get(method, ""), {}).get(entry.kind),
                    "nats above the mixture": None if gain is None else f"{gain:.3g} ± {error:.2g}",
                    "parameters": cell.get("parameters"),
                    "training, s": logs.get(name, {}).get(method, {}).get("seconds"),
                    "NFE": cell.get("nfe"),
                    "solver error": cell.get("nll_solver_error"),
                    "limited by": _limit(params, entry, method, cell),
                    "test rows": provenance[name]["rows"]["test"],
                    "label": provenance[name]["fidelity"],
                }
            )
    notes = (
        "test: NLL in nats, of images in bits per dimension, ± its standard error over rows and over seeds. nats above "
        "the mixture: the mean gain in log-density over the best mixture of Gaussians on the same test rows, ± its "
        "standard error over rows; negative: worse. training, s: the time of one seed in one process, beside what else "
        "ran. NFE: evaluations of the network for the log-density of a row and its error. limited by, of a trained "
        "network: time, if its validation loss fell until the end of the training; rows, if it rose before.",
        f"published: the same kind of model in the literature ({', '.join(DATA.values())}), with other networks, "
        "without transforms of the columns and on all official training rows. It compares only where the label begins "
        "with official.",
        *_constants(params, metrics),
    )
    table = pd.DataFrame(rows).dropna(axis=1, how="all")
    return Table("literature_rows", "Densities of the literature's data sets, in full", table, notes if rows else ())


def _constants(params: Params, metrics: Cells) -> Iterator[str]:
    """Yield the error of the constant of each tilted mixture."""
    for name in placed(params):
        for method, cell in metrics[name].items():
            if "log_constant" in cell:
                constant, error = cell["log_constant"], cell["log_constant_error"]
                yield (
                    f"{name}, {label(method)}: the constant of the tilt has the logarithm {constant:.3g} ± "
                    f"{error:.2g}; the column test has the error over rows alone."
                )


def _limit(params: Params, entry: DatasetEntry, method: str, cell: Mapping[str, Any]) -> str | None:
    """Return what limits a trained network, from the step whose network was kept."""
    step, choice = cell.get("chosen_step"), params.density.methods.get(method)
    if step is None or choice is None:
        return None
    steps = params.density.fit_for(entry, choice).steps + (0 if choice.tune is None else choice.tune.steps)
    return "time" if step >= LATE * steps else f"rows (step {step:.0f} of {steps})"
