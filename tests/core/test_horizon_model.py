"""Laws of the horizon model and of standardised data, with the closed-form oracle as the field."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowmatch_core._tensors import as_time
from flowmatch_core.field import Time
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.solvers import Nodes
from flowmatch_core.successor import GeometricHorizonModel, Transitions
from tests.support.checks import BOUND, z_scores
from tests.support.random import generator, randn, tensor


def standardised(loc: Tensor, scale: Tensor) -> tuple[LinearGaussianMDP, LinearGaussianMDP]:
    """A process in two dimensions, and the same in the coordinates (s - loc) / scale."""
    angle = 0.5
    A = 0.8 * tensor([math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)])
    B, c, K = tensor([1.0, 0.0], [0.3, 1.0]), tensor(0.5, -1.0), tensor([-0.1, 0.0], [0.0, 0.2])
    W, k = tensor([0.5, 0.2], [0.2, 2.0]), tensor(0.1, 0.3)
    z = LinearGaussianMDP(
        A=A * scale / scale[:, None],
        B=B / scale[:, None],
        c=(A @ loc + c - loc) / scale,
        W=W / (scale * scale[:, None]),
        K=K * scale,
        k=K @ loc + k,
    )
    return LinearGaussianMDP(A=A, B=B, c=c, W=W, K=K, k=k), z


def test_standardised_transitions_are_those_of_the_standardised_process() -> None:
    loc, scale = tensor(1.0, -2.0), tensor(0.5, 3.0)
    raw, standard = standardised(loc, scale)
    state, action, noise = randn(30, 2, seed=1), randn(30, 2, seed=2), randn(30, 2, seed=3)
    next_state = state @ raw.A.T + action @ raw.B.T + raw.c + noise
    next_action = raw.policy(next_state)
    z = Transitions(state, action, next_state, next_action).standardise(loc, scale)
    assert z.action is action
    assert z.next_action is next_action
    expected = z.state @ standard.A.T + action @ standard.B.T + standard.c + noise / scale
    torch.testing.assert_close(z.next_state, expected)
    torch.testing.assert_close(standard.policy(z.next_state), next_action)


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("in_raw_units", [True, False])
def test_model_on_the_oracle_has_the_exact_likelihood_moments_and_values(in_raw_units: bool, on_policy: bool) -> None:
    """Also with a field on standardised states: x, the state in its condition and the density follow."""
    gamma, n, loc, scale = 0.8, 1000, tensor(1.0, -2.0), tensor(0.5, 3.0)
    mdp, z_mdp = standardised(loc, scale)
    if in_raw_units:
        model = GeometricHorizonModel(mdp.velocity_field(gamma), (2,), gamma, steps=30)
    else:
        model = GeometricHorizonModel(z_mdp.velocity_field(gamma), (2,), gamma, steps=30, loc=loc, scale=scale)
    state, action = randn(2, 2, seed=3), None if on_policy else randn(2, 2, seed=4)
    m = mdp.successor(state, action, gamma)
    x = m.sample(1, generator=generator(9))[0]
    torch.testing.assert_close(model.log_prob(x, state, action).detach(), m.log_prob(x), atol=5e-3, rtol=0)
    samples = model.sample(state, action, n, generator=generator())
    assert samples.shape == (n, 2, 2)
    assert z_scores(samples, m.mean).abs().max() < BOUND
    goal, spread, matrix = tensor(0.5, -1.0), tensor([2.0, 0.3], [0.3, 1.0]), tensor([1.0, 0.2], [0.2, 0.1])

    def bump(x: Tensor) -> Tensor:
        return torch.exp(-0.5 * torch.einsum("...d,de,...e->...", x - goal, spread.inverse(), x - goal))

    def quadratic(x: Tensor) -> Tensor:
        return torch.einsum("...d,de,...e->...", x, matrix, x)

    exact = {
        bump: mdp.value_bump(state, action, gamma, goal=goal, spread=spread),
        quadratic: mdp.value_quadratic(state, action, gamma, matrix=matrix),
    }
    for reward, truth in exact.items():
        value = model.value(reward, state, action, n, generator=generator())
        error = reward(samples).std(0) / math.sqrt(n) / (1 - gamma)
        assert ((value - truth) / error).abs().max() < BOUND


def test_likelihoods_of_many_points_broadcast_with_their_states() -> None:
    """Points `(n, batch, d)` at states `(batch, d)`, and states with several dimensions of batch."""
    gamma, mdp = 0.6, standardised(tensor(0.0, 0.0), tensor(1.0, 1.0))[0]
    model = GeometricHorizonModel(mdp.velocity_field(gamma), (2,), gamma, "rk4", 12)
    state, action, x = randn(3, 2, seed=3), randn(3, 2, seed=4), randn(4, 3, 2)
    with torch.no_grad():
        together = model.log_prob(x, state, action)
        assert together.shape == (4, 3)
        for i in range(4):
            torch.testing.assert_close(model.log_prob(x[i], state, action), together[i])
        many = model.log_prob(x, state.expand(4, 3, 2), action.expand(4, 3, 2))
        torch.testing.assert_close(many, together)
        estimate = model.estimate(x, state, action)
        exact = mdp.successor(state, action, gamma).log_prob(x)
    assert ((estimate.log_prob - exact).abs() <= estimate.solver_error + 1e-4).all()
    assert estimate.solver_error.max() > 0


def test_pushed_noise_becomes_the_samples() -> None:
    loc, scale = tensor(1.0, -2.0), tensor(0.5, 3.0)
    field = standardised(loc, scale)[1].velocity_field(0.6)
    model = GeometricHorizonModel(field, (2,), 0.6, loc=loc, scale=scale, constant=tensor(math.nan, 4.0, math.nan))
    state, action = randn(3, 3, seed=1), randn(3, 2, seed=2)
    samples = model.sample(state, action, 5, generator=generator(3))
    assert torch.equal(model.push(randn(5, 3, 2, seed=3), state, action), samples)


def test_grid_of_the_flow_is_the_one_given() -> None:
    cond = tensor([1.0])

    def field(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        return as_time(t, x) ** 2 + 0 * x

    grid = Nodes(tensor(0.0, 0.2, 1.0))
    model = GeometricHorizonModel(field, (1,), 0.9, steps=2, grid=grid)
    x = model.sample(cond, None, 3, generator=generator())
    flow = ContinuousFlow(field, (1,), "midpoint", steps=2, grid=grid)
    assert torch.equal(x, flow.sample((3,), cond=cond, generator=generator()))
    evenly = GeometricHorizonModel(field, (1,), 0.9, steps=2)
    assert not torch.isclose(x, evenly.sample(cond, None, 3, generator=generator())).any()


def test_first_sample_of_the_model_is_the_next_state() -> None:
    """Without discount X = S_1, never S_0."""
    one = tensor([1.0])
    mdp = LinearGaussianMDP(A=2 * one, B=-one, c=tensor(0.5), W=1e-4 * one, K=one, k=tensor(0.0))
    model = GeometricHorizonModel(mdp.velocity_field(0.0), (1,), 0.0)
    state, action = tensor([3.0], [-1.0]), tensor([0.5], [2.0])
    x = model.sample(state, action, 100, generator=generator())
    assert (x - (2 * state - action + 0.5)).abs().max() < 0.1


def test_particles_are_samples_on_their_way() -> None:
    loc, scale = tensor(0.5, -1.0), tensor(2.0, 0.3)
    mdp = standardised(loc, scale)[1]
    model = GeometricHorizonModel(mdp.velocity_field(0.9), (2,), 0.9, "midpoint", 10, loc=loc, scale=scale)
    state, action = randn(3, 2, seed=1), randn(3, mdp.B.shape[1], seed=2)
    way = model.particles(state, action, 7, 10, generator=generator())
    assert way.shape == (11, 7, 3, 2)
    torch.testing.assert_close(way[-1], model.sample(state, action, 7, generator=generator()))
    noise = randn(7 * 3, 2).reshape(7, 3, 2)
    torch.testing.assert_close(way[0], loc + scale * noise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.0}, r"gamma was 1.0, but should be in \[0, 1\)"),
        ({"gamma": 0.9, "loc": torch.zeros(1)}, "loc and scale should be given both or neither"),
        ({"gamma": 0.9, "scale": torch.ones(1)}, "loc and scale should be given both or neither"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeometricHorizonModel(lambda t, x, cond=None, /: x, (1,), **options)
