"""Laws of the networks, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowmatch_core.networks import ACTIVATIONS, FourierTime, MLPField


def make(hidden: tuple[int, ...] = (16, 12), cond_dim: int = 0, activation: str = "silu", dim: int = 3) -> MLPField:
    g = torch.Generator().manual_seed(0)
    field = MLPField(dim, hidden, cond_dim, activation=activation, generator=g).double()
    field.last.weight.data *= 10  # as large as after training
    return field


def points(n: int, dim: int, seed: int = 1) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(16,), (16, 12)])
@pytest.mark.parametrize("cond_dim", [0, 2])
def test_closed_form_divergence_is_the_trace_of_the_jacobian(
    activation: str, hidden: tuple[int, ...], cond_dim: int
) -> None:
    field = make(hidden, cond_dim, activation)
    x, t = points(5, 3), torch.linspace(0, 1, 5, dtype=torch.float64)
    cond = points(5, cond_dim, seed=2) if cond_dim else None
    velocity, divergence = field.velocity_and_divergence(t, x, cond)
    torch.testing.assert_close(velocity, field(t, x, cond))
    for i in range(5):
        row = slice(i, i + 1)

        def alone(x: Tensor, row: slice = row) -> Tensor:
            return field.forward(t[row], x, None if cond is None else cond[row])[0]

        jacobian = torch.autograd.functional.jacobian(alone, x[row])[:, 0]  # type: ignore[no-untyped-call]
        torch.testing.assert_close(divergence[i], jacobian.trace(), rtol=1e-12, atol=1e-12)
    assert divergence.abs().max() > 1e-2


def test_closed_form_divergence_is_differentiable() -> None:
    field, x = make(), points(4, 3)

    def total(weight: Tensor) -> Tensor:
        parameters = {**dict(field.named_parameters()), "layers.0.weight": weight}
        wrapped = torch.func.functional_call(_Divergence(field), {f"field.{k}": v for k, v in parameters.items()}, x)
        assert isinstance(wrapped, Tensor)
        return wrapped

    weight = field.get_parameter("layers.0.weight").detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(total, weight)


class _Divergence(torch.nn.Module):
    def __init__(self, field: MLPField) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: Tensor) -> Tensor:
        return self.field.velocity_and_divergence(0.3, x)[1].sum()


@pytest.mark.parametrize("hidden", [(16,), (16, 12), (16, 12, 8)])
def test_float_scalar_and_batch_times_agree(hidden: tuple[int, ...]) -> None:
    field, x, cond = make(hidden, cond_dim=2), points(3, 3), points(3, 2, seed=2)
    expected = field(torch.full((3,), 0.4, dtype=torch.float64), x, cond)
    torch.testing.assert_close(field(0.4, x, cond), expected)
    torch.testing.assert_close(field(torch.tensor(0.4, dtype=torch.float64), x, cond), expected)
    assert (field(0.5, x, cond) - expected).abs().max() > 1e-3
    assert (field(0.4, x, cond + 1) - expected).abs().max() > 1e-3


def test_dtype_of_the_state_is_kept_whatever_the_time() -> None:
    field = MLPField(2, (8,))
    for t in (0.5, torch.tensor(0.5, dtype=torch.float64), torch.rand(3, dtype=torch.float64)):
        assert field(t, torch.zeros(3, 2)).dtype == torch.float32


def test_embedding_holds_time_and_unit_circles_of_growing_speed() -> None:
    t = torch.linspace(-0.1, 1.1, 7, dtype=torch.float64)
    features = FourierTime(8).double()(t)
    torch.testing.assert_close(features[:, 0], t)
    cos, sin = features[:, 1:9], features[:, 9:]
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(7, 8, dtype=torch.float64))
    torch.testing.assert_close(cos[:, 0], (math.pi * t).cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[:, 7], (30 * math.pi * t).sin(), rtol=0, atol=1e-4)


def test_network_learns_a_fast_function_of_time() -> None:
    field = MLPField(1, (32, 32), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(field.parameters(), 1e-2)
    t = torch.linspace(0, 1, 128)
    x, target = torch.zeros(128, 1), (10 * math.pi * t).sin()[:, None]
    for _ in range(200):
        loss = (field(t, x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01  # a constant has 0.5


def test_velocity_starts_small_and_every_parameter_learns() -> None:
    field = MLPField(3, (64, 64, 64), cond_dim=2, generator=torch.Generator().manual_seed(0)).double()
    velocity = field(torch.rand(100, dtype=torch.float64), points(100, 3), points(100, 2))
    assert 0 < velocity.std() < 0.03
    (velocity - 1).square().mean().backward()
    for name, parameter in field.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_weights_come_from_the_generator_alone() -> None:
    state = torch.get_rng_state()
    fields = [MLPField(2, (8, 8), 1, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    a, b, c = (torch.cat([p.flatten() for p in field.parameters()]) for field in fields)
    assert torch.equal(a, b) and not torch.isclose(a, c).any()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="activation is 'relu'"):
        MLPField(2, activation="relu")
    with pytest.raises(ValueError, match="hidden is empty"):
        MLPField(2, hidden=())
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\)"):
        MLPField(2, (8,))(0.0, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="cond has shape None"):
        MLPField(2, (8,), cond_dim=1)(0.0, torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"cond has shape \(4, 1\)"):
        MLPField(2, (8,))(0.0, torch.zeros(4, 2), torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"t has shape \(4, 1\)"):
        MLPField(2, (8,))(torch.zeros(4, 1), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="hidden has 3 layers"):
        MLPField(2, (8, 8, 8)).velocity_and_divergence(0.0, torch.zeros(4, 2))
    with pytest.raises(TypeError):
        MLPField(2, hiden=(8,))  # type: ignore[call-arg]
