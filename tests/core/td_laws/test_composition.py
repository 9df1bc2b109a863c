"""Compositions of successor measures: the identities on chains, the moments of Gaussians, the law of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import pytest
import torch
from torch import Tensor

from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.successor import (
    ComposedHorizonModel,
    GeometricHorizonModel,
    HorizonModel,
    composition_weights,
)
from tests.support.checks import BOUND, close, z_scores
from tests.support.processes import random_chain, scalar_process
from tests.support.random import generator, tensor

GAMMA = 0.9
BETAS = [0.3, 0.6, 0.0]
"""Of the policies before the last one."""


# ---- identities on chains ----


@pytest.mark.parametrize("gamma", [0.0, 0.4, 0.97])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_longer_discount_is_composed_of_a_shorter_one(gamma: float, share: float) -> None:
    chain, beta = random_chain(seed=3), share * gamma
    P, short, long = chain.P, chain.successor(beta), chain.successor(gamma)
    first, rest = composition_weights([beta, gamma], gamma)
    close(first * short + rest * short @ long, long, 1e-12)
    # the backup of one step through it, with which a model may be trained
    close((1 - gamma) * P + gamma * P @ (first * short + rest * short @ long), long, 1e-12)
    # and the series of the shorter one alone
    identity = torch.eye(len(P), dtype=P.dtype)
    close(first * torch.linalg.solve(identity - rest * short, short), long, 1e-12)


@pytest.mark.parametrize("policies", [1, 2, 4])
def test_policies_that_switch_have_the_measure_of_the_chain_on_states_and_policies(policies: int) -> None:
    """On arriving in a state the process changes from policy k to the next one with chance 1 - beta_k / gamma."""
    betas, n = [*BETAS[: policies - 1], GAMMA], 5
    chains = [random_chain(n, seed=seed) for seed in range(policies)]
    joint = torch.zeros(policies, n, policies, n, dtype=torch.float64)
    for k, (chain, beta) in enumerate(zip(chains, betas, strict=True)):
        joint[k, :, k] = beta / GAMMA * chain.P
        if k + 1 < policies:
            joint[k, :, k + 1] = (1 - beta / GAMMA) * chain.P
    flat = joint.view(policies * n, policies * n)
    identity = torch.eye(policies * n, dtype=torch.float64)
    exact = (1 - GAMMA) * torch.linalg.solve(identity - GAMMA * flat, flat)[:n].view(n, policies, n).sum(1)
    composed, product = torch.zeros(n, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    for weight, chain, beta in zip(composition_weights(betas, GAMMA), chains, betas, strict=True):
        product = product @ chain.successor(beta)
        composed += weight * product
    close(composed, exact, 1e-12)


@pytest.mark.parametrize("betas", [[0.9], [0.0], [0.3, 0.3, 0.9], [0.9, 0.5], [0.2, 0.8, 0.4]])
def test_weights_are_those_of_the_formula_and_sum_to_one(betas: list[float]) -> None:
    weights, rest = composition_weights(betas, GAMMA), 1.0
    for weight, beta in zip(weights[:-1], betas, strict=False):
        assert weight == pytest.approx((1 - GAMMA) / (1 - beta) * rest, abs=1e-15)
        rest *= (GAMMA - beta) / (1 - beta)
    assert sum(weights) == pytest.approx(1, abs=1e-15)
    assert min(weights) >= 0


# ---- moments of Gaussians ----


def test_moments_of_the_composition_are_those_of_the_longer_discount() -> None:
    """E[X | Y] is linear in the state and E[X^2 | Y] quadratic, so that the moments of Y are enough."""
    mdp, beta = scalar_process(), 0.6
    state, action = tensor([1.5]), tensor([-1.0])
    short, long = mdp.successor(state, action, beta), mdp.successor(state, action, GAMMA)
    at = mdp.successor(tensor([-1.0], [0.0], [1.0]), None, GAMMA)
    means, seconds = at.mean[:, 0], at.second_moment[:, 0, 0]
    y, y2 = short.mean[0, 0], short.second_moment[0, 0, 0]

    def expected(values: Tensor) -> Tensor:
        """The mean of a quadratic in Y, from its values at -1, 0 and 1."""
        return values[1] + (values[2] - values[0]) / 2 * y + ((values[2] + values[0]) / 2 - values[1]) * y2

    first, rest = composition_weights([beta, GAMMA], GAMMA)
    close(first * y + rest * expected(means), long.mean[0, 0], 1e-12)
    close(first * y2 + rest * expected(seconds), long.second_moment[0, 0, 0], 1e-12)


# ---- samples ----


@final
class Counting(HorizonModel):
    """A model whose sample adds a number to the state, and the action to its second component."""

    has_density = False

    def __init__(self, gamma: float, step: float) -> None:
        super().__init__(gamma, None, None)
        self.step = step

    def sample(
        self, state: Tensor, action: Tensor | None, n: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        assert action is not None
        return torch.stack([state[:, 0] + self.step, state[:, 1] + action[:, 0]], 1).repeat(n, 1, 1)

    def log_prob(self, x: Tensor, state: Tensor, action: Tensor | None) -> Tensor:
        raise NotImplementedError


def constant(action: float) -> Callable[[Tensor], Tensor]:
    return lambda state: torch.full_like(state[:, :1], action)


def test_chains_stop_after_each_model_with_its_weight() -> None:
    """The digits of the first component say which models gave a sample, those of the second which policies acted."""
    betas, n = [0.5, 0.7, GAMMA], 20_000
    models = [Counting(beta, 10.0**k) for k, beta in enumerate(betas)]
    composed = ComposedHorizonModel(models, [constant(7.0), constant(20.0), constant(300.0)], GAMMA)
    x = composed.sample(torch.zeros(2, 2), torch.ones(2, 1), n, generator=generator()).flatten(0, 1)
    counts = {(1.0, 1.0): 0, (11.0, 21.0): 1, (111.0, 321.0): 2}
    assert {(float(a), float(b)) for a, b in x.unique(dim=0)} == set(counts)
    for (first, _), k in counts.items():
        shares = (x[:, 0] == first).double()
        assert abs(z_scores(shares, composition_weights(betas, GAMMA)[k])) < BOUND


def test_the_last_model_follows_itself_up_to_the_discount() -> None:
    """After a model of discount beta a chain stops with chance (1 - gamma) / (1 - beta)."""
    composed = ComposedHorizonModel([Counting(0.5, 1.0)], [constant(1.0)], GAMMA)
    x = composed.sample(torch.zeros(1, 2), torch.zeros(1, 1), 20_000, generator=generator())[:, 0].double()
    stop = (1 - GAMMA) / (1 - 0.5)
    assert torch.equal(x[:, 1], x[:, 0] - 1)  # the first action is given, the others are the policy's
    assert abs(z_scores(x[:, 0], 1 / stop)) < BOUND
    assert abs(z_scores((x[:, 0] == 1).double(), stop)) < BOUND


def exact(mdp: LinearGaussianMDP, gamma: float) -> GeometricHorizonModel:
    return GeometricHorizonModel(mdp.velocity_field(gamma, tolerance=1e-4), (1,), gamma=gamma)


@pytest.mark.parametrize("betas", [[0.5, 0.8], [0.5]], ids=["two models", "one that follows itself"])
def test_samples_of_exact_fields_have_the_moments_of_the_longer_discount(betas: list[float]) -> None:
    mdp, gamma = scalar_process(), 0.8
    state, action = tensor([1.5]), tensor([-1.0])
    composed = ComposedHorizonModel([exact(mdp, beta) for beta in betas], [mdp.policy] * len(betas), gamma)
    x = composed.sample(state, action, 4_000, generator=generator())[:, 0]
    truth = mdp.successor(state, action, gamma)
    for power, value in ((1, truth.mean), (2, truth.second_moment)):
        assert z_scores(x**power, value.squeeze()).abs().max() < 3
    value = composed.value(lambda x: x[..., 0], state, action, 4_000, generator=generator())
    close(value, x.mean(0) / (1 - gamma))


# ---- mistakes ----


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: composition_weights([], GAMMA), r"betas was \[\], but should be one or more numbers"),
        (
            lambda: composition_weights([0.95], GAMMA),
            r"betas was \[0.95\], but should be .* in \[0, gamma\], gamma 0.9",
        ),
        (lambda: composition_weights([0.5], 1.0), "gamma was 1.0"),
        (lambda: ComposedHorizonModel([Counting(0.5, 1.0)], [], GAMMA), "policies were 0, but should be .* models, 1"),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_composition_has_no_density() -> None:
    composed = ComposedHorizonModel([Counting(0.5, 1.0)], [constant(1.0)], GAMMA)
    with pytest.raises(TypeError, match="a composition has no log_prob"):
        composed.log_prob(torch.zeros(1, 2), torch.zeros(1, 2), None)
