"""Shape helpers of the oracles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flowmatch_core.field import Time

__all__ = ["CHUNK", "column", "outer", "slices", "time_rows"]

CHUNK = 1_000_000
"""Maximum number of entries of a temporary of shape (samples, rows, components, dimensions)."""


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
