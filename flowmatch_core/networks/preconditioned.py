"""Input and output scaling of a network for any path."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from flowmatch_core._call import call_field
from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import check_choice, expand_time
from flowmatch_core.field import (
    Field,
    Time,
    VelocityField,
    at_condition,
    cond_shape,
    has_closed_form_divergence,
    velocity_and_divergence,
)
from flowmatch_core.paths import AffinePath, Quantity
from flowmatch_core.paths._affine import stack_times

__all__ = ["Preconditioned"]


class Preconditioned(Field):
    r"""A prediction $a_t x + b_t f(t, x / n_t, c)$ whose network $f$ has inputs and targets of unit variance.

    For data of standard deviation $s$, $n_t^2 = \alpha_t^2 s^2 + \sigma_t^2$ is the variance of $x_t$. A quantity $y
    = p\, x_1 + q\, x_0$, such as the velocity with $p = \dot\alpha_t$ and $q = \dot\sigma_t$, has the best linear
    prediction $a_t x$ and a residual of standard deviation $b_t$:

    $$
    a_t = \frac{p\, \alpha_t s^2 + q\, \sigma_t}{n_t^2}, \qquad
    b_t = \frac{s\, \lvert p\, \sigma_t - q\, \alpha_t \rvert}{n_t} .
    $$

    Use it with any network on a path whose noise grows, `VE`, and wherever the data have another scale. `FiLMField`
    and `ResidualField` hold these scales for the velocity of the straight path.

    `NoisePrediction` is the case of the noise and $s = 1$.

    References:
        - Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), section 5,
          https://arxiv.org/abs/2206.00364

    Args:
        network: The network $f$, any callable like a velocity field.
        path: The path along which it is trained.
        data_scale: The standard deviation $s$ of the data.
        prediction: The quantity: velocity, noise, data or score. `VelocityOf` turns the last three into a velocity
            field.

    Raises:
        ValueError: The residual is infinite at an end of the path, as the velocity of `VP` and the score where no
            noise is left.

    Examples:
        >>> from flowmatch_core.paths import VE
        >>> field = Preconditioned(lambda t, x, cond: 0 * x, VE(sigma_min=0.1, sigma_max=10.0), prediction="data")
        >>> field(0.5, torch.ones(1, 1))  # at the standard deviation 1 of the noise the data are half of x
        tensor([[0.5000]])
    """

    def __init__(
        self,
        network: VelocityField,
        path: AffinePath,
        data_scale: float = 1.0,
        prediction: Quantity = "velocity",
    ) -> None:
        super().__init__()
        check_choice("prediction", prediction, get_args(Quantity))
        if not 0 < data_scale < math.inf:
            raise ValueError(f"data_scale is {data_scale}, but should be positive and finite.")
        self.network, self.path, self.data_scale, self.prediction = network, path, data_scale, prediction
        self.cond_shape = cond_shape(network)
        ends = self._scales_at(torch.tensor([0.0, 1.0], dtype=torch.float64), lambda value: value)
        if not all(scale.isfinite().all() for scale in ends):
            raise ValueError(
                f"prediction is {prediction!r}, whose residual is infinite at an end of {path}, but should be finite; "
                "predict noise or data and wrap the result in VelocityOf."
            )

    @property
    def has_closed_form_divergence(self) -> bool:
        """Whether the divergence of the network has a closed form."""
        return has_closed_form_divergence(self.network)

    def forward(self, t: Time, x: Tensor, cond: Condition = None) -> Tensor:
        """Return the prediction, shaped like `x`."""
        return self._predict(self._scales(t, x), t, x, cond)

    def prepared(self) -> Field:
        """Return the prediction with the network prepared."""
        network = self.network.prepared() if isinstance(self.network, Field) else self.network
        return Preconditioned(network, self.path, self.data_scale, self.prediction)

    def at_condition(self, cond: Condition) -> VelocityField:
        """Return the prediction with the condition encoded once by the network."""
        return Preconditioned(at_condition(self.network, cond), self.path, self.data_scale, self.prediction)

    def at_times(self, times: Sequence[Time], x: Tensor) -> list[VelocityField]:
        """Return a field for each of the times, with the scales of all of them computed at once."""
        scales = self._scales_at(stack_times(times, x), lambda value: value.to(x.dtype))
        return [partial(self._predict, some) for some in zip(*scales, strict=True)]

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Condition = None) -> tuple[Tensor, Tensor]:
        """Return the prediction, shaped like `x`, and its exact divergence, with shape `(batch,)`."""
        skip, size, norm = self._scales(t, x)
        value, divergence = velocity_and_divergence(self.network, t, x / norm, cond)
        return skip * x + size * value, skip.flatten() * math.prod(x.shape[1:]) + (size / norm).flatten() * divergence

    def _predict(self, scales: tuple[Tensor, ...], t: Time, x: Tensor, cond: Condition = None) -> Tensor:
        skip, size, norm = scales
        return skip * x + size * call_field(self.network, t, x / norm, cond)

    def _scales(self, t: Time, x: Tensor) -> tuple[Tensor, ...]:
        return self._scales_at(t, lambda value: expand_time(value, x))

    def _scales_at(self, t: Time, cast: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the factors of `x` and of the network's output, and the divisor of the network's input.

        Args:
            t: The time.
            cast: The conversion of a value of the path to the shape and dtype of the result.
        """
        path, s = self.path, self.data_scale
        alpha, sigma = cast(path.alpha(t)), cast(path.sigma(t))
        norm = torch.sqrt((s * alpha).square() + sigma.square())
        if self.prediction == "noise":
            return sigma / norm.square(), s * alpha / norm, norm
        if self.prediction == "data":
            return s**2 * alpha / norm.square(), s * sigma / norm, norm
        if self.prediction == "score":
            return -1 / norm.square(), s * alpha / (sigma * norm), norm
        d_alpha, d_sigma = cast(path.d_alpha(t)), cast(path.d_sigma(t))
        skip = (s**2 * alpha * d_alpha + cast(path.sigma_d_sigma(t))) / norm.square()
        return skip, s * (d_alpha * sigma - alpha * d_sigma) / norm, norm
