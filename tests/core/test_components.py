"""Flows inside the components of a mixture: against the mixture, quadrature, samples and an affine flow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from flowmatch_core import ComponentFlow, ContinuousFlow, MixtureFlow, draw_component
from flowmatch_core.components import component_condition
from tests.support.random import generator

FACTORS = torch.tensor([[[0.8, 0.0], [0.5, 0.3]], [[0.2, 0.0], [-0.1, 0.9]], [[0.5, 0.0], [0.0, 0.5]]]).double()
MEANS = torch.tensor([[-1.0, 0.5], [1.0, 2.0], [0.0, 0.0]]).double()
WEIGHTS = torch.tensor([1.0, 3.0, 2.0]).double()
SLOPES = torch.tensor([[0.5, -1.0]]).double()
LOC, SCALE = torch.tensor([6e6, -3.0]).double(), torch.tensor([0.3, 20.0]).double()


def mixture(slopes: Tensor | None = None) -> MixtureFlow:
    return MixtureFlow(WEIGHTS, MEANS, FACTORS, slopes)


def still(t: object, x: Tensor, cond: object) -> Tensor:
    """A field whose flow is the identity."""
    return torch.zeros_like(x)


def growing(t: object, x: Tensor, cond: Tensor) -> Tensor:
    """A field whose flow scales component k by exp(k / 5), with an exact density."""
    return x * (cond @ torch.arange(cond.shape[1], dtype=cond.dtype) / 5)[:, None]


def flow(
    field: object,
    likeliest: int | None,
    slopes: Tensor | None = None,
    loc: Tensor | None = None,
    scale: Tensor | None = None,
) -> ComponentFlow:
    size = len(MEANS) + (0 if slopes is None else len(slopes))
    inner = ContinuousFlow(field, (2,), "rk4", 20, cond_shape=(size,))  # type: ignore[arg-type]
    return ComponentFlow(mixture(slopes), inner, likeliest, loc=loc, scale=scale)


def points(n: int = 200) -> Tensor:
    return 1.5 * torch.randn(n, 2, generator=generator(0), dtype=torch.float64)


@pytest.mark.parametrize("slopes", [None, SLOPES])
def test_an_identity_in_every_component_is_the_mixture(slopes: Tensor | None) -> None:
    z, cond = points(), None if slopes is None else torch.randn(200, 1, generator=generator(1), dtype=torch.float64)
    units = MixtureFlow(WEIGHTS, MEANS, FACTORS, slopes, loc=LOC, scale=SCALE)
    found = flow(still, None, slopes, loc=LOC, scale=SCALE)
    x = LOC + SCALE * z
    torch.testing.assert_close(found.log_prob(x, cond), units.log_prob(x, cond), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.mixture_log_prob(x, cond), units.log_prob(x, cond), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.covered(x, cond), torch.ones(200).double())


def test_fewer_components_are_a_bound_that_rises_with_their_number() -> None:
    z = points()
    whole = flow(growing, None).log_prob(z)
    gaps = [whole - flow(growing, k).log_prob(z) for k in (1, 2, 3)]
    assert bool((gaps[0] >= gaps[1]).all() and (gaps[1] >= -1e-12).all())  # they may be less than rounding
    assert float(gaps[0].mean()) > 2 * float(gaps[1].mean()) > 0.01
    torch.testing.assert_close(gaps[2], torch.zeros(200).double())
    # with the identity the gap is what the covered share says
    lower, exact = flow(still, 2), mixture().log_prob(z)
    torch.testing.assert_close(exact - lower.log_prob(z), -lower.covered(z).log(), rtol=1e-6, atol=1e-9)


def test_the_density_is_that_of_wider_components_and_integrates_to_one() -> None:
    wider = MixtureFlow(WEIGHTS, MEANS, FACTORS * torch.exp(torch.arange(3) / 5).double()[:, None, None])
    found = flow(growing, None)
    torch.testing.assert_close(found.log_prob(points()), wider.log_prob(points()), rtol=1e-5, atol=1e-5)
    grid = torch.linspace(-9, 9, 181, dtype=torch.float64)
    mass = float(found.log_prob(torch.cartesian_prod(grid, grid)).exp().sum()) * 0.1**2
    assert mass == pytest.approx(1, abs=1e-4)


def test_samples_have_the_moments_of_their_density() -> None:
    n = 100_000
    given = torch.full((n, 1), 2.0).double()
    x = flow(growing_given, None, SLOPES).sample((), given, generator(0))
    weight = WEIGHTS / WEIGHTS.sum()
    mean = weight @ MEANS + 2 * SLOPES[0]
    second = FACTORS @ FACTORS.mT * torch.exp(2 * torch.arange(1, 4) / 5).double()[:, None, None]
    second = second + MEANS[:, :, None] * MEANS[:, None, :]
    covariance = (weight[:, None, None] * second).sum(0) - (weight @ MEANS).outer(weight @ MEANS)
    error = covariance.diagonal().sqrt() / math.sqrt(n)
    assert bool(((x.mean(0) - mean).abs() < 5 * error).all())
    np.testing.assert_allclose(x.T.cov().numpy(), covariance.numpy(), atol=0.06)


def growing_given(t: object, x: Tensor, cond: Tensor) -> Tensor:
    """`growing`, where the component k = 1, 2, 3 follows one condition that has no effect."""
    return growing(t, x, torch.cat([torch.zeros_like(cond[:, :1]), cond[:, 1:]], 1))


def test_a_component_is_drawn_from_its_posterior() -> None:
    z = points(1).expand(50_000, 2)
    u, cond = draw_component(mixture(), z, generator=generator(0))
    share = mixture().log_joint(z[:1]).softmax(1)[0]
    error = (share * (1 - share) / len(z)).sqrt()
    assert bool(((cond.mean(0) - share).abs() < 5 * error).all())
    back = mixture().colour(u, cond.argmax(1))
    torch.testing.assert_close(back, z)


def test_rows_of_the_mixture_are_standard_normal_where_they_are_trained_on() -> None:
    n = 50_000
    z = mixture().sample((n,), generator=generator(0))
    u, cond = draw_component(mixture(), z, generator=generator(1))
    for k in range(3):
        mine = u[cond[:, k] == 1]
        assert float(mine.mean(0).abs().max()) < 5 / math.sqrt(len(mine))
        assert float((mine.var(0) - 1).abs().max()) < 5 * math.sqrt(2 / len(mine))


def test_conditions_come_before_the_component() -> None:
    found = component_condition(torch.tensor([2, 0]), 3, torch.zeros(1), torch.tensor([[5.0], [6.0]]))
    assert found.tolist() == [[5, 0, 0, 1], [6, 1, 0, 0]]


def test_the_solver_error_is_that_of_its_components() -> None:
    coarse = ComponentFlow(mixture(), ContinuousFlow(growing, (2,), "euler", 4, cond_shape=(3,)), 2)
    found = coarse.estimate(points())
    truth = flow(growing, 2).log_prob(points())
    assert bool((found.solver_error > 0).all())
    assert float((found.log_prob - truth).abs().mean()) < 2 * float(found.solver_error.mean())
    assert found.nfe > 0


def test_wrong_arguments_are_named() -> None:
    inner = ContinuousFlow(still, (2,), cond_shape=(3,))
    with pytest.raises(ValueError, match="likeliest is 0"):
        ComponentFlow(mixture(), inner, 0)
    with pytest.raises(ValueError, match="mixture has units"):
        ComponentFlow(MixtureFlow(WEIGHTS, MEANS, FACTORS, loc=LOC), inner)
    with pytest.raises(ValueError, match=r"event shape \(1,\)"):
        ComponentFlow(mixture(), ContinuousFlow(still, (1,), cond_shape=(3,)))
