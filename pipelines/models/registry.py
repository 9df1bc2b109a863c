"""Load trained models by their name in MLflow's registry.

>>> load("maze_loop.td2_cfm")
Traceback (most recent call last):
pipelines.base.errors.UserError: the model 'maze_loop.td2_cfm' is neither models:/<name>/<version>, such as \
models:/maze_loop.td2_cfm/latest, nor models:/<name>@<alias> nor runs:/<id of a training run>.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.base.errors import UserError

if TYPE_CHECKING:
    from flowmatch_core.flow import ContinuousFlow
    from flowmatch_core.successor import HorizonModel


def load(
    uri: str, *, seed: int | None = None, device: str = "cpu", solver: str = "rk4", steps: int = 20
) -> HorizonModel | ContinuousFlow:
    """Load a trained model from MLflow, in the units of its data; reading its file cannot execute code.

    A model of an environment has `sample(state, action, n)`, `value(reward, state, action, n)` and, unless it is a GAN
    or a VAE, `log_prob(x, state, action)`; a model of a data set has `sample(shape)` and `log_prob(x)`.

    Args:
        uri: `models:/<environment or data set>.<method>/<version>`, where the version is a number or `latest`, the one
            trained last; `models:/<name>@<alias>`; or `runs:/<id>` of the run of a training stage. The name of a model
            of another profile than the default begins with the profile: `models:/smoke.spiral.td2_cfm/latest`.
        seed: Seed of the network; the first one by default.
        device: As in params.yaml: auto, cpu, cuda or cuda:N.
        solver: ODE solver; ignored by a model without an ODE.
        steps: Number of solver steps.

    Raises:
        UserError: There is no such model, seed or device, or its file is damaged.
    """
    from pipelines.runs import versions

    return read(versions.files(uri), uri, seed=seed, device=device, solver=solver, steps=steps)


def read(
    folder: Path, name: str, *, seed: int | None = None, device: str = "cpu", solver: str = "rk4", steps: int = 20
) -> HorizonModel | ContinuousFlow:
    """Read a trained model from a folder of networks; the other arguments are those of `load`.

    Args:
        folder: Folder with one network per seed.
        name: Name of the model in messages.
        seed: Seed of the network; the first one by default.
        device: As in params.yaml.
        solver: ODE solver.
        steps: Number of solver steps.

    Raises:
        UserError: There is no such seed or device, or the file is damaged.
    """
    from pipelines.base import layout
    from pipelines.base.device import resolve
    from pipelines.models import density, saved, successor

    files = layout.networks(folder)
    chosen = min(files) if seed is None and files else seed
    if chosen not in files:
        raise UserError(
            f"the model {name!r} has no seed {chosen}, only {', '.join(map(str, sorted(files))) or 'none'}."
        )
    source = successor if "gamma" in saved.meta(files[chosen]) else density
    model: HorizonModel | ContinuousFlow = source.load(files[chosen], resolve(device), solver, steps)
    return model
