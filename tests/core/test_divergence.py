"""Laws of the divergence, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowmatch_core import _jacobian
from flowmatch_core._tensors import expand_time
from flowmatch_core.divergence import DivergenceMethod, divergence, divergence_per_probe, rademacher
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.networks import MLPField
from flowmatch_core.objectives import nll_loss
from tests.support.random import randn

MATRIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def nonlinear(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    assert cond is not None
    return torch.tanh(x @ MATRIX + expand_time(t, x)) * cond


def convolution() -> VelocityField:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 2, 3, padding=1)).double()
    return lambda t, x, cond: net(x) * (1 + expand_time(t, x))


def trace(field: VelocityField, t: Tensor, x: Tensor, cond: Tensor | None) -> Tensor:
    """The trace of the whole Jacobian, row by row."""
    traces = []
    for i in range(len(x)):
        c = None if cond is None else cond[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(  # type: ignore[no-untyped-call]
            lambda row, i=i, c=c: field(t[i : i + 1], row, c), x[i : i + 1]
        )
        traces.append(jacobian.reshape(x[0].numel(), x[0].numel()).trace())
    return torch.stack(traces)


@pytest.mark.parametrize("event", [(4,), (2, 3, 3)])
@pytest.mark.parametrize("grad", [False, True])
def test_exact_is_the_trace_of_the_jacobian(event: tuple[int, ...], grad: bool) -> None:
    field, cond = (nonlinear, randn(4, 4, seed=1)) if event == (4,) else (convolution(), None)
    x, t = randn(4, *event, seed=1), torch.linspace(0, 1, 4, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        velocity, result = divergence(field, t, x, cond, method="exact")
        torch.testing.assert_close(velocity, field(t, x, cond))
    torch.testing.assert_close(result, trace(field, t, x, cond))


def test_auto_uses_the_closed_form_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(4, 4, seed=1)
    shallow, deep = (MLPField(4, hidden).double() for hidden in ((8, 8), (8, 8, 8)))
    for field in (shallow, deep):
        expected = divergence(field, 0.3, x, method="exact")
        torch.testing.assert_close(divergence(field, 0.3, x), expected)
    with torch.no_grad():
        monkeypatch.setattr(torch.autograd, "grad", None)  # the closed form differentiates nothing
        divergence(shallow, 0.3, x)
        with pytest.raises(TypeError):
            divergence(deep, 0.3, x)


def test_hutchinson_is_unbiased_with_the_known_variance() -> None:
    probes = 40_000
    estimates = divergence(
        lambda t, x, cond: x @ MATRIX.T,
        0.0,
        randn(1, 4, seed=1).expand(probes, 4),
        method="hutchinson",
        generator=torch.Generator().manual_seed(2),
    )[1]
    symmetric = (MATRIX + MATRIX.T) / 2
    variance = 2 * (symmetric.square().sum() - symmetric.diagonal().square().sum())
    assert abs(estimates.mean() - MATRIX.trace()) < 4 * math.sqrt(variance / probes)
    assert float(estimates.var()) == pytest.approx(float(variance), rel=0.05)


def test_probes_are_averaged() -> None:
    x, cond = randn(3, 4, seed=1), randn(3, 4, seed=1)
    noise = rademacher(x, 500, torch.Generator().manual_seed(0))
    each = [divergence(nonlinear, 0.5, x, cond, "hutchinson", noise=probe[None])[1] for probe in noise]
    together = divergence(nonlinear, 0.5, x, cond, "hutchinson", noise=noise)[1]
    torch.testing.assert_close(together, torch.stack(each).mean(0))
    drawn = divergence(nonlinear, 0.5, x, cond, "hutchinson", probes=500, generator=torch.Generator().manual_seed(0))[1]
    torch.testing.assert_close(drawn, together)


def test_all_orthogonal_sign_vectors_give_the_exact_trace() -> None:
    hadamard = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    x, cond = randn(3, 4, seed=1), randn(3, 4, seed=1)
    noise = hadamard[:, None].expand(4, 3, 4)
    estimate = divergence(nonlinear, 0.5, x, cond, "hutchinson", noise=noise)[1]
    torch.testing.assert_close(estimate, divergence(nonlinear, 0.5, x, cond, "exact")[1])


@pytest.mark.parametrize("method", ["auto", "exact", "hutchinson"])
@pytest.mark.parametrize("hidden", [(8,), (8, 8), (8, 8, 8)])
def test_graph_is_kept_only_for_gradients(method: DivergenceMethod, hidden: tuple[int, ...]) -> None:
    field, x = MLPField(4, hidden).double(), randn(2, 4, seed=1)
    with torch.no_grad():
        velocity, result = divergence(field, 0.1, x, method=method)
        assert not velocity.requires_grad and not result.requires_grad
        assert not x.requires_grad
    noise = rademacher(x, 2, torch.Generator().manual_seed(0)) if method == "hutchinson" else None
    weight = field.from_x.weight

    def total() -> Tensor:
        return divergence(field, 0.1, x, method=method, noise=noise)[1].sum()

    (gradient,) = torch.autograd.grad(total(), weight)
    with torch.no_grad():
        numeric, step = torch.zeros_like(weight), 1e-6
        for i in range(weight.numel()):
            for sign in (1, -1):
                weight.view(-1)[i] += sign * step
                numeric.view(-1)[i] += sign * total() / (2 * step)
                weight.view(-1)[i] -= sign * step
    torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-8)


def test_gradient_reaches_the_point() -> None:
    x = randn(2, 4, seed=1).requires_grad_()
    cond = randn(2, 4, seed=1)
    assert torch.autograd.gradcheck(lambda x: divergence(nonlinear, 0.5, x, cond, "exact"), x)


def test_no_second_graph_is_built_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    original = torch.autograd.grad

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["create_graph"])
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    x, cond = randn(2, 4, seed=1), randn(2, 4, seed=1)
    with torch.no_grad():
        divergence(nonlinear, 0.5, x, cond, "exact")
    assert asked == [False]  # all four directions at once


class Square(torch.autograd.Function):
    """The square, with a backward that cannot be batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        assert grad.sum().item() != math.inf  # no batching rule: the value of a tensor
        return 2 * x * grad


def test_field_that_cannot_be_batched_is_differentiated_in_a_loop() -> None:
    x = randn(3, 4, seed=1)
    with torch.no_grad():
        result = divergence(lambda t, x, cond: Square.apply(x), 0.0, x, method="exact")[1]
    torch.testing.assert_close(result, 2 * x.sum(1))


def test_directions_are_split_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    x, cond = randn(3, 4, seed=1), randn(3, 4, seed=1)
    noise = rademacher(x, 5, torch.Generator().manual_seed(0))
    whole = [divergence(nonlinear, 0.5, x, cond, "exact")[1], divergence(nonlinear, 0.5, x, cond, noise=noise)[1]]
    for rows in (1, 6, 9):
        monkeypatch.setattr(_jacobian, "ROWS_AT_ONCE", rows)
        torch.testing.assert_close(divergence(nonlinear, 0.5, x, cond, "exact")[1], whole[0])
        torch.testing.assert_close(divergence(nonlinear, 0.5, x, cond, noise=noise)[1], whole[1])


def test_each_probe_has_its_own_estimate() -> None:
    x, cond = randn(3, 4, seed=1), randn(3, 4, seed=1)
    noise = rademacher(x, 5, torch.Generator().manual_seed(0))
    each = divergence_per_probe(nonlinear, 0.5, x, cond, "hutchinson", noise=noise)[1]
    for probe, estimate in zip(noise, each, strict=True):
        alone = divergence(nonlinear, 0.5, x, cond, "hutchinson", noise=probe[None])[1]
        torch.testing.assert_close(estimate, alone)
    assert each.std(0).min() > 1e-3
    assert divergence_per_probe(nonlinear, 0.5, x, cond, "exact")[1].shape == (1, 3)


@pytest.mark.parametrize("hidden", [(8, 8), (8, 8, 8)])
@pytest.mark.parametrize("method", ["auto", "hutchinson"])
def test_autocast_is_off_inside(hidden: tuple[int, ...], method: DivergenceMethod) -> None:
    field, x = MLPField(4, hidden, generator=torch.Generator().manual_seed(0)), randn(3, 4, seed=1).float()
    noise = rademacher(x, 2, torch.Generator().manual_seed(0))
    outside = divergence(field, 0.5, x, method=method, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        inside = divergence(field, 0.5, x, method=method, noise=noise)
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_field_of_parameters_alone_has_none() -> None:
    weight, x = randn(3, 2, seed=1).requires_grad_(), randn(3, 2, seed=1)
    assert (divergence(lambda t, x, cond: weight.clone(), 0.0, x, method="exact")[1] == 0).all()


def test_field_that_ignores_the_point_has_none() -> None:
    x = randn(3, 2, seed=1)
    assert (divergence(lambda t, x, cond: torch.ones_like(x), 0.0, x)[1] == 0).all()


def without_graph(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return -x


def through_numpy(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    return torch.from_numpy(np.sin(x.detach().numpy()))


class Detached(nn.Module):
    """Learns a rate, but detaches the point: the result needs gradients, and none of them is that of the point."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.rate * x.detach()


@pytest.mark.parametrize("method", ["auto", "exact", "hutchinson"])
@pytest.mark.parametrize("field", [without_graph, through_numpy, Detached()], ids=["no_grad", "numpy", "detach"])
@pytest.mark.parametrize("grad", [False, True])
def test_field_without_a_derivative_is_refused(field: VelocityField, method: DivergenceMethod, grad: bool) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="has no derivative by x"):
        divergence(field, 0.3, randn(3, 2), method=method)


def test_likelihood_of_a_field_without_a_derivative_is_refused() -> None:
    """Its log-density at zero would be -1.838 in place of .162."""
    x = torch.zeros(1, 2, dtype=torch.float64)
    for solver in ("rk4", "adams", "dopri5"):
        with pytest.raises(ValueError, match="has no derivative by x"):
            ContinuousFlow(without_graph, (2,), solver=solver).log_prob(x)
        right = ContinuousFlow(lambda t, x, cond: -x, (2,), solver=solver, steps=40).log_prob(x)
        assert float(right) == pytest.approx(2 - math.log(2 * math.pi), abs=1e-4)


def test_gradients_of_the_adjoint_refuse_a_field_without_a_derivative() -> None:
    with pytest.raises(ValueError, match="has no derivative by x"):
        nll_loss(Detached(), randn(3, 2), method="adjoint")


@pytest.mark.parametrize("solver", ["rk4", "adams", "dopri5_per_sample"])
@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_log_density_requires_no_gradients_unasked(solver: str, method: DivergenceMethod) -> None:
    flow = ContinuousFlow(lambda t, x, cond: torch.sin(x), (2,), solver, 5, method)
    x = randn(3, 2)
    assert not flow.log_prob(x, generator=torch.Generator().manual_seed(0)).requires_grad
    assert flow.log_prob(x.requires_grad_(), generator=torch.Generator().manual_seed(0)).requires_grad


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_graph_is_built_only_where_something_requires_gradients(method: DivergenceMethod) -> None:
    x, cond, t = randn(3, 4), randn(3, 4, seed=1), torch.full((3,), 0.3, dtype=torch.float64)
    rate = torch.tensor(0.7, dtype=torch.float64)

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return rate * nonlinear(t, x, cond)

    def asks() -> set[bool]:
        return {result.requires_grad for result in divergence(field, t, x, cond, method)}

    assert asks() == {False}
    assert divergence(lambda t, x, cond: x, t, x, None, method)[1].requires_grad is False
    weight = nn.Parameter(randn(3, 4))
    assert divergence(lambda t, x, cond: weight, t, x, None, method)[0].requires_grad is True
    for one in (x, cond, t, rate):
        one.requires_grad_()
        assert asks() == {True}
        (gradient,) = torch.autograd.grad(divergence(field, t, x, cond, method)[1].sum(), one)
        assert gradient.abs().sum() > 0
        one.requires_grad_(False)


def test_condition_may_be_a_mapping() -> None:
    x, c = randn(3, 4, seed=1), randn(3, 4, seed=1)

    def field(t: Time, x: Tensor, cond: Any = None) -> Tensor:
        return nonlinear(t, x, cond["rate"])

    expected = divergence(nonlinear, 0.5, x, c)[1]
    torch.testing.assert_close(divergence(field, 0.5, x, {"rate": c})[1], expected)
    with torch.inference_mode():
        torch.testing.assert_close(divergence(field, 0.5, x, {"rate": c})[1], expected)


def test_bad_arguments_are_named() -> None:
    x, cond = randn(3, 4, seed=1), randn(3, 4, seed=1)
    with pytest.raises(ValueError, match="method is 'trace'"):
        divergence(nonlinear, 0.0, x, cond, method="trace")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x has dtype"):
        divergence(nonlinear, 0.0, x.long(), cond)
    with pytest.raises(ValueError, match="the result of field has shape"):
        divergence(lambda t, x, cond: x[:, :1], 0.0, x)
    with pytest.raises(ValueError, match="t comes first"):
        divergence(lambda x, t, cond: x, 0.0, x)
    with pytest.raises(ValueError, match="probes is 0"):
        divergence(nonlinear, 0.0, x, cond, method="hutchinson", probes=0)
    with pytest.raises(ValueError, match="noise has shape"):
        divergence(nonlinear, 0.0, x, cond, method="hutchinson", noise=torch.ones(3, 4))
    with pytest.raises(TypeError):
        divergence(nonlinear, 0.0, x, cond, metod="exact")  # type: ignore[call-arg]


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_inference_mode_differentiates_too(method: DivergenceMethod) -> None:
    with torch.inference_mode():
        x, t, cond = torch.randn(5, 3), torch.rand(5), torch.randn(5, 3)
        velocity, total = divergence(lambda t, x, cond: x * (1 + t[:, None]) + cond, t, x, cond, method)
        torch.testing.assert_close(velocity, x * (1 + t[:, None]) + cond)
        torch.testing.assert_close(total, 3 * (1 + t))
