"""A network that predicts noise, with an error in the data that is uniform in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor

from flowmatch_core._tensors import expand_time
from flowmatch_core.field import (
    Field,
    Time,
    VelocityField,
    at_condition,
    has_closed_form_divergence,
    velocity_and_divergence,
)
from flowmatch_core.paths import AffinePath
from flowmatch_core.paths._affine import stack_times

__all__ = ["NoisePrediction"]


@final
class NoisePrediction(Field):
    r"""The noise prediction of a network $f$ with preconditioning.

    $\epsilon_t(x) = \frac{\sigma_t}{n_t^2} x + \frac{\alpha_t}{n_t} f(t, x / n_t, c)$ with $n_t^2 = \alpha_t^2 +
    \sigma_t^2$.

    The first term is the best linear prediction for data of unit variance, the second has the standard deviation of
    the residual. The implied data, $(x - \sigma_t \epsilon) / \alpha_t$, hence have the error of $f$ at every time.
    For a network that predicts the noise itself their error is $1 / \alpha_t$ times larger, 150 times at the start of
    `VP`; a bootstrap amplifies it and diverges within a few thousand training steps. On a path with $n = 1$ the
    network $f$ predicts $\alpha \epsilon - \sigma x_1$, the $v$ of Salimans and Ho.

    References:
        - Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022),
          https://arxiv.org/abs/2202.00512

    Args:
        network: The network f, any callable like a velocity field.
        path: The path of the diffusion.

    Examples:
        >>> from flowmatch_core.paths import VP
        >>> NoisePrediction(lambda t, x, cond: 0 * x, VP())(0.0, torch.ones(1, 1)).round(decimals=3)  # pure noise
        tensor([[1.]])
    """

    def __init__(self, network: VelocityField, path: AffinePath) -> None:
        super().__init__()
        self.network, self.path = network, path

    @property
    def has_closed_form_divergence(self) -> bool:
        """Whether the divergence of the network has a closed form."""
        return has_closed_form_divergence(self.network)

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the noise, shaped like `x`."""
        return self._noise(self._scales(t, x), t, x, cond)

    def at_condition(self, cond: Tensor) -> VelocityField:
        """Return the prediction with the condition encoded once by the network."""
        return NoisePrediction(at_condition(self.network, cond), self.path)

    def at_times(self, times: Sequence[Time], x: Tensor) -> list[VelocityField]:
        """Return a field for each of the times, with the scales of all of them computed at once."""
        stacked = stack_times(times, x)
        alpha, sigma = self.path.alpha(stacked).to(x.dtype), self.path.sigma(stacked).to(x.dtype)
        return [partial(self._noise, scales) for scales in zip(*_scales(alpha, sigma), strict=True)]

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the noise, shaped like `x`, and its exact divergence, with shape `(batch,)`."""
        skip, size, norm = self._scales(t, x)
        value, divergence = velocity_and_divergence(self.network, t, x / norm, cond)
        return skip * x + size * value, skip.flatten() * math.prod(x.shape[1:]) + (size / norm).flatten() * divergence

    def _noise(self, scales: tuple[Tensor, ...], t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        skip, size, norm = scales
        return skip * x + size * self.network(t, x / norm, cond)

    def _scales(self, t: Time, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _scales(expand_time(self.path.alpha(t), x), expand_time(self.path.sigma(t), x))


def _scales(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of `x` and of the network's output, and the divisor of the network's input."""
    norm = torch.sqrt(alpha.square() + sigma.square())
    return sigma / norm.square(), alpha / norm, norm
