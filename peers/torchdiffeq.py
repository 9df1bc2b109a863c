"""Cases of torchdiffeq: solvers of ordinary differential equations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from flowmatch_core import MLPField, Nodes, solve
from flowmatch_core.divergence import divergence
from flowmatch_core.flow import ContinuousFlow
from peers.cases import Suite, agree, normal, seeded

suite = Suite("torchdiffeq", "rtqichen/torchdiffeq", "657943a")

FIXED = {
    "euler": "euler",
    "midpoint": "midpoint",
    "heun2": "heun",
    "rk4": "rk4",
    "explicit_adams": "adams3",
    "implicit_adams": "adams",
}
"""Fixed-step methods of the peer and ours of the same family."""
ADAPTIVE = ("dopri5", "dopri5_per_sample")
SINGLE_STEP = ("euler", "midpoint", "heun2", "rk4")
DTYPES = (torch.float32, torch.float64)
REVERSE = (False, True)
TIMES = torch.linspace(1, 8, 10, dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """An equation `x' = f(t, x)` whose solution through `exact(1)` is known."""

    f: Callable[[Tensor, Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]


def line() -> Problem:
    """A solution that is a straight line, which every method meets exactly."""
    slope, start = 0.3, 2.0
    return Problem(lambda t, x: slope + (x - (slope * t + start)) ** 5, lambda t: (slope * t + start).reshape(-1, 1, 1))


def rotation() -> Problem:
    """A linear equation with an antisymmetric matrix."""
    raw = 0.1 * torch.randn(10, 10, dtype=torch.float64, generator=seeded())
    matrix, start = raw - raw.T, torch.ones(1, 10, dtype=torch.float64)
    return Problem(
        lambda t, x: x @ matrix.T.to(x.dtype),
        lambda t: torch.stack([start @ torch.linalg.matrix_exp(matrix * s).T for s in t]),
    )


def sine() -> Problem:
    """A linear equation whose coefficients depend on time; by variation of constants."""

    def exact(t: Tensor) -> Tensor:
        integral = -(t**2) * torch.cos(2 * t) / 2 + t * torch.sin(2 * t) / 2 + torch.cos(2 * t) / 4 - t + 2 * t**2
        return (t**2 * (3 + integral)).reshape(-1, 1, 1)

    return Problem(lambda t, x: 2 * x / t + t**4 * torch.sin(2 * t) - t**2 + 4 * t**3, exact)


def decay() -> Problem:
    """A slope that depends on time only."""
    return Problem(lambda t, x: -0.1 * torch.exp(-0.1 * t) + 0 * x, lambda t: torch.exp(-0.1 * t).reshape(-1, 1, 1))


PROBLEMS = (line, rotation, sine, decay)


def ours(problem: Problem, x: Tensor, times: Tensor, solver: str, steps: int = 9) -> Tensor:
    field = _field(problem)
    path = solve(field, x, times=times, solver=solver, steps=steps, rtol=1e-7, atol=1e-9).path
    assert path is not None
    return path


def _field(problem: Problem) -> Callable[..., Tensor]:
    def field(t: float | Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype)
        return problem.f(t.reshape(-1, 1) if t.ndim else t, x)

    return field


def theirs(problem: Problem, x: Tensor, times: Tensor, method: str) -> Tensor:
    solution: Tensor = torchdiffeq.odeint(problem.f, x, times, method=method)
    return solution


@suite.case("tests/odeint_tests.py::TestSolverError::test_odeint", ("line",), FIXED, DTYPES, REVERSE)
def fixed_steps_meet_a_line(_: str, method: str, dtype: torch.dtype, reverse: bool) -> None:
    problem, times = line(), TIMES.flip(0) if reverse else TIMES
    exact = problem.exact(times).to(dtype)
    tolerance = 3e-4 if dtype == torch.float32 else 1e-9
    agree(ours(problem, exact[0], times, FIXED[method]), theirs(problem, exact[0], times, method), tolerance)
    agree(ours(problem, exact[0], times, FIXED[method]), exact, tolerance)


@suite.case("tests/odeint_tests.py::TestSolverError::test_odeint", PROBLEMS, ADAPTIVE, DTYPES, REVERSE)
def adaptive_steps_meet_the_solution(
    make: Callable[[], Problem], solver: str, dtype: torch.dtype, reverse: bool
) -> None:
    problem, times = make(), TIMES.flip(0) if reverse else TIMES
    exact = problem.exact(times).to(dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-5
    agree(ours(problem, exact[0], times, solver), theirs(problem, exact[0], times, "dopri5"), tolerance)
    agree(ours(problem, exact[0], times, solver), exact, tolerance)


@suite.case("tests/odeint_tests.py::TestSolverError::test_adjoint", PROBLEMS, DTYPES, REVERSE)
def values_of_the_adjoint_solver(make: Callable[[], Problem], dtype: torch.dtype, reverse: bool) -> None:
    problem, times = make(), TIMES.flip(0) if reverse else TIMES
    start = problem.exact(times).to(dtype)[0]
    expected = torchdiffeq.odeint_adjoint(problem.f, start, times, adjoint_params=())
    agree(ours(problem, start, times, "dopri5"), expected, 1e-3 if dtype == torch.float32 else 1e-5)


@suite.case("tests/odeint_tests.py::TestNoIntegration::test_odeint", [*FIXED.values(), *ADAPTIVE], PROBLEMS)
def an_empty_interval_changes_nothing(solver: str, make: Callable[[], Problem]) -> None:
    problem = make()
    start = problem.exact(TIMES[:1])[0]
    end = solve(_field(problem), start, t0=1.0, t1=1.0, solver=solver).x
    agree(end, torchdiffeq.odeint(problem.f, start, TIMES[:1])[0], 1e-12)


@suite.case("tests/odeint_tests.py::TestDiscontinuities::test_odeint_jump_t", DTYPES)
def a_known_jump_costs_fewer_evaluations(dtype: torch.dtype) -> None:
    def jump(t: float | Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return -0.5 * x if float(t) < 0.5 else x**2

    def before(t: float | Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return -0.5 * x

    def after(t: float | Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return x**2

    x = torch.tensor([[0.5], [1.0]], dtype=dtype)
    accuracy: Any = {"solver": "dopri5", "rtol": 1e-6, "atol": 1e-6}
    blind = solve(jump, x, **accuracy)
    half = solve(before, x, t1=0.5, **accuracy)
    rest = solve(after, half.x, t0=0.5, **accuracy)
    assert half.nfe + rest.nfe < blind.nfe
    options = {"jump_t": torch.tensor([0.5])}
    expected = torchdiffeq.odeint(jump, x, torch.tensor([0.0, 1.0]), rtol=1e-6, atol=1e-6, options=options)[-1]
    agree(rest.x, expected, 1e-4)


@suite.case("tests/odeint_tests.py::TestGridConstructor::test_grid_constructor", SINGLE_STEP, (False, True))
def steps_end_on_the_nodes(method: str, even: bool) -> None:
    nodes = torch.linspace(0, 1, 11, dtype=torch.float64) if even else torch.tensor([0, 0.1, 0.15, 0.5, 1.0]).double()
    options = {"grid_constructor": lambda f, y0, t: nodes}
    growth, hold = Problem(lambda t, x: x, torch.exp), Problem(lambda t, x: torch.ones_like(x), lambda t: t)
    for problem in (growth, hold):
        x = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
        expected = torchdiffeq.odeint(problem.f, x, nodes[[0, -1]], method=method, options=options)[-1]
        end = solve(_field(problem), x, solver=FIXED[method], grid=Nodes(nodes), steps=len(nodes) - 1).x
        agree(end, expected, 1e-12)
        agree(torch.autograd.grad(end.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0], 1e-12)


@suite.case("tests/gradient_tests.py::TestGradient::test_odeint", [*FIXED.values(), *ADAPTIVE])
def gradients_are_those_of_finite_differences(solver: str) -> None:
    problem = line()
    start = problem.exact(TIMES)[0].requires_grad_()
    end = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)

    def value(x: Tensor, t1: Tensor) -> Tensor:
        return solve(_field(problem), x, t0=1.0, t1=t1, solver=solver, steps=9, rtol=1e-9, atol=1e-12).x

    assert torch.autograd.gradcheck(value, (start, end))


class Cubic(nn.Module):
    """The spiral `x' = x^3 A` of the peer's demonstration, with a trainable matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return x**3 @ self.matrix


@suite.case("tests/gradient_tests.py::TestGradient::test_adjoint", ADAPTIVE)
@suite.case("tests/gradient_tests.py::TestCompareAdjointGradient::test_against_dopri5", ADAPTIVE)
def gradients_are_those_of_the_adjoint(solver: str) -> None:
    field, x = Cubic(), torch.tensor([[2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    end = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    times = torch.stack([torch.zeros_like(end), end])
    expected = torchdiffeq.odeint_adjoint(field, x, times, rtol=1e-10, atol=1e-12)[-1]
    found = solve(field, x, t1=end, solver=solver, rtol=1e-10, atol=1e-12).x
    agree(found, expected, 1e-7)
    weights = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    inputs = (x, end, field.matrix)
    gradients = [torch.autograd.grad((weights * y).sum(), inputs) for y in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        agree(a, b, 1e-6)


@suite.case("tests/gradient_tests.py::TestGradient::test_adjoint_against_odeint", PROBLEMS)
def gradients_of_all_times_are_those_of_the_adjoint(make: Callable[[], Problem]) -> None:
    problem = make()
    start = problem.exact(TIMES)[0].requires_grad_()
    expected = torchdiffeq.odeint_adjoint(problem.f, start, TIMES, rtol=1e-9, atol=1e-12, adjoint_params=())
    found = solve(_field(problem), start, times=TIMES, solver="dopri5", rtol=1e-9, atol=1e-12).path
    assert found is not None
    weights = torch.rand_like(expected)
    a, b = (torch.autograd.grad((weights * y).sum(), start)[0] for y in (found, expected))
    agree(a, b, 1e-4)


@suite.case("examples/ode_demo.py: the true trajectory", ("dopri5", "dopri5_per_sample", "adams", "rk4"))
def spiral(solver: str) -> None:
    field, x, times = Cubic(), torch.tensor([[2.0, 0.0]], dtype=torch.float64), torch.linspace(0, 25, 100).double()
    with torch.no_grad():
        expected = torchdiffeq.odeint(field, x, times, rtol=1e-9, atol=1e-11)
        found = solve(field, x, times=times, solver=solver, steps=8000, rtol=1e-9, atol=1e-11).path
    assert found is not None
    agree(found, expected, 1e-5)


@suite.case("examples/ode_demo.py: the loss of a batch of short solves")
def spiral_loss() -> None:
    net = MLPField(2, (50,), generator=seeded()).double()
    x, times = normal(20, 2), torch.linspace(0, 25, 1000).double()[:10]
    target = torchdiffeq.odeint(Cubic(), x, times).detach()
    expected = (torchdiffeq.odeint(lambda t, x: net(t, x), x, times, rtol=1e-9, atol=1e-11) - target).abs().mean()
    path = solve(net, x, times=times, solver="dopri5", rtol=1e-9, atol=1e-11).path
    assert path is not None
    found = (path - target).abs().mean()
    agree(found, expected, 1e-7)
    pairs = zip(*(torch.autograd.grad(loss, list(net.parameters())) for loss in (found, expected)), strict=True)
    for a, b in pairs:
        agree(a, b, 1e-6)


@suite.case("examples/cnf.py: the likelihood of circles", ("dopri5", "dopri5_per_sample", "adams"))
def circles(solver: str) -> None:
    net = MLPField(2, (32, 32), generator=seeded()).double()
    angle = torch.linspace(0, 6, 40, dtype=torch.float64)
    x = torch.stack([angle.cos(), angle.sin()], 1)

    def joint(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = state[0].detach().requires_grad_()
            velocity = net(t, point)
            rows = [torch.autograd.grad(velocity[:, i].sum(), point, retain_graph=True)[0][:, i] for i in range(2)]
        return velocity.detach(), torch.stack(rows).sum(0).detach()

    times = torch.tensor([1.0, 0.0], dtype=torch.float64)
    states, integrals = torchdiffeq.odeint(
        joint, (x, torch.zeros(40, dtype=torch.float64)), times, rtol=1e-9, atol=1e-9
    )
    normal = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    expected = normal.log_prob(states[-1]) + integrals[-1]
    with torch.no_grad():
        found = ContinuousFlow(net, (2,), solver, 200, rtol=1e-9, atol=1e-9).log_prob(x)
        agree(divergence(net, 0.3, x)[1], joint(torch.tensor(0.3), (x, x))[1], 1e-6)
    agree(found, expected, 1e-6)


suite.not_applicable(
    "the method is not offered: five fixed-step families and the Dormand-Prince pair are",
    *(
        f"tests/odeint_tests.py::TestSolverError::test_odeint[{method}]"
        for method in (
            *("heun3", "adaptive_heun", "fehlberg2", "bosh3", "tsit5", "dopri8"),
            *("implicit_euler", "implicit_midpoint", "trapezoid", "radauIIA3", "radauIIA5", "gl4", "gl6", "sdirk2"),
            *("trbdf2", "scipy_solver"),
        )
    ),
    "tests/odeint_tests.py::TestScipySolvers::test_odeint",
)
suite.not_applicable(
    "the state is one tensor",
    "tests/api_tests.py::TestCollectionState::test_forward",
    "tests/api_tests.py::TestCollectionState::test_gradient",
)
suite.not_applicable(
    "a solve ends at a given time: there are no events",
    "tests/event_tests.py::TestEventHandling::test_odeint",
    "tests/event_tests.py::TestEventHandling::test_adjoint",
    "examples/bouncing_ball.py",
    "examples/learn_physics.py",
)
suite.not_applicable(
    "the norm of the error is the maximum over the entries of a sample, and is not a setting",
    "tests/norm_tests.py::TestNorms::test_norm",
    "tests/norm_tests.py::TestNorms::test_adjoint_norm",
    "tests/norm_tests.py::TestNorms::test_large_norm",
    "tests/norm_tests.py::TestNorms::test_seminorm",
)
suite.not_applicable(
    "an option of the peer's step control",
    "tests/odeint_tests.py::TestDiscontinuities::test_odeint_perturb",
    "tests/odeint_tests.py::TestMinMaxStep::test_min_max_step",
)
suite.not_applicable(
    "no callbacks: a Solution counts evaluations and steps",
    "tests/odeint_tests.py::TestCallbacks::test_wrong_callback",
    "tests/odeint_tests.py::TestCallbacks::test_steps",
)
suite.not_applicable("needs a download of MNIST", "examples/odenet_mnist.py")
suite.not_applicable("a recurrent encoder of time series; its solve is that of ode_demo.py", "examples/latent_ode.py")
