"""The likelihood of an evaluation: its numbers, and its warning where the solver is too coarse for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.solvers import TimeGrid
from pipelines.config import params
from pipelines.config.params import GridChoice
from pipelines.evaluation import density as evaluation
from pipelines.models import density
from pipelines.reporting.tables import density as table

PARAMS = params.load(Path(__file__).parents[2] / "params.yaml")
TRUTH = GaussianMixture(
    torch.tensor([0.5, 0.5]), torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.1 * torch.eye(2).repeat(2, 1, 1)
)


def likelihood(monkeypatch: pytest.MonkeyPatch, steps: int) -> tuple[dict[str, float], str | None]:
    def load(file: Path, device: torch.device, solver: str, steps: int, grid: TimeGrid) -> ContinuousFlow:
        return ContinuousFlow(TRUTH.velocity_field(), (2,), solver, steps, grid=grid)

    monkeypatch.setattr(density, "load", load)
    rows = TRUTH.sample(400, generator=torch.Generator().manual_seed(0))
    settings = PARAMS.density.evaluate.model_copy(
        update={"solver": "rk4", "grid": GridChoice(name="uniform"), "steps": steps}
    )
    return evaluation._likelihood(Path(), rows, settings, torch.device("cpu"))


def test_a_likelihood_is_reported_with_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, warning = likelihood(monkeypatch, 128)
    exact = TRUTH.log_prob(TRUTH.sample(400, generator=torch.Generator().manual_seed(0)))
    assert numbers["nll"] == pytest.approx(float(-exact.mean()), abs=1e-3)
    assert numbers["nll_standard_error"] == pytest.approx(float(exact.std()) / 20, rel=1e-2)
    assert numbers["nll_solver_error"] < numbers["nll_standard_error"] and warning is None


def test_a_coarse_solver_warns_in_the_metrics_and_below_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, warning = likelihood(monkeypatch, 4)
    assert numbers["nll_solver_error"] > numbers["nll_standard_error"]
    assert warning is not None and "exceeds the standard error of its mean" in warning
    cells: dict[str, Any] = {name: {"emd": 0.2} for name in ("floor", *PARAMS.density.methods)}
    metrics = {name: {**cells, "cfm": {"emd": 0.2, "warning": warning}} for name in PARAMS.datasets}
    origins = {name: {"source": "s", "fidelity": "f", "notes": ""} for name in PARAMS.datasets}
    notes = table.build(PARAMS, metrics, {}, origins).notes
    assert [note for note in notes if warning in note] == [f"{name}, cfm: {warning}" for name in PARAMS.datasets]
