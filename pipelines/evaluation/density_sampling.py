"""Sample density models, and save the states of particles along flow time and planar velocity fields."""

from __future__ import annotations

import pandas as pd
import torch

from flowmatch_core.flow import ContinuousFlow
from pipelines.base import device, files, layout
from pipelines.models import density
from pipelines.runs.context import Stage

PARTICLES, STEPS = 500, 20
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
GRID = 21


def sample(stage: Stage, dataset: str) -> None:
    """Sample the models of a data set; all methods receive the same noise."""
    params, settings = stage.params.density, stage.params.density.sample
    chosen = device.use(stage.params.device, stage.params.threads)
    columns = files.read_json(layout.provenance(layout.prepared(dataset)))["columns"]
    with stage.output(layout.samples(dataset)) as folder:
        for method in params.methods:
            tables = []
            for seed in params.seeds:
                file = layout.network(layout.models(dataset, method), seed)
                flow = density.load(file, chosen, settings.solver, settings.steps)
                generator = stage.generator("sample", dataset, seed, device=chosen)
                with torch.no_grad():
                    x = flow.sample((settings.samples,), generator=generator)
                    if seed == params.seeds[0]:
                        states = _trajectory(flow, columns, generator)
                        files.write_table(layout.trajectory(folder, method), states)
                        if len(columns) == 2:
                            files.write_table(layout.field(folder, method), _velocities(flow))
                tables.append(pd.DataFrame(x.cpu().numpy(), columns=columns).assign(seed=seed))
            files.write_table(layout.sampled(folder, method), pd.concat(tables, ignore_index=True))
            stage.log(f"{method}: {settings.samples} samples per seed, {settings.solver}, {settings.steps} steps")


def _trajectory(flow: ContinuousFlow, columns: list[str], generator: torch.Generator) -> pd.DataFrame:
    """Return the states of particles at `TIMES`."""
    noise = torch.randn(PARTICLES, len(columns), generator=generator, device=generator.device)
    states = flow.trajectory(x0=noise, solver="midpoint", steps=STEPS)
    tables = [pd.DataFrame(states[round(t * STEPS)].cpu().numpy(), columns=columns).assign(time=t) for t in TIMES]
    return pd.concat(tables, ignore_index=True)


def _velocities(flow: ContinuousFlow) -> pd.DataFrame:
    """Return the velocities on a grid of three standard deviations, in standardised units."""
    assert flow.loc is not None
    axis = torch.linspace(-3.0, 3.0, GRID, device=flow.loc.device)
    grid = torch.cartesian_prod(axis, axis)
    tables = []
    for t in TIMES:
        velocity = flow.field(t, grid, None)
        rows = torch.cat([grid, velocity], -1).cpu().numpy()
        tables.append(pd.DataFrame(rows, columns=["x", "y", "velocity_x", "velocity_y"]).assign(time=t))
    return pd.concat(tables, ignore_index=True)
