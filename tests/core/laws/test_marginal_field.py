"""The marginal field: what the conditional ones average to, what it generates, what a loss regresses on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.utils import parameters_to_vector

from flowmatch_core._tensors import expand_time
from flowmatch_core.divergence import divergence
from flowmatch_core.field import Time
from flowmatch_core.networks import MLPField
from flowmatch_core.objectives import cfm_loss
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import AffinePath, CondOT
from flowmatch_core.solvers import solve
from tests.support.random import generator, randn, tensor
from tests.support.truths import gaussian, mixture, on_every_path, two_normals

TIMES = [0.05, 0.3, 0.7, 0.95]


def gradient(loss: Tensor, field: MLPField) -> Tensor:
    return parameters_to_vector(torch.autograd.grad(loss, list(field.parameters())))


def lattice(coupled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Whole-numbered noise and data and dyadic times: many pairs meet in exactly the same point."""
    side = torch.arange(-2.0, 3.0, dtype=torch.float64)
    noise, data = torch.cartesian_prod(side, side), 4 * torch.cartesian_prod(side[1:4], side[2:4])
    i, j, k = torch.cartesian_prod(torch.arange(len(noise)), torch.arange(len(data)), torch.arange(3)).T
    chosen = (i + j) % 3 == 0 if coupled else torch.ones_like(i, dtype=torch.bool)
    return noise[i[chosen]], data[j[chosen]], ((k + 1) / 4).double()[chosen]


@pytest.mark.parametrize("coupled", [False, True])
def test_both_losses_have_one_gradient_and_differ_by_a_constant(coupled: bool) -> None:
    """Every expectation is a finite sum, so the theorem holds to rounding, whatever the coupling."""
    x0, x1, t = lattice(coupled)
    sample = CondOT().sample(x0, x1, t)
    meeting, index, counts = torch.unique(
        torch.cat([sample.x_t, t[:, None]], 1), dim=0, return_inverse=True, return_counts=True
    )
    assert counts.max() > 3
    total = torch.zeros(len(meeting), 2, dtype=torch.float64).index_add_(0, index, sample.velocity)
    marginal = (total / counts[:, None])[index]
    spread = (sample.velocity - marginal).square().mean()
    assert spread > 0.1
    for seed in range(3):
        field = MLPField(2, (16, 16), generator=generator(seed)).double()
        conditional_loss = cfm_loss(field, CondOT(), x1, x0, time=t)
        marginal_loss = (field(t, sample.x_t) - marginal).square().mean()
        torch.testing.assert_close(conditional_loss - marginal_loss, spread, rtol=1e-12, atol=0)
        expected = gradient(marginal_loss, field)
        assert expected.norm() > 1e-3
        torch.testing.assert_close(gradient(conditional_loss, field), expected, rtol=1e-10, atol=1e-14)


@on_every_path
def test_both_losses_have_one_gradient_on_a_mixture(path: AffinePath) -> None:
    """On batches whose marginal field is known, up to a noise whose size the batches themselves tell."""
    field = MLPField(2, (16, 16), generator=generator(1)).double()
    differences, expected = [], []
    for seed in range(40):
        g = generator(seed)
        x1 = mixture().sample(2000, generator=g)
        x0, t = torch.randn(x1.shape, generator=g, dtype=torch.float64), torch.rand(2000, generator=g).double()
        x_t = path.sample(x0, x1, t).x_t
        marginal = (field(t, x_t) - mixture().velocity(t, x_t, path)).square().mean()
        expected.append(gradient(marginal, field))
        differences.append(gradient(cfm_loss(field, path, x1, x0, time=t), field) - expected[-1])
    noise = torch.stack(differences)
    mean, error = noise.mean(0), noise.std(0) / math.sqrt(len(noise))
    z = mean / error
    assert z.abs().max() < 5.5
    assert z.square().mean() < 1.5
    truth = torch.stack(expected).mean(0)
    assert truth.norm() > 10 * error.norm()


@pytest.mark.parametrize("t", TIMES)
@on_every_path
def test_it_is_the_posterior_average_of_the_conditional_fields(path: AffinePath, t: float) -> None:
    r"""u_t(x) = int u_t(x | x1) p_t(x | x1) q(x1) dx1 / p_t(x), the integral by the trapezoid rule."""
    x, x1 = torch.linspace(-3, 3, 13, dtype=torch.float64), torch.linspace(-8, 8, 8001, dtype=torch.float64)
    here, there = (v.reshape(-1, 1) for v in torch.broadcast_tensors(x[:, None], x1[None, :]))
    conditional = path.conditional_velocity(t, here, there).reshape(13, -1)
    kernel = torch.distributions.Normal(path.alpha(t) * x1, path.sigma(t)).log_prob(x[:, None])  # type: ignore[no-untyped-call]
    weight = (kernel + two_normals().log_prob(x1[:, None])).exp()
    average = (weight * conditional).sum(1) / weight.sum(1)
    torch.testing.assert_close(average, two_normals().velocity(t, x[:, None], path)[:, 0], rtol=1e-8, atol=1e-8)
    step = float(x1[1] - x1[0])
    torch.testing.assert_close(
        weight.sum(1) * step, two_normals().marginal_log_prob(t, x[:, None], path).exp(), rtol=1e-8, atol=1e-12
    )


@pytest.mark.parametrize("law", [gaussian, mixture], ids=["gaussian", "mixture"])
@on_every_path
def test_continuity_equation(path: AffinePath, law: type[GaussianMixture]) -> None:
    """dp/dt + div(p u) = 0, every derivative by autograd."""
    truth, x = law(), randn(30, 2)  # type: ignore[call-arg]
    times = torch.linspace(0.02, 0.98, 30, dtype=torch.float64)

    def density(t: Tensor) -> Tensor:
        return truth.marginal_log_prob(t, x, path).exp()

    def flux(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return truth.marginal_log_prob(t, x, path).exp()[:, None] * truth.velocity(t, x, path)

    _, in_time = jvp(density, (times,), (torch.ones_like(times),))
    _, outflow = divergence(flux, times, x, method="exact")
    assert in_time.abs().max() > 0.01
    torch.testing.assert_close(in_time, -outflow, rtol=1e-8, atol=1e-10)


@on_every_path
def test_continuity_equation_of_the_conditional_path(path: AffinePath) -> None:
    x, x1, times = randn(30, 2), randn(30, 2, seed=1), torch.linspace(0.02, 0.9, 30, dtype=torch.float64)

    def log_density(t: Tensor, x: Tensor) -> Tensor:
        alpha, sigma = (expand_time(v, x) for v in (path.alpha(t), path.sigma(t)))
        return (-((x - alpha * x1) / sigma).square() / 2 - sigma.log()).sum(1)

    def conditional(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return path.conditional_velocity(t, x, x1)

    velocity, growth = divergence(conditional, times, x, method="exact")
    _, along = jvp(log_density, (times, x), (torch.ones_like(times), velocity))
    torch.testing.assert_close(along, -growth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", TIMES)
@on_every_path
def test_continuity_equation_in_its_weak_form(path: AffinePath, t: float) -> None:
    """d/dt E f(X_t) = E f'(X_t) X_t' = E f'(X_t) u_t(X_t), by Gauss-Hermite quadrature over both ends."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(80))
    weights = weights / weights.sum()
    law = two_normals()
    ends = (law.means + law.covariances[:, 0].sqrt() * nodes).reshape(-1)
    mass = (law.weights[:, None] * weights).reshape(-1)
    x0, x1 = (v.reshape(-1, 1) for v in torch.broadcast_tensors(nodes[:, None], ends[None, :]))
    joint = (weights[:, None] * mass).reshape(-1)

    def expectation(t: Tensor) -> Tensor:
        x = path.sample(x0, x1, t).x_t[:, 0]
        return joint @ (torch.sin(2 * x) + x.square())

    _, in_time = jvp(expectation, (tensor(t)[0],), (tensor(1.0)[0],))
    sample = path.sample(x0, x1, t)
    slope = (2 * torch.cos(2 * sample.x_t) + 2 * sample.x_t)[:, 0]
    along_pairs = joint @ (slope * sample.velocity[:, 0])
    along_field = joint @ (slope * law.velocity(t, sample.x_t, path)[:, 0])
    assert in_time.abs() > 1e-3
    torch.testing.assert_close(along_pairs, in_time, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(along_field, in_time, rtol=1e-6, atol=1e-6)


@on_every_path
def test_its_flow_generates_the_marginals_at_every_time(path: AffinePath) -> None:
    """On the line the flow keeps quantiles: F_t(psi_t(z)) = F_0(z)."""
    law, z = two_normals(), torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)[:, None]

    def distribution_function(t: float, x: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        spread = (alpha.square() * law.covariances[:, 0, 0] + sigma.square()).sqrt()
        return torch.special.ndtr((x - alpha * law.means[:, 0]) / spread) @ law.weights

    start = path.sigma(0.0) * z
    solution = solve(law.velocity_field(path), start, t1=0.95, solver="rk4", steps=200, save=True)
    assert solution.path is not None and solution.t is not None
    for t, x in itertools.islice(zip(solution.t.tolist(), solution.path, strict=True), 0, None, 40):
        expected = distribution_function(0.0, start)
        torch.testing.assert_close(distribution_function(t, x), expected, rtol=0, atol=2e-6)
