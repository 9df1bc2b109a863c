"""Laws of maximum likelihood, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowmatch_core._tensors import as_time
from flowmatch_core.field import Field, Time
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.networks import FiLMField, MLPField
from flowmatch_core.objectives.likelihood import GradientMethod, nll_loss
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.solvers import SolverError, Warped
from tests.support.checks import close
from tests.support.random import generator, randn

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


@pytest.mark.parametrize("solver", ["midpoint", "rk4", "adams"])
def test_backprop_is_the_log_prob_of_the_flow_at_times_of_its_own(solver: str) -> None:
    field, x, cond = network(), randn(6, 2), randn(6, 1)
    truth = -ContinuousFlow(field, (2,), "rk4", 200).log_prob(x, cond).mean()
    fine = nll_loss(field, x, cond, solver=solver, steps=200, grid=Warped(0.5), generator=generator())
    close(fine, truth, 1e-4 if solver == "midpoint" else 1e-6)
    with torch.no_grad():
        few = [
            float(nll_loss(field, x, cond, solver=solver, steps=5, generator=generator(seed))) for seed in (0, 0, 1, 2)
        ]
    assert few[0] == few[1] and len(set(few)) == 3
    assert all(abs(value - float(truth.detach())) < 0.05 for value in few)


@pytest.mark.parametrize("solver", ["rk4", "adams"])
@pytest.mark.parametrize("kind", [MLPField, FiLMField])
def test_the_loss_of_a_recipe_is_the_weighted_log_prob_of_its_flow(
    kind: type[MLPField | FiLMField], solver: str
) -> None:
    """Networks with a closed form of the divergence, on the warped grid, with conditions and weights."""
    field = kind(3, hidden=(16, 16), cond_dim=2, generator=generator()).double()
    x, cond, weight = randn(8, 3), randn(8, 2), torch.rand(8, generator=generator(1), dtype=torch.float64)
    assert field.has_closed_form_divergence
    flow = ContinuousFlow(field, (3,), solver, 96, grid=Warped(0.85))
    loss = nll_loss(field, x, cond, weight=weight, solver=solver, steps=96, grid=Warped(0.85), generator=generator())
    close(loss, -(weight * flow.log_prob(x, cond)).mean(), 1e-5)


@pytest.mark.parametrize("solver", ["rk4", "adams"])
@pytest.mark.parametrize("kind", [MLPField, FiLMField])
def test_the_gradient_through_the_solver_is_that_of_finite_differences(
    kind: type[MLPField | FiLMField], solver: str
) -> None:
    """Exact for the computed value, however few the steps."""
    field = kind(3, hidden=(16, 16), cond_dim=2, generator=generator()).double()
    x, cond, weight = randn(8, 3), randn(8, 2), torch.rand(8, generator=generator(1), dtype=torch.float64)

    def loss() -> Tensor:
        options = {"weight": weight, "solver": solver, "steps": 8, "grid": Warped(0.85), "generator": generator()}
        return nll_loss(field, x, cond, **options)  # type: ignore[arg-type]

    parameters = list(field.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = randn(*parameter.shape, seed=5)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(float(loss()))
                parameter.sub_(direction, alpha=step)
        found = float((gradient * direction).sum())
        assert found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-7)


class Hidden(Field):
    """v = a cos(2 pi 16 t) x, which moves nothing in all; its divergence is 2 a at every multiple of 1 / 16."""

    has_closed_form_divergence = True

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.velocity_and_divergence(t, x, cond)[0]

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rate = self.a * torch.cos(32 * math.pi * as_time(t, x))
        return rate * x, (2 * rate).expand(len(x))


def test_divergence_between_the_steps_is_not_learned() -> None:
    """P1 in closed form: a quadrature at the ends of the steps falls below every bound, and the truth never changes."""
    field, g = Hidden(), generator()
    x = randn(64, 2, dtype=torch.float32)
    truth = nll_loss(lambda t, x, cond: 0 * x, x).detach()
    optimizer = torch.optim.Adam(field.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        nll_loss(field, x, generator=g).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    claimed = torch.stack([nll_loss(field, x, generator=g).detach() for _ in range(40)]).mean()
    assert float((claimed - truth).abs()) < 0.1


def moons(n: int, g: torch.Generator) -> Tensor:
    angle, second = math.pi * torch.rand(n, generator=g), torch.rand(n, generator=g) < 0.5
    across = torch.where(second, 1 - angle.cos(), angle.cos())
    along = torch.where(second, 0.5 - angle.sin(), angle.sin())
    return torch.stack([across, along], 1) + 0.1 * torch.randn(n, 2, generator=g)


Loss = Callable[[MLPField, Tensor, torch.Generator], Tensor]
DEFAULTS: dict[str, Loss] = {
    "nll_loss": lambda field, x, g: nll_loss(field, x, generator=g),
    "nll_loss-warped": lambda field, x, g: nll_loss(field, x, grid=Warped(), generator=g),
    "nll_loss-hutchinson": lambda field, x, g: nll_loss(field, x, divergence="hutchinson", generator=g),
    "log_prob": lambda field, x, g: -ContinuousFlow(field, (2,), check=False).log_prob(x).mean(),
    "log_prob-rk4": lambda field, x, g: -ContinuousFlow(field, (2,), "rk4", 16, check=False).log_prob(x).mean(),
}


def claimed_and_true(
    loss: Loss, steps: int, batch: int, hidden: int, rate: float, speed: float = 1.0
) -> tuple[float, float]:
    """Train by a loss; return its value on new data, and the one by a tight solve."""
    g = generator()
    field = MLPField(2, (hidden, hidden), generator=g)
    field.embedding.omega.mul_(speed)
    optimizer = torch.optim.Adam(field.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(field, moons(batch, g), g).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    x = moons(500, g)
    claimed = float(torch.stack([loss(field, x, g).detach() for _ in range(8)]).mean())
    with torch.no_grad():
        flow = ContinuousFlow(field.double(), (2,), "rk4", 16)
        return claimed, float(-flow.estimate(x.double(), reference="dopri5").log_prob.mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULTS)
def test_training_by_a_default_keeps_the_likelihood_true(name: str) -> None:
    steps = 500 if name == "nll_loss" else 150
    claimed, truth = claimed_and_true(DEFAULTS[name], steps, batch=128, hidden=64, rate=1e-3)
    assert claimed == pytest.approx(truth, abs=0.1) and truth < 2


@pytest.mark.parametrize(("name", "speed"), [("nll_loss", 1), ("nll_loss", 4), ("log_prob", 1)])
def test_short_training_by_a_default_keeps_the_likelihood_true(name: str, speed: float) -> None:
    """Also with features of time that make thirty turns where the solver takes sixteen steps."""
    claimed, truth = claimed_and_true(DEFAULTS[name], steps=40, batch=32, hidden=16, rate=2e-2, speed=speed)
    assert claimed == pytest.approx(truth, abs=0.1) and truth < 2.5


@pytest.mark.slow
def test_training_on_the_reverse_divergence_keeps_it_true() -> None:
    """P2: the divergence that rsample_and_log_prob claims is that of tight solves, and is not negative."""
    g, field = generator(), MLPField(2, (32, 32), generator=generator())
    flow, target = ContinuousFlow(field, (2,), check=False), gaussian_mixture()
    optimizer = torch.optim.Adam(field.parameters(), 1e-2)

    def divergence_to_target(flow: ContinuousFlow, n: int) -> Tensor:
        x, log_prob = flow.rsample_and_log_prob((n,), generator=g)
        return (log_prob - target.log_prob(x)).mean()

    for _ in range(150):
        optimizer.zero_grad()
        divergence_to_target(flow, 128).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        x, log_prob = flow.rsample_and_log_prob((1000,), generator=g)
        field.double()
        tight = flow.estimate(x.double(), reference="dopri5")
        assert float((tight.log_prob - log_prob).abs().mean()) < 0.1
        divergence = float((log_prob - target.log_prob(x)).mean())
        assert 0 < divergence < 1


def gaussian_mixture() -> GaussianMixture:
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.5]])
    return GaussianMixture(torch.ones(3) / 3, means, 0.16 * torch.eye(2).expand(3, 2, 2))


@each_method
def test_weights_are_linear(method: GradientMethod) -> None:
    field, x = network(0), randn(4, 2)

    def loss(weight: Tensor | None) -> Tensor:
        return nll_loss(field, x, weight=weight, method=method, generator=generator(), **TIGHT)  # type: ignore[arg-type]

    rows = torch.stack([loss(row) for row in 4 * torch.eye(4, dtype=torch.float64)])
    weight = torch.tensor([0.5, 0.0, 3.0, 1.0], dtype=torch.float64)
    close(loss(weight), (weight * rows).mean(), 1e-8)
    close(loss(None), rows.mean(), 1e-8)


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
    outside = nll_loss(field, x, method=method, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        inside = nll_loss(field, x, method=method, generator=generator())
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


def test_randomness_comes_from_the_generator_alone() -> None:
    field, x, state = network(0), randn(6, 2), torch.get_rng_state()
    for method in ("backprop", "adjoint"):
        values = [
            nll_loss(field, x, method=method, divergence="hutchinson", generator=generator(seed)) for seed in (0, 0, 1)
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
