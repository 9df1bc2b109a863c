"""The ratio of a population to tempered weights, against mixtures whose classes are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from pipelines.base.errors import UserError
from pipelines.evaluation import tilt
from pipelines.evaluation.rows import Array, Rows
from pipelines.evaluation.tilt import Tilt

FULL, TEMPERED, ROWS = (np.array(shares) for shares in ([0.5, 0.5], [0.15, 0.85], [0.05, 0.95]))
MEANS = np.array([-1.0, 1.0])


def classes(x: Array) -> Array:
    """The densities of two classes in the plane, (n, 2)."""
    found: Array = norm.pdf(x[:, :1], MEANS) * norm.pdf(x[:, 1:])
    return found


def posterior(x: Array) -> Array:
    joint = classes(x) * ROWS
    shares: Array = joint / joint.sum(1, keepdims=True)
    return shares


def draws(shares: Array, n: int, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    kind = rng.choice(2, n, p=shares)
    return rng.normal(size=(n, 2)) + np.stack([MEANS[kind], np.zeros(n)], 1), kind


def test_with_exact_classes_the_tilted_density_is_the_populations_and_its_constant_is_one() -> None:
    exact, (x, _) = Tilt(ROWS, TEMPERED, FULL, posterior), draws(TEMPERED, 40_000)
    model = classes(x) @ TEMPERED
    tilted = np.log(model) + exact.log_ratio(x)
    np.testing.assert_allclose(tilted, np.log(classes(x) @ FULL), rtol=1e-12)
    constant, error = tilt.log_constant(exact.log_ratio(x))
    assert abs(constant) < 4 * error < 0.05


def tempered_rows(n: int, power: float) -> Rows:
    """Rows of both classes with the weights that make their shares the tempered ones."""
    x, kind = draws(ROWS, n)
    weight = (FULL / np.bincount(kind, minlength=2))[kind] ** (1 / power)
    return Rows(x, pd.DataFrame(index=range(n)), np.empty((n, 0)), weight / weight.mean())


def test_a_fitted_ratio_is_near_the_exact_one_whatever_the_shares_of_the_rows() -> None:
    power = 2.0
    rows = tempered_rows(20_000, power)
    fitted = tilt.fit(rows, power, seed=0)
    np.testing.assert_allclose(fitted.full, FULL, atol=1e-12)
    x, _ = draws(fitted.tempered[::-1], 5_000, seed=1)
    exact = Tilt(fitted.shares, fitted.tempered, FULL, lambda x: _posterior(x, fitted.shares))
    error = fitted.log_ratio(x) - exact.log_ratio(x)
    assert np.abs(error).mean() < 0.2 * np.abs(exact.log_ratio(x)).mean()
    constant, standard = tilt.log_constant(fitted.log_ratio(x))
    assert abs(constant) < 0.05 + 4 * standard


def _posterior(x: Array, shares: Array) -> Array:
    joint = classes(x)[:, ::-1] * shares  # the class of the smaller weight comes first
    found: Array = joint / joint.sum(1, keepdims=True)
    return found


def test_the_error_of_the_constant_is_that_of_the_logarithm_of_a_mean() -> None:
    rng = np.random.default_rng(0)
    found = [tilt.log_constant(rng.normal(0, 0.7, 400)) for _ in range(400)]
    values, errors = np.array(found).T
    assert values.mean() == pytest.approx(0.7**2 / 2, abs=0.01)
    assert values.std() == pytest.approx(errors.mean(), rel=0.15)


@pytest.mark.parametrize("weight", [None, np.linspace(1, 2, 100)], ids=["none", "many"])
def test_weights_that_are_no_classes_are_a_sentence(weight: Array | None) -> None:
    rows = Rows(np.zeros((100, 2)), pd.DataFrame(index=range(100)), np.empty((100, 0)), weight)
    with pytest.raises(UserError, match=r"have (1|100) distinct weights, expected 2 to 20 for a tilt"):
        tilt.fit(rows, 2.0, seed=0)
