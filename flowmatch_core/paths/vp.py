"""The variance-preserving path of denoising diffusion (DDPM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core.field import Time
from flowmatch_core.paths._affine import time_tensor
from flowmatch_core.paths._variance_preserving import VariancePreserving

__all__ = ["VP"]


@final
@dataclass(frozen=True)
class VP(VariancePreserving):
    r"""The variance-preserving path $\alpha_t = e^{-B_t / 2}$, $\sigma_t = \sqrt{1 - \alpha_t^2}$.

    $$
    B_t = \int_0^{1 - t} \beta_s\,ds = \beta_{\min} (1 - t) +
    \frac{1}{2} (\beta_{\max} - \beta_{\min}) (1 - t)^2
    $$

    At `t = 0` a small weight of the data remains, $\alpha_0 = 0.0066$ with the default rates. The velocity
    $\dot\sigma_t x_0$ is infinite at `t = 1`, so a regression on it has heavy tails: let the network predict the
    noise, the score or the data.

    References:
        - Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
        - Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          https://arxiv.org/abs/2011.13456

    Args:
        beta_min: The rate $\beta_{\min}$ of the noise next to the data, at `t = 1`.
        beta_max: The rate $\beta_{\max}$ at `t = 0`.

    Examples:
        >>> VP().sigma(torch.tensor([0.0, 1.0]))
        tensor([1.0000, 0.0000])
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(
                f"beta_min is {self.beta_min}, but should be positive and at most beta_max, {self.beta_max}."
            )
        if self.beta_max == float("inf"):
            raise ValueError("beta_max is inf, but should be finite.")

    def noise_since_data(self, t: Time) -> Tensor:
        s = 1 - time_tensor(t)
        return (self.beta_min + (self.beta_max - self.beta_min) / 2 * s) * s

    def noise_rate(self, t: Time) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * (1 - time_tensor(t))

    def time_of_noise(self, noise: Tensor) -> Tensor:
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * noise)
        return 1 - 2 * noise / (self.beta_min + root)
