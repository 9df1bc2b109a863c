"""Sample density models, and save the states of particles along flow time and planar velocity fields."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from flowmatch_core.flow import ContinuousFlow, Flow
from pipelines.base import device, files, layout, metric_keys, seeding
from pipelines.config.params import Params
from pipelines.evaluation import cells
from pipelines.evaluation.cells import Cell
from pipelines.evaluation.rows import Prepared, Rows, conditions
from pipelines.models import density
from pipelines.runs.context import Stage

PARTICLES, STEPS = 500, 20
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
GRID = 21
SHOWN_COLUMNS = 64  # above them, as for images, the states of particles are not saved


class Sampled(NamedTuple):
    """What is drawn from one model.

    Attributes:
        rows: Samples.
        trajectory: States of particles, of the first seed alone and only of a continuous flow.
        field: Velocities on a grid, likewise, in the plane and without conditions.
    """

    rows: pd.DataFrame
    trajectory: pd.DataFrame | None
    field: pd.DataFrame | None


def sample(stage: Stage, dataset: str) -> None:
    """Sample the models of a data set; all methods receive the same noise and conditions."""
    params, entry = stage.params.density, stage.params.datasets[dataset]
    settings, methods = params.sample_for(entry), params.methods_for(entry)
    chosen = device.use(stage.params.device, stage.params.threads)
    prepared = Prepared.read(layout.prepared(dataset))
    at = conditions(stage.params, dataset, prepared.part("val"))
    every = [Cell(method, seed) for method in methods for seed in params.seeds_for(entry, method)]
    work = partial(_sample, params=stage.params, dataset=dataset, columns=prepared.columns, at=at, chosen=chosen)
    with stage.output(layout.samples(dataset)) as folder:
        drawn = cells.each(stage, work, every, chosen)
        for method in methods:
            here = [drawn[Cell(method, seed)] for seed in params.seeds_for(entry, method)]
            for table, path in ((here[0].trajectory, layout.trajectory), (here[0].field, layout.field)):
                if table is not None:
                    files.write_table(path(folder, method), table)
            rows = pd.concat([one.rows for one in here], ignore_index=True)
            files.write_table(layout.sampled(folder, method), rows)
            stage.log(f"{method}: {settings.samples} samples per seed, {settings.solver}, {settings.steps} steps")


def _sample(
    cell: Cell, send: object, *, params: Params, dataset: str, columns: list[str], at: Rows, chosen: torch.device
) -> Sampled:
    entry, flow = params.datasets[dataset], sampler(params, dataset, cell, chosen)
    generator = seeding.generator(params.seed, "sample", dataset, cell.seed, device=chosen)
    states = velocities = None
    with torch.no_grad():
        x, cond = draw_at(flow, at, generator), _conditions(at, chosen)
        few = len(columns) <= SHOWN_COLUMNS
        if few and isinstance(flow, ContinuousFlow) and cell.seed == params.density.seeds_for(entry, cell.method)[0]:
            states = _trajectory(flow, columns, cond, generator)
            velocities = _velocities(flow, chosen) if len(columns) == 2 and cond is None else None
    rows = pd.concat([pd.DataFrame(x.cpu().numpy(), columns=columns), at.table], axis=1)
    return Sampled(rows.assign(**{metric_keys.free("seed", rows.columns): cell.seed}), states, velocities)


def sampler(params: Params, dataset: str, cell: Cell, chosen: torch.device) -> Flow:
    """Return the model of a cell with the solver and the guidance of its samples."""
    settings = params.density.sample_for(params.datasets[dataset])
    file = layout.network(layout.models(dataset, cell.method), cell.seed)
    return density.load(file, chosen, settings.solver, settings.steps, guidance=settings.guidance)


def draw_at(flow: Flow, at: Rows, generator: torch.Generator) -> Tensor:
    """Draw a sample for each row, at its conditions."""
    cond = _conditions(at, generator.device)
    return flow.sample(() if cond is not None else (len(at),), cond, generator)


def _conditions(at: Rows, device: torch.device) -> Tensor | None:
    return torch.from_numpy(at.cond).to(device) if at.cond.shape[1] else None


def _trajectory(
    flow: ContinuousFlow, columns: list[str], cond: Tensor | None, generator: torch.Generator
) -> pd.DataFrame:
    """Return the states of particles at `TIMES`."""
    shape, cond = ((PARTICLES,), None) if cond is None else ((), cond[:PARTICLES])
    states = flow.trajectory(shape, cond, generator, solver="midpoint", steps=STEPS)
    name = metric_keys.free("time", columns)
    tables = [pd.DataFrame(states[round(t * STEPS)].cpu().numpy(), columns=columns).assign(**{name: t}) for t in TIMES]
    return pd.concat(tables, ignore_index=True)


def _velocities(flow: ContinuousFlow, chosen: torch.device) -> pd.DataFrame:
    """Return the velocities on a grid of three standard deviations, in standardised units."""
    axis = torch.linspace(-3.0, 3.0, GRID, device=chosen)
    grid = torch.cartesian_prod(axis, axis)
    tables = []
    for t in TIMES:
        velocity = flow.field(t, grid, None)
        rows = torch.cat([grid, velocity], -1).cpu().numpy()
        tables.append(pd.DataFrame(rows, columns=["x", "y", "velocity_x", "velocity_y"]).assign(time=t))
    return pd.concat(tables, ignore_index=True)
