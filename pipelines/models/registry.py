"""Load trained models by their name in MLflow's registry, or from a folder of networks.

>>> load("models:/maze_loop.td2_cfm")
Traceback (most recent call last):
pipelines.base.errors.UserError: the model 'models:/maze_loop.td2_cfm' is neither a name, such as moons.cfm, nor \
models:/<name>/<version>, nor models:/<name>@<alias> nor runs:/<id of a training run>.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipelines.base.errors import UserError

if TYPE_CHECKING:
    from flowmatch_core.solvers import TimeGrid
    from flowmatch_core.successor import HorizonModel
    from pipelines.models.tables import DensityModel


def load(
    model: str,
    *,
    seed: int | None = None,
    device: str = "cpu",
    solver: str = "rk4",
    steps: int = 20,
    grid: TimeGrid | None = None,
) -> HorizonModel | DensityModel:
    """Load a trained model, in the units of its data; reading its file cannot execute code.

    A model of an environment has `sample(state, action, n)`, `value(reward, state, action, n)` and, unless it is a GAN
    or a VAE, `log_prob(x, state, action)`; a model of a data set has `sample` and `log_prob` for tensors and for
    DataFrames, see `DensityModel`.

    Args:
        model: `<environment or data set>.<method>`, of which the version trained last is taken. The name of a model of
            another profile than the default begins with the profile, which may be left out if no other model ends in
            the name. Or `models:/<name>/<version>`, where the version is a number or `latest`; or
            `models:/<name>@<alias>`; `runs:/<id>` of the run of a training stage; or a folder with networks, such as
            `data/models/moons/cfm`.
        seed: Seed of the network; the first one by default.
        device: As in params.yaml: auto, cpu, cuda or cuda:N.
        solver: ODE solver; ignored by a model without an ODE.
        steps: Number of solver steps.
        grid: Where the steps end, of a model of a data set; uniform by default. The tables' likelihoods are those of
            `solver="adams", steps=96, grid=Warped()`.

    Raises:
        UserError: There is no such model, seed or device, or its file is damaged.
    """
    from pipelines.runs import versions

    if Path(model).is_dir():
        return read(Path(model), model, seed=seed, device=device, solver=solver, steps=steps, grid=grid)
    with TemporaryDirectory() as scratch:
        folder = versions.files(model, Path(scratch))
        return read(folder, model, seed=seed, device=device, solver=solver, steps=steps, grid=grid)


def read(
    folder: Path,
    name: str,
    *,
    seed: int | None = None,
    device: str = "cpu",
    solver: str = "rk4",
    steps: int = 20,
    grid: TimeGrid | None = None,
) -> HorizonModel | DensityModel:
    """Read a trained model from a folder of networks; the other arguments are those of `load`.

    Args:
        folder: Folder with one network per seed.
        name: Name of the model in messages.
        seed: Seed of the network; the first one by default.
        device: As in params.yaml.
        solver: ODE solver.
        steps: Number of solver steps.
        grid: Where the steps end.

    Raises:
        UserError: There is no such seed or device, or the file is damaged.
    """
    from flowmatch_core.solvers import Uniform
    from pipelines.base import layout
    from pipelines.base.device import resolve
    from pipelines.models import density, saved, successor
    from pipelines.models.tables import DensityModel

    files = layout.networks(folder)
    chosen = min(files) if seed is None and files else seed
    if chosen not in files:
        raise UserError(
            f"the model {name!r} has no seed {chosen}, only {', '.join(map(str, sorted(files))) or 'none'}."
        )
    file, chip = files[chosen], resolve(device)
    meta = saved.meta(file)
    if "gamma" in meta:
        return successor.load(file, chip, solver, steps)
    return DensityModel(density.load(file, chip, solver, steps, grid=grid or Uniform()), meta, chip)
