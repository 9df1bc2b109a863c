"""Laws of the GAN's and the VAE's losses and of their horizon model, without training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.successor import (
    HorizonGAN,
    HorizonModel,
    HorizonVAE,
    LatentHorizonModel,
    LatentNetwork,
    Loss,
    Transitions,
    gan_loss,
    n_step,
    vae_loss,
)
from tests.support.checks import BOUND, z_scores
from tests.support.processes import scalar_process, transitions
from tests.support.random import generator, randn, tensor

GAMMA = 0.8
NETWORKS: list[tuple[type[HorizonGAN] | type[HorizonVAE], Callable[..., Loss]]] = [
    (HorizonGAN, gan_loss),
    (HorizonVAE, vae_loss),
]
both = pytest.mark.parametrize(("network", "loss"), NETWORKS, ids=["gan", "vae"])


class Critic(nn.Module):
    """D = theta . (x, x^2, s x, a x): the moments that a matched sampler gets right."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(tensor(*weights))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        s, a = cond[:, :1], cond[:, -1:]
        return (torch.cat([x, x**2, s * x, a * x], 1) @ self.weights)[:, None]


class Matched(nn.Module):
    """A Gaussian sampler with the mean and the second moment of the successor measure; ``off`` shifts it."""

    def __init__(self, mdp: LinearGaussianMDP, off: float = 0.0) -> None:
        super().__init__()
        self.mdp, self.off = mdp, nn.Parameter(tensor(off))

    def forward(self, noise: Tensor, cond: Tensor) -> Tensor:
        m = self.mdp.successor(cond[:, :1], cond[:, 1:], GAMMA)
        spread = (m.second_moment[:, 0] - m.mean**2).sqrt()
        return m.mean + spread * noise + self.off


def game(off: float = 0.0, *weights: float) -> HorizonGAN:
    gan = HorizonGAN(1, 2, width=4, blocks=1)
    gan.sampler, gan.critic = Matched(scalar_process(), off), Critic(*(weights or (0.0,) * 4))  # type: ignore[assignment]
    return gan


def in_slices(batch: Transitions, rows: int, function: Callable[[Transitions], Tensor]) -> Tensor:
    """The function on slices of the batch: estimates with a standard error."""
    parts = [slice(i, i + rows) for i in range(0, len(batch.state), rows)]
    assert batch.action is not None
    assert batch.next_action is not None
    return torch.stack(
        [
            function(Transitions(batch.state[p], batch.action[p], batch.next_state[p], batch.next_action[p]))
            for p in parts
        ]
    )


# The two terms


@both
def test_terms_are_those_of_the_next_state_and_of_the_targets_state(network: Any, loss: Callable[..., Loss]) -> None:
    """A target that always says 5: the bootstrap term is the direct term of transitions to 5, at the same noise."""
    net, batch = network(1, 2, width=8, blocks=1, generator=generator()).double(), transitions(scalar_process(), 64)

    class Five(LatentNetwork):
        def generate(self, noise: Tensor, cond: Tensor) -> Tensor:
            assert torch.equal(cond, batch.next_condition)
            return torch.full_like(noise, 5.0)

    mixed = loss(net, Five(1), batch, gamma=GAMMA, generator=generator())
    torch.testing.assert_close(mixed.total, (1 - GAMMA) * mixed.direct + GAMMA * mixed.bootstrap)
    fives = torch.full_like(batch.state, 5.0)
    there = Transitions(batch.state, batch.action, fives, batch.next_action)
    terminal = Transitions(
        batch.state, batch.action, fives, batch.next_action, terminal=torch.ones(64, dtype=torch.bool)
    )
    ignored = network(1, 2, width=8, blocks=1, generator=generator(1)).double()
    stays = loss(net, ignored, terminal, gamma=GAMMA, generator=generator())
    torch.testing.assert_close(stays.bootstrap, mixed.bootstrap)
    plain = loss(net, ignored, there, gamma=GAMMA, generator=generator())
    torch.testing.assert_close(stays.direct, plain.direct)
    assert not torch.isclose(plain.bootstrap, mixed.bootstrap)


@both
def test_target_learns_nothing_and_every_parameter_of_the_field_does(network: Any, loss: Callable[..., Loss]) -> None:
    field, target = (network(1, 2, width=8, blocks=1, generator=generator(i)).double() for i in (0, 1))
    loss(field, target, transitions(scalar_process(), 64), gamma=GAMMA, generator=generator()).total.backward()
    idle = {name for name, p in field.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert idle <= {"critic.last.bias"}  # only differences of the critic count
    assert all(p.grad is None for p in target.parameters())


@both
def test_n_step_batches_are_weighed_by_the_discount_of_all_steps(network: Any, loss: Callable[..., Loss]) -> None:
    net = network(1, 2, width=8, blocks=1, generator=generator()).double()
    batch = n_step(randn(64, 4, 1, seed=1), randn(64, 4, 1, seed=2), GAMMA, generator=generator())
    value = loss(net, net, batch, gamma=GAMMA, generator=generator())
    torch.testing.assert_close(value.total, (1 - GAMMA**3) * value.direct + GAMMA**3 * value.bootstrap)


# The game


def test_a_matched_sampler_leaves_a_blind_critic_nothing_to_learn() -> None:
    """The Bellman equation of the first two moments is stationary in the game; a shifted sampler is found out."""
    batch, slopes = transitions(scalar_process(), 20_000), {}
    for off in (0.0, 0.5):
        gan, g = game(off), generator()

        def slope(part: Transitions, gan: HorizonGAN = gan, g: torch.Generator = g) -> Tensor:
            loss = gan_loss(gan, game(), part, gamma=GAMMA, generator=g)
            return torch.autograd.grad(loss.total, gan.critic.weights)[0]  # type: ignore[arg-type]

        slopes[off] = z_scores(in_slices(batch, 500, slope), 0.0).abs().max()
    assert slopes[0.0] < BOUND
    assert slopes[0.5] > 2 * BOUND


def test_gradient_is_that_of_the_game() -> None:
    """The critic's parameters see its loss and the penalties alone, the sampler's parameters their own loss alone."""
    gan, batch, penalty = game(0.4, 0.3, -0.2, 0.1, 0.2), transitions(scalar_process(), 64), 0.7
    loss = gan_loss(gan, game(), batch, gamma=GAMMA, penalty=penalty, generator=generator())
    mine = torch.autograd.grad(loss.total, [gan.critic.weights, gan.sampler.off])  # type: ignore[list-item]
    g = generator()
    with torch.no_grad():
        later = game().generate(torch.randn(64, 1, generator=g, dtype=torch.float64), batch.next_condition)
    real, cond = torch.cat([batch.next_state, later]), torch.cat([batch.condition] * 2)
    fake = gan.generate(torch.randn(128, 1, generator=g, dtype=torch.float64), cond)
    weights = torch.cat([torch.full((64,), 1 - GAMMA), torch.full((64,), GAMMA)]) / 64
    of_real, of_fake = gan.critic(real, cond)[:, 0], gan.critic(fake, cond)[:, 0]
    theta, s, a = gan.critic.weights, cond[:, :1], cond[:, 1:]
    steepness = sum((theta[0] + 2 * theta[1] * x.detach() + theta[2] * s + theta[3] * a) ** 2 for x in (real, fake))
    of_frozen_fake = gan.critic(fake.detach(), cond)[:, 0]
    critic = F.softplus(of_frozen_fake - of_real) + penalty / 2 * steepness[:, 0]  # type: ignore[index]
    sampler = F.softplus(of_real - of_fake)
    (first,) = torch.autograd.grad((weights * critic).sum(), theta, retain_graph=True)  # type: ignore[arg-type]
    (second,) = torch.autograd.grad((weights * sampler).sum(), gan.sampler.off)  # type: ignore[arg-type]
    torch.testing.assert_close(mine[0], first)
    torch.testing.assert_close(mine[1], second)
    torch.testing.assert_close(loss.total, (weights * (critic + sampler)).sum())
    assert float(second) != 0


def test_the_penalty_goes_along_a_line_while_it_trains() -> None:
    """A pair is the number between its two at the share that is done, to the last bit; a number stays what it is."""
    gan, batch = game(0.4, 0.3, -0.2, 0.1, 0.2), transitions(scalar_process(), 64)

    def total(**options: Any) -> Tensor:
        return gan_loss(gan, game(), batch, gamma=GAMMA, generator=generator(), **options).total

    for progress, between in ((0.0, 0.5), (0.25, 0.40625), (0.5, 0.3125), (1.0, 0.125)):
        now = total(penalty=between)
        assert torch.equal(total(penalty=(0.5, 0.125), progress=progress), now)
        assert torch.equal(total(penalty=between, progress=progress), now)
        assert not torch.equal(total(penalty=(0.5, 0.125), progress=0.75), now)
    assert torch.equal(total(), total(penalty=0.05))
    torch.testing.assert_close(total(progress=1.0), total(penalty=0.005))


# The autoencoder


class Linear(nn.Module):
    """weight * input + bias, whatever the condition, and beside it a constant."""

    def __init__(self, weight: float, bias: float, *beside: float) -> None:
        super().__init__()
        self.weight, self.bias, self.beside = weight, bias, beside

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return torch.cat([self.weight * x + self.bias, *(torch.full_like(x, c) for c in self.beside)], 1)


@pytest.mark.parametrize(("scale", "optimal"), [(1.0, True), (1.3, False)])
def test_loss_of_the_best_linear_autoencoder_is_the_evidence(scale: float, optimal: bool) -> None:
    """Next states N(mu, tau^2): at its best the bound is tight, and the loss beta (1 + log(2 tau^2 / beta)) / 2."""
    mu, tau, beta = 1.0, 1.2, 0.5
    weight = math.sqrt(tau**2 - beta / 2)
    vae = HorizonVAE(1, 2, width=4, blocks=1)
    vae.encoder = Linear(weight / tau**2, -weight * mu / tau**2, 0.5 * math.log(beta / 2 / tau**2))  # type: ignore[assignment]
    vae.decoder = Linear(scale * weight, mu)  # type: ignore[assignment]
    batch = transitions(scalar_process(F=0.0), 20_000)
    batch = Transitions(batch.state, batch.action, mu + tau * randn(20_000, 1, seed=5), batch.next_action)
    g = generator()
    losses = in_slices(batch, 500, lambda part: vae_loss(vae, vae, part, gamma=0.0, beta=beta, generator=g).total)
    error = z_scores(losses, beta / 2 * (1 + math.log(2 * tau**2 / beta)))
    assert abs(error) < BOUND if optimal else error > 2 * BOUND


# The model


def test_model_has_the_moments_and_values_of_its_sampler_in_raw_units() -> None:
    """A sampler of standardised states that matches the measure: mean, linear and quadratic values."""
    mdp, loc, scale, n = scalar_process(), tensor(2.0), tensor(3.0), 4_000

    class Exact(LatentNetwork):
        def generate(self, noise: Tensor, cond: Tensor) -> Tensor:
            raw = torch.cat([cond[:, :1] * scale + loc, cond[:, 1:]], 1)
            return (Matched(mdp)(noise, raw) - loc) / scale

    model: HorizonModel = LatentHorizonModel(Exact(1), GAMMA, loc=loc, scale=scale)
    state, action = randn(3, 1, seed=1), randn(3, 1, seed=2)
    with torch.no_grad():
        x = model.sample(state, action, n, generator=generator())
        assert x.shape == (n, 3, 1)
        m = mdp.successor(state, action, GAMMA)
        assert z_scores(x, m.mean).abs().max() < BOUND
        assert z_scores(x**2, m.second_moment[:, 0]).abs().max() < BOUND
        value = model.value(lambda x: x[..., 0] ** 2, state, action, n, generator=generator())
        truth = mdp.value_quadratic(state, action, GAMMA, matrix=tensor([1.0]))
        error = (x**2).std(0)[:, 0] / math.sqrt(n) / (1 - GAMMA)
        assert ((value - truth) / error).abs().max() < BOUND


@both
def test_model_says_that_it_has_no_density(network: Any, loss: Callable[..., Loss]) -> None:
    model = LatentHorizonModel(network(2, 3), GAMMA)
    assert not model.has_density
    with pytest.raises(TypeError, match=f"a model with {network.__name__} has no log_prob"):
        model.log_prob(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 1))


@both
def test_initial_weights_come_from_the_generator(network: Any, loss: Callable[..., Loss]) -> None:
    first, second, other = (network(2, 3, width=8, generator=generator(i)) for i in (0, 0, 1))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, batch: gan_loss(net, net, batch, gamma=1.0), "gamma was 1.0"),
        (lambda net, batch: gan_loss(net, net, batch, gamma=0.9, penalty=-1.0), "penalty was -1.0"),
        (lambda net, batch: gan_loss(net, net, batch, gamma=0.9, penalty=math.nan), "penalty was nan"),
        (lambda net, batch: gan_loss(net, net, batch, gamma=0.9, penalty=(0.1, math.inf)), r"penalty was \(0.1, inf"),
        (lambda net, batch: gan_loss(net, net, batch, gamma=0.9, penalty=(0.1,)), r"was \(0.1,\).* or two of them"),  # type: ignore[arg-type]
        (lambda net, batch: gan_loss(net, net, batch, gamma=0.9, progress=1.5), "progress was 1.5"),
        (lambda net, batch: gan_loss(net, net, batch, gamma=0.9, progress=-0.5), "progress was -0.5"),
        (lambda net, batch: vae_loss(net, net, batch, gamma=0.9, beta=0.0), "beta was 0.0"),
        (lambda net, batch: net.generate(torch.zeros(3, 2), torch.zeros(3, 2)), r"x has shape \(3, 2\)"),
        (lambda net, batch: net.generate(torch.zeros(3, 1), torch.zeros(3, 3)), r"cond has shape \(3, 3\)"),
    ],
)
def test_mistakes_are_named(call: Callable[[HorizonGAN, Transitions], object], message: str) -> None:
    batch = Transitions(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=message):
        call(HorizonGAN(1, 2, width=4), batch)
