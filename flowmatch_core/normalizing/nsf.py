"""Neural spline flows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import nn

from flowmatch_core.normalizing._base import Architecture, check_layers
from flowmatch_core.normalizing._zuko import zuko

__all__ = ["NSF"]


@final
@dataclass(frozen=True)
class NSF(Architecture):
    """A stack of autoregressive layers of monotonic rational-quadratic splines on [-5, 5].

    Outside the interval a layer is the identity, so standardise the data.

    References:
        - Neural Spline Flows (Durkan et al., 2019), https://arxiv.org/abs/1906.04032

    Args:
        transforms: The number of layers.
        hidden: The widths of the hidden layers of their networks.
        bins: The number of bins of a spline.

    Examples:
        >>> NSF(bins=16)
        NSF(transforms=3, hidden=(64, 64), bins=16)
    """

    transforms: int = 3
    hidden: tuple[int, ...] = (64, 64)
    bins: int = 8

    def __post_init__(self) -> None:
        check_layers("transforms", self.transforms, self.hidden)
        if self.bins < 2:
            raise ValueError(f"bins is {self.bins}, but should be at least 2.")

    def build(self, event_dim: int, cond_dim: int) -> nn.Module:
        flow = zuko().flows.NSF(
            event_dim,
            cond_dim,
            transforms=self.transforms,
            bins=self.bins,
            hidden_features=self.hidden,
            activation=nn.SiLU,
        )
        transform: nn.Module = flow.transform
        return transform
