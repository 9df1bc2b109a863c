"""Successor models of many discounts: the law of the discounts, losses with one for each row, the model at one."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from flowmatch_core._tensors import as_time
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.networks import MLPField
from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.successor import (
    Discounts,
    GeometricHorizonModel,
    HorizonGAN,
    HorizonVAE,
    LatentHorizonModel,
    LogUniformDiscounts,
    Loss,
    Particles,
    SuccessorLoss,
    Transitions,
    UniformDiscounts,
    gan_loss,
    geometric,
    mc_cfm_loss,
    n_step,
    td2_cfm_loss,
    td2_dd_loss,
    td_cfm_coupled_loss,
    td_cfm_loss,
    td_dd_loss,
    vae_loss,
    with_discount,
)
from tests.support.checks import BOUND, close, z_scores
from tests.support.processes import Probe, scalar_process, transitions
from tests.support.random import generator, randn, tensor

GAMMAS = (0.5, 0.8, 0.9)
LAW = UniformDiscounts(0.5, 0.9)


class OracleAt:
    """The exact velocities of a process at several discounts, told apart by the first feature of the condition."""

    def __init__(self, mdp: LinearGaussianMDP, gammas: tuple[float, ...] = GAMMAS) -> None:
        self.fields = {gamma: mdp.velocity_field(gamma, tolerance=1e-4) for gamma in gammas}

    def __call__(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        times, plain, velocity = as_time(t, x).expand(len(x)), cond[:, : -Discounts.FEATURES], torch.zeros_like(x)
        for gamma, field in self.fields.items():
            here = (cond[:, -Discounts.FEATURES] - gamma).abs() < 1e-9
            velocity[here] = field(times[here], x[here], plain[here])
        return velocity


def alternating(n: int) -> Tensor:
    """Each of the discounts in turn."""
    return tensor(*GAMMAS).repeat(-(-n // len(GAMMAS)))[:n]


# ---- the law ----


@pytest.mark.parametrize(
    ("law", "cdf"),
    [
        (UniformDiscounts(0.5, 0.95), lambda gamma: (gamma - 0.5) / 0.45),
        (LogUniformDiscounts(0.5, 0.99), lambda gamma: -np.log(2 * (1 - gamma)) / math.log(50)),
    ],
    ids=["uniform", "log_uniform"],
)
def test_discounts_have_their_distribution(law: Discounts, cdf: Callable[[np.ndarray], np.ndarray]) -> None:
    drawn = law.sample(5_000, generator=generator())
    assert drawn.dtype == torch.float64
    assert law.low <= drawn.min() and drawn.max() <= law.high
    assert stats.kstest(drawn.numpy(), cdf).pvalue > 1e-3


@pytest.mark.parametrize("kind", [UniformDiscounts, LogUniformDiscounts])
def test_a_law_of_one_discount_draws_that(kind: type[UniformDiscounts]) -> None:
    assert kind(0.7, 0.7).sample(5, generator=generator()).tolist() == [0.7] * 5


def test_steps_to_a_future_have_the_discount_of_their_column() -> None:
    """P(T = 1) = 1 - gamma and E[T] = 1 / (1 - gamma)."""
    gamma = tensor(0.0, 0.5, 0.95)
    steps = geometric(gamma, (20_000, 3), generator=generator()).double()
    assert (steps[:, 0] == 1).all()
    assert z_scores(steps, 1 / (1 - gamma))[1:].abs().max() < BOUND
    assert z_scores((steps == 1).double(), 1 - gamma)[1:].abs().max() < BOUND


def test_states_on_the_way_are_drawn_with_the_discount_of_their_window() -> None:
    """P(K = k) = gamma^(k-1) (1 - gamma) / (1 - gamma^n), for windows with different discounts."""
    rows, n, gammas = 20_000, 4, tensor(0.0, 0.5, 0.95)
    states = torch.arange(n + 1.0).expand(3 * rows, -1)[..., None]
    batch = n_step(states, None, gammas.repeat_interleave(rows), generator=generator())
    for gamma, k in zip(gammas, batch.visited[:, 0].view(3, rows), strict=True):
        for step in range(1, n + 1):
            p = float(gamma ** (step - 1) * (1 - gamma) / (1 - gamma**n))
            assert abs(int((k == step).sum()) - rows * p) <= BOUND * math.sqrt(rows * p * (1 - p))


# ---- one discount for all rows is a constant tensor ----


class Plain(nn.Module):
    """A linear field."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, dtype=torch.float64)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.3)

    def forward(self, t: Time, x: Tensor, cond: Tensor) -> Tensor:
        v: Tensor = self.layer(torch.cat([as_time(t, x).expand(len(x))[:, None], x, cond], 1))
        return v


Value = Callable[[float | Tensor, Tensor | None], tuple[Loss, nn.Module]]
"""The loss of 32 rows given the discounts and the weights, with the network that learns."""


def flow(td_loss: SuccessorLoss) -> Value:
    def value(gamma: float | Tensor, weight: Tensor | None) -> tuple[Loss, nn.Module]:
        field, batch = Plain(), transitions(scalar_process(), 32)
        return td_loss(field, field, batch, gamma=gamma, steps=2, weight=weight, generator=generator()), field

    return value


def latent(loss: Callable[..., Loss], kind: type[HorizonGAN] | type[HorizonVAE]) -> Value:
    def value(gamma: float | Tensor, weight: Tensor | None) -> tuple[Loss, nn.Module]:
        network = kind(1, 2, 8, 1, generator=generator()).double()
        batch = transitions(scalar_process(), 32)
        return loss(network, network, batch, gamma=gamma, weight=weight, generator=generator()), network

    return value


def particles(gamma: float | Tensor, weight: Tensor | None) -> tuple[Loss, nn.Module]:
    field, memory, g = Plain(), Particles(32, 1, 2, steps=3).double(), generator()
    for seed in range(6):
        batch = transitions(scalar_process(), 32, seed=seed)
        loss = memory.td2_cfm_loss(field, field, batch, gamma=gamma, weight=weight, generator=g)
    return loss, field


LOSSES: dict[str, Value] = {
    **{f.__name__: flow(f) for f in (td_cfm_loss, td_cfm_coupled_loss, td2_cfm_loss, td_dd_loss, td2_dd_loss)},
    "gan_loss": latent(gan_loss, HorizonGAN),
    "vae_loss": latent(vae_loss, HorizonVAE),
    "particles": particles,
}


@pytest.mark.parametrize("weight", [None, torch.linspace(0.5, 1.5, 32, dtype=torch.float64)], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_constant_tensor_is_the_number(name: str, weight: Tensor | None) -> None:
    """Bit for bit at gamma = 1/2, where both orders of the same products are exact; elsewhere but for rounding."""
    for gamma, exact in ((0.5, True), (0.9, False)):
        found = []
        for given in (gamma, torch.full((32,), gamma, dtype=torch.float64)):
            loss, network = LOSSES[name](given, weight)
            loss.total.backward()  # type: ignore[no-untyped-call]
            found.append([*loss, *(p.grad for p in network.parameters() if p.grad is not None)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0 if exact else 1e-9, atol=0 if exact else 1e-12)
        total, direct, bootstrap = found[0][:3]
        assert torch.equal(total, (1 - gamma) * direct + gamma * bootstrap)


@pytest.mark.parametrize("name", LOSSES)
def test_a_discount_belongs_to_its_row(name: str) -> None:
    """The loss of a batch is the sum of those of its halves, each with its discount: here 0.9 and 0."""
    first = torch.arange(32) < 16
    mixed = LOSSES[name](0.9 * first.double(), None)[0].total
    close(mixed, LOSSES[name](0.9, first.double())[0].total + LOSSES[name](0.0, (~first).double())[0].total)


@pytest.mark.parametrize("td_loss", [td2_cfm_loss, td_dd_loss], ids=lambda loss: loss.__name__)
def test_no_step_waits_for_the_device(td_loss: SuccessorLoss) -> None:
    """Without values whatever asks for one fails."""
    windows, gamma = torch.empty(8, 4, 1, device="meta"), torch.empty(8, device="meta", dtype=torch.float64)
    batch = with_discount(n_step(windows, None, gamma), gamma)
    field = MLPField(1, (8,), cond_dim=1 + Discounts.FEATURES).to("meta")
    td_loss(field, field, batch, gamma=gamma).total.backward()  # type: ignore[no-untyped-call]


# ---- the exact fields of several discounts are stationary in one batch ----


@pytest.mark.parametrize("td_loss", [td_cfm_loss, td2_cfm_loss], ids=lambda loss: loss.__name__)
def test_oracles_of_several_discounts_are_stationary_together(td_loss: SuccessorLoss) -> None:
    mdp, n = scalar_process(), 4_000
    oracle, gamma = OracleAt(mdp), alternating(n)
    batch = with_discount(transitions(mdp, n), gamma)
    probe = Probe(oracle, n)
    loss = td_loss(probe, oracle, batch, gamma=gamma, generator=generator())
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() < BOUND


def test_another_discount_than_that_of_the_condition_is_not_stationary() -> None:
    """The power of the test above."""
    mdp, n = scalar_process(), 4_000
    oracle, gamma = OracleAt(mdp), alternating(n)
    probe, batch = Probe(oracle, n), with_discount(transitions(mdp, n), gamma)
    loss = td2_cfm_loss(probe, oracle, batch, gamma=gamma.roll(1), generator=generator())
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() > 2 * BOUND


def test_oracles_of_several_discounts_are_stationary_for_futures_of_their_rows() -> None:
    """Monte Carlo: the steps to the future of a row are drawn with its discount, along episodes of the policy."""
    mdp, n, g = scalar_process(), 6_000, generator(9)
    plain, gamma = transitions(mdp, n), alternating(n)
    steps = geometric(gamma, (n,), generator=g)
    state, action, future = plain.state, plain.action, plain.state.clone()
    for step in range(1, int(steps.max()) + 1):
        state, action = mdp.step(state, action, generator=g), None
        future[steps == step] = state[steps == step]
    probe = Probe(OracleAt(mdp), n)
    loss = mc_cfm_loss(probe, with_discount(plain, gamma), future, generator=generator())
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() < BOUND


def test_oracles_of_several_discounts_are_stationary_for_particles() -> None:
    """A slot keeps the discount of its transition: that of the batch now has another order."""
    mdp, n, g = scalar_process(), 1_500, generator(7)
    memory, oracle = Particles(n, 1, 2 + Discounts.FEATURES, steps=12).double(), OracleAt(mdp)
    for call in range(14):
        gamma, probe = alternating(n).roll(call), Probe(oracle, n)
        batch = with_discount(transitions(mdp, n, seed=10 + 3 * call), gamma)
        loss = memory.td2_cfm_loss(probe, oracle, batch, gamma=gamma, generator=g)
    assert set(memory.share.tolist()) == set(GAMMAS)
    assert torch.equal(memory.share[memory.phase > 0], memory.cond[memory.phase > 0, 2])
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() < BOUND


# ---- the model at a discount ----


def units() -> dict[str, Tensor]:
    return {"loc": tensor(1.0), "scale": tensor(2.0), "action_loc": tensor(-1.0), "action_scale": tensor(0.5)}


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_model_at_a_discount_is_the_ordinary_one(gamma: float) -> None:
    mdp, state, action, x = scalar_process(), randn(6, 1, seed=1), randn(6, 1, seed=2), randn(6, 1, seed=3)
    many = GeometricHorizonModel(OracleAt(mdp), (1,), gamma=0.8, steps=4, **units(), discounts=LAW)
    one = GeometricHorizonModel(mdp.velocity_field(gamma, tolerance=1e-4), (1,), gamma=gamma, steps=4, **units())
    model = many.at(gamma)
    assert (model.gamma, many.gamma) == (gamma, 0.8)
    both = model, one
    assert torch.equal(*(m.sample(state, action, 3, generator=generator()) for m in both))
    assert torch.equal(*(m.log_prob(x, state, action) for m in both))
    assert torch.equal(*(m.value(lambda x: x[..., 0], state, action, 3, generator=generator()) for m in both))


def test_discounts_stand_behind_standardised_actions() -> None:
    asked: list[Tensor] = []

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        asked.append(cond)
        return x

    model = GeometricHorizonModel(field, (1,), gamma=0.5, steps=1, **units(), discounts=LAW)
    model.at(0.75).sample(tensor([3.0]), tensor([0.0]), 1, generator=generator())
    close(asked[0], tensor([1.0, 2.0, 0.75, 0.25, math.log(4) / 5]))
    batch = Transitions(tensor([1.0]), tensor([2.0]), tensor([1.0]), tensor([2.0]))
    close(with_discount(batch, tensor(0.75)).condition, asked[0])
    alone = Transitions(tensor([1.0]), None, tensor([1.0]), None)
    close(with_discount(alone, tensor(0.75)).next_condition, asked[0][:, [0, 2, 3, 4]])


def test_a_latent_model_has_all_discounts_too() -> None:
    network = HorizonVAE(1, 2 + Discounts.FEATURES, 8, 1, generator=generator()).double()
    model = LatentHorizonModel(network, 0.8, discounts=LAW)
    state, action = randn(5, 1, seed=1), randn(5, 1, seed=2)
    noise = torch.randn(5, 1, generator=generator(), dtype=torch.float64)
    cond = torch.cat([state, action, Discounts.features(tensor(0.6)).expand(5, -1)], 1)
    found = model.at(0.6).sample(state, action, 1, generator=generator())[0]
    with torch.no_grad():
        assert torch.equal(found, network.generate(noise, cond))


def test_a_model_at_a_discount_follows_the_original_to_another_dtype() -> None:
    network = HorizonVAE(1, 2 + Discounts.FEATURES, 8, 1, generator=generator())
    model = LatentHorizonModel(network, 0.8, **units(), discounts=LAW)
    other = model.at(0.6)
    model.double()
    state = randn(5, 1, seed=1)
    assert torch.equal(*(m.sample(state, state, 2, generator=generator()) for m in (model.at(0.6), other)))


# ---- mistakes ----


def oracle_loss(gamma: Tensor) -> Callable[[], object]:
    field: VelocityField = scalar_process().velocity_field(0.9)
    return lambda: td2_cfm_loss(field, field, transitions(scalar_process(), 4), gamma=gamma)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (oracle_loss(tensor(0.5, 0.9, 1.0, 0.9)), r"gamma holds 1.0, but should hold numbers in \[0, 1\)"),
        (oracle_loss(tensor(0.5, 0.9, math.nan, 0.9)), r"gamma holds nan, but should hold numbers in \[0, 1\)"),
        (oracle_loss(tensor(0.5, 0.9)), r"gamma has shape \(2,\), but should be a number or of shape \(4,\)"),
        (oracle_loss(torch.zeros(4, dtype=torch.long)), "gamma has dtype torch.int64"),
        (lambda: n_step(torch.zeros(3, 2, 2), None, tensor(0.5, 0.5)), r"gamma has shape \(2,\)"),
        (lambda: geometric(tensor(0.5, 1.5), (2,)), "gamma holds 1.5"),
        (lambda: GeometricHorizonModel(Plain(), (1,), tensor(0.5)), r"gamma was a tensor of shape \(1,\)"),  # type: ignore[arg-type]
        (lambda: with_discount(transitions(scalar_process(), 4), tensor(0.5)), r"gamma has shape \(1,\)"),
        (lambda: UniformDiscounts(0.9, 0.5), r"low and high were 0.9 and 0.5, but should be 0 <= low <= high < 1"),
        (lambda: LogUniformDiscounts(0.5, 1.0), "low and high were 0.5 and 1.0"),
        (
            lambda: GeometricHorizonModel(Plain(), (1,), 0.95, discounts=LAW),
            r"gamma was 0.95, but should be in \[0.5, 0.9\], the discounts of the training",
        ),
        (lambda: GeometricHorizonModel(Plain(), (1,), 0.9, discounts=LAW).at(0.4), "gamma was 0.4"),
        (
            lambda: GeometricHorizonModel(Plain(), (1,), 0.9).at(0.5),
            "gamma was 0.5, but the model has no `discounts`: it is of gamma 0.9 alone",
        ),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
