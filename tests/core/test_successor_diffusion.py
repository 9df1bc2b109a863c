"""Laws of the diffusion losses TD-DD and TD²-DD, with the closed-form oracle as target and without training."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import Tensor

from flowmatch_core.field import Time, VelocityField, at_times
from flowmatch_core.networks import MLPField, UNetMLPField
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import VP, AffinePath, CondOT, Cosine, CustomPath, VelocityOf
from flowmatch_core.solvers import ddim, solve
from flowmatch_core.successor import (
    GeometricHorizonModel,
    NoisePrediction,
    SuccessorLoss,
    Transitions,
    td2_cfm_loss,
    td2_dd_loss,
    td_cfm_loss,
    td_dd_loss,
)
from flowmatch_core.successor.losses.bootstrap import Target
from tests.support.checks import BOUND, z_scores
from tests.support.processes import Probe, scalar_process, transitions
from tests.support.random import generator, randn, tensor

LOSSES = [td_dd_loss, td2_dd_loss]
GAMMA = 0.8


def noise_of(velocity: VelocityField, path: AffinePath) -> VelocityField:
    """The network that predicts the noise and has this velocity."""

    def network(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        return path.convert(velocity(t, x, cond), t, x, source="velocity", target="noise")

    return network


def at(time: float) -> object:
    return lambda n, **options: torch.full((n,), time, dtype=torch.float64)


def test_defaults_are_those_of_the_paper() -> None:
    for loss in LOSSES:
        defaults = {name: p.default for name, p in inspect.signature(loss).parameters.items()}
        assert (defaults["path"], defaults["steps"], defaults["solver"]) == (VP(), 20, "ddim")
        assert defaults["time"] is torch.rand
        assert loss.prediction == "noise"
    assert td2_cfm_loss.prediction == "velocity"


@pytest.mark.parametrize("td_loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(("path", "solver", "steps"), [(VP(), "ddim", 100), (Cosine(), "rk4", 10)], ids=str)
def test_noise_of_the_oracle_is_stationary(td_loss: SuccessorLoss, path: AffinePath, solver: str, steps: int) -> None:
    """E[(eps* - target) phi] = 0 with the exact noise as target: Lemma 2 and the fixed point of both methods."""
    batch, network = (
        transitions(scalar_process(), 4_000),
        noise_of(scalar_process().velocity_field(GAMMA, path, tolerance=1e-3), path),
    )
    probe = Probe(network, 4_000)
    loss = td_loss(probe, network, batch, gamma=GAMMA, path=path, solver=solver, steps=steps, generator=generator())
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() < BOUND


def test_another_discount_is_not_stationary() -> None:
    """The power of the test above."""
    batch, network = (
        transitions(scalar_process(), 4_000),
        noise_of(scalar_process().velocity_field(0.6, Cosine()), Cosine()),
    )
    probe = Probe(network, 4_000)
    loss = td2_dd_loss(probe, network, batch, gamma=GAMMA, path=Cosine(), solver="rk4", steps=10, generator=generator())
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() > 2 * BOUND


@pytest.mark.parametrize("path", [VP(), Cosine()], ids=str)
@pytest.mark.parametrize("t", [0.3, 0.9])
def test_noise_of_a_mixture_is_the_density_weighted_mean_of_the_parts(path: AffinePath, t: float) -> None:
    """Lemma 2: the score of (1-g) p + g q, hence the drift -x/2 - score of its diffusion."""
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    parts = [GaussianMixture(tensor(1.0), tensor([m]), tensor([[v]])) for m, v in ((1.0, 0.3), (-1.5, 0.8))]
    both = GaussianMixture(
        tensor(1 - GAMMA, GAMMA),
        torch.stack([part.means[0] for part in parts]),
        torch.stack([part.covariances[0] for part in parts]),
    )
    weights = torch.stack(
        [w * p.marginal_log_prob(t, x, path).exp() for w, p in zip((1 - GAMMA, GAMMA), parts, strict=True)]
    )
    weights = weights / weights.sum(0)
    mixed = sum(
        w[:, None] * noise_of(p.velocity_field(path), path)(t, x, None) for w, p in zip(weights, parts, strict=True)
    )
    torch.testing.assert_close(noise_of(both.velocity_field(path), path)(t, x, None), mixed, atol=1e-9, rtol=0)


@pytest.mark.parametrize("path", [VP(), CondOT(), Cosine()], ids=str)
def test_ddim_to_each_rows_own_time_is_ddim_to_that_time(path: AffinePath) -> None:
    """Against the sampler of `diffusion`, one time after another, and also for a network of velocities."""
    velocity = scalar_process().velocity_field(GAMMA, path)
    batch, t, x0 = transitions(scalar_process(), 5), tensor(0.0, 0.2, 0.5, 0.9, 1.0), randn(5, 1, seed=7)

    def flow(network: VelocityField, prediction: str, t: Time) -> Tensor:
        target = Target(network, batch, path, prediction, 8, "ddim", None)  # type: ignore[arg-type]
        return target.flow(x0, t)

    expected = x0.clone()
    for i in range(1, 5):
        cond = batch.next_condition[i : i + 1]
        expected[i] = ddim(velocity, x0[i : i + 1], path=path, t1=float(t[i]), cond=cond, steps=8).x[0]
    torch.testing.assert_close(flow(velocity, "velocity", t), expected, atol=1e-9, rtol=0)
    if path == VP():  # the other paths hide the data from the noise at t=0
        torch.testing.assert_close(flow(noise_of(velocity, path), "noise", t), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(flow(velocity, "velocity", 1.0)[4], expected[4], atol=1e-9, rtol=0)


@pytest.mark.parametrize("path", [VP(), Cosine(), CondOT()], ids=str)
def test_ddim_nears_the_flow_as_its_steps_shrink(path: AffinePath) -> None:
    """Also from pure noise, where the first step knows no data: the error falls with every doubling."""
    velocity = scalar_process().velocity_field(GAMMA, path)
    batch, t, x0 = (
        transitions(scalar_process(), 20),
        torch.linspace(0.1, 0.9, 20, dtype=torch.float64),
        randn(20, 1, seed=7),
    )
    exact = solve(velocity, x0, t1=t, cond=batch.next_condition, solver="rk4", steps=400).x
    errors = []
    for steps in (10, 20, 40, 80):
        target = Target(noise_of(velocity, path), batch, path, "noise", steps, "ddim", None)
        errors.append(float((target.flow(x0, t) - exact).abs().max()))
    assert all(1.5 * fine < coarse for coarse, fine in itertools.pairwise(errors))
    assert errors[-1] < 0.05


@pytest.mark.parametrize("path", [VP(), CondOT()], ids=str)
def test_network_of_the_noise_at_known_times_says_the_same_bit_by_bit(path: AffinePath) -> None:
    network = NoisePrediction(MLPField(2, (8, 8), cond_dim=1, generator=generator()), path)
    x, cond = randn(5, 2, seed=1).float(), randn(5, 1, seed=2).float()
    for t in (0.7, torch.rand(5, generator=generator())):
        times = [t * share for share in (0.0, 0.3, 1.0)]
        for time, field in zip(times, at_times(network, times, x), strict=True):
            assert torch.equal(field(time, x, cond), network(time, x, cond))


@pytest.mark.parametrize("td_loss", LOSSES)
def test_a_bootstrap_encodes_the_condition_once_whatever_its_steps(td_loss: SuccessorLoss) -> None:
    encoded: list[Tensor] = []
    network = UNetMLPField(1, (8, 8), cond_dim=2, cond_hidden=(8,), generator=generator()).double()
    assert network.cond_encoder is not None
    network.cond_encoder.register_forward_hook(lambda module, given, code: encoded.append(given[0]))
    batch, field = transitions(scalar_process(), 5), NoisePrediction(network, VP())
    loss = td_loss(field, field, batch, gamma=GAMMA, path=VP(), steps=7, generator=generator(2))
    target, both = encoded
    assert torch.equal(target, batch.next_condition) and torch.equal(both, torch.cat([batch.condition] * 2))

    plain = lambda t, x, cond: field(t, x, cond)  # noqa: E731
    anew = td_loss(plain, plain, batch, gamma=GAMMA, path=VP(), steps=7, generator=generator(2))
    assert len(encoded) > 7 and torch.allclose(loss.total, anew.total, rtol=1e-12)


def test_ddim_reads_the_path_as_often_for_many_steps_as_for_few() -> None:
    """Read at each step, it costs as much as a network."""
    read = []
    path = CustomPath(lambda t: read.append(t) or t, lambda t: 1 - t)  # type: ignore[func-returns-value]
    batch = transitions(scalar_process(), 5)
    network = NoisePrediction(lambda t, x, cond: 0 * x, path)
    for steps in (3, 30):
        read.append(None)
        Target(network, batch, path, "noise", steps, "ddim", None).flow(randn(5, 1, seed=7), tensor(0.1).expand(5))
    _, few, many = "".join("|" if t is None else "." for t in read).split("|")
    assert few == many


def test_ddim_stays_in_the_dtype_of_the_states_whatever_that_of_the_times() -> None:
    batch = transitions(scalar_process(), 5)
    states = Transitions(batch.state.float(), None, batch.next_state.float(), None)
    network = NoisePrediction(lambda t, x, cond: 0 * x, VP())
    for t in (1.0, tensor(0.1).expand(5)):
        target = Target(network, states, VP(), "noise", 4, "ddim", None)
        assert target.flow(randn(5, 1, seed=7).float(), t).dtype == torch.float32


def test_ddim_takes_a_step_at_least() -> None:
    with pytest.raises(ValueError, match="steps is 0, but should be at least 1"):
        td2_dd_loss(lambda t, x, c: x, lambda t, x, c: x, transitions(scalar_process(), 4), gamma=GAMMA, steps=0)


@pytest.mark.parametrize("td_loss", LOSSES, ids=lambda loss: loss.__name__)
def test_points_follow_the_path_of_the_successor_measure(td_loss: SuccessorLoss) -> None:
    """Next states N(mu, 1) whatever the state: on a path with alpha^2 + sigma^2 = 1 the variance stays 1."""
    mdp, seen = scalar_process(F=0.0, noise=1.0), []
    batch, network = transitions(mdp, 4_000), noise_of(mdp.velocity_field(GAMMA, VP()), VP())

    def field(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        seen.append(x.chunk(2)[1])
        return x

    td_loss(field, network, batch, gamma=GAMMA, steps=100, time=at(0.7), generator=generator())  # type: ignore[arg-type]
    mean = VP().alpha(0.7) * float(mdp.successor(tensor([0.0]), None, GAMMA).mean)
    assert abs(z_scores(seen[0], mean)) < BOUND
    assert abs(z_scores((seen[0] - mean).square(), 1.0)) < BOUND


@pytest.mark.parametrize(("noisy", "fast"), [(td_dd_loss, td_cfm_loss), (td2_dd_loss, td2_cfm_loss)], ids=["td", "td2"])
def test_errors_of_the_noise_are_those_of_the_velocity_in_other_units(
    noisy: SuccessorLoss, fast: SuccessorLoss
) -> None:
    """v = a x + b eps, so at one time the velocity's loss is b^2 times the noise's, term by term."""
    path, t, batch = VP(), 0.4, transitions(scalar_process(), 64)
    velocity = scalar_process().velocity_field(GAMMA, path)

    def off(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        return velocity(t, x, cond) + 0.3 * x

    options = {"gamma": GAMMA, "path": path, "solver": "midpoint", "steps": 10, "time": at(t)}
    of_velocity = fast(off, velocity, batch, **options, generator=generator())  # type: ignore[arg-type]
    of_noise = noisy(noise_of(off, path), noise_of(velocity, path), batch, **options, generator=generator())  # type: ignore[arg-type]
    b = path.coefficients(t, "noise", "velocity")[1]
    for a, e in zip(of_velocity, of_noise, strict=True):
        torch.testing.assert_close(a, b**2 * e, atol=0, rtol=1e-6)


@pytest.mark.parametrize("path", [VP(), Cosine()], ids=str)
def test_likelihood_through_the_probability_flow_is_the_density(path: AffinePath) -> None:
    """For VP up to the 0.0066 of the data that are left in its noise."""
    mdp, n = scalar_process(), 20
    state, action = randn(n, 1, seed=1), randn(n, 1, seed=2)
    m = mdp.successor(state, action, GAMMA)
    x = m.sample(1, generator=generator())[0]
    mean = None if path == VP() else m.mean.mean(0)
    errors = []
    for steps in (20, 80):
        field = VelocityOf(noise_of(mdp.velocity_field(GAMMA, path), path), path, "noise", mean)
        model = GeometricHorizonModel(field, (1,), GAMMA, "rk4", steps=steps)
        with torch.no_grad():
            errors.append(float((model.log_prob(x, state, action) - m.log_prob(x)).abs().max()))
    assert errors[1] < 0.04
    assert errors[1] < errors[0] + 1e-4  # VP: 20 steps are within 2e-5 of it


@pytest.mark.parametrize("path", [VP(), Cosine(), CondOT()], ids=str)
def test_network_of_the_noise_leaves_unit_targets_and_bounds_the_error_of_the_data(path: AffinePath) -> None:
    """For data of unit variance: what f should say has variance 1 and is no linear function of x at any time."""
    t, n = tensor(0.05, 0.5, 0.95).repeat_interleave(20_000), 60_000
    x0, x1 = randn(n, 1, seed=1), randn(n, 1, seed=2)
    x = path.sample(x0, x1, t).x_t
    nothing, one = (NoisePrediction(f, path)(t, x) for f in (lambda t, x, c: 0 * x, lambda t, x, c: 1 + 0 * x))
    wanted = (x0 - nothing) / (one - nothing)
    for part, points in zip(wanted.split(20_000), x.split(20_000), strict=True):
        assert abs(z_scores(part.square(), 1.0)) < BOUND
        assert abs(z_scores(part * points, 0.0)) < BOUND
    data = [path.convert(eps, t, x, source="noise", target="data") for eps in (nothing, one)]
    assert (data[1] - data[0]).abs().max() <= 1 + 1e-9  # an error of 1 in f is one of at most 1 in the data
    assert torch.equal(NoisePrediction(lambda t, x, c: 7 + 0 * x, Cosine())(0.0, x), x)


@pytest.mark.parametrize("path", [VP(), CondOT()], ids=str)
def test_divergence_of_the_network_of_the_noise_is_exact(path: AffinePath) -> None:
    """In closed form as by autograd, also through `VelocityOf`: a likelihood costs what that of a flow does."""
    inner = MLPField(2, (8, 8), cond_dim=1, generator=generator()).double()
    network, x, cond = NoisePrediction(inner, path), randn(5, 2, seed=1), randn(5, 1, seed=2)
    t = tensor(0.1, 0.3, 0.5, 0.7, 0.9)
    for field in (network, VelocityOf(network, path, "noise")):
        assert field.has_closed_form_divergence
        value, divergence = field.velocity_and_divergence(t, x, cond)
        torch.testing.assert_close(value, field(t, x, cond))
        jacobian = torch.autograd.functional.jacobian(lambda x, field=field: field(t, x, cond).sum(0), x)
        torch.testing.assert_close(divergence, jacobian.diagonal(dim1=0, dim2=2).sum(1), atol=1e-10, rtol=1e-10)  # type: ignore[no-untyped-call]


def test_terminal_rows_regress_on_the_noise_towards_their_state() -> None:
    s = randn(4, 1, seed=0)
    batch = Transitions(s, None, s + 1, None, terminal=torch.tensor([True, True, True, True]))

    def exact(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        assert isinstance(t, Tensor)
        assert cond is not None
        return (x - VP().alpha(t)[:, None] * (cond + 1)) / VP().sigma(t)[:, None]

    loss = td2_dd_loss(exact, lambda t, x, cond: x, batch, gamma=GAMMA, generator=generator())  # type: ignore[arg-type]
    assert max(float(term) for term in loss) < 1e-20
