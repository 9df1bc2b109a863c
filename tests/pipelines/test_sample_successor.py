"""What the pictures of a successor model show: values of states at rest, and samples on their way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowmatch_core.solvers import SolverError
from flowmatch_core.successor import GeometricHorizonModel, HorizonModel
from pipelines.config import params
from pipelines.environments import Array, Simulator, linear_gaussian, maze
from pipelines.evaluation import models, successor_sampling
from pipelines.evaluation.successor_sampling import PARTICLES, TIMES, ValueGrid
from pipelines.evaluation.truth import Starts

PARAMS = params.load(Path(__file__).parents[2] / "params.yaml")
SPIRAL, MAZE = linear_gaussian.build(linear_gaussian.Settings()), maze.build(maze.Settings())


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_mazes_grid_is_at_rest_where_the_ball_has_room() -> None:
    state = MAZE.grid(20)
    assert 300 < len(state) < 400 and len(np.unique(state, axis=0)) == len(state)
    assert (maze.clearance(state[:, :2]) >= maze.RADIUS).all() and not state[:, 2:].any()
    still = MAZE.step(state, np.zeros((len(state), 2)), rng())
    np.testing.assert_allclose(still, state, atol=1e-9)  # nothing pushes it away
    np.testing.assert_allclose(
        Simulator.grid(MAZE, 2)[:, :2], [[-0.15, -0.15], [0.15, -0.15], [-0.15, 0.15], [0.15] * 2]
    )


def test_values_of_a_simulator_are_the_closed_form_where_there_is_one() -> None:
    state = SPIRAL.grid(5)
    exact = SPIRAL.exact_values(state, SPIRAL.policy(state), 0.9)["bump"]
    np.testing.assert_array_equal(SPIRAL.values(state, "bump", 0.9, 3, rng()), exact)


def test_values_of_a_simulator_are_else_the_discounted_rewards_of_the_next_states() -> None:
    state = MAZE.grid(6)
    expected, now = np.zeros(len(state)), state
    for k in range(4):
        now = MAZE.step(now, MAZE.policy(now), rng())
        expected += 0.9**k * MAZE.rewards(now)["loop"]
    np.testing.assert_allclose(MAZE.values(state, "loop", 0.9, 4, rng()), expected, rtol=1e-12)


class Constant(HorizonModel):
    """Everything ends in the state itself, so far away from it, or nowhere."""

    has_density = False

    def __init__(self, gamma: float, fault: Exception | None = None, away: float = 0.0) -> None:
        super().__init__(gamma, None, None)
        self.fault, self.away = fault, away

    def sample(
        self, state: Tensor, action: Tensor | None, n: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        if self.fault:
            raise self.fault
        assert action is not None
        torch.testing.assert_close(action, torch.tensor(SPIRAL.policy(state.numpy())))
        return (state + self.away).expand(n, *state.shape)

    def log_prob(self, x: Tensor, state: Tensor, action: Tensor | None) -> Tensor:
        raise NotImplementedError


def grid() -> ValueGrid:
    return ValueGrid(SPIRAL, PARAMS.environments["spiral"])


def test_the_value_map_has_the_entrys_reward_and_discount_beside_the_truth() -> None:
    here = grid()
    still = here.values(Constant(0.95), torch.Generator())
    assert still is not None
    table = here.table({"truth": here.truth(rng()), "still": still})
    assert list(table.columns) == ["x", "y", "method", "value"]
    assert list(table["method"].unique()) == ["truth", "still"]
    rows = table[table["method"] == "still"]
    bump: Array = SPIRAL.rewards(rows[["x", "y"]].to_numpy())["bump"]
    np.testing.assert_allclose(rows["value"], bump / 0.05, rtol=1e-5)


@pytest.mark.parametrize("how", [{"fault": SolverError("far away")}, {"away": np.nan}, {"away": np.inf}])
def test_a_model_that_diverges_on_the_grid_has_no_values(how: dict[str, Any]) -> None:
    assert grid().values(Constant(0.95, **how), torch.Generator()) is None


@pytest.mark.parametrize(("solver", "finite"), [("midpoint", 0.5), ("dopri5", 0.0)])
def test_samples_of_a_model_that_diverged_are_kept_as_they_are(solver: str, finite: float) -> None:
    def field(t: object, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.where(x <= 0, 0.0, torch.nan)

    model = GeometricHorizonModel(field, (1,), 0.9, solver, 4)
    x = models.sample(model, torch.zeros(4, 1), torch.zeros(4, 1), 1000, torch.Generator().manual_seed(0))
    assert x.shape == (1000, 4, 1)
    assert model.flow.check  # a likelihood is checked as before
    assert float(x.isfinite().float().mean()) == pytest.approx(finite, abs=0.05)


@pytest.mark.parametrize("explodes", [False, True])
def test_particles_stand_at_every_time_and_are_finite(explodes: bool) -> None:
    def field(t: object, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.where(x > 1, torch.inf, 0.0) if explodes else torch.ones_like(x)

    start = Starts(["x", "y"], torch.zeros(4, 3, 2), torch.zeros(4, 3, 1), torch.zeros(4, 3, dtype=torch.bool))
    model = GeometricHorizonModel(field, (2,), 0.9, loc=torch.tensor([5.0, 0.0]), scale=torch.tensor([2.0, 1.0]))
    table = successor_sampling._trajectory(model, start, torch.Generator().manual_seed(0))
    assert list(table.columns) == ["x", "y", "time", "start"]
    assert np.isfinite(table.to_numpy()).all()
    counts = table.groupby("time").size()
    assert list(counts.index) == list(TIMES)
    if explodes:
        assert counts[0.0] == PARTICLES > counts[1.0] > 0
    else:
        assert (counts == PARTICLES).all()
        mean = table.groupby("time")["x"].mean()
        np.testing.assert_allclose(mean - mean[0.0], 2 * np.array(TIMES), atol=1e-4)  # raw units
