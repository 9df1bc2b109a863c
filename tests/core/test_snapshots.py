"""Laws of flow matching across snapshots: its chains, its splines and the flows that minimise its loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from flowmatch_core.couplings import ConditionalOT, Independent, IndexCoupling, MinibatchOT, Reflow, Sinkhorn
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.objectives import Spline, cfm_loss, draw_snapshots, snapshot_cfm_loss
from flowmatch_core.paths import CondOT
from flowmatch_core.solvers import solve
from tests.support.checks import BOUND, close
from tests.support.random import generator, randn, tensor

TIMES = (-1.0, 0.5, 1.0, 4.0)
MEANS, SCALES = tensor(0.0, 2.0, -1.0, 3.0), tensor(1.0, 0.5, 1.5, 0.8)
degrees = pytest.mark.parametrize("degree", [1, 3])


# --- splines ---------------------------------------------------------------------------------------------------------


def curve(points: Tensor, degree: int) -> Callable[[Tensor], Tensor]:
    if degree == 3:
        spline = CubicSpline(TIMES, points.numpy(), axis=1, bc_type="natural")
        return lambda t: torch.from_numpy(np.stack([spline(float(s))[i] for i, s in enumerate(t)]))
    flat = points.reshape(*points.shape[:2], -1)

    def linear(t: Tensor) -> Tensor:
        rows = [[np.interp(s, TIMES, flat[i, :, j]) for j in range(flat.shape[2])] for i, s in enumerate(t.tolist())]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(t), *points.shape[2:])

    return linear


@degrees
@pytest.mark.parametrize("event", [(2,), (1, 2, 3), ()])
def test_a_spline_is_that_of_scipy_and_its_velocity_that_of_autograd(degree: int, event: tuple[int, ...]) -> None:
    points, t = randn(40, 4, *event), 5 * torch.rand(40, generator=generator(), dtype=torch.float64) - 1
    spline = Spline(TIMES, degree)
    x_t, velocity = spline.sample(points, t)
    close(x_t, curve(points, degree)(t))
    derivative = torch.func.jvp(lambda t: spline.sample(points, t)[0], (t,), (torch.ones_like(t),))[1]
    close(velocity, derivative)


@degrees
def test_a_spline_passes_through_its_points(degree: int) -> None:
    points = randn(6, 4, 2)
    for k, time in enumerate(TIMES):
        for dtype in (torch.float32, torch.float64):
            t = torch.full((6,), time, dtype=dtype)
            close(Spline(TIMES, degree).sample(points.to(dtype), t)[0], points[:, k].to(dtype), 1e-6)


def test_between_two_points_both_splines_are_the_line() -> None:
    points, t = randn(5, 2, 3), torch.rand(5, generator=generator(), dtype=torch.float64)
    for degree in (1, 3):
        x_t, velocity = Spline((0.0, 1.0), degree).sample(points, t)
        close(x_t, points[:, 0].lerp(points[:, 1], t[:, None]))
        close(velocity, points[:, 1] - points[:, 0])


# --- chains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", [MinibatchOT(), ConditionalOT(), Sinkhorn(0.3), Independent()], ids=repr)
def test_consecutive_indices_of_a_chain_are_pairs(coupling: IndexCoupling) -> None:
    batches, cond = list(randn(4, 30, 2)), torch.arange(30) % 3
    chain = coupling.chain(batches, cond, generator=generator())
    g = generator()
    assert chain[-1].tolist() == list(range(30))
    for k in (2, 1, 0):
        i0, i1 = coupling.pairs(batches[k], batches[k + 1], cond, generator=g)
        pairs = dict(zip(i1.tolist(), i0.tolist(), strict=True))
        assert [pairs[j] for j in chain[k + 1].tolist()] == chain[k].tolist()
    if isinstance(coupling, ConditionalOT):
        assert all((cond[index] == cond).all() for index in chain)


def test_a_chain_draws_each_row_once_on_average() -> None:
    batches = list(randn(3, 40, 1))
    counts = torch.zeros(3, 40)
    for seed in range(200):
        chain = Sinkhorn(0.5).chain(batches, generator=generator(seed))
        counts += torch.stack([torch.bincount(index, minlength=40) for index in chain]) / 200
    close(counts[-1], torch.ones(40), 1e-5)
    assert float((counts - 1).abs().max()) < 0.35
    assert float((counts[0] - 1).abs().max()) > 0.01  # drawn, not permuted


# --- the loss --------------------------------------------------------------------------------------------------------


@degrees
@pytest.mark.parametrize("coupling", [MinibatchOT(), Sinkhorn(0.5), Independent()], ids=repr)
def test_with_two_snapshots_it_is_the_loss_of_flow_matching(coupling: IndexCoupling, degree: int) -> None:
    x0, x1 = randn(2, 50, 2)

    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        assert isinstance(t, Tensor)
        return torch.sin(x) + t[:, None]

    ours = snapshot_cfm_loss(field, [x0, x1], (0, 1), degree=degree, coupling=coupling, generator=generator())
    close(ours, cfm_loss(field, CondOT(), x1, x0, coupling=coupling, generator=generator()))


def gaussian_field(degree: int, joint: bool) -> VelocityField:
    """The exact field of Gaussian snapshots: monotone chains (`joint`), or independent ones."""
    spline = Spline(TIMES, degree)

    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        times = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        weights = torch.eye(4, dtype=x.dtype).expand(len(x), 4, 4)
        w, rate = spline.sample(weights, times)
        mean, drift = (w @ MEANS)[:, None], (rate @ MEANS)[:, None]
        # x_t = mean + sum_k w_k s_k z_k with one z for all k, or one for each
        growth = (rate @ SCALES) / (w @ SCALES) if joint else (w * rate) @ SCALES**2 / (w**2 @ SCALES**2)
        return drift + growth[:, None] * (x - mean)

    return field


@degrees
def test_the_loss_of_the_exact_field_of_monotone_chains_is_zero(degree: int) -> None:
    z, g = randn(200, 1), generator(1)
    snapshots = [m + s * z[torch.randperm(200, generator=g)] for m, s in zip(MEANS, SCALES, strict=True)]
    exact = gaussian_field(degree, joint=True)

    def loss(field: VelocityField) -> float:
        return float(snapshot_cfm_loss(field, snapshots, TIMES, degree=degree, generator=generator()))

    assert loss(exact) < 1e-20 < 1e-3 < loss(lambda t, x, cond: exact(t, x, cond) + 0.1 * x)
    assert loss(gaussian_field(4 - degree, joint=True)) > 0.1  # the other spline


@degrees
def test_the_exact_field_of_independent_chains_minimises_the_loss(degree: int) -> None:
    def z_scores(field: VelocityField) -> Tensor:
        gradients = []
        for seed in range(40):
            snapshots = list(MEANS[:, None, None] + SCALES[:, None, None] * randn(4, 500, 1, seed=1000 + seed))
            theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)

            def probed(t: Time, x: Tensor, cond: Tensor | None, theta: Tensor = theta) -> Tensor:
                assert isinstance(t, Tensor)
                phi = torch.stack([torch.ones_like(t), t, x[:, 0], t * x[:, 0]], 1)
                return field(t, x, cond) + (phi @ theta)[:, None]

            loss = snapshot_cfm_loss(
                probed, snapshots, TIMES, degree=degree, coupling=Independent(), generator=generator(seed)
            )
            gradients.append(torch.autograd.grad(loss, theta)[0])
        rows = torch.stack(gradients)
        return rows.mean(0) / (rows.std(0) / math.sqrt(len(rows)))

    exact = gaussian_field(degree, joint=False)
    assert float(z_scores(exact).abs().max()) < BOUND
    assert float(z_scores(lambda t, x, cond: exact(t, x, cond) + 0.1 * x).abs().max()) > 2 * BOUND


@degrees
@pytest.mark.parametrize("joint", [True, False])
def test_the_exact_field_carries_any_snapshot_to_any_other(degree: int, joint: bool) -> None:
    z, field = randn(300, 1), gaussian_field(degree, joint)
    for a, b in ((0, 1), (1, 3), (3, 0), (2, 1)):
        x, step = MEANS[a] + SCALES[a] * z, 1 if b > a else -1
        for k in range(a, b, step):  # midpoint never evaluates the ends of a piece, where straight ones bend
            x = solve(field, x, t0=TIMES[k], t1=TIMES[k + step], solver="midpoint", steps=80).x
        close(x, MEANS[b] + SCALES[b] * z, 5e-3)


def test_a_trained_field_has_the_law_of_every_snapshot() -> None:
    """A field that is linear in x on each piece, fitted by least squares to the target of the loss."""
    snapshots = [m + s * randn(4000, 1, seed=k) for k, (m, s) in enumerate(zip(MEANS, SCALES, strict=True))]
    knots = torch.linspace(TIMES[0], TIMES[-1], 41, dtype=torch.float64)
    theta = torch.zeros(82, dtype=torch.float64)

    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        times = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        hats = (1 - (times[:, None] - knots).abs() / (knots[1] - knots[0])).clamp(min=0)
        return (torch.cat([hats, hats * x], 1) @ theta)[:, None]

    def loss(given: Tensor) -> Tensor:
        nonlocal theta
        theta = given
        return snapshot_cfm_loss(field, snapshots, TIMES, degree=3, coupling=Sorted(), generator=generator())

    gradient = torch.autograd.functional.jacobian(loss, theta)  # type: ignore[no-untyped-call]
    hessian = torch.autograd.functional.hessian(loss, theta)  # type: ignore[no-untyped-call]
    theta = -torch.linalg.solve(hessian, gradient)
    with torch.no_grad():
        for k in (1, 2, 3):
            end = solve(field, snapshots[0], t0=TIMES[0], t1=TIMES[k], solver="rk4", steps=50).x
            assert float(end.mean()) == pytest.approx(float(MEANS[k]), abs=0.1)
            assert float(end.std()) == pytest.approx(float(SCALES[k]), abs=0.1)


class Sorted(IndexCoupling):
    """Optimal transport on the line."""

    def partners(
        self, x0: Tensor, x1: Tensor, cond: object = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        return x0[:, 0].argsort()[x1[:, 0].argsort().argsort()]


def test_conditions_stay_with_their_chains() -> None:
    cond = torch.arange(60) % 2
    snapshots = [randn(60, 2, seed=k) + 100 * cond[:, None] for k in range(2)] + [randn(60, 2, seed=2)]

    def field(t: Time, x: Tensor, given: object) -> Tensor:
        assert given is cond
        assert isinstance(t, Tensor)
        labels = x.mean(1) > 50 * (2 - t)  # the classes meet in the last snapshot
        assert labels[t < 1.9].equal(cond[t < 1.9] == 1)  # no chain leaves its label
        return torch.zeros_like(x)

    snapshot_cfm_loss(field, snapshots, (0.0, 1.0, 2.0), cond, generator=generator())
    with pytest.raises(AssertionError):
        snapshot_cfm_loss(field, snapshots, (0.0, 1.0, 2.0), cond, coupling=MinibatchOT(), generator=generator())


def test_the_loss_is_linear_in_the_weights() -> None:
    snapshots, weight = list(randn(3, 20, 2)), torch.rand(20, generator=generator(), dtype=torch.float64)

    def loss(weight: Tensor | None) -> Tensor:
        return snapshot_cfm_loss(lambda t, x, cond: x, snapshots, (0, 1, 2), weight=weight, generator=generator())

    close(loss(torch.ones(20, dtype=torch.float64)), loss(None))
    close(loss(3 * weight), 3 * loss(weight))
    each = torch.stack([loss(row) for row in torch.eye(20, dtype=torch.float64)])
    close(loss(weight), weight @ each)


def test_batches_are_drawn_from_each_snapshot_alone() -> None:
    snapshots = [torch.arange(5.0)[:, None], 10 + torch.arange(900.0)[:, None]]
    first, second = draw_snapshots(snapshots, 4000, generator())
    assert set(first.flatten().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert float(first.mean()) == pytest.approx(2, abs=0.1) and float(second.mean()) == pytest.approx(459.5, abs=20)
    assert torch.equal(first, draw_snapshots(snapshots, 4000, generator())[0])


def test_bad_arguments_are_named() -> None:
    x = list(randn(3, 6, 2))

    def zero(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return torch.zeros_like(x)

    for times in ((0.0,), (0.0, 1.0, 1.0), (0.0, math.nan, 2.0)):
        with pytest.raises(ValueError, match=r"times is \(.*\), but should be two or more increasing numbers"):
            snapshot_cfm_loss(zero, x, times)
    with pytest.raises(ValueError, match="degree is 2, but should be 1 or 3"):
        snapshot_cfm_loss(zero, x, (0, 1, 2), degree=2)
    with pytest.raises(ValueError, match="snapshots holds 3 batches, but should hold one for each of"):
        snapshot_cfm_loss(zero, x, (0, 1))
    with pytest.raises(
        ValueError, match=r"snapshots\[1\] has shape \(4, 2\), but should be a batch, by draw_snapshots"
    ):
        snapshot_cfm_loss(zero, [x[0], x[1][:4], x[2]], (0, 1, 2))
    with pytest.raises(ValueError, match=r"snapshots\[0\] has dtype torch.int64, but should be of a floating-point"):
        snapshot_cfm_loss(zero, [x[0].long(), *x[1:]], (0, 1, 2))
    with pytest.raises(ValueError, match="coupling is the class MinibatchOT, but should be an object"):
        snapshot_cfm_loss(zero, x, (0, 1, 2), coupling=MinibatchOT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coupling is a Reflow, but should be an IndexCoupling"):
        snapshot_cfm_loss(zero, x, (0, 1, 2), coupling=Reflow(zero))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight has shape \(5,\)"):
        snapshot_cfm_loss(zero, x, (0, 1, 2), weight=torch.ones(5))
    with pytest.raises(ValueError, match="the result of field has shape"):
        snapshot_cfm_loss(lambda t, x, cond: x[:, :1], x, (0, 1, 2))
    with pytest.raises(ValueError, match=r"points has shape \(6, 2\), but should have shape \(batch, 3, \*event\)"):
        Spline((0, 1, 2)).sample(x[0], torch.zeros(6))
    with pytest.raises(ValueError, match=r"snapshots\[1\] has no rows"):
        draw_snapshots([x[0], x[1][:0]], 3)
    with pytest.raises(ValueError, match="batches holds 1 batch, but should hold two or more"):
        MinibatchOT().chain(x[:1])
