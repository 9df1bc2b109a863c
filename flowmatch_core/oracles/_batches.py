"""Shape helpers of the oracles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flowmatch_core.field import Time

__all__ = ["CHUNK", "check_covariance", "column", "outer", "slices", "time_rows"]

CHUNK = 1_000_000
"""Maximum number of entries of a temporary of shape (samples, rows, components, dimensions)."""


def check_covariance(name: str, covariance: Tensor, variances: Tensor) -> None:
    """Raise a `ValueError` unless matrices are symmetric and not indefinite, up to rounding.

    Args:
        name: What an error calls them.
        covariance: The matrices, with shape `(*batch, d, d)`.
        variances: Their eigenvalues, with shape `(*batch, d)`.

    Examples:
        >>> matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> check_covariance("W", matrix, torch.linalg.eigvalsh(matrix))
        Traceback (most recent call last):
        ValueError: W has the eigenvalue -1, but should be a covariance, without negative ones.
    """
    rounding = 1e-4 * float(covariance.detach().abs().max())
    if float((covariance - covariance.mT).detach().abs().max()) > rounding:
        raise ValueError(f"{name} is not symmetric, but should be a covariance; pass (W + W.mT) / 2 for W.")
    if (least := float(variances.detach().min())) < -rounding:
        raise ValueError(f"{name} has the eigenvalue {least:.4g}, but should be a covariance, without negative ones.")


def outer(a: Tensor, b: Tensor) -> Tensor:
    """Return the outer product of the last dimensions."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def time_rows(t: Time, x: Tensor) -> Tensor:
    """Return the time as a tensor with the dtype and device of `x`."""
    return torch.as_tensor(t, dtype=x.dtype, device=x.device)


def column(value: Tensor) -> Tensor:
    """Return the tensor with two trailing dimensions of size one."""
    return value[..., None, None]


def slices(length: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover `length`; one empty slice for a length of 0."""
    return (slice(start, start + size) for start in range(0, max(length, 1), size))
