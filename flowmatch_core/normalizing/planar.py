"""Planar flows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from flowmatch_core.normalizing._base import Architecture, check_layers
from flowmatch_core.normalizing._zuko import zuko

__all__ = ["Planar"]


@final
@dataclass(frozen=True)
class Planar(Architecture):
    r"""A stack of planar maps from noise to data, $f(z) = z + u \tanh(w^T z + b)$.

    A map moves points along `u` only, by a function of one direction `w`, so many are needed. It is invertible,
    because $w^T u > -1$ by construction; the inverse is the root of an increasing function of one variable, $s + w^T
    u \tanh(s + b) = w^T x$, found to machine precision by bisection.

    References:
        - Variational Inference with Normalizing Flows (Rezende & Mohamed, 2015), https://arxiv.org/abs/1505.05770

    Args:
        transforms: The number $K$ of maps.
        hidden: The widths of the hidden layers of the networks that map a condition to `u`, `w` and `b`;
            without a condition these are parameters themselves.

    Examples:
        >>> Planar(transforms=32)
        Planar(transforms=32, hidden=(64, 64))
    """

    transforms: int = 16
    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        check_layers("transforms", self.transforms, self.hidden)

    def build(self, event_dim: int, cond_dim: int) -> nn.Module:
        layers = (_PlanarLayer(event_dim, cond_dim, self.hidden) for _ in range(self.transforms))
        transform: nn.Module = zuko().lazy.LazyComposedTransform(*layers)
        return transform


class _PlanarLayer(nn.Module):
    def __init__(self, event_dim: int, cond_dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.event_dim = event_dim
        if cond_dim:
            self.network = zuko().nn.MLP(cond_dim, 2 * event_dim + 1, hidden, activation=nn.SiLU)
        else:
            bound = event_dim**-0.5
            self.values = nn.Parameter(torch.empty(2 * event_dim + 1).uniform_(-bound, bound))

    def forward(self, cond: Tensor | None) -> Transform:
        values = self.values if cond is None else self.network(cond)
        u, w, b = values.split([self.event_dim, self.event_dim, 1], -1)
        # ensures w.u > -1 by changing the component of u along w only
        along = (w * u).sum(-1, keepdim=True)
        square = w.square().sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        u = u + (F.softplus(along) - 1 - along) * w / square
        inverse: Transform = PlanarTransform(u, w, b).inv
        return inverse


class PlanarTransform(Transform):
    r"""The map $x = z + u \tanh(w^T z + b)$ with $w^T u > -1$.

    Args:
        u: The direction of the shift, with shape `(*, d)`.
        w: The direction that it depends on, with the same shape.
        b: The offset, with shape `(*, 1)`.

    Examples:
        >>> planar = PlanarTransform(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.zeros(1))
        >>> planar(torch.tensor([3.0, 0.5]))
        tensor([3.4621, 0.5000])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, u: Tensor, w: Tensor, b: Tensor) -> None:
        super().__init__()
        self.u, self.w, self.b = u, w, b

    def _call(self, x: Tensor) -> Tensor:
        return x + self.u * torch.tanh((self.w * x).sum(-1, keepdim=True) + self.b)

    def _inverse(self, y: Tensor) -> Tensor:
        along = (self.w * self.u).sum(-1, keepdim=True)
        target = (self.w * y).sum(-1, keepdim=True)

        def height(s: Tensor) -> Tensor:
            return s + along * torch.tanh(s + self.b)

        with torch.no_grad():
            width = along.abs()
            halvings = round(-math.log2(torch.finfo(y.dtype).eps)) + 2
            s: Tensor = zuko().utils.bisection(height, target, target - width, target + width, n=halvings)
            slope = 1 + along / torch.cosh(s + self.b).square()
        # one Newton step removes the rounding error and provides the gradients of the implicit function
        s = s - (height(s) - target) / slope
        return y - self.u * torch.tanh(s + self.b)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        z = (self.w * x).sum(-1) + self.b.squeeze(-1)
        along = (self.w * self.u).sum(-1)
        return torch.log1p(along * (1 - torch.tanh(z).square()))
