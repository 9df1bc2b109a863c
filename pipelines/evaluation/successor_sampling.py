"""Sample successor models, and save the states of particles along flow time and maps of values."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from flowmatch_core.solvers import SolverError
from flowmatch_core.successor import GeometricHorizonModel, HorizonModel
from pipelines import environments
from pipelines.base import device, files, layout
from pipelines.config.catalog import ORACLE
from pipelines.config.params import EnvironmentEntry
from pipelines.environments import Simulator
from pipelines.evaluation import models, truth
from pipelines.evaluation.truth import Starts
from pipelines.models.untrained import Untrained
from pipelines.runs.context import Stage

PARTICLES, STEPS = 300, 20
TIMES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)  # multiples of 1 / STEPS; the state changes most near t = 1
GRID, GRID_SAMPLES = 20, 64


def sample(stage: Stage, environment: str) -> None:
    """Sample the models of an environment from its start states; all methods receive the same noise."""
    successor, entry = stage.params.successor, stage.params.environments[environment]
    settings = successor.sample
    chosen = device.use(stage.params.device, stage.params.threads)
    start = truth.read(layout.collected(environment), chosen)
    built = environments.build(entry.kind, entry.settings())
    with stage.output(layout.samples(environment)) as folder:
        folder.mkdir()
        value_map = None
        if isinstance(built, Simulator) and len(built.state_names) > 1:
            value_map = ValueMap(built, entry, stage.rng("value_map", environment))
        for method, choice in successor.methods.items():
            seeds, tables = successor.seeds_for(entry, method), []
            for seed in seeds:
                model = models.load(stage.params, environment, method, seed, chosen, settings.solver, settings.steps)
                if isinstance(model, Untrained):
                    stage.log(f"{method}: left out, {model.reason}")
                    break
                generator = stage.generator("sample", environment, seed, device=chosen)
                x = models.sample(model, start.state, start.action, settings.samples, generator)
                tables.append(truth.table(x, start.names, seed=seed))
                if seed == seeds[0]:
                    generator = stage.generator("pictures", environment, device=chosen)
                    if isinstance(model, GeometricHorizonModel):
                        states = _trajectory(model, start, generator)
                        files.write_table(layout.trajectory(folder, method), states)
                    if value_map is not None and choice.loss.name != ORACLE:  # slow, and equal to the truth
                        value_map.add(method, model, generator)
            else:
                files.write_table(layout.sampled(folder, method), pd.concat(tables, ignore_index=True))
                stage.log(f"{method}: {settings.samples} samples per start, {settings.solver}, {settings.steps} steps")
        if value_map is not None:
            files.write_table(layout.value_map(folder), value_map.table())


def _trajectory(model: GeometricHorizonModel, start: Starts, generator: torch.Generator) -> pd.DataFrame:
    """Return the states of particles of the first start state at `TIMES`, without rows that are not finite."""
    with torch.no_grad():
        states = model.particles(start.state[:1], start.action[:1], PARTICLES, STEPS, generator=generator)
    tables = [
        pd.DataFrame(states[round(t * STEPS), :, 0].cpu().numpy(), columns=start.names).assign(time=t, start=0)
        for t in TIMES
    ]
    table = pd.concat(tables, ignore_index=True)
    return table[torch.isfinite(torch.tensor(table.to_numpy())).all(1).numpy()]


class ValueMap:
    """The values V(s, pi(s)) of states at rest on a grid of positions, true and by models."""

    def __init__(self, environment: Simulator, entry: EnvironmentEntry, rng: np.random.Generator) -> None:
        self.environment, self.reward, self.gamma = environment, entry.reward, entry.gamma
        self.state = environment.grid(GRID)
        self.values = {"truth": environment.values(self.state, entry.reward, entry.gamma, entry.length, rng)}

    def add(self, method: str, model: HorizonModel, generator: torch.Generator) -> None:
        """Add the values of a model, unless it diverges on the grid."""

        def reward(x: Tensor) -> Tensor:
            return torch.from_numpy(truth.rewards(self.environment, self.reward, x))

        state, action = (
            torch.tensor(rows, dtype=torch.float32, device=generator.device)
            for rows in (self.state, self.environment.policy(self.state))
        )
        try:
            with torch.no_grad():
                value = model.value(reward, state, action, GRID_SAMPLES, generator=generator).numpy()
        except SolverError:
            return
        if np.isfinite(value).all():
            self.values[method] = value

    def table(self) -> pd.DataFrame:
        """Return one row per position and method, including `truth`."""
        x, y = self.state[:, 0], self.state[:, 1]
        tables = [pd.DataFrame({"x": x, "y": y, "method": m, "value": v}) for m, v in self.values.items()]
        return pd.concat(tables, ignore_index=True)
