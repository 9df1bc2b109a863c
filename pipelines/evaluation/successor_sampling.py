"""Sample successor models, and save the states of particles along flow time and maps of values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from flowmatch_core.solvers import SolverError
from flowmatch_core.successor import GeometricHorizonModel, HorizonModel
from pipelines import environments
from pipelines.base import device, files, layout, metric_keys, seeding
from pipelines.config.catalog import ORACLE
from pipelines.config.params import EnvironmentEntry, Params
from pipelines.environments import Array, Simulator
from pipelines.evaluation import cells, models, truth
from pipelines.evaluation.cells import Cell
from pipelines.evaluation.truth import Starts
from pipelines.models.untrained import Untrained
from pipelines.runs.context import Stage

PARTICLES, STEPS = 300, 20
TIMES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)  # multiples of 1 / STEPS; the state changes most near t = 1
GRID, GRID_SAMPLES = 20, 64


class Sampled(NamedTuple):
    """What is drawn from one model.

    Attributes:
        rows: Samples from the start states.
        trajectory: States of particles, of the first seed of a model that has a flow.
        values: Values on the grid, of the first seed of a trained model that does not diverge there.
    """

    rows: pd.DataFrame
    trajectory: pd.DataFrame | None = None
    values: Array | None = None


def sample(stage: Stage, environment: str) -> None:
    """Sample the models of an environment from its start states; all methods receive the same noise."""
    sampler = Sampler(stage.params, environment)
    settings, entry = stage.params.successor, sampler.entry
    kind, every = settings.sample, list[Cell]()
    for method in settings.methods:
        seeds = settings.seeds_for(entry, method)
        model = sampler.load(method, seeds[0])
        if isinstance(model, Untrained):
            stage.log(f"{method}: left out, {model.reason}")
        else:
            every += [Cell(method, seed) for seed in seeds]
    with stage.output(layout.samples(environment)) as folder:
        folder.mkdir()
        grid = sampler.grid
        values = {} if grid is None else {"truth": grid.truth(stage.rng("value_map", environment))}
        drawn = cells.each(stage, sampler, every, sampler.device)
        for method in dict.fromkeys(cell.method for cell in every):
            here = [drawn[cell] for cell in every if cell.method == method]
            files.write_table(layout.sampled(folder, method), pd.concat([one.rows for one in here], ignore_index=True))
            if here[0].trajectory is not None:
                files.write_table(layout.trajectory(folder, method), here[0].trajectory)
            if here[0].values is not None:
                values[method] = here[0].values
            stage.log(f"{method}: {kind.samples} samples per start, {kind.solver}, {kind.steps} steps")
        if grid is not None:
            files.write_table(layout.value_map(folder), grid.table(values))


class Sampler:
    """The sampling of one environment's models; it is pickled as its arguments and reads the start states again.

    Attributes:
        grid: Positions of the map of values, where states have any.
    """

    def __init__(self, params: Params, environment: str) -> None:
        self.params, self.environment = params, environment
        self.entry, self.successor = params.environments[environment], params.successor
        self.device = device.use(params.device, params.threads)
        self.start = truth.read(layout.collected(environment), self.device)
        built = environments.build(self.entry.kind, self.entry.settings())
        self.grid = None
        shown = len(built.state_names) > 1 and self.entry.reward is not None
        if shown and isinstance(built, Simulator) and built.positions and built.family is None:
            self.grid = ValueGrid(built, self.entry)

    def __reduce__(self) -> tuple[type[Sampler], tuple[Params, str]]:
        return Sampler, (self.params, self.environment)

    def load(self, method: str, seed: int) -> HorizonModel | Untrained:
        """Return a model, or the reason why there is none."""
        kind = self.successor.sample
        return models.load(self.params, self.environment, method, seed, self.device, kind.solver, kind.steps)

    def __call__(self, cell: Cell, send: object) -> Sampled:
        """Return what is drawn from a model; its pictures only for the first seed of a method."""
        method, seed = cell
        model, start = self.load(method, seed), self.start
        assert not isinstance(model, Untrained), model.reason
        generator = seeding.generator(self.params.seed, "sample", self.environment, seed, device=self.device)
        x = models.sample(model, start.state, start.action, self.successor.sample.samples, generator)
        rows = truth.table(x, start.names, seed=seed)
        if seed != self.successor.seeds_for(self.entry, method)[0]:
            return Sampled(rows)
        generator = seeding.generator(self.params.seed, "pictures", self.environment, device=self.device)
        states = _trajectory(model, start, generator) if isinstance(model, GeometricHorizonModel) else None
        oracle = self.successor.methods[method].loss.name == ORACLE  # slow, and equal to the truth
        values = None if self.grid is None or oracle else self.grid.values(model, generator)
        return Sampled(rows, states, values)


def _trajectory(model: GeometricHorizonModel, start: Starts, generator: torch.Generator) -> pd.DataFrame:
    """Return the states of particles of the first start state at `TIMES`, without rows that are not finite."""
    with torch.no_grad():
        states = model.particles(start.state[:1], start.action[:1], PARTICLES, STEPS, generator=generator)
    time, number = (metric_keys.free(name, start.names) for name in ("time", "start"))
    tables = [
        pd.DataFrame(states[round(t * STEPS), :, 0].cpu().numpy(), columns=start.names).assign(**{time: t, number: 0})
        for t in TIMES
    ]
    table = pd.concat(tables, ignore_index=True)
    return table[torch.isfinite(torch.tensor(table.to_numpy())).all(1).numpy()]


class ValueGrid:
    """The values V(s, pi(s)) of states at rest on a grid of positions."""

    def __init__(self, environment: Simulator, entry: EnvironmentEntry) -> None:
        assert entry.reward is not None  # it may be null for logs alone, and so may `length`
        self.environment, self.entry, self.reward = environment, entry, entry.reward
        self.state = environment.grid(GRID)

    def truth(self, rng: np.random.Generator) -> Array:
        """Return the true values."""
        assert self.entry.length is not None
        return self.environment.values(self.state, self.reward, self.entry.gamma, self.entry.length, rng)

    def values(self, model: HorizonModel, generator: torch.Generator) -> Array | None:
        """Return the values of a model, or None if it diverges on the grid."""

        def reward(x: Tensor) -> Tensor:
            return torch.from_numpy(truth.rewards(lambda state: self.environment.rewards(state)[self.reward], x))

        state, action = (
            torch.tensor(rows, dtype=torch.float64, device=generator.device)
            for rows in (self.state, self.environment.policy(self.state))
        )
        try:
            with torch.no_grad():
                value: Array = model.value(reward, state, action, GRID_SAMPLES, generator=generator).numpy()
        except SolverError:
            return None
        return value if np.isfinite(value).all() else None

    def table(self, values: Mapping[str, Array]) -> pd.DataFrame:
        """Return one row per position and method, of which one is `truth`."""
        x, y = self.state[:, 0], self.state[:, 1]
        tables = [pd.DataFrame({"x": x, "y": y, "method": m, "value": v}) for m, v in values.items()]
        return pd.concat(tables, ignore_index=True)
