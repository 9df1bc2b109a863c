"""The successor model of a method: trained, or in closed form where the environment has one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flowmatch_core.solvers import SolverError
from flowmatch_core.successor import GeometricHorizonModel, HorizonModel
from pipelines import members, models, store
from pipelines.params import ORACLE, Environment, SuccessorMethod
from pipelines.stage import SKIPPED


def horizon_model(
    folder: Path,
    seed: int,
    environment: Environment,
    choice: SuccessorMethod,
    device: torch.device,
    solver: str,
    steps: int,
) -> HorizonModel | str:
    """The successor model of one seed, trained or in closed form, or the reason why there is none."""
    skipped = folder / SKIPPED
    if skipped.exists():
        return str(store.read_json(skipped)["reason"])
    if choice.loss.name != ORACLE:
        return models.load_successor(folder / f"seed{seed}.safetensors", device, solver, steps)
    built = members.load("pipelines.environments", environment.kind).build(environment.settings())
    mdp = built.oracle().to(device, torch.float32)
    field = mdp.velocity_field(environment.gamma, models.path(choice.path))
    return GeometricHorizonModel(field, (len(built.state_names),), environment.gamma, solver, steps)


def sample(model: HorizonModel, state: Tensor, action: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Samples (n, batch, d), not all of which are finite if the model has diverged: that is a result, not a fault."""
    draw = partial(model.sample, check=False) if isinstance(model, GeometricHorizonModel) else model.sample
    try:
        with torch.no_grad():
            return draw(state, action, n, generator=generator)
    except SolverError:  # of an adaptive solver that gave up
        return state.new_full((n, *state.shape), torch.nan)
