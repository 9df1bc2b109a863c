"""Laws of the solvers, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowmatch_core._tensors import expand_time
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.networks import MLPField
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.solvers import EDM, SOLVERS, Nodes, Power, SolverError, TimeGrid, Uniform, Warped, solve
from flowmatch_core.solvers.adaptive import ADAPTIVE, DORMAND_PRINCE, ERROR
from flowmatch_core.solvers.fixed_step import BASHFORTH, MOULTON
from tests.support.checks import close
from tests.support.random import randn, tensor

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "adams3": 3, "adams": 5}
EVALUATIONS = {"euler": 5, "midpoint": 10, "heun": 10, "rk4": 20, "adams3": 6, "adams": 12}  # in five steps
GRIDS = (Uniform(), Warped(0.8), Power(2), EDM(3.0, 10.0, 0.1), Nodes([0.0, 0.2, 0.5, 0.65, 0.8, 1.0]))


def growth(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """x' = x cos t, solved by x(0) exp(sin t)."""
    return x * torch.cos(expand_time(t, x))


def pendulum(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """A nonlinear field of two coupled dimensions with a time of its own."""
    s = expand_time(t, x)
    return torch.stack([x[:, 1], -torch.sin(3 * x[:, 0]) + torch.cos(2 * s).squeeze(-1)], 1)


def test_every_fixed_step_solver_has_its_order_listed() -> None:
    assert set(ORDERS) == set(SOLVERS) - set(ADAPTIVE)


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("grid", GRIDS[:4], ids=str)
def test_order_of_convergence(solver: str, backward: bool, grid: TimeGrid) -> None:
    x = randn(8, 2)
    t0, t1 = (1.0, 0.0) if backward else (0.0, 1.0)
    exact = solve(pendulum, x, t0=t0, t1=t1, solver="rk4", steps=1000).x
    errors = []
    for steps in (32, 64, 128):
        errors.append((solve(pendulum, x, t0=t0, t1=t1, solver=solver, steps=steps, grid=grid).x - exact).norm())
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    if solver.startswith("adams"):  # their correctors are of one order more, and may come from above
        assert all(ORDERS[solver] - 0.55 < slope < ORDERS[solver] + 2.2 for slope in slopes)
    else:
        assert slopes == pytest.approx([ORDERS[solver]] * 2, abs=0.3)


RUNGE_KUTTA = ("euler", "midpoint", "heun", "rk4")
ROUGH = Nodes([0.0, 0.1, 0.15, 1.0])


@pytest.mark.parametrize("solver", RUNGE_KUTTA)
@pytest.mark.parametrize("grid", [*GRIDS, ROUGH], ids=str)
def test_constant_velocity_is_exact_on_every_grid(solver: str, grid: TimeGrid) -> None:
    x, rate = randn(4, 2), randn(4, 2, seed=1)
    t0 = torch.tensor([0.0, 1.0, 0.2, 0.7], dtype=torch.float64)
    t1 = torch.tensor([1.0, 0.0, 0.9, 0.1], dtype=torch.float64)
    for start, end in ((0.0, 1.0), (1.0, 0.0), (t0, t1)):
        solution = solve(lambda t, x, cond: rate, x, t0=start, t1=end, solver=solver, steps=3, grid=grid, save=True)
        assert solution.path is not None and solution.t is not None
        passed = (solution.t - solution.t[0]).reshape(4, -1, 1)
        close(solution.path, x + rate * passed, tolerance=1e-12)


@pytest.mark.parametrize("grid", [*GRIDS, ROUGH], ids=str)
def test_runge_kutta_steps_go_from_node_to_node(grid: TimeGrid) -> None:
    """By the textbook's formulas; and the values of eight steps to N(2, 0.01) from x = 1."""

    def velocity(t: float, x: float) -> float:
        variance = t**2 * 0.01 + (1 - t) ** 2
        return 2 + (0.01 * t - (1 - t)) / variance * (x - 2 * t)

    def textbook(nodes: list[float], midpoint: bool) -> float:
        x = 1.0
        for t, after in itertools.pairwise(nodes):
            h = after - t
            x += h * (velocity(t + h / 2, x + h / 2 * velocity(t, x)) if midpoint else velocity(t, x))
        return x

    field = GaussianMixture(tensor(1.0), tensor([2.0]), tensor([[0.01]])).velocity_field()
    x = torch.ones(1, 1, dtype=torch.float64)
    for solver in ("euler", "midpoint"):
        end = solve(field, x, solver=solver, steps=8, grid=grid).x
        assert float(end) == pytest.approx(textbook(grid.nodes(8), solver == "midpoint"), abs=1e-12)
    assert float(solve(field, x, solver="euler", steps=8, grid=EDM()).x) - 2.1 == pytest.approx(-0.038, abs=5e-4)
    assert float(solve(field, x, solver="midpoint", steps=8, grid=Warped()).x) - 2.1 == pytest.approx(-0.0013, abs=5e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("backward", [False, True])
def test_states_at_output_times_have_the_order_of_the_solver(solver: str, backward: bool) -> None:
    # off the nodes; a Runge-Kutta step is divided at each, so that many of them would hide the order
    n, coarse = (4, 64) if solver in RUNGE_KUTTA else (40, 32)
    times = [0.0, *((i + 0.3) / n for i in range(n)), 1.0]
    times = [1 - t for t in times] if backward else times
    x = randn(8, 2)
    fine = solve(pendulum, x, solver="rk4", steps=1000, times=times).path
    assert fine is not None

    def error(**given: object) -> Tensor:
        solution = solve(pendulum, x, solver=solver, times=times, **given)  # type: ignore[arg-type]
        assert solution.path is not None and solution.t is not None
        close(solution.t, torch.tensor(times, dtype=torch.float64))
        close(solution.path[-1], solution.x)
        distances: Tensor = (solution.path - fine).flatten(1).norm(dim=1)
        return distances[1:-1].reshape(4, -1).amax(1)  # in each quarter

    if solver in ADAPTIVE:
        assert error(rtol=1e-8, atol=1e-8).max() < 1e-6
        return
    for grid in (Uniform(), Warped(0.8)):
        slopes = (error(steps=coarse, grid=grid) / error(steps=4 * coarse, grid=grid)).log2() / 2
        assert slopes.min() > ORDERS[solver] - 0.4, slopes


@pytest.mark.parametrize(("solver", "order"), [("adams", 5.0), ("adams3", 2.0)])
def test_states_between_the_first_nodes_of_a_multistep_method_are_accurate(solver: str, order: float) -> None:
    """At fixed fractions of the first steps: `adams` is started in its order, the order of `adams3` rises from one."""
    x, errors = randn(8, 2), []
    for steps in (32, 64):
        times = [0.0, *(fraction / steps for fraction in (0.4, 1.5, 2.6, 3.3)), 1.0]
        found, exact = (
            solve(pendulum, x, solver=name, steps=n, times=times).path for name, n in ((solver, steps), ("rk4", 1000))
        )
        assert found is not None and exact is not None
        errors.append((found - exact)[1:-1].flatten(1).norm(dim=1))
    assert (errors[0] / errors[1]).log2().min() > order - 0.5


@pytest.mark.parametrize("solver", SOLVERS)
def test_output_times_on_nodes_change_no_evaluation(solver: str) -> None:
    x = randn(3, 2)
    saved = solve(pendulum, x, solver=solver, steps=8, save=True)
    given = solve(pendulum, x, solver=solver, steps=8, times=torch.linspace(0, 1, 9))
    assert saved.path is not None and given.path is not None and given.t is not None
    close(given.path, saved.path, tolerance=1e-12)
    assert given.nfe == saved.nfe and given.t.dtype == torch.float64
    assert solve(pendulum, x, solver="adams", steps=8, times=[0.0, 0.3, 0.31, 1.0]).nfe == 15  # as without


def test_output_times_need_no_grid_of_their_interval() -> None:
    x = randn(3, 2)
    times = [0.9, 0.7, 0.2]
    solution = solve(pendulum, x, times=times, solver="rk4", steps=5, grid=Power(2))
    assert solution.path is not None
    for t, state in zip(times, solution.path, strict=True):
        exact = solve(pendulum, x, t0=0.9, t1=t, solver="rk4", steps=400).x
        close(state, exact, tolerance=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"times": [0.0]}, "should hold at least two times"),
        ({"times": [0.0, 0.5, 0.5]}, "that increase or decrease"),
        ({"times": [0.0, 0.5, 0.2]}, "that increase or decrease"),
        ({"times": [0.0, math.nan]}, "that increase or decrease"),
        ({"times": [0.0, 1.0], "save": True}, "left out where times is given"),
        ({"times": [0.0, 1.0], "t1": 0.5}, "left out where times is given"),
        ({"times": [0.0, 1.0], "t0": torch.zeros(3)}, "left out where times is given"),
    ],
)
def test_bad_output_times_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(growth, randn(3, 2), **given)


@pytest.mark.parametrize("known", BASHFORTH)
def test_multistep_weights_integrate_polynomials(known: int) -> None:
    """Through the slopes at 1 - known, ..., 0, and at 1 for the corrector, over [0, 1]."""
    for weights, last in ((BASHFORTH[known], 0), (MOULTON[known], 1)):
        nodes = range(1 - known, last + 1)
        for power in range(len(weights)):
            integral = sum(w * node**power for w, node in zip(weights, nodes, strict=True))
            assert integral == pytest.approx(1 / (power + 1))


def test_embedded_method_has_order_four_and_its_own_weights() -> None:
    """The order conditions that are sums over quadrature nodes; those of the fifth order fail."""
    fourth = [b - error for b, error in zip(DORMAND_PRINCE.b, ERROR, strict=True)]
    for power in range(4):
        assert sum(b * c**power for b, c in zip(fourth, DORMAND_PRINCE.c, strict=True)) == pytest.approx(
            1 / (power + 1)
        )
    assert sum(b * c**4 for b, c in zip(fourth, DORMAND_PRINCE.c, strict=True)) != pytest.approx(1 / 5, abs=1e-4)
    for row, c in zip(DORMAND_PRINCE.a, DORMAND_PRINCE.c, strict=True):
        assert sum(row) == pytest.approx(c)


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_path_is_saved_on_the_nodes_of_the_grid(solver: str, grid: TimeGrid) -> None:
    x, nodes = randn(3, 2), torch.tensor(grid.nodes(5), dtype=torch.float64)
    there = solve(pendulum, x, solver=solver, steps=5, grid=grid, save=True)
    back = solve(pendulum, x, t0=1.0, t1=0.0, solver=solver, steps=5, grid=grid, save=True)
    assert there.t is not None and back.t is not None and there.path is not None
    close(there.t, nodes, tolerance=1e-12)
    close(back.t, nodes.flip(0), tolerance=1e-12)
    close(there.path[-1], there.x, tolerance=1e-12)


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_forward_and_backward_rows_share_a_solve(solver: str, grid: TimeGrid) -> None:
    x = randn(3, 2)
    t0 = torch.tensor([0.0, 1.0, 0.9], dtype=torch.float64)
    t1 = torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64)
    together = solve(pendulum, x, t0=t0, t1=t1, solver=solver, steps=6, grid=grid, save=True)
    assert together.t is not None and together.path is not None
    for i in range(3):
        ends = {"t0": float(t0[i]), "t1": float(t1[i])}
        alone = solve(pendulum, x[i : i + 1], **ends, solver=solver, steps=6, grid=grid, save=True)  # type: ignore[arg-type]
        assert alone.t is not None and alone.path is not None
        close(together.path[:, i : i + 1], alone.path, tolerance=1e-12)
        close(together.t[:, i], alone.t, tolerance=1e-12)


@pytest.mark.parametrize("solver", ORDERS)
def test_every_grid_of_equal_steps_is_the_uniform_one(solver: str) -> None:
    x = randn(3, 2)
    nodes = Nodes([0.0, 0.25, 0.5, 0.75, 1.0])
    for grid, steps in ((nodes, 4), (Warped(0.0), 20), (Power(1), 20)):
        expected = solve(pendulum, x, solver=solver, steps=steps).x
        close(solve(pendulum, x, solver=solver, steps=steps, grid=grid).x, expected, tolerance=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_known_solution(solver: str) -> None:
    x = torch.ones(3, 1, 2, dtype=torch.float64)
    end = solve(growth, x, solver=solver, steps=400).x
    torch.testing.assert_close(end, x * math.exp(math.sin(1)), rtol=2e-3 if solver == "euler" else 1e-5, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_sample_has_its_own_interval(solver: str) -> None:
    x = randn(5, 2)
    t0 = torch.tensor([0.0, 0.2, 1.0, 0.5, 0.3], dtype=torch.float64)
    t1 = torch.tensor([1.0, 0.9, 0.1, 0.5, 0.31], dtype=torch.float64)
    together = solve(pendulum, x, t0=t0, t1=t1, solver=solver, steps=7, rtol=1e-9, atol=1e-9).x
    for i in range(5):
        start, end = float(t0[i]), float(t1[i])
        alone = solve(pendulum, x[i : i + 1], t0=start, t1=end, solver=solver, steps=7, rtol=1e-9, atol=1e-9).x
        close(together[i : i + 1], alone, 1e-8 if solver == "dopri5" else 1e-12)
    close(together[3], x[3], tolerance=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_ends_may_mix_floats_scalars_and_batches(solver: str) -> None:
    x, half = randn(3, 2), torch.tensor(0.5, dtype=torch.float64)
    expected = solve(pendulum, x, t0=0.0, t1=0.5, solver=solver, steps=4).x
    for t0, t1 in ((0, half), (half * 0, 0.5), (0.0, half.expand(3)), (torch.zeros(3), half)):
        close(solve(pendulum, x, t0=t0, t1=t1, solver=solver, steps=4).x, expected, tolerance=1e-12)


@pytest.mark.parametrize("solver", [*ORDERS, "dopri5_per_sample"])
def test_result_does_not_depend_on_the_batch(solver: str) -> None:
    x = randn(64, 2)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    together = solve(pendulum, x, solver=solver).x
    close(solve(pendulum, x[order], solver=solver).x, together[order], tolerance=1e-12)
    close(solve(pendulum, x[:1], solver=solver).x, together[:1], tolerance=1e-12)


def test_each_row_takes_the_steps_it_needs() -> None:
    rate = torch.tensor([[1.0], [1.0], [200.0]], dtype=torch.float64)

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        return -cond * (x - torch.sin(8 * expand_time(t, x)))

    x = torch.ones(3, 1, dtype=torch.float64)
    solution = solve(field, x, cond=rate, solver="dopri5_per_sample")
    alone = solve(field, x[2:], cond=rate[2:], solver="dopri5_per_sample")
    assert isinstance(solution.accepted, Tensor) and isinstance(solution.rejected, Tensor)
    assert solution.accepted[0] == solution.accepted[1] < solution.accepted[2] / 4
    assert isinstance(alone.accepted, Tensor) and isinstance(alone.rejected, Tensor)
    assert (solution.accepted[2], solution.rejected[2]) == (alone.accepted[0], alone.rejected[0])
    assert alone.nfe == 2 + 6 * (alone.accepted[0] + alone.rejected[0]) == solution.nfe
    shared = solve(field, x, cond=rate, solver="dopri5")
    assert isinstance(shared.accepted, int) and isinstance(shared.rejected, int)
    assert shared.nfe == 2 + 6 * (shared.accepted + shared.rejected)


def test_only_rows_that_are_not_there_yet_meet_the_field() -> None:
    sizes: list[int] = []

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None and len(cond) == len(x) == len(torch.as_tensor(t))
        sizes.append(len(x))
        return -cond * x

    cond = torch.tensor([[1.0], [50.0], [0.0]], dtype=torch.float64)
    x = solve(field, torch.ones(3, 1, dtype=torch.float64), cond=cond, solver="dopri5_per_sample").x
    close(x, (-cond).exp(), 1e-4)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 3 and sizes[-1] == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_empty_batch(solver: str) -> None:
    solution = solve(pendulum, randn(0, 2), solver=solver, steps=3, save=True)
    assert solution.x.shape == (0, 2) and solution.path is not None and solution.path.shape == (4, 0, 2)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_stiff_sample_is_not_diluted_by_easy_ones(solver: str) -> None:
    rate = torch.ones(4096, 1, dtype=torch.float64)
    rate[0] = 200.0

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        return -cond * (x - torch.sin(8 * expand_time(t, x)))

    errors = []
    for n in (1, 16, 4096):
        x, cond = torch.ones(n, 1, dtype=torch.float64), rate[:n]
        exact = solve(field, x[:1], cond=cond[:1], solver="rk4", steps=4000).x
        end = solve(field, x, cond=cond, solver=solver, rtol=1e-3, atol=1e-3).x
        errors.append(float((end[0] - exact[0]).abs()))
    assert max(errors) < 3e-3


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_adaptive_error_follows_the_tolerance(solver: str) -> None:
    x = randn(16, 2)
    exact = solve(pendulum, x, solver="rk4", steps=2000).x
    for tolerance in (1e-3, 1e-5, 1e-7):
        solution = solve(pendulum, x, solver=solver, rtol=tolerance, atol=tolerance)
        assert (solution.x - exact).abs().max() < 30 * tolerance
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

    solution = solve(field, randn(4, 2), t0=t0, t1=t1, solver=solver, steps=3)
    assert torch.isfinite(solution.x).all()
    assert min(s.min() for s in seen) >= 0 and max(s.max() for s in seen) <= 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted(solver: str) -> None:
    calls = 0

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += 1
        return -x

    solution = solve(field, randn(3, 2), solver=solver, steps=5)
    assert solution.nfe == calls == EVALUATIONS.get(solver, calls)
    assert solution.status == "finished"
    assert (solution.accepted is None) == (solution.rejected is None) == (solver in ORDERS)


@pytest.mark.parametrize("solver", SOLVERS)
def test_saved_path_holds_the_states_at_its_times(solver: str) -> None:
    x, t1 = randn(3, 2), torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    tight = {"rtol": 1e-9, "atol": 1e-9}
    for end in (0.8, t1):
        solution = solve(pendulum, x, t1=end, solver=solver, steps=4, save=True, **tight)  # type: ignore[arg-type]
        assert solution.path is not None and solution.t is not None
        assert solution.path.shape == (5, 3, 2) and solution.t.shape == ((5,) if end is not t1 else (5, 3))
        close(solution.path[0], x, tolerance=1e-12)
        close(solution.path[-1], solution.x, tolerance=1e-12)
        close(solution.t[-1], torch.as_tensor(end, dtype=torch.float64), tolerance=1e-12)
        partly = solve(pendulum, x, t1=solution.t[2], solver=solver, steps=2, **tight)  # type: ignore[arg-type]
        close(partly.x, solution.path[2], 1e-8)
    unsaved = solve(pendulum, x, solver=solver)
    assert unsaved.path is None and unsaved.t is None


@pytest.mark.parametrize("solver", SOLVERS)
def test_condition_reaches_the_field_by_row(solver: str) -> None:
    x, cond = randn(3, 2), torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    end = solve(lambda t, x, cond: cond.expand_as(x), x, cond=cond, solver=solver, steps=3).x
    close(end, x + cond, tolerance=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_condition_may_be_a_mapping(solver: str) -> None:
    x, cond = randn(3, 2), {"label": torch.tensor([0, 3, 9]), "rate": randn(3, 1, seed=1)}

    def field(t: Time, x: Tensor, cond: Any) -> Tensor:
        assert len(cond["label"]) == len(cond["rate"]) == len(x)
        return (cond["label"][:, None] + cond["rate"]).expand_as(x)

    end = solve(field, x, cond=cond, solver=solver, steps=3).x
    close(end, x + cond["label"][:, None] + cond["rate"], tolerance=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_reach_the_start_and_the_parameters(solver: str) -> None:
    x = randn(3, 2).requires_grad_()
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
        solve(field, randn(3, 2), solver=solver)


def test_error_counts_the_samples_and_can_be_switched_off() -> None:
    x = randn(3, 2)
    x[1] = math.nan
    with pytest.raises(SolverError, match="in 1 of 3 samples"):
        solve(growth, x)
    unchecked = solve(growth, x, check=False)
    assert unchecked.x[1].isnan().all() and unchecked.status == "unchecked"


def test_a_row_that_fails_takes_no_other_with_it() -> None:
    x = randn(3, 2)
    x[1] = math.nan
    with pytest.raises(SolverError, match=r"in 1 of 3 samples \(steps vanished\)"):
        solve(pendulum, x, solver="dopri5_per_sample")
    solution = solve(pendulum, x, solver="dopri5_per_sample", check=False, save=True, steps=4)
    assert solution.status == "steps vanished" and solution.path is not None
    assert solution.x[1].isnan().all() and solution.path[1:, 1].isnan().all()
    close(
        solution.x[[0, 2]],
        solve(pendulum, x[[0, 2]], solver="dopri5_per_sample", save=True, steps=4).x,
        tolerance=1e-12,
    )


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_hopeless_tolerance_is_an_error(solver: str) -> None:
    with pytest.raises(SolverError, match="raise max_steps=100"):
        solve(pendulum, randn(2, 2), solver=solver, rtol=1e-30, atol=1e-30, max_steps=100)


def test_budget_of_steps_is_that_of_a_row_and_an_interval() -> None:
    x = randn(2, 2)
    needed = solve(pendulum, x, solver="dopri5_per_sample")
    assert isinstance(needed.accepted, Tensor) and isinstance(needed.rejected, Tensor)
    most = int((needed.accepted + needed.rejected).max())
    assert solve(pendulum, x, solver="dopri5_per_sample", max_steps=most).status == "finished"
    solution = solve(pendulum, x, solver="dopri5_per_sample", max_steps=most - 1, check=False)
    assert solution.status == "out of steps" and solution.x.isnan().any()
    solve(pendulum, x, solver="dopri5_per_sample", max_steps=most - 1, save=True, steps=4)


def test_a_first_step_into_nan_is_tried_again() -> None:
    """A field that is only defined near the path: the root of a negative number is NaN."""
    x = torch.full((1, 1), 4.0, dtype=torch.float64)
    end = solve(lambda t, x, cond: -6 * x.sqrt() * x, x, t1=20.0, solver="dopri5_per_sample").x
    close(end, torch.full((1, 1), 1 / (0.5 + 60) ** 2, dtype=torch.float64), 1e-4)


def test_rows_step_alike_for_any_event_shape() -> None:
    field = MLPField(4, (16,), generator=torch.Generator().manual_seed(0)).double()
    x = randn(5, 4)

    def image(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return field(t, x.flatten(1), cond).reshape(x.shape)

    flat = solve(field, x, solver="dopri5_per_sample").x
    close(solve(image, x.reshape(5, 2, 1, 2), solver="dopri5_per_sample").x.flatten(1), flat, tolerance=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: solve(growth, x, solver="rk5"), "solver is 'rk5'"),
        (lambda x: solve(growth, x, steps=0), "steps is 0"),
        (lambda x: solve(growth, x, max_steps=0), "max_steps is 0"),
        (
            lambda x: solve(growth, x, solver="dopri5", grid=Warped(0.5)),
            r"grid is Warped\(p=0.5\).*call solve\(\.\.\., times=\)",
        ),
        (lambda x: solve(growth, x, t1=torch.ones(3, 1)), r"t has shape \(3, 1\)"),
        (lambda x: solve(growth, x, t0=torch.ones(2)), r"t has shape \(2,\)"),
        (lambda x: solve(lambda t, x, cond: x[:, :1], x), "the result of field has shape"),
        (lambda x: solve(growth, x[0, 0]), "x has no dimensions"),
        (lambda x: solve(growth, x.long()), "x has dtype torch.int64, but should be of a floating-point dtype"),
        (lambda x: solve(lambda t, x: x, x), "let it take a third one"),  # type: ignore[arg-type]
        (lambda x: solve(lambda x, t, cond: x, x), "t comes first"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(randn(3, 2))


def test_misspelt_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        solve(growth, randn(3, 2), step_size=0.1)  # type: ignore[call-arg]


@pytest.mark.parametrize(("rtol", "atol"), [(-1.0, 1e-5), (1e-5, math.nan), (math.inf, 0.0), (0.0, 0.0)])
def test_tolerances_without_meaning_are_refused(rtol: float, atol: float) -> None:
    with pytest.raises(ValueError, match="tol"):
        solve(lambda t, x, cond: -x, torch.ones(1, 1), solver="dopri5", rtol=rtol, atol=atol)
