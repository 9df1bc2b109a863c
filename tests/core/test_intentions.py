"""Laws of hidden intentions: closed forms of the oracles, and the loss of a field and its encoder without training."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from flowmatch_core.field import Time
from flowmatch_core.oracles import GaussianIntentions, GaussianMixture, TwoDrifts
from flowmatch_core.successor import (
    IntentionDecoder,
    IntentionEncoder,
    IntentionLoss,
    Transitions,
    geometric,
    intention_loss,
    n_step,
    td2_cfm_loss,
)
from flowmatch_core.successor.losses._latent import divergence_from_prior
from tests.support.checks import BOUND, close, z_scores
from tests.support.processes import Probe
from tests.support.random import generator, randn, tensor

GAMMA = 0.8
WALK = TwoDrifts(drift=tensor(1.0), noise=0.5)
PLANE = TwoDrifts(drift=tensor(1.0, -0.5), noise=0.7)


# The walk


def wander(walk: TwoDrifts, n: int, gamma: float, draw: Callable[[int], Tensor]) -> Tensor:
    """Where walks from 0 are after a geometric number of steps, with the signs of `draw(step)`."""
    left, x = geometric(gamma, (n, 1), generator=generator(1)), torch.zeros(n, len(walk.drift), dtype=torch.float64)
    g, step = generator(2), 0
    while bool((left > 0).any()):
        x = torch.where(left > 0, walk.step(x, draw(step), generator=g), x)
        left, step = left - 1, step + 1
    return x


def test_variances_of_the_walk_at_the_discount_of_the_experiment() -> None:
    start = torch.zeros(1, 1, dtype=torch.float64)
    close(WALK.successor(start, None, 0.95).second_moment.flatten(), tensor(785.0))
    close(WALK.mixed(start, 0.95).second_moment.flatten(), tensor(25.0))


@pytest.mark.parametrize("walk", [WALK, PLANE], ids=["line", "plane"])
def test_moments_are_those_of_simulated_walks(walk: TwoDrifts) -> None:
    """The sign drawn once for an episode, known or not, and the sign drawn again at every step."""
    n, start = 20_000, torch.zeros(1, len(walk.drift), dtype=torch.float64)
    sign = walk.draw_sign(n, generator=generator(3))
    assert abs(z_scores(sign, 0.0)) < BOUND

    def again(step: int) -> Tensor:
        odds = torch.rand(n, 1, generator=generator(10 + step), dtype=torch.float64)
        return torch.where(odds < 0.65, 1.0, -1.0).double()

    one = torch.ones(n, 1, dtype=torch.float64)
    cases: list[tuple[GaussianMixture, Tensor]] = [
        (walk.successor(start, None, GAMMA), wander(walk, n, GAMMA, lambda step: sign)),
        (walk.successor(start, -one[:1], GAMMA), wander(walk, n, GAMMA, lambda step: -one)),
        (walk.mixed(start, GAMMA, mean_sign=0.3), wander(walk, n, GAMMA, again)),
    ]
    for law, x in cases:
        assert z_scores(x, law.mean[0]).abs().max() < BOUND
        assert z_scores(x.unsqueeze(2) * x.unsqueeze(1), law.second_moment[0]).abs().max() < BOUND


@pytest.mark.parametrize("walk", [WALK, PLANE], ids=["line", "plane"])
def test_components_have_the_exact_moments(walk: TwoDrifts) -> None:
    state = randn(3, len(walk.drift), seed=1)
    for law in (
        walk.successor(state, None, 0.5, tolerance=1e-14),
        walk.successor(state, randn(3, 1, seed=2), 0.5, tolerance=1e-14),
        walk.mixed(state, 0.5, mean_sign=-0.4, tolerance=1e-14),
    ):
        parts = GaussianMixture(law.weights, law.means, law.covariances)
        close(parts.weights.sum(), tensor(1.0)[0])
        close(parts.mean, law.mean)
        close(parts.second_moment, law.second_moment)


def test_signs_that_are_certain_need_not_be_drawn_again() -> None:
    state, x = randn(3, 2, seed=1), 4 * randn(3, 2, seed=2)
    for sign in (1.0, -1.0):
        given = PLANE.successor(state, tensor([sign]), GAMMA, tolerance=1e-4)
        close(PLANE.mixed(state, GAMMA, mean_sign=sign).log_prob(x), given.log_prob(x), 1e-8)


def test_mean_sign_is_that_of_bayes() -> None:
    step = randn(5, 2, seed=1)
    identity = PLANE.noise**2 * torch.eye(2, dtype=torch.float64)
    up, down = (MultivariateNormal(s * PLANE.drift, identity).log_prob(step).exp() for s in (1, -1))
    close(PLANE.mean_sign(step)[:, 0], (up - down) / (up + down))


def test_field_is_the_velocity_of_the_measure_given_the_sign() -> None:
    state, sign, x, t = (
        randn(4, 2, seed=1),
        tensor([1.0], [-1.0], [0.3], [0.0]),
        randn(4, 2, seed=2),
        randn(4).sigmoid(),
    )
    field = PLANE.velocity_field(GAMMA)
    close(field(t, x, torch.cat([state, sign], 1)), PLANE.successor(state, sign, GAMMA).velocity(t, x))


# The policy


def test_posterior_of_an_intention_is_that_of_bayes() -> None:
    """Two actions of one intention: mean and variance against the integral over the intention."""
    policy = GaussianIntentions(K=tensor([0.3], [-0.2]), C=tensor([1.5], [0.7]), Pi=tensor([0.8, 0.3], [0.3, 0.5]))
    state, action = tensor([0.4]), tensor([1.0, -0.6])
    mean, covariance = policy.posterior(state, action)

    def joint(z: float) -> float:
        about = MultivariateNormal(policy.K @ state[0] + policy.C @ tensor(z), policy.Pi)
        return float((about.log_prob(action[0]) - z**2 / 2).exp())

    total, first, second = (quad(lambda z, k=k: joint(z) * z**k, -8, 8)[0] for k in range(3))
    assert float(mean) == pytest.approx(first / total, abs=1e-6)
    assert float(covariance) == pytest.approx(second / total - (first / total) ** 2, abs=1e-6)


def test_information_is_the_mean_divergence_of_the_posterior() -> None:
    policy = GaussianIntentions(K=randn(2, 3, seed=1), C=randn(2, 1, seed=2), Pi=tensor([0.8, 0.3], [0.3, 0.5]))
    formula = torch.linalg.slogdet(torch.eye(2) + policy.C @ policy.C.T @ policy.Pi.inverse())[1] / 2
    close(policy.information(), formula)
    state, z = randn(20_000, 3, seed=3), randn(20_000, 1, seed=4)
    mean, covariance = policy.posterior(state, policy.act(state, z, generator=generator()))
    divergence = divergence_from_prior(mean, covariance.log().expand_as(mean) / 2)
    assert abs(z_scores(divergence, policy.information())) < BOUND
    assert abs(z_scores((z - mean) / covariance.sqrt(), 0.0)) < BOUND
    assert abs(z_scores((z - mean) ** 2 / covariance, 1.0)) < BOUND


# The loss


def certain(evidence: Tensor) -> tuple[Tensor, Tensor]:
    """The encoder that takes the evidence for the intention."""
    return evidence, torch.full_like(evidence, -40.0)


def episodes(n: int) -> tuple[Transitions, Tensor]:
    """First steps of the walk from anywhere, and the signs."""
    state, sign = 2 * randn(n, 1, seed=1), WALK.draw_sign(n, generator=generator(2))
    return Transitions(state, None, WALK.step(state, sign, generator=generator(3)), None), sign


@pytest.mark.parametrize("matched", [True, False], ids=["the sign", "another sign"])
def test_the_exact_field_is_stationary_given_the_true_intention(matched: bool) -> None:
    n = 10_000
    batch, sign = episodes(n)
    evidence = sign if matched else sign[torch.randperm(n, generator=generator(4))]
    field = WALK.velocity_field(GAMMA, tolerance=1e-5)
    probe = Probe(field, n)
    loss = intention_loss(probe, field, batch, evidence, certain, gamma=GAMMA, steps=6, generator=generator())
    error = z_scores(probe.gradients(loss.total), 0.0).abs().max()
    assert error < BOUND if matched else error > 2 * BOUND


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_the_direct_term_prefers_to_know_the_intention_at_short_horizons_only(gamma: float) -> None:
    """With the exact fields of both: what the decoder is for."""
    batch, sign = episodes(500)
    mixed = WALK.mixed(torch.zeros(1, dtype=torch.float64), gamma, tolerance=0.02)

    def ignorant(t: Time, x: Tensor, cond: Tensor) -> Tensor:
        assert isinstance(t, Tensor)
        state = cond[:, :1]
        return state + mixed.velocity(t, x - t[:, None] * state)

    def direct(field: Callable[..., Tensor]) -> Tensor:
        g = generator()
        return intention_loss(field, field, batch, sign, certain, gamma=gamma, steps=1, generator=g).direct

    knowing = direct(WALK.velocity_field(gamma, tolerance=0.02))
    assert knowing < 0.9 * direct(ignorant) if gamma < 0.7 else knowing > 2 * direct(ignorant)


class Linear(torch.nn.Module):
    """A field that is linear in its condition."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(randn(inputs, 1, seed=9))

    def forward(self, t: Time, x: Tensor, cond: Tensor) -> Tensor:
        return cond @ self.weight - x


def parts(decoder: IntentionDecoder | None, **options: object) -> tuple[IntentionEncoder, IntentionLoss]:
    """The loss on transitions with actions, and its encoder."""
    encoder = IntentionEncoder(2, 1, (8,), generator()).double()
    s, a, s1, a1 = (randn(16, 1, seed=i) for i in range(4))
    batch = Transitions(s, a, s1, a1)
    field, target = Linear(3), Linear(3)
    evidence = batch.next_condition
    loss = intention_loss(
        field, target, batch, evidence, encoder, gamma=GAMMA, decoder=decoder, generator=generator(5), **options
    )
    return encoder, loss


def reaches(term: Tensor, encoder: IntentionEncoder) -> bool:
    """Whether the encoder has a gradient of a term."""
    if not term.requires_grad:
        return False
    gradients = torch.autograd.grad(term, list(encoder.parameters()), retain_graph=True, allow_unused=True)
    return any(g is not None and bool((g != 0).any()) for g in gradients)


@pytest.mark.parametrize("decoded", [False, True], ids=["direct term", "decoder"])
def test_encoder_learns_from_one_term_and_the_divergence_and_never_from_the_bootstrap(decoded: bool) -> None:
    decoder = IntentionDecoder(3, 1, (8,), generator()).double() if decoded else None
    encoder, loss = parts(decoder)
    assert loss.bootstrap.requires_grad
    assert not reaches(loss.bootstrap, encoder)
    assert reaches(loss.divergence, encoder)
    assert reaches(loss.direct, encoder) != decoded
    assert reaches(loss.reconstruction, encoder) == decoded


@pytest.mark.parametrize("decoded", [False, True], ids=["direct term", "decoder"])
def test_total_is_the_sum_of_its_terms(decoded: bool) -> None:
    decoder = IntentionDecoder(3, 1, (8,), generator()).double() if decoded else None
    _, loss = parts(decoder, beta=0.7)
    close(
        loss.total,
        (1 - GAMMA) * loss.direct + GAMMA * loss.bootstrap + 0.7 * loss.divergence + loss.reconstruction,
    )
    assert (float(loss.reconstruction.detach()) != 0) == decoded


def test_intention_stands_behind_the_actions_of_both_ends() -> None:
    """The bootstrap is that of TD²-CFM with (A, Z) and (A', Z), from the same draws."""
    batch = Transitions(*(randn(16, 1, seed=i) for i in range(4)))
    z = randn(16, 1, seed=7)
    field, target, decoder = Linear(3), Linear(3), IntentionDecoder(3, 1, (8,), generator()).double()
    loss = intention_loss(field, target, batch, z, certain, gamma=GAMMA, decoder=decoder, generator=generator())
    assert batch.action is not None
    assert batch.next_action is not None
    joint = Transitions(
        batch.state, torch.cat([batch.action, z], 1), batch.next_state, torch.cat([batch.next_action, z], 1)
    )
    g = generator()
    torch.randn(16, 1, generator=g, dtype=torch.float64)  # the noise of z
    plain = td2_cfm_loss(field, target, joint, gamma=GAMMA, generator=g)
    close(loss.bootstrap, plain.bootstrap)
    close(loss.direct, plain.direct)


def test_several_steps_weigh_the_terms_by_the_discount_of_all() -> None:
    batch = n_step(randn(16, 4, 1, seed=1), None, GAMMA, generator=generator())
    field = Linear(2)
    loss = intention_loss(field, field, batch, randn(16, 1, seed=2), certain, gamma=GAMMA, beta=0.0)
    close(loss.total, (1 - GAMMA**3) * loss.direct + GAMMA**3 * loss.bootstrap)


def test_divergence_is_that_of_the_normal_distributions() -> None:
    mean, log_scale = randn(6, 3, seed=1), randn(6, 3, seed=2)
    exact = kl_divergence(Normal(mean, log_scale.exp()), Normal(0.0, 1.0)).sum(1)
    close(divergence_from_prior(mean, log_scale), exact)


def test_decoder_is_a_normal_distribution_of_the_outcome() -> None:
    decoder = IntentionDecoder(2, 3, (8,), generator()).double()
    torch.nn.init.normal_(decoder.log_scale, generator=generator())
    cond, y = randn(5, 2, seed=1), randn(5, 3, seed=2)
    mean = decoder.last(decoder.body(cond))
    close(decoder.log_prob(y, cond), Normal(mean, decoder.log_scale.exp()).log_prob(y).sum(1))


def test_decoder_predicts_the_state_of_the_direct_term_unless_told_otherwise() -> None:
    def reconstruction(**options: object) -> Tensor:
        return parts(IntentionDecoder(3, 1, (8,), generator()).double(), **options)[1].reconstruction

    close(reconstruction(), reconstruction(outcome=randn(16, 1, seed=2)))  # S'
    assert not torch.isclose(reconstruction(), reconstruction(outcome=randn(16, 1, seed=8)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TwoDrifts(drift=tensor([1.0]), noise=0.5), r"drift has shape \(1, 1\).*\(d,\)"),
        (lambda: TwoDrifts(drift=tensor(math.nan), noise=0.5), "drift holds 1 numbers that are not finite"),
        (lambda: TwoDrifts(drift=tensor(1.0), noise=0.0), "noise is 0.0.*positive"),
        (lambda: WALK.successor(tensor([0.0]), None, 1.0), r"gamma was 1.0.*\[0, 1\)"),
        (lambda: WALK.mixed(tensor([0.0]), 0.5, mean_sign=1.5), r"mean_sign is 1.5.*\[-1, 1\]"),
        (lambda: WALK.velocity_field(0.5)(0.5, tensor([0.0]), tensor([0.0])), r"cond had shape \(1, 1\)"),
        (
            lambda: GaussianIntentions(K=tensor([1.0]), C=tensor([1.0]), Pi=tensor([0.0])),
            "Pi has the eigenvalue 0.*positive definite",
        ),
        (
            lambda: GaussianIntentions(K=tensor([1.0]), C=tensor([1.0], [1.0]), Pi=tensor([1.0])),
            r"C had shape \(2, 1\).*\(1, 1\)",
        ),
        (lambda: parts(None, beta=-1.0), "beta was -1.0"),
        (lambda: parts(None, outcome=randn(16, 1)), "outcome was given without a decoder"),
        (
            lambda: parts(IntentionDecoder(3, 2, (8,), generator()).double()),
            r"outcome has shape \(16, 1\).*\(16, 2\)",
        ),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
