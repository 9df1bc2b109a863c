"""Seeded draws and literals, in float64 unless asked otherwise."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
