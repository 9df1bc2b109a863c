"""A change of schedule of a trained field is the field of the other path."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from flowmatch_core._tensors import expand_time
from flowmatch_core.divergence import divergence
from flowmatch_core.field import Time
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.networks import MLPField
from flowmatch_core.paths import OU, VE, VP, AffinePath, CondOT, Cosine, CustomPath, Polynomial, Rescheduled
from flowmatch_core.solvers import solve
from tests.support.random import randn
from tests.support.truths import overlapping

CUSTOM = CustomPath(lambda t: t * (1 + t) / 2, lambda t: 1 - t**2)
FULL = [CondOT(), Cosine(), Polynomial(n=2.5), CUSTOM]  # from pure noise to pure data
PART = [VP(), OU(horizon=2.0), VE(sigma_min=0.1, sigma_max=10.0), CondOT(sigma_min=0.1)]
PAIRS = list(itertools.product(FULL + PART, repeat=2))


def name(path: AffinePath) -> str:
    return "CustomPath" if path is CUSTOM else repr(path)


every_pair = pytest.mark.parametrize(("trained", "path"), PAIRS, ids=lambda p: name(p))


def reaches(trained: AffinePath, path: AffinePath, t: float) -> bool:
    angle = path.angle(t)
    return bool(trained.angle(0.0) - 1e-12 <= angle <= trained.angle(1.0) + 1e-12)


def faster_at_the_data(trained: AffinePath, path: AffinePath) -> bool:
    """Whether the new path alone is infinitely fast at t = 1; its score is then taken from just before."""
    return bool(path.d_sigma(1.0).isinf() and not trained.d_sigma(1.0).isinf())


@every_pair
def test_it_is_the_marginal_velocity_of_the_other_path(trained: AffinePath, path: AffinePath) -> None:
    truth = overlapping()
    field = Rescheduled(truth.velocity_field(trained), trained, path, mean=truth.mean)
    x = randn(40, 2)
    compared = 0
    for t in (0.0, 1e-4, 0.1, 0.5, 0.9, 1 - 1e-4, 1.0):
        velocity = field(t, x)
        assert torch.isfinite(velocity).all()
        if reaches(trained, path, t):
            expected = truth.velocity(t, x, path)
            tolerance = 3e-3 if t == 1 and faster_at_the_data(trained, path) else 1e-6
            scale = 1e-3 + float(expected.abs().max())
            torch.testing.assert_close(velocity, expected, rtol=tolerance, atol=tolerance * scale)
            compared += 1
    assert compared >= 2


@torch.no_grad()
@pytest.mark.parametrize("path", [VP(), OU(horizon=2.0)], ids=name)
@pytest.mark.parametrize("trained", FULL[:2], ids=name)
def test_likelihoods_along_a_faster_path_converge(trained: AffinePath, path: AffinePath) -> None:
    """The solve begins at t = 1, where the rate of the noise is infinite on the new path alone."""
    truth, x = overlapping(), randn(10, 2)
    field = Rescheduled(truth.velocity_field(trained), trained, path, mean=truth.mean)
    exact = ContinuousFlow(truth.velocity_field(path), (2,), solver="rk4", steps=128).log_prob(x)
    errors = [
        float((ContinuousFlow(field, (2,), solver="rk4", steps=n).log_prob(x) - exact).abs().max()) for n in (16, 32)
    ]
    assert errors[1] < errors[0] / 3, errors


@every_pair
def test_each_row_has_its_own_time(trained: AffinePath, path: AffinePath) -> None:
    truth = overlapping()
    field = Rescheduled(truth.velocity_field(trained), trained, path, mean=truth.mean)
    x, t = randn(5, 2), torch.tensor([0.0, 0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
    together = field(t, x)
    for i, time in enumerate(t.tolist()):
        torch.testing.assert_close(together[i : i + 1], field(time, x[i : i + 1]))


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_solver_meets_finite_values_only(trained: AffinePath, path: AffinePath, dtype: torch.dtype) -> None:
    network = MLPField(2, (8,), generator=torch.Generator().manual_seed(0)).to(dtype)
    field = Rescheduled(network, trained, path)
    x = randn(8, 2).to(dtype)
    with torch.no_grad():
        forward = solve(field, x, solver="rk4", steps=4).x  # at both ends, and raises if not finite
        solve(field, forward, t0=1.0, t1=0.0, solver="rk4", steps=4)
    assert forward.dtype == dtype


@every_pair
def test_divergence_is_in_closed_form(trained: AffinePath, path: AffinePath) -> None:
    network = MLPField(3, (8, 8), generator=torch.Generator().manual_seed(0)).double()
    field = Rescheduled(network, trained, path, mean=torch.ones(3, dtype=torch.float64))
    assert field.has_closed_form_divergence
    x = randn(5, 3)
    for t in (0.0, 0.5, 1.0, torch.linspace(0, 1, 5, dtype=torch.float64)):
        velocity, total = divergence(field, t, x)
        same, expected = divergence(field, t, x, method="exact")
        torch.testing.assert_close(velocity, same)
        torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("path", FULL + PART, ids=name)
def test_the_same_schedule_changes_nothing(path: AffinePath) -> None:
    network = MLPField(2, (8,), generator=torch.Generator().manual_seed(0)).double()
    field = Rescheduled(network, path, path)
    x = randn(9, 2)
    for t in (0.2, 0.5, 0.8, 1.0):
        torch.testing.assert_close(field(t, x), network(t, x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("trained", "path"), itertools.permutations(FULL, 2), ids=lambda p: name(p))
def test_both_ways_return(trained: AffinePath, path: AffinePath) -> None:
    network = MLPField(2, (8,), generator=torch.Generator().manual_seed(0)).double()
    field = Rescheduled(Rescheduled(network, trained, path), path, trained)
    x = randn(9, 2)
    for t in (0.01, 0.5, 0.99):
        torch.testing.assert_close(field(t, x), network(t, x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("trained", "path"), itertools.permutations(FULL[:3], 2), ids=lambda p: name(p))
def test_the_flow_ends_where_the_trained_one_does(trained: AffinePath, path: AffinePath) -> None:
    """Between paths from pure noise to pure data the map from x0 to x1 does not depend on the schedule."""
    truth = overlapping()
    x = randn(16, 2)
    expected = solve(truth.velocity_field(trained), x, solver="rk4", steps=100).x
    field = Rescheduled(truth.velocity_field(trained), trained, path, mean=truth.mean)
    torch.testing.assert_close(solve(field, x, solver="rk4", steps=100).x, expected, rtol=0, atol=1e-5)


class Doubled(AffinePath):
    """A path of twice the size: as fast as VP at the data, and not on the unit circle."""

    def __init__(self, path: AffinePath) -> None:
        self.path = path

    def alpha(self, t: Time) -> Tensor:
        return 2 * self.path.alpha(t)

    def sigma(self, t: Time) -> Tensor:
        return 2 * self.path.sigma(t)

    def d_alpha(self, t: Time) -> Tensor:
        return 2 * self.path.d_alpha(t)

    def d_sigma(self, t: Time) -> Tensor:
        return 2 * self.path.d_sigma(t)

    def sigma_d_sigma(self, t: Time) -> Tensor:
        return 4 * self.path.sigma_d_sigma(t)

    def time_of_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.path.time_of_ratio(alpha, sigma)


@pytest.mark.parametrize(("trained", "path"), [(VP(), Doubled(OU())), (Doubled(OU()), VP())], ids=["to", "from"])
def test_between_paths_that_are_infinitely_fast_at_the_data(trained: AffinePath, path: AffinePath) -> None:
    truth, x = overlapping(), randn(40, 2)
    field = Rescheduled(truth.velocity_field(trained), trained, path, mean=truth.mean)
    for t in (0.5, 1 - 1e-6, 1.0):
        torch.testing.assert_close(field(t, x), truth.velocity(t, x, path), rtol=1e-6, atol=1e-8)


def test_a_trained_flow_is_sampled_along_ve_from_its_wider_source() -> None:
    truth, path = overlapping(), VE(sigma_min=0.01, sigma_max=20.0)
    field = Rescheduled(truth.velocity_field(), CondOT(), path, mean=truth.mean)
    x0 = randn(40, 2)
    end = solve(field, float(path.sigma(0.0)) * x0, solver="rk4", steps=150).x
    along = solve(truth.velocity_field(path), float(path.sigma(0.0)) * x0, solver="rk4", steps=150).x
    torch.testing.assert_close(end, along, rtol=0, atol=1e-4)
    assert float((end - solve(truth.velocity_field(), x0, solver="rk4", steps=200).x).abs().max()) < 0.2


def test_without_a_mean_the_data_are_centred() -> None:
    """A polynomial start tells nothing of the data; what Rescheduled then takes for them is their mean."""
    x = randn(6, 2)
    mean = torch.tensor([3.0, -1.0], dtype=torch.float64)

    def at_rest(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)

    with_mean = Rescheduled(at_rest, Polynomial(n=2.0), CondOT(), mean=mean)(0.0, x)
    torch.testing.assert_close(with_mean, mean - x)
    torch.testing.assert_close(Rescheduled(at_rest, Polynomial(n=2.0), CondOT())(0.0, x), -x)


def test_the_condition_reaches_the_field_and_the_time_is_that_of_the_angle() -> None:
    seen: list[Tensor | Time | None] = []

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        seen.extend([t, cond])
        return x

    x, cond = randn(2, 1), torch.ones(2, 1)
    Rescheduled(field, CondOT(), Cosine())(0.5, x, cond)
    assert expand_time(seen[0], x) == pytest.approx(0.5)  # type: ignore[arg-type]
    assert seen[1] is cond
    Rescheduled(field, CondOT(), Cosine())(0.25, x)
    tangent = math.tan(math.pi / 8)
    assert expand_time(seen[2], x) == pytest.approx(tangent / (1 + tangent))  # type: ignore[arg-type]
