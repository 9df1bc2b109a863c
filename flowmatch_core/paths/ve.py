"""The variance-exploding path of score matching with annealed noise (SMLD)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core.field import Time
from flowmatch_core.paths._affine import AffinePath, time_tensor

__all__ = ["VE"]


@final
@dataclass(frozen=True)
class VE(AffinePath):
    r"""The variance-exploding path $x_t = x_1 + \sigma_t x_0$.

    The noise is geometric in time, $\sigma_t = \sigma_{\max}^{1 - t} \sigma_{\min}^t$.

    At `t = 0` its law is $N(x_1, \sigma_{\max}^2 I)$, so a sampler has to draw from $N(0, \sigma_{\max}^2 I)$ instead
    of standard noise (`base_scale` of `ContinuousFlow`), and $\sigma_{\max}$ should be far above the standard
    deviation of the data. At `t = 1` noise of standard deviation $\sigma_{\min}$ remains.

    References:
        - Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          https://arxiv.org/abs/2011.13456

    Args:
        sigma_min: The standard deviation $\sigma_{\min}$ at `t = 1`.
        sigma_max: The standard deviation $\sigma_{\max}$ at `t = 0`.

    Examples:
        >>> VE(sigma_min=0.1, sigma_max=10.0).sigma(torch.tensor([0.0, 0.5, 1.0]))
        tensor([10.0000,  1.0000,  0.1000])
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min is {self.sigma_min}, but should be positive and below {self.sigma_max}.")
        if self.sigma_max == float("inf"):
            raise ValueError("sigma_max is inf, but should be finite.")

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(time_tensor(t))

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_max * torch.exp(-self._log_ratio * time_tensor(t))

    def d_alpha(self, t: Time) -> Tensor:
        return torch.zeros_like(time_tensor(t))

    def d_sigma(self, t: Time) -> Tensor:
        return -self._log_ratio * self.sigma(t)

    def sigma_d_sigma(self, t: Time) -> Tensor:
        return -self._log_ratio * self.sigma(t).square()

    def time_of_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (torch.log(self.sigma_max * alpha / sigma) / self._log_ratio).clamp(0, 1)
