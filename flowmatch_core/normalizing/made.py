"""The masked autoencoder as a density."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import nn

from flowmatch_core.normalizing._base import Architecture, check_layers
from flowmatch_core.normalizing.maf import MAF

__all__ = ["MADE"]


@final
@dataclass(frozen=True)
class MADE(Architecture):
    r"""A product of Gaussians, $p(x) = \prod_i N(x_i; m(x_{<i}), s(x_{<i})^2)$, by one masked network.

    It is a single layer of `MAF`.

    References:
        - MADE: Masked Autoencoder for Distribution Estimation (Germain et al., 2015),
          https://arxiv.org/abs/1502.03509

    Args:
        hidden: The widths of the hidden layers of the network.

    Examples:
        >>> MADE(hidden=(512,))
        MADE(hidden=(512,))
    """

    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        check_layers("the number of layers", 1, self.hidden)

    def build(self, event_dim: int, cond_dim: int) -> nn.Module:
        return MAF(1, self.hidden).build(event_dim, cond_dim)
