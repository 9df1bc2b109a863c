"""The straight path of conditional optimal transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core._tensors import as_time, check_shape, expand_time
from flowmatch_core.field import Time
from flowmatch_core.paths._affine import AffinePath, PathSample, time_tensor

__all__ = ["CondOT"]


@final
@dataclass(frozen=True)
class CondOT(AffinePath):
    r"""The straight path $\alpha_t = t$, $\sigma_t = 1 - (1 - \sigma_{\min}) t$.

    References:
        - Flow Matching for Generative Modeling (Lipman et al., 2023), https://arxiv.org/abs/2210.02747

    Args:
        sigma_min: The standard deviation $\sigma_{\min}$ left around the data at `t = 1`.

    Examples:
        >>> CondOT(sigma_min=0.1).sigma(torch.tensor([0.0, 1.0]))
        tensor([1.0000, 0.1000])
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min is {self.sigma_min}, but should be at least 0 and below 1.")

    def alpha(self, t: Time) -> Tensor:
        return time_tensor(t)

    def sigma(self, t: Time) -> Tensor:
        t = time_tensor(t)
        return torch.add(1 - t, t, alpha=self.sigma_min)  # accurate near t = 1

    def d_alpha(self, t: Time) -> Tensor:
        return torch.ones_like(time_tensor(t))

    def d_sigma(self, t: Time) -> Tensor:
        return torch.full_like(time_tensor(t), self.sigma_min - 1)

    def sigma_d_sigma(self, t: Time) -> Tensor:
        return self.sigma(t) * self.d_sigma(t)

    def sample(self, x0: Tensor, x1: Tensor, t: Time) -> PathSample:
        # the values of the base class, without products by derivatives that are constant
        check_shape("x0", x0, x1.shape)
        t = as_time(t, x1)
        s, end = expand_time(t, x1), x0 if self.sigma_min == 0 else (1 - self.sigma_min) * x0
        return PathSample(x_t=self.alpha(s) * x1 + self.sigma(s) * x0, velocity=x1 - end, t=t)

    def time_of_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha / (sigma + (1 - self.sigma_min) * alpha)).clamp_max(1)
