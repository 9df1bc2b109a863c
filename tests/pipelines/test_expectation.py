"""Expectation maximisation: its steps against scikit-learn's, and a likelihood that never falls."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from flowmatch_core.mixture import MixtureFlow
from pipelines.training import expectation

RIDGE = 1e-6


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """Rows of three Gaussians of different scales and directions."""
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(3, 4, 4)) * np.array([0.1, 1.0, 3.0])[:, None, None]
    chosen = rng.integers(3, size=3000)
    noise = rng.normal(size=(3000, 4, 1))
    return torch.from_numpy((factors[chosen] @ noise)[..., 0] + np.array([1.0, -1.0, 0.0])[chosen, None])


def log_likelihood(mixture: expectation.Mixture, rows: Tensor) -> float:
    weights, means, covariances = mixture
    return float(MixtureFlow(weights, means, torch.linalg.cholesky(covariances)).log_prob(rows).mean())


def test_a_step_is_scikit_learn_s(rows: Tensor) -> None:
    """More rows than one chunk, from the same start."""
    start = expectation.fit(rows, 3, 0, RIDGE, 0)
    steps = 5
    theirs = GaussianMixture(
        3,
        max_iter=steps,
        tol=0,
        reg_covar=RIDGE,
        weights_init=start.weights.numpy(),
        means_init=start.means.numpy(),
        precisions_init=torch.linalg.inv(start.covariances).numpy(),
    )
    with pytest.warns(UserWarning, match="did not converge"):
        theirs.fit(rows.numpy())
    ours = expectation.fit(rows, 3, steps, RIDGE, 0)
    assert float((start.means - ours.means).abs().max()) > 1e-3  # the steps have changed it
    for mine, other in zip(ours, (theirs.weights_, theirs.means_, theirs.covariances_), strict=True):
        np.testing.assert_allclose(mine.numpy(), other, rtol=1e-8, atol=1e-10)


def test_the_likelihood_never_falls(rows: Tensor) -> None:
    found = [log_likelihood(expectation.fit(rows, 5, steps, RIDGE, 0), rows) for steps in (0, 1, 2, 4, 8)]
    assert all(later > earlier for earlier, later in pairwise(found))


def test_a_component_without_rows_stays_finite() -> None:
    few = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat(20, 1)
    mixture = expectation.fit(few, 12, 10, RIDGE, 0)
    assert all(bool(part.isfinite().all()) for part in mixture)
    assert float(mixture.weights.sum()) == pytest.approx(1)
    assert np.isfinite(log_likelihood(mixture, few))
