"""A network that predicts noise, with an error in the data that is uniform in time."""

from __future__ import annotations

from typing import final

from flowmatch_core.field import VelocityField
from flowmatch_core.networks.preconditioned import Preconditioned
from flowmatch_core.paths import AffinePath

__all__ = ["NoisePrediction"]


@final
class NoisePrediction(Preconditioned):
    r"""The noise prediction of a network $f$ with preconditioning, for data of unit variance.

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
        >>> import torch
        >>> from flowmatch_core.paths import VP
        >>> NoisePrediction(lambda t, x, cond: 0 * x, VP())(0.0, torch.ones(1, 1)).round(decimals=3)  # pure noise
        tensor([[1.]])
    """

    def __init__(self, network: VelocityField, path: AffinePath) -> None:
        super().__init__(network, path, prediction="noise")
