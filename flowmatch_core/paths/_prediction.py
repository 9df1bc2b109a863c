"""Velocity fields of networks that predict noise, score or data."""

from __future__ import annotations

import math
from typing import final, get_args

import torch
from torch import Tensor

from flowmatch_core._call import call_field
from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import check_choice, check_finite, expand_time
from flowmatch_core.field import (
    Field,
    Time,
    VelocityField,
    cond_shape,
    has_closed_form_divergence,
    velocity_and_divergence,
)
from flowmatch_core.paths._affine import AffinePath, Quantity, before_data

__all__ = ["VelocityOf"]


@final
class VelocityOf(Field):
    r"""The velocity field of a network that predicts the noise, the score, the data or the velocity.

    $$
    v_t(x) = a_t x + b_t f(t, x, c), \qquad \nabla \cdot v_t = a_t d + b_t \nabla \cdot f
    $$

    with the `coefficients` of the path; the divergence has a closed form if that of the network has one.

    On a path with an infinite $\dot\sigma_1$ (`VP`, `OU`) the noise and the data at $t = 1$ do not determine the
    velocity there, which is finite. It then follows from the score just before, at `AffinePath.latest_time`, with the
    error of the network divided by $\sigma_t$. On `OU`, where a step of 1/40 holds half of the noise, likelihoods of
    trained networks need many steps next to the data, or a network that predicts the score.

    Where $\alpha_t = 0$, noise and score do not determine the data. The data are independent of `x` there and are
    replaced by their mean, which makes the velocity exact. Just after that time $b_t$ is of the order of $1 /
    \alpha_t$ and amplifies errors of the network.

    Args:
        network: The network $f(t, x, c)$, any callable like a velocity field.
        path: The path along which it was trained.
        prediction: What it predicts: one of velocity, noise, data and score.
        mean: The mean of the data, which broadcasts to the event; zero, that of standardised data, by default.

    Examples:
        >>> from flowmatch_core.paths import CondOT
        >>> field = VelocityOf(lambda t, x, cond: torch.full_like(x, 3.0), CondOT(), prediction="data")
        >>> field(0.5, torch.ones(1, 2))  # (3 - 1) / (1 - 0.5)
        tensor([[4., 4.]])
    """

    mean: Tensor | None

    def __init__(
        self, network: VelocityField, path: AffinePath, prediction: Quantity, mean: Tensor | None = None
    ) -> None:
        super().__init__()
        check_choice("prediction", prediction, get_args(Quantity))
        self.network, self.path, self.prediction = network, path, prediction
        self.cond_shape = cond_shape(network)
        self._latest = path.latest_time if prediction in ("noise", "data") else 1.0
        if mean is not None:
            check_finite("mean", mean)
        self.register_buffer("mean", mean)

    @property
    def has_closed_form_divergence(self) -> bool:
        """Whether the divergence of the network has a closed form."""
        return has_closed_form_divergence(self.network)

    def forward(self, t: Time, x: Tensor, cond: Condition = None) -> Tensor:
        """Return the velocity, shaped like `x`."""
        time = before_data(t, self._latest)
        value = call_field(self.network, time, x, cond)
        return value if self.prediction == "velocity" else self._velocity(t, time, x, value)[0]

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Condition = None) -> tuple[Tensor, Tensor]:
        """Return the velocity, shaped like `x`, and its exact divergence, with shape `(batch,)`."""
        time = before_data(t, self._latest)
        value, divergence = velocity_and_divergence(self.network, time, x, cond)
        if self.prediction == "velocity":
            return value, divergence
        velocity, a, b = self._velocity(t, time, x, value)
        return velocity, a.flatten() * math.prod(x.shape[1:]) + b.flatten() * divergence

    def _velocity(self, t: Time, time: Time, x: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the velocity and the coefficients of `x` and of the network's value, which is that at `time`."""
        a, b = self.path.coefficients(time, self.prediction, "velocity")
        if self._latest < 1:
            of_x, of_velocity = self.path.keep_score(time, t)
            a, b = of_x + of_velocity * a, of_velocity * b
        if self.prediction == "data":
            a, b = expand_time(a, x), expand_time(b, x)
            return a * x + b * value, a, b
        unknown = self.path.alpha(t) == 0
        a = expand_time(torch.where(unknown, self.path.d_sigma(t) / self.path.sigma(t), a), x)
        b = expand_time(torch.where(unknown, 0.0, b), x)
        velocity = a * x + b * value
        if self.mean is not None:
            velocity = velocity + expand_time(torch.where(unknown, self.path.d_alpha(t), 0.0), x) * self.mean
        return velocity, a, b
