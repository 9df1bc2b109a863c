"""Laws of the training objectives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowmatch_core.couplings import MinibatchOT
from flowmatch_core.fields import Time, expand_time
from flowmatch_core.objectives import cfm_loss
from flowmatch_core.paths import AffinePath, CondOT, Cosine


def zero(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    return torch.zeros_like(x)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("path", [CondOT(), CondOT(sigma_min=0.2), Cosine()], ids=repr)
def test_gradient_is_that_of_the_regression_on_the_marginal_velocity(path: AffinePath) -> None:
    n, g = 200_000, generator()
    atoms = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -2.0]], dtype=torch.float64)
    x1 = atoms[torch.randint(3, (n,), generator=g)]
    x0 = torch.randn(x1.shape, generator=g, dtype=torch.float64)
    t = 0.95 * torch.rand(n, generator=g, dtype=torch.float64)
    theta = torch.randn(6, 2, generator=g, dtype=torch.float64, requires_grad=True)

    def features(t: Time, x: Tensor) -> Tensor:
        s = expand_time(t, x)
        return torch.cat([x, s * x, torch.ones_like(s), s], 1)

    loss = cfm_loss(lambda t, x, cond: features(t, x) @ theta, path, x1, x0, time=t)
    (gradient,) = torch.autograd.grad(loss, theta)

    # the marginal velocity: the posterior over the atoms weighs their conditional velocities
    sample = path.sample(x0, x1, t)
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    distance = ((sample.x_t[:, None] - alpha[..., None] * atoms) / sigma[..., None]).square().sum(-1)
    posterior = (-distance / 2).softmax(-1)
    each = torch.stack([path.conditional_velocity(t, sample.x_t, a.expand_as(x0)) for a in atoms], 1)
    marginal = (posterior[..., None] * each).sum(1)
    basis = features(t, sample.x_t)
    residual = (basis @ theta.detach() - marginal)[:, None, :] * basis[:, :, None]
    difference = (marginal - sample.velocity)[:, None, :] * basis[:, :, None]
    expected = residual.mean(0)  # the 2 of the square cancels the mean over the two dimensions
    standard_error = difference.std(0) / math.sqrt(n)
    assert ((gradient - expected).abs() < 4.5 * standard_error).all()
    assert (expected.abs() > 20 * standard_error).any()


def test_minimum_for_gaussian_data_is_known() -> None:
    std, g = 0.5, generator()
    x1 = std * torch.randn(200_000, 2, generator=g, dtype=torch.float64)

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        s = expand_time(t, x)
        return (s * std**2 - (1 - s)) / ((1 - s) ** 2 + s**2 * std**2) * x

    loss = cfm_loss(field, CondOT(), x1, generator=g)
    assert float(loss) == pytest.approx(math.pi / 2 * std, rel=0.01)


def test_times_are_the_ones_given_or_sampled() -> None:
    x0, x1 = torch.randn(2, 16, 3, generator=generator(), dtype=torch.float64)
    seen: list[Tensor] = []

    def record(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert isinstance(t, Tensor)
        seen.extend([t, x])
        return x

    cfm_loss(record, CondOT(), x1, x0, time=torch.zeros(16))
    torch.testing.assert_close(seen[1], x0)
    cfm_loss(record, CondOT(), x1, x0, time=lambda *a, **k: 1 - 0 * torch.rand(*a, **k), generator=generator())
    torch.testing.assert_close(seen[3], x1)
    cfm_loss(record, CondOT(), x1, x0, generator=generator(1))
    assert seen[4].shape == (16,) and seen[4].dtype == x1.dtype and 0 <= seen[4].min() < seen[4].max() < 1


def test_the_coupling_pairs_and_the_condition_stays_with_the_data() -> None:
    x1 = torch.randn(32, 2, generator=generator(), dtype=torch.float64)
    x0, cond = x1.flip(0), torch.arange(32.0)[:, None]

    def field(t: Time, x: Tensor, given: Tensor | None = None) -> Tensor:
        assert given is cond
        return torch.zeros_like(x)

    assert cfm_loss(field, CondOT(), x1, x0, cond, coupling=MinibatchOT()) == 0
    assert cfm_loss(field, CondOT(), x1, x0, cond) > 1


def test_randomness_comes_from_the_generator_alone() -> None:
    x1 = torch.ones(64, 2)
    state = torch.get_rng_state()
    losses = [cfm_loss(zero, CondOT(), x1, generator=generator(seed)) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(state, torch.get_rng_state())


def test_loss_is_the_mean_over_rows_and_dimensions_of_any_event() -> None:
    x1, x0 = torch.full((4, 1, 2, 3), 3.0), torch.zeros(4, 1, 2, 3)
    assert cfm_loss(zero, CondOT(), x1, x0) == 9


def test_bad_arguments_are_named() -> None:
    x1 = torch.ones(4, 2)
    with pytest.raises(ValueError, match="the result of field has shape"):
        cfm_loss(lambda t, x, cond: x[:, :1], CondOT(), x1)
    with pytest.raises(ValueError, match="x0 has shape"):
        cfm_loss(zero, CondOT(), x1, x1[:1])
    with pytest.raises(TypeError):
        cfm_loss(zero, CondOT(), x1, couplng=MinibatchOT())  # type: ignore[call-arg]
