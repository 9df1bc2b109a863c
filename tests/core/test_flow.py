"""Laws of the flow as a distribution, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal

from flowmatch_core import _density
from flowmatch_core import flow as flow_module
from flowmatch_core._density import simpson_weights
from flowmatch_core._tensors import expand_time
from flowmatch_core.divergence import DivergenceMethod, rademacher
from flowmatch_core.field import Field, Time
from flowmatch_core.flow import ContinuousFlow, LogDensity
from flowmatch_core.networks import MLPField
from flowmatch_core.solvers import EDM, SOLVERS, Nodes, Power, SolverError, TimeGrid, Uniform, Warped, solve
from flowmatch_core.solvers.adaptive import ADAPTIVE
from tests.support.checks import close
from tests.support.random import randn

MATRIX = torch.tensor([[0.3, 0.8], [-0.5, -0.4]], dtype=torch.float64)
SHIFT = torch.tensor([0.5, -1.0], dtype=torch.float64)


def linear(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    return x @ MATRIX.T + SHIFT


def linear_law() -> MultivariateNormal:
    """The law of the linear flow: x1 = e^A x0 + int_0^1 e^(A s) ds b."""
    push = torch.linalg.matrix_exp(MATRIX)
    mean = torch.linalg.solve(MATRIX, (push - torch.eye(2, dtype=torch.float64)) @ SHIFT)
    return MultivariateNormal(mean, push @ push.T)


def exact(law: Distribution, x: Tensor) -> Tensor:
    result: Tensor = law.log_prob(x)
    return result


def network(dim: int = 2, cond_dim: int = 0, hidden: tuple[int, ...] = (16, 16)) -> MLPField:
    field = MLPField(dim, hidden, cond_dim, generator=torch.Generator().manual_seed(3)).double()
    field.last.weight.data *= 20
    field.from_time.weight.data[:, 3:9] = 0  # slow in time, so that few steps are enough
    field.from_time.weight.data[:, 11:] = 0
    return field


def image_field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """A field on (batch, 1, 4, 4) that mixes neighbours."""
    return torch.tanh(x.roll(1, -1) - 0.5 * x) * (1 - 0.3 * expand_time(t, x))


@pytest.mark.parametrize(
    ("solver", "steps", "tolerance"),
    [
        ("euler", 800, 1e-2),
        ("midpoint", 100, 1e-4),
        ("heun", 100, 1e-4),
        ("rk4", 20, 1e-6),
        ("adams3", 40, 1e-5),
        ("adams", 20, 1e-7),
        ("dopri5", 20, 1e-4),
        ("dopri5_per_sample", 20, 1e-4),
    ],
)
@pytest.mark.parametrize("standardised", [False, True])
def test_linear_flow_is_a_known_gaussian(solver: str, steps: int, tolerance: float, standardised: bool) -> None:
    law, x = linear_law(), randn(50, 2)
    loc, scale = torch.tensor([3.0, -40.0]).double(), torch.tensor([0.01, 7.0]).double()
    if standardised:
        flow = ContinuousFlow(linear, (2,), solver, steps, loc=loc, scale=scale)
        x, truth = x * scale + loc, exact(law, x) - scale.log().sum()
    else:
        flow, truth = ContinuousFlow(linear, (2,), solver, steps), exact(law, x)
    close(flow.log_prob(x), truth, tolerance)


def test_scalar_scale_counts_once_per_dimension() -> None:
    x, scale = randn(5, 2), torch.tensor(3.0).double()
    flow = ContinuousFlow(linear, (2,), "rk4", scale=scale)
    close(flow.log_prob(3 * x), exact(linear_law(), x) - 2 * math.log(3), 1e-6)


def test_samples_follow_the_law() -> None:
    n, g = 200_000, torch.Generator().manual_seed(0)
    loc, scale = torch.tensor([3.0, -4.0]).double(), torch.tensor([0.1, 7.0]).double()
    law = linear_law()
    x = (ContinuousFlow(linear, (2,), "rk4", 10, loc=loc, scale=scale).sample((n,), generator=g) - loc) / scale
    assert ((x.mean(0) - law.mean).abs() < 5 * law.stddev / math.sqrt(n)).all()
    close(x.T.cov(), law.covariance_matrix, 0.03)


@pytest.mark.parametrize("solver", ["rk4", "adams"])
def test_density_integrates_to_one(solver: str) -> None:
    flow = ContinuousFlow(network(), (2,), solver, 16, loc=SHIFT, scale=torch.tensor([0.5, 2.0]).double())
    side = torch.linspace(-12, 12, 241, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side) * torch.tensor([0.5, 2.0]) + SHIFT
    with torch.no_grad():
        density = flow.log_prob(grid).exp()
    assert float(density.sum()) * 0.1**2 == pytest.approx(1, abs=1e-4)
    gaussian = exact(Normal(grid.new_zeros(2), 1), grid).sum(1).exp()
    assert (density - gaussian).abs().max() > 0.01


@pytest.mark.parametrize("event", [(2,), (1, 4, 4)])
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_log_prob_of_a_sample_is_that_of_its_noise_less_the_volume(event: tuple[int, ...], solver: str) -> None:
    """The change of variables by the autograd Jacobian of the whole sampler."""
    field = network() if event == (2,) else image_field
    like = randn(1, *event).squeeze(0)
    flow = ContinuousFlow(field, event, solver, 32, loc=0.1 * like, scale=like.abs() + 0.5, rtol=1e-8, atol=1e-8)
    g = torch.Generator()
    x = flow.sample((4,), generator=g.manual_seed(7))
    noise = torch.randn(4, *event, generator=g.manual_seed(7), dtype=torch.float64)
    size = math.prod(event)

    def push(z: Tensor) -> Tensor:
        end = solve(field, z[None], solver=solver, steps=32, rtol=1e-8, atol=1e-8).x[0]
        return end * (like.abs() + 0.5) + 0.1 * like

    for i in range(4):
        close(push(noise[i]), x[i], 1e-6)
        jacobian = torch.autograd.functional.jacobian(push, noise[i])  # type: ignore[no-untyped-call]
        volume = torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet
        start = exact(Normal(noise.new_zeros(()), 1), noise[i]).sum()
        close(flow.log_prob(x[i : i + 1])[0], start - volume, 1e-5)


GRIDS = (Warped(0.8), Warped(1.0), Power(2), EDM(3.0, 10.0, 0.1), Nodes(torch.linspace(0, 1, 7).double() ** 1.5))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("solver", ["rk4", "adams"])
def test_every_grid_has_the_same_limit(grid: TimeGrid, solver: str) -> None:
    field, x = network(cond_dim=1), randn(20, 2)
    cond = randn(20, 1, seed=1)
    truth = ContinuousFlow(field, (2,), "rk4", 256).log_prob(x, cond)
    flow = ContinuousFlow(field, (2,), solver, 96, grid=grid)
    close(flow.log_prob(x, cond), truth, 1e-4)
    noise = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniform = solve(field, noise, cond=cond[:1].expand(7, 1), solver="rk4", steps=256).x
    close(flow.sample((7,), cond[0], torch.Generator().manual_seed(0)), uniform, 1e-4)


def test_small_steps_at_the_ends_pay() -> None:
    """A field that is singular close to both ends, as the logarithm of the noise level makes it."""

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        s = expand_time(t, x)
        return x * torch.sin(3 * torch.log((s + 0.02) / (1.02 - s)))

    x = randn(20, 1)
    truth = ContinuousFlow(field, (1,), "rk4", 2000).log_prob(x)
    for solver in ("rk4", "adams"):
        errors = [
            (ContinuousFlow(field, (1,), solver, 48, grid=grid).log_prob(x) - truth).abs().mean()
            for grid in (Uniform(), Warped())
        ]
        assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("solver", SOLVERS)
def test_noise_of_another_scale(solver: str) -> None:
    """x1 = e^A x0 + ... with x0 ~ N(0, 9 I)."""
    law = linear_law()
    push = torch.linalg.matrix_exp(MATRIX)
    wide = MultivariateNormal(law.mean, 9 * push @ push.T)
    flow, x = ContinuousFlow(linear, (2,), solver, 200, loc=SHIFT * 0, base_scale=3.0), randn(50, 2)
    close(flow.log_prob(x), exact(wide, x), 2e-2 if solver == "euler" else 1e-4)
    if solver != "euler":
        drawn = flow.sample((50_000,), generator=torch.Generator().manual_seed(0))
        assert ((drawn.mean(0) - wide.mean).abs() < 5 * wide.stddev / math.sqrt(50_000)).all()
        close(drawn.T.cov(), wide.covariance_matrix, 0.4)


@pytest.mark.parametrize("solver", ["rk4", "adams", "dopri5"])
@pytest.mark.parametrize("hidden", [(8, 8), (8, 8, 8)])
def test_autocast_is_off_inside(solver: str, hidden: tuple[int, ...]) -> None:
    flow, x = ContinuousFlow(network(hidden=hidden).float(), (2,), solver, 4), randn(5, 2).float()
    outside = flow.log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = flow.log_prob(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


def test_failed_rows_are_left_to_the_caller_on_request() -> None:
    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.where(x > 0, math.nan, x)

    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    for solver in ("rk4", "adams", "dopri5_per_sample"):
        log_prob = ContinuousFlow(field, (1,), solver, divergence="exact", check=False).log_prob(x)
        assert log_prob.isnan().tolist() == [False, True]


@pytest.mark.parametrize("solver", ["midpoint", "rk4", "adams3", "adams", *ADAPTIVE])
@pytest.mark.parametrize("hidden", [(8, 8), (8, 8, 8)])
@pytest.mark.parametrize("method", ["auto", "hutchinson"])
def test_gradient_is_that_of_finite_differences(solver: str, hidden: tuple[int, ...], method: DivergenceMethod) -> None:
    field = network(hidden=hidden, cond_dim=1)
    scale = torch.tensor([0.5, 2.0]).double().requires_grad_()
    flow = ContinuousFlow(field, (2,), solver, 4, method, probes=2, scale=scale, rtol=1e-10, atol=1e-10)
    x, cond, weight = randn(3, 2).requires_grad_(), randn(3, 1).requires_grad_(), field.from_x.weight

    def loss() -> Tensor:
        return flow.log_prob(x, cond, generator=torch.Generator().manual_seed(0)).square().sum()

    leaves = (x, cond, weight, scale)
    gradients = torch.autograd.grad(loss(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        direction, step = torch.ones_like(leaf), 1e-4
        values = []
        for move in (step, -2 * step):
            with torch.no_grad():
                leaf += move * direction
            values.append(loss().detach())
        with torch.no_grad():
            leaf += step * direction
        close((gradient * direction).sum(), (values[0] - values[1]) / (2 * step), 1e-5)


@pytest.mark.parametrize("solver", ["rk4", "adams"])
def test_value_without_gradients_is_that_of_a_field_without_parameters(solver: str) -> None:
    """Where nothing needs gradients the cheaper rule is used, whatever the mode."""
    field, x = network(), randn(5, 2)
    flow = ContinuousFlow(field, (2,), solver, 12)
    needed = flow.log_prob(x)
    assert needed.requires_grad
    with torch.no_grad():
        without = flow.log_prob(x)
    assert not without.requires_grad
    close(without, needed, 1e-4)
    field.requires_grad_(False)
    close(flow.log_prob(x).detach(), without)
    close(flow.log_prob(x.requires_grad_()).detach(), needed.detach())


@pytest.mark.parametrize(
    ("solver", "steps"),
    [("midpoint", 8), ("heun", 8), ("rk4", 4), ("rk4", 5), ("adams3", 8), ("adams", 8), *((s, 1) for s in ADAPTIVE)],
)
def test_error_estimate_covers_the_error_and_shrinks(solver: str, steps: int) -> None:
    field, x = network(), randn(200, 2)
    with torch.no_grad():
        truth = ContinuousFlow(field, (2,), "rk4", 512).log_prob(x)
        estimate = ContinuousFlow(field, (2,), solver, steps, rtol=1e-4, atol=1e-4).estimate(x)
        better = ContinuousFlow(field, (2,), solver, 4 * steps, rtol=1e-7, atol=1e-7).estimate(x)
    assert (estimate.log_prob - truth).square().mean() < estimate.solver_error.square().mean()
    assert better.solver_error.mean() < estimate.solver_error.mean() / 4
    assert (estimate.log_prob - truth).abs().max() > 1e-9
    assert (estimate.standard_error == 0).all()


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s not in ADAPTIVE])
def test_estimate_is_that_of_twice_the_steps(solver: str) -> None:
    field, x = network(), randn(20, 2)
    estimate = ContinuousFlow(field, (2,), solver, 6).estimate(x)
    coarse, fine = (ContinuousFlow(field, (2,), solver, steps).log_prob(x) for steps in (6, 12))
    close(estimate.log_prob, fine)
    close(estimate.solver_error, (fine - coarse).abs())


@pytest.mark.parametrize("solver", SOLVERS)
@torch.no_grad()
def test_an_estimate_by_reference_is_the_exact_value_and_the_error_of_the_flow(solver: str) -> None:
    flow, law, x = ContinuousFlow(linear, (2,), solver, 7, rtol=1e-3, atol=1e-3), linear_law(), randn(20, 2)
    estimate = flow.estimate(x, reference="dopri5")
    close(estimate.log_prob, exact(law, x), 1e-6)
    close(estimate.solver_error, (flow.log_prob(x) - exact(law, x)).abs(), 1e-6)
    assert estimate.solver_error.max() > 1e-9


def test_a_warning_compares_the_error_of_the_solver_with_that_of_the_mean() -> None:
    values = torch.tensor([-1.0, -3.0])  # of standard error 1
    for error, warns in ((0.9, False), (1.1, True)):
        density = LogDensity(values, torch.tensor([2 * error, 0.0]), torch.zeros(2), 1)
        assert (density.warning() is not None) == warns


def test_a_plain_callable_meets_times_without_dimensions() -> None:
    """P4: `t**3 * x` with as many dimensions as times, where a time for each row would spread over dimensions."""
    seen = set()

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        seen.add(torch.as_tensor(t).ndim)
        return t**3 * x

    x = randn(1, 21)
    flow = ContinuousFlow(field, (21,), "rk4", 20)
    truth = exact(Normal(x.new_zeros(()), math.exp(0.25)), x).sum(1)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            close(flow.log_prob(x).detach(), truth, 1e-5)
            close(flow.estimate(x).log_prob.detach(), truth, 1e-5)
    assert seen == {0}


@pytest.mark.parametrize("solver", SOLVERS)
def test_error_estimate_uses_the_same_probes(solver: str) -> None:
    flow = ContinuousFlow(network(), (2,), solver, 24, "hutchinson", probes=3, rtol=1e-6, atol=1e-6)
    estimate = flow.estimate(randn(50, 2), generator=torch.Generator().manual_seed(0))
    assert estimate.solver_error.max() < (0.1 if solver == "euler" else 1e-2)
    assert (estimate.standard_error > 0.02).float().mean() > 0.5


def test_standard_error_is_that_of_the_probes() -> None:
    """For a linear field the estimates of the probes are independent, with the variance known in closed form."""
    probes, n = 4, 4000
    flow = ContinuousFlow(linear, (2,), "rk4", 4, "hutchinson", probes=probes)
    estimate = flow.estimate(randn(1, 2).expand(n, 2), generator=torch.Generator().manual_seed(0))
    symmetric = (MATRIX + MATRIX.T) / 2
    variance = 2 * (symmetric.square().sum() - symmetric.diagonal().square().sum()) / probes
    assert float(estimate.standard_error.square().mean()) == pytest.approx(float(variance), rel=0.1)
    assert float(estimate.log_prob.var()) == pytest.approx(float(variance), rel=0.1)
    alone = ContinuousFlow(linear, (2,), "rk4", 4, "hutchinson").estimate(randn(3, 2))
    assert alone.standard_error.isnan().all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("hidden", [(8,), (8, 8, 8)])
def test_evaluations_of_a_point_are_counted(solver: str, hidden: tuple[int, ...]) -> None:
    rows = 0
    net = network(hidden=hidden)

    class Counted(Field):
        has_closed_form_divergence = net.has_closed_form_divergence

        def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
            nonlocal rows
            rows += len(x)
            velocity: Tensor = net(t, x, cond)
            return velocity

        def velocity_and_divergence(self, t: Time, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
            nonlocal rows
            rows += len(x)
            return net.velocity_and_divergence(t, x, cond)

    flow = ContinuousFlow(Counted(), (2,), solver, 5)
    for reference in ("refined", "dopri5"):
        rows = 0
        with torch.no_grad():
            assert flow.estimate(randn(1, 2), reference=reference).nfe == rows


@pytest.mark.parametrize("steps", range(1, 10))
def test_quadrature_is_exact_for_cubics(steps: int) -> None:
    weights = simpson_weights(steps, torch.zeros(1, dtype=torch.float64))
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    for power in range(4 if steps > 1 else 2):
        assert float(weights @ t**power) == pytest.approx(1 / (power + 1))


@pytest.mark.parametrize("solver", ["rk4", "adams", "dopri5_per_sample"])
def test_points_are_split_without_a_trace(monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    flow = ContinuousFlow(network(cond_dim=1), (2,), solver, 7, "hutchinson", probes=3)
    x, cond = randn(5, 2), randn(5, 1)
    whole = flow.estimate(x, cond, generator=torch.Generator().manual_seed(0))
    for rows in (1, 2, 10, 12):
        monkeypatch.setattr(_density, "ROWS_AT_ONCE", rows)
        parts = flow.estimate(x, cond, generator=torch.Generator().manual_seed(0))
        close(parts.log_prob, whole.log_prob)
        close(parts.standard_error, whole.standard_error)


@pytest.mark.parametrize("solver", ["midpoint", "dopri5"])
def test_hutchinson_averages_to_the_exact_value(solver: str) -> None:
    field, x = network(), randn(2, 2)
    truth = ContinuousFlow(field, (2,), solver, 8, rtol=1e-7, atol=1e-7).log_prob(x)
    g = torch.Generator().manual_seed(0)
    many = ContinuousFlow(field, (2,), solver, 8, "hutchinson", rtol=1e-7, atol=1e-7)
    with torch.no_grad():
        estimates = many.log_prob(x.repeat(4000, 1), generator=g).reshape(4000, 2)
    assert ((estimates.mean(0) - truth).abs() < 4.5 * estimates.std(0) / math.sqrt(4000)).all()
    assert (estimates.std(0) > 1e-3).all()


def test_every_solver_meets_the_same_probes_and_conditions() -> None:
    """Probes travel with their rows: the estimate of a probe is a property of the field, not of the solver."""
    field, x, cond = network(cond_dim=1), randn(5, 2), randn(5, 1, seed=1)
    estimates = [
        ContinuousFlow(field, (2,), solver, 96, "hutchinson", probes=3, rtol=1e-8, atol=1e-8).log_prob(
            x, cond, generator=torch.Generator().manual_seed(0)
        )
        for solver in ("rk4", "adams", *ADAPTIVE)
    ]
    for estimate in estimates[1:]:
        close(estimate, estimates[0], 1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_probes_stay_the_same_along_a_path(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def count(x: Tensor, probes: int, generator: torch.Generator | None) -> Tensor:
        nonlocal calls
        calls += 1
        return rademacher(x, probes, generator)

    monkeypatch.setattr(flow_module, "rademacher", count)
    flow = ContinuousFlow(network(), (2,), solver, 4, "hutchinson")
    seeded = [flow.log_prob(randn(3, 2), generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    close(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2]) and calls == 3


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "dopri5"])
def test_log_prob_does_not_depend_on_the_batch(solver: str) -> None:
    flow, x, cond = ContinuousFlow(network(cond_dim=1), (2,), solver), randn(64, 2), randn(64, 1, seed=1)
    together = flow.log_prob(x, cond)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    close(flow.log_prob(x[order], cond[order]), together[order])
    close(flow.log_prob(x[:1], cond[:1]), together[:1])


def test_leading_shapes_and_conditions_broadcast() -> None:
    flow = ContinuousFlow(network(cond_dim=1), (2,))
    cond, g = randn(3, 1), torch.Generator().manual_seed(0)
    x = flow.sample((4,), cond, generator=g)
    assert x.shape == (4, 3, 2)
    together = flow.log_prob(x, cond)
    assert together.shape == (4, 3)
    for i in range(3):
        close(flow.log_prob(x[:, i], cond[i]), together[:, i])
    close(flow.log_prob(x[0, 0], cond[0]), together[0, 0])
    assert flow.sample((), cond).shape == (3, 2) and flow.sample((5,), cond[0]).shape == (5, 2)
    for solver in SOLVERS:
        flow = ContinuousFlow(network(cond_dim=1), (2,), solver)
        assert flow.sample((0,), cond).shape == (0, 3, 2) and flow.log_prob(x[:0], cond).shape == (0, 3)


def test_condition_and_sample_belong_together() -> None:
    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        return cond.expand_as(x)

    cond = torch.tensor([[0.0], [100.0]], dtype=torch.float64)
    x = ContinuousFlow(field, (1,)).sample((1000,), cond, torch.Generator().manual_seed(0))
    close(x.mean((0, 2)), cond[:, 0], 0.2)


def test_it_is_a_distribution() -> None:
    flow = ContinuousFlow(network(), event_shape=(2,))
    assert isinstance(flow, Distribution) and flow.event_shape == (2,) and flow.batch_shape == ()
    assert flow.support.event_dim == 1
    assert flow.has_rsample and flow.rsample((3,)).requires_grad and not flow.sample((3,)).requires_grad
    assert flow.sample().shape == (2,)
    expected = "ContinuousFlow(event_shape=(2,), solver='midpoint', steps=20, grid=Uniform(), divergence='auto')"
    assert repr(flow) == expected


def test_randomness_comes_from_the_generator_alone() -> None:
    flow, state = ContinuousFlow(network(), (2,)), torch.get_rng_state()
    a, b, c = (flow.sample((5,), generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("solver", SOLVERS)
def test_nan_field_is_an_error(solver: str) -> None:
    flow = ContinuousFlow(lambda t, x, cond: x * math.nan, (2,), solver)
    with pytest.raises(SolverError):
        flow.log_prob(randn(3, 2))
    with pytest.raises(SolverError):
        flow.sample((3,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ContinuousFlow(linear, (2,), solver="rk5"), "solver is 'rk5'"),
        (
            lambda: ContinuousFlow(linear, 2),  # type: ignore[arg-type]
            r"event_shape is 2, but should be a tuple such as \(2,\)\.",
        ),
        (
            lambda: ContinuousFlow(linear, (2,)).sample(8),  # type: ignore[arg-type]
            r"sample_shape is 8, but should be a tuple such as \(8,\)\.",
        ),
        (
            lambda: ContinuousFlow(linear, (2,)).trajectory(8),  # type: ignore[arg-type]
            r"sample_shape is 8, but should be a tuple such as \(8,\)\.",
        ),
        (
            lambda: ContinuousFlow(MLPField, (2,)),  # type: ignore[arg-type]
            "field is the class MLPField, but should be an object",
        ),
        (
            lambda: ContinuousFlow(lambda x, t, cond: x, (2,)),
            "but is called as field\\(t, x, cond\\): t comes first",
        ),
        (
            lambda: ContinuousFlow(linear, (2,)).estimate(torch.ones(3, 2), reference="exact"),  # type: ignore[arg-type]
            "reference is 'exact', but should be one of refined, dopri5",
        ),
        (
            lambda: ContinuousFlow(linear, (2,)).log_prob(torch.ones(3, 2, dtype=torch.long)),
            r"value has dtype torch\.int64, but should be of a floating-point dtype",
        ),
        (lambda: ContinuousFlow(linear, (2,), steps=0), "steps is 0"),
        (lambda: ContinuousFlow(linear, (2,), probes=0), "probes is 0"),
        (lambda: ContinuousFlow(linear, (2,), base_scale=0.0), "base_scale is 0"),
        (lambda: ContinuousFlow(linear, (2,), solver="dopri5", grid=Warped()), "grid is Warped"),
        (lambda: ContinuousFlow(linear, (2,), scale=torch.tensor([1.0, 0.0])), "scale holds values"),
        (lambda: ContinuousFlow(linear, (2,), scale=torch.ones(3)), r"scale has shape \(3,\)"),
        (lambda: ContinuousFlow(linear, (2,), loc=torch.ones(3, 2)), r"loc has shape \(3, 2\)"),
        (lambda: ContinuousFlow(linear, (2,)).log_prob(torch.ones(3, 4)), r"value has shape \(3, 4\)"),
        (lambda: ContinuousFlow(linear, (2,)).log_prob(torch.ones(4)), r"value has shape \(4,\)"),
        (
            lambda: ContinuousFlow(linear, (2,)).log_prob(torch.ones(3, 2), torch.ones(2, 1)),
            "cond has a batch of shape",
        ),
        (
            lambda: ContinuousFlow(linear, (2,), divergence="trace"),  # type: ignore[arg-type]
            "divergence is 'trace'",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_misspelt_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        ContinuousFlow(linear, (2,), step=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        ContinuousFlow(linear, (2,)).sample((3,), methodd="rk4")  # type: ignore[call-arg]
