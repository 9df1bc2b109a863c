"""Score every density model of a data set on its test rows, with the sampling floor of each distance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from flowmatch_core import metrics
from pipelines import datasets
from pipelines.base import device, files, layout
from pipelines.models import density
from pipelines.runs.context import Stage
from pipelines.runs.records import Cell


@dataclass(frozen=True)
class TestRows:
    """The true rows that the models of a data set are compared with.

    Attributes:
        provenance: Description of the data set.
        test: Test rows, `(n, columns)`, in the units of the data.
        other: Validation rows, in the same form, for the floor.
    """

    provenance: dict[str, Any]
    test: Tensor
    other: Tensor

    @classmethod
    def read(cls, dataset: str, device: torch.device) -> TestRows:
        """Read the rows of a prepared data set."""
        folder = layout.prepared(dataset)
        provenance = files.read_json(layout.provenance(folder))
        columns = provenance["columns"]
        test, other = (
            _tensor(files.read_table(layout.part(folder, part), columns), columns, device) for part in ("test", "val")
        )
        return cls(provenance, test, other)


def evaluate(stage: Stage, dataset: str) -> None:
    """Score the models of a data set: likelihood with its solver error, and distances with their floors."""
    params, settings = stage.params.density, stage.params.density.evaluate
    chosen = device.use(stage.params.device, stage.params.threads)
    rows = TestRows.read(dataset, chosen)
    columns = rows.provenance["columns"]
    size = min(settings.rows, params.sample.samples, len(rows.test), len(rows.other))
    scored = rows.test[: settings.likelihood_rows]

    def distances(x: Tensor) -> dict[str, float]:
        generator = stage.generator("evaluate", dataset, device=chosen)
        x, y = x[:size], rows.test[:size]
        sliced = metrics.sliced_wasserstein(x, y, projections=settings.projections, generator=generator)
        return {"emd": float(metrics.emd(x, y)), "sliced_wasserstein": float(sliced)}

    found, warnings = [], dict[str, str]()
    for method in params.methods:
        table = files.read_table(layout.sampled(layout.samples(dataset), method), [*columns, "seed"])
        for seed in params.seeds:
            file = layout.network(layout.models(dataset, method), seed)
            likelihood, warning = _likelihood(file, scored, settings.solver, settings.steps, chosen)
            if warning is not None:
                warnings.setdefault(method, warning)
                stage.log(f"{method} seed {seed}: {warning}")
            samples = _tensor(table[table["seed"] == seed], columns, chosen)
            found.append({"method": method, "seed": seed, **likelihood, **distances(samples)})
            stage.log("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in found[-1].items()))
    cells = pd.DataFrame(found)
    with stage.output(layout.evaluations(dataset)) as folder:
        files.write_table(layout.cells(folder), cells)
    summary = _summary(cells, rows.provenance)
    summary["floor"] = {**distances(rows.other), **_exact_nll(stage, dataset, rows.provenance["kind"], scored)}
    with stage.output(layout.metrics(dataset)) as temporary:
        noted = {method: {"warning": warning} for method, warning in warnings.items()}
        files.write_json(temporary, {method: {**values, **noted.get(method, {})} for method, values in summary.items()})
    _record(stage, dataset, found, summary["floor"], rows.provenance)


def _record(
    stage: Stage,
    dataset: str,
    found: Sequence[Mapping[str, Any]],
    floor: Mapping[str, float | None],
    provenance: Mapping[str, Any],
) -> None:
    """Record the numbers of each cell."""
    stage.record.tag("score_metric", "nll")
    stage.record.data(dataset, "evaluation", layout.prepared(dataset), provenance)
    dims = len(provenance["columns"])
    cells = []
    for row in found:
        numbers = {name: value for name, value in row.items() if name not in ("method", "seed")}
        numbers |= {"nll_per_dim": row["nll"] / dims, "emd_over_floor": row["emd"] / (floor["emd"] or math.nan)}
        numbers |= {f"{name}_floor": value for name, value in floor.items() if value is not None}
        model = files.md5(layout.network(layout.models(dataset, row["method"]), row["seed"]))
        cells.append(Cell(dataset, row["method"], row["seed"], metrics=numbers, model=model))
    stage.record.cells(cells)


def _likelihood(
    file: Any, scored: Tensor, solver: str, steps: int, chosen: torch.device
) -> tuple[dict[str, float], str | None]:
    """Return the likelihood of a model with its errors, and a sentence where the solver's is too large."""
    flow = density.load(file, chosen, solver, steps // 2)  # `estimate` takes twice the steps of the flow
    with torch.no_grad():
        estimate = flow.estimate(scored)
    log_prob = estimate.log_prob.double()
    numbers = {
        "nll": float(-log_prob.mean()),
        "nll_standard_error": float(log_prob.std() / len(log_prob) ** 0.5),
        "nll_solver_error": float(estimate.solver_error.double().square().mean().sqrt()),
    }
    return numbers, estimate.warning()


def _summary(cells: pd.DataFrame, provenance: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return means over seeds by method, and standard deviations if there are several seeds."""
    bins, dims = provenance["discrete_bins"], len(provenance["columns"])
    summary: dict[str, dict[str, float | None]] = {}
    for method, group in cells.groupby("method", sort=False):
        means = {name: float(group[name].mean()) for name in group.columns if name not in ("method", "seed")}
        spread = {f"{name}_std": float(group[name].std()) for name in ("nll", "emd", "sliced_wasserstein")}
        summary[str(method)] = {**means, **(spread if len(group) > 1 else {})}
        if bins is not None:
            log_prob = torch.tensor(-means["nll"])
            summary[str(method)]["bits_per_dim"] = float(metrics.bits_per_dim(log_prob, dims, 1 / bins))
    return summary


def _exact_nll(stage: Stage, dataset: str, kind: str, scored: Tensor) -> dict[str, float | None]:
    """Return the negative log-likelihood of the exact density, or nothing if the data set has none."""
    settings = stage.params.datasets[dataset].settings()
    exact = datasets.log_prob(kind, settings, scored.cpu().numpy().astype(np.float64))
    return {} if exact is None else {"nll": float(-exact.mean())}


def _tensor(table: pd.DataFrame, columns: list[str], device: torch.device) -> Tensor:
    return torch.tensor(table[columns].to_numpy(), dtype=torch.float32, device=device)
