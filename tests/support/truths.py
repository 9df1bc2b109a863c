"""What the laws are tested on: every path, data whose marginals are known, and seeded draws in float64."""

from __future__ import annotations

import pytest
import torch

from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import OU, VE, VP, AffinePath, CondOT, Cosine, CustomPath, Polynomial
from tests.support.random import tensor

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


def two_normals() -> GaussianMixture:
    """Two components on the line."""
    means, variances = tensor(-1.2, 1.6), tensor(0.3, 0.1)
    return GaussianMixture(tensor(0.7, 0.3), means[:, None], variances[:, None, None])


def overlapping() -> GaussianMixture:
    """Three correlated components in the plane that overlap."""
    means = torch.tensor([[-1.0, 0.5], [1.5, -1.0], [0.0, 1.0]], dtype=torch.float64)
    covariances = torch.stack([torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64) * (k + 1) for k in range(3)])
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means, covariances)
