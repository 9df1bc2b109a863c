"""Shape helpers of the oracles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flowmatch_core.field import Time

__all__ = ["CHUNK", "column", "outer", "slices", "time_rows"]

CHUNK = 1_000_000  # numbers a temporary of shape (samples, rows, components, dimensions) may hold


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def time_rows(t: Time, x: Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=x.dtype, device=x.device)


def column(value: Tensor) -> Tensor:
    return value[..., None, None]


def slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, max(length, 1), size))
