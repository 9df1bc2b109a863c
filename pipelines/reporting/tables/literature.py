"""The negative log-likelihoods of the literature's data sets beside the published ones: one column for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pipelines.base.metric_keys import REFERENCE
from pipelines.config.catalog import CLOSED_FORMS
from pipelines.config.params import DatasetEntry, DensityMethod, Params
from pipelines.reporting.labels import label
from pipelines.reporting.published import DATA, IMAGES, MODELS
from pipelines.reporting.tables import HOLE, Cells, Table
from pipelines.reporting.tables.density import few_rows, shown

BEST = " *"
LABEL, OURS, PAPERS = "label", "this run", "published"


class Score(NamedTuple):
    """A negative log-likelihood of test rows with its standard errors.

    The text has no error over seeds where these make no difference.

    Attributes:
        value: The mean over rows, then over seeds: nats, or bits per dimension of images.
        rows: Standard error over rows.
        seeds: Standard error over seeds; None for one seed or for a density without seeds.
    """

    value: float
    rows: float | None
    seeds: float | None

    def __str__(self) -> str:
        if self.rows is None or not self.rows > 0:
            return f"{self.value:.4g}"
        digits = min(4, max(0, 1 - math.floor(math.log10(self.rows))))
        seeds = f" (seeds ± {self.seeds:.2g})" if self.seeds else ""
        return f"{self.value:.{digits}f} ± {self.rows:.{digits}f}{seeds}"

    @property
    def error(self) -> float:
        """Standard error over rows and seeds."""
        return math.hypot(self.rows or 0.0, self.seeds or 0.0)


def score(entry: DatasetEntry, cell: Mapping[str, Any], origin: Mapping[str, Any]) -> Score | None:
    """Return the score of a method or a mixture on a data set, or None if it has none.

    Args:
        entry: The data set.
        cell: Metrics of the method.
        origin: Provenance of the data set.
    """
    images = entry.kind in IMAGES
    value = cell.get("bits_per_dim" if images else "nll")
    if value is None or value != value:
        return None
    unit = len(origin["columns"]) * math.log(2) if images else 1.0
    errors = (cell.get(key) for key in ("nll_standard_error", "nll_seed_error"))
    return Score(value, *(None if one is None or one != one else one / unit for one in errors))


def placed(params: Params) -> dict[str, DatasetEntry]:
    """Return the data sets of the literature among those of params.yaml, in the order of `DATA`."""
    return {name: entry for kind in DATA for name, entry in params.datasets.items() if entry.kind == kind}


def models(params: Params, dataset: str, cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the rows of a data set: one Gaussian, whose published value checks the rows, and methods with mixtures."""
    rest = [method for method in shown(params, dataset, cells) if method not in ("floor", REFERENCE)]
    return [REFERENCE, *rest] if REFERENCE in cells else rest


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per method, then one per published model; one column per data set of the literature."""
    import pandas as pd

    here = placed(params)
    title = "Densities beside the literature: test NLL in nats, of images in bits per dimension"
    if not here:
        return Table("literature", title, pd.DataFrame(), ())
    found = {
        name: {
            method: value
            for method in models(params, name, metrics[name])
            if (value := score(entry, metrics[name].get(method, {}), provenance[name]))
        }
        for name, entry in here.items()
    }
    columns: dict[str, dict[tuple[str, str], str]] = {}
    for kind, heading in DATA.items():
        names = [name for name, entry in here.items() if entry.kind == kind]
        for name in names:
            best = min(found[name], key=lambda method: found[name][method].value, default=None)
            column = {("data", LABEL): str(provenance[name]["fidelity"])}
            column |= {(OURS, label(m)): f"{value}{BEST if m == best else ''}" for m, value in found[name].items()}
            columns[heading if name == kind else f"{heading} ({name})"] = column | _published(kind)
        if not names:
            columns[heading] = {("data", LABEL): "not run", **_published(kind)}
    ours = dict.fromkeys(label(method) for scores in found.values() for method in scores)
    models_from = [("data", LABEL), *((OURS, model) for model in ours), *((PAPERS, each.model) for each in MODELS)]
    rows = [
        {
            "from": source,
            "model": model,
            **{name: column.get((source, model), HOLE) for name, column in columns.items()},
        }
        for source, model in models_from
    ]
    said = (f"{name}: {sentence}" for name in here for sentence in beaten(name, params, metrics))
    notes = [*said, *_explained(params)]
    return Table("literature", title, pd.DataFrame(rows), tuple(notes))


def _published(kind: str) -> dict[tuple[str, str], str]:
    return {(PAPERS, each.model): each.values[kind] for each in MODELS if kind in each.values}


def _explained(params: Params) -> Iterator[str]:
    """Yield what the numbers are and where the published ones come from."""
    yield (
        "Lower is better; *: the lowest of our rows. ± is the standard error over test rows, seeds ± that over seeds. "
        "Only a column whose label begins with official, or official-test, was scored on the rows of the papers: "
        "equivalent ones are other rows of the same measurements, and subsets do not compare."
    )
    yield (
        "Our rows share data, space and training rows. Where columns are transformed to normal ones first, as for "
        "MINIBOONE, POWER and images, so they are for every row but one Gaussian; the published models had no such "
        "transforms."
    )
    run = {entry.kind for entry in params.datasets.values()}
    if absent := [name for kind, name in DATA.items() if kind not in run]:
        yield (f"Not run here: {', '.join(absent)}. What a mirror lacks is left out, as the first lines of a run say.")
    for source in dict.fromkeys(each.source for each in MODELS):
        yield f"published: {', '.join(each.model for each in MODELS if each.source == source)}: {source}."
    for reason in dict.fromkeys(each.absent for each in MODELS if each.absent):
        without = [each.model for each in MODELS if each.absent == reason]
        yield f"Not among our rows: {', '.join(without)}: {reason}."


def beaten(name: str, params: Params, metrics: Cells) -> Iterator[str]:
    """Yield whether flows beat mixtures of Gaussians on a data set, and what decides a number that is not of most rows.

    The gain is that of the mean over test rows; the flow is chosen on validation rows.

    Args:
        name: Data set.
        params: Contents of params.yaml.
        metrics: Metrics of at least this data set.
    """
    for method, cell in metrics[name].items():
        if (sentence := few_rows(cell)) is not None:
            yield f"{label(method)}: {sentence}"
        if cell.get("mixture_gain") is not None:
            gain, error = cell["mixture_gain"], cell["mixture_gain_standard_error"]
            yield f"{label(method)} gains {gain:.2g} ± {error:.2g} nats a row over the mixture itself."
    found = {
        method: cell
        for method, cell in metrics[name].items()
        if cell.get("over_mixture") is not None and cell.get("nll_val") is not None and _is_flow(params, method, cell)
    }
    if not found:
        return
    method = min(found, key=lambda each: float(found[each]["nll_val"]))
    gain, error = found[method]["over_mixture"], found[method]["over_mixture_standard_error"]
    best = f"{label(method)}, the flow of the lowest validation NLL, "
    against = label(found[method]["over_mixture_of"])
    if gain > 2 * error:
        yield f"{best}beats {against} by {gain:.3g} ± {error:.2g} nats a row."
    elif gain < -2 * error:
        yield f"{best}does not beat {against}: it is {-gain:.3g} ± {error:.2g} nats a row worse."
    else:
        yield f"{best}is not separated from {against}: {gain:.2g} ± {error:.2g} nats a row."


def _is_flow(params: Params, method: str, cell: Mapping[str, Any]) -> bool:
    """Return whether a row is of trained networks alone: a method with gradient steps, or a mixture of such."""
    losses = [choice.loss.name for choice in members(params, method, cell)]
    return bool(losses) and CLOSED_FORMS.keys().isdisjoint(losses)


def members(params: Params, method: str, cell: Mapping[str, Any]) -> list[DensityMethod]:
    """Return the methods of a row: those of a mixture, or its own; none for a reference."""
    names = str(cell.get("mixture_of", method)).split(", ")
    return [params.density.methods[name] for name in names if name in params.density.methods]
