"""Laws of the probability paths, on every path, in float64."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jvp

from flowmatch_core.paths import AffinePath, CondOT, Cosine, Quantity
from flowmatch_core.solvers import solve

PATHS = [CondOT(), CondOT(sigma_min=0.1), Cosine()]
ENDS_IN_DATA = [CondOT(), Cosine()]
QUANTITIES = get_args(Quantity)

pytestmark = pytest.mark.parametrize("path", PATHS, ids=repr)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_truth(path: AffinePath, t: float, x: Tensor, mean: float = 0.7, std: float = 0.6) -> dict[str, Tensor]:
    """The four quantities at `(t, x)` for data N(mean, std^2), by Gaussian conditioning."""
    a, s, da, ds = (f(t) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    precision = 1 / (a**2 * std**2 + s**2)
    residual = (x - a * mean) * precision
    data, noise = mean + a * std**2 * residual, s * residual
    return {"data": data, "noise": noise, "score": -residual, "velocity": da * data + ds * noise}


def determined(path: AffinePath, t: float, source: str, target: str) -> bool:
    if source == target:
        return True
    if t == 0 and source in ("noise", "score"):
        return target not in ("data", "velocity")
    return not (t == 1 and path in ENDS_IN_DATA and target == "score")


def test_derivatives_are_those_of_autograd(path: AffinePath) -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        _, expected = jvp(value, t, torch.ones_like(t))  # type: ignore[no-untyped-call]
        torch.testing.assert_close(derivative(t), expected)


def test_starts_in_noise_and_ends_in_data_exactly(path: AffinePath) -> None:
    sigma_min = path.sigma_min if isinstance(path, CondOT) else 0.0
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([0.0, 1.0], dtype=dtype)
        assert path.alpha(ends).tolist() == [0.0, 1.0]
        assert path.sigma(ends).tolist() == pytest.approx([1.0, sigma_min])
        assert sigma_min or path.sigma(ends)[1] == 0


def test_float_scalar_and_batch_times_agree(path: AffinePath) -> None:
    x0, x1 = randn(4, 3), randn(4, 3, seed=1)
    expected = path.sample(x0, x1, torch.full((4,), 0.3, dtype=torch.float64))
    for t in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        sample = path.sample(x0, x1, t)
        torch.testing.assert_close(sample.x_t, expected.x_t, rtol=0, atol=0)
        torch.testing.assert_close(sample.velocity, expected.velocity, rtol=0, atol=0)
    assert path.sample(x0.float(), x1.float(), 0.3).x_t.dtype == torch.float32


def test_sampled_velocity_is_the_derivative_of_the_sampled_point(path: AffinePath) -> None:
    x0, x1, t = randn(5, 2, 2), randn(5, 2, 2, seed=1), torch.linspace(0, 1, 5, dtype=torch.float64)
    along = torch.ones_like(t)
    x_t, velocity = jvp(lambda t: path.sample(x0, x1, t).x_t, t, along)  # type: ignore[no-untyped-call]
    sample = path.sample(x0, x1, t)
    torch.testing.assert_close(sample.x_t, x_t)
    torch.testing.assert_close(sample.velocity, velocity)


def test_time_goes_with_the_batch_even_if_the_event_is_as_wide(path: AffinePath) -> None:
    x0, x1, t = randn(3, 3), randn(3, 3, seed=1), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    together = path.sample(x0, x1, t)
    converted = path.convert(together.velocity, t, together.x_t, "velocity", "data")
    for i, time in enumerate(t.tolist()):
        alone = path.sample(x0[i : i + 1], x1[i : i + 1], time)
        torch.testing.assert_close(together.x_t[i : i + 1], alone.x_t)
        torch.testing.assert_close(together.velocity[i : i + 1], alone.velocity)
    torch.testing.assert_close(converted, x1)


def test_conditional_velocity_generates_the_path(path: AffinePath) -> None:
    x0, x1 = randn(6, 2), randn(6, 2, seed=1)
    t1 = torch.linspace(0.1, 0.95, 6, dtype=torch.float64)
    end = solve(lambda t, x, cond: path.conditional_velocity(t, x, x1), x0, t1=t1, solver="rk4", steps=200).x
    torch.testing.assert_close(end, path.sample(x0, x1, t1).x_t, rtol=0, atol=1e-6)


def test_conditional_velocity_along_the_path_is_the_sampled_one(path: AffinePath) -> None:
    x0, x1, t = randn(6, 2), randn(6, 2, seed=1), torch.linspace(0, 0.99, 6, dtype=torch.float64)
    sample = path.sample(x0, x1, t)
    torch.testing.assert_close(path.conditional_velocity(t, sample.x_t, x1), sample.velocity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conditional_velocity_is_finite_at_the_end(path: AffinePath, dtype: torch.dtype) -> None:
    x0, x1 = randn(3, 2).to(dtype), randn(3, 2, seed=1).to(dtype)
    x = path.sample(x0, x1, 1.0).x_t.requires_grad_()
    velocity = path.conditional_velocity(torch.tensor([0.0, 0.5, 1.0], dtype=dtype), x, x1)
    assert torch.isfinite(velocity).all()
    if path in ENDS_IN_DATA:
        torch.testing.assert_close(velocity[2], path.d_alpha(1.0) * x1[2], check_dtype=False)
    (gradient,) = torch.autograd.grad(velocity.sum(), x)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("t", [0.0, 1e-3, 0.4, 1 - 1e-3, 1.0])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(QUANTITIES, QUANTITIES)))
def test_conversions_match_a_gaussian(path: AffinePath, t: float, source: Quantity, target: Quantity) -> None:
    x = randn(50, 1)
    truth = gaussian_truth(path, t, x)
    result = path.convert(truth[source], t, x, source=source, target=target)
    if determined(path, t, source, target):
        torch.testing.assert_close(result, truth[target], rtol=1e-6, atol=1e-7)
    else:
        assert result.isnan().all()


def test_round_trips_return(path: AffinePath) -> None:
    x, value = randn(20, 2), randn(20, 2, seed=1)
    t = torch.linspace(0.02, 0.98, 20, dtype=torch.float64)
    for source, target in itertools.permutations(QUANTITIES, 2):
        there = path.convert(value, t, x, source, target)
        torch.testing.assert_close(path.convert(there, t, x, target, source), value)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(10)
    there = path.convert(x, ends, x, "velocity", "data")
    assert torch.isfinite(there).all() and torch.isfinite(path.convert(x, ends, x, "velocity", "noise")).all()


def test_an_end_in_the_batch_spoils_no_other_gradient(path: AffinePath) -> None:
    x, t = randn(3, 2), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    value = randn(3, 2, seed=1).requires_grad_()
    for source, target in itertools.permutations(QUANTITIES, 2):
        (gradient,) = torch.autograd.grad(path.convert(value, t, x, source, target)[1].sum(), value)
        assert torch.isfinite(gradient).all(), (source, target)


def test_bad_arguments_are_named(path: AffinePath) -> None:
    x = randn(3, 2)
    with pytest.raises(ValueError, match=r"t has shape \(3, 1\)"):
        path.sample(x, x, torch.rand(3, 1))
    with pytest.raises(ValueError, match=r"t has shape \(2,\)"):
        path.sample(x, x, torch.rand(2))
    with pytest.raises(ValueError, match="x0 has shape"):
        path.sample(x[:, :1], x, 0.5)
    with pytest.raises(ValueError, match="source is 'flow'"):
        path.convert(x, 0.5, x, source="flow", target="score")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="value has shape"):
        path.convert(x[:1], 0.5, x, source="velocity", target="score")
    with pytest.raises(TypeError):
        path.sample(x, x, time=0.5)  # type: ignore[call-arg]


def test_sigma_min_is_checked(path: AffinePath) -> None:
    for bad in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="sigma_min is"):
            CondOT(sigma_min=bad)
