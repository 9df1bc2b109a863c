"""Change of variables: in one step, in many residual steps, in continuous time, and inside a lower bound."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal
from torch.func import jvp

from flowmatch_core._tensors import as_time, expand_time
from flowmatch_core.divergence import divergence
from flowmatch_core.field import Time
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.paths import AffinePath
from flowmatch_core.solvers import solve
from tests.support.random import generator, randn, tensor
from tests.support.truths import mixture, on_every_path


def shear(t: Tensor) -> Tensor:
    """M(t) with x_t = M(t) x_0: a turn R of a shear S, which do not commute."""
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    stretched = torch.stack([torch.stack([(0.8 * t).exp(), t * one]), torch.stack([zero, (-0.3 * t * t).exp()])])
    return turn(t) @ stretched


def turn(t: Tensor) -> Tensor:
    c, s = torch.cos(2 * t), torch.sin(2 * t)
    return torch.stack([torch.stack([c, -s]), torch.stack([s, c])])


def linear(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """v(t, x) = M'(t) M(t)^-1 x = (R' R^T + R S' S^-1 R^T) x."""
    s = as_time(t, x).expand(len(x))
    c, d = torch.cos(2 * s), torch.sin(2 * s)
    turned = torch.stack([c * x[:, 0] + d * x[:, 1], c * x[:, 1] - d * x[:, 0]], 1)
    pulled_0 = 0.8 * turned[:, 0] + (1 - 0.8 * s) * torch.exp(0.3 * s * s) * turned[:, 1]
    pulled_1 = -0.6 * s * turned[:, 1]
    back = torch.stack([c * pulled_0 - d * pulled_1, d * pulled_0 + c * pulled_1], 1)
    return back + 2 * torch.stack([-x[:, 1], x[:, 0]], 1)


@pytest.mark.parametrize(("solver", "tolerance"), [("midpoint", 2e-3), ("rk4", 1e-6), ("dopri5", 1e-6)])
def test_time_dependent_linear_flow_is_a_known_gaussian(solver: str, tolerance: float) -> None:
    end = shear(tensor(1.0)[0])
    law, x = MultivariateNormal(torch.zeros(2).double(), end @ end.T), randn(6, 2)
    flow = ContinuousFlow(linear, (2,), solver, 60, rtol=1e-8, atol=1e-8)
    expected: Tensor = law.log_prob(x)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=tolerance)
    assert torch.linalg.slogdet(end).logabsdet.abs() > 0.1
    for t in (0.3, 1.0):
        moved = solve(linear, x, t1=t, solver="rk4", steps=60).x
        torch.testing.assert_close(moved, x @ shear(tensor(t)[0]).T, rtol=0, atol=1e-6)


@on_every_path
def test_instantaneous_change_of_variables(path: AffinePath) -> None:
    """d log p_t(x_t) / dt = -div v along the flow: the total derivative, not the partial one."""
    law, x, t = mixture(), randn(40, 2), torch.linspace(0.02, 0.95, 40, dtype=torch.float64)
    velocity, growth = divergence(law.velocity_field(path), t, x, method="exact")
    one = torch.ones_like(t)

    def log_density(t: Tensor, x: Tensor) -> Tensor:
        return law.marginal_log_prob(t, x, path)

    _, total = jvp(log_density, (t, x), (one, velocity))
    _, partial = jvp(lambda t: log_density(t, x), (t,), (one,))
    torch.testing.assert_close(total, -growth, rtol=1e-8, atol=1e-8)
    assert (partial + growth).abs().max() > 0.1


TWIST = torch.tensor([[0.9, 0.4, 0.0], [-0.6, 0.5, 0.3], [0.2, -0.7, -0.3]], dtype=torch.float64)


def curved(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    return torch.tanh(x @ TWIST.T) * (1 + expand_time(t, x)) - 0.4 * x.roll(1, -1)


def test_residual_steps_become_the_continuous_flow() -> None:
    """x_k = x_(k-1) + v / K: log p_K = log p_0 - sum log |det df_k/dx|, with an error of order 1 / K."""
    x0 = randn(6, 3)
    errors = []
    with torch.no_grad():
        end = solve(curved, x0, solver="rk4", steps=200).x
        truth = ContinuousFlow(curved, (3,), "rk4", 200).log_prob(end)
    start: Tensor = Normal(x0.new_zeros(()), 1).log_prob(x0)  # type: ignore[no-untyped-call]
    start = start.sum(1)
    for steps in (32, 64, 128):
        x, volume = x0, torch.zeros(6, dtype=torch.float64)
        for k in range(steps):

            def block(row: Tensor, t: float = k / steps, h: float = 1 / steps) -> Tensor:
                return row + h * curved(t, row[None])[0]

            volume = volume + torch.linalg.slogdet(torch.vmap(torch.func.jacrev(block))(x)).logabsdet
            x = torch.vmap(block)(x)
        torch.testing.assert_close(x, solve(curved, x0, solver="euler", steps=steps).x)
        errors.append((start - volume - truth).norm())
    assert (start - truth).abs().max() > 0.2
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.2)


def test_density_of_a_small_ball_grows_as_its_volume_shrinks() -> None:
    """log |det dpsi_t/dx| = int_0^t div v, with the Jacobian of the whole flow by autograd."""
    x = randn(4, 3)
    for t in (0.4, 1.0):

        def push(row: Tensor, t: float = t) -> Tensor:
            return solve(curved, row[None], t1=t, solver="rk4", steps=80, check=False).x[0]

        jacobian = torch.vmap(torch.func.jacrev(push))(x)
        solution = solve(curved, x, t1=t, solver="rk4", steps=80, save=True)
        assert solution.path is not None and solution.t is not None
        rates = [divergence(curved, s, point)[1] for s, point in zip(solution.t, solution.path, strict=True)]
        weights = torch.tensor([1.0, *[4.0, 2.0] * 39, 4.0, 1.0], dtype=torch.float64) * t / 240
        volume = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(torch.stack(rates, 1) @ weights, volume, rtol=0, atol=1e-5)
        assert volume.abs().max() > 0.2


def test_evidence_lower_bound_is_tight_for_the_posterior_alone() -> None:
    """log p(x) >= E_q log p(x | z) - KL(q || p(z)), with a flow as q: the KL is subtracted."""
    spread, x = 0.5, 1.3
    evidence = float(Normal(0.0, math.sqrt(1 + spread**2)).log_prob(torch.tensor(x)))  # type: ignore[no-untyped-call]
    mean, std = x / (1 + spread**2), spread / math.sqrt(1 + spread**2)

    def bound(flow: ContinuousFlow) -> Tensor:
        z = flow.rsample((4000,), generator=generator())
        joint = Normal(0.0, 1.0).log_prob(z) + Normal(z, spread).log_prob(tensor(x))  # type: ignore[no-untyped-call]
        return joint[:, 0] - flow.log_prob(z)

    def transport(std: float, mean: float) -> ContinuousFlow:
        rate = math.log(std)  # x' = rate x is the flow z -> std z; the shift is the location
        return ContinuousFlow(lambda t, x, cond: rate * x, (1,), "rk4", loc=tensor(mean), scale=tensor(1.0))

    tight, loose = bound(transport(std, mean)), bound(transport(2 * std, mean - 0.3))
    torch.testing.assert_close(tight, torch.full_like(tight, evidence), rtol=0, atol=1e-6)
    assert loose.mean() < evidence - 0.3
