"""Sample density models, and save the states of particles along flow time and planar velocity fields."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pandas as pd
import torch

from flowmatch_core.flow import ContinuousFlow
from pipelines.base import device, files, layout, seeding
from pipelines.config.params import Params
from pipelines.evaluation import cells
from pipelines.evaluation.cells import Cell
from pipelines.models import density
from pipelines.runs.context import Stage

PARTICLES, STEPS = 500, 20
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
GRID = 21


class Sampled(NamedTuple):
    """What is drawn from one model.

    Attributes:
        rows: Samples.
        trajectory: States of particles, of the first seed alone.
        field: Velocities on a grid, of the first seed alone and in the plane.
    """

    rows: pd.DataFrame
    trajectory: pd.DataFrame | None
    field: pd.DataFrame | None


def sample(stage: Stage, dataset: str) -> None:
    """Sample the models of a data set; all methods receive the same noise."""
    params, settings = stage.params.density, stage.params.density.sample
    chosen = device.use(stage.params.device, stage.params.threads)
    columns = files.read_json(layout.provenance(layout.prepared(dataset)))["columns"]
    every = [Cell(method, seed) for method in params.methods for seed in params.seeds]
    work = partial(_sample, params=stage.params, dataset=dataset, columns=columns, chosen=chosen)
    with stage.output(layout.samples(dataset)) as folder:
        drawn = cells.each(stage, work, every, chosen)
        for method in params.methods:
            here = [drawn[Cell(method, seed)] for seed in params.seeds]
            for table, path in ((here[0].trajectory, layout.trajectory), (here[0].field, layout.field)):
                if table is not None:
                    files.write_table(path(folder, method), table)
            rows = pd.concat([one.rows for one in here], ignore_index=True)
            files.write_table(layout.sampled(folder, method), rows)
            stage.log(f"{method}: {settings.samples} samples per seed, {settings.solver}, {settings.steps} steps")


def _sample(
    cell: Cell, send: object, *, params: Params, dataset: str, columns: list[str], chosen: torch.device
) -> Sampled:
    settings = params.density.sample
    file = layout.network(layout.models(dataset, cell.method), cell.seed)
    flow = density.load(file, chosen, settings.solver, settings.steps)
    generator = seeding.generator(params.seed, "sample", dataset, cell.seed, device=chosen)
    with torch.no_grad():
        x = flow.sample((settings.samples,), generator=generator)
        first = cell.seed == params.density.seeds[0]
        states = _trajectory(flow, columns, generator) if first else None
        velocities = _velocities(flow) if first and len(columns) == 2 else None
    return Sampled(pd.DataFrame(x.cpu().numpy(), columns=columns).assign(seed=cell.seed), states, velocities)


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
