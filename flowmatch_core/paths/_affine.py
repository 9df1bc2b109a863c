"""Affine conditional paths: the interpolation, its velocity, and what a network may predict along it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from flowmatch_core.fields import Time, as_time, check_choice, check_shape, expand_time

__all__ = ["AffinePath", "PathSample", "Quantity", "time_tensor"]

Quantity = Literal["velocity", "score", "noise", "data"]
"""What a network may predict at `(t, x)`: `E[x_t' | x]`, `grad log p_t(x)`, `E[x0 | x]` or `E[x1 | x]`."""


@dataclass(frozen=True)
class PathSample:
    """A point of the path and its velocity, both `(batch, *event)`, with its time, `()` or `(batch,)`."""

    x_t: Tensor
    velocity: Tensor
    t: Tensor


class AffinePath(ABC):
    r"""The path :math:`x_t = \alpha_t x_1 + \sigma_t x_0` from noise `x0` to data `x1`.

    A member gives `alpha`, `sigma` and their derivatives. Each takes a time of any shape (or a float,
    computed in float64) and returns a tensor of that shape. :math:`\sigma_t` should be exactly zero where
    its formula is.

    References:
        | Flow Matching for Generative Modeling (Lipman et al., 2023), https://arxiv.org/abs/2210.02747
    """

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        r"""Return :math:`\alpha_t`, the weight of the data."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        r"""Return :math:`\sigma_t`, the weight of the noise."""

    @abstractmethod
    def d_alpha(self, t: Time) -> Tensor:
        r"""Return :math:`\dot\alpha_t`."""

    @abstractmethod
    def d_sigma(self, t: Time) -> Tensor:
        r"""Return :math:`\dot\sigma_t`."""

    def sample(self, x0: Tensor, x1: Tensor, t: Time) -> PathSample:
        r"""Return the point :math:`\alpha_t x_1 + \sigma_t x_0` and its velocity :math:`\dot\alpha_t x_1 +
        \dot\sigma_t x_0`.

        Arguments:
            x0: The noise, with shape `(batch, *event)`.
            x1: The data, with the same shape.
            t: The time, a float, 0-d or `(batch,)`.

        Example:
            >>> from flowmatch_core.paths import CondOT
            >>> CondOT().sample(torch.zeros(2, 1), torch.ones(2, 1), 0.25).x_t
            tensor([[0.2500],
                    [0.2500]])
        """
        check_shape("x0", x0, x1.shape)
        s = expand_time(t, x1)
        return PathSample(
            x_t=self.alpha(s) * x1 + self.sigma(s) * x0,
            velocity=self.d_alpha(s) * x1 + self.d_sigma(s) * x0,
            t=as_time(t, x1),
        )

    def conditional_velocity(self, t: Time, x: Tensor, x1: Tensor) -> Tensor:
        r"""Return :math:`u_t(x \mid x_1) = \dot\alpha_t x_1 + \dot\sigma_t (x - \alpha_t x_1) / \sigma_t`.

        Where :math:`\sigma_t = 0` (`t = 1` on a path that ends in the data) `x` says nothing about the
        noise, so :math:`u_t` has no limit there. The noise is then replaced by its mean, zero: the value
        :math:`\dot\alpha_t x_1` is the average velocity :math:`E[\dot x_t \mid x_1]`, is finite, and is the
        limit along the centre :math:`x = \alpha_t x_1` of the path.

        Arguments:
            t: The time, a float, 0-d or `(batch,)`.
            x: The point, with shape `(batch, *event)`.
            x1: The data, with the same shape.
        """
        return self.convert(x1, t, x, source="data", target="velocity")

    def convert(self, value: Tensor, t: Time, x: Tensor, source: Quantity, target: Quantity) -> Tensor:
        r"""Turn a prediction of one quantity at `(t, x)` into another.

        All four are affine in the pair :math:`(E[x_0 \mid x], E[x_1 \mid x])`, and `x` itself fixes one
        combination:

        .. math:: x = \alpha_t x_1 + \sigma_t x_0, \quad v = \dot\alpha_t x_1 + \dot\sigma_t x_0, \quad
                  \nabla \log p_t(x) = -x_0 / \sigma_t .

        The result is exact at the ends wherever it has a limit. Where it has none (the input no longer
        determines the output) it is the mean of the noise, zero, for a noise sought at :math:`\sigma_t = 0`
        (see `conditional_velocity`), and `nan` for what cannot be known: the data at :math:`\alpha_t = 0`
        from noise or score, and the score at :math:`\sigma_t = 0`.

        Arguments:
            value: The prediction, with shape `(batch, *event)`.
            t: The time, a float, 0-d or `(batch,)`.
            x: The point, with the shape of `value`.
            source: What `value` is.
            target: What is wanted.

        Example:
            >>> from flowmatch_core.paths import CondOT
            >>> x, velocity = torch.ones(1, 1), torch.full((1, 1), 3.0)
            >>> CondOT().convert(velocity, 0.5, x, source="velocity", target="data")
            tensor([[2.5000]])
        """
        check_choice("source", source, get_args(Quantity))
        check_choice("target", target, get_args(Quantity))
        check_shape("value", value, x.shape)
        s = expand_time(t, x)
        if source == target:
            return value
        alpha, sigma, d_alpha, d_sigma = self.alpha(s), self.sigma(s), self.d_alpha(s), self.d_sigma(s)
        if source == "velocity":
            determinant = d_alpha * sigma - alpha * d_sigma
            noise = (d_alpha * x - alpha * value) / determinant
            data = (sigma * value - d_sigma * x) / determinant
        elif source == "data":
            noise, data = _divide(x - alpha * value, sigma, otherwise=0.0), value
        else:
            noise = value if source == "noise" else -sigma * value
            data = _divide(x - sigma * noise, alpha, otherwise=math.nan)
        if target == "velocity":
            return d_alpha * data + d_sigma * noise
        if target == "score":
            return -_divide(noise, sigma, otherwise=math.nan)
        return noise if target == "noise" else data


def time_tensor(t: Time) -> Tensor:
    """Return a tensor as it is and a float as a 0-d tensor of float64, which promotes no other."""
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


def _divide(numerator: Tensor, denominator: Tensor, otherwise: float) -> Tensor:
    zero = denominator == 0  # the inner `where` keeps the gradient of the other rows finite
    return torch.where(zero, otherwise, numerator / torch.where(zero, 1.0, denominator))
