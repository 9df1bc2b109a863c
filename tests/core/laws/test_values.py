"""From where a policy goes to what it is worth, and to a better policy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.successor import GeometricHorizonModel
from tests.support.random import generator, randn, tensor

GAMMA = 0.8
GOAL = torch.eye(1, dtype=torch.float64)


def process(target: float) -> LinearGaussianMDP:
    """s' = 0.9 s + a + noise with the policy a = 0.3 (target - s)."""
    one = torch.eye(1, dtype=torch.float64)
    return LinearGaussianMDP(A=0.9 * one, B=one, c=tensor(0.0), W=0.05 * one, K=-0.3 * one, k=tensor(0.3 * target))


def reward(x: Tensor) -> Tensor:
    return -x.square().sum(-1)


def test_value_solves_the_bellman_equation() -> None:
    """Q(s, a) = E[r(S') + g Q(S', pi(S'))], with the expectation by Gauss-Hermite quadrature."""
    mdp, state, action = process(1.0), randn(5, 1), randn(5, 1, seed=1)
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(30))
    mean = state @ mdp.A.T + action @ mdp.B.T + mdp.c
    after = (mean + mdp.W[0, 0].sqrt() * nodes).reshape(-1, 1)
    later = reward(after) + GAMMA * mdp.value_quadratic(after, None, GAMMA, matrix=-GOAL)
    expected = later.reshape(5, -1) @ (weights / weights.sum())
    torch.testing.assert_close(mdp.value_quadratic(state, action, GAMMA, matrix=-GOAL), expected)


def test_generalised_policy_improvement_takes_the_best_of_the_policies() -> None:
    """argmax_w Q^(pi_w)(s, pi_w(s)) = argmax_w E_(X ~ m^(pi_w)) r(X) / (1 - g), from samples of each model."""
    state = tensor(-4.0, -1.0, 2.0, 4.0)[:, None]
    family = [process(target) for target in (-1.5, 0.0, 1.5, 3.0)]
    truth = torch.stack([mdp.value_quadratic(state, None, GAMMA, matrix=-GOAL) for mdp in family])
    models = [GeometricHorizonModel(mdp.velocity_field(GAMMA), (1,), GAMMA, "rk4", 12) for mdp in family]
    values = torch.stack([model.value(reward, state, None, 400, generator=generator()) for model in models])
    assert torch.equal(values.argmax(0), truth.argmax(0))
    assert len(truth.argmax(0).unique()) > 1
    torch.testing.assert_close(values, truth, rtol=0.15, atol=0.6)
