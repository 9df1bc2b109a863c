r"""Schedules: the probability $\kappa_t$ of data, which increases from 0 to 1."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core._tensors import check_shape
from flowmatch_core.field import Time

__all__ = ["CosineSchedule", "PolynomialSchedule", "Schedule", "token_time"]


class Schedule(ABC):
    r"""The probability of data $\kappa_t$, increasing, with $\kappa_0 = 0$ and $\kappa_1 = 1$.

    A subclass defines the probability of noise, $1 - \kappa_t$, by which the sampler and the lower bound divide: it
    must be accurate near `t = 1`, where one minus a rounded $\kappa_t$ is not.
    """

    @abstractmethod
    def noise(self, t: Tensor) -> Tensor:
        r"""Return $1 - \kappa_t$, exactly 0 at `t = 1`."""

    @abstractmethod
    def d_kappa(self, t: Tensor) -> Tensor:
        r"""Return $\dot\kappa_t$."""

    @abstractmethod
    def time_of_noise(self, noise: Tensor) -> Tensor:
        r"""Return the time at which $1 - \kappa_t$ has the given value."""


@final
@dataclass(frozen=True)
class PolynomialSchedule(Schedule):
    r"""The schedule $\kappa_t = t^n$.

    Args:
        n: The exponent, at least 1.

    Examples:
        >>> import torch
        >>> PolynomialSchedule(2).noise(torch.tensor([0.0, 0.5, 1.0]))
        tensor([1.0000, 0.7500, 0.0000])
    """

    n: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.n < math.inf:
            raise ValueError(f"n is {self.n}, but should be at least 1 and finite.")

    def noise(self, t: Tensor) -> Tensor:
        return torch.expm1(self.n * t.log()).abs() if self.n > 1 else 1 - t

    def d_kappa(self, t: Tensor) -> Tensor:
        return self.n * t ** (self.n - 1)

    def time_of_noise(self, noise: Tensor) -> Tensor:
        return torch.exp(torch.log1p(-noise) / self.n) if self.n > 1 else 1 - noise


@final
@dataclass(frozen=True)
class CosineSchedule(Schedule):
    r"""The schedule $\kappa_t = 1 - \cos(\pi t / 2)$, slow at first, when a jump sees little data.

    References:
        - MaskGIT: Masked Generative Image Transformer (Chang et al., 2022), https://arxiv.org/abs/2202.04200

    Examples:
        >>> import torch
        >>> CosineSchedule().noise(torch.tensor([0.0, 0.5, 1.0]))
        tensor([1.0000, 0.7071, 0.0000])
    """

    def noise(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # the cosine, but exactly zero at t = 1

    def d_kappa(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.sin(math.pi / 2 * t)

    def time_of_noise(self, noise: Tensor) -> Tensor:
        return 1 - 2 / math.pi * torch.asin(noise)


def token_time(t: Time, x: Tensor) -> Tensor:
    """Return `t` as a tensor of real numbers that broadcasts along the batch of the states `x`.

    Examples:
        >>> import torch
        >>> token_time(torch.rand(3), torch.zeros(3, 5, dtype=torch.long)).shape
        torch.Size([3, 1])
    """
    if not isinstance(t, Tensor):
        return torch.tensor(t, dtype=torch.float64, device=x.device)
    if t.ndim == 0:
        return t
    check_shape("t", t, x.shape[:1], "a float, 0-d or ")
    return t.reshape(-1, *(1,) * (x.ndim - 1))
