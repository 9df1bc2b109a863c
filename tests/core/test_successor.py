"""Laws of the successor losses, with the closed-form oracle as target and without training.

Statistical laws are z-tests: an estimate may lie 4.5 standard errors from its value; the seeds are fixed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowmatch_core._tensors import as_time
from flowmatch_core.averaging import polyak_update
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.networks import UNetMLPField
from flowmatch_core.oracles import GaussianMixture, LinearGaussianMDP
from flowmatch_core.paths import OU, VE, VP, AffinePath, CondOT, Cosine, Polynomial
from flowmatch_core.successor import (
    HorizonGAN,
    HorizonVAE,
    Loss,
    Particles,
    SuccessorLoss,
    Transitions,
    gan_loss,
    mc_cfm_loss,
    n_step,
    td2_cfm_loss,
    td2_dd_loss,
    td_cfm_coupled_loss,
    td_cfm_loss,
    td_dd_loss,
    vae_loss,
)
from flowmatch_core.times import LogitNormalTime
from tests.support.checks import BOUND, z_scores
from tests.support.processes import TD_LOSSES, Probe, scalar_process, transitions
from tests.support.random import generator, randn, tensor

ALL_LOSSES = [*TD_LOSSES, td_dd_loss, td2_dd_loss]
CURVES = [CondOT(), Cosine()]
SETTINGS = [
    pytest.param(CondOT(), torch.rand, id="straight"),
    pytest.param(Cosine(), torch.rand, id="curved"),
    pytest.param(CondOT(), LogitNormalTime(), id="logit_normal"),
]


def names(losses: list[SuccessorLoss]) -> list[str]:
    return [loss.__name__ for loss in losses]


def from_one_start(mdp: LinearGaussianMDP, n: int) -> tuple[Transitions, Tensor, Tensor]:
    state, action = tensor(1.5).expand(n, 1), tensor(-1.0).expand(n, 1)
    next_state = mdp.step(state, action, generator=generator(3))
    return Transitions(state, action, next_state, mdp.policy(next_state)), state[:1], action[:1]


class Recorder:
    """A field that remembers what it was asked."""

    def __init__(self, field: VelocityField) -> None:
        self.field, self.calls = field, list[tuple[Time, Tensor, Tensor | None]]()

    def __call__(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls.append((t, x, cond))
        return self.field(t, x, cond)


def ones(n: int, **options: object) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


def halves(n: int, **options: object) -> Tensor:
    return torch.full((n,), 0.5, dtype=torch.float64)


# The oracle is stationary


@pytest.mark.parametrize(("path", "time"), SETTINGS)
def test_oracle_is_stationary_for_mc_cfm(path: AffinePath, time: Callable[..., Tensor]) -> None:
    mdp, gamma = scalar_process(), 0.8
    batch = transitions(mdp, 10_000)
    future = mdp.successor(batch.state, batch.action, gamma).sample(1, generator=generator(5))[0]
    probe = Probe(mdp.velocity_field(gamma, path), len(future))
    loss = mc_cfm_loss(probe, batch, future, path=path, time=time, generator=generator())
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() < BOUND


@pytest.mark.parametrize(("path", "time"), SETTINGS)
@pytest.mark.parametrize("td_loss", [td_cfm_loss, td2_cfm_loss], ids=names([td_cfm_loss, td2_cfm_loss]))
def test_oracle_is_stationary(td_loss: SuccessorLoss, path: AffinePath, time: Callable[..., Tensor]) -> None:
    """E[(v* - target) phi] = 0 when the target is v*, td-flows 4.6 item 4; TD-CFM(C) has another velocity."""
    mdp, gamma = scalar_process(), 0.8
    batch, oracle = transitions(mdp, 10_000), mdp.velocity_field(gamma, path)
    probe = Probe(oracle, 10_000)
    loss = td_loss(probe, oracle, batch, gamma=gamma, path=path, time=time, generator=generator())
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() < BOUND


# The points each method trains on


@pytest.mark.parametrize("td_loss", TD_LOSSES, ids=names(TD_LOSSES))
def test_points_at_the_end_of_time_follow_the_successor_measure(td_loss: SuccessorLoss) -> None:
    """(1-g) delta_{S'} + g X_1 has the law m: for TD-CFM(C), the one thing that it shares with the others."""
    mdp, gamma, n = scalar_process(), 0.8, 20_000
    batch, state, action = from_one_start(mdp, n)
    field = Recorder(mdp.velocity_field(gamma))
    td_loss(field, field.field, batch, gamma=gamma, time=ones, steps=20, generator=generator())
    direct, bootstrap = field.calls[0][1].chunk(2)
    assert torch.equal(direct, batch.next_state)
    m = mdp.successor(state, action, gamma)
    for power, truth in ((1, m.mean), (2, m.second_moment)):
        mixed = (1 - gamma) * direct**power + gamma * bootstrap**power
        assert z_scores(mixed, truth.squeeze()).abs().max() < BOUND


@pytest.mark.parametrize(
    ("td_loss", "variance"), [(td_cfm_loss, 0.5), (td2_cfm_loss, 0.5), (td_cfm_coupled_loss, 1.0)],
    ids=names([td_cfm_loss, td2_cfm_loss, td_cfm_coupled_loss]),
)  # fmt: skip
def test_points_midway_tell_the_coupled_method_apart(td_loss: SuccessorLoss, variance: float) -> None:
    """Next states N(mu, 1) whatever the state: at t = 1/2 the path has variance 1/2, the coupled one 1."""
    mdp = scalar_process(F=0.0, noise=1.0)
    batch, _, _ = from_one_start(mdp, 20_000)
    field = Recorder(mdp.velocity_field(0.8))
    td_loss(field, field.field, batch, gamma=0.8, time=halves, steps=20, generator=generator())
    x = field.calls[0][1].chunk(2)[1]
    assert abs(z_scores((x - x.mean()) ** 2, variance)) < BOUND


def test_td2_asks_the_target_for_the_velocity_where_its_own_flow_arrives() -> None:
    """From noise x0 the field dx/dt = b(s', a') arrives at x0 + t b, each row at its own t."""
    batch = transitions(scalar_process(), 50)

    def drift(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        return cond[:, :1] - 2 * cond[:, 1:]

    target, field = Recorder(drift), Recorder(drift)
    loss = td2_cfm_loss(field, target, batch, gamma=0.9, steps=3, generator=generator())
    t, x = field.calls[0][0], field.calls[0][1].chunk(2)[1]
    assert isinstance(t, Tensor)
    assert torch.equal(*t.chunk(2))
    assert len(set(t.tolist())) == 50
    b = drift(t[:50], x, batch.next_condition)
    start = target.calls[0][1]
    torch.testing.assert_close(x, start + t[:50, None] * b)
    expected = (drift(t[:50], x, batch.condition) - b).square().mean()
    torch.testing.assert_close(loss.bootstrap, expected)


@pytest.mark.parametrize("td_loss", TD_LOSSES, ids=names(TD_LOSSES))
@pytest.mark.parametrize("solver", ["midpoint", "dopri5_per_sample"])
def test_target_encodes_its_condition_once_and_to_the_same_end(td_loss: SuccessorLoss, solver: str) -> None:
    """A solver that asks for some rows only needs the condition every time."""
    batch = transitions(scalar_process(), 8)
    network = UNetMLPField(1, (8, 8), 1, 2, (8,), 8, generator=generator(5)).double()
    encoded: list[None] = []
    assert network.cond_encoder is not None
    network.cond_encoder.register_forward_hook(lambda *_: encoded.append(None))
    field = scalar_process().velocity_field(0.9)

    def loss(target: VelocityField) -> Tensor:
        encoded.clear()
        return td_loss(field, target, batch, gamma=0.9, solver=solver, steps=3, generator=generator()).bootstrap

    plain, times = loss(lambda t, x, cond: network(t, x, cond)), len(encoded)
    assert torch.equal(loss(network), plain)
    assert len(encoded) == (times if solver == "dopri5_per_sample" else 1) < 2 * times


@pytest.mark.parametrize("td_loss", ALL_LOSSES, ids=names(ALL_LOSSES))
def test_field_is_trained_here_and_the_target_asked_there(td_loss: SuccessorLoss) -> None:
    """The field sees (S, A) only; the target sees (S', pi(S')) only."""
    batch = transitions(scalar_process(), 8)
    field, target = Recorder(scalar_process().velocity_field(0.9)), Recorder(scalar_process().velocity_field(0.9))
    td_loss(field, target, batch, gamma=0.9, steps=2, generator=generator())
    assert batch.action is not None
    assert batch.next_action is not None
    here = torch.cat([batch.state, batch.action], -1)
    there = torch.cat([batch.next_state, batch.next_action], -1)
    seen, asked = ([cond for _, _, cond in calls if cond is not None] for calls in (field.calls, target.calls))
    assert len(field.calls) == 1
    assert torch.equal(seen[0], torch.cat([here, here]))
    assert all(torch.equal(cond, there) for cond in asked)
    each_step = 1 if td_loss.prediction == "noise" else 2  # DDIM, and the midpoint method
    assert len(target.calls) == 2 * each_step + (td_loss in (td2_cfm_loss, td2_dd_loss))


@pytest.mark.parametrize("td_loss", ALL_LOSSES, ids=names(ALL_LOSSES))
def test_target_is_not_differentiated(td_loss: SuccessorLoss) -> None:
    """A network that bootstraps from itself has the gradient that it has with a frozen copy as target."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(tensor(0.3, -0.2, 0.5))

        def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
            assert cond is not None
            return (torch.cat([x, cond], -1) @ self.weight)[:, None]

    batch, net, copy = transitions(scalar_process(), 64), Linear(), Linear()
    gradients = [
        torch.autograd.grad(td_loss(net, target, batch, gamma=0.9, generator=generator()).total, net.weight)[0]
        for target in (net, copy)
    ]
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


# The losses' values


@pytest.mark.parametrize("td_loss", ALL_LOSSES, ids=names(ALL_LOSSES))
@pytest.mark.parametrize("path", CURVES, ids=str)
def test_total_weighs_the_terms_and_fusing_changes_nothing(td_loss: SuccessorLoss, path: AffinePath) -> None:
    batch, oracle = transitions(scalar_process(), 64), scalar_process().velocity_field(0.9, path)
    off = Recorder(lambda t, x, cond=None, /: oracle(t, x, cond) + 0.3 * x)
    fused, apart = (
        td_loss(off, oracle, batch, gamma=0.75, path=path, fused=fused, generator=generator())
        for fused in (True, False)
    )
    assert len(off.calls) == 3
    for a, b in zip(fused, apart, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    torch.testing.assert_close(fused.total, 0.25 * fused.direct + 0.75 * fused.bootstrap, atol=1e-12, rtol=0)


@pytest.mark.parametrize("td_loss", TD_LOSSES, ids=names(TD_LOSSES))
def test_without_discount_it_is_flow_matching_on_the_next_state(td_loss: SuccessorLoss) -> None:
    batch, oracle = transitions(scalar_process(), 64), scalar_process().velocity_field(0.9)
    loss = td_loss(oracle, oracle, batch, gamma=0.0, generator=generator())
    plain = mc_cfm_loss(oracle, batch, batch.next_state, generator=generator())
    assert torch.equal(loss.total, plain.total)


def iid(n: int) -> tuple[GaussianMixture, Tensor, Transitions, float]:
    """Independent next states N(mu, Sigma) in two dimensions: m = P, and its irreducible loss."""
    covariance = tensor([0.8, 0.3], [0.3, 0.5])
    m = GaussianMixture(tensor(1.0), tensor([1.0, -2.0]), covariance[None])
    state = randn(n, 2, seed=1)
    next_state = m.sample(n, generator=generator(2))
    irreducible = math.pi / 2 * float(torch.linalg.eigvalsh(covariance).sqrt().sum())
    return m, next_state, Transitions(state, None, next_state, None), irreducible


def repeated(loss: Callable[[Transitions, torch.Generator], Loss], batch: Transitions) -> Tensor:
    """The loss on 40 slices of the batch, ``(40, 3)``: estimates with a standard error."""
    size, g = len(batch.state) // 40, generator(7)
    parts = [slice(i * size, (i + 1) * size) for i in range(40)]
    losses = [loss(Transitions(batch.state[p], None, batch.next_state[p], None), g) for p in parts]
    return torch.stack([torch.stack(list(one)) for one in losses])


def test_irreducible_losses_of_independent_next_states() -> None:
    """At the optimum: MC and TD-CFM (pi/2) tr Sigma^(1/2), TD2 (1-g) times that, td-flows 4.7."""
    m, _, batch, irreducible = iid(80_000)
    v, gamma = m.velocity_field(), 0.75
    mc = repeated(lambda b, g: mc_cfm_loss(v, b, b.next_state, generator=g), batch)
    td = repeated(lambda b, g: td_cfm_loss(v, v, b, gamma=gamma, steps=20, generator=g), batch)
    td2 = repeated(lambda b, g: td2_cfm_loss(v, v, b, gamma=gamma, generator=g), batch)
    truth = tensor(irreducible, irreducible, 0.0)
    assert z_scores(mc, truth)[:2].abs().max() < BOUND
    assert mc[:, 2].max() == 0
    assert z_scores(td, irreducible).abs().max() < BOUND
    assert z_scores(td2[:, :2], tensor((1 - gamma) * irreducible, irreducible)).abs().max() < BOUND
    assert td2[:, 2].max() < 1e-12


@pytest.mark.parametrize("error", [0.0, 0.7])
def test_gap_between_td_and_td2_is_the_same_for_every_model(error: float) -> None:
    """E l_TD - E l_TD2 = g E tr Cov(u | X_t, S') = g (pi/2) tr Sigma^(1/2), td-flows 4.7."""
    m, _, batch, irreducible = iid(80_000)
    v, gamma = m.velocity_field(), 0.75

    def model(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        assert cond is not None
        return v(t, x, cond) + error * (cond + x.sin())

    td = repeated(lambda b, g: td_cfm_loss(model, v, b, gamma=gamma, steps=20, generator=g), batch)
    td2 = repeated(lambda b, g: td2_cfm_loss(model, v, b, gamma=gamma, steps=20, generator=g), batch)
    assert abs(z_scores(td[:, 2] - td2[:, 2], irreducible)) < BOUND
    assert abs(z_scores(td[:, 0] - td2[:, 0], gamma * irreducible)) < BOUND


@pytest.mark.parametrize("gamma", [0.4, 0.8])
def test_td_gradients_vary_more_by_the_amount_of_theorem_2(gamma: float) -> None:
    """s2_TD - s2_TD2 = g^2 E tr Cov(2 phi u | X_t); here Cov(u | x_t) = tau^2 / ((1-t)^2 + t^2 tau^2)."""
    n, tau = 100_000, 0.6
    m = GaussianMixture(tensor(1.0), tensor([1.0]), tensor([[tau**2]]))
    state, next_state = randn(n, 1, seed=1), m.sample(n, generator=generator(2))
    batch, v = Transitions(state, None, next_state, None), m.velocity_field()

    def variance(td_loss: SuccessorLoss) -> tuple[float, float]:
        probe = Probe(v, n)
        field = Recorder(probe)
        loss = td_loss(field, v, batch, gamma=gamma, steps=20, generator=generator())
        total = float(probe.gradients(loss.total).var(0).sum())
        t, x, cond = (part.chunk(2)[1] for part in field.calls[0])  # type: ignore[union-attr]
        phi = torch.stack([torch.ones_like(t), t, x[:, 0], t * x[:, 0], cond[:, 0] * x[:, 0], cond[:, 0]], -1)
        conditional = tau**2 / ((1 - t) ** 2 + t**2 * tau**2)
        return total, float((4 * phi.square().sum(-1) * conditional).mean())

    (td, gap), (td2, _) = variance(td_cfm_loss), variance(td2_cfm_loss)
    assert td > td2
    assert td - td2 == pytest.approx(gamma**2 * gap, rel=0.05)


# Scale


class Plain(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, t: Time, x: Tensor, cond: Tensor) -> Tensor:
        v: Tensor = self.layer(torch.cat([as_time(t, x).expand(len(x))[:, None], x, cond], 1))
        return v


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([2, 0, 2]), torch.tensor([True, False, True, True])])
def test_rows_of_a_batch_are_those_of_all_its_parts(rows: slice | Tensor) -> None:
    windows, ended = randn(4, 4, 2), torch.tensor([[False] * 3, [True] * 3, [False] * 3, [False, True, True]])
    batch = n_step(windows, randn(4, 4, 1, seed=1), 0.9, terminal=ended, generator=generator())
    assert len(batch) == 4
    taken, numbers = batch[rows], torch.arange(4)[rows]
    assert len(taken) == len(numbers) and taken.steps == 3
    for name in ("state", "action", "next_state", "next_action", "terminal", "direct_state"):
        assert torch.equal(getattr(taken, name), torch.stack([getattr(batch, name)[i] for i in numbers]))
    plain = Transitions(batch.state, None, batch.next_state, None)[rows]
    assert plain.action is None and plain.terminal is None and plain.direct_state is None


def test_a_target_is_the_exponential_average_of_its_network() -> None:
    """After four updates the weight of the j-th network is step (1 - step)^(4 - j)."""
    networks = [nn.BatchNorm1d(2).double() for _ in range(5)]
    for i, network in enumerate(networks):
        nn.init.constant_(network.weight, i**2)
        network.running_mean = torch.full((2,), float(i), dtype=torch.float64)
    target, step = copy.deepcopy(networks[0]), 0.3
    for network in networks[1:]:
        polyak_update(target, network, step)
    shares = [(1 - step) ** 4, *(step * (1 - step) ** (4 - j) for j in range(1, 5))]
    assert target.weight.tolist()[0] == pytest.approx(sum(share * i**2 for i, share in enumerate(shares)), abs=1e-12)
    assert target.running_mean is not None and target.running_mean.tolist() == [4, 4]
    assert networks[4].weight.tolist() == [16, 16]


def on_no_device(terminal: bool = False) -> Transitions:
    """A batch without values: whatever asks for one fails."""
    states, actions = torch.empty(2, 8, 3, device="meta"), torch.empty(2, 8, 2, device="meta")
    ended = torch.empty(8, dtype=torch.bool, device="meta") if terminal else None
    return Transitions(states[0], actions[0], states[1], actions[1], terminal=ended)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("td_loss", ALL_LOSSES, ids=names(ALL_LOSSES))
def test_no_step_waits_for_the_device(td_loss: SuccessorLoss, terminal: bool) -> None:
    net = Plain(9, 3).to("meta")
    td_loss(net, net, on_no_device(terminal), gamma=0.9).total.backward()  # type: ignore[no-untyped-call]


def test_no_step_of_the_others_waits_for_the_device() -> None:
    gan, vae = HorizonGAN(3, 5, width=8).to("meta"), HorizonVAE(3, 5, width=8).to("meta")
    particles, net = Particles(8, 3, 5).to("meta"), Plain(9, 3).to("meta")
    windows = torch.empty(8, 4, 3, device="meta"), torch.empty(8, 4, 2, device="meta")
    ended = torch.empty(8, 3, dtype=torch.bool, device="meta")
    for batch in (on_no_device(terminal=True), n_step(*windows, 0.9, terminal=ended)):
        losses = [
            gan_loss(gan, gan, batch, gamma=0.9),
            vae_loss(vae, vae, batch, gamma=0.9),
            particles.td2_cfm_loss(net, net, batch, gamma=0.9),
            mc_cfm_loss(net, batch, batch.visited),
        ]
        for loss in losses:
            loss.total.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("td_loss", [td2_cfm_loss, td2_dd_loss], ids=names([td2_cfm_loss, td2_dd_loss]))
def test_step_compiles_as_one_graph(td_loss: SuccessorLoss) -> None:
    net = Plain(4, 1).double()
    batch = transitions(scalar_process(), 8)
    assert batch.action is not None
    assert batch.next_action is not None

    def step(state: Tensor, action: Tensor, next_state: Tensor, next_action: Tensor) -> Tensor:
        return td_loss(
            net, net, Transitions(state, action, next_state, next_action), gamma=0.9, steps=2, time=halves
        ).direct.detach()

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert compiled(batch.state, batch.action, batch.next_state, batch.next_action).isfinite()


# Mistakes


@pytest.mark.parametrize("td_loss", [*ALL_LOSSES, None], ids=[*names(ALL_LOSSES), "mc_cfm_loss"])
@pytest.mark.parametrize("path", [VE(), OU(horizon=1.0), VP(), OU(), Polynomial(2), CondOT(0.1)], ids=str)
def test_only_a_path_from_standard_noise_is_taken(td_loss: SuccessorLoss | None, path: AffinePath) -> None:
    """The horizon model starts in N(0, I), so a path that does not would train a field for other points."""
    batch, oracle = transitions(scalar_process(), 4), scalar_process().velocity_field(0.9)

    def call() -> Loss:
        if td_loss is None:
            return mc_cfm_loss(oracle, batch, batch.next_state, path=path, generator=generator())
        return td_loss(oracle, oracle, batch, gamma=0.9, path=path, generator=generator())

    if path in (VE(), OU(horizon=1.0)):
        with pytest.raises(ValueError, match=r"path was .*, whose weights of data and noise at t=0 are .* should be 0"):
            call()
    else:
        assert call().total.isfinite()


def bad_gamma(gamma: float) -> Callable[[], object]:
    batch, oracle = transitions(scalar_process(), 4), scalar_process().velocity_field(0.9)
    return lambda: td2_cfm_loss(oracle, oracle, batch, gamma=gamma)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad_gamma(1.0), r"gamma was 1.0, but should be in \[0, 1\)"),
        (
            lambda: mc_cfm_loss(lambda t, x, cond, /: x.mT, transitions(scalar_process(), 4), randn(4, 1, seed=0)),
            r"the result of field has shape \(1, 4\), but should be of shape \(4, 1\)",
        ),
        (lambda: transitions(scalar_process(), 4)[0], "rows is 0, but should be a slice or a tensor of one dimension"),  # type: ignore[index]
        (lambda: polyak_update(nn.Linear(1, 1), nn.Linear(1, 1), 1.5), r"step is 1.5, but should be in \[0, 1\]"),
        (bad_gamma(-0.1), r"gamma was -0.1, but should be in \[0, 1\)"),
        (
            lambda: Transitions(randn(3, 1, seed=0), None, randn(2, 1, seed=0), None),
            r"next_state had shape \(2, 1\)",
        ),
        (
            lambda: Transitions(randn(3, 1, seed=0), randn(3, 1, seed=1), randn(3, 1, seed=2), None),
            r"next_action had shape None, but should have action's shape \(3, 1\)",
        ),
        (
            lambda: td2_cfm_loss(
                scalar_process().velocity_field(0.9),
                scalar_process().velocity_field(0.9),
                transitions(scalar_process(), 4),
                gamma=0.9,
                solver="DDIM",
            ),
            "solver is 'DDIM', but should be one of euler",
        ),
        (
            lambda: mc_cfm_loss(
                scalar_process().velocity_field(0.9), transitions(scalar_process(), 4), randn(4, 2, seed=0)
            ),
            r"future had shape \(4, 2\), but should have state's shape \(4, 1\)",
        ),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
