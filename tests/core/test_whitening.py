"""Partial whitening: covariances, the density of a flow whose units have it, and round trips."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from flowmatch_core import ContinuousFlow, DiscreteTimeFlow, Flow, MixtureFlow, partial_whitening
from flowmatch_core.marginals import Marginals
from flowmatch_core.normalizing import MAF
from tests.support.random import generator, randn, tensor

D = 4
MIXING = randn(D, D, seed=3) + 2 * torch.eye(D, dtype=torch.float64)
MATRIX = randn(D, D, seed=4) + 2 * torch.eye(D, dtype=torch.float64)
LOC, SCALE = tensor(6e6, -3.0, 0.0, 10.0), tensor(0.3, 20.0, 1.0, 5.0)


def data(n: int = 500) -> tuple[Tensor, Tensor]:
    """Correlated rows and their weights."""
    return LOC + SCALE * (randn(n, D) @ MIXING.T), torch.rand(n, generator=generator(1), dtype=torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_variances_are_powers_of_those_of_the_principal_components(strength: float, weighted: bool) -> None:
    x, weight = data()
    mean, matrix = partial_whitening(x, weight if weighted else None, strength=strength)
    weights = weight if weighted else torch.ones_like(weight)
    torch.testing.assert_close(mean, (weights[:, None] * x).sum(0) / weights.sum())
    before, after = (torch.cov(part.T, correction=0, aweights=weights) for part in (x, (x - mean) @ matrix.T))
    expected = torch.linalg.eigvalsh(before).pow(1 - strength)
    torch.testing.assert_close(after, expected.diag(), rtol=1e-6, atol=1e-6)


def test_a_strength_near_zero_is_a_rotation() -> None:
    matrix = partial_whitening(*data(), strength=1e-9)[1]
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-7)


def flows(whitening: Tensor | None, marginals: Marginals | None = None) -> list[Flow]:
    units = {"loc": LOC, "scale": SCALE, "whitening": whitening, "marginals": marginals}
    autoregressive = DiscreteTimeFlow(MAF(transforms=2), D, generator=generator(1), **units).double()  # type: ignore[arg-type]
    mixture = MixtureFlow(torch.ones(2), randn(2, D, seed=2), torch.eye(D).double()[None], **units)  # type: ignore[arg-type]
    field = ContinuousFlow(lambda t, x, cond: x.sin() @ MIXING.T, (D,), "rk4", 8, **units)  # type: ignore[arg-type]
    return [field, autoregressive, mixture]


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("transformed", [False, True])
def test_the_log_determinant_is_that_of_automatic_differentiation(index: int, transformed: bool) -> None:
    x = data(3)[0]
    marginals = Marginals.fit(data()[0], kinds=("mixture",) * D, components=2) if transformed else None
    flow = flows(MATRIX, marginals)[index]
    for row in x:
        jacobian = torch.autograd.functional.jacobian(lambda v: flow._standardised(v[None])[0][0], row)
        found = flow._standardised(row[None])[1][0]
        torch.testing.assert_close(found, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_points_come_back_in_double_precision(index: int) -> None:
    flow, x = flows(MATRIX)[index], data(50)[0]
    torch.testing.assert_close(flow._in_units(flow._standardised(x)[0]), x, rtol=1e-13, atol=1e-10)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_identity_is_no_whitening(index: int) -> None:
    x = data(20)[0]
    plain, whitened = flows(None)[index], flows(torch.eye(D, dtype=torch.float64))[index]
    assert torch.equal(whitened.log_prob(x), plain.log_prob(x))
    drawn = [flow.sample((5,), generator=generator()) for flow in (plain, whitened)]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-15, atol=0)


def test_the_density_of_a_gaussian_is_that_of_its_whitened_components() -> None:
    """The flow of no field is N(0, I): in units of a full whitening, the Gaussian with the moments of the data."""
    x, weight = data()
    mean, matrix = partial_whitening(x, weight)
    flow = ContinuousFlow(lambda t, x, cond: 0 * x, (D,), "rk4", 4, loc=mean, whitening=matrix)
    exact = MultivariateNormal(mean, torch.cov(x.T, correction=0, aweights=weight))
    torch.testing.assert_close(flow.log_prob(x), exact.log_prob(x), rtol=1e-9, atol=1e-9)


def test_units_stay_in_double_precision_and_in_the_state() -> None:
    flow = DiscreteTimeFlow(
        MAF(transforms=1), D, loc=LOC, scale=SCALE, whitening=MATRIX, generator=generator(1)
    ).float()
    assert flow.whitening is not None
    assert flow.whitening.dtype == torch.float64
    other = DiscreteTimeFlow(MAF(transforms=1), D, loc=LOC, scale=SCALE, whitening=torch.eye(D))
    other.load_state_dict(flow.state_dict())
    x = data(5)[0]
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    assert flow.log_prob(x).isfinite().all()


@pytest.mark.parametrize(
    ("whitening", "message"),
    [
        (torch.ones(D, D), "whitening is singular, but should be an invertible matrix"),
        (torch.eye(3), "whitening"),
        (torch.full((D, D), math.nan), "whitening"),
    ],
)
def test_what_is_no_invertible_matrix_is_refused(whitening: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuousFlow(lambda t, x, cond: x, (D,), whitening=whitening)


@pytest.mark.parametrize(
    ("x", "weight", "strength", "message"),
    [
        (randn(10, 2), None, 0.0, "strength is 0.0, but should be above 0 and at most 1"),
        (randn(10, 2), None, 1.5, "strength is 1.5"),
        (randn(10), None, 1.0, "x has shape"),
        (randn(10, 1).expand(10, 2), None, 1.0, "x has a singular covariance"),
        (torch.ones(10, 2), None, 1.0, "x has a singular covariance"),
        (randn(10, 2), -torch.ones(10), 1.0, "weight holds values that are negative"),
        (randn(10, 2), torch.ones(9), 1.0, "weight has shape"),
    ],
)
def test_data_without_a_whitening_are_refused(x: Tensor, weight: Tensor | None, strength: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partial_whitening(x, weight, strength=strength)
