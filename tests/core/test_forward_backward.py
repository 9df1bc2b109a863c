"""Laws of Forward-Backward representations, in closed form: nothing is trained.

The process has a few states and actions, and the features of its states and actions are tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from flowmatch_core.forward_backward import (
    FBLoss,
    ForwardBackward,
    draw_latents,
    fb_actor_loss,
    fb_loss,
    fb_orthonormality_loss,
    fb_value_loss,
    reward_weights,
    uniform_latents,
)
from tests.support.checks import BOUND, close, z_scores
from tests.support.random import generator, randn, tensor

GAMMA = 0.8


@dataclass(frozen=True, eq=False)
class Tabular:
    """States, actions and a policy, and the law of the data.

    Args:
        P: The chances of the next state, `(states, actions, states)`.
        policy: The action of the policy in each state, `(states,)`.
        data: The law of the states and actions in the data, `(states, actions)`.
    """

    P: Tensor
    policy: Tensor
    data: Tensor

    @property
    def rho(self) -> Tensor:
        """The law of the next states, `(states,)`."""
        return torch.einsum("sa,sax->x", self.data, self.P)

    @property
    def M(self) -> Tensor:
        """The sum over n >= 1 of gamma^(n-1) P(S_n | s, a), `(states * actions, states)`."""
        n = len(self.P)
        P_policy = self.P[torch.arange(n), self.policy]
        later: Tensor = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - GAMMA * P_policy, P_policy)
        return (self.P + GAMMA * self.P @ later).flatten(0, 1)

    def pairs(self, values: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The exact mean of `values` over two independent transitions, given as rows of a batch of two.

        Args:
            values: It maps the numbers of the state-action pairs and of the next states, each `(2,)`, to a tensor.
        """
        total = torch.zeros((), dtype=torch.float64)
        chances = self.data.flatten()[:, None] * self.P.flatten(0, 1)
        seen = chances.nonzero()
        for first in seen:
            for second in seen:
                rows = torch.stack([first, second])
                total = total + chances[tuple(first)] * chances[tuple(second)] * values(rows[:, 0], rows[:, 1])
        return total

    def after(self, next_state: Tensor) -> Tensor:
        """The number of the pair of a state and the policy's action in it."""
        return next_state * self.P.shape[1] + self.policy[next_state]


def process(seed: int = 0) -> Tabular:
    P = (2 * randn(3, 2, 3, seed=seed)).softmax(-1)
    return Tabular(P, torch.tensor([1, 0, 1]), randn(6, seed=seed + 1).softmax(0).view(3, 2))


def deterministic() -> Tabular:
    """Two actions: stay, or go on a ring; all states and actions alike in the data."""
    stay = torch.eye(3, dtype=torch.float64)
    return Tabular(
        torch.stack([stay, stay.roll(1, 1)], 1), torch.tensor([1, 1, 0]), torch.full((3, 2), 1 / 6, dtype=torch.float64)
    )


def expected_loss(case: Tabular, F: Tensor, B: Tensor, target: tuple[Tensor, Tensor] | None = None) -> FBLoss:
    """The exact expectation of `fb_loss` for tables F `(heads, states * actions, d)` and B `(states, d)`."""
    next_F, next_B = (F.detach(), B.detach()) if target is None else target

    def terms(pair: Tensor, there: Tensor) -> Tensor:
        return torch.stack(fb_loss(F[:, pair], B[there], next_F[:, case.after(there)], next_B[there], gamma=GAMMA))

    return FBLoss(*case.pairs(terms))


# The successor measure


@pytest.mark.parametrize("heads", [1, 2])
def test_the_true_measure_is_stationary(heads: int) -> None:
    """F = M / rho and B = I, as the target too: the exact expected gradient is 0, in F and in B."""
    case = process()
    F = (case.M / case.rho).expand(heads, -1, -1).clone().requires_grad_()
    B = torch.eye(3, dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(expected_loss(case, F, B).total, (F, B))
    for gradient in gradients:
        close(gradient, torch.zeros_like(gradient), 1e-12)
    moved = (F * 1.1).detach().requires_grad_()
    assert torch.autograd.grad(expected_loss(case, moved, B).total, moved)[0].abs().max() > 0.01


def test_loss_is_half_the_squared_bellman_residual_up_to_a_constant() -> None:
    """In L2(mu x rho), mu the law of the data, for any features and targets: F B - (P / rho + gamma P^pi F' B')."""
    case = process(3)
    target = randn(2, 6, 4, seed=1), randn(3, 4, seed=2)
    measure = target[0].mean(0) @ target[1].T
    backup = case.P.flatten(0, 1) / case.rho + GAMMA * case.P.flatten(0, 1) @ measure[case.after(torch.arange(3))]
    weight = case.data.flatten()[:, None] * case.rho
    constants = []
    for seed in (5, 7):
        F, B = randn(2, 6, 4, seed=seed), randn(3, 4, seed=seed + 1)
        residual = (weight * (F @ B.T - backup).square()).sum() / 2
        constants.append(expected_loss(case, F, B, target).total - residual)
    close(constants[0], constants[1], 1e-10)


def test_off_diagonal_term_is_the_bellman_residual_without_the_first_step() -> None:
    """Where the next state is certain there is no constant: half the squared norm of F B - gamma P^pi F' B'."""
    case = deterministic()
    F, B, target = randn(1, 6, 4, seed=1), randn(3, 4, seed=2), (randn(1, 6, 4, seed=3), randn(3, 4, seed=4))
    later = case.P.flatten(0, 1) @ (target[0][0] @ target[1].T)[case.after(torch.arange(3))]
    residual = (case.data.flatten()[:, None] * case.rho * (F[0] @ B.T - GAMMA * later).square()).sum() / 2
    found = expected_loss(case, F, B, target)
    close(found.off_diagonal, residual, 1e-12)
    close(found.diagonal, -(case.data.flatten()[:, None] * case.P.flatten(0, 1) * (F[0] @ B.T)).sum(), 1e-12)
    close(found.total, found.off_diagonal + found.diagonal, 1e-12)


def test_larger_batches_have_the_same_expectation() -> None:
    """Over drawn batches of 20 rows, against the enumeration of pairs."""
    case, n = process(), 3_000
    F, B, target = randn(2, 6, 3, seed=1), randn(3, 3, seed=2), (randn(2, 6, 3, seed=3), randn(3, 3, seed=4))
    chances = (case.data.flatten()[:, None] * case.P.flatten(0, 1)).flatten()
    drawn = chances.multinomial(20 * n, replacement=True, generator=generator()).view(n, 20)
    pair, there = drawn // 3, drawn % 3
    losses = torch.stack(
        [
            fb_loss(F[:, p], B[x], target[0][:, case.after(x)], target[1][x], gamma=GAMMA).total
            for p, x in zip(pair, there, strict=True)
        ]
    )
    assert abs(float(z_scores(losses, expected_loss(case, F, B, target).total))) < BOUND


def test_no_gradient_reaches_the_target() -> None:
    features = [randn(2, 4, 3, seed=1), randn(4, 3, seed=2), randn(2, 4, 3, seed=3), randn(4, 3, seed=4)]
    F, B, next_F, next_B = (part.requires_grad_() for part in features)
    fb_loss(F, B, next_F, next_B, gamma=GAMMA).total.backward()
    assert F.grad is not None
    assert B.grad is not None
    assert next_F.grad is None
    assert next_B.grad is None


# Values


def test_values_of_a_reward_are_exact() -> None:
    """Q = F z_r for F = M / rho, B = I and z_r = E[r B], against the Bellman equation by iteration."""
    case, reward, counts = process(), tensor(0.3, -1.0, 2.0), torch.tensor([1, 2, 5])
    states = torch.arange(3).repeat_interleave(counts)  # drawn from rho
    rho = counts.double() / 8
    z = reward_weights(reward[states], torch.eye(3, dtype=torch.float64)[states])
    close(z.norm(), tensor(math.sqrt(3))[0])
    Q = torch.zeros(6, dtype=torch.float64)
    for _ in range(200):
        Q = case.P.flatten(0, 1) @ (reward + GAMMA * Q[case.after(torch.arange(3))])
    scale = (rho * reward).norm() / math.sqrt(3)  # of E[r B] before it is normalised
    close(case.M / rho @ z * scale, Q)


def test_weights_of_several_rewards_are_those_of_each() -> None:
    features, rewards = randn(50, 4, seed=1), randn(3, 50, seed=2)
    together = reward_weights(rewards, features)
    assert together.shape == (3, 4)
    for row, reward in zip(together, rewards, strict=True):
        close(row, reward_weights(reward, features))
        close(row, reward_weights(7 * reward, features))


def test_the_true_values_have_no_residual() -> None:
    """Where the next state is certain: F = M / rho and B = I, for any reward z / rho."""
    case = deterministic()
    F, B = (case.M / case.rho)[None], torch.eye(3, dtype=torch.float64)
    # every pair as often as in the data, so that the second moment of B is that of rho
    pair, there = torch.arange(6), case.P.flatten(0, 1).argmax(1)
    z = randn(3, seed=1).expand(6, 3)
    close(fb_value_loss(F[:, pair], B[there], F[:, case.after(there)], z, gamma=GAMMA), tensor(0.0)[0], 1e-12)
    wrong = fb_value_loss(1.1 * F[:, pair], B[there], F[:, case.after(there)], z, gamma=GAMMA)
    expected = (0.1 * F[0] @ z[0]).square().mean() / 2
    close(wrong, expected)


# The scale of B


def test_orthonormality_is_the_distance_of_the_second_moment_from_the_identity() -> None:
    """Less d; so its least value, -d, is where E[B B^T] = I."""
    case, d = process(), 2
    white = torch.linalg.qr(randn(3, d, seed=1)).Q / case.rho.sqrt()[:, None]
    for B in (white, randn(3, d, seed=2), 2 * white):
        moment = torch.einsum("x,xi,xj->ij", case.rho, B, B)
        expected = (moment - torch.eye(d, dtype=torch.float64)).square().sum() - d
        loss = case.pairs(lambda _, there, B=B: fb_orthonormality_loss(B[there]))
        close(loss, expected, 1e-10)
    moment = torch.einsum("x,xi,xj->ij", case.rho, white, white)
    close(moment, torch.eye(d, dtype=torch.float64), 1e-10)


# The actor


def test_gradient_of_the_actor_is_that_of_the_value_in_units_of_its_size() -> None:
    """Against central differences of Q at actions, for a bilinear F with two heads."""
    n, d, kappa = 5, 3, 0.4
    maps, z = randn(2, 2, d, seed=1), randn(n, d, seed=2)
    shift = randn(2, 1, d, seed=3)

    def values(action: Tensor) -> Tensor:
        Q = ((torch.tanh(action @ maps + shift)) * z).sum(2)
        return (1 - kappa) * Q.mean(0) + kappa * Q.min(0).values

    action = randn(n, 2, seed=4).requires_grad_()
    loss = fb_actor_loss(torch.tanh(action @ maps + shift), z, pessimism=kappa)
    (found,) = torch.autograd.grad(loss, action)
    at, step = action.detach(), 1e-5
    size = values(at).abs().mean()
    close(loss.detach(), -values(at).mean() / size)
    for i in range(n):
        for j in range(2):
            move = torch.zeros_like(at)
            move[i, j] = step
            slope = (values(at + move) - values(at - move)).mean() / (2 * step)
            assert float(found[i, j]) == pytest.approx(-float(slope / size), abs=1e-8)


def test_pessimism_goes_from_the_mean_of_the_heads_to_the_least() -> None:
    F, z = tensor([[1.0]], [[4.0]]), tensor([1.0])
    F = torch.cat([F, 2 * F], 1)
    z = z.expand(2, 1)
    for kappa, value in ((0.0, 2.5), (0.5, 1.75), (1.0, 1.0)):
        F.requires_grad_()
        (slope,) = torch.autograd.grad(fb_actor_loss(F, z, pessimism=kappa), F)
        share = tensor([(1 + kappa) / 2], [(1 - kappa) / 2])
        size = value * 1.5  # the mean over the batch, whose second row has twice the values
        close(slope[..., 0], (-share / (2 * size)).expand(2, 2))


# The law of z


def test_uniform_latents_have_the_moments_of_the_sphere() -> None:
    """E[z] = 0, E[z z^T] = I and E[z_1^4] = 3 d / (d + 2), all of norm sqrt(d)."""
    n, d = 40_000, 5
    z = uniform_latents(n, d, generator=generator(), dtype=torch.float64)
    close(z.norm(dim=1), torch.full((n,), math.sqrt(d), dtype=torch.float64))
    assert z_scores(z, 0.0).abs().max() < BOUND
    products = (z[:, :, None] * z[:, None, :]).flatten(1)
    identity = torch.eye(d, dtype=torch.float64).flatten()
    assert z_scores(products, identity).abs().max() < BOUND
    assert z_scores(z**4, 3 * d / (d + 2)).abs().max() < BOUND


def test_half_of_the_latents_are_goals_of_the_batch() -> None:
    n, d = 4_000, 6
    features = randn(n, d, seed=1)
    z = draw_latents(features, generator=generator())
    goals = math.sqrt(d) * features / features.norm(dim=1, keepdim=True)
    match = torch.cdist(z, goals).amin(1) < 1e-6
    assert abs(float(match.double().mean()) - 0.5) < BOUND * 0.5 / math.sqrt(n)
    own = (z - goals).norm(dim=1) < 1e-6
    assert own.double().mean() < 0.01  # the goal of a row is not where it goes anyway
    close(z.norm(dim=1), torch.full((n,), math.sqrt(d), dtype=torch.float64))
    assert z_scores(z[~match], 0.0).abs().max() < BOUND
    assert torch.cdist(draw_latents(features, share=1.0, generator=generator()), goals).amin(1).max() < 1e-6


# The model


def small(**options: Any) -> ForwardBackward:
    return ForwardBackward(4, 2, 6, width=16, generator=generator(), **options)


def test_model_is_made_anew_from_its_config_and_state() -> None:
    loc, scale = randn(4, seed=1), 1 + randn(4, seed=2).square()
    model = small(goal=(0, 2), frequencies=3, loc=loc, scale=scale, heads=3, depth=2)
    again = ForwardBackward(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    state, z = randn(7, 4, seed=3), uniform_latents(7, 6, generator=generator())
    action = model.act(state, z)
    assert torch.equal(again.act(state, z), action)
    assert torch.equal(again.forward_map(state, action, z), model.forward_map(state, action, z))
    assert torch.equal(again.backward_map(state), model.backward_map(state))


def test_units_are_those_of_the_states() -> None:
    """The same weights with units (m, s) and without: the maps at s x + m are those at x."""
    loc, scale = tensor(1.0, -2.0, 3.0, 0.5), tensor(0.1, 2.0, 1.0, 5.0)
    raw, standard = small(frequencies=2, loc=loc, scale=scale).double(), small(frequencies=2).double()
    x, z = randn(9, 4, seed=1), uniform_latents(9, 6, generator=generator(), dtype=torch.float64)
    close(raw.backward_map(x * scale + loc), standard.backward_map(x))
    close(raw.act(x * scale + loc, z), standard.act(x, z))


def test_backward_map_sees_the_goal_alone_and_has_norm_root_d() -> None:
    model, x = small(goal=(1, 3), frequencies=2).double(), randn(9, 4, seed=1)
    features = model.backward_map(x)
    close(features.norm(dim=1), torch.full((9,), math.sqrt(6), dtype=torch.float64))
    other = x.clone()
    other[:, [0, 2]] += 1
    assert torch.equal(model.backward_map(other), features)
    assert not torch.isclose(model.act(other, features[0]), model.act(x, features[0])).all(1).any()


def test_value_is_the_product_of_features_and_latents() -> None:
    model, x, action = small().double(), randn(9, 4, seed=1), randn(9, 2, seed=2).tanh()
    z = uniform_latents(9, 6, generator=generator(), dtype=torch.float64)
    Q = torch.einsum("hbd,bd->hb", model.forward_map(x, action, z), z)
    close(model.value(x, action, z), Q.mean(0))
    close(model.value(x, action, z, pessimism=1.0), Q.amin(0))
    one = model.value(x, action, z[0])
    close(one, model.value(x, action, z[:1].expand(9, 6)))


def test_noise_of_actions_is_cut_off() -> None:
    model, x = small().double(), randn(4_000, 4, seed=1)
    z = uniform_latents(4_000, 6, generator=generator(), dtype=torch.float64)
    plain = model.policy(x, z)
    noisy = model.policy(x, z, noise=0.2, clip=0.3, generator=generator())
    moved = (noisy - plain).detach()
    assert 0.29 < moved.abs().max() <= 0.3 + 1e-12
    assert noisy.abs().max() <= 1
    # the variance of N(0, .04) cut off at 1.5 standard deviations
    tail, density = math.erfc(1.5 / math.sqrt(2)), math.exp(-1.125) / math.sqrt(2 * math.pi)
    variance = 0.04 * (1 - tail - 3 * density + 2.25 * tail)
    assert z_scores(moved.square(), variance).abs().max() < BOUND


def test_noise_keeps_the_gradient_also_where_an_action_is_cut_off() -> None:
    model, x = small().double(), randn(50, 4, seed=1)
    last = model.actor_network.last[-1]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.constant_(last.bias, 1.5)
    z = uniform_latents(50, 6, generator=generator(), dtype=torch.float64)
    noisy = model.policy(x, z, noise=0.2, generator=generator())
    assert 0.1 < (noisy == 1).double().mean() < 0.9
    weights = list(model.actor_network.parameters())
    slopes, expected = (torch.autograd.grad(of.sum(), weights) for of in (noisy, model.policy(x, z)))
    for slope, truth in zip(slopes, expected, strict=True):
        close(slope, truth)


# Mistakes

FEATURES = torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fb_loss(FEATURES, FEATURES[0], FEATURES, FEATURES[0], gamma=1.0), "gamma was 1.0"),
        (lambda: fb_loss(FEATURES[0], FEATURES[0], FEATURES, FEATURES[0], gamma=0.5), r"forward has shape \(4, 3\)"),
        (lambda: fb_loss(FEATURES, FEATURES[0, :3], FEATURES, FEATURES[0], gamma=0.5), r"backward has shape \(3, 3\)"),
        (lambda: fb_loss(FEATURES, FEATURES[0], FEATURES[:1], FEATURES[0], gamma=0.5), "next_forward has shape"),
        (lambda: fb_loss(FEATURES, FEATURES[0], FEATURES, FEATURES[0, :1], gamma=0.5), "next_backward has shape"),
        (lambda: fb_orthonormality_loss(torch.zeros(1, 3)), "the batch has 1 rows, but should have at least 2"),
        (lambda: fb_orthonormality_loss(torch.zeros(3)), r"backward has shape \(3,\), but should have shape"),
        (lambda: fb_value_loss(FEATURES, FEATURES[0], FEATURES, FEATURES[0, 0], gamma=0.5), r"z has shape \(3,\)"),
        (lambda: fb_actor_loss(FEATURES, FEATURES[0], pessimism=2.0), r"pessimism is 2.0, but should be in \[0, 1\]"),
        (lambda: draw_latents(FEATURES[0], share=-0.1), r"share is -0.1, but should be in \[0, 1\]"),
        (lambda: reward_weights(torch.zeros(4), torch.eye(4)), "reward has the mean 0 with every feature"),
        (lambda: reward_weights(torch.zeros(3), torch.eye(4)), r"reward has shape \(3,\), but should be of shape"),
        (
            lambda: reward_weights(torch.full((4,), math.nan), torch.eye(4)),
            "reward holds 4 numbers that are not finite",
        ),
        (lambda: small(goal=()), r"goal is \(\), but should hold numbers from 0 to 3"),
        (lambda: small(goal=(4,)), r"goal is \(4,\), but should hold numbers from 0 to 3"),
        (
            lambda: small(loc=torch.zeros(3), scale=torch.ones(3)),
            r"loc has shape \(3,\), but should be of shape \(4,\)",
        ),
        (lambda: small().act(torch.zeros(2, 3), torch.zeros(6)), r"state has shape \(2, 3\), but should have"),
        (lambda: small().act(torch.zeros(2, 4), torch.zeros(5)), r"z has shape \(5,\), but should broadcast to"),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
