"""Expectation maximisation of Gaussian mixtures by products of large matrices, for tables of many rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 1024  # rows whose products of columns are in memory
_SAMPLE = 100_000  # rows that the first clusters are found from


class Mixture(NamedTuple):
    """A mixture of Gaussians.

    Attributes:
        weights: Weights of the components, `(k,)`.
        means: Their means, `(k, d)`.
        covariances: Their covariances, `(k, d, d)`.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor


def fit(rows: Tensor, components: int, iterations: int, ridge: float, seed: int) -> Mixture:
    r"""Fit a mixture of Gaussians with full covariances.

    The first components are clusters of $\log(|y| + 0.1)$, where $y$ are the whitened principal components of a row:
    clusters of its scale and direction, which is what sets patches of images apart. The log-density of a component and
    the sums of a step are linear in the products of the columns, so each takes one product of matrices; scikit-learn,
    which takes several for each component, needs about three times as long.

    Args:
        rows: Rows in double precision, `(n, d)`.
        components: Number of components.
        iterations: Number of steps.
        ridge: What is added to the variances.
        seed: Seed of the clusters.
    """
    mixture = _maximised(rows, _Labels(_clusters(rows, components, seed), components), ridge)
    for _ in range(iterations):
        mixture = _maximised(rows, _Posterior(mixture), ridge)
    return mixture


class _Labels:
    """The shares `(k, n)` of the components in rows that belong to one each."""

    def __init__(self, labels: Tensor, components: int) -> None:
        self.labels, self.components = labels, components

    def __call__(self, first: int, features: Tensor) -> Tensor:
        labels = self.labels[first : first + features.shape[1]]
        return torch.nn.functional.one_hot(labels, self.components).T.to(features.dtype)


class _Posterior:
    """The shares `(k, n)` of the components in rows under a mixture."""

    def __init__(self, mixture: Mixture) -> None:
        weights, means, covariances = mixture
        precision = torch.cholesky_inverse(factors := torch.linalg.cholesky(covariances))
        self.linear = (precision @ means[..., None])[..., 0]
        volume = factors.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = weights.log() - volume - (self.linear * means).sum(1) / 2
        i, j = _pairs(means.shape[1])
        quadratic = precision[:, i, j] * torch.where(i == j, -0.5, -1.0)
        self.coefficients = torch.cat([constant[:, None], self.linear, quadratic], 1)

    def __call__(self, first: int, features: Tensor) -> Tensor:
        return (self.coefficients @ features).softmax(0)


def _maximised(rows: Tensor, shares: _Labels | _Posterior, ridge: float) -> Mixture:
    """Return the mixture of the largest likelihood, given the shares of the components in the rows."""
    d, total = rows.shape[1], None
    for first in range(0, len(rows), _CHUNK):
        features = _features(rows[first : first + _CHUNK])
        part = shares(first, features) @ features.T
        total = part if total is None else total + part
    assert total is not None
    count = total[:, 0].clamp(min=torch.finfo(total.dtype).tiny * 1e10)
    means, i, j = total[:, 1 : d + 1] / count[:, None], *_pairs(d)
    second = total.new_empty(len(total), d, d)
    second[:, i, j] = second[:, j, i] = total[:, d + 1 :] / count[:, None]
    covariances = second - means[:, :, None] * means[:, None, :] + ridge * torch.eye(d, dtype=total.dtype)
    return Mixture(count / count.sum(), means, covariances)


def _features(rows: Tensor) -> Tensor:
    """Return one, the columns and the products of pairs of them, `(1 + d + d (d + 1) / 2, n)`."""
    columns = rows.T.contiguous()
    products = [column * columns[i:] for i, column in enumerate(columns)]
    return torch.cat([torch.ones_like(columns[:1]), columns, *products])


def _pairs(d: int) -> tuple[Tensor, Tensor]:
    i, j = torch.triu_indices(d, d)
    return i, j


def _clusters(rows: Tensor, components: int, seed: int) -> Tensor:
    """Return the number of each row's cluster."""
    from sklearn.cluster import MiniBatchKMeans

    centred = rows - rows.mean(0)
    values, axes = torch.linalg.eigh(centred.T @ centred / len(rows))
    white = centred @ (axes / values.clamp(min=1e-12).sqrt())
    features = (white.abs() + 0.1).log().numpy()
    clusters = MiniBatchKMeans(components, batch_size=4096, n_init=1, random_state=seed)
    every = math.ceil(len(rows) / _SAMPLE)
    return torch.from_numpy(clusters.fit(features[::every]).predict(features)).long()
