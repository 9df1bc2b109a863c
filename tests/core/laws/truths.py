"""What the laws are tested on: every path, data whose marginals are known, and seeded draws in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import OU, VE, VP, AffinePath, CondOT, Cosine, CustomPath, Polynomial

PATHS: list[AffinePath] = [
    CondOT(),
    CondOT(sigma_min=0.1),
    Cosine(),
    Polynomial(2),
    VP(),
    VE(sigma_min=0.05, sigma_max=8.0),
    OU(horizon=3.0),
    CustomPath(alpha=lambda t: (t + t**2) / 2, sigma=lambda t: torch.cos(torch.pi / 2 * t) ** 2 + 0.05 * t),
]

on_every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gaussian() -> GaussianMixture:
    """N((1, -2), C) with correlated dimensions."""
    covariance = torch.tensor([[[0.8, 0.3], [0.3, 0.5]]], dtype=torch.float64)
    return GaussianMixture(tensor(1.0), torch.tensor([[1.0, -2.0]], dtype=torch.float64), covariance)


def mixture() -> GaussianMixture:
    """Three unlike components in the plane."""
    means = torch.tensor([[-1.5, 0.5], [1.0, 1.0], [0.5, -2.0]], dtype=torch.float64)
    factors = torch.tensor(
        [[[0.6, 0.0], [0.2, 0.3]], [[0.2, 0.0], [-0.1, 0.9]], [[0.5, 0.0], [0.0, 0.5]]], dtype=torch.float64
    )
    return GaussianMixture(tensor(0.5, 0.3, 0.2), means, factors @ factors.mT)


def line() -> GaussianMixture:
    """Two components on the line."""
    means, variances = tensor(-1.2, 1.6), tensor(0.3, 0.1)
    return GaussianMixture(tensor(0.7, 0.3), means[:, None], variances[:, None, None])
