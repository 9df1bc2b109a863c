"""Two midpoint steps of the bootstrap, where they have been trained with: the spiral of the benchmarks."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from torch import nn

from flowmatch_core.averaging import polyak_update
from flowmatch_core.metrics import emd
from flowmatch_core.networks import MLPField
from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.successor import (
    GeometricHorizonModel,
    Transitions,
    path_error,
    td2_cfm_loss,
)
from flowmatch_core.times import LogitNormalTime
from tests.support.random import generator

GAMMA, STEPS = 0.98, 2400

pytestmark = pytest.mark.slow


def spiral() -> LinearGaussianMDP:
    cos, sin = math.cos(0.15), math.sin(0.15)
    identity = torch.eye(2)
    return LinearGaussianMDP(
        A=0.99 * torch.tensor([[cos, -sin], [sin, cos]]),
        B=identity,
        c=torch.zeros(2),
        W=0.05**2 * identity,
        K=0 * identity,
        k=torch.zeros(2),
    )


@cache
def trained(last: int) -> nn.Module:
    """The average of a network trained with K = 2, and with K = `last` in the last quarter, from the same draws."""
    g, mdp = generator(), spiral()
    state = torch.randn(100_000, 2, generator=g)
    next_state = mdp.step(state, None, generator=g)
    field = MLPField(2, (128,) * 3, cond_dim=2, generator=g)
    average = copy.deepcopy(field).requires_grad_(False)
    optimizer = torch.optim.Adam(field.parameters(), fused=True)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        i = torch.randint(len(state), (128,), generator=g)
        batch = Transitions(state[i], None, next_state[i], None)
        k = 2 if step < 0.75 * STEPS else last
        loss = td2_cfm_loss(field, average, batch, gamma=GAMMA, steps=k, time=LogitNormalTime(), generator=g)
        optimizer.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        polyak_update(average, field, 0.1)
    return average


def test_path_error_of_a_trained_target_is_small() -> None:
    cond, x0 = torch.randn(4_000, 2, generator=generator(1)), torch.randn(4_000, 2, generator=generator(2))
    t = LogitNormalTime()(4_000, generator=generator(3))
    error = path_error(trained(last=2), x0, cond, t, steps=2)
    assert 0.001 < error < 0.05


def test_more_steps_at_the_end_of_training_change_nothing() -> None:
    starts = torch.randn(12, 2, generator=generator(4))
    exact = spiral().successor(starts, None, GAMMA).sample(512, generator=generator(5))

    def distance(field: nn.Module) -> float:
        model = GeometricHorizonModel(field, (2,), GAMMA, steps=20)
        x = model.sample(starts, None, 512, generator=generator(6))
        return sum(float(emd(x[:, i], exact[:, i])) for i in range(12)) / 12

    assert distance(trained(last=10)) == pytest.approx(distance(trained(last=2)), rel=0.03)
