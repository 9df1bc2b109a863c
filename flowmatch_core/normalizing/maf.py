"""Masked autoregressive flows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import nn

from flowmatch_core.normalizing._base import Architecture, check_layers
from flowmatch_core.normalizing._zuko import zuko

__all__ = ["MAF"]


@final
@dataclass(frozen=True)
class MAF(Architecture):
    r"""A stack of affine autoregressive layers, $z_i = \mu(x_{<i}) + e^{s(x_{<i})} x_i$, in alternating orders.

    A density takes one pass per layer, a sample one pass per layer and dimension.

    References:
        - Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017),
          https://arxiv.org/abs/1705.07057

    Args:
        transforms: The number of layers.
        hidden: The widths of the hidden layers of their networks.

    Examples:
        >>> MAF(transforms=5, hidden=(128, 128))
        MAF(transforms=5, hidden=(128, 128))
    """

    transforms: int = 3
    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        check_layers("transforms", self.transforms, self.hidden)

    def build(self, event_dim: int, cond_dim: int) -> nn.Module:
        flow = zuko().flows.MAF(event_dim, cond_dim, self.transforms, hidden_features=self.hidden, activation=nn.SiLU)
        transform: nn.Module = flow.transform
        return transform
