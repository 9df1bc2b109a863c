"""Densities that are fitted without gradient steps: Gaussian, Gaussian mixture, kernel density, independent columns.

Each is fitted to the standardised rows that the other methods are trained on. Given conditions, it is the density of
the residuals of the (weighted) least-squares fit of the targets on the encoded conditions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowmatch_core.mixture import MixtureFlow
from pipelines.base.errors import UserError
from pipelines.training import expectation
from pipelines.training.rows import Batch, Prepared

GAUSSIAN_ROWS, MIXTURE_ROWS, KERNEL_ROWS, CHECKED_ROWS = 1_000_000, 50_000, 20_000, 2048
"""Maximum numbers of training rows of a fit, and of the rows of a loss; a longer table is thinned out evenly."""

RIDGE = 1e-6
"""Added to the variances, which are 1 on average, as scikit-learn does."""

COMPONENTS = (1, 2, 4, 8, 16, 32)
"""Numbers of components that are tried in this order until the validation loss rises."""


@dataclass(frozen=True)
class ClosedForm:
    """A fitted density of standardised targets.

    Attributes:
        network: The density.
        losses: Negative log-likelihood of training and validation rows, `loss` and `val_loss`.
    """

    network: MixtureFlow
    losses: Mapping[str, float]


class _Residuals(NamedTuple):
    """Targets without the part that is linear in the conditions, the slopes of that part, and weights of mean 1."""

    rows: Tensor
    slopes: Tensor | None
    weight: Tensor


def gaussian(data: Prepared) -> ClosedForm:
    """Fit a Gaussian with a full covariance by the weighted moments."""
    rows, slopes, weight = _residuals(data.rows("train", GAUSSIAN_ROWS))
    mean = (weight[:, None] * rows).mean(0)
    covariance = (weight[:, None] * (rows - mean)).T @ (rows - mean) / len(rows)
    factor = torch.linalg.cholesky(covariance + RIDGE * torch.eye(len(mean), dtype=torch.float64))
    return _with_losses(data, MixtureFlow(torch.ones_like(weight[:1]), mean[None], factor[None], slopes))


def independent(data: Prepared) -> ClosedForm:
    """Fit a Gaussian without covariances, whose columns do not depend on the conditions either.

    Where the columns have transforms to normal ones, it is the density of independent columns of these distributions.
    """
    train = data.rows("train", GAUSSIAN_ROWS)
    rows, _, weight = _residuals(train._replace(cond=None))
    mean = (weight[:, None] * rows).mean(0)
    variances = (weight[:, None] * (rows - mean) ** 2).mean(0)
    slopes = None if train.cond is None else rows.new_zeros(train.cond.shape[1], len(mean))
    factor = (variances + RIDGE).sqrt().diag()
    return _with_losses(data, MixtureFlow(torch.ones_like(weight[:1]), mean[None], factor[None], slopes))


def gaussian_mixture(data: Prepared, components: int | None = None) -> ClosedForm:
    """Fit scikit-learn's Gaussian mixture with full covariances.

    It has no weights of rows, so weighted rows are drawn in proportion to their weights first.

    Args:
        data: Data set.
        components: Number of components; by default that of the smallest validation loss.

    Raises:
        UserError: There are more components than training rows.
    """
    rows, slopes = _drawn_by_weight(data, MIXTURE_ROWS)
    if components is not None:
        _check_components("gaussian_mixture", components, len(rows))
    best: ClosedForm | None = None
    for count in COMPONENTS if components is None else (components,):
        if count > len(rows):
            break
        fitted = _with_losses(data, _mixture(rows, slopes, count))
        if best is not None and not fitted.losses["val_loss"] < best.losses["val_loss"]:
            break
        best = fitted
    assert best is not None  # there is at least one row
    return best


def large_mixture(data: Prepared, components: int = 48, rows: int = 250_000, iterations: int = 12) -> ClosedForm:
    """Fit a Gaussian mixture with full covariances to many rows; see `pipelines.training.expectation`.

    Args:
        data: Data set.
        components: Number of components.
        rows: Maximum number of training rows; a longer table is thinned out evenly.
        iterations: Number of steps.

    Raises:
        UserError: There are more components than training rows.
    """
    residuals, slopes = _drawn_by_weight(data, rows)
    _check_components("large_mixture", components, len(residuals))
    weights, means, covariances = expectation.fit(
        residuals, components, iterations, RIDGE, torch.initial_seed() % 2**32
    )
    return _with_losses(data, MixtureFlow(weights, means, torch.linalg.cholesky(covariances), slopes))


def kernel_density(data: Prepared, bandwidth: float | None = None) -> ClosedForm:
    """Place a Gaussian kernel on each training row.

    Args:
        data: Data set.
        bandwidth: Standard deviation of the kernels, in standard deviations of the columns; by default that of the
            smallest validation loss.
    """
    from scipy.optimize import minimize_scalar

    rows, slopes, weight = _residuals(data.rows("train", KERNEL_ROWS))

    def kernels(width: float) -> MixtureFlow:
        return MixtureFlow(weight, rows, width * torch.eye(rows.shape[1], dtype=torch.float64)[None], slopes)

    if bandwidth is None:
        checked = data.rows("val", CHECKED_ROWS // 2)
        bounds = math.log(0.005), math.log(3.0)
        found = minimize_scalar(
            lambda log: _loss(kernels(math.exp(log)), checked), bounds=bounds, method="bounded", options={"xatol": 0.02}
        )
        bandwidth = math.exp(float(found.x))
    return _with_losses(data, kernels(bandwidth))


def _drawn_by_weight(data: Prepared, limit: int) -> tuple[Tensor, Tensor | None]:
    """Return residuals, drawn in proportion to their weights where these differ, and the slopes."""
    rows, slopes, weight = _residuals(data.rows("train", limit))
    if bool((weight != weight[0]).any()):
        generator = torch.Generator().manual_seed(torch.initial_seed())
        rows = rows[torch.multinomial(weight, len(rows), replacement=True, generator=generator)]
    return rows, slopes


def _check_components(name: str, components: int, rows: int) -> None:
    if components > rows:
        raise UserError(
            f"params.yaml: {name} has {components} components for {rows} training rows; expected no more than there "
            "are rows."
        )


def _mixture(rows: Tensor, slopes: Tensor | None, components: int) -> MixtureFlow:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(components, reg_covar=RIDGE, max_iter=200, random_state=torch.initial_seed() % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last iterations change the likelihood by little
        model.fit(rows.numpy())
    factors = np.linalg.cholesky(model.covariances_)
    tiny = np.finfo(float).tiny  # a component may have lost all of its rows
    weights, means, lower = map(torch.from_numpy, (model.weights_.clip(tiny), model.means_, factors))
    return MixtureFlow(weights, means, lower, slopes)


def _residuals(batch: Batch) -> _Residuals:
    """Return the residuals of targets on conditions by weighted least squares; the intercept stays in the residuals."""
    x = batch.x
    weight = torch.ones(len(x), dtype=torch.float64) if batch.weight is None else batch.weight / batch.weight.mean()
    if batch.cond is None:
        return _Residuals(x, None, weight)
    root = weight.sqrt()[:, None]
    design = torch.cat([batch.cond, torch.ones_like(root)], 1)
    # of the smallest norm, because the columns of one-hot words add up to the intercept's
    slopes = torch.linalg.lstsq(root * design, root * x, driver="gelsd").solution[:-1]
    return _Residuals(x - batch.cond @ slopes, slopes, weight)


def _with_losses(data: Prepared, network: MixtureFlow) -> ClosedForm:
    train, val = (_loss(network, data.rows(part, CHECKED_ROWS)) for part in ("train", "val"))
    return ClosedForm(network, {"loss": train, "val_loss": val})


def _loss(network: MixtureFlow, rows: Batch) -> float:
    value = -network.log_prob(rows.x, rows.cond)
    return float((value if rows.weight is None else rows.weight * value).mean())
