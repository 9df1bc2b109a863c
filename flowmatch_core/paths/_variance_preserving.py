"""The common base of variance-preserving diffusion paths."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from flowmatch_core.field import Time
from flowmatch_core.paths._affine import AffinePath

__all__ = ["VariancePreserving"]

_ALL_NOISE = 1e4  # alpha = exp(-5000) underflows to zero in every dtype


class VariancePreserving(AffinePath):
    r"""A path with $\alpha_t = e^{-B_t / 2}$ and $\alpha_t^2 + \sigma_t^2 = 1$.

    It is the time reversal, $s = 1 - t$, of the diffusion $dx = -\frac{1}{2} \beta_s x\,ds + \sqrt{\beta_s}\,dB_s$
    that starts at the data, with $B_t = \int_0^{1 - t} \beta_s\,ds$. A subclass defines $B_t$, $\beta_{1 - t}$ and
    the inverse of $B_t$.
    """

    @abstractmethod
    def noise_since_data(self, t: Time) -> Tensor:
        r"""Return $B_t$, exactly zero at `t = 1`."""

    @abstractmethod
    def noise_rate(self, t: Time) -> Tensor:
        r"""Return $\beta_{1 - t} = -\dot B_t$."""

    @abstractmethod
    def time_of_noise(self, noise: Tensor) -> Tensor:
        r"""Return the time with $B_t$ = `noise`, which may be below 0."""

    def alpha(self, t: Time) -> Tensor:
        return torch.exp(-self.noise_since_data(t) / 2)

    def sigma(self, t: Time) -> Tensor:
        return (-torch.expm1(-self.noise_since_data(t))).sqrt()  # accurate near t = 1, where alpha is close to one

    def d_alpha(self, t: Time) -> Tensor:
        return self.noise_rate(t) * self.alpha(t) / 2

    def d_sigma(self, t: Time) -> Tensor:
        return self.sigma_d_sigma(t) / self.sigma(t)

    def sigma_d_sigma(self, t: Time) -> Tensor:
        return -self.noise_rate(t) * torch.exp(-self.noise_since_data(t)) / 2

    def time_of_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        noise = torch.log1p((sigma / alpha).square()).clamp_max(_ALL_NOISE)
        return self.time_of_noise(noise).clamp(0, 1)
