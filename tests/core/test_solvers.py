"""Laws of the solvers, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowmatch_core import solvers
from flowmatch_core.fields import Time, VelocityField, expand_time
from flowmatch_core.solvers import SOLVERS, TABLEAUS, SolverError, solve

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


def growth(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """x' = x cos t, solved by x(0) exp(sin t)."""
    return x * torch.cos(expand_time(t, x))


def pendulum(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """A nonlinear field of two coupled dimensions with a time of its own."""
    s = expand_time(t, x)
    return torch.stack([x[:, 1], -torch.sin(3 * x[:, 0]) + torch.cos(2 * s).squeeze(-1)], 1)


def points(n: int, dim: int = 2) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_every_fixed_step_solver_has_its_order_listed() -> None:
    assert set(ORDERS) == set(TABLEAUS) == set(SOLVERS) - {"dopri5"}


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize("backward", [False, True])
def test_order_of_convergence(solver: str, backward: bool) -> None:
    x = points(8)
    t0, t1 = (1.0, 0.0) if backward else (0.0, 1.0)
    exact = solve(pendulum, x, t0=t0, t1=t1, solver="rk4", steps=1000).x
    errors = []
    for steps in (16, 32, 64):
        errors.append((solve(pendulum, x, t0=t0, t1=t1, solver=solver, steps=steps).x - exact).norm())
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.25)


@pytest.mark.parametrize("solver", SOLVERS)
def test_known_solution(solver: str) -> None:
    x = torch.ones(3, 1, 2, dtype=torch.float64)
    end = solve(growth, x, solver=solver, steps=400).x
    torch.testing.assert_close(end, x * math.exp(math.sin(1)), rtol=2e-3 if solver == "euler" else 1e-5, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_sample_has_its_own_interval(solver: str) -> None:
    x = points(5)
    t0 = torch.tensor([0.0, 0.2, 1.0, 0.5, 0.3], dtype=torch.float64)
    t1 = torch.tensor([1.0, 0.9, 0.1, 0.5, 0.31], dtype=torch.float64)
    together = solve(pendulum, x, t0=t0, t1=t1, solver=solver, steps=7, rtol=1e-9, atol=1e-9).x
    for i in range(5):
        start, end = float(t0[i]), float(t1[i])
        alone = solve(pendulum, x[i : i + 1], t0=start, t1=end, solver=solver, steps=7, rtol=1e-9, atol=1e-9).x
        close(together[i : i + 1], alone, 1e-8 if solver == "dopri5" else 1e-13)
    close(together[3], x[3])


@pytest.mark.parametrize("solver", SOLVERS)
def test_ends_may_mix_floats_scalars_and_batches(solver: str) -> None:
    x, half = points(3), torch.tensor(0.5, dtype=torch.float64)
    expected = solve(pendulum, x, t0=0.0, t1=0.5, solver=solver, steps=4).x
    for t0, t1 in ((0, half), (half * 0, 0.5), (0.0, half.expand(3)), (torch.zeros(3), half)):
        close(solve(pendulum, x, t0=t0, t1=t1, solver=solver, steps=4).x, expected)


@pytest.mark.parametrize("solver", TABLEAUS)
def test_result_does_not_depend_on_the_batch(solver: str) -> None:
    x = points(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    together = solve(pendulum, x, solver=solver).x
    close(solve(pendulum, x[order], solver=solver).x, together[order])
    close(solve(pendulum, x[:1], solver=solver).x, together[:1])


def test_stiff_sample_is_not_diluted_by_easy_ones() -> None:
    rate = torch.ones(4096, 1, dtype=torch.float64)
    rate[0] = 200.0

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        return -cond * (x - torch.sin(8 * expand_time(t, x)))

    errors = []
    for n in (1, 16, 4096):
        x, cond = torch.ones(n, 1, dtype=torch.float64), rate[:n]
        exact = solve(field, x[:1], cond=cond[:1], solver="rk4", steps=4000).x
        end = solve(field, x, cond=cond, solver="dopri5", rtol=1e-3, atol=1e-3).x
        errors.append(float((end[0] - exact[0]).abs()))
    assert max(errors) < 3e-3


def test_adaptive_error_follows_the_tolerance() -> None:
    x = points(16)
    exact = solve(pendulum, x, solver="rk4", steps=2000).x
    for tolerance in (1e-3, 1e-5, 1e-7):
        solution = solve(pendulum, x, solver="dopri5", rtol=tolerance, atol=tolerance)
        assert (solution.x - exact).abs().max() < 10 * tolerance
    assert (solution.x - exact).abs().max() > 0


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0), (torch.zeros(4), torch.linspace(0.2, 1, 4))])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("speed", [1.0, 1e-6])  # a slow field tempts dopri5 to try a first step far beyond
def test_field_is_never_evaluated_outside_the_interval(solver: str, t0: Time, t1: Time, speed: float) -> None:
    seen: list[Tensor] = []

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        s = expand_time(t, x)
        seen.append(s)
        return speed * (torch.sqrt(s) * torch.sqrt(1 - s) * x + torch.log1p(-0.999 * s) + 1)

    solution = solve(field, points(4), t0=t0, t1=t1, solver=solver, steps=3)
    assert torch.isfinite(solution.x).all()
    assert min(s.min() for s in seen) >= 0 and max(s.max() for s in seen) <= 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted(solver: str) -> None:
    calls = 0

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += 1
        return -x

    solution = solve(field, points(2), solver=solver, steps=5)
    assert solution.nfe == calls
    if solver != "dopri5":
        assert calls == 5 * len(TABLEAUS[solver].b)


@pytest.mark.parametrize("solver", SOLVERS)
def test_saved_path_holds_the_states_at_its_times(solver: str) -> None:
    x, t1 = points(3), torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    tight = {"rtol": 1e-9, "atol": 1e-9}
    for end in (0.8, t1):
        solution = solve(pendulum, x, t1=end, solver=solver, steps=4, save=True, **tight)  # type: ignore[arg-type]
        assert solution.path is not None and solution.t is not None
        assert solution.path.shape == (5, 3, 2) and solution.t.shape == ((5,) if end is not t1 else (5, 3))
        close(solution.path[0], x)
        close(solution.path[-1], solution.x)
        close(solution.t[-1], torch.as_tensor(end, dtype=torch.float64))
        partly = solve(pendulum, x, t1=solution.t[2], solver=solver, steps=2, **tight)  # type: ignore[arg-type]
        close(partly.x, solution.path[2], 1e-8)
    unsaved = solve(pendulum, x, solver=solver)
    assert unsaved.path is None and unsaved.t is None


@pytest.mark.parametrize("solver", SOLVERS)
def test_condition_reaches_the_field_by_row(solver: str) -> None:
    x, cond = points(3), torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    end = solve(lambda t, x, cond: cond.expand_as(x), x, cond=cond, solver=solver, steps=3).x
    close(end, x + cond)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_reach_the_start_and_the_parameters(solver: str) -> None:
    x = points(3).requires_grad_()
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    end = solve(lambda t, x, cond: rate * x, x, solver=solver, steps=200).x
    by_x, by_rate = torch.autograd.grad(end.sum(), (x, rate))
    tolerance = 1e-2 if solver == "euler" else 1e-4
    close(by_x, torch.full_like(x, math.exp(0.7)), tolerance)
    close(by_rate, (x * math.exp(0.7)).sum().detach(), tolerance)


@pytest.mark.parametrize("solver", SOLVERS)
def test_dtype_is_kept(solver: str) -> None:
    t1 = torch.linspace(0.5, 1, 3, dtype=torch.float64)
    assert solve(growth, torch.ones(3, 2), t1=t1, solver=solver).x.dtype == torch.float32


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "field",
    [lambda t, x, cond: x * math.nan, lambda t, x, cond: torch.where(expand_time(t, x) > 0.5, math.nan, x)],
)
def test_nan_is_an_error_not_a_hang(solver: str, field: VelocityField) -> None:
    with pytest.raises(SolverError, match="look for NaN"):
        solve(field, points(3), solver=solver)


def test_error_counts_the_samples_and_can_be_switched_off() -> None:
    x = points(3)
    x[1] = math.nan
    with pytest.raises(SolverError, match="in 1 of 3 samples"):
        solve(growth, x)
    assert solve(growth, x, check=False).x[1].isnan().all()


def test_hopeless_tolerance_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "MAX_ADAPTIVE_STEPS", 100)
    with pytest.raises(SolverError, match="loosen rtol=1e-30"):
        solve(pendulum, points(2), solver="dopri5", rtol=1e-30, atol=1e-30)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: solve(growth, x, solver="rk5"), "solver is 'rk5'"),
        (lambda x: solve(growth, x, steps=0), "steps is 0"),
        (lambda x: solve(growth, x, t1=torch.ones(3, 1)), r"t has shape \(3, 1\)"),
        (lambda x: solve(growth, x, t0=torch.ones(2)), r"t has shape \(2,\)"),
        (lambda x: solve(lambda t, x, cond: x[:, :1], x), "the result of field has shape"),
        (lambda x: solve(growth, x[0, 0]), "x has no dimensions"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(points(3))


def test_misspelt_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        solve(growth, points(3), step_size=0.1)  # type: ignore[call-arg]
