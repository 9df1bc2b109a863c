"""A path with user-defined coefficients."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast, final

import torch
from torch import Tensor

from flowmatch_core._tensors import check_shape
from flowmatch_core.field import Time
from flowmatch_core.paths._affine import AffinePath, time_tensor

__all__ = ["CustomPath"]

_HALVINGS = 60  # of [0, 1]: below the rounding of float64


@final
class CustomPath(AffinePath):
    r"""A path whose $\alpha_t$ and $\sigma_t$ are given as functions.

    Their derivatives are taken by forward-mode automatic differentiation, and the inverse of their ratio,
    which should increase, by bisection. Where $\sigma_t = 0$ and $\dot\sigma_t$ is infinite, the product
    `sigma_d_sigma` is `nan`: write a subclass of `AffinePath` for such a path (see `VP`).

    Args:
        alpha: The weight of the data, a function of a tensor of times with a result of the same shape.
        sigma: The weight of the noise, likewise.

    Examples:
        >>> path = CustomPath(alpha=lambda t: t**3, sigma=lambda t: (1 - t) * (1 + t))
        >>> path.d_alpha(0.5), path.d_sigma(0.5)
        (tensor(0.7500, dtype=torch.float64), tensor(-1., dtype=torch.float64))
    """

    def __init__(self, alpha: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor]) -> None:
        self._alpha, self._sigma = alpha, sigma

    def __repr__(self) -> str:
        return f"CustomPath(alpha={self._alpha!r}, sigma={self._sigma!r})"

    def alpha(self, t: Time) -> Tensor:
        return _value("alpha", self._alpha, t)

    def sigma(self, t: Time) -> Tensor:
        return _value("sigma", self._sigma, t)

    def d_alpha(self, t: Time) -> Tensor:
        return _derivative(self._alpha, t)

    def d_sigma(self, t: Time) -> Tensor:
        return _derivative(self._sigma, t)

    def sigma_d_sigma(self, t: Time) -> Tensor:
        return self.sigma(t) * self.d_sigma(t)

    def time_of_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        def early(t: Tensor) -> Tensor:
            return self.alpha(t) * sigma < self.sigma(t) * alpha

        start = torch.zeros_like(alpha)
        low, high = start, torch.ones_like(alpha)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            below = early(middle)
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(early(start), high, start)  # exact at both ends


def _value(name: str, function: Callable[[Tensor], Tensor], t: Time) -> Tensor:
    t = time_tensor(t)
    value = function(t)
    check_shape(f"the result of {name}", value, t.shape)
    return value


def _derivative(function: Callable[[Tensor], Tensor], t: Time) -> Tensor:
    t = time_tensor(t).contiguous()  # an expanded tensor cannot carry a tangent
    return cast(tuple[Tensor, Tensor], torch.func.jvp(function, (t,), (torch.ones_like(t),)))[1]
