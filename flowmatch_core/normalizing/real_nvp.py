"""Affine coupling layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import nn

from flowmatch_core.normalizing._base import Architecture, check_layers
from flowmatch_core.normalizing._zuko import zuko

__all__ = ["RealNVP"]


@final
@dataclass(frozen=True)
class RealNVP(Architecture):
    r"""A stack of affine couplings, $z_a = x_a$, $z_b = \mu(x_a) + e^{s(x_a)} x_b$, of alternating halves.

    Density and sample take one pass per layer.

    References:
        - Density Estimation Using Real NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803

    Args:
        transforms: The number of layers.
        hidden: The widths of the hidden layers of their networks.

    Examples:
        >>> RealNVP(transforms=8)
        RealNVP(transforms=8, hidden=(64, 64))
    """

    transforms: int = 6
    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        check_layers("transforms", self.transforms, self.hidden)

    def build(self, event_dim: int, cond_dim: int) -> nn.Module:
        flow = zuko().flows.RealNVP(
            event_dim, cond_dim, self.transforms, hidden_features=self.hidden, activation=nn.SiLU
        )
        transform: nn.Module = flow.transform
        return transform
