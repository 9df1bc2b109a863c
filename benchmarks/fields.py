"""The data and the trained fields that the benchmarks share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

from flowmatch_core.networks import FiLMField, MLPField
from flowmatch_core.objectives import cfm_loss
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import CondOT

__all__ = ["DIM", "NETWORKS", "batches", "double", "eight_gaussians", "tabular", "trained", "trained_tabular"]

DIM = 43
"""The number of columns of MINIBOONE, the usual example of a hard tabular density."""

NETWORKS: dict[str, Callable[[torch.Generator], nn.Module]] = {
    "FiLMField": lambda generator: FiLMField(DIM, (512, 512), generator=generator),
    "MLPField": lambda generator: MLPField(DIM, (512, 512), generator=generator),
}
"""Fields of two hidden layers by name."""


def tabular(n: int, generator: torch.Generator) -> Tensor:
    """Return standardised rows like those of a table: six clusters, each with correlated columns.

    The spreads along the axes of a cluster run from 0.05 to 1, in random directions.
    """
    spreads = torch.logspace(math.log10(0.05), 0, DIM)
    axes = torch.linalg.qr(torch.randn(6, DIM, DIM, generator=generator)).Q
    covariances = axes * spreads.square() @ axes.mT
    means = torch.randn(6, DIM, generator=generator)
    mixture = GaussianMixture(torch.full((6,), 1 / 6), means, covariances)
    x = mixture.sample(n, generator=generator)
    standardised: Tensor = (x - x.mean(0)) / x.std(0)
    return standardised


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """Return points of the eight Gaussians of torchcfm's tutorial, scaled to unit variance."""
    angle = torch.randint(0, 8, (n,), generator=generator) * (math.pi / 4)
    x = 5 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1**0.25 * torch.randn(n, 2, generator=generator)
    standardised: Tensor = x / x.std()
    return standardised


def batches(x: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of random rows without end."""
    while True:
        yield x[torch.randint(len(x), (size,), generator=generator)]


def trained(field: nn.Module, x: Tensor, steps: int, generator: torch.Generator, lr: float = 2e-3) -> nn.Module:
    """Train a field by flow matching and return it frozen: what a solver meets is a trained field."""
    optimizer = torch.optim.Adam(field.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    data = batches(x, 256, generator)
    for _ in range(steps):
        optimizer.zero_grad()
        cfm_loss(field, CondOT(), next(data), generator=generator).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return field.requires_grad_(False)


@cache
def trained_tabular(network: str, quick: bool) -> tuple[nn.Module, Tensor]:
    """Return one of `NETWORKS` trained on tabular data, and rows that it has not seen."""
    generator = torch.Generator().manual_seed(0)
    x = tabular(20_000, generator)
    return trained(NETWORKS[network](generator), x[:-128], 300 if quick else 1500, generator), x[-128:]


def double(field: nn.Module) -> nn.Module:
    """Return a copy in float64."""
    return copy.deepcopy(field).double()
