"""Score every density model of a data set on its test rows, with the sampling floor of each distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from flowmatch_core import metrics
from pipelines import datasets
from pipelines.base import device, files, layout, seeding
from pipelines.config.params import DensityEvaluation, Params
from pipelines.evaluation import cells
from pipelines.evaluation.cells import Cell
from pipelines.models import build, density
from pipelines.runs import records
from pipelines.runs.context import Stage


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


class Scorer:
    """The scores of one model of a data set; it is pickled as its arguments and reads the rows again.

    Attributes:
        rows: True rows.
        scored: Test rows whose likelihood is computed.
    """

    def __init__(self, params: Params, dataset: str, device: torch.device) -> None:
        self.arguments = params, dataset, device
        self.params, self.dataset, self.device = self.arguments
        self.settings = params.density.evaluate
        self.rows = TestRows.read(dataset, device)
        self.size = min(self.settings.rows, params.density.sample.samples, len(self.rows.test), len(self.rows.other))
        self.scored = self.rows.test[: self.settings.likelihood_rows]

    def __reduce__(self) -> tuple[type[Scorer], tuple[Params, str, torch.device]]:
        return Scorer, self.arguments

    def __call__(self, cell: Cell, send: Callable[[str], None]) -> tuple[dict[str, Any], str | None]:
        """Return the numbers of a model, and a sentence where the solver's error is too large; send both as lines."""
        method, seed = cell
        columns = self.rows.provenance["columns"]
        table = files.read_table(layout.sampled(layout.samples(self.dataset), method), [*columns, "seed"])
        file = layout.network(layout.models(self.dataset, method), seed)
        likelihood, warning = _likelihood(file, self.scored, self.settings, self.device)
        if warning is not None:
            send(f"{cell}: {warning}")
        samples = _tensor(table[table["seed"] == seed], columns, self.device)
        numbers = {"method": method, "seed": seed, **likelihood, **self.distances(samples)}
        send("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items()))
        return numbers, warning

    def distances(self, x: Tensor) -> dict[str, float]:
        """Return the distances of samples to the test rows."""
        generator = seeding.generator(self.params.seed, "evaluate", self.dataset, device=self.device)
        x, y = x[: self.size], self.rows.test[: self.size]
        sliced = metrics.sliced_wasserstein(x, y, projections=self.settings.projections, generator=generator)
        return {"emd": float(metrics.emd(x, y)), "sliced_wasserstein": float(sliced)}


def evaluate(stage: Stage, dataset: str) -> None:
    """Score the models of a data set: likelihood with its solver error, and distances with their floors."""
    params = stage.params.density
    chosen = device.use(stage.params.device, stage.params.threads)
    scorer = Scorer(stage.params, dataset, chosen)
    every = [Cell(method, seed) for method in params.methods for seed in params.seeds]
    scores = cells.each(stage, scorer, every, chosen)
    warnings: dict[str, str] = {}
    for cell, (_, warning) in scores.items():
        if warning is not None:
            warnings.setdefault(cell.method, warning)
    found = pd.DataFrame([numbers for numbers, _ in scores.values()])
    with stage.output(layout.evaluations(dataset)) as folder:
        files.write_table(layout.cells(folder), found)
    summary = _summary(found, scorer.rows.provenance)
    summary["floor"] = {**scorer.distances(scorer.rows.other), **_exact_nll(stage, dataset, scorer)}
    with stage.output(layout.metrics(dataset)) as temporary:
        noted = {method: {"warning": warning} for method, warning in warnings.items()}
        files.write_json(temporary, {method: {**values, **noted.get(method, {})} for method, values in summary.items()})
    numbers = [numbers for numbers, _ in scores.values()]
    _record(stage, dataset, numbers, summary["floor"], scorer.rows.provenance)


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
    scored = []
    for row in found:
        numbers = {name: value for name, value in row.items() if name not in ("method", "seed")}
        numbers |= {"nll_per_dim": row["nll"] / dims, "emd_over_floor": row["emd"] / (floor["emd"] or math.nan)}
        numbers |= {f"{name}_floor": value for name, value in floor.items() if value is not None}
        model = files.md5(layout.network(layout.models(dataset, row["method"]), row["seed"]))
        scored.append(records.Cell(dataset, row["method"], row["seed"], metrics=numbers, model=model))
    stage.record.cells(scored)


def _likelihood(
    file: Path, scored: Tensor, settings: DensityEvaluation, chosen: torch.device
) -> tuple[dict[str, float], str | None]:
    """Return the likelihood of a model with its errors, and a sentence where the solver's is too large."""
    grid = build.grid(settings.grid)
    flow = density.load(file, chosen, settings.solver, settings.steps // 2, grid=grid)  # `estimate` doubles the steps
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


def _exact_nll(stage: Stage, dataset: str, scorer: Scorer) -> dict[str, float | None]:
    """Return the negative log-likelihood of the exact density, or nothing if the data set has none."""
    settings = stage.params.datasets[dataset].settings()
    scored = scorer.scored.cpu().numpy().astype(np.float64)
    exact = datasets.log_prob(scorer.rows.provenance["kind"], settings, scored)
    return {} if exact is None else {"nll": float(-exact.mean())}


def _tensor(table: pd.DataFrame, columns: list[str], device: torch.device) -> Tensor:
    return torch.tensor(table[columns].to_numpy(), dtype=torch.float32, device=device)
