"""Trained models by their name in MLflow's registry.

>>> load("maze_loop.td2_cfm")
Traceback (most recent call last):
pipelines.base.errors.UserError: the model 'maze_loop.td2_cfm' is neither models:/<name>/<version>, such as \
models:/maze_loop.td2_cfm/latest, nor models:/<name>@<alias> nor runs:/<id of a training run>.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.base.errors import UserError

if TYPE_CHECKING:
    from flowmatch_core.flow import ContinuousFlow
    from flowmatch_core.successor import HorizonModel


def load(
    uri: str, *, seed: int | None = None, device: str = "cpu", solver: str = "rk4", steps: int = 20
) -> HorizonModel | ContinuousFlow:
    """Load a model that a run trained, ready for use, in the units of its data; no file of it can execute code.

    A model of an environment has `sample(state, action, n)`, `log_prob(x, state, action)`, unless it is a gan or a vae,
    and `value(reward, state, action, n)`; one of a data set has `sample(shape)` and `log_prob(x)`.

    Arguments:
        uri: `models:/<environment or data set>.<method>/<version>`, where the version is a number or `latest`, the one
            trained last; `models:/<name>@<alias>`; or `runs:/<id>` of the run of a training stage. Names of models of
            another profile than the default begin with it: `models:/smoke.spiral.td2_cfm/latest`.
        seed: which of the networks; the first one by default.
        device: as in params.yaml: auto, cpu, cuda or cuda:N.
        solver, steps: how its ODE is solved.

    Raises:
        UserError: there is no such model, seed or device, or its file is damaged.
    """
    from pipelines.base import layout
    from pipelines.base.device import resolve
    from pipelines.models import density, saved, successor
    from pipelines.runs import tracking

    folder = tracking.model_files(uri)
    files = layout.networks(folder)
    chosen = min(files) if seed is None and files else seed
    if chosen not in files:
        raise UserError(f"the model {uri!r} has no seed {chosen}, only {', '.join(map(str, sorted(files))) or 'none'}.")
    read = successor.load if "gamma" in saved.meta(files[chosen]) else density.load
    model: HorizonModel | ContinuousFlow = read(files[chosen], resolve(device), solver, steps)
    return model
