"""An evaluation tells models that are right, blind, diverged or broken from each other, seed by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from flowmatch_core.intervals import t_interval
from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.solvers import SolverError
from flowmatch_core.successor import GeometricHorizonModel, HorizonModel
from pipelines.config import params, yaml_files
from pipelines.environments import linear_gaussian
from pipelines.evaluation import models, truth
from pipelines.models.untrained import Untrained
from pipelines.runs import records
from pipelines.runs.context import Stage
from pipelines.runs.records import Record, RunRecord
from pipelines.stages import collect, evaluate_successor, sample_successor

ROOT = Path(__file__).parents[2]
GAMMA, STARTS, SAMPLES, SEEDS = 0.9, 6, 128, (0, 3)


class Closed(HorizonModel):
    """The closed form, blind to whatever is named, with some rows moved far away."""

    has_density = True

    def __init__(self, blind: str = "", far: float = 0.0, density: bool = True) -> None:
        super().__init__(GAMMA, None, None)
        self.mdp: LinearGaussianMDP = linear_gaussian.build(linear_gaussian.Settings()).oracle()
        self.blind, self.far, self.has_density = blind, far, density  # type: ignore[misc]

    def sample(
        self, state: Tensor, action: Tensor | None, n: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        assert action is not None
        state = torch.zeros_like(state) if "state" in self.blind else state
        action = torch.zeros_like(action) if "action" in self.blind else action
        x = self.mdp.successor(state, action, GAMMA).sample(n, generator=generator)
        x[: round(self.far * n)] += 100
        return x

    def log_prob(self, x: Tensor, state: Tensor, action: Tensor | None) -> Tensor:
        assert self.has_density
        return self.mdp.successor(state, action, GAMMA).log_prob(x)


class Broken(Closed):
    """One whose solver ends in numbers that are not finite."""

    def sample(self, *arguments: Any, **options: Any) -> Tensor:
        raise SolverError("not finite")

    def log_prob(self, *arguments: Any, **options: Any) -> Tensor:
        raise SolverError("not finite")


def flow(solver: str, steps: int) -> HorizonModel:
    mdp = Closed().mdp
    return GeometricHorizonModel(mdp.velocity_field(GAMMA), (2,), GAMMA, solver, steps)


MODELS: dict[str, Any] = {
    "right": lambda seed: Closed(),
    "no_action": lambda seed: Closed("action"),
    "no_state": lambda seed: Closed("state"),
    "tail": lambda seed: Closed(far=0.05 if seed else 0.0),  # of the second seed alone
    "broken": lambda seed: Broken() if seed else Closed(),
    "no_density": lambda seed: Closed(density=False),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], pd.DataFrame, list[str]]:
    """The metrics, the cells and the log of an evaluation on the spiral."""
    folder = tmp_path_factory.mktemp("evaluation")
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    spiral = {"kind": "linear_gaussian", "gamma": GAMMA, "transitions": 20_000, "rollouts": 4, "length": 60}
    raw["environments"] = {"spiral": {**spiral, "starts": STARTS, "reward": "bump"}}
    loss = {"loss": {"name": "td2_cfm"}}
    raw["successor"] |= {
        "methods": dict.fromkeys([*MODELS, "flow", "missing"], loss),
        "seeds": list(SEEDS),
        "sample": {"samples": SAMPLES, "solver": "midpoint", "steps": 20},
        "evaluate": {"likelihood_rows": 8, "solver": "rk4", "steps": 4, "solver_steps": {"spiral": [1, 20]}},
    }
    lines = list[str]()

    def model(given: Any, environment: str, method: str, seed: int, device: Any, solver: str, steps: int) -> Any:
        if method == "missing":
            return Untrained("nobody trained it", folder / "skipped.json")
        return flow(solver, steps) if method == "flow" else MODELS[method](seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FLOWMATCH_CORES", "1")  # the models that are put in place are in this process
        patch.setattr(models, "load", model)
        patch.setattr(Stage, "log", lambda self, message: lines.append(message))
        patch.setenv("FLOWMATCH_HOME", str(folder / "home"))
        patch.setenv("FLOWMATCH_INVOCATION", "test")
        record = RunRecord.start("test", {})
        stage = Stage("test", params.Params.model_validate(raw), record)
        for step in (collect, sample_successor, evaluate_successor):
            step.main(stage, "spiral")
    data = folder / "data"
    cells = pd.read_parquet(data / "evaluations" / "spiral" / "cells.parquet")
    return json.loads((data / "metrics" / "spiral.json").read_text()), cells, lines


@pytest.fixture(scope="module")
def recorded(results: Any, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """What the stages recorded, read from the file."""
    (record,) = records.read(tmp_path_factory.getbasetemp() / "evaluation0" / "home" / "runs" / "test")
    return record


def test_every_cell_is_recorded_with_the_names_of_the_others(results: Any, recorded: Record) -> None:
    metrics = results[0]
    cells = {(cell.method, cell.seed): cell.metrics for cell in recorded.cells}
    assert set(cells) == {(method, seed) for method in [*MODELS, "flow"] for seed in SEEDS}
    for (method, seed), numbers in cells.items():
        assert not any("seed" in name or method in name for name in numbers)
        for name in ("emd", "mse_v", "outside", "nll"):
            if f"{name}_seed{seed}" in metrics[method]:
                expected = metrics[method][f"{name}_seed{seed}"]
                assert numbers[name.replace("nll", "nll_per_dim")] == pytest.approx(expected, nan_ok=True)
        assert numbers["emd_floor"] == pytest.approx(metrics["floor"]["emd"])
        over = numbers["emd_over_floor"]
        assert over is None or over == pytest.approx(metrics[method][f"emd_seed{seed}"] / metrics["floor"]["emd"])
    assert recorded.tags["score_metric"] == "emd"
    (given,) = [given for given in recorded.inputs if given.context == "evaluation"]
    assert (given.name, given.path) == ("spiral", "data/transitions/spiral")


def test_every_number_is_a_mean_over_starts_with_an_interval_over_seeds(results: Any) -> None:
    metrics, cells, _ = results
    for method in ("floor", "right", "no_state", "flow"):
        rows = cells[cells["method"] == method]
        assert len(rows) == STARTS * len(SEEDS)
        for name, column in (("emd", "emd"), ("mse_v", "squared_value_error"), ("nll", "nll")):
            each = [rows.loc[rows["seed"] == seed, column].mean() for seed in SEEDS]
            cell = metrics[method]
            assert [cell[f"{name}_seed{seed}"] for seed in SEEDS] == pytest.approx(each)
            assert [cell[name], cell[f"{name}_low"], cell[f"{name}_high"]] == pytest.approx(list(t_interval(each)[:3]))
        worst = [rows.loc[rows["seed"] == seed, "emd"].max() for seed in SEEDS]
        assert metrics[method]["emd_worst"] == pytest.approx(np.mean(worst))
        assert metrics[method]["seeds"] == len(SEEDS)
    assert metrics["missing"] == {"skipped": "nobody trained it"}


def test_the_floor_is_drawn_anew_for_each_seed(results: Any) -> None:
    floor = results[0]["floor"]
    assert floor["emd_seed0"] != floor["emd_seed3"]
    assert floor["emd_low"] < floor["emd"] < floor["emd_high"]
    assert floor["emd_over_floor"] == 1
    assert 0.8 < results[0]["right"]["emd_over_floor"] < 1.25
    assert results[0]["right"]["nll"] == pytest.approx(floor["nll"], abs=1e-5)


def test_sensitivity_is_one_for_the_truth_and_nothing_for_the_blind(results: Any) -> None:
    metrics = results[0]
    for method in ("right", "flow", "no_density"):
        for name in ("state", "action"):
            assert metrics[method][f"sensitivity_{name}"] == pytest.approx(1, abs=0.2)
    assert metrics["no_action"]["sensitivity_action"] == pytest.approx(0, abs=1e-6)
    assert metrics["no_action"]["sensitivity_state"] == pytest.approx(1, abs=0.2)
    assert metrics["no_state"]["sensitivity_state"] == pytest.approx(0, abs=1e-6)
    assert metrics["no_state"]["sensitivity_action"] == pytest.approx(1, abs=0.2)
    assert "sensitivity_state" not in metrics["floor"]


def test_one_diverged_seed_is_named(results: Any) -> None:
    metrics, _, lines = results
    assert [name for name, cell in metrics.items() if cell.get("diverged")] == ["tail", "broken"]
    assert metrics["tail"]["outside"] == pytest.approx(0.05, abs=0.01)
    assert (metrics["tail"]["outside_seed0"], metrics["right"]["outside"]) == (0, 0)
    named = [line for line in lines if "diverged" in line]
    assert len(named) == 2
    assert named[0].startswith("tail seed 3: EMD ") and "diverged: 4.7% of the samples" in named[0]
    assert named[1].startswith("broken seed 3: EMD nan") and "diverged: 100.0% of the samples" in named[1]


def test_samples_that_are_not_finite_have_no_distance(results: Any) -> None:
    broken = results[0]["broken"]
    for name in ("emd", "emd_seed3", "mse_v", "nll", "value_bias", "sensitivity_state", "emd_over_floor"):
        assert broken[name] is None, name
    assert broken["emd_seed0"] == results[0]["right"]["emd_seed0"]
    assert broken["outside"] == 1


def test_a_coarse_solver_warns_in_the_log_and_in_the_metrics(results: Any) -> None:
    """The fields of the spiral need more than four steps of rk4, and a closed form needs none."""
    metrics, _, lines = results
    warning = metrics["flow"]["warning"]
    assert "exceeds the standard error of its mean" in warning and f"flow seed 0: {warning}" in lines
    assert "warning" not in metrics["right"]


def test_a_model_without_density_has_no_likelihood(results: Any) -> None:
    metrics = results[0]
    assert metrics["no_density"]["has_density"] is False
    assert "nll" not in metrics["no_density"]
    assert metrics["right"]["has_density"] is True
    assert metrics["no_density"]["emd"] == metrics["right"]["emd"]


def test_other_numbers_of_solver_steps_use_the_noise_of_the_samples(results: Any) -> None:
    metrics = results[0]
    cell = metrics["flow"]
    for seed in SEEDS:
        assert cell[f"emd_steps20_seed{seed}"] == pytest.approx(cell[f"emd_seed{seed}"], rel=1e-5)
        assert cell[f"mse_v_steps20_seed{seed}"] == pytest.approx(cell[f"mse_v_seed{seed}"], rel=1e-4)
    assert cell["emd_steps1"] > 1.02 * cell["emd"]
    assert cell["emd_steps1_low"] < cell["emd_steps1"] < cell["emd_steps1_high"]
    assert not any("steps" in name for name in metrics["right"])  # it is no flow


def test_the_mean_of_the_truth_is_that_of_its_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    states, actions = torch.randn(2, 3, 41, 2, generator=generator, dtype=torch.float64)
    at = truth.Starts(["x", "y"], states, actions, torch.zeros(3, 41, dtype=torch.bool))
    for mdp in (None, Closed().mdp):
        x = truth.truth(at, mdp, GAMMA, 50_000, generator)
        error = x.std(0) / 50_000**0.5
        assert (truth.true_mean(at, mdp, GAMMA) - x.mean(0)).abs().div(error).max() < 4


@pytest.mark.parametrize(("x", "out"), [(1.9, 0), (2.1, 1), (-0.9, 0), (-1.1, 1), (float("nan"), 1), (float("inf"), 1)])
def test_outside_is_beyond_the_range_widened_by_its_width(x: float, out: float) -> None:
    provenance = {"low": [0.0, 0.0], "high": [1.0, 100.0]}
    assert truth.outside(torch.tensor([[0.5, 150.0], [x, 50.0]]), provenance) == out / 2
