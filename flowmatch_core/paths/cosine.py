"""The cosine path, a quarter circle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core.field import Time
from flowmatch_core.paths._affine import AffinePath, time_tensor

__all__ = ["Cosine"]


@final
@dataclass(frozen=True)
class Cosine(AffinePath):
    r"""The quarter circle $\alpha_t = \sin(\pi t / 2)$, $\sigma_t = \cos(\pi t / 2)$.

    References:
        - Stochastic Interpolants (Albergo et al., 2023), https://arxiv.org/abs/2303.08797
        - Temporal Difference Flows (Farebrother et al., 2025), section 5.1, https://arxiv.org/abs/2503.09817

    Examples:
        >>> Cosine().sigma(torch.tensor([0.0, 1.0]))
        tensor([1., 0.])
    """

    def alpha(self, t: Time) -> Tensor:
        return torch.sin(math.pi / 2 * time_tensor(t))

    def sigma(self, t: Time) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - time_tensor(t)))  # cos(pi t / 2), but exactly zero at t = 1

    def d_alpha(self, t: Time) -> Tensor:
        return math.pi / 2 * self.sigma(t)

    def d_sigma(self, t: Time) -> Tensor:
        return -math.pi / 2 * self.alpha(t)

    def sigma_d_sigma(self, t: Time) -> Tensor:
        return self.sigma(t) * self.d_sigma(t)

    def time_of_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (2 / math.pi * torch.atan2(alpha, sigma)).clamp_max(1)
