"""Neural autoregressive flows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from flowmatch_core.normalizing._base import Architecture, check_layers
from flowmatch_core.normalizing._zuko import zuko

__all__ = ["NAF"]


@final
@dataclass(frozen=True)
class NAF(Architecture):
    r"""A stack of autoregressive layers $z_i = g(x_i; h(x_{<i}))$ with monotonic networks `g`, like MAF-DDSF.

    The weights of `g` are positive. The dependence on the other dimensions enters as an input `h`, while in the deep
    dense sigmoidal flow (DDSF) of the paper it determines the weights. A density takes one pass per layer, a sample a
    bisection per dimension.

    References:
        - Neural Autoregressive Flows (Huang et al., 2018), https://arxiv.org/abs/1804.00779

    Args:
        transforms: The number of layers.
        hidden: The widths of the hidden layers of the networks of `h`.
        signal: The number of dimensions of `h`.
        monotonic: The widths of the hidden layers of `g`, even numbers.

    Examples:
        >>> NAF(transforms=2)
        NAF(transforms=2, hidden=(64, 64), signal=16, monotonic=(64, 64))
    """

    transforms: int = 3
    hidden: tuple[int, ...] = (64, 64)
    signal: int = 16
    monotonic: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        check_layers("transforms", self.transforms, self.hidden)
        if self.signal < 1:
            raise ValueError(f"signal is {self.signal}, but should be at least 1.")
        if not self.monotonic or any(width < 2 or width % 2 for width in self.monotonic):
            raise ValueError(f"monotonic is {self.monotonic}, but should hold at least one width, all even.")

    def build(self, event_dim: int, cond_dim: int) -> nn.Module:
        z = zuko()
        layers: list[nn.Module] = []
        for i in range(self.transforms):
            order = torch.arange(event_dim)
            layers.append(
                z.flows.MaskedAutoregressiveTransform(
                    event_dim,
                    cond_dim,
                    order=order.flip(0) if i % 2 else order,
                    univariate=_Monotonic(event_dim, self.signal, self.monotonic),
                    shapes=[(self.signal,)],
                    hidden_features=self.hidden,
                    activation=nn.SiLU,
                )
            )
        transform: nn.Module = z.lazy.LazyComposedTransform(*layers)
        return transform


class _Monotonic(nn.Module):
    """The networks `g`, one per dimension."""

    def __init__(self, event_dim: int, signal: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.network = zuko().nn.MonotonicMLP(1 + signal, 1, hidden, stack=event_dim)

    def forward(self, signal: Tensor) -> Transform:
        return _MonotonicTransform(partial(self._value, signal))

    def _value(self, signal: Tensor, x: Tensor) -> Tensor:
        x, signal = zuko().utils.broadcast(x[..., None], signal, ignore=1)
        value: Tensor = self.network(torch.cat([x, signal], -1)).squeeze(-1)
        return value


class _MonotonicTransform(Transform):
    """An increasing function of each entry, with an inverse on the whole line.

    The inverse of zuko searches [-10, 10] and clamps values outside, so that samples and densities of its `NAF`
    belong to different laws. It is also accurate to 1e-6 only, and in the gradient of a sample the weights count
    twice: directly, and through the signal of earlier dimensions.
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def _call(self, x: Tensor) -> Tensor:
        return self.function(x)

    def _inverse(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            low, high = torch.full_like(y, -1.0), torch.full_like(y, 1.0)
            for _ in range(20):  # up to 10^6
                low = torch.where(self.function(low) > y, 2 * low, low)
                high = torch.where(self.function(high) < y, 2 * high, high)
            halvings = round(-math.log2(torch.finfo(y.dtype).eps)) + 4
            x: Tensor = zuko().utils.bisection(self.function, y, low, high, n=halvings)
        _, slope = self._value_and_slope(x, graph=False)
        # one Newton step provides the gradients of the implicit function
        return x - (self.function(x) - y) / slope

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, slope = self._value_and_slope(x, graph=torch.is_grad_enabled())
        return y, slope.log()

    def _value_and_slope(self, x: Tensor, graph: bool) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = x.clone().requires_grad_() if graph else x.detach().requires_grad_()
            y = self.function(at)
            (slope,) = torch.autograd.grad(y.sum(), at, create_graph=graph)
        return y, slope
