"""Partial whitening: a linear map that makes the covariance of data closer to the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmatch_core._tensors import check_finite, check_shape

__all__ = ["partial_whitening"]


def partial_whitening(x: Tensor, weight: Tensor | None = None, *, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Return the mean $m$ of data and the matrix $A$ of the map $u = A (x - m)$, in float64.

    $$
    A = \Lambda^{-w / 2}\, Q^T, \qquad C = Q \Lambda Q^T
    $$

    for the covariance $C$ of the data: the components of $u$ are uncorrelated, with the variances $\lambda_i^{1 - w}$.
    Whitening in full gives the directions of small variance, where there are few independent numbers to learn from,
    the same share of a regression as the others; a strength between 0 and 1 is a compromise. As the `loc`, `scale`
    and `whitening` of a flow, they leave its density one of $x$.

    Args:
        x: The data, with shape `(n, d)`.
        weight: The weights of the rows, not negative, with shape `(n,)`; None for ones.
        strength: The strength $w$ in (0, 1].

    Examples:
        >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 0.1]) + 7
        >>> mean, matrix = partial_whitening(x)
        >>> (((x - mean) @ matrix.T).T.cov() - torch.eye(2)).abs().max() < 2e-3  # n - 1 in place of n
        tensor(True)
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}, but should be above 0 and at most 1.")
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but should be (n, d) with two rows or more.")
    check_finite("x", x)
    x = x.double()
    if weight is None:
        weight = torch.ones(len(x), dtype=torch.float64, device=x.device)
    check_shape("weight", weight, (len(x),))
    if not bool((weight >= 0).all() and weight.sum() > 0 and weight.isfinite().all()):
        raise ValueError("weight holds values that are negative, not finite or all zero, but should hold weights.")
    share = weight.double() / weight.double().sum()
    mean = share @ x
    centred = x - mean
    values, vectors = torch.linalg.eigh(centred.T @ (share[:, None] * centred))
    smallest = float(values[0] / values[-1])
    if not smallest > len(values) * torch.finfo(torch.float64).eps:
        raise ValueError(
            "x has a singular covariance, but its columns should be linearly independent: no column should be constant "
            "or a combination of others."
        )
    return mean, values.pow(-strength / 2)[:, None] * vectors.T
