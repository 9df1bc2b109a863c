"""Affine couplings between invertible linear maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from flowmatch_core.normalizing._base import Architecture, check_layers
from flowmatch_core.normalizing._zuko import zuko

__all__ = ["Glow"]


@final
@dataclass(frozen=True)
class Glow(Architecture):
    r"""A stack of steps, each a scale and shift, a linear map $L U P x$ and an affine coupling.

    The linear map mixes all dimensions, in place of the alternating halves of `RealNVP`; `P` is a fixed random
    permutation, `L` and `U` start at the identity. For vectors the invertible 1x1 convolution of the paper is this
    map. The scale and shift start at one and zero: the standardisation of the flow replaces the data-dependent
    initialisation of the paper.

    References:
        - Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018),
          https://arxiv.org/abs/1807.03039

    Args:
        steps: The number of steps.
        hidden: The widths of the hidden layers of the networks of the couplings.

    Examples:
        >>> Glow(steps=4)
        Glow(steps=4, hidden=(64, 64))
    """

    steps: int = 6
    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        check_layers("steps", self.steps, self.hidden)

    def build(self, event_dim: int, cond_dim: int) -> nn.Module:
        z = zuko()
        layers: list[nn.Module] = []
        for _ in range(self.steps):
            layers += [
                z.lazy.UnconditionalTransform(_scale_and_shift, torch.zeros(event_dim), torch.zeros(event_dim)),
                z.lazy.UnconditionalTransform(
                    z.transforms.PermutationTransform, torch.randperm(event_dim), buffer=True
                ),
                z.lazy.UnconditionalTransform(z.transforms.LULinearTransform, torch.eye(event_dim)),
                z.flows.GeneralCouplingTransform(event_dim, cond_dim, hidden_features=self.hidden, activation=nn.SiLU),
            ]
        transform: nn.Module = z.lazy.LazyComposedTransform(*layers)
        return transform


def _scale_and_shift(shift: Tensor, scale: Tensor) -> Transform:
    transforms = zuko().transforms
    transform: Transform = transforms.DependentTransform(transforms.MonotonicAffineTransform(shift, scale), 1)
    return transform
