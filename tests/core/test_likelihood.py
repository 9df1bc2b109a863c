"""Laws of maximum likelihood, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from flowmatch_core.field import Time
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.networks import MLPField
from flowmatch_core.objectives.likelihood import GradientMethod, nll_loss
from flowmatch_core.solvers import SolverError, Warped
from tests.support.random import randn

TIGHT = {"rtol": 1e-9, "atol": 1e-9, "steps": 64}
each_method = pytest.mark.parametrize("method", ["backprop", "adjoint"])


def network(cond_dim: int = 1, hidden: tuple[int, ...] = (8, 8)) -> MLPField:
    field = MLPField(2, hidden, cond_dim, frequencies=1, generator=torch.Generator().manual_seed(3)).double()
    field.last.weight.data *= 10
    return field


class Scale(nn.Module):
    """v = a x + b, whose flow of N(0, s^2) is N(b (e^a - 1) / a, s^2 e^2a)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(-0.5, dtype=torch.float64))

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.a * x + self.b

    def law(self, base_scale: float) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.b * torch.expm1(self.a) / self.a, base_scale * self.a.exp())


@each_method
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("base_scale", [1.0, 3.0])
def test_value_and_gradient_are_those_of_the_gaussian(
    method: GradientMethod, divergence: str, base_scale: float
) -> None:
    field, x = Scale(), randn(20, 3, 2).requires_grad_()
    loss = nll_loss(field, x, method=method, divergence=divergence, base_scale=base_scale, **TIGHT)  # type: ignore[arg-type]
    log_prob: Tensor = field.law(base_scale).log_prob(x)  # type: ignore[no-untyped-call]
    truth = -log_prob.sum((1, 2)).mean()
    torch.testing.assert_close(loss, truth, rtol=1e-6, atol=1e-6)
    leaves = (field.a, field.b, x)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hidden", [(8, 8), (8, 8, 8)])
@pytest.mark.parametrize("divergence", ["auto", "hutchinson"])
def test_adjoint_and_backprop_agree(hidden: tuple[int, ...], divergence: str) -> None:
    field, x, cond = network(hidden=hidden), randn(6, 2), randn(6, 1, seed=1).requires_grad_()
    leaves = (cond, *field.parameters())
    losses, gradients = [], []
    for method in ("backprop", "adjoint"):
        g = torch.Generator().manual_seed(0)
        loss = nll_loss(field, x, cond, method=method, divergence=divergence, probes=2, generator=g, **TIGHT)  # type: ignore[arg-type]
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert ours.abs().max() > 1e-4


@pytest.mark.parametrize("solver", ["midpoint", "adams"])
def test_backprop_is_the_log_prob_of_the_flow(solver: str) -> None:
    field, x, cond = network(), randn(6, 2), randn(6, 1)
    flow = ContinuousFlow(field, (2,), solver, 7, grid=Warped(0.5))
    loss = nll_loss(field, x, cond, solver=solver, steps=7, grid=Warped(0.5))
    torch.testing.assert_close(loss, -flow.log_prob(x, cond).mean())


@each_method
@torch.no_grad()
def test_stiff_row_is_not_diluted(method: GradientMethod) -> None:
    """A row of its own speed among 500 at rest: the mean differs by its part."""
    cond = torch.zeros(501, 1, dtype=torch.float64)
    cond[0] = 8.0

    class Stiffness(nn.Module):
        def forward(self, t: Time, x: Tensor, cond: Tensor) -> Tensor:
            return torch.tanh(cond * x)

    field = Stiffness()
    x = torch.full((501, 1), 0.1, dtype=torch.float64)
    alone, rest = (nll_loss(field, x[s], cond[s], **TIGHT) for s in (slice(1), slice(1, None)))  # type: ignore[arg-type]
    loss = nll_loss(field, x, cond, method=method, rtol=1e-5, atol=1e-5, steps=64)
    assert float(501 * loss - 500 * rest) == pytest.approx(float(alone), abs=5e-3)


@each_method
@pytest.mark.slow
def test_training_by_it_finds_the_law(method: GradientMethod) -> None:
    """Data from N(2, 0.25): the affine field that makes it is found by gradient descent alone."""
    field, g = Scale(), torch.Generator().manual_seed(0)
    data = 2 + 0.5 * torch.randn(500, 1, generator=g, dtype=torch.float64)
    optimizer = torch.optim.Adam(field.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        nll_loss(field, data, method=method, steps=4, rtol=1e-4, atol=1e-4).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    law = field.law(1.0)
    assert float(law.mean.detach()) == pytest.approx(float(data.mean()), abs=1e-2)
    assert float(law.stddev.detach()) == pytest.approx(float(data.std()), abs=1e-2)


@each_method
def test_autocast_is_off_inside(method: GradientMethod) -> None:
    field, x = network(0).float(), randn(6, 2).float()
    outside = nll_loss(field, x, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nll_loss(field, x, method=method)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


def test_randomness_comes_from_the_generator_alone() -> None:
    field, x, state = network(0), randn(6, 2), torch.get_rng_state()
    for method in ("backprop", "adjoint"):
        values = [
            nll_loss(field, x, method=method, divergence="hutchinson", generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
            for seed in (0, 0, 1)
        ]
        assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert torch.equal(state, torch.get_rng_state())


def test_backprop_leaves_failures_to_the_caller() -> None:
    """A training step does not wait for the device to look at values."""
    assert nll_loss(lambda t, x, cond: x * math.nan, randn(3, 2)).isnan()


def test_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="method is 'ad'"):
        nll_loss(network(0), randn(3, 2), method="ad")  # type: ignore[arg-type]


def test_adjoint_wants_a_module_whose_parameters_it_can_know() -> None:
    with pytest.raises(
        ValueError, match=r"field is a function, but should be a torch\.nn\.Module for method 'adjoint'"
    ):
        nll_loss(lambda t, x, cond: x, torch.zeros(2, 2), method="adjoint")


class Jagged(torch.nn.Module):
    """A field that no tolerance is met on."""

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None) -> Tensor:
        return 1e6 * torch.sin(1e6 * x)


class Undefined(torch.nn.Module):
    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None) -> Tensor:
        return x * math.nan


@pytest.mark.parametrize("field", [Jagged(), Undefined()], ids=["jagged", "nan"])
def test_adjoint_gives_up_with_an_error(field: torch.nn.Module) -> None:
    with pytest.raises(SolverError, match="'dopri5' gave up"):
        nll_loss(field, torch.randn(2, 1), method="adjoint", max_steps=50)


@each_method
def test_no_rows_have_no_mean(method: GradientMethod) -> None:
    with pytest.raises(ValueError, match="x1 has no rows"):
        nll_loss(Undefined(), torch.zeros(0, 2), method=method)
