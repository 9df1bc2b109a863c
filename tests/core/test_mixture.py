"""Gaussian mixtures as flows: densities of scipy and scikit-learn, samples of the density, conditions, units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from torch import Tensor

from flowmatch_core import MixtureFlow
from flowmatch_core import mixture as module
from tests.support.random import generator

LOC, SCALE = torch.tensor([6e6, -3.0], dtype=torch.float64), torch.tensor([0.3, 20.0], dtype=torch.float64)
FACTORS = torch.tensor([[[0.8, 0.0], [0.5, 0.3]], [[0.2, 0.0], [-0.1, 0.9]]], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, 0.5], [1.0, 2.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 3.0], dtype=torch.float64)
SLOPES = torch.tensor([[0.5, -1.0], [2.0, 0.0], [0.0, 0.3]], dtype=torch.float64)


def flow(
    components: int = 2, slopes: Tensor | None = None, loc: Tensor | None = None, scale: Tensor | None = None
) -> MixtureFlow:
    parts = WEIGHTS[:components], MEANS[:components], FACTORS[:components]
    return MixtureFlow(*parts, slopes, loc=loc, scale=scale)


def covariance(k: int) -> np.ndarray:
    found: np.ndarray = (FACTORS[k] @ FACTORS[k].T).numpy()
    return found


def test_one_component_is_scipys_multivariate_normal_in_units() -> None:
    scale = np.diag(SCALE.numpy())
    truth = multivariate_normal(LOC.numpy() + scale @ MEANS[0].numpy(), scale @ covariance(0) @ scale)
    x = LOC + SCALE * torch.randn(50, 2, generator=generator(0), dtype=torch.float64)
    found = flow(1, loc=LOC, scale=SCALE).log_prob(x)
    np.testing.assert_allclose(found.numpy(), truth.logpdf(x.numpy()), rtol=1e-7)


def test_components_are_averaged_by_their_weights() -> None:
    x = torch.randn(50, 2, generator=generator(0), dtype=torch.float64)
    parts = [multivariate_normal(MEANS[k].numpy(), covariance(k)).pdf(x.numpy()) for k in (0, 1)]
    np.testing.assert_allclose(flow().log_prob(x).exp().numpy(), 0.25 * parts[0] + 0.75 * parts[1], rtol=1e-10)


def test_it_is_a_fitted_mixture_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(300, 3)) ** 3
    fitted = GaussianMixture(3, random_state=0).fit(rows)
    arrays = fitted.weights_, fitted.means_, np.linalg.cholesky(fitted.covariances_)
    made = MixtureFlow(*map(torch.from_numpy, arrays))
    for chunk in (module.CHUNK, 7):
        monkeypatch.setattr(module, "CHUNK", chunk)
        found = made.log_prob(torch.from_numpy(rows))
        np.testing.assert_allclose(found.numpy(), fitted.score_samples(rows), rtol=1e-9)


def test_one_factor_for_all_is_a_kernel_density_of_scikit_learn() -> None:
    rows, points = np.random.default_rng(0).normal(size=(2, 200, 3))
    weight = np.random.default_rng(1).uniform(0.1, 2.0, size=200)
    fitted = KernelDensity(bandwidth=0.3).fit(rows, sample_weight=weight)
    kernel = 0.3 * torch.eye(3, dtype=torch.float64)[None]
    made = MixtureFlow(torch.from_numpy(weight), torch.from_numpy(rows), kernel)
    np.testing.assert_allclose(made.log_prob(torch.from_numpy(points)).numpy(), fitted.score_samples(points), rtol=1e-7)


@pytest.mark.parametrize("components", [1, 2])
def test_the_density_integrates_to_one_given_each_condition(components: int) -> None:
    made = flow(components, SLOPES, loc=LOC, scale=SCALE)
    axis = torch.linspace(-9, 9, 400, dtype=torch.float64)
    x = LOC + SCALE * torch.cartesian_prod(axis, axis)
    for cond in torch.eye(3):
        density = made.log_prob(x, cond.expand(len(x), 3)).exp()
        assert float(density.sum() * (axis[1] - axis[0]) ** 2 * SCALE.prod()) == pytest.approx(1.0, abs=1e-5)


def test_samples_have_the_moments_of_the_density() -> None:
    """Within five standard errors of 100,000 draws for each condition."""
    cond, n = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0]], dtype=torch.float64), 100_000
    x = flow(2, SLOPES, loc=LOC, scale=SCALE).sample((n,), cond, generator(0))
    assert x.shape == (n, 2, 2)
    assert x.dtype == torch.float64
    share = WEIGHTS / WEIGHTS.sum()
    mean = share @ MEANS
    second = sum(share[k] * (FACTORS[k] @ FACTORS[k].T + torch.outer(MEANS[k], MEANS[k])) for k in (0, 1))
    variance = (second - torch.outer(mean, mean)).diagonal()
    error = SCALE * (variance / n).sqrt()
    assert ((x.mean(0) - (LOC + SCALE * (mean + cond @ SLOPES))).abs() < 5 * error).all()
    torch.testing.assert_close(x.var(0) / SCALE**2, variance.expand(2, 2), rtol=0.05, atol=0.0)


def test_a_batch_of_conditions_is_row_by_row() -> None:
    made = flow(2, SLOPES)
    x, cond = torch.randn(6, 2, dtype=torch.float64, generator=generator(0)), torch.randn(6, 3, generator=generator(1))
    together = made.log_prob(x, cond)
    single = torch.cat([made.log_prob(x[i : i + 1], cond[i : i + 1]) for i in range(6)])
    assert torch.allclose(together, single, rtol=1e-12)
    assert torch.allclose(made.given(cond).log_prob(x), together)
    assert made.sample((), cond).shape == (6, 2)
    assert made.sample((0,), cond).shape == (0, 6, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((WEIGHTS, MEANS[0], FACTORS), "means has shape"),
        ((WEIGHTS[:1], MEANS, FACTORS), "weights has shape"),
        ((WEIGHTS, MEANS, FACTORS[:, :1]), "factors has shape"),
        ((-WEIGHTS, MEANS, FACTORS), "weights holds values that are not positive"),
        ((WEIGHTS, MEANS, -FACTORS), "factors has a diagonal that is not positive"),
        ((WEIGHTS, MEANS, FACTORS, SLOPES[:, :1]), "slopes has shape"),
    ],
)
def test_what_is_no_mixture_is_refused(arguments: tuple[Tensor, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MixtureFlow(*arguments)


def test_conditions_are_given_where_there_are_slopes_and_only_there() -> None:
    x = torch.zeros(4, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cond has shape None, but should be a tensor that ends in 3 dimensions"):
        flow(2, SLOPES).log_prob(x)
    with pytest.raises(ValueError, match=r"cond has shape \(4, 3\), but should be None"):
        flow().sample((), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="not finite"):
        flow().log_prob(x / 0)
