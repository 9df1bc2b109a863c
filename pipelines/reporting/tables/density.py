"""Density models: likelihood on all parts of the data, and distances to the test rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.base.metric_keys import REFERENCE
from pipelines.config.params import DensityEvaluation, Params
from pipelines.reporting.tables import Cells, Table, seeds_note

# Test NLL in nats of published models on MINIBOONE: FFJORD (Grathwohl et al. 2019, arXiv 1810.01367), Table 6.
PUBLISHED = {"miniboone": "Real NVP 13.55, MAF 11.75, FFJORD 10.43"}


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per data set and method, and one per mixture of seeds, below the floor of the data set."""
    import pandas as pd

    rows = []
    for dataset, entry in params.datasets.items():
        floor = metrics[dataset]["floor"]
        for method in shown(params, dataset, metrics[dataset]):
            cell = metrics[dataset].get(method, {})
            rows.append(
                {
                    "data": dataset,
                    "method": method,
                    "fidelity": provenance[dataset]["fidelity"],
                    **{f"{name} {part}": cell.get(key) for part, keys in _PARTS.items() for name, key in keys.items()},
                    "± seeds": cell.get("nll_seed_error"),
                    "solver error": cell.get("nll_solver_error"),
                    "bits/dim": cell.get("bits_per_dim"),
                    "parameters": cell.get("parameters"),
                    "NFE": cell.get("nfe"),
                    "chosen step": cell.get("chosen_step"),
                    "EMD": cell.get("emd"),
                    "EMD / floor": cell["emd"] / floor["emd"] if cell.get("emd") and floor["emd"] else None,
                    "sliced W": cell.get("sliced_wasserstein"),
                    "EMD raw": cell.get("emd_raw"),
                    "published NLL": PUBLISHED.get(entry.kind) if method == "floor" else None,
                }
            )
    notes = [*_explained(params), *(note for name in params.datasets for note in said(name, metrics, provenance))]
    return Table("density", "Density models", pd.DataFrame(rows).dropna(axis=1, how="all"), tuple(notes))


_PARTS = {
    part: {"NLL": key, "±": f"{key}_standard_error"}
    for part, key in (("train", "nll_train"), ("val", "nll_val"), ("test", "nll"))
}


def shown(params: Params, dataset: str, cells: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the rows of a data set: the floor, one Gaussian unless it is a method, and methods with their mixtures."""
    here = {method: params.density.methods[method] for method in params.density.methods_for(params.datasets[dataset])}
    yield "floor"
    if REFERENCE in cells and all(choice.loss.name != "gaussian" for choice in here.values()):
        yield REFERENCE
    for method in here:
        yield method
        yield from (n for n, c in cells.items() if c.get("mixture_of") == method and n not in params.density.mixtures)
    yield from (name for name in params.density.mixtures if name in cells)


def said(dataset: str, metrics: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the sentences about a data set: its origin, what became of its table, and what its numbers do not show."""
    origin = provenance[dataset]
    yield f"{dataset}: {origin['fidelity']}; {origin['source']}. {origin['notes']}".strip()
    yield from (f"{dataset}: {message}" for message in origin["messages"])
    for method, cell in metrics[dataset].items():
        yield from (f"{dataset}, {method}: {warning}" for warning in cell.get("warnings", ()))
        if (sentence := few_rows(cell)) is not None:
            yield f"{dataset}, {method}: {sentence}"
        if cell.get("mixture_of"):
            gain, error = cell["gain"], cell["gain_standard_error"]
            if gain is not None and error is not None:
                yield f"{dataset}, {method}: {gain:.3g} ± {error:.2g} nats better than its members on average, by row."
        if "log_constant" in cell:
            constant, error = cell["log_constant"], cell["log_constant_error"]
            yield (
                f"{dataset}, {method}: multiplied by the ratio of the population to the tempered weights of its "
                f"training, whose constant has the logarithm {constant:.3g} ± {error:.2g}."
            )


def few_rows(cell: Mapping[str, Any]) -> str | None:
    """Return a sentence if a few rows decide a test NLL, whose standard error is then as large as the NLL."""
    nll, error = cell.get("nll"), cell.get("nll_standard_error")
    if nll is None or error is None or not error > max(1.0, abs(nll) / 2):
        return None
    return "a few test rows, to which it gives almost no density, decide its NLL."


def _explained(params: Params) -> Iterator[str]:
    """Yield how the numbers are computed."""
    yield (
        f"{seeds_note(params.density, params.datasets)} Means over seeds. NLL in nats, given the conditions if there "
        "are any, on the test rows, and on validation rows and random training rows, at most as many as test rows; ± "
        "is the standard error over rows, ± seeds that of the mean over seeds."
    )
    for evaluate, names in _evaluations(params):
        limit = "" if evaluate.likelihood_rows is None else f", at most {evaluate.likelihood_rows} rows of each part"
        yield (
            f"{names}Exact trace, {evaluate.solver} with {evaluate.steps} steps on the {evaluate.grid.name} grid"
            f"{limit}; distances between {evaluate.rows} samples and test rows, or as many as there are."
        )
    yield (
        "solver error is the rms change of a row's log-density from half as many steps. It is 0 for models in closed "
        "form. NFE are the evaluations of the network for the log-density of a row, with those of its error."
    )
    yield (
        "EMD (exact, Euclidean) and sliced Wasserstein in units of the training rows' standard deviations, EMD raw in "
        "those of the data. With conditions, they are distances of pairs of values and condition vectors, in which "
        "words are one-hot; EMD raw is of the values alone. The floor is the distance of validation rows, at whose "
        "conditions the samples are drawn, and its NLL the exact density's."
    )
    yield (
        "With conditions, couplings pair noise with rows of equal words and similar numbers. one Gaussian: the normal "
        "distribution with the moments of the training rows, whose mean is linear in the conditions. method xk: the "
        "mixture of its k seeds with equal weights, without further training. chosen step: where the "
        "validation loss was smallest."
    )


def _evaluations(params: Params) -> Iterator[tuple[DensityEvaluation, str]]:
    """Yield the settings of evaluations, each with the data sets that have them, unless all have the same."""
    settings = {name: params.density.evaluate_for(entry) for name, entry in params.datasets.items()}
    distinct = dict.fromkeys(one.model_dump_json() for one in settings.values())
    for each in distinct:
        names = [name for name, one in settings.items() if one.model_dump_json() == each]
        yield settings[names[0]], "" if len(distinct) == 1 else f"{', '.join(names)}: "
