"""Load the models of an evaluation: trained ones, or closed forms of environments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flowmatch_core.solvers import SolverError
from flowmatch_core.successor import GeometricHorizonModel, HorizonModel
from pipelines import environments
from pipelines.base import layout
from pipelines.config.params import Params
from pipelines.environments import Array, Environment, Log, Process
from pipelines.models import build, successor
from pipelines.models.untrained import Untrained, untrained


def load(
    params: Params, environment: str, method: str, seed: int, device: torch.device, solver: str, steps: int
) -> HorizonModel | Untrained:
    """Return the model of one seed, trained or in closed form, or the reason why there is none."""
    entry, choice = params.environments[environment], params.successor.methods[method]
    nothing = untrained(params, environment, method)
    if nothing is None:
        file = layout.network(layout.models(environment, method), seed)
        rolled_out = choice.loss.spec.needs == "transitions"
        act = policy(environments.build(entry.kind, entry.settings())) if rolled_out else None
        return successor.load(file, device, solver, steps, act)
    if not nothing.model:
        return nothing
    built = environments.build(entry.kind, entry.settings())
    oracle = built.oracle()
    assert oracle is not None, environment  # stated in its provenance
    field = oracle.to(device, torch.float64).velocity_field(entry.gamma, build.path(choice.path))
    return GeometricHorizonModel(field, (len(built.state_names),), entry.gamma, solver, steps)


def policy(built: Process) -> Callable[[Array], Array] | None:
    """Return the policy of an environment, or that of a log if it is known; None where there is a family of them."""
    if isinstance(built, Log):
        return built.act
    assert isinstance(built, Environment)
    return built.policy if built.family is None else None


def sample(model: HorizonModel, state: Tensor, action: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return samples `(n, batch, d)`.

    Samples of a diverged model may be infinite or NaN, which is a result and not an error.
    """
    draw = partial(model.sample, check=False) if isinstance(model, GeometricHorizonModel) else model.sample
    try:
        with torch.no_grad():
            return draw(state, action, n, generator=generator)
    except SolverError:  # an adaptive solver failed
        return state.new_full((n, *state.shape), torch.nan)
