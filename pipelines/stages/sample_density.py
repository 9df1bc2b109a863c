"""Sample every density model of a data set, with the way its particles took and, in 2-D, its velocity field."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import store
from pipelines.stage import DATA, Stage, run

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from flowmatch_core.flow import ContinuousFlow

PARTICLES = 500
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
GRID = 21


def main(stage: Stage, dataset: str) -> None:
    import pandas as pd
    import torch

    from pipelines import models, training

    density, settings = stage.params.density, stage.params.density.sample
    device = training.use(stage.params)
    columns = store.read_json(DATA / "prepared" / dataset / "provenance.json")["columns"]
    with stage.output(DATA / "samples" / dataset) as folder:
        for method in density.methods:
            tables = []
            for seed in density.seeds:
                file = DATA / "models" / dataset / method / f"seed{seed}.safetensors"
                flow = models.load_density(file, device, settings.solver, settings.steps)
                # The same noise for every method, so that their samples differ by the method alone.
                generator = stage.generator("sample", dataset, seed, device=device)
                with torch.no_grad():
                    x = flow.sample((settings.samples,), generator=generator)
                    if seed == density.seeds[0]:
                        store.write_table(folder / f"{method}.path.parquet", _particles(flow, columns, generator))
                        if len(columns) == 2:
                            store.write_table(folder / f"{method}.field.parquet", _field(flow))
                tables.append(pd.DataFrame(x.cpu().numpy(), columns=columns).assign(seed=seed))
            store.write_table(folder / f"{method}.parquet", pd.concat(tables, ignore_index=True))
            stage.log(f"{method}: {settings.samples} samples a seed by {settings.solver}, {settings.steps} steps")


def _particles(flow: ContinuousFlow, columns: list[str], generator: torch.Generator) -> pd.DataFrame:
    """Where particles are at `TIMES`."""
    import pandas as pd
    import torch

    from flowmatch_core.solvers import solve

    steps = 20
    noise = torch.randn(PARTICLES, len(columns), generator=generator, device=generator.device)
    way = solve(flow.field, noise, solver="midpoint", steps=steps, save=True).path
    assert way is not None and flow.loc is not None and flow.scale is not None  # as models are saved
    tables = [
        pd.DataFrame((flow.loc + flow.scale * way[round(t * steps)]).cpu().numpy(), columns=columns).assign(time=t)
        for t in TIMES
    ]
    return pd.concat(tables, ignore_index=True)


def _field(flow: ContinuousFlow) -> pd.DataFrame:
    """Velocities on a grid of three standard deviations, in standardised units."""
    import pandas as pd
    import torch

    assert flow.loc is not None
    axis = torch.linspace(-3.0, 3.0, GRID, device=flow.loc.device)
    grid = torch.cartesian_prod(axis, axis)
    tables = []
    for t in TIMES:
        velocity = flow.field(t, grid, None)
        rows = torch.cat([grid, velocity], -1).cpu().numpy()
        tables.append(pd.DataFrame(rows, columns=["x", "y", "velocity_x", "velocity_y"]).assign(time=t))
    return pd.concat(tables, ignore_index=True)


if __name__ == "__main__":
    run(main)
