"""Load the models of an evaluation: trained ones, or closed forms of environments."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flowmatch_core.solvers import SolverError
from flowmatch_core.successor import GeometricHorizonModel, HorizonModel
from pipelines import environments
from pipelines.base import layout
from pipelines.config.params import Params
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
        return successor.load(file, device, solver, steps)
    if not nothing.model:
        return nothing
    built = environments.build(entry.kind, entry.settings())
    oracle = built.oracle()
    assert oracle is not None, environment  # stated in its provenance
    field = oracle.to(device, torch.float32).velocity_field(entry.gamma, build.path(choice.path))
    return GeometricHorizonModel(field, (len(built.state_names),), entry.gamma, solver, steps)


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
