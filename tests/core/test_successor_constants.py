"""Components of a state that never change: they are no part of a model, and stand in its samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowmatch_core.networks import MLPField
from flowmatch_core.successor import (
    EnsembleHorizonModel,
    GaussianEnsemble,
    GeometricHorizonModel,
    HorizonModel,
    HorizonVAE,
    LatentHorizonModel,
)
from tests.support.checks import close
from tests.support.random import generator, randn, tensor

CONSTANT = tensor(math.nan, 1e8 + 0.25, math.nan, -3.0)
UNITS: dict[str, Any] = {
    "loc": tensor(5e6, 1.0),
    "scale": tensor(0.1, 10.0),
    "action_loc": tensor(2.0),
    "action_scale": tensor(4.0),
}
VARYING = [0, 2]


def whole(x: Tensor) -> Tensor:
    state = CONSTANT.expand(*x.shape[:-1], 4).clone()
    state[..., VARYING] = x
    return state


def models(**more: Any) -> list[HorizonModel]:
    """A model of each class for states of two components and an action, always with the same weights."""
    field = MLPField(2, (16,), cond_dim=3, generator=generator())
    return [
        GeometricHorizonModel(field, (2,), 0.9, "midpoint", 4, **UNITS, **more),
        LatentHorizonModel(HorizonVAE(2, 3, width=8, blocks=1, generator=generator()), 0.9, **UNITS, **more),
        EnsembleHorizonModel(GaussianEnsemble(2, 3, 2, (8,), generator=generator()), 0.9, **UNITS, **more),
    ]


@pytest.mark.parametrize("number", range(3))
def test_samples_are_those_of_the_components_that_vary_with_the_others_put_back(number: int) -> None:
    small, full = models()[number], models(constant=CONSTANT)[number]
    state, action = randn(5, 2) * UNITS["scale"] + UNITS["loc"], randn(5, 1, seed=1)
    x = small.sample(state, action, 7, generator=generator(2))
    found = full.sample(whole(state), action, 7, generator=generator(2))
    assert found.shape == (7, 5, 4)
    assert torch.equal(found, whole(x))
    if isinstance(full, GeometricHorizonModel) and isinstance(small, GeometricHorizonModel):
        close(full.log_prob(found, whole(state), action), small.log_prob(x, state, action))
        close(full.estimate(found, whole(state), action).log_prob, small.estimate(x, state, action).log_prob)
        path = full.particles(whole(state), action, 3, 4, generator=generator(2))
        assert torch.equal(path, whole(small.particles(state, action, 3, 4, generator=generator(2))))


def test_a_policy_sees_all_components() -> None:
    seen = list[Tensor]()

    def policy(state: Tensor) -> Tensor:
        seen.append(state)
        return state[:, 1:2] - CONSTANT[1]

    network = GaussianEnsemble(2, 3, 2, (8,), generator=generator())
    model = EnsembleHorizonModel(network, 0.9, policy=policy, constant=CONSTANT, **UNITS)
    state = whole(randn(5, 2) * UNITS["scale"] + UNITS["loc"])
    model.sample(state, None, 7, generator=generator())
    assert len(seen) > 1
    for states in seen:
        assert torch.equal(states, whole(states[:, VARYING]))
