"""The straight path with a polynomial time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core.field import Time
from flowmatch_core.paths._affine import AffinePath, time_tensor

__all__ = ["Polynomial"]


@final
@dataclass(frozen=True)
class Polynomial(AffinePath):
    r"""The straight path with polynomial time, $\alpha_t = t^n$, $\sigma_t = 1 - t^n$.

    With $n > 1$ the velocity at `t = 0` is zero, so it does not determine the data there.

    References:
        - Flow Matching Guide and Code (Lipman et al., 2024), section 4.8, https://arxiv.org/abs/2412.06264

    Args:
        n: The power, at least 1.

    Examples:
        >>> Polynomial(n=2.0).alpha(0.5)
        tensor(0.2500, dtype=torch.float64)
    """

    n: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.n < float("inf"):
            raise ValueError(f"n is {self.n}, but should be at least 1: the velocity at t = 0 would be infinite.")

    def alpha(self, t: Time) -> Tensor:
        return time_tensor(t) ** self.n

    def sigma(self, t: Time) -> Tensor:
        t = time_tensor(t)
        late = 0 - torch.expm1(self.n * t.clamp_min(0.5).log())  # accurate near t = 1; the zero there has no sign
        return torch.where(t < 0.5, 1 - t**self.n, late)

    def d_alpha(self, t: Time) -> Tensor:
        return self.n * time_tensor(t) ** (self.n - 1)

    def d_sigma(self, t: Time) -> Tensor:
        return -self.d_alpha(t)

    def sigma_d_sigma(self, t: Time) -> Tensor:
        return self.sigma(t) * self.d_sigma(t)

    def time_of_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha / (alpha + sigma)) ** (1 / self.n)
