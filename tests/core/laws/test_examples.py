"""The worked examples of the seeds, with their numbers."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from flowmatch_core._tensors import as_time, expand_time
from flowmatch_core.field import Time
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.objectives import cfm_loss
from flowmatch_core.paths import VE, VP, CondOT
from flowmatch_core.solvers import solve
from tests.support.random import generator, randn, tensor

# Euler's method at t = 0.1 ... 0.5 and the solution there, to the ninth digit.
EULER = [0.9, 0.852967995, 0.837441500, 0.839833779, 0.851677371]
EXACT = [0.925794646, 0.889504459, 0.876191288, 0.876283777, 0.883727921]
PRINTED = [0.900, 0.850, 0.837, 0.835, 0.851]


def slope(sign: int, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    return 2 - 2 * x - torch.exp(sign * 4 * as_time(t, x))


def test_euler_example() -> None:
    """y' = 2 - 2 y - e^(-4 t), y(0) = 1, h = 0.1."""
    one = torch.ones(1, 1, dtype=torch.float64)
    solution = solve(lambda t, x, cond: slope(-1, t, x), one, t1=0.5, solver="euler", steps=5, save=True)
    assert solution.path is not None and solution.t is not None and solution.nfe == 5
    table = solution.path[1:, 0, 0]
    assert table.tolist() == pytest.approx(EULER, abs=1e-9)
    y = [1 + (math.exp(-4 * t) - math.exp(-2 * t)) / 2 for t in solution.t[1:].tolist()]
    assert y == pytest.approx(EXACT, abs=1e-9)
    assert table.tolist() == pytest.approx(PRINTED, abs=5e-3)  # the seed's second and fourth digits are misprints
    accurate = solve(lambda t, x, cond: slope(-1, t, x), one, t1=0.5, solver="dopri5", rtol=1e-10, atol=1e-10).x
    assert float(accurate) == pytest.approx(EXACT[-1], abs=1e-8)


def test_euler_example_as_printed_is_another_equation() -> None:
    """With the e^(4 t) that the seed prints, neither its table nor its solution comes out."""
    one = torch.ones(1, 1, dtype=torch.float64)
    solution = solve(lambda t, x, cond: slope(1, t, x), one, t1=0.5, solver="euler", steps=5, save=True)
    assert solution.path is not None
    assert (solution.path[2:, 0, 0] - torch.tensor(PRINTED[1:], dtype=torch.float64)).abs().min() > 0.05


def test_constant_field_shifts_a_gaussian() -> None:
    """psi_t(x) = x + mu t, v = mu: N(0, 1) becomes N(mu t, 1) at every time."""
    mu, x = 2.5, randn(2000, 1)
    for t in (0.3, 1.0):
        moved = solve(lambda t, x, cond: torch.full_like(x, mu), x, t1=t, solver="euler", steps=1).x
        torch.testing.assert_close(moved, x + mu * t)
    log_prob = ContinuousFlow(lambda t, x, cond: torch.full_like(x, mu), (1,)).log_prob(x)
    expected: Tensor = torch.distributions.Normal(tensor(mu), 1.0).log_prob(x)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(log_prob, expected[:, 0])


MU = tensor(10.0, 0.0)


def between_gaussians(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """E[x1 - x0 | x_t = x] for x0 ~ N(-mu, I) and x1 ~ N(mu, I), independent, by Gaussian conditioning."""
    s = expand_time(t, x)
    return 2 * MU + (2 * s - 1) / (s**2 + (1 - s) ** 2) * (x - (2 * s - 1) * MU)


def test_two_gaussians_learn_their_marginal_field_and_flow() -> None:
    """The seed's mu = 10: conditional paths cross, marginal ones do not; the flow carries x0 to x0 + 2 mu."""
    n, g = 100_000, generator()
    x0, x1 = torch.randn(2, n, 2, generator=g, dtype=torch.float64)
    x0, x1, t = x0 - MU, x1 + MU, torch.rand(n, generator=g, dtype=torch.float64)
    x_t = CondOT().sample(x0, x1, t).x_t
    theta = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)

    def basis(t: Time, x: Tensor) -> Tensor:
        s = expand_time(t, x)
        return torch.cat([x - (2 * s - 1) * MU, (2 * s - 1) * (x - (2 * s - 1) * MU), s], 1)[:, :4]

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return between_gaussians(t, x) + basis(t, x) @ theta

    (at_truth,) = torch.autograd.grad(cfm_loss(field, CondOT(), x1, x0, time=t), theta)
    residual = (between_gaussians(t, x_t) - (x1 - x0))[:, None, :] * basis(t, x_t)[:, :, None]
    error = residual.std(0) / math.sqrt(n)
    assert (at_truth.abs() < 4.5 * error).all()
    assert residual.abs().mean() > 0.1
    start = randn(50, 2) - MU
    end = solve(between_gaussians, start, solver="rk4", steps=100).x
    torch.testing.assert_close(end, start + 2 * MU, rtol=0, atol=1e-5)
    halfway = solve(between_gaussians, start, t1=0.5, solver="rk4", steps=100).x
    torch.testing.assert_close(halfway, (start + MU) / math.sqrt(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_optimal_transport_example(sigma_min: float) -> None:
    """u(x | x1) = (x1 - (1 - sigma_min) x) / (1 - (1 - sigma_min) t), and (x1 - x) / (1 - t) without it."""
    path, x, x1 = CondOT(sigma_min), randn(20, 2), randn(20, 2, seed=1)
    t = torch.linspace(0, 0.95, 20, dtype=torch.float64)
    s = t[:, None]
    expected = (x1 - (1 - sigma_min) * x) / (1 - (1 - sigma_min) * s)
    torch.testing.assert_close(path.conditional_velocity(t, x, x1), expected)
    sample = path.sample(x, x1, t)
    torch.testing.assert_close(sample.x_t, s * x1 + (1 - (1 - sigma_min) * s) * x)
    torch.testing.assert_close(sample.velocity, x1 - (1 - sigma_min) * x)


def test_diffusion_examples() -> None:
    """VE: u = -(sigma'_s / sigma_s) (x - x1); VP: alpha_s = exp(-1/2 int_0^s beta); both at s = 1 - t."""
    x, x1, t = randn(20, 2), randn(20, 2, seed=1), torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    s = (1 - t)[:, None]
    ratio = math.log(8.0 / 0.05)  # of sigma_s = 0.05 (8 / 0.05)^s
    torch.testing.assert_close(VE(0.05, 8.0).conditional_velocity(t, x, x1), -ratio * (x - x1))
    integral = torch.tensor([quad(lambda r: 0.1 + 19.9 * r, 0, float(u))[0] for u in 1 - t], dtype=torch.float64)[
        :, None
    ]
    alpha, beta = torch.exp(-integral / 2), 0.1 + 19.9 * s
    sigma = (1 - alpha**2).sqrt()
    d_alpha, d_sigma = beta * alpha / 2, -beta * alpha**2 / (2 * sigma)
    expected = d_sigma / sigma * (x - alpha * x1) + d_alpha * x1
    torch.testing.assert_close(VP(0.1, 20.0).conditional_velocity(t, x, x1), expected)


def test_time_reversed_seeds_train_the_negated_field() -> None:
    """Where t = 1 is noise, x_t = (1 - t) x0 + t z and the target is z - x0: our field at 1 - t, negated."""
    data, z, s = randn(64, 2), randn(64, 2, seed=1), torch.rand(64, generator=generator()).double()

    def ours(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.sin(x) * (1 + expand_time(t, x))

    def theirs(t: Tensor, x: Tensor) -> Tensor:
        return -ours(1 - t, x)

    seed_loss = (theirs(s, (1 - s[:, None]) * data + s[:, None] * z) - (z - data)).square().mean()
    torch.testing.assert_close(cfm_loss(ours, CondOT(), data, z, time=1 - s), seed_loss)
    start = randn(8, 2)
    theirs_backward = solve(lambda t, x, cond: theirs(as_time(t, x), x), start, t0=1.0, t1=0.0, solver="rk4", steps=9)
    torch.testing.assert_close(theirs_backward.x, solve(ours, start, solver="rk4", steps=9).x)
