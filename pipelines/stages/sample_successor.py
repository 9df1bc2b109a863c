"""Sample every successor model of an environment from the same start states with the same noise.

Beside the samples stands what pictures need: the way that particles take through flow time (`<method>.path.parquet`),
and the value of states at rest on a grid of positions, true and by each model (`value_map.parquet`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import members, store
from pipelines.params import ORACLE
from pipelines.stage import DATA, Stage, run

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

    from flowmatch_core.successor import GeometricHorizonModel, HorizonModel
    from pipelines.environments import Simulator
    from pipelines.params import Environment
    from pipelines.starts import Starts

PARTICLES, STEPS = 300, 20
TIMES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)  # multiples of 1 / STEPS; most happens late
GRID, GRID_SAMPLES = 20, 64


def main(stage: Stage, environment: str) -> None:
    import pandas as pd

    from flowmatch_core.successor import GeometricHorizonModel
    from pipelines import horizon, starts, training
    from pipelines.environments import Simulator

    successor = stage.params.successor
    entry, settings = stage.params.environments[environment], successor.sample
    device = training.use(stage.params)
    start = starts.read(DATA / "transitions" / environment, device)
    built = members.load("pipelines.environments", entry.kind).build(entry.settings())
    with stage.output(DATA / "samples" / environment) as folder:
        folder.mkdir()
        value_map = None
        if isinstance(built, Simulator) and len(built.state_names) > 1:
            value_map = ValueMap(built, entry, stage.rng("value_map", environment))
        for method, choice in successor.methods.items():
            tables = []
            for seed in successor.seeds:
                trained = DATA / "models" / environment / method
                model = horizon.horizon_model(trained, seed, entry, choice, device, settings.solver, settings.steps)
                if isinstance(model, str):
                    stage.log(f"{method}: left out, {model}")
                    break
                generator = stage.generator("sample", environment, seed, device=device)
                x = horizon.sample(model, start.state, start.action, settings.samples, generator)
                tables.append(starts.table(x, start.names, seed=seed))
                if seed == successor.seeds[0]:
                    generator = stage.generator("pictures", environment, device=device)
                    if isinstance(model, GeometricHorizonModel):
                        store.write_table(folder / f"{method}.path.parquet", _particles(model, start, generator))
                    if value_map is not None and choice.loss.name != ORACLE:  # it is the truth, and slow
                        value_map.add(method, model, generator)
            else:
                store.write_table(folder / f"{method}.parquet", pd.concat(tables, ignore_index=True))
                stage.log(f"{method}: {settings.samples} samples a start by {settings.solver}, {settings.steps} steps")
        if value_map is not None:
            store.write_table(folder / "value_map.parquet", value_map.table())


def _particles(model: GeometricHorizonModel, start: Starts, generator: torch.Generator) -> pd.DataFrame:
    """Where particles of the first start state are at `TIMES`; those that leave the finite numbers are left out."""
    import pandas as pd
    import torch

    with torch.no_grad():
        way = model.particles(start.state[:1], start.action[:1], PARTICLES, STEPS, generator=generator)[:, :, 0]
    tables = [
        pd.DataFrame(way[round(t * STEPS)].cpu().numpy(), columns=start.names).assign(time=t, start=0) for t in TIMES
    ]
    table = pd.concat(tables, ignore_index=True)
    return table[torch.isfinite(torch.tensor(table.to_numpy())).all(1).numpy()]


class ValueMap:
    """V(s, pi(s)) of states at rest on a grid of positions, true and by models."""

    def __init__(self, environment: Simulator, entry: Environment, rng: np.random.Generator) -> None:
        self.environment, self.reward, self.gamma = environment, entry.reward, entry.gamma
        self.state = environment.grid(GRID)
        self.values = {"truth": environment.values(self.state, entry.reward, entry.gamma, entry.length, rng)}

    def add(self, method: str, model: HorizonModel, generator: torch.Generator) -> None:
        """Take a model in; one that diverges on the grid has no values there."""
        import numpy as np
        import torch

        from flowmatch_core.solvers import SolverError
        from pipelines import starts

        def reward(x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(starts.rewards(self.environment, self.reward, x))

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
        """One row a position and method, `truth` among them."""
        import pandas as pd

        x, y = self.state[:, 0], self.state[:, 1]
        tables = [pd.DataFrame({"x": x, "y": y, "method": m, "value": v}) for m, v in self.values.items()]
        return pd.concat(tables, ignore_index=True)


if __name__ == "__main__":
    run(main)
